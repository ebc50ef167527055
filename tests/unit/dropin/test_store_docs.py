"""docs/store.md says of every public method what it does and where that is tested."""

import re
from pathlib import Path

import pytest

from mooncake.store import MooncakeDistributedStore
from mooncake.store_left_out import REASONS

ROOT = Path(__file__).parents[3]
ROWS = re.findall(r"^\| `(\w+)` \| (.+) \| (.+) \|$", (ROOT / "docs/store.md").read_text(), re.MULTILINE)
METHODS = {name for name in dir(MooncakeDistributedStore) if not name.startswith("_")}


def test_every_public_method_has_one_row() -> None:
    assert sorted(name for name, _, _ in ROWS if name in METHODS) == sorted(METHODS)


@pytest.mark.parametrize(("name", "what", "where"), [row for row in ROWS if row[0] in METHODS])
def test_a_row_is_true_to_the_code_and_its_tests(name: str, what: str, where: str) -> None:
    if name in REASONS:
        assert what == f"left out: {REASONS[name]}"
        return
    first = (getattr(MooncakeDistributedStore, name).__doc__ or "").strip().split("\n\n")[0]
    assert what == " ".join(first.split())
    for test in where.split(", "):
        assert re.search(rf"\b{name}\b", Path(__file__).with_name(test).read_text()), test
