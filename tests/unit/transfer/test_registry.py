"""The registry: a table of ranges that never overlap, opened by key, and never let go while in use."""

import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mooncake.core.errors import PeerTimeout, RequestError
from transfer.model import KEY_BYTES
from transfer.registry import Registry

PAGE = 4096


def memory(pages: int = 4) -> np.ndarray:
    return np.zeros(pages * PAGE, np.uint8)


def address_of(array: np.ndarray) -> int:
    return int(array.ctypes.data)


def test_a_buffer_is_found_by_every_range_inside_it_and_by_no_other():
    array, registry = memory(), Registry()
    start = address_of(array)
    buffer = registry.add(start, array.nbytes)
    assert registry.find(start, array.nbytes) is buffer
    assert registry.find(start + 100, 7) is buffer
    assert registry.find(start - 1, 2) is None
    assert registry.find(start + array.nbytes - 1, 2) is None
    assert registry.find(start + array.nbytes, 1) is None


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 20)), max_size=20))
def test_registered_ranges_never_overlap_and_refusals_change_nothing(ranges):
    registry, model = Registry(), {}
    base = 1 << 20
    for start, size in ranges:
        taken = any(start < s + n and s < start + size for s, n in model.items())
        if taken:
            with pytest.raises(RequestError, match="overlaps"):
                registry.add(base + start, size, "cuda:0")
        else:
            registry.add(base + start, size, "cuda:0")
            model[start] = size
    assert [(b.address - base, b.size_bytes) for b in registry] == sorted(model.items())
    for at in range(80):
        owner = [s for s, n in model.items() if s <= at < s + n]
        found = registry.find(base + at, 1)
        assert (found.address - base if found else None) == (owner[0] if owner else None)


def test_a_view_is_the_memory_itself():
    array, registry = memory(), Registry()
    buffer = registry.add(address_of(array), array.nbytes)
    buffer.part(buffer.address + 5, 2)[:] = b"ab"
    assert bytes(array[4:8]) == b"\0ab\0"


def test_device_memory_has_no_view():
    assert Registry().add(1 << 40, PAGE, "cuda:0").view is None


@pytest.mark.parametrize(
    ("address", "size"), [(0, 1), (-1, 1), (1, 0), (1, -1), (1 << 64, 1), ((1 << 64) - 1, 2)]
)
def test_nonsense_ranges_are_refused(address, size):
    with pytest.raises(RequestError, match="no memory at"):
        Registry().add(address, size, "cuda:0")


def test_every_buffer_has_its_own_random_key():
    registry = Registry()
    keys = {registry.add(1 << 20 + i, 1, "cuda:0").key for i in range(20)}
    assert len(keys) == 20
    assert {len(key) for key in keys} == {KEY_BYTES}


def test_a_hidden_buffer_opens_to_nobody_and_takes_no_new_use():
    array, registry = memory(), Registry()
    buffer = registry.add(address_of(array), array.nbytes)
    assert registry.by_key(buffer.key) is buffer
    registry.hide(buffer)
    assert registry.by_key(buffer.key) is None
    with pytest.raises(RequestError, match="being unregistered"):
        registry.take(buffer)


def test_retiring_waits_for_the_last_use():
    array, registry = memory(), Registry()
    buffer = registry.add(address_of(array), array.nbytes)
    registry.take(buffer)
    registry.hide(buffer)
    with pytest.raises(PeerTimeout, match="1 transfers"):
        registry.retire(buffer, 0.0)
    assert registry.find(buffer.address, 1) is buffer  # still there: its memory must not be reused
    waiter = threading.Thread(target=registry.retire, args=(buffer, 10.0))
    waiter.start()
    registry.give(buffer)
    waiter.join(10)
    assert not waiter.is_alive()
    assert registry.find(buffer.address, 1) is None


def test_hiding_again_is_allowed_until_it_is_gone():
    array, registry = memory(), Registry()
    buffer = registry.add(address_of(array), array.nbytes)
    registry.hide(buffer)
    registry.hide(buffer)
    registry.retire(buffer, 1.0)
    assert registry.add(address_of(array), array.nbytes).buffer_id != buffer.buffer_id


def test_use_of_several_is_all_or_none():
    one, other, registry = memory(), memory(), Registry()
    a = registry.add(address_of(one), one.nbytes)
    b = registry.add(address_of(other), other.nbytes)
    registry.hide(b)
    with pytest.raises(RequestError):
        registry.take(a, b)
    assert a.uses == 0


def test_the_version_grows_with_every_change():
    array, registry = memory(), Registry()
    seen = [registry.version]
    buffer = registry.add(address_of(array), array.nbytes)
    seen.append(registry.version)
    registry.hide(buffer)
    registry.retire(buffer, 1.0)
    seen.append(registry.version)
    assert seen == sorted(set(seen))
