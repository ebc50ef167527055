"""The Conductor's policy modules know no clock, randomness, sockets, engines or logs."""

import ast
from pathlib import Path

import pytest

PURE = (
    "lengths",
    "modes",
    "why",
    "admission",
    "stays",
    "terms",
    "plan",
    "index",
    "cost",
    "cluster",
    "scheduler",
    "request",
    "pricing",
    "inline",
    "sessions",
    "heat",
    "coming",
)
ALLOWED = {"collections", "collections.abc", "enum", "hashlib", "heapq", "itertools", "math", "msgspec"}
OURS = {f"conductor.{name}" for name in PURE} | {
    "mooncake.core.context",
    "mooncake.core.errors",
    "mooncake.core.keys",
    "mooncake.core.messages",
}
FOLDER = Path(__file__).parents[3] / "conductor"


@pytest.mark.parametrize("name", PURE)
def test_a_policy_module_imports_only_pure_things(name):
    tree = ast.parse((FOLDER / f"{name}.py").read_text())
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module)
    assert imported <= ALLOWED | OURS
