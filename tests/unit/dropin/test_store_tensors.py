"""Tensors come back as they were put: type, shape, bytes; what is no tensor is a code or None."""

import sys

import pytest

import mooncake.store as store_module
from mooncake.core.errors import ConfigError, RequestError
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


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(6.0).reshape(2, 3)[:1, 1:2],  # one element, strides of more
        torch.tensor([1 + 2j, 3 - 4j]).conj(),
        torch.tensor([1 + 2j]).conj().imag,
        torch.ones(3, requires_grad=True),
        torch.ones(1).expand(4),
        torch.arange(10)[5:],
    ],
)
def test_a_view_is_stored_as_the_values_it_shows(store, tensor) -> None:
    assert store.put_tensor("t", tensor) == 0
    assert torch.equal(store.get_tensor("t"), tensor.detach().resolve_conj().resolve_neg())


@pytest.mark.parametrize(
    "tensor",
    [
        torch.eye(2).to_sparse(),
        torch.empty(3, device="meta"),
        torch.empty(3, dtype=torch.float8_e8m0fnu),
        torch.zeros([1] * (DIMENSIONS_MAX + 1)),
        [1, 2],
    ],
    ids=["sparse", "meta", "dtype", "dimensions", "list"],
)
def test_what_cannot_be_stored_is_minus_600(store, tensor) -> None:
    assert store.put_tensor("t", tensor) == -600
    assert store.batch_put_tensor_with_tp(["t", "u"], [tensor, some("int8", 4)], tp_size=2) == [-600, 0]


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
    assert store.put_tensor_from("none", address, HEAD_BYTES + 201) == -600


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


# ---------------------------------------------------------------- elsewhere


class OnDevice(torch.Tensor):
    """A CPU tensor that says it is on a GPU."""

    is_cuda = True


def on_device(*shape: int, dtype="float32"):
    return torch.zeros(shape, dtype=getattr(torch, dtype)).as_subclass(OnDevice)


def test_a_cuda_tensor_is_filled_through_host_memory(store) -> None:
    tensor, into = some("float32", 2, 3), on_device(2, 3)
    store.put_tensor("t", tensor)
    assert store.get_tensor_into_cuda("t", into) == 24
    assert same(into.as_subclass(torch.Tensor), tensor)
    column = on_device(3, 2).T
    assert store.batch_get_tensor_into_cuda(["t", "zz"], [column, on_device(2, 3)]) == [24, -704]
    assert same(column.as_subclass(torch.Tensor), tensor)


def test_what_is_no_cuda_tensor_of_that_kind_is_minus_600_and_unchanged(store) -> None:
    store.put_tensor("t", some("float32", 2, 3))
    store.put("bytes", b"x" * 600)
    for wrong in (torch.zeros(2, 3), on_device(3, 2), on_device(2, 3, dtype="int32"), 5, None):
        assert store.get_tensor_into_cuda("t", wrong) == -600
        if isinstance(wrong, torch.Tensor):
            assert not wrong.any()
    assert store.get_tensor_into_cuda("bytes", on_device(2, 3)) == -600
    assert store.batch_get_tensor_into_cuda(["t", "t"], [on_device(2, 3)]) == [-600, -600]


def test_a_copy_that_cuda_refuses_is_minus_800(store) -> None:
    class Refusing(OnDevice):
        def copy_(self, *args, **kwargs):
            raise RuntimeError("CUDA error: out of memory")

    store.put_tensor("t", some("float32", 2))
    assert store.get_tensor_into_cuda("t", torch.zeros(2).as_subclass(Refusing)) == -800


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn", "bool", "uint16"])
def test_a_tensor_goes_through_a_safetensors_file(store, tmp_path, dtype) -> None:
    path, tensor = str(tmp_path / "t.safetensors"), some(dtype, 2, 3)
    store.put_tensor("t", tensor)
    assert store.save_tensor_to_safetensor("t", path) == 0
    store.remove("t", force=True)
    assert same(store.load_tensor_from_safetensor("t", path), tensor)
    assert same(store.get_tensor("t"), tensor)
    assert same(store.load_tensor_from_safetensor(file_name=path), tensor)
    assert same(store.get_tensor(path), tensor)
    assert same(store.load_tensor_from_safetensor("other", path), tensor)  # the first one, as upstream
    assert same(store.get_tensor("other"), tensor)


def test_a_file_has_the_name_of_its_key_if_by_no_other(store, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    store.put_tensor("t", some("int8", 2))
    assert store.save_tensor_to_safetensor("t") == 0
    assert same(store.load_tensor_from_safetensor("t", "t"), some("int8", 2))


def test_files_that_cannot_be_written_or_read_are_a_code_or_none(store, tmp_path) -> None:
    store.put_tensor("t", some("int8", 2))
    store.put("bytes", b"x" * 600)
    path = tmp_path / "t.safetensors"
    assert store.save_tensor_to_safetensor("zz", str(path)) == -1100
    assert store.save_tensor_to_safetensor("bytes", str(path)) == -1100
    assert store.save_tensor_to_safetensor("t", str(tmp_path / "no" / "t")) == -600
    assert list(tmp_path.iterdir()) == []
    assert store.load_tensor_from_safetensor("t", str(path)) is None
    path.write_bytes(b"garbage" * 10)
    assert store.load_tensor_from_safetensor("t", str(path)) is None
    from safetensors.torch import save_file

    save_file({}, str(path))
    assert store.load_tensor_from_safetensor("t", str(path)) is None
    with pytest.raises(TypeError, match="file_name"):
        store.load_tensor_from_safetensor("t")


def test_without_the_package_files_are_an_error_that_names_it(store, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    assert store.save_tensor_to_safetensor("t", "t") == -600
    with pytest.raises(ConfigError, match="pip install safetensors"):
        store.load_tensor_from_safetensor("t", "t")
