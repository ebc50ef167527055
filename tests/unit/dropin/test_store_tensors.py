"""Tensors come back as they were put: type, shape, bytes; what is no tensor is a code or None."""

import pytest

import mooncake.store as store_module
from mooncake.core.errors import RequestError
from mooncake.dropin.store.tensors import DIMENSIONS_MAX, DTYPES, HEAD_BYTES, parts_of_tensor, tensor_of
from mooncake.store import MooncakeDistributedStore
from tests.unit.dropin.test_store import config_of

torch = pytest.importorskip("torch")


def some(dtype: str, *shape: int):
    count = 1
    for side in shape:
        count *= side
    return torch.arange(1, count + 1).reshape(shape).to(getattr(torch, dtype))


def same(first, second) -> bool:
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    flat = [one.contiguous().reshape(-1).view(torch.uint8) for one in (first, second)]
    return torch.equal(*flat)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_type_comes_back(store, dtype) -> None:
    tensor = some(dtype, 3, 5)
    assert store.put_tensor(dtype, tensor) == 0
    assert same(store.get_tensor(dtype), tensor)


@pytest.mark.parametrize("shape", [(), (1,), (0,), (2, 0, 3), (2, 3, 4), (1,) * DIMENSIONS_MAX])
def test_every_shape_comes_back(store, shape) -> None:
    assert store.put_tensor("t", some("float32", *shape)) == 0
    assert same(store.get_tensor("t"), some("float32", *shape))


def test_a_tensor_that_does_not_lie_in_one_piece_is_stored_in_its_order(store) -> None:
    tensor = some("float32", 6, 8).T[::2]
    assert store.put_tensor("t", tensor) == 0
    assert same(store.get_tensor("t"), tensor)


def test_what_is_no_tensor_is_minus_600_or_none(store) -> None:
    store.put("bytes", b"x" * 1000)
    store.put("short", b"x")
    assert store.put_tensor("t", b"bytes") == -600
    assert store.batch_put_tensor(["a", "b", "c"], [some("int8", 2), None, some("int8", 3)]) == [0, -600, 0]
    assert store.batch_put_tensor(["d", "e"], [some("int8", 2)]) == [-600, -600]
    found = store.batch_get_tensor(["a", "bytes", "short", "zz", "c"])
    assert [one is None for one in found] == [False, True, True, True, False]


def test_an_upsert_replaces_and_a_put_does_not(store) -> None:
    store.put_tensor("t", some("int8", 2))
    assert store.put_tensor("t", some("int8", 3)) == 0
    assert store.get_tensor("t").shape == (2,)
    assert store.upsert_tensor("t", some("int8", 3)) == 0
    assert store.get_tensor("t").shape == (3,)


def test_a_tensor_is_read_into_memory_and_stored_from_there(store, memory) -> None:
    tensor = some("bfloat16", 10, 10)
    store.put_tensor("t", tensor)
    array, address = memory(HEAD_BYTES + 300)
    there = store.get_tensor_into("t", address, array.nbytes)
    assert same(there, tensor)
    assert there.data_ptr() == address + HEAD_BYTES
    assert store.put_tensor_from("copy", address, HEAD_BYTES + 200) == 0
    assert same(store.get_tensor("copy"), tensor)
    assert store.upsert_tensor_from("copy", address, HEAD_BYTES + 200) == 0
    assert store.get_tensor_into("t", address, HEAD_BYTES) is None  # too small
    assert store.put_tensor_from("none", address + 1, HEAD_BYTES + 200) == -600
    assert store.put_tensor_from("none", address, HEAD_BYTES + 199) == -600


@pytest.mark.parametrize("dimension", [0, 1, -1])
def test_shards_are_objects_of_their_own(store, dimension, memory) -> None:
    tensor = some("float32", 4, 8)
    assert store.put_tensor_with_tp("t", tensor, tp_size=4, split_dim=dimension) == 0
    shards = [store.get_tensor_with_tp("t", rank, 4, dimension) for rank in range(4)]
    assert same(torch.cat(shards, dimension), tensor)
    assert store.is_exist("t_tp_3") == 1
    assert store.is_exist("t") == 0
    assert store.get_tensor_with_tp("t", 4, 4) is None
    array, address = memory(HEAD_BYTES + 128)
    (there,) = store.batch_get_tensor_with_tp_into(["t"], [address], [array.nbytes], 1, 4)
    assert same(there, shards[1])
    assert store.put_tensor_with_tp("u", tensor, tp_size=1) == 0
    assert same(store.get_tensor_with_tp("u"), tensor)


