"""What all settings have in common: how one is declared, read from text, and told about when it is wrong.

A model of settings (mooncake.core.options) is the only list of its fields. Flags, environment, the settings
file, documentation and reload are made from it: from `setting(...)` of each field, and the field's type.
"""

import difflib
import functools
import inspect
import os
import re
import shlex
from collections.abc import Callable, Iterable, Mapping
from types import UnionType
from typing import Annotated, Any, ClassVar, Final, Literal, Self, Union, get_args, get_origin

import msgspec
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from mooncake.core.config import parse_cores, parse_size_bytes
from mooncake.core.errors import ConfigError

ENV_PREFIX: Final = "MOONCAKE_"
DEFAULT: Final = "default"
"""Origin of what nobody said."""
MASK: Final = "(set)"
"""Shown for a secret."""
NAME_ADVICE: Final = "use up to 64 letters, digits, dots, dashes and underscores"
_SECRET_ARGUMENT: Final = re.compile(r"--[a-z0-9-]*(key|token|secret|password)[a-z0-9-]*", re.IGNORECASE)

# ---------------------------------------------------------------- fields


class _Meta(msgspec.Struct, frozen=True, kw_only=True):
    """What pydantic does not know of a setting; see `setting`."""

    reloads: bool = False
    secret: bool = False
    flags: tuple[str, ...] = ()
    shown: str | None = None
    fact: bool = False


def setting(
    default: Any,
    text: str,
    *,
    key: str | None = None,
    low: float | None = None,
    high: float | None = None,
    reloads: bool = False,
    secret: bool = False,
    flags: tuple[str, ...] = (),
    shown: str | None = None,
) -> Any:
    """Declare a setting.

    Args:
        default: `...` if there is none.
        text: what it means, for --help and docs.
        key: its public name where that is not the attribute's.
        low: least value.
        high: largest value.
        reloads: it can change without a restart.
        secret: only from the environment, never shown, never handed on.
        flags: more spellings of its flag.
        shown: how the default is told to people, where its value says nothing.
    """
    meta = _Meta(reloads=reloads, secret=secret, flags=flags, shown=shown)
    extra = {"mooncake": msgspec.to_builtins(meta)}
    return Field(
        default, alias=key, description=text, ge=low, le=high, repr=not secret, exclude=secret or None,
        json_schema_extra=extra,
    )  # fmt: skip


def fact(default: Any = ...) -> Any:
    """Declare what is found out at the start: nobody sets it, a child process is told it."""
    return Field(default, json_schema_extra={"mooncake": msgspec.to_builtins(_Meta(fact=True))})


def _said(read: Callable[[str], Any]) -> Callable[[object], Any]:
    """Return a validator that reads texts; the advice is a ValueError, as pydantic wants it."""

    def validate(value: object) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return read(value)
        except ConfigError as error:
            raise ValueError(str(error).rpartition(": ")[2]) from None

    return validate


