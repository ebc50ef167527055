"""A tensor is written under one layout and read under another; no reader ever gets bytes of two of them.

Names, codes and which arguments are refused are as measured on upstream's wheel (0.3.13.post1), which
answers None, or another piece than the one asked for, where readers and writers differ.
"""

import itertools

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mooncake.core.errors import RequestError
from mooncake.dropin.store.tensors import HEAD_BYTES
from mooncake.store import MooncakeDistributedStore, ParallelAxis, ReadTarget, TensorParallelism
from tests.unit.dropin.test_store import config_of
from tests.unit.dropin.test_store_tensors import same, some

torch = pytest.importorskip("torch")

WHOLE = some("float32", 8, 6)
numbers = itertools.count()


def axis(kind: str, rank: int = 0, size: int = 2, dim: int | None = None, **more) -> ParallelAxis:
    made = ParallelAxis()
    made.kind, made.rank, made.size, made.split_dim = kind, rank, size, dim
    for name, value in more.items():
        setattr(made, name, value)
    return made


def tp(rank: int, size: int, dim: int = 0) -> ParallelAxis:
    return axis("tp", rank, size, dim)


def along(*axes: ParallelAxis) -> TensorParallelism:
    made = TensorParallelism()
    made.axes = list(axes)
    return made


def target(mode: str, *axes: ParallelAxis) -> ReadTarget:
    made = ReadTarget()
    made.mode = mode
    made.parallelism = along(*axes) if axes else None
    return made


def shard(*axes: ParallelAxis) -> ReadTarget:
    return target("shard", *axes)


def put_shards(store, key: str, size: int, dim: int = 0, tensor=WHOLE, call: str = "put") -> None:
    write = getattr(store, f"{call}_tensor_with_parallelism")
    for rank, piece in enumerate(tensor.chunk(size, dim)):
        assert write(key, piece.clone(), along(tp(rank, size, dim))) == 0


# ---------------------------------------------------------------- one layout written, another read

LAYOUTS = st.tuples(st.integers(1, 4), st.integers(0, 2))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    how=st.sampled_from(["whole", "shards", "with_tp", "owners", "writers"]),
    shape=st.tuples(st.integers(4, 9), st.integers(4, 9), st.integers(4, 9)),
    written=LAYOUTS,
    wanted=LAYOUTS,
    dtype=st.sampled_from(["float32", "bfloat16", "float8_e4m3fn", "bool", "complex128", "int64"]),
)
def test_any_piece_of_any_layout_is_that_slice_of_the_tensor(
    shared, how, shape, written, wanted, dtype
) -> None:
    key, tensor = f"any{next(numbers)}", some(dtype, *shape)
    owners = [axis("dp", 1, 3), axis("pp", 0, 2, stage_id=5)] if how == "owners" else []
    (size, dim), (want_size, want_dim) = written, wanted
    pieces = tensor.chunk(size, dim)
    size = len(pieces)
    if how == "whole":
        assert shared.put_tensor_with_parallelism(key, tensor) == 0
    elif how == "with_tp":
        assert shared.put_tensor_with_tp(key, tensor, 0, max(size, 2), dim) == 0
    for rank, piece in enumerate(pieces):
        cut = tp(rank, size, dim)
        if how == "shards":
            assert shared.put_tensor_with_parallelism(key, piece, along(cut)) == 0
        elif how == "owners":
            assert shared.put_tensor_with_parallelism(key, tensor, along(cut, *owners)) == 0
        elif how == "writers":
            assert shared.put_tensor_with_parallelism(key, tensor, writer_partition=cut) == 0
    expected = tensor.chunk(want_size, want_dim)
    for rank in range(want_size):
        got = shared.get_tensor_with_parallelism(key, shard(tp(rank, want_size, want_dim), *owners))
        assert got is None if rank >= len(expected) else same(got, expected[rank])
    full = target("full", tp(0, 1), *owners) if owners else target("full")
    assert same(shared.get_tensor_with_parallelism(key, full), tensor)
    shared.remove_all(force=True)


