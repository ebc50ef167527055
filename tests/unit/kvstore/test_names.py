"""Names of objects: listed once they were committed with one, until their last copy is gone."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.client.pool import Pool
from kvstore.node import names as module
from kvstore.node.names import NAME_BYTES_MAX, Names
from mooncake.core.errors import RequestError
from tests.unit.kvstore.test_pool import distant
from transfer.config import EngineConfig

PATIENCE_S = 20.0


def key_of(number: int) -> bytes:
    return number.to_bytes(32, "big")


def listing(names: Names) -> dict[bytes, bytes]:
    found, cursor = {}, 0
    while True:
        page = names.page(cursor)
        keys = [page.keys[at : at + 32] for at in range(0, len(page.keys), 32)]
        found.update(zip(keys, page.names, strict=True))
        cursor = page.cursor
        if not cursor:
            return found


@given(steps=st.lists(st.tuples(st.sampled_from("afd"), st.integers(0, 9), st.binary(max_size=5))))
def test_what_is_listed_is_what_is_there_by_its_last_name(steps):
    there: set[bytes] = set()
    names, expected = Names(there.__contains__), {}
    for what, number, name in steps:
        key = key_of(number)
        if what == "a":
            there.add(key)
            names.add(key, name)
            expected[key] = name
        else:  # forgotten, or gone without a word
            there.discard(key)
            expected.pop(key, None)
            if what == "f":
                names.forget([key])
    assert listing(names) == expected


def test_pages_have_everything_once_and_are_bounded(monkeypatch):
    monkeypatch.setattr(module, "PAGE_NAMES_MAX", 3)
    monkeypatch.setattr(module, "PAGE_BYTES_MAX", 100)
    names = Names(lambda _: True)
    for number in range(10):
        names.add(key_of(number), b"n%d" % number)
    assert listing(names) == {key_of(number): b"n%d" % number for number in range(10)}
    assert len(names.page(0).names) == 3
    names.add(key_of(10), b"x" * 100)
    names.add(key_of(11), b"last")
    assert names.page(9).names == [b"n9", b"x" * 100]


def test_names_of_objects_that_came_and_went_unnoticed_do_not_pile_up(monkeypatch):
    monkeypatch.setattr(module, "CHECK_MIN", 8)
    there: set[bytes] = set()
    names = Names(there.__contains__)
    for number in range(1000):
        there.add(key_of(number))
        names.add(key_of(number), b"x")
        if number >= 3:
            there.discard(key_of(number))
    assert len(names) <= 8


def test_names_are_as_many_as_objects_and_no_books():
    Names.check([], 3)
    Names.check([b"a", b"", b"x" * NAME_BYTES_MAX], 3)
    with pytest.raises(RequestError, match="1 names for 3"):
        Names.check([b"a"], 3)
    with pytest.raises(RequestError, match="at most"):
        Names.check([b"x" * (NAME_BYTES_MAX + 1)], 1)


@pytest.mark.parametrize("far", [False, True])
def test_a_pool_lists_what_was_put_so_and_is_still_there(start_store, tmp_path, far):
    record = start_store(transfer=EngineConfig(run_dir=str(tmp_path / "s"))).record
    engine = EngineConfig(run_dir=str(tmp_path / "e"))
    with Pool(stores=[distant(record) if far else record], engine=engine) as pool:
        put = {"listed": True, "deadline_s": PATIENCE_S}
        pool.put(["a", "b", "c", b"raw"], [b"1", b"2", b"3", b"4"], **put)
        pool.put(["a", "ä"], [b"1", b"2"], tenant="t", **put)
        pool.put(["quiet"], [b"1"], deadline_s=PATIENCE_S)
        pool.remove(["b"], deadline_s=PATIENCE_S)
        assert pool.names(deadline_s=PATIENCE_S) == ["a", "c"]
        assert pool.names(tenant="t", deadline_s=PATIENCE_S) == ["a", "ä"]
        pool.put(["b"], [b"5"], **put)
        assert pool.names(deadline_s=PATIENCE_S) == ["a", "c", "b"]


def test_an_evicted_object_has_no_name_any_more(start_store):
    with Pool(stores=[start_store().record]) as pool:
        for number in range(4):  # 8 MiB hold two
            pool.put([f"n{number}"], [bytes(3 << 20)], listed=True, deadline_s=PATIENCE_S)
        assert pool.names(deadline_s=PATIENCE_S) == ["n2", "n3"]