def _words(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise ConfigError(f"words: write words as in a shell ({error})") from None


def _name(text: str) -> str:
    # names become file names and metadata keys
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", text, re.ASCII):
        raise ValueError(NAME_ADVICE)
    return text


Size = Annotated[int, BeforeValidator(_said(parse_size_bytes)), "size"]
"""Bytes, as an integer or as text: 512MiB."""
Cores = Annotated[list[int], BeforeValidator(_said(lambda text: [] if text == "auto" else parse_cores(text)))]
"""Numbers of cores, as a list or as text: 0-3."""
Words = Annotated[list[str], BeforeValidator(_said(_words))]
Name = Annotated[str, AfterValidator(_name)]
OptionalName = Annotated[str, AfterValidator(lambda text: _name(text) if text else text)]
Place = Annotated[str, AfterValidator(lambda text: os.path.abspath(text) if text else text)]
"""Path of a file or folder; a relative one is taken from where the process starts."""
LogLevel = Literal["debug", "info", "warning", "error"]
LogFormat = Literal["auto", "json", "console"]


class Setting(msgspec.Struct, frozen=True):
    """One setting of one process. `default` as people write it; None: it has to be said."""

    key: str
    field: str
    text: str
    default: str | None
    kind: str  # flag | whole number | number | size | cores | words | text, or the choices by |
    low: float | None
    high: float | None
    reloads: bool
    secret: bool
    flags: tuple[str, ...]

    @property
    def range(self) -> str:
        """Values that it may have, as people write them; "" = any."""
        low, high = ("" if one is None else shown(self.kind, one) for one in (self.low, self.high))
        if low and high:
            return f"{low}..{high}"
        return f"at least {low}" if low else f"at most {high}" if high else ""

    @property
    def names(self) -> list[str]:
        """Its key, and other spellings of it."""
        return [self.key, *(flag.removeprefix("--").replace("-", "_") for flag in self.flags)]

    @property
    def env(self) -> str:
        """Name of its environment variable."""
        return ENV_PREFIX + self.key.upper()


def shown(kind: str, value: object) -> str:
    """Return a value as it could be written into the file."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if kind == "size" and isinstance(value, int):
        unit = max((name for name in _BINARY if value % _BINARY[name] == 0), key=lambda name: _BINARY[name])
        return f"{value // _BINARY[unit]}{unit}"
    if isinstance(value, list):
        words = masked(value) if kind == "words" else value
        return shlex.join(map(str, words)) if kind == "words" else ",".join(map(str, words))
    if isinstance(value, float):
        return f"{value:g}"
    return "" if value is None else str(value)


_BINARY: Final = {"": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}


def masked(words: Iterable[str]) -> list[str]:
    """Return arguments without the values of those that look like secrets."""
    found: list[str] = []
    hide = False
    for word in words:
        name, equals, _ = word.partition("=")
        is_secret = _SECRET_ARGUMENT.fullmatch(name) is not None
        found.append(MASK if hide and not word.startswith("--") else name + equals + MASK * bool(equals)
                     if is_secret else word)  # fmt: skip
        hide = is_secret and not equals
    return found


# ---------------------------------------------------------------- what is wrong


class Problem(msgspec.Struct, frozen=True):
    """One wrong setting. `value`: as it is shown, "" = none was given; `origin`: who said it."""

    key: str
    value: str
    advice: str
    origin: str = ""

    def __str__(self) -> str:
        value = f" = {self.value}" if self.value else ""
        return f"{self.key}{value}{f' ({self.origin})' if self.origin else ''}: {self.advice}"


def told(problems: Iterable[object]) -> ConfigError:
    """Return one error that tells all of them, a line each."""
    return ConfigError("\n".join(map(str, problems)))


def refusals(key: str, value: object, check: Callable[[], object]) -> list[Problem]:
    """Return what `check` raises as a problem of `key`."""
    try:
        check()
    except ConfigError as error:
        return [Problem(key, repr(value), str(error).removeprefix(f"{key} = {value!r}: "))]
    return []


def nearest(key: str, keys: Iterable[str]) -> str:
    """Return advice for a key that is none of `keys`."""
    found = difflib.get_close_matches(key.lower().replace("-", "_"), sorted(keys), n=1)
    return f"no such setting; {f'did you mean {found[0]}?' if found else 'see docs/configuration.md'}"


class Options(BaseModel):
    """Settings of one process; values are right once it is made. Does not change: see `replace`."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        validate_by_name=True,
        validate_by_alias=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )
    section: ClassVar[str] = ""
    """Of the settings file."""

    config: str = setting("", "Settings file (YAML), see docs/configuration.md.")
    log_level: LogLevel = setting("info", "Which log lines are written.", reloads=True)
    log_format: LogFormat = setting("auto", "Of log lines; auto: console on a terminal, else json.")
    origins: dict[str, str] = fact({})
    source: str = fact("")  # section of the file that these values came from, where it is another's

    def __init__(self, **values: Any) -> None:
        """Take values, or texts that mean them.

        Raises:
            ConfigError: tells every value that is wrong.
        """
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise told(_problems(type(self), values, error)) from None

    def __repr_args__(self) -> Iterable[tuple[str | None, Any]]:
        """Secrets stay out of logs and tracebacks, those among vLLM's arguments too."""
        for name, value in super().__repr_args__():
            yield name, masked(value) if name == "vllm_args" else value

    @classmethod
    def origin(cls, key: str) -> str:  # noqa: ARG003
        """Return who said the value that is being read; "" = code."""
        return ""

    def replace(self, **changes: Any) -> Self:
        """Return a copy with other values of some attributes.

        Raises:
            ConfigError: one of them is wrong.
        """
        return type(self)(**{**dict(self), **changes})

    def shared(self, kind: "type[Options]") -> dict[str, Any]:
        """Return the attributes that `kind` has too, to make one of it."""
        return {name: value for name, value in self if name in kind.model_fields}

    def encoded(self) -> bytes:
        """Return it for a child process, without secrets."""
        return self.model_dump_json().encode()

    @classmethod
    def decoded(cls, data: bytes) -> Self:
        """Return what `encoded` gave."""
        return cls.model_validate_json(data)

    def checked(self) -> Self:
        """Return self.

        Raises:
            ConfigError: values do not go together, or lack something in the environment (a key, a secret).
        """
        found = [*self.conflicts(), *self.unmet()]
        if found:
            raise told(msgspec.structs.replace(one, origin=self._told_by(one.key)) for one in found)
        return self

    def conflicts(self) -> list[Problem]:
        """Return values that do not go together."""
        return []

    def unmet(self) -> list[Problem]:
        """Return what the environment of this process lacks for these values."""
        return []

    def _told_by(self, key: str) -> str:
        return self.origins.get(key, "")