def test_shards_of_any_lengths_are_one_tensor(store) -> None:
    lengths, tensor = [1, 5, 2, 4], some("int64", 12, 3)
    for rank, piece in enumerate(tensor.split(lengths)):
        assert store.put_tensor_with_parallelism("k", piece, along(tp(rank, 4))) == 0
    assert same(store.get_tensor_with_parallelism("k", target("full")), tensor)
    for size in (2, 3, 6):
        for rank, piece in enumerate(tensor.chunk(size)):
            assert same(store.get_tensor_with_parallelism("k", shard(tp(rank, size))), piece)
    assert same(store.get_tensor_with_parallelism("k", shard(tp(1, 4))), tensor[1:6])  # the shard itself


def test_with_tp_reads_what_was_written_for_another_number_of_ranks(store, memory) -> None:
    tensor = some("float16", 6, 8)
    assert store.put_tensor_with_tp("k", tensor, tp_size=4, split_dim=1) == 0
    shards = tensor.chunk(2, 1)
    assert same(store.get_tensor_with_tp("k", 1, 2), shards[1])
    array, address = memory(HEAD_BYTES + 48)
    there = store.get_tensor_with_tp_into("k", address, array.nbytes, 0, 2)
    assert same(there, shards[0])
    assert there.data_ptr() == address + HEAD_BYTES
    assert store.get_tensor_with_tp("k", 2, 2) is None
    assert store.get_tensor_with_tp("k", -1, 2) is None


@pytest.mark.parametrize("lost", ["k_tp_0", "k_tp_2"])
def test_a_set_that_is_not_whole_is_a_miss_but_what_is_there_is_read(store, lost) -> None:
    put_shards(store, "k", 4)
    assert store.remove(lost, force=True) == 0
    assert store.get_tensor_with_parallelism("k", target("full")) is None
    assert store.get_tensor_with_parallelism("k", shard(tp(0, 2))) is None
    assert same(store.get_tensor_with_parallelism("k", shard(tp(3, 4))), WHOLE[6:])


def test_pieces_of_two_layouts_are_never_put_together(store) -> None:
    put_shards(store, "k", 4)
    assert store.upsert_tensor("k_tp_1", some("float32", 2, 6) * 0) == 0  # of no layout
    assert store.put_tensor_with_tp("other", WHOLE, tp_size=2) == 0
    store.upsert("k_tp_2", store.get("other_tp_1"))
    assert store.get_tensor_with_parallelism("k", target("full")) is None
    assert store.get_tensor_with_parallelism("k", shard(tp(1, 2))) is None
    assert store.get_tensor_with_parallelism("k", shard(tp(2, 4))) is None


def test_pieces_of_another_type_or_shape_are_never_put_together(store) -> None:
    for index, odd in enumerate([some("int32", 4, 6), some("float32", 4, 5), some("float32", 4)]):
        key = f"k{index}"
        assert store.put_tensor_with_parallelism(key, WHOLE[:4], along(tp(0, 2))) == 0
        assert store.put_tensor_with_parallelism(key, odd, along(tp(1, 2))) == 0
        assert store.get_tensor_with_parallelism(key, target("full")) is None


def test_other_things_under_the_names_of_a_tensor_do_not_hide_its_pieces(store) -> None:
    store.put("k", b"what the application knows of it" * 20)
    put_shards(store, "k", 4)
    assert same(store.get_tensor_with_parallelism("k", target("full")), WHOLE)
    assert same(store.get_tensor_with_parallelism("k", shard(tp(2, 8))), WHOLE[2:3])
    assert store.get_tensor_with_parallelism("k") is None
    store.put("other_tp_0", b"x" * 500)
    assert store.get_tensor_with_parallelism("other", target("full")) is None


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (4, 0, 3)])
def test_a_tensor_of_no_elements_has_pieces_too(store, shape) -> None:
    tensor = some("float32", *shape)
    for rank in range(2):
        axes = along(axis("dp"), tp(rank, 2))
        assert store.put_tensor_with_parallelism("k", tensor, axes) == 0
    assert same(store.get_tensor_with_parallelism("k", target("full", axis("dp"), tp(0, 1))), tensor)
    third = store.get_tensor_with_parallelism("k", shard(axis("dp"), tp(2, 4)))
    assert third is None if not shape[0] else same(third, tensor[2:3])


