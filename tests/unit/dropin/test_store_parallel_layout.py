"""Cutting a tensor loses nothing and doubles nothing, and names say what upstream's say."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mooncake.core.errors import RequestError
from mooncake.dropin.store.parallel_layout import Axis, Layout, Split, axis_of, copies, overlapping, span

torch = pytest.importorskip("torch")

SIDES = st.lists(st.integers(0, 5), min_size=1, max_size=5)


@st.composite
def cuts(draw):
    """Shape of a tensor, the dimension along which it lies in pieces, their lengths, what is wanted of it."""
    sides = draw(SIDES)
    shape = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    dim = draw(st.integers(0, len(shape) - 1))
    shape[dim] = sum(sides)
    size = draw(st.integers(1, 7))
    split = Split(draw(st.integers(0, size - 1)), size, draw(st.integers(0, len(shape) - 1)))
    return shape, dim, sides, draw(st.one_of(st.none(), st.just(split)))


@given(side=st.integers(1, 200), size=st.integers(1, 40))
def test_pieces_tile_a_side_as_torch_chunk_does(side: int, size: int) -> None:
    spans = [span(side, rank, size) for rank in range(size)]
    assert [index for begin, end in spans for index in range(begin, end)] == list(range(side))
    lengths = [end - begin for begin, end in spans if end > begin]
    assert lengths == [len(one) for one in torch.arange(side).chunk(size)]


@given(cuts())
def test_any_piece_made_of_any_pieces_is_that_slice_of_the_whole(cut) -> None:
    shape, dim, sides, wanted = cut
    whole = np.arange(int(np.prod(shape))).reshape(shape)
    pieces = np.split(whole, np.cumsum(sides)[:-1], axis=dim)
    target_shape, moves = copies(shape, dim, sides, wanted)
    target, written = np.full(target_shape, -1), np.zeros(target_shape, int)
    for move in moves:
        target[move.target] = pieces[move.piece][move.source]
        written[move.target] += 1
    expected = whole
    if wanted is not None:
        expected = whole.take(range(*span(shape[wanted.dim], wanted.rank, wanted.size)), wanted.dim)
    assert np.array_equal(target, expected)
    assert (written == 1).all()


@given(sides=SIDES, size=st.integers(1, 7), data=st.data())
def test_only_pieces_that_have_some_of_it_are_asked_for(sides, size, data) -> None:
    wanted = Split(data.draw(st.integers(0, size - 1)), size, 0)
    _, moves = copies([sum(sides)], 0, sides, wanted)
    assert overlapping(sides, span(sum(sides), wanted.rank, size)) == [move.piece for move in moves]


TP, DP = Axis("tp", 1, 4, split_dim=0), Axis("dp", 0, 2)
EP, PP = Axis("ep", 1, 2, expert_id=7), Axis("pp", 1, 2, stage_id=3)


@pytest.mark.parametrize(
    ("axes", "name"),
    [
        ([TP], "k_tp_1"),
        ([DP], "k__dp_0of2"),
        ([EP], "k__ep_1of2_eid7"),
        ([PP], "k__pp_1of2_sid3"),
        ([TP, DP], "k__dp_0of2__tp_1of4_sd0"),
        ([PP, EP, TP, DP], "k__dp_0of2__tp_1of4_sd0__ep_1of2_eid7__pp_1of2_sid3"),
        ([Axis("dp", 0, 2, expert_id=1, stage_id=4)], "k__dp_0of2_eid1_sid4"),
    ],
)
def test_names_are_those_measured_on_upstream(axes, name) -> None:
    for order in itertools.permutations(axes):
        assert Layout.of(order).name("k") == name


def test_a_writer_s_piece_and_a_whole_tensor_have_names_of_their_own() -> None:
    assert Layout((), Split(1, 2, 0), writer=True).name("k") == "k__writer_1of2_sd0"
    assert Layout((), None).name("k") == "k"
    assert Layout.of([TP]).manifest("k") == "k__parallelism_manifest"
    assert Layout((), Split(1, 2, 0), writer=True).manifest("k") == "k__writer_manifest"


def test_no_two_pieces_of_one_layout_share_a_name_and_all_share_a_manifest() -> None:
    for axes in ([TP], [TP, DP], [EP, TP]):
        layout = Layout.of(axes)
        assert len({*layout.names("k")}) == 4
        assert {layout.with_split(Split(rank, 4, 0)).manifest("k") for rank in range(4)} == {
            layout.manifest("k")
        }
    assert Layout.of([TP, DP]).manifest("k") != Layout.of([TP, EP]).manifest("k")


@pytest.mark.parametrize(
    ("axes", "said"),
    [
        ([], "at least"),
        ([TP, TP], "different kinds"),
        ([Axis("cp", 0, 2)], "cp"),
        ([Axis("", 0, 2)], "dp, tp"),
        ([Axis("tp", 0, 2)], "split_dim"),
        ([Axis("tp", 0, 2, split_dim=-1)], "split_dim"),
        ([Axis("tp", 2, 2, split_dim=0)], "rank 2 of 2"),
        ([Axis("tp", -1, 2, split_dim=0)], "rank -1"),
        ([Axis("tp", 0, 0, split_dim=0)], "of 0"),
        ([Axis("tp", 0, 1 << 30, split_dim=0)], "rank 0"),
        ([Axis("dp", 0, 2, split_dim=0)], "tp alone"),
        ([Axis("ep", 0, 2)], "expert_id"),
        ([Axis("ep", 0, 2, split_dim=0, expert_id=0)], "tp alone"),
        ([Axis("pp", 0, 2)], "stage_id"),
    ],
)
def test_axes_that_upstream_refuses_are_refused_and_named(axes, said) -> None:
    with pytest.raises(RequestError, match=said):
        Layout.of(axes)


def test_an_axis_is_read_from_anything_that_has_its_fields() -> None:
    class Alike:
        kind, rank, size, split_dim, expert_id, stage_id = "TP", 1, 4, 0, None, None

    assert axis_of(Alike()) == TP
    for wrong in (object(), "tp", Axis("tp", "1", 4, 0)):
        with pytest.raises(RequestError, match="no ParallelAxis"):
            axis_of(wrong)
