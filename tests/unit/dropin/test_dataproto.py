"""DataProto batches: rows and fields come back as they were; appends and handles."""

import json

import numpy as np
import pytest

from mooncake.core.errors import CapacityError, IntegrityError, PeerError, RequestError
from mooncake.structured_object_store import (
    MISSING,
    FieldSchema,
    MooncakeBundleTransfer,
    StructuredMemberSlice,
    export_dataproto_ref,
    import_dataproto_ref,
    infer_structure,
    is_dataproto_ref_handle,
    tensor_object_buffer,
)
from tests.unit.dropin.test_structured import FakeStore, objects, same

torch = pytest.importorskip("torch")

ROWS = 4
BATCH = {
    "batch": {"ids": torch.arange(12).reshape(ROWS, 3), "mask": np.ones((ROWS, 2), np.float16)},
    "non_tensor_batch": {
        "text": objects(["a", "bb", None, ""]),
        "name": np.array(["a", "b", "c", "d"]),
        "ragged": objects([[1, 2], [3], [], (4, 5)]),
        "dicts": objects([{"a": 1, "b": [1, "x"]}, {}, {"t": torch.ones(3)}, {"n": None}]),
        "arrays": objects([np.arange(2), np.zeros((2, 3)), np.arange(0), np.float32(1)]),
        "mixed": objects([1, "a", None, b"x"]),
        "nothing": objects([None] * ROWS),
    },
    "meta_info": {"temperature": 0.5, "shape": [1, 2]},
}


@pytest.fixture
def fake() -> FakeStore:
    return FakeStore()


@pytest.fixture
def transfer(fake) -> MooncakeBundleTransfer:
    return MooncakeBundleTransfer(fake, default_chunk_bytes=64)


def of_rows(batch, rows):
    sections = ("batch", "non_tensor_batch")
    return {section: {name: value[rows] for name, value in batch[section].items()} for section in sections}


class DataProto:
    def __init__(self, batch, non_tensor_batch, meta_info) -> None:
        self.batch, self.non_tensor_batch, self.meta_info = batch, non_tensor_batch, meta_info


# ------------------------------------------------------------ reading


def test_a_batch_comes_back_by_its_handle_as_json(transfer):
    handle = json.loads(json.dumps(export_dataproto_ref(transfer.put_dataproto(BATCH))))
    assert is_dataproto_ref_handle(handle)
    assert same(transfer.get_dataproto(handle), BATCH)
    assert export_dataproto_ref(import_dataproto_ref(handle)) == handle


@pytest.mark.parametrize(
    ("rows", "wanted"),
    [
        (slice(1, 3), [1, 2]),
        (slice(None, None, 2), [0, 2]),
        (slice(3, 1), []),
        (StructuredMemberSlice(0, -2, 99), [2, 3]),
        ([3, 0, 0, -1], [3, 0, 0, 3]),
        ((np.int64(2),), [2]),
        (np.array([1, 2]), [1, 2]),
        ([], []),
    ],
)
def test_rows_are_read_in_the_order_in_which_they_are_asked_for(transfer, rows, wanted):
    read = transfer.get_dataproto(transfer.put_dataproto(BATCH), rows=rows)
    assert read.pop("meta_info") == BATCH["meta_info"]
    assert same(read, of_rows(BATCH, wanted))


@pytest.mark.parametrize(
    ("rows", "error"),
    [
        ([4], IndexError),
        ([-5], IndexError),
        ("ab", TypeError),
        ([1.0], TypeError),
        (3, TypeError),
        (slice(None, None, -1), ValueError),
        (StructuredMemberSlice(1, 0, 1), ValueError),
    ],
)
def test_rows_that_are_none_are_refused(transfer, rows, error):
    ref = transfer.put_dataproto(BATCH)
    with pytest.raises(error):
        transfer.get_dataproto(ref, rows=rows)


def test_chosen_fields_are_the_only_ones_that_are_read(fake, transfer):
    ref = transfer.put_dataproto(BATCH)
    fake.read.clear()
    assert list(transfer.get_dataproto(ref, fields=["name"])["non_tensor_batch"]) == ["name"]
    assert len(fake.read) == 1
    read = transfer.get_dataproto(
        ref, batch_fields=["mask"], non_tensor_fields=["text"], meta_info_keys=["x"]
    )
    assert [list(section) for section in read.values()] == [["mask"], ["text"], []]
    with pytest.raises(KeyError, match="zz"):
        transfer.get_dataproto(ref, fields=["zz"])
    with pytest.raises(ValueError, match="combined"):
        transfer.get_dataproto(ref, fields=["ids"], batch_fields=["ids"])