def test_a_tensor_is_read_by_another_client_than_its_writers(store, join) -> None:
    writers = [join(1 << 20), join(1 << 20)]
    for rank, writer in enumerate(writers):
        assert writer.put_tensor_with_parallelism("k", WHOLE.chunk(2)[rank], along(tp(rank, 2))) == 0
    assert same(store.get_tensor_with_parallelism("k", shard(tp(1, 3, 1))), WHOLE.chunk(3, 1)[1])


def test_an_upsert_of_which_a_part_is_done_is_a_miss_not_a_mixture(store) -> None:
    put_shards(store, "k", 4)
    assert store.upsert_tensor_with_parallelism("k", WHOLE[:4] + 1, along(tp(0, 2))) == 0
    assert store.get_tensor_with_parallelism("k", target("full")) is None
    assert store.get_tensor_with_parallelism("k", shard(tp(1, 2))) is None
    assert same(store.get_tensor_with_parallelism("k", shard(tp(0, 2))), WHOLE[:4] + 1)
    assert store.upsert_tensor_with_parallelism("k", WHOLE[4:] + 1, along(tp(1, 2))) == 0
    assert same(store.get_tensor_with_parallelism("k", target("full")), WHOLE + 1)


def test_a_damaged_manifest_is_none(store) -> None:
    assert store.put("k__parallelism_manifest", b"\xff" * 9) == 0
    put_shards(store, "k", 4)
    assert same(store.get_tensor_with_parallelism("k", target("full")), WHOLE)


# ---------------------------------------------------------------- whose tensor it is


def test_owners_have_tensors_of_their_own(store) -> None:
    for expert in (0, 1):
        for rank in (0, 1):
            axes = along(axis("ep", expert, 2, expert_id=expert), tp(rank, 2, 1))
            assert store.put_tensor_with_parallelism("k", WHOLE + expert, axes) == 0
    mine = axis("ep", 1, 2, expert_id=1)
    assert same(store.get_tensor_with_parallelism("k", shard(mine, tp(2, 3, 0))), (WHOLE + 1).chunk(3)[2])
    assert same(store.get_tensor_with_parallelism("k", target("full", mine, tp(0, 1))), WHOLE + 1)
    assert same(store.get_tensor_with_parallelism("k", shard(mine)), WHOLE + 1)
    for other in (axis("ep", 1, 2, expert_id=2), axis("ep", 1, 4, expert_id=1), axis("dp")):
        assert store.get_tensor_with_parallelism("k", shard(other, tp(0, 2, 1))) is None
    assert store.get_tensor_with_parallelism("k", target("full")) is None
    assert store.get_tensor_with_parallelism("k") is None


def test_without_tp_the_tensor_is_stored_as_it_is(store) -> None:
    stage = axis("pp", 1, 2, stage_id=1)
    assert store.put_tensor_with_parallelism("k", WHOLE, along(stage)) == 0
    assert same(store.get_tensor("k__pp_1of2_sid1"), WHOLE)
    assert same(store.get_tensor_with_parallelism("k", shard(stage)), WHOLE)
    assert same(store.get_tensor_with_parallelism("k", shard(tp(1, 4, 1), stage)), WHOLE.chunk(4, 1)[1])


def test_as_stored_is_the_object_of_that_name(store) -> None:
    assert store.put_tensor_with_parallelism("k", WHOLE) == 0
    for wanted in (None, target("as_stored")):
        assert same(store.get_tensor_with_parallelism("k", wanted), WHOLE)
    assert store.get_tensor_with_parallelism("k", target("as_stored", tp(0, 1))) is None
    put_shards(store, "s", 2)
    assert store.get_tensor_with_parallelism("s") is None


# ---------------------------------------------------------------- put and upsert


def test_a_put_changes_no_layout_that_can_be_read(store) -> None:
    put_shards(store, "k", 4)
    put_shards(store, "k", 2, tensor=WHOLE + 1)
    assert same(store.get_tensor_with_parallelism("k", shard(tp(1, 2))), WHOLE[4:])
    assert same(store.get_tensor_with_parallelism("k", target("full")), WHOLE)


