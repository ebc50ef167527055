"""The allocator never overlaps, never leaves its range, and forgets nothing when all is freed."""

import itertools

import hypothesis.strategies as st
import pytest
from hypothesis import given

from kvstore.node.allocator import ALIGN_BYTES, OffsetAllocator, aligned
from mooncake.core.errors import ConfigError

PAGE = ALIGN_BYTES
KV_BLOCK_BYTES = 30 * 98_304  # SmolLM2-135M: 30 layers
CAPACITY = 64 * PAGE

# ("a", size) allocates, ("f", n) frees the n-th live range
operations = st.lists(
    st.tuples(st.just("a"), st.integers(1, 20 * PAGE)) | st.tuples(st.just("f"), st.integers(0, 63)),
    max_size=120,
)


def replay(allocator: OffsetAllocator, steps) -> dict[int, int]:
    live: dict[int, int] = {}
    for kind, value in steps:
        if kind == "a":
            largest = allocator.largest_free_bytes
            offset = allocator.allocate(value)
            assert (offset is None) == (aligned(value) > largest), "fails exactly when nothing fits"
            if offset is not None:
                live[offset] = aligned(value)
        elif live:
            offset = sorted(live)[value % len(live)]
            allocator.free(offset, live.pop(offset))
    return live


@given(operations)
def test_live_and_free_ranges_tile_the_segment_exactly(steps):
    allocator = OffsetAllocator(CAPACITY)
    live = replay(allocator, steps)
    ranges = sorted([*live.items(), *allocator.free_ranges()])
    position = 0
    for offset, size in ranges:
        assert offset == position, "a hole or an overlap"
        assert offset % PAGE == 0
        assert size > 0
        position += size
    assert position == CAPACITY
    assert allocator.used_bytes == sum(live.values())
    assert allocator.free_bytes == CAPACITY - allocator.used_bytes


@given(operations)
def test_free_neighbours_are_always_merged(steps):
    allocator = OffsetAllocator(CAPACITY)
    replay(allocator, steps)
    free = allocator.free_ranges()
    assert all(a + size < b for (a, size), (b, _) in itertools.pairwise(free))
    assert allocator.largest_free_bytes == max((size for _, size in free), default=0)


@given(operations, st.randoms(use_true_random=False))
def test_freeing_everything_in_any_order_returns_to_one_range(steps, random):
    allocator = OffsetAllocator(CAPACITY)
    ranges = list(replay(allocator, steps).items())
    random.shuffle(ranges)
    for offset, size in ranges:
        allocator.free(offset, size)
    assert allocator.free_ranges() == [(0, CAPACITY)]
    assert allocator.used_bytes == 0


@pytest.mark.parametrize("block_bytes", [KV_BLOCK_BYTES, 3_198 * 1024, 98_304, 5_000_000, 131_072])
def test_equal_blocks_fill_at_least_95_percent(block_bytes):
    capacity = 128 << 20
    allocator = OffsetAllocator(capacity)
    stored = 0
    while allocator.allocate(block_bytes) is not None:
        stored += block_bytes
    assert stored / capacity >= 0.95


def test_churn_of_equal_blocks_does_not_fragment():
    allocator = OffsetAllocator(64 << 20)
    offsets = []
    while (offset := allocator.allocate(KV_BLOCK_BYTES)) is not None:
        offsets.append(offset)
    for turn in range(2000):
        allocator.free(offsets[turn * 7 % len(offsets)], KV_BLOCK_BYTES)
        offsets[turn * 7 % len(offsets)] = allocator.allocate(KV_BLOCK_BYTES)
        assert None not in offsets


def test_best_fit_takes_the_smallest_range_that_holds_it():
    allocator = OffsetAllocator(CAPACITY)
    small, _, _large, _ = (allocator.allocate(n * PAGE) for n in (2, 1, 8, 1))
    allocator.free(small, 2 * PAGE)
    allocator.free(_large, 8 * PAGE)
    assert allocator.allocate(2 * PAGE) == small
    assert allocator.allocate(7 * PAGE) == _large


@pytest.mark.parametrize(("size", "expected"), [(1, PAGE), (PAGE, PAGE), (PAGE + 1, 2 * PAGE)])
def test_sizes_round_up_to_whole_pages(size, expected):
    allocator = OffsetAllocator(CAPACITY)
    offset = allocator.allocate(size)
    assert aligned(size) == expected == allocator.used_bytes
    allocator.free(offset, size)
    assert allocator.free_ranges() == [(0, CAPACITY)]


def test_freeing_what_is_not_live_is_a_bug_and_shows():
    allocator = OffsetAllocator(CAPACITY)
    offset = allocator.allocate(PAGE)
    allocator.allocate(PAGE)
    allocator.free(offset, PAGE)
    with pytest.raises(AssertionError, match="twice"):
        allocator.free(offset, PAGE)


@pytest.mark.parametrize("capacity", [0, -PAGE, PAGE - 1, PAGE + 1])
def test_a_capacity_that_is_not_whole_pages_is_refused(capacity):
    with pytest.raises(ConfigError, match="multiple of 4096"):
        OffsetAllocator(capacity)