def test_a_tensor_that_has_no_such_shards_is_minus_600(store) -> None:
    assert store.put_tensor_with_tp("t", some("int8", 3), tp_size=4) == -600
    assert store.put_tensor_with_tp("t", some("int8", 4), tp_size=4, split_dim=1) == -600
    assert store.put_tensor_with_tp("t", b"x", tp_size=4) == -600
    assert store.batch_put_tensor_with_tp(["t"], [], tp_size=4) == [-600]


def test_a_damaged_header_is_refused() -> None:
    head, data = parts_of_tensor(some("float32", 2, 2))
    good = bytes(head) + bytes(data)
    assert tensor_of(bytearray(good)).tolist() == [[1, 2], [3, 4]]
    for at, value in [(0, 0), (4, 200), (5, 200), (8, 255), (15, 255)]:
        bad = bytearray(good)
        bad[at] = value
        with pytest.raises(RequestError):
            tensor_of(bad)
    with pytest.raises(RequestError):
        tensor_of(bytearray(good[:-1]))


def test_before_setup_tensors_are_errors() -> None:
    store = MooncakeDistributedStore()
    assert store.put_tensor("t", some("int8", 1)) == -600
    assert store.put_tensor_with_tp("t", some("int8", 4), tp_size=4) == -600
    with pytest.raises(RequestError, match="setup"):
        store.get_tensor("t")


def test_upstream_s_helpers_for_headers_are_there() -> None:
    tensor = some("int16", 3, 3)
    head, address, size, owner = store_module._serialize_tensor(tensor)
    assert len(head) == store_module._tensor_metadata_size()
    assert (size, owner.ctypes.data) == (18, address)
    assert same(store_module._deserialize_tensor(head + owner.tobytes()), tensor)


def test_every_form_for_several_tensors_does_what_that_for_one_does(store, memory) -> None:
    keys, tensors = ["a", "b"], [some("int32", 5), some("float16", 2, 4)]
    new = [some("int32", 6), some("float16", 3, 4)]
    config = config_of(with_hard_pin=True)
    assert store.batch_pub_tensor(keys, tensors, config) == [0, 0]
    assert store.pub_tensor("c", tensors[0], config) == 0
    assert all(map(same, store.batch_get_tensor(keys), tensors))
    assert store.batch_upsert_tensor(keys, new) == [0, 0]
    assert all(map(same, store.batch_get_tensor(keys), new))
    assert store.batch_upsert_pub_tensor(keys, tensors, config) == [0, 0]
    assert store.upsert_pub_tensor("c", new[0], config=config) == 0
    assert same(store.get_tensor("c"), new[0])
    room = HEAD_BYTES + 64
    _, address = memory(2 * room)
    places = [address, address + room]
    assert all(map(same, store.batch_get_tensor_into(keys, places, [room, room]), tensors))
    sizes = [HEAD_BYTES + 20, HEAD_BYTES + 16]
    assert store.batch_put_tensor_from(["d", "e"], places, sizes) == [0, 0]
    assert store.batch_upsert_tensor_from(["b", "a"], places, sizes) == [0, 0]
    assert all(map(same, store.batch_get_tensor(["d", "e", "b", "a"]), tensors * 2))
    assert store.batch_put_tensor_from(["f", "g"], places, sizes[:1]) == [-600, -600]


def test_shards_of_several_tensors(store, memory) -> None:
    keys, tensors = ["a", "b"], [some("int32", 4), some("int32", 8)]
    config = config_of(with_hard_pin=True)
    assert store.batch_pub_tensor_with_tp(keys, tensors, config, tp_size=2) == [0, 0]
    shards = store.batch_get_tensor_with_tp(keys, 1, 2)
    assert [one.tolist() for one in shards] == [[3, 4], [5, 6, 7, 8]]
    assert store.pub_tensor_with_tp("c", tensors[0], config, tp_size=4) == 0
    array, address = memory(HEAD_BYTES + 8)
    assert store.get_tensor_with_tp_into("c", address, array.nbytes, 2, 4).tolist() == [3]