def test_dense_fields_go_into_the_callers_memory(transfer):
    ref = transfer.put_dataproto(BATCH)
    mask, ids = np.empty((2, 2), np.float16), torch.empty(2, 3, dtype=torch.int64)
    places = {"mask": mask, "ids": ids}
    read = transfer.get_dataproto(ref, fields=["mask", "ids"], rows=[2, 1], destinations=places)["batch"]
    assert read["mask"] is mask
    assert read["ids"] is ids
    assert torch.equal(ids, BATCH["batch"]["ids"][[2, 1]])
    with pytest.raises(ValueError, match="destination"):
        transfer.get_dataproto(ref, fields=["text"], destinations={"text": mask})


def test_a_batch_is_any_object_with_the_three_sections_and_is_made_into_one(transfer):
    read = transfer.get_dataproto(transfer.put_dataproto(DataProto(**BATCH)), data_cls=DataProto)
    assert same(vars(read), BATCH)
    with pytest.raises(TypeError, match="made of"):
        transfer.get_dataproto(transfer.put_dataproto(BATCH), data_cls=int)
    with pytest.raises(TypeError, match="DataProto"):
        transfer.put_dataproto(5)


# ------------------------------------------------------------ flat dicts


def test_a_flat_dict_is_sorted_into_sections_and_comes_back_flat(transfer):
    data = {"ids": torch.arange(4), "text": ["a", "b", None, "d"], "lr": 0.1, "layers": [1, 2, 3]}
    ref = transfer.put(data, type="dict")
    sections = {name: at.section for name, at in ref.field_index.items()}
    assert sections == {"ids": "batch", "text": "non_tensor_batch"}
    assert same(dict(sorted(transfer.get(ref, type="dict").items())), dict(sorted(data.items())))
    assert transfer.get(ref, type="dict", rows=[2], fields=["text"])["text"] == [None]


def test_a_schema_says_which_section_a_field_is_of(transfer):
    data = {"ids": [1, 2], "names": ["a", "b"], "ones": np.ones(2)}
    with_section = {
        "ids": FieldSchema("ndarray", metadata={"section": "non_tensor_batch", "dtype": "int32"}),
        "names": FieldSchema("auto", metadata={"section": "meta_info"}),
    }
    ref = transfer.put(data, type="dict", field_schemas=with_section)
    read = transfer.get(ref, type="dict")
    assert read["names"] == ["a", "b"]
    assert read["ids"] == [1, 2]
    assert ref.field_index["ones"].section == "batch"


def test_a_schema_with_a_dtype_casts_numbers_and_leaves_lists_lists(transfer):
    rows = {
        "arrays": [np.arange(3), np.zeros((1, 2, 2))],
        "lists": [[1, 2], [3.0]],
        "nulls": [None, [1]],
        "flags": [np.array([True]), np.array([False, True])],
        "dense": np.arange(2),
    }
    schema = FieldSchema("typed_ragged", metadata={"section": "non_tensor_batch", "dtype": "int32"})
    flags = FieldSchema("typed_ragged", metadata={"section": "non_tensor_batch"})
    schemas = {**dict.fromkeys(rows, schema), "flags": flags}
    read = transfer.get(transfer.put(rows, type="dict", field_schemas=schemas), type="dict")
    assert [row.dtype for row in read["arrays"]] == [np.int32] * 2
    assert (read["lists"], read["nulls"]) == ([[1, 2], [3]], [None, [1]])
    assert read["dense"].dtype == np.int32
    assert [row.dtype for row in read["flags"]] == [bool] * 2


