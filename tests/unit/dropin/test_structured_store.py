"""Structured objects over the pool itself."""

import numpy as np
import pytest

from mooncake.core.errors import CapacityError, RequestError
from mooncake.store import MooncakeDistributedStore, ReplicateConfig
from mooncake.structured_object_store import MooncakeBundleTransfer, export_dataproto_ref, raw_destination
from tests.unit.dropin.test_structured import objects, same

torch = pytest.importorskip("torch")

DATA = {
    "weights": torch.arange(300_000, dtype=torch.bfloat16).reshape(300, 1000),
    "nested": [{"ids": np.arange(20_000)}, ("text", 1.5, None), torch.zeros(3)],
    "bytes": b"abc",
    "empty": np.zeros((0, 3)),
    **{f"small{row}": np.full(10, row) for row in range(20)},
}


def test_an_object_goes_through_the_pool_and_leaves_it_empty(store):
    transfer = MooncakeBundleTransfer(store, default_chunk_bytes=100_000)
    ref = transfer.put_object(DATA)
    assert same(transfer.get_object({"manifest_key": ref.manifest_key}), DATA)
    transfer.remove_bundle(ref)
    assert store.remove_all(force=True) == 0


def test_another_client_reads_what_was_put_by_a_handle_alone(store, join):
    batch = {
        "batch": {"ids": torch.arange(12).reshape(4, 3)},
        "non_tensor_batch": {"it": objects(["a", [1, 2], None, {"k": np.zeros(5000)}])},
        "meta_info": {},
    }
    handle = export_dataproto_ref(MooncakeBundleTransfer(store).put_dataproto(batch))
    other = MooncakeBundleTransfer(join(0))
    assert same(other.get_dataproto(handle), batch)
    some = other.get_dataproto(handle, rows=[3, 1])
    assert torch.equal(some["batch"]["ids"], batch["batch"]["ids"][[3, 1]])
    assert same(some["non_tensor_batch"]["it"], batch["non_tensor_batch"]["it"][[3, 1]])


def test_parts_are_read_into_registered_memory_of_the_caller(store, memory):
    transfer = MooncakeBundleTransfer(store, default_chunk_bytes=1000)
    rows = np.arange(4000, dtype=np.uint8).reshape(40, 100)
    spec = transfer.read_spec(transfer.put_object({"it": rows})).slice_member("it", 0, 5, 35, 3)
    place, address = memory(1000)
    assert store.register_buffer(address, place.nbytes) == 0
    transfer.materialize_into(spec, {"it": place.reshape(10, 100)})
    assert np.array_equal(place.reshape(10, 100), rows[5:35:3])
    assert store.unregister_buffer(address) == 0


def test_memory_that_the_caller_says_is_registered_is_not_registered_again(store, memory, monkeypatch):
    transfer = MooncakeBundleTransfer(store, default_chunk_bytes=100)
    spec = transfer.read_spec(transfer.put_object({"it": np.arange(1000).astype(np.uint8)}))
    place, address = memory(1000)
    assert store.register_buffer(address, place.nbytes) == 0
    calls: list = []
    monkeypatch.setattr(store, "register_buffer", lambda *args: calls.append(args) or -600)
    raw = raw_destination(address, place.nbytes, place, pre_registered=True)
    read = transfer.materialize_into(spec, {"it": raw}).objects["it"]
    assert not calls
    assert np.array_equal(read, np.arange(1000) % 256)
    assert store.unregister_buffer(address) == 0


@pytest.mark.parametrize("given", [None, "mine"])
def test_all_parts_of_a_batch_are_one_group_also_of_its_appends(store, monkeypatch, given):
    groups: list = []
    put_batch = store.put_batch

    def spy(keys, values, config):
        groups.extend(config.group_ids)
        assert (len(config.group_ids), config.with_hard_pin) == (len(keys), given is not None)
        return put_batch(keys, values, config)

    monkeypatch.setattr(store, "put_batch", spy)
    config = None
    if given:
        config = ReplicateConfig()
        config.group_ids, config.with_hard_pin = [given], True
    transfer = MooncakeBundleTransfer(store, default_chunk_bytes=10)
    ref = transfer.put_dataproto({"batch": {"a": np.arange(4)}}, config=config)
    transfer.append_dataproto_fields(
        export_dataproto_ref(ref), {"batch": {"b": np.arange(4)}}, stage="s", config=config
    )
    assert len(groups) == 2 * (4 + 1)
    assert set(groups) == {given or ref._storage_group_id}


def test_an_object_larger_than_the_pool_is_refused_and_nothing_is_left(store):
    config = ReplicateConfig()
    config.with_hard_pin = True
    with pytest.raises(CapacityError):
        MooncakeBundleTransfer(store).put_object({"it": np.zeros(64 << 20, np.uint8)}, config=config)
    assert store.remove_all(force=True) == 0


def test_a_store_that_is_not_set_up_is_an_error():
    transfer = MooncakeBundleTransfer(MooncakeDistributedStore())
    with pytest.raises(RequestError, match="set up"):
        transfer.put_object(b"x")
    with pytest.raises(RequestError, match="setup"):
        transfer.get_object({"manifest_key": "bundle/default/" + "0" * 32 + "/manifest"})
