"""Batches in registered memory go a shorter way, which nobody can tell by what comes out."""

import ctypes
import itertools

import pytest

from kvstore.client.object_names import object_key

SIZE = 70_000
COUNT = 12


@pytest.fixture
def area(store):
    memory = (ctypes.c_ubyte * (2 * COUNT * SIZE))()
    address = ctypes.addressof(memory)
    assert store.register_buffer(address, len(memory)) == 0
    yield memory
    store.unregister_buffer(address)


NUMBERS = itertools.count()


def names(count: int = COUNT) -> list[str]:
    return [f"straight-{next(NUMBERS)}" for _ in range(count)]


def places(area, first: int = 0, count: int = COUNT) -> list[int]:
    return [ctypes.addressof(area) + (first + at) * SIZE for at in range(count)]


def fill(area) -> None:
    for at in range(COUNT):
        ctypes.memset(places(area)[at], at + 1, SIZE)


def read(area, at: int, size: int = SIZE) -> bytes:
    return ctypes.string_at(places(area, COUNT)[at], size)


def test_batches_come_back_from_the_first_one_on(store, area):
    fill(area)
    for _ in range(3):
        keys = names()
        assert store.batch_put_from(keys, places(area), [SIZE] * COUNT) == [0] * COUNT
        ctypes.memset(places(area, COUNT)[0], 0, COUNT * SIZE)
        assert store.batch_get_into(keys, places(area, COUNT), [SIZE] * COUNT) == [SIZE] * COUNT
        assert [read(area, at) for at in range(COUNT)] == [bytes([at + 1]) * SIZE for at in range(COUNT)]


def test_the_short_way_is_gone_by_batches_in_registered_memory(store, area, monkeypatch):
    fill(area)
    keys = names()
    store.batch_put_from(names(1), places(area)[:1], [SIZE])

    def refuse(*_args, **_kwargs):
        raise AssertionError("the long way")

    for way in ("put", "get_into"):
        monkeypatch.setattr(store._calls, way, refuse)
    assert store.batch_put_from(keys, places(area), [SIZE] * COUNT) == [0] * COUNT
    assert store.batch_is_exist(keys) == [1] * COUNT  # who asks has the store take in what was put
    assert store.batch_get_into(keys, places(area, COUNT), [SIZE] * COUNT) == [SIZE] * COUNT
    assert store.get_into(keys[3], places(area, COUNT)[0], SIZE) == SIZE
    assert read(area, 0) == bytes([4]) * SIZE


def test_what_is_missing_or_of_another_size_is_told_key_by_key(store, area):
    fill(area)
    keys = names(3)
    store.batch_put_from(keys[:2], places(area)[:2], [SIZE, 100])
    got = store.batch_get_into(keys, places(area, COUNT)[:3], [SIZE, SIZE, SIZE])
    assert got == [SIZE, 100, -704]
    assert (read(area, 0), read(area, 1, 100)) == (bytes([1]) * SIZE, bytes([2]) * 100)
    assert store.batch_get_into(keys[:2], places(area, COUNT)[:2], [SIZE, 99]) == [SIZE, -600]


def test_an_object_that_is_there_stays_and_of_two_of_a_name_the_first_counts(store, area):
    fill(area)
    (key, twice) = names(2)
    assert store.batch_put_from([key], places(area)[:1], [SIZE]) == [0]
    assert store.batch_put_from([twice, key, twice], places(area)[3:6], [SIZE] * 3) == [0, 0, 0]
    assert store.get(key) == bytes([1]) * SIZE
    assert store.get(twice) == bytes([4]) * SIZE


@pytest.mark.parametrize("bad", ["beyond", "negative", "empty name", "no number", "lengths"])
def test_arguments_that_make_no_sense_are_told_as_ever(store, area, bad):
    fill(area)
    keys, starts, sizes = names(2), places(area)[:2], [SIZE, SIZE]
    if bad == "beyond":
        sizes[1] = 1 << 50
    elif bad == "negative":
        sizes[1] = -1
    elif bad == "empty name":
        keys[1] = ""
    elif bad == "lengths":
        sizes.pop()
    else:
        starts[1] = None
        with pytest.raises(TypeError):
            store.batch_put_from(keys, starts, sizes)
        return
    codes = store.batch_put_from(keys, starts, sizes)
    assert codes == ([-600, -600] if bad in ("lengths", "empty name") else [0, -600])


def test_bytes_that_do_not_verify_are_never_read(store, area):
    fill(area)
    keys = names(2)
    store.batch_put_from(keys, places(area)[:2], [SIZE] * 2)
    assert store.batch_is_exist(keys) == [1, 1]
    (access,) = store._calls.pool._members.stores.values()
    _, offset, _ = access.shown.table.find(object_key(keys[1]))
    access.shown.memory[offset + 5] ^= 1
    codes = store.batch_get_into(keys, places(area, COUNT)[:2], [SIZE] * 2)
    assert codes[0] == SIZE
    assert codes[1] < 0