@pytest.mark.parametrize("owners", [[], [axis("dp")]])
def test_an_upsert_under_another_layout_leaves_nothing_of_the_old_one(store, owners) -> None:
    def write(size: int, tensor) -> None:
        for rank in range(size):
            piece = tensor if owners else tensor.chunk(size)[rank]
            axes = along(tp(rank, size), *owners)
            assert store.upsert_tensor_with_parallelism("k", piece, axes) == 0

    write(4, WHOLE)
    write(2, WHOLE + 1)
    for size in (1, 2, 4):
        for rank, piece in enumerate((WHOLE + 1).chunk(size)):
            assert same(store.get_tensor_with_parallelism("k", shard(tp(rank, size), *owners)), piece)
    assert store.remove_all(force=True) == 3  # two pieces and the manifest


def test_a_manifest_of_pieces_that_are_gone_gives_way(store) -> None:
    dp = axis("dp")
    for rank in range(4):
        store.put_tensor_with_parallelism("k", WHOLE, along(dp, tp(rank, 4)))
    assert store.remove_by_regex("_of4|of4_", force=True) == 4
    for rank in range(2):
        assert store.put_tensor_with_parallelism("k", WHOLE, along(dp, tp(rank, 2))) == 0
    assert same(store.get_tensor_with_parallelism("k", target("full", dp, tp(0, 1))), WHOLE)


def test_writers_of_one_tensor_each_store_their_piece(store) -> None:
    for rank in range(2):
        assert store.put_tensor_with_parallelism("k", WHOLE, writer_partition=tp(rank, 2, 1)) == 0
        if not rank:
            assert store.get_tensor_with_parallelism("k", target("full")) is None
    assert store.is_exist("k__writer_1of2_sd1") == 1
    assert same(store.get_tensor_with_parallelism("k", target("full")), WHOLE)
    for rank in range(2):
        assert store.upsert_tensor_with_parallelism("k", WHOLE + 1, writer_partition=tp(rank, 2, 1)) == 0
    assert same(store.get_tensor_with_parallelism("k", shard(tp(0, 2))), (WHOLE + 1)[:4])


# ---------------------------------------------------------------- in the caller's memory


@pytest.mark.parametrize("owners", [[], [axis("dp")]])
def test_a_tensor_in_memory_is_stored_in_all_its_pieces(store, memory, owners) -> None:
    store.put_tensor("whole", WHOLE)
    array, address = memory(HEAD_BYTES + 192)
    assert same(store.get_tensor_into("whole", address, array.nbytes), WHOLE)
    axes = along(tp(1, 3), *owners)
    assert store.put_tensor_with_parallelism_from("k", address, array.nbytes, axes) == 0
    for rank, piece in enumerate(WHOLE.chunk(3)):
        assert same(store.get_tensor_with_parallelism("k", shard(tp(rank, 3), *owners)), piece)
    assert (
        store.upsert_tensor_with_parallelism_from("k", address, array.nbytes, along(tp(0, 2), *owners)) == 0
    )
    assert same(store.get_tensor_with_parallelism("k", shard(tp(1, 2), *owners)), WHOLE[4:])
    assert store.put_tensor_with_parallelism_from("w", address, array.nbytes, None, None, tp(1, 2)) == 0
    assert store.is_exist("w__writer_1of2_sd0") == 1
    assert store.is_exist("w__writer_0of2_sd0") == 0
    assert store.put_tensor_with_parallelism_from("plain", address, array.nbytes) == 0
    assert same(store.get_tensor("plain"), WHOLE)
    assert store.put_tensor_with_parallelism_from("n", address, array.nbytes - 1) == -600


