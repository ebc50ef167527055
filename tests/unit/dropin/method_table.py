"""The compatibility table of docs/store-methods.md, made from the code and the tests that exercise it.

`python -m tests.unit.dropin.method_table` writes it anew.
"""

import ast
import sys
from pathlib import Path

from mooncake.store import MooncakeDistributedStore

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs/store-methods.md"
TESTS = sorted(Path(__file__).parent.glob("test_store*.py"))
HEAD = """# `MooncakeDistributedStore`, method by method

Made by `python -m tests.unit.dropin.method_table` from the methods' docstrings and from `tests/unit/dropin/`;
a test fails when it is out of date. What differs from upstream on purpose is in [store.md](store.md).

| method | here | tests |
|---|---|---|
"""


def methods() -> list[str]:
    """Return every public method."""
    return sorted(name for name in dir(MooncakeDistributedStore) if not name.startswith("_"))


def calls() -> dict[str, dict[str, list[str]]]:
    """Return, by method, the test functions that call it or name it in a text, by file."""
    found: dict[str, dict[str, list[str]]] = {name: {} for name in methods()}
    for path in TESTS:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.FunctionDef) or not node.name.startswith("test_"):
                continue
            for name in {word for inner in ast.walk(node) for word in _words(inner)} & found.keys():
                found[name].setdefault(path.name, []).append(node.name)
    return found


def _words(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Attribute):
        return [node.attr]
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return [node.value]
    return []


def page() -> str:
    """Return the whole page."""
    rows = []
    for name, files in calls().items():
        what = " ".join((getattr(MooncakeDistributedStore, name).__doc__ or "").split("\n\n")[0].split())
        where = ", ".join(f"{file} ({len(tests)})" for file, tests in sorted(files.items()))
        rows.append(f"| `{name}` | {what} | {where} |\n")
    return HEAD + "".join(rows)


if __name__ == "__main__":
    PAGE.write_text(page())
    sys.stdout.write(f"{PAGE.relative_to(ROOT)}: {len(methods())} methods\n")
