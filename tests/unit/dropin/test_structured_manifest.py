"""A manifest may have been written by anybody: it is checked before anything that it says is done."""

import contextlib

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mooncake.core.errors import CapacityError, IntegrityError, MooncakeError, PeerError, RequestError
from mooncake.dropin.structured import manifest as manifests
from mooncake.structured_object_store import MooncakeBundleTransfer, RemoteBundleRef
from tests.unit.dropin.test_structured import FakeStore, objects


@pytest.fixture
def fake() -> FakeStore:
    return FakeStore()


@pytest.fixture
def transfer(fake) -> MooncakeBundleTransfer:
    return MooncakeBundleTransfer(fake)


def of_member(**changes):
    def change(manifest, key):
        manifest["buffers"]["a"].update(changes)

    return change


def of_field(**changes):
    def change(manifest, key):
        manifest["buffers"]["a"]["field"].update(changes)

    return change


OTHER = "0" * 32

HOSTILE = {
    "another version": lambda it, key: it.update(version=2),
    "another layout": lambda it, key: it.update(layout="x"),
    "another object": lambda it, key: it.update(object_id=f"default/{OTHER}"),
    "an object of another partition": lambda it, key: it.update(shared=[f"secret/{OTHER}"]),
    "a name that is none": lambda it, key: it.update(shared=["../x"]),
    "too many objects": lambda it, key: it.update(shared=[f"default/{OTHER}"] * 2000),
    "a member of another bundle": of_member(source=1),
    "chunks of nothing": of_member(chunk_bytes=0),
    "more chunks than any": of_member(bytes=1 << 40, chunk_bytes=1),
    "a chunk of less than nothing": of_member(first=-1),
    "a head without a body": of_member(head=9),
    "another size": of_member(bytes=7),
    "a member without a name": lambda it, key: it["buffers"].update({"": it["buffers"]["a"]}),
    "an encoding that would run code": of_field(encoding="pickle"),
    "an array of objects": of_field(dtype="|O"),
    "an array of records": of_field(dtype="i4,i4"),
    "a dtype that is none": of_field(dtype="os.system"),
    "a dtype of no such size": of_field(dtype="<f7"),
    "another shape": of_field(shape=[3]),
    "a huge shape of nothing": of_field(shape=[0, 1 << 62]),
    "a shape of less than nothing": of_field(shape=[-1]),
    "too many dimensions": of_field(shape=[1] * 40),
    "a tensor of no kind": of_field(encoding="torch_tensor", dtype="torch.load"),
    "a tensor that is an array": of_field(encoding="torch_tensor", dtype="<i8"),
    "more rows than bytes": of_field(encoding="rows", rows=1 << 50),
    "an index longer than all bytes": of_field(encoding="rows", rows=3),
    "rows that are none": of_field(encoding="rows", rows=0),
    "a value that is none": of_field(encoding="value"),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("stored", [True, False], ids=["from the store", "from the caller"])
def test_a_manifest_that_was_not_written_here_is_refused(fake, transfer, name, stored):
    ref = transfer.put_object({"a": np.array([8])})
    HOSTILE[name](ref.manifest, ref.manifest_key.removesuffix("/manifest"))
    if stored:
        fake.objects[ref.manifest_key] = msgspec.msgpack.encode(ref.manifest)
        ref.manifest = {}
    with pytest.raises(IntegrityError):
        transfer.get_object(ref)


@pytest.mark.parametrize(
    "junk", [b"junk", b"\x91" * 100000, b"\x81\xa8metadata" * 5000, b"{}", b"\xdf\xff\xff\xff\xff"]
)
def test_bytes_that_are_no_manifest_are_refused(fake, transfer, junk):
    ref = transfer.put_object({"a": b"x"})
    fake.objects[ref.manifest_key] = junk
    with pytest.raises(IntegrityError, match="manifest"):
        transfer.get_object({"manifest_key": ref.manifest_key})


def test_a_manifest_is_refused_before_it_is_decoded_if_it_is_too_large(fake, transfer, monkeypatch):
    ref = transfer.put_object({"a": b"x"})
    monkeypatch.setattr(manifests, "MANIFEST_BYTES_MAX", 10)
    with pytest.raises(IntegrityError, match="at most"):
        transfer.get_object({"manifest_key": ref.manifest_key})
    with pytest.raises(ValueError, match="at most"):
        transfer.put_object({"a": b"x"})
    assert len(fake.objects) == 2


def test_too_many_members_are_refused_before_anything_is_stored(fake, transfer):
    with pytest.raises(ValueError, match="at most"):
        transfer.put_object({str(row): b"" for row in range(manifests.MEMBERS_MAX + 1)})
    assert not fake.objects


@pytest.mark.parametrize("name", ["another object", "an object of another partition", "more chunks than any"])
def test_a_hostile_manifest_removes_nothing(fake, transfer, name):
    fake.objects["weights/0"] = b"precious"
    ref = transfer.put_object({"a": np.array([8])})
    before = dict(fake.objects)
    HOSTILE[name](ref.manifest, ref.manifest_key.removesuffix("/manifest"))
    with pytest.raises(IntegrityError):
        transfer.remove_bundle(RemoteBundleRef(ref.manifest_key, ref.manifest))
    assert fake.objects == before


DATA = {
    "array": np.arange(4).reshape(2, 2),
    "column": objects(["a", [1, (2, None)], np.arange(3), np.float32(2)]),
    "nested": [{"x": (1, 2.5)}, np.zeros(600), np.array([None, "a"], object)],
    "bytes": b"abc",
}


@settings(max_examples=80, deadline=None)
@given(which=st.integers(0, 4), at=st.floats(0, 0.999), byte=st.integers(0, 255), again=st.floats(0, 0.999))
def test_damaged_bytes_are_read_or_refused_and_nothing_else(which, at, byte, again):
    fake = FakeStore()
    transfer = MooncakeBundleTransfer(fake)
    ref = transfer.put_object(DATA)
    key = list(fake.objects)[which]
    damaged = bytearray(fake.objects[key])
    for place in (at, again):
        damaged[int(place * len(damaged))] = byte
    fake.objects[key] = bytes(damaged)
    with contextlib.suppress(MooncakeError):
        transfer.get_object({"manifest_key": ref.manifest_key})


def test_a_size_that_no_memory_has_is_an_error(transfer):
    ref = transfer.put_object({"a": b"x"})
    ref.manifest["buffers"]["a"].update(bytes=1 << 60, chunk_bytes=1 << 60)
    with pytest.raises((CapacityError, PeerError, RequestError)):
        transfer.get_object(ref)