@pytest.mark.parametrize(
    ("data", "schemas", "reason"),
    [
        ({"a": [1, 2], "b": [1]}, {}, "ambiguous"),
        ({"a": np.zeros(2), "b": np.zeros(3)}, {}, "ambiguous"),
        ({"a": [1]}, {"a": FieldSchema("auto", metadata={"section": "x"})}, "section"),
        ({"a": [1, None]}, {"a": FieldSchema("auto", nullable=False)}, "nullable"),
        ({"a": [1, "x"]}, {"a": FieldSchema("utf8_ragged")}, "utf8_ragged"),
        ({"a": [1]}, {"a": FieldSchema("pickle")}, "unsupported"),
        ({"a": [1]}, {"a": FieldSchema("ndarray", metadata={"dtype": "O"})}, "numeric"),
        ({"a": [1]}, {"a": FieldSchema("ndarray", metadata={"dtype": "zz"})}, "dtype"),
        ({"a": ["x"]}, {"a": FieldSchema("ndarray", metadata={"dtype": "int8"})}, "int8"),
        ({"a": [[300]]}, {"a": FieldSchema("typed_ragged", metadata={"dtype": "int8"})}, "int8"),
    ],
)
def test_a_flat_dict_that_is_not_clear_or_not_as_its_schema_says_is_refused(
    fake, transfer, data, schemas, reason
):
    with pytest.raises(ValueError, match=reason):
        transfer.put(data, type="dict", field_schemas=schemas)
    assert not fake.objects


@pytest.mark.parametrize(
    "batch",
    [
        {"batch": {"a": torch.zeros(2), "b": torch.zeros(3)}},
        {"batch": {"a": torch.zeros(2)}, "non_tensor_batch": {"a": objects([1, 2])}},
        {"batch": {"a": torch.tensor(1)}},
    ],
)
def test_fields_that_disagree_are_refused(transfer, batch):
    with pytest.raises(ValueError):  # noqa: PT011 - three reasons
        transfer.put_dataproto(batch)


def test_a_schema_for_another_section_is_refused(transfer):
    schema = {"a": FieldSchema("auto", metadata={"section": "non_tensor_batch"})}
    with pytest.raises(ValueError, match="declares section"):
        transfer.put_dataproto({"batch": {"a": torch.zeros(2)}}, field_schemas=schema)


def test_a_tensor_object_is_a_field_if_its_rows_are_known(transfer):
    from mooncake.dropin.store.tensors import parts_of_tensor

    memory = np.frombuffer(bytearray(b"".join(parts_of_tensor(torch.arange(6).reshape(2, 3)))), np.uint8)
    buffer = tensor_object_buffer(memory.ctypes.data, memory.nbytes, memory, batch_size=2)
    read = transfer.get_dataproto(transfer.put_dataproto({"batch": {"it": buffer}}), rows=[1])
    assert read["batch"]["it"].tolist() == [[3, 4, 5]]


# ------------------------------------------------------------ appending


@pytest.mark.parametrize("stage", ["default", "second"])
def test_an_append_adds_fields_and_leaves_the_earlier_ref_as_it_was(transfer, stage):
    ref = transfer.put_dataproto(BATCH)
    more = {"batch": {"reward": torch.ones(ROWS)}, "meta_info": {"step": 1}}
    both = transfer.append_dataproto_fields(export_dataproto_ref(ref), more, stage=stage)
    read = transfer.get_dataproto(both, fields=["ids", "reward"])
    assert torch.equal(read["batch"]["reward"], torch.ones(ROWS))
    assert read["meta_info"] == {**BATCH["meta_info"], "step": 1}
    assert same(transfer.get_dataproto(ref), BATCH)


@pytest.mark.parametrize("stage", ["default", "second"])
def test_an_append_can_be_taken_back(fake, transfer, stage):
    ref = transfer.put_dataproto(BATCH)
    before = dict(fake.objects)
    once = transfer.append_dataproto_fields(ref, {"batch": {"a": torch.ones(ROWS)}}, stage=stage)
    between = dict(fake.objects)
    twice = transfer.append_dataproto_fields(once, {"batch": {"b": torch.ones(ROWS)}}, stage=stage)
    for _ in range(2):
        transfer.cleanup_dataproto_append(export_dataproto_ref(once), export_dataproto_ref(twice))
        assert fake.objects == between
    transfer.cleanup_dataproto_append(ref, once)
    assert fake.objects == before


def test_taking_back_one_of_two_appends_to_the_same_batch_keeps_the_other(transfer):
    ref = transfer.put_dataproto(BATCH)
    one, two = (
        transfer.append_dataproto_fields(ref, {"batch": {"a": torch.full((ROWS,), value)}}, stage="default")
        for value in (1, 2)
    )
    transfer.cleanup_dataproto_append(one, two)
    assert transfer.get_dataproto(one, fields=["a"])["batch"]["a"].tolist() == [1] * ROWS
    assert same(transfer.get_dataproto(ref), BATCH)


