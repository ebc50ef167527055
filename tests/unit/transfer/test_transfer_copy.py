"""Copies move every byte to its place, refuse what does not fit, and count once per call."""

import sys
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mooncake.core.errors import RequestError
from transfer.copy import gather, scatter


def pattern(size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)


@settings(max_examples=40)
@given(st.lists(st.integers(0, 300), max_size=12))
def test_scatter_undoes_gather_for_any_page_sizes(sizes):
    pages = [pattern(size, seed) for seed, size in enumerate(sizes)]
    buffer = bytearray(sum(sizes))
    gather(pages, memoryview(buffer))
    assert bytes(buffer) == b"".join(page.tobytes() for page in pages)
    back = [np.zeros_like(page) for page in pages]
    scatter(memoryview(buffer).toreadonly(), back)
    assert all(np.array_equal(a, b) for a, b in zip(pages, back, strict=True))


def test_one_block_of_a_strided_cache_goes_in_one_call_to_the_same_bytes():
    cache = pattern(5 * 7 * 64).reshape(5, 7, 64)  # layer, block, byte
    as_array, as_list = bytearray(5 * 64), bytearray(5 * 64)
    gather(cache[:, 3], memoryview(as_array))
    gather([cache[layer, 3] for layer in range(5)], memoryview(as_list))
    assert as_array == as_list
    target = np.zeros_like(cache)
    scatter(memoryview(as_array), target[:, 3])
    assert np.array_equal(target[:, 3], cache[:, 3])
    assert not target[:, :3].any()
    assert not target[:, 4:].any()


@pytest.mark.parametrize("size", [63, 65])
def test_sizes_that_do_not_fit_are_refused_before_any_byte_moves(size):
    buffer = bytearray(size)
    pages = [np.ones(32, np.uint8), np.ones(32, np.uint8)]
    with pytest.raises(RequestError, match="hold 64 bytes"):
        gather(pages, memoryview(buffer))
    with pytest.raises(RequestError, match="hold 64 bytes"):
        scatter(memoryview(buffer), pages)
    assert not any(buffer)


@pytest.mark.parametrize("page", [np.zeros(16, np.float32), np.zeros((8, 8), np.uint8)])
def test_pages_of_another_type_or_shape_are_refused(page):
    with pytest.raises(RequestError, match="1-D uint8"):
        gather([page], memoryview(bytearray(64)))


def test_read_only_targets_are_refused():
    page = np.zeros(8, np.uint8)
    with pytest.raises(RequestError, match="read-only range"):
        gather([page], memoryview(bytes(8)))
    page.flags.writeable = False
    with pytest.raises(RequestError, match="read-only page"):
        scatter(memoryview(bytes(8)), [page])


def test_the_meter_hears_once_per_call_with_all_bytes():
    heard = []
    gather([np.zeros(8, np.uint8)] * 4, memoryview(bytearray(32)), lambda size, s: heard.append((size, s)))
    assert [size for size, _ in heard] == [32]
    assert heard[0][1] >= 0


def test_a_big_copy_lets_other_threads_run():
    page, target = np.ones(32 << 20, np.uint8), memoryview(bytearray(32 << 20))
    gate, ran = threading.Lock(), []
    gate.acquire()

    def other():
        with gate:
            ran.append(True)

    thread = threading.Thread(target=other)
    thread.start()
    interval_s = sys.getswitchinterval()
    sys.setswitchinterval(1000.0)  # from here on only a voluntary release lets the other thread run
    try:
        gate.release()
        before = list(ran)
        for _ in range(50):
            gather([page], target)
            if ran:
                break
        after = list(ran)
    finally:
        sys.setswitchinterval(interval_s)
    thread.join()
    assert (before, after) == ([], [True])