# ---------------------------------------------------------------- looking at models


@functools.cache
def settings_of(kind: type[Options]) -> Mapping[str, Setting]:
    """Return the settings of a process by their keys: its own first, then those that others have too."""
    order = [name for cls in kind.__mro__ for name in inspect.get_annotations(cls)]
    found = {}
    for field, info in sorted(kind.model_fields.items(), key=lambda item: order.index(item[0])):
        meta = _meta(info)
        if meta.fact:
            continue
        what = kind_of(info)
        default = None if info.is_required() else shown(what, info.default)
        if meta.shown is not None:
            default = meta.shown
        key = info.alias or field
        low, high = _limits(info)
        found[key] = Setting(
            key,
            field,
            info.description or "",
            default,
            what,
            low,
            high,
            meta.reloads,
            meta.secret,
            meta.flags,
        )
    return found


def values_of(options: Options) -> dict[str, dict[str, Any]]:
    """Return every setting: its value as it could be written, and who said it. Secrets are masked."""
    found = {}
    for one in settings_of(type(options)).values():
        value = getattr(options, one.field)
        text = (MASK if value else "") if one.secret else shown(one.kind, value)
        found[one.key] = {
            "value": text,
            "origin": options.origins.get(one.key, DEFAULT),
            "reloads": one.reloads,
        }
    return found


def kind_of(info: FieldInfo) -> str:
    """Return what a setting takes, in a word, or its choices separated by |."""
    types = {bool: "flag", float: "number", str: "text"}
    annotation = info.annotation
    if get_origin(annotation) in (Union, UnionType):  # int | None
        annotation = next(one for one in get_args(annotation) if one is not type(None))
    if get_origin(annotation) is Literal:
        return "|".join(get_args(annotation))
    if annotation is int:
        return "size" if "size" in info.metadata else "whole number"
    if get_origin(annotation) is list:
        return "cores" if get_args(annotation) == (int,) else "words"
    return types[annotation]  # type: ignore[index]


def _limits(info: FieldInfo) -> tuple[float | None, float | None]:
    found: dict[str, float] = {}
    for rule in info.metadata:
        found |= {name: getattr(rule, name) for name in ("ge", "le") if hasattr(rule, name)}
    return found.get("ge"), found.get("le")


def _meta(info: FieldInfo) -> _Meta:
    extra = info.json_schema_extra
    assert isinstance(extra, dict), "declare it by setting() or fact()"
    return msgspec.convert(extra["mooncake"], _Meta)


def _problems(kind: type[Options], values: Mapping[str, Any], error: ValidationError) -> list[Problem]:
    known = settings_of(kind)
    keys = {one.field: key for key, one in known.items()}
    found = []
    for one in error.errors(include_url=False):
        name = str(one["loc"][0]) if one["loc"] else ""
        key = keys.get(name, name)
        if key in known:
            given = values.get(key, values.get(known[key].field))
            value = "" if one["type"] == "missing" else MASK if known[key].secret else repr(given)
            found.append(Problem(key, value, _advice(known[key], one), kind.origin(key)))
        elif name in kind.model_fields:
            found.append(Problem(name, repr(values.get(name)), str(one["msg"])))
        else:
            found.append(Problem(name, repr(values.get(name)), nearest(name, known)))
    return list(dict.fromkeys(found))


def _advice(one: Setting, error: Any) -> str:
    if error["type"] == "missing":
        flag = "--" + one.key.replace("_", "-")
        return f"has to be said: {flag}, {one.env}, or {one.key} in the file of --config"
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    if one.key == "port" and str(error["input"]).startswith("tcp://"):
        return (
            "Kubernetes sets it for a Service of that name: enableServiceLinks: false in the pod, or unset it"
        )
    if "|" in one.kind:
        return f"must be one of {', '.join(one.kind.split('|'))}"
    if one.kind == "flag":
        return "must be true or false"
    if one.kind in ("whole number", "number") and not error["type"].endswith("than_equal"):
        return f"must be a {one.kind}{f', {one.range}' if one.range else ''}"
    return f"must be {one.range}" if one.range else str(error["msg"])