def test_a_piece_is_put_together_in_memory_and_can_be_stored_from_there(store, memory) -> None:
    put_shards(store, "k", 4)
    array, address = memory(HEAD_BYTES + 96)
    there = store.get_tensor_with_parallelism_into("k", address, array.nbytes, shard(tp(1, 2)))
    assert same(there, WHOLE[4:])
    assert there.data_ptr() == address + HEAD_BYTES
    assert store.put_tensor_from("copy", address, array.nbytes) == 0
    assert same(store.get_tensor("copy"), WHOLE[4:])
    exact = store.get_tensor_with_parallelism_into("k", address, array.nbytes, shard(tp(3, 4)))
    assert same(exact, WHOLE[6:])
    assert store.get_tensor_with_parallelism_into("k", address, array.nbytes - 1, shard(tp(1, 2))) is None
    assert store.get_tensor_with_parallelism_into("zz", address, array.nbytes) is None
    both = [shard(tp(0, 8)), shard(tp(7, 8))]
    half = array.nbytes // 2
    found = store.batch_get_tensor_with_parallelism_into(
        ["k", "k"], [address, address + half], [half, half], both
    )
    assert all(map(same, found, [WHOLE[:1], WHOLE[7:]])) if half >= HEAD_BYTES + 24 else found == [None] * 2
    assert store.batch_get_tensor_with_parallelism_into(["k", "k"], [address], [half]) == [None, None]


def test_a_whole_tensor_in_memory_is_cut_for_tp(store, memory) -> None:
    store.put_tensor("whole", WHOLE)
    array, address = memory(HEAD_BYTES + 192)
    store.get_tensor_into("whole", address, array.nbytes)
    assert store.put_tensor_with_tp_from("k", address, array.nbytes, 1, 2, 1) == 0
    assert same(store.get_tensor_with_tp("k", 0, 2), WHOLE[:, :3])
    found = store.batch_put_tensor_with_tp_from(["a", "b"], [address] * 2, [array.nbytes, 50], 0, 4)
    assert found == [0, -600]
    assert same(store.get_tensor_with_tp("a", 3, 4), WHOLE[6:])
    assert store.put_tensor_with_tp_from("one", address, array.nbytes) == 0
    assert same(store.get_tensor("one"), WHOLE)
    assert store.batch_put_tensor_with_tp_from(["c", "d"], [address], [array.nbytes]) == [-600, -600]


# ---------------------------------------------------------------- several, and what makes no sense


def test_several_tensors_each_have_a_layout_of_their_own(store, memory) -> None:
    keys, tensors = ["a", "b", "c"], [WHOLE[:4], WHOLE, WHOLE]
    layouts = [along(tp(0, 2)), None, along(axis("dp", 1, 2), tp(1, 2))]
    assert store.batch_put_tensor_with_parallelism(keys, tensors, layouts) == [0, 0, 0]
    targets = [shard(tp(0, 2)), None, shard(axis("dp", 1, 2), tp(1, 2))]
    found = store.batch_get_tensor_with_parallelism(keys, targets)
    assert all(map(same, found, [WHOLE[:4], WHOLE, WHOLE[4:]]))
    new = [one + 1 for one in tensors]
    assert store.batch_upsert_tensor_with_parallelism(keys, new, layouts) == [0, 0, 0]
    assert same(store.batch_get_tensor_with_parallelism(["b"])[0], WHOLE + 1)
    writers = [tp(0, 2), tp(1, 2)]
    assert store.batch_put_tensor_with_parallelism(["w", "w"], [WHOLE] * 2, None, None, writers) == [0, 0]
    assert same(store.get_tensor_with_parallelism("w", target("full")), WHOLE)
    array, address = memory(HEAD_BYTES + 192)
    store.get_tensor_into("b", address, array.nbytes)
    places = ([address] * 2, [array.nbytes] * 2)
    assert store.batch_put_tensor_with_parallelism_from(["d", "e"], *places) == [0, 0]
    pieces = [along(tp(0, 2)), None]
    assert store.batch_upsert_tensor_with_parallelism_from(["d", "e"], *places, pieces) == [0, 0]
    assert same(store.get_tensor_with_parallelism("d", shard(tp(1, 2))), (WHOLE + 1)[4:])


def test_one_that_makes_no_sense_does_not_stop_the_others(store) -> None:
    layouts = [along(tp(2, 2)), along(tp(0, 2)), along(tp(0, 2, 5)), along(axis("dp"), tp(0, 64))]
    codes = store.batch_put_tensor_with_parallelism([*"abcd"], [WHOLE] * 4, layouts)
    assert codes == [-600, 0, -600, -600]
    targets = [shard(tp(2, 2)), shard(tp(0, 2)), target("shard"), shard(axis("zz"))]
    found = store.batch_get_tensor_with_parallelism([*"bbbb"], targets)
    assert [one is None for one in found] == [True, False, True, True]


