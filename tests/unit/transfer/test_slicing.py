"""Cutting loses and doubles no byte; spreading loads the paths evenly."""

from hypothesis import given
from hypothesis import strategies as st

from transfer.slicing import cut, spread

SIZES = st.integers(0, 1 << 20)
PIECES = st.integers(256, 1 << 16)


@given(SIZES, PIECES)
def test_the_pieces_cover_the_range_without_gap_or_overlap(size, piece):
    at = 0
    for offset, length in cut(size, piece):
        assert offset == at
        assert length > 0
        at += length
    assert at == size


@given(SIZES, PIECES)
def test_no_piece_is_longer_than_five_quarters_and_no_last_one_shorter_than_a_quarter(size, piece):
    pieces = cut(size, piece)
    assert all(length <= piece + piece // 4 for _, length in pieces)
    assert all(length == piece for _, length in pieces[:-1])
    if len(pieces) > 1:
        assert pieces[-1][1] > piece // 4


def test_a_small_rest_joins_the_last_piece():
    assert cut(2 * 1024 + 256, 1024) == [(0, 1024), (1024, 1280)]
    assert cut(2 * 1024 + 257, 1024) == [(0, 1024), (1024, 1024), (2048, 257)]
    assert cut(100, 1024) == [(0, 100)]
    assert cut(0, 1024) == []


@given(
    st.lists(st.integers(1, 1 << 20), max_size=50), st.lists(st.integers(0, 1 << 22), min_size=1, max_size=6)
)
def test_every_piece_goes_where_least_was_to_do(sizes, loads):
    loads = list(loads)
    for size, path in zip(sizes, spread(sizes, loads), strict=True):
        assert loads[path] == min(loads)
        loads[path] += size


def test_equal_pieces_alternate_over_idle_paths():
    assert spread([10] * 4, [0, 0]) == [0, 1, 0, 1]


def test_a_busy_path_is_left_alone_until_the_others_caught_up():
    assert spread([10] * 4, [25, 0]) == [1, 1, 1, 0]
