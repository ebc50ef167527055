"""Structured objects: what is stored comes back as it was, whole or in part, or not at all."""

import enum
import inspect
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mooncake.core.errors import CapacityError, IntegrityError, PeerError, RequestError
from mooncake.store import ReplicateConfig
from mooncake.structured_object_store import (
    BundleTransferPolicy,
    MooncakeBundleTransfer,
    StructuredObjectPayload,
    raw_destination,
    tensor_object_buffer,
)

torch = pytest.importorskip("torch")


class FakeStore:
    """A BundleStore and nothing more. `refused`: the code that a put of such a name answers."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.read: list[str] = []
        self.removed: list[str] = []
        self.refused: dict[str, int] = {}
        self.unremovable = ""

    def put(self, key, value, config=None) -> int:
        for part, code in self.refused.items():
            if part in key:
                return code
        self.objects.setdefault(key, bytes(value))
        return 0

    def get(self, key) -> bytes:
        self.read.append(key)
        return self.objects.get(key, b"")

    def remove(self, key, force=False) -> int:
        if self.unremovable and key.endswith(self.unremovable):
            return -900
        self.removed.append(key)
        return 0 if self.objects.pop(key, None) is not None else -704

    def is_exist(self, key) -> int:
        return int(key in self.objects)


class RangeStore(FakeStore):
    """Counts the bytes that are read, and can read parts."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes_read = 0

    def get_into_ranges(self, addresses, keys, targets, sources, sizes):
        import ctypes

        codes = []
        for base, names, *rest in zip(addresses, keys, targets, sources, sizes, strict=True):
            codes.append([])
            for name, *parts in zip(names, *rest, strict=True):
                codes[-1].append([])
                for at, start, size in zip(*parts, strict=True):
                    data = self.objects.get(name)
                    if data is not None:
                        ctypes.memmove(base + at, data[start : start + size], size)
                        self.bytes_read += size
                    codes[-1][-1].append(-704 if data is None else size)
        return codes


@pytest.fixture
def fake() -> FakeStore:
    return FakeStore()


@pytest.fixture
def transfer(fake) -> MooncakeBundleTransfer:
    return MooncakeBundleTransfer(fake)