@pytest.mark.parametrize(
    "arguments",
    [
        {"parallelism": 5},
        {"parallelism": [tp(0, 2)]},
        {"parallelism": along()},
        {"parallelism": along(tp(0, 2), tp(1, 2))},
        {"writer_partition": (0, 2, 0)},
        {"writer_partition": axis("tp", 0, 2)},
        {"writer_partition": tp(0, 2, 7)},
        {"writer_partition": tp(0, 9)},
        {"writer_partition": tp(0, 2), "parallelism": along(tp(0, 2))},
        {"tensor": b"bytes", "parallelism": along(tp(0, 2))},
        {"tensor": None},
        {"tensor": torch.tensor(3.0), "parallelism": along(tp(0, 2))},
    ],
)
def test_arguments_that_make_no_sense_are_minus_600_and_store_nothing(store, arguments) -> None:
    assert store.put_tensor_with_parallelism(**{"key": "k", "tensor": WHOLE, **arguments}) == -600
    assert store.remove_all(force=True) == 0


def test_lists_that_do_not_fit_the_keys_are_minus_600_or_none(store) -> None:
    keys, tensors = ["a", "b"], [WHOLE, WHOLE]
    put = store.batch_put_tensor_with_parallelism
    assert put(keys, tensors, [None]) == [-600, -600]
    assert put(keys, tensors, along(tp(0, 2))) == [-600, -600]
    assert put(keys, tensors[:1]) == [-600, -600]
    assert put(keys, tensors, None, None, [tp(0, 2)]) == [-600, -600]
    assert put(keys, tensors, None, config_of(group_ids=["g"])) == [-600, -600]
    assert put([], []) == []
    assert store.batch_get_tensor_with_parallelism(keys, [None]) == [None, None]
    assert store.batch_get_tensor_with_parallelism(keys, 5) == [None, None]
    assert store.batch_get_tensor_with_parallelism([]) == []


def test_pieces_and_their_manifest_are_kept_as_the_config_says(store) -> None:
    config = config_of(with_hard_pin=True, group_ids=["g"])
    assert store.put_tensor_with_parallelism("k", WHOLE, along(axis("dp"), tp(0, 2)), config) == 0
    assert store.pub_tensor_with_tp("t", WHOLE, config, tp_size=2) == 0
    assert config.group_ids == ["g"]
    assert store.put_tensor_with_parallelism("c", WHOLE, None, config_of(replica_num=0)) == -600


def test_keys_are_texts(store) -> None:
    with pytest.raises(TypeError):
        store.put_tensor_with_parallelism(1, WHOLE)
    with pytest.raises(TypeError):
        store.get_tensor_with_parallelism(1)


def test_before_setup_they_are_errors() -> None:
    store = MooncakeDistributedStore()
    assert store.put_tensor_with_parallelism("k", WHOLE, along(tp(0, 2))) == -600
    assert store.upsert_tensor_with_parallelism_from("k", 4096, 512) == -600
    for read in (store.get_tensor_with_parallelism, store.get_tensor_with_tp):
        with pytest.raises(RequestError, match="setup"):
            read("k")


def test_fields_take_what_upstream_s_take() -> None:
    made = ParallelAxis()
    assert (made.kind, made.rank, made.size) == ("", 0, 1)
    assert (made.split_dim, made.expert_id, made.stage_id) == (None, None, None)
    for field, wrong in [
        ("kind", None),
        ("rank", None),
        ("size", "2"),
        ("split_dim", 1.5),
        ("stage_id", "1"),
    ]:
        with pytest.raises(TypeError, match=field):
            setattr(made, field, wrong)
    made.split_dim = None
    assert TensorParallelism().axes == []
    wanted = ReadTarget()
    assert (wanted.mode, wanted.parallelism) == ("as_stored", None)
    with pytest.raises(RequestError, match="mode"):
        wanted.mode = "all"
    with pytest.raises(TypeError, match="mode"):
        wanted.mode = None