def test_cleanup_removes_a_batch_with_all_its_appends(fake, transfer):
    ref = transfer.put_dataproto(BATCH)
    for stage in ("default", "default", "second"):
        name = f"field{len(ref.field_index)}"
        ref = transfer.append_dataproto_fields(ref, {"batch": {name: torch.ones(ROWS)}}, stage=stage)
    handle = export_dataproto_ref(ref)
    for _ in range(2):
        transfer.cleanup_dataproto(handle)
        assert not fake.objects


def test_overwrite_replaces_the_fields_of_a_stage(fake, transfer):
    ref = transfer.put_dataproto({"batch": {"a": torch.zeros(2)}}, stage="x")
    count = len(fake.objects)
    new = transfer.append_dataproto_fields(ref, {"batch": {"a": torch.ones(2)}}, stage="x", overwrite=True)
    assert transfer.get_dataproto(new)["batch"]["a"].tolist() == [1, 1]
    assert len(fake.objects) == count


def test_an_overwrite_whose_old_fields_cannot_be_removed_is_done_all_the_same(fake, transfer):
    ref = transfer.put_dataproto({"batch": {"a": torch.zeros(2)}})
    fake.unremovable = "/0"
    new = transfer.append_dataproto_fields(
        ref, {"batch": {"a": torch.ones(2)}}, stage="default", overwrite=True
    )
    assert transfer.get_dataproto(new)["batch"]["a"].tolist() == [1, 1]


@pytest.mark.parametrize(
    ("more", "options", "reason"),
    [
        ({"batch": {"ids": torch.zeros(ROWS)}}, {"stage": "s"}, "already exist"),
        ({"batch": {"new": torch.zeros(3)}}, {"stage": "s"}, "batch size"),
        ({"batch": {"new": torch.zeros(ROWS)}}, {"stage": "default", "overwrite": True}, "must include"),
        ({"batch": {"new": torch.zeros(ROWS)}}, {"stage": ""}, "stage"),
    ],
)
def test_an_append_that_does_not_fit_is_refused_and_stores_nothing(fake, transfer, more, options, reason):
    ref = transfer.put_dataproto(BATCH)
    before = dict(fake.objects)
    with pytest.raises(ValueError, match=reason):
        transfer.append_dataproto_fields(ref, more, **options)
    assert fake.objects == before


def test_an_append_that_fails_leaves_nothing_of_it(fake, transfer):
    ref = transfer.put_dataproto(BATCH)
    before = dict(fake.objects)
    fake.refused["manifest"] = -200
    with pytest.raises(CapacityError):
        transfer.append_dataproto_fields(ref, {"batch": {"a": torch.ones(ROWS)}}, stage="default")
    assert fake.objects == before


def test_an_append_of_meta_info_alone_stores_nothing(fake, transfer):
    ref = transfer.put_dataproto(BATCH)
    count = len(fake.objects)
    more = transfer.append_dataproto_fields(ref, {"batch": {}, "meta_info": {"k": 1}}, stage="s")
    assert more.meta_info == {**BATCH["meta_info"], "k": 1}
    assert (len(fake.objects), ref.meta_info) == (count, BATCH["meta_info"])


def test_the_manifest_view_says_where_fields_are_and_how_they_are_stored(transfer):
    ref = transfer.put_dataproto(BATCH, namespace="n", partition="p", stage="s")
    view = transfer.dataproto_manifest_view(ref)
    assert (view["namespace"], view["partition"], view["batch_size"]) == ("n", "p", ROWS)
    assert view["batch_fields"]["ids"] == {
        "section": "batch",
        "stage": "s",
        "member": "batch.ids",
        "spec": {"encoding": "torch_tensor", "dtype": "torch.int64", "shape": [4, 3], "element_size": 8},
    }
    assert list(view["non_tensor_fields"]) == list(BATCH["non_tensor_batch"])
    assert view["meta_info_keys"] == ["temperature", "shape"]
    assert view["stages"]["s"]["manifest_key"] == ref.stage_refs["s"].manifest_key
    assert view["stages"]["s"]["dataproto"]["batch_size"] == ROWS


# ------------------------------------------------------------ handles


