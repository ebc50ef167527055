"""Other projects' packages without what they depend on: absent modules are empty shells.

The connectors under test are a few hundred lines each of packages whose imports pull in half a GPU stack.
What a script names becomes a module in which every name is a class that does nothing; everything else,
`mooncake` first of all, is real.
"""

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any


class _Anything(type):
    """Classes that can be subscripted, joined by | and iterated (over nothing); their attributes are such."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _anything(name)

    def __getitem__(cls, item: object) -> Any:
        return cls

    def __or__(cls, other: object) -> Any:
        return cls

    __ror__ = __or__

    def __iter__(cls) -> Iterator[Any]:
        return iter(())


def _new(cls: Any, *args: Any, **_: Any) -> Any:
    if len(args) == 1 and callable(args[0]):
        return args[0]  # used as a decorator
    return object.__new__(cls)


def _call(self: Any, *args: Any, **_: Any) -> Any:
    return args[0] if len(args) == 1 and callable(args[0]) else self


def _anything(name: str) -> Any:
    """Return a class to be called, derived from, decorated with and asked for anything."""
    methods = {
        "__new__": _new,
        "__init__": lambda self, *args, **kwargs: None,
        "__call__": _call,
        "__getattr__": lambda self, name: _anything(name),
    }
    return _Anything(name, (), methods)


class _Shell(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = _anything(name)
        setattr(self, name, value)
        return value


class Shells(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Makes shells of `modules`, with what is below them: packages that are absent, parts of packages."""

    def __init__(self, *modules: str, instead: Sequence[str] = ()) -> None:
        """Acts from now on; `instead`: packages that are here but too heavy for what is wanted of them."""
        find = importlib.machinery.PathFinder.find_spec
        self._names = (*instead, *(name for name in modules if "." in name or find(name) is None))
        sys.meta_path.insert(0, self)

    def find_spec(self, fullname: str, path: Sequence[str] | None = None, target: Any = None) -> Any:
        if any(fullname == name or fullname.startswith(f"{name}.") for name in self._names):
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> ModuleType:
        return _Shell(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def bare_package(name: str) -> Path:
    """Let modules of a package be imported without its own `__init__`; return its folder, if it has one."""
    path = Path(*name.split("."))
    found = (Path(each, path) for each in sys.path if Path(each, path).is_dir())
    module = ModuleType(name)
    module.__path__ = [str(next(found, path))]
    sys.modules[name] = module
    return Path(module.__path__[0])