def same(one, other) -> bool:
    """Equal in value, type, dtype and shape, all the way down."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, torch.Tensor):
        alike = one.dtype == other.dtype and one.shape == other.shape
        return alike and torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))
    if isinstance(one, np.ndarray) and one.dtype == object:
        return one.shape == other.shape and same(one.ravel().tolist(), other.ravel().tolist())
    if isinstance(one, (np.ndarray, np.generic)):
        return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()
    return repr(one) == repr(other)  # also nan


# ------------------------------------------------------------ round trips


def objects(items) -> np.ndarray:
    array = np.empty(len(items), object)
    for row, item in enumerate(items):
        array[row] = item
    return array


texts = st.text(max_size=8)
scalars = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**63), 2**64 - 1), st.floats(), texts, st.binary(max_size=8)
)
arrays = st.builds(
    lambda dtype, shape, seed: (
        np.resize(np.frombuffer(seed, np.uint8), int(np.prod(shape)) * dtype.itemsize)
        .view(dtype)
        .reshape(shape)
    ),
    st.sampled_from(["<i8", ">i2", "|u1", "<f4", "<f2", "<c8", "<M8[ns]", "|S3"]).map(np.dtype),
    st.lists(st.integers(0, 4), max_size=3).map(tuple),
    st.binary(min_size=1, max_size=16),
)
large = st.integers(4000, 5000).map(lambda size: np.arange(size, dtype=np.uint8))
tensors = st.builds(
    lambda name, shape: torch.arange(int(np.prod(shape))).reshape(shape).to(getattr(torch, name)),
    st.sampled_from(["bfloat16", "int64", "float32", "bool", "float8_e4m3fn"]),
    st.lists(st.integers(0, 3), max_size=3),
)
keys = st.one_of(texts, st.integers(-9, 9).map(lambda number: number + 0.5), st.none(), st.binary(max_size=3))
values = st.recursive(
    st.one_of(scalars, arrays, tensors, large),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(keys, inner, max_size=4),
        st.lists(inner, max_size=4).map(objects),
    ),
    max_leaves=12,
)


@settings(max_examples=60, deadline=None)
@given(value=values, chunk_bytes=st.integers(1, 5000))
def test_any_nested_value_comes_back_with_its_types_dtypes_and_shapes(value, chunk_bytes):
    transfer = MooncakeBundleTransfer(FakeStore(), default_chunk_bytes=max(chunk_bytes, 64))
    assert same(transfer.get_object(transfer.put_object(value)), value)


@settings(max_examples=30, deadline=None)
@given(
    rows=st.lists(values, max_size=6),
    chosen=st.lists(st.integers(0, 5), max_size=6),
    chunk_bytes=st.integers(1, 300),
)
def test_rows_of_a_column_are_the_rows_that_were_put(rows, chosen, chunk_bytes):
    transfer = MooncakeBundleTransfer(FakeStore(), default_chunk_bytes=chunk_bytes)
    batch = {"batch": {}, "non_tensor_batch": {"it": objects(rows)}, "meta_info": {}}
    ref = transfer.put_dataproto(batch)
    chosen = [row for row in chosen if row < len(rows)]
    read = transfer.get(ref, type="dict", rows=chosen)["it"]
    assert same(read, [rows[row] for row in chosen])


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2", "bfloat16", "uint16", "complex64"])
def test_tensors_of_kinds_that_numpy_has_not_come_back(transfer, name):
    tensor = torch.arange(24, dtype=torch.uint8).view(getattr(torch, name))
    read = transfer.get_object(transfer.put_object(tensor))
    assert read.dtype == tensor.dtype
    assert torch.equal(read.view(torch.uint8), tensor.view(torch.uint8))


def test_what_is_read_is_the_callers_own_and_can_be_written_to(transfer):
    ref = transfer.put_object({"array": np.arange(5), "tensor": torch.zeros(3), "nested": [np.zeros(9000)]})
    read = transfer.get_object(ref)
    read["array"][0] = read["tensor"][0] = read["nested"][0][0] = 7
    again = transfer.get_object(ref)
    assert again["array"][0] == again["tensor"][0] == again["nested"][0][0] == 0
    transfer.release_result(read)


@pytest.mark.integration  # torch takes ten seconds to import what its first jagged tensor needs
def test_a_jagged_tensor_comes_back_and_can_be_read_by_rows(transfer):
    rows = [torch.arange(3.0), torch.arange(5.0), torch.zeros(1)]
    ref = transfer.put_object({"it": torch.nested.as_nested_tensor(rows, layout=torch.jagged)})
    spec = transfer.read_spec(ref)
    assert same(list(transfer.materialize(spec).objects["it"].unbind()), rows)
    some = transfer.materialize(spec.slice_member("it", 0, 1, 3)).objects["it"]
    assert some.layout == torch.jagged
    assert same(list(some.unbind()), rows[1:])
    assert len(transfer.materialize(spec.slice_member("it", 0, 0, 0)).objects["it"]) == 0


class Color(enum.IntEnum):
    RED = 1


class Hostile:
    def __reduce__(self):
        return os.system, ("touch /tmp/never",)


@pytest.mark.parametrize(
    ("value", "where"),
    [
        ({"a": [1, {"b": Hostile()}]}, r"a\[1\]\['b'\]"),
        (np.array([Hostile()], object), r"value\[0\]"),
        ({"x": {1, 2}}, "x"),
        ({"x": Color.RED}, "x"),
        ({"x": lambda: 0}, "x"),
        ({"x": np.zeros(2, [("a", "<i4")])}, "x"),
        ({"x": np.ma.array([1])}, "x"),
        ({"x": torch.zeros(3).to_sparse()}, "x"),
        ({"x": {(1, 2): 3}}, "x"),
    ],
)
def test_what_upstream_would_pickle_is_refused_and_named(fake, transfer, value, where):
    with pytest.raises(TypeError, match=where):
        transfer.put_object(value)
    assert not fake.objects


def test_without_torch_everything_else_is_stored():
    program = (
        "import sys, numpy; sys.modules['torch'] = None\n"
        "from mooncake.dropin.structured.tree import pack, unpack\n"
        "import mooncake.structured_object_store, mooncake.dataproto_catalog\n"
        "value = {'a': [numpy.arange(3).tolist(), ('b', None)]}\n"
        "assert unpack(memoryview(b''.join(pack(value, 'x')))) == value\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=100)


def test_nesting_and_numbers_have_bounds(transfer):
    deep: list = []
    for _ in range(100):
        deep = [deep]
    with pytest.raises(ValueError, match="nested deeper"):
        transfer.put_object({"x": deep})
    with pytest.raises(ValueError, match="64 bits"):
        transfer.put_object({"x": 2**64})


# ------------------------------------------------------------ reading parts


def test_selected_members_are_the_only_ones_that_are_read(fake, transfer):
    ref = transfer.put_object({"a": b"aa", "b": np.arange(6), "c": "text"})
    fake.read.clear()
    result = transfer.materialize(transfer.read_spec(ref).select_members(["b"]))
    assert list(result.objects) == ["b"]
    assert fake.read == [ref.manifest_key.replace("manifest", "1")]


@pytest.mark.parametrize("make", [np.asarray, torch.as_tensor])
@pytest.mark.parametrize("bounds", [(2, 5, 1), (-3, 100, 1), (0, 10, 4), (5, 5, 1), (7, 2, 1)])
def test_a_slice_of_rows_reads_these_bytes_and_no_others(make, bounds):
    store = RangeStore()
    transfer = MooncakeBundleTransfer(store, default_chunk_bytes=20)
    rows = np.arange(40, dtype=np.int64).reshape(10, 4)
    ref = transfer.put_object({"it": make(rows)})
    start, end, step = bounds
    spec = transfer.read_spec(ref).slice_member("it", 0, start, end, step)
    read = transfer.materialize(spec).objects["it"]
    assert np.array_equal(np.asarray(read), rows[start:end:step])
    assert store.bytes_read == rows[start:end:step].nbytes


def test_rows_of_a_long_column_are_read_without_the_others():
    store = RangeStore()
    transfer = MooncakeBundleTransfer(store)
    rows = [f"{row:0100}" for row in range(20000)]
    ref = transfer.put_object({"it": objects(rows)})
    spec = transfer.read_spec(ref).slice_member("it", 0, 10000, 10003)
    assert transfer.materialize(spec).objects["it"].tolist() == rows[10000:10003]
    index_bytes = 8 * 20001
    assert store.bytes_read < index_bytes + 1000


def test_a_store_without_ranges_is_asked_for_each_chunk_once(fake, transfer):
    rows = np.arange(1000)
    ref = transfer.put_object({"it": rows}, chunk_bytes=800)
    fake.read.clear()
    read = transfer.materialize(transfer.read_spec(ref).slice_member("it", 0, 0, 200, 2)).objects["it"]
    assert np.array_equal(read, rows[:200:2])
    assert fake.read == [ref.manifest_key.replace("manifest", number) for number in "01"]


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda spec: spec.select_members([]), ValueError),
        (lambda spec: spec.select_members(["zz"]), KeyError),
        (lambda spec: spec.slice_member("it", 1, 0, 1), ValueError),
        (lambda spec: spec.slice_member("it", 0, 0, 1, 0), ValueError),
        (lambda spec: spec.slice_member("raw", 0, 0, 1), ValueError),
        (lambda spec: spec.slice_member("nested", 0, 0, 1), ValueError),
    ],
)
def test_a_read_that_makes_no_sense_is_refused(transfer, change, error):
    ref = transfer.put_object({"it": np.arange(4), "raw": b"abc", "nested": [1]})
    with pytest.raises(error):
        transfer.materialize(change(transfer.read_spec(ref)))


def test_materialize_into_fills_the_callers_memory(transfer):
    data = {"array": np.arange(6.0).reshape(2, 3), "tensor": torch.arange(4), "raw": np.arange(3)}
    spec = transfer.read_spec(transfer.put_object(data))
    array, tensor, raw = np.empty((2, 3)), torch.empty(4, dtype=torch.int64), np.empty(5, np.int64)
    places = {"array": array, "tensor": tensor, "raw": raw_destination(raw.ctypes.data, raw.nbytes, raw)}
    result = transfer.materialize_into(spec, places)
    assert result.objects["array"] is array
    assert result.objects["tensor"] is tensor
    assert same([array, tensor, raw[:3]], list(data.values()))
    assert np.array_equal(result.objects["raw"], data["raw"])


def test_some_rows_go_into_the_callers_memory(transfer):
    rows = np.arange(20).reshape(10, 2)
    spec = transfer.read_spec(transfer.put_object({"it": rows})).slice_member("it", 0, 3, 6)
    place = np.empty((3, 2), rows.dtype)
    transfer.materialize_into(spec, {"it": place})
    assert np.array_equal(place, rows[3:6])


@pytest.mark.parametrize(
    ("place", "error"),
    [
        (np.empty(6), ValueError),
        (np.empty((2, 3), np.float32), ValueError),
        (np.empty((3, 2)).T, ValueError),
        (np.frombuffer(bytes(48)).reshape(2, 3), ValueError),
        (bytearray(48), TypeError),
        (torch.empty(2, 3), TypeError),
        (raw_destination(0, 8), ValueError),
        (raw_destination(4096, 48), RequestError),
    ],
)
def test_a_destination_that_does_not_fit_is_refused_before_anything_is_read(fake, transfer, place, error):
    ref = transfer.put_object({"it": np.zeros((2, 3))})
    fake.read.clear()
    with pytest.raises(error):
        transfer.materialize_into(transfer.read_spec(ref), {"it": place})
    assert not fake.read


def test_a_tensor_object_in_memory_is_put_and_read_as_a_tensor(transfer):
    from mooncake.dropin.store.tensors import parts_of_tensor

    tensor = torch.arange(6.0).reshape(2, 3)
    memory = np.frombuffer(bytearray(b"".join(parts_of_tensor(tensor))), np.uint8)
    buffer = tensor_object_buffer(memory.ctypes.data, memory.nbytes, memory)
    spec = transfer.read_spec(transfer.put_object({"it": buffer}))
    assert same(transfer.materialize(spec).objects["it"], tensor)
    other = np.zeros(memory.nbytes, np.uint8)
    place = tensor_object_buffer(other.ctypes.data, other.nbytes, other)
    assert same(transfer.materialize_into(spec, {"it": place}).objects["it"], tensor)
    assert np.array_equal(other, memory)
    with pytest.raises(TypeError, match="batch_size"):
        len(place)


def test_metadata_comes_back_with_how_the_members_are_stored(transfer):
    payload = StructuredObjectPayload({"k": (1, None, "x")}, {"a": b"1", "b": np.zeros((2, 3))})
    metadata = transfer.materialize(transfer.read_spec(transfer.put_structured_object(payload))).metadata
    assert metadata == {
        "k": [1, None, "x"],
        "layout": "structured",
        "__mooncake_structured_fields__": {
            "a": {"encoding": "bytes"},
            "b": {"encoding": "ndarray", "dtype": "<f8", "shape": [2, 3]},
        },
    }


def test_a_bundle_of_bytes_is_read_as_an_object_if_its_metadata_is_json(transfer):
    ref = transfer.put_bundle(b'{"k": 1}', {"a": b"abc"})
    result = transfer.materialize(transfer.read_spec(ref))
    assert (result.metadata["k"], result.objects) == (1, {"a": b"abc"})
    other = transfer.put_bundle(b"\x80", {"a": b"abc"})
    with pytest.raises(ValueError, match="JSON"):
        transfer.materialize(transfer.read_spec(other))


# ------------------------------------------------------------ wrong arguments


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda it: it.put_object(b"x", partition="a/b"), ValueError),
        (lambda it: it.put_object(b"x", partition=""), ValueError),
        (lambda it: it.put_object(b"x", chunk_bytes=0), ValueError),
        (lambda it: it.put_object(b"x", max_inflight_put=0), ValueError),
        (lambda it: it.put_object(b"x", policy=BundleTransferPolicy(put_mode="x")), ValueError),
        (lambda it: it.put_object(b"x", policy=BundleTransferPolicy(copy_mode="x")), ValueError),
        (lambda it: it.put_bundle("text", {}), TypeError),
        (lambda it: it.put_bundle(b"", {"a": 5}), TypeError),
        (lambda it: it.put_bundle(b"", {1: b""}), ValueError),
        (lambda it: it.put_structured_object(StructuredObjectPayload({"k": {1}}, {})), TypeError),
        (lambda it: it.get_object({}), ValueError),
        (lambda it: it.get_object(5), TypeError),
        (lambda it: StructuredObjectPayload({}), TypeError),
        (lambda it: MooncakeBundleTransfer(it.store, key_prefix="/"), ValueError),
        (lambda it: MooncakeBundleTransfer(it.store, default_chunk_bytes=0), ValueError),
    ],
)
def test_a_wrong_argument_is_refused_and_nothing_is_stored(fake, transfer, call, error):
    with pytest.raises(error):
        call(transfer)
    assert not fake.objects


def test_several_groups_for_one_object_are_refused(transfer):
    config = ReplicateConfig()
    config.group_ids = ["a", "b"]
    with pytest.raises(ValueError, match="exactly one"):
        transfer.put_object(b"x", config=config)


SIGNATURES = {
    "put_bundle": "self meta buffers partition chunk_bytes policy max_inflight_put config",
    "remove_bundle": "self ref",
    "put_structured_object": "self payload partition chunk_bytes policy max_inflight_put config",
    "put_object": "self obj partition chunk_bytes policy max_inflight_put config",
    "get_object": "self ref",
    "read_spec": "self ref",
    "materialize": "self spec",
    "materialize_into": "self spec destinations",
    "release_result": "result",
    "put": "self data type namespace partition stage chunk_bytes policy config field_schemas",
    "get": "self ref type fields batch_fields non_tensor_fields meta_info_keys data_cls destinations rows",
    "put_dataproto": "self data namespace partition stage chunk_bytes policy field_schemas config",
    "append_dataproto_fields": "self ref data stage overwrite chunk_bytes policy field_schemas config",
    "dataproto_manifest_view": "self ref",
    "get_dataproto": "self ref fields batch_fields non_tensor_fields meta_info_keys data_cls destinations "
    "rows",
    "cleanup_dataproto": "self ref",
    "cleanup_dataproto_append": "self previous appended",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_the_arguments_are_upstreams(name):
    parameters = inspect.signature(getattr(MooncakeBundleTransfer, name)).parameters
    assert " ".join(parameters) == SIGNATURES[name]


# ------------------------------------------------------------ nothing half


@pytest.mark.parametrize(
    ("part", "code", "error"),
    [("/1", -200, CapacityError), ("manifest", -900, PeerError), ("/0", -600, RequestError)],
)
def test_a_put_that_fails_leaves_nothing(fake, transfer, part, code, error):
    fake.refused[part] = code
    with pytest.raises(error, match=str(code)):
        transfer.put_object({"a": b"x", "b": b"y"})
    assert not fake.objects


def test_the_manifest_is_put_last_and_removed_first(fake, transfer):
    ref = transfer.put_object({"a": b"x", "b": b"y"})
    assert list(fake.objects)[-1] == ref.manifest_key
    transfer.remove_bundle(ref)
    assert fake.removed[0] == ref.manifest_key
    assert not fake.objects


@pytest.mark.parametrize("by_name", [False, True])
def test_removing_what_is_gone_is_no_error(transfer, by_name):
    ref = transfer.put_object({"a": b"x"})
    for _ in range(2):
        transfer.remove_bundle({"manifest_key": ref.manifest_key} if by_name else ref)


def test_what_cannot_be_removed_is_named_and_a_second_try_removes_it(fake, transfer):
    ref = transfer.put_object({"a": b"x"})
    fake.unremovable = "/0"
    with pytest.raises(PeerError, match="/0"):
        transfer.remove_bundle(ref)
    assert fake.is_exist(ref.manifest_key) == 0
    fake.unremovable = ""
    transfer.remove_bundle(ref)
    assert not fake.objects


@pytest.mark.parametrize("lost", ["/manifest", "/0"])
def test_an_object_of_which_a_part_is_gone_is_not_there(fake, transfer, lost):
    ref = transfer.put_object({"a": b"x"})
    del fake.objects[ref.manifest_key.removesuffix("/manifest") + lost]
    with pytest.raises(RequestError, match="not there"):
        transfer.get_object({"manifest_key": ref.manifest_key})


def test_a_part_of_another_size_is_no_part(fake, transfer):
    ref = transfer.put_object({"a": b"xyz"})
    fake.objects[ref.manifest_key.replace("manifest", "0")] = b"longer"
    with pytest.raises((PeerError, RequestError)):
        transfer.get_object(ref)


def test_bytes_that_are_no_value_are_refused(fake, transfer):
    ref = transfer.put_object({"a": ["some", np.zeros(2000)]})
    key = ref.manifest_key.replace("manifest", "0")
    size = len(fake.objects[key])
    for junk in (b"\0" * size, b"\xff" * size, b"\x08\0\0\0\1\0\0\0" + b"\x91" * (size - 8)):
        fake.objects[key] = junk
        with pytest.raises(IntegrityError):
            transfer.get_object(ref)