@pytest.mark.parametrize(
    "change",
    [
        {"type": "x"},
        {"version": 3},
        {"version": 2, "storage_group_id": None},
        {"kind": "x"},
        {"batch_size": -1},
        {"batch_size": "4"},
        {"stage_refs": {"default": {}}},
        {"stage_refs": {"": {"manifest_key": "k"}}},
        {"stage_refs": []},
        {"field_index": {"ids": {"stage": "zz", "member": "m", "section": "batch"}}},
        {"field_index": {"ids": {"stage": "default", "member": "m", "section": "meta_info"}}},
        {"global_indexes": ["x"]},
        {"meta_info": 5},
        {"storage_group_id": 5},
    ],
)
def test_a_handle_that_is_none_is_refused(transfer, change):
    handle = {**export_dataproto_ref(transfer.put_dataproto(BATCH)), **change}
    with pytest.raises(ValueError, match="handle"):
        import_dataproto_ref(handle)


def test_a_handle_holds_json_only(transfer):
    ref = transfer.put_dataproto({"batch": {}, "meta_info": {"a": np.arange(2), "b": (np.float32(1), None)}})
    assert export_dataproto_ref(ref)["meta_info"] == {"a": [0, 1], "b": [1.0, None]}
    ref.meta_info["it"] = object()
    with pytest.raises(TypeError, match="JSON"):
        export_dataproto_ref(ref)
    with pytest.raises(TypeError, match="MooncakeDataProtoRef"):
        export_dataproto_ref({})
    with pytest.raises(TypeError, match="handle"):
        transfer.get_dataproto(5)


@pytest.mark.parametrize("change", [{"batch_size": 5}, {"partition": "other"}])
def test_a_handle_that_contradicts_what_is_stored_is_refused(transfer, change):
    handle = {**export_dataproto_ref(transfer.put_dataproto(BATCH)), **change}
    if "batch_size" in change:
        with pytest.raises(IntegrityError, match="rows"):
            transfer.get_dataproto(handle)
    handle["stage_refs"] = {"default": {"manifest_key": "secrets/manifest"}}
    with pytest.raises((IntegrityError, RequestError)):
        transfer.get_dataproto(handle)


def test_a_batch_that_was_removed_is_not_there(fake, transfer):
    handle = export_dataproto_ref(transfer.put_dataproto(BATCH))
    transfer.cleanup_dataproto(handle)
    with pytest.raises(RequestError, match="not there"):
        transfer.get_dataproto(handle)
    fake.is_exist = lambda key: -900
    with pytest.raises(PeerError):
        transfer.cleanup_dataproto(handle)


# ------------------------------------------------------------ infer_structure


def test_infer_structure_takes_dicts_and_short_lists_apart():
    leaves, nodes = [], []
    rows = [{"a": 1, "b.c": [{"x": "t"}]}, None, {"a": None}]
    infer_structure("f", rows, leaves, nodes)
    assert [(leaf.path, leaf.values, leaf.decision.codec) for leaf in leaves] == [
        ("f.a", [1, None, None], "ndarray"),
        (r"f.b\.c[0].x", ["t", None, None], "utf8_ragged"),
    ]
    assert [(node.path, node.node_type, node.children) for node in nodes] == [
        ("f", "dict", ["a", "b.c"]),
        (r"f.b\.c", "list", [0]),
        (r"f.b\.c[0]", "dict", ["x"]),
    ]
    assert nodes[0].row_mask == [True, False, True]
    assert repr(MISSING) == "<MISSING>"


@pytest.mark.parametrize(
    ("rows", "codec", "accepted"),
    [
        ([torch.zeros(2), None], "ragged_tensor", True),
        ([torch.zeros(2), torch.zeros(2, dtype=torch.int8)], "ragged_tensor", False),
        ([[b"x"], []], "media_list_ragged", True),
        ([[1, 2], [3.5]], "typed_ragged", True),
        ([np.arange(2), np.zeros((2, 2))], "typed_ragged", True),
        ([1, True, 2.5], "ndarray", True),
        ([b"x", None], "bytes_ragged", True),
        (["x"], "utf8_ragged", True),
        ([["x"], [[1], 2]], "msgpack_ragged", True),
        ([1, "x"], "msgpack_ragged", False),
        ([None], "msgpack_ragged", False),
    ],
)
def test_infer_structure_names_what_rows_have_in_common(rows, codec, accepted):
    leaves: list = []
    infer_structure("f", rows, leaves, [])
    assert [(leaf.decision.codec, leaf.decision.accepted) for leaf in leaves] == [(codec, accepted)]
