"""Opening NICs and registering memory: what is missing makes memory unreachable, never a crash."""

import os

import pytest

from mooncake.core.errors import CapacityError, ConfigError, PeerGone, PeerTimeout, RequestError
from tests.unit.transfer.rdma_world import PIECE, Engine, FakePeer, errors, pair, whole
from transfer.messages import SegmentInfo
from transfer.model import Call, Opcode
from transfer.rdma import RdmaConfig, open_rdma
from transfer.topology import Topology
from transfer.verbs import Loaded
from transfer.verbs.fake import Fabric, FakeVerbs

NOWHERE = Topology({})


def test_without_a_library_or_a_device_there_is_no_transport_and_no_error():
    assert open_rdma(Loaded(None, "no kernel support"), RdmaConfig(), NOWHERE) is None
    assert open_rdma(Loaded(FakeVerbs(Fabric(), []), ""), RdmaConfig(), NOWHERE) is None


def test_a_device_that_cannot_be_opened_is_left_out_unless_it_was_asked_for():
    class OneBroken(FakeVerbs):
        def open(self, device, port=1, gid_index=None):
            if device == "bad":
                raise ConfigError("no GID")
            return super().open(device, port, gid_index)

    transport = open_rdma(Loaded(OneBroken(Fabric(), ["bad", "good"]), ""), RdmaConfig(), NOWHERE)
    fields = {}
    transport.describe(fields)
    assert [nic.name for nic in fields["nics"]] == ["good"]
    assert open_rdma(Loaded(OneBroken(Fabric(), ["bad"]), ""), RdmaConfig(), NOWHERE) is None
    with pytest.raises(ConfigError, match="no GID"):
        open_rdma(
            Loaded(OneBroken(Fabric(), ["bad", "good"]), ""), RdmaConfig(devices=("good", "bad")), NOWHERE
        )


@pytest.mark.parametrize(
    "settings",
    [
        {"devices": ("mlx0:x",)},
        {"devices": (":1",)},
        {"slice_bytes": 0},
        {"endpoints_max": 0},
        {"depth_max": -1},
    ],
)
def test_a_setting_that_cannot_work_is_a_configuration_error(settings):
    with pytest.raises(ConfigError, match="rdma"):
        RdmaConfig(**settings)


def test_a_buffer_has_one_key_per_nic_and_peers_are_told_of_both():
    engine = Engine(Fabric(), "a:1")
    buffer = engine.buffer(PIECE)
    assert set(engine.transport.rkeys(buffer)) == {"mlx0", "mlx1"}
    info = engine.info()
    assert isinstance(info, SegmentInfo)
    assert [nic.name for nic in info.nics] == ["mlx0", "mlx1"]
    assert info.buffers[0].rkeys == engine.transport.rkeys(buffer)


def test_memory_that_no_nic_takes_is_not_reachable_and_says_so():
    a, b, peer, _, theirs = pair()
    for nic in a.nics.values():
        nic.refuses = CapacityError("memlock limit")
    mine = a.buffer(16 * PIECE)
    assert a.transport.rkeys(mine) == {}
    assert not a.transport.reaches(peer, mine, b.describe(theirs))
    assert errors(a.run(peer, Opcode.READ, [whole(mine, b.describe(theirs))])) == {0: PeerGone}
    a.transport.unregister(mine, 1.0)


def test_a_buffer_without_keys_at_its_owner_is_not_reachable():
    a, b, peer, mine, theirs = pair()
    b.transport.unregister(theirs, 1.0)
    assert not a.transport.reaches(peer, mine, b.describe(theirs))
    assert errors(a.run(peer, Opcode.READ, [whole(mine, b.describe(theirs))])) == {0: PeerGone}


def test_after_unregister_no_peer_reaches_the_memory():
    a, b, peer, mine, theirs = pair()
    info = b.describe(theirs)
    a.move(peer, Opcode.WRITE, mine, theirs)
    b.transport.unregister(theirs, 1.0)
    before = theirs.owner.copy()
    mine.owner[:] = before + 1
    assert errors(a.run(peer, Opcode.WRITE, [whole(mine, info)])) == {0: RequestError}
    assert (theirs.owner == before).all()


def test_memory_in_use_stays_registered_until_the_run_ends_but_takes_no_new_run():
    a, b, peer, mine, theirs = pair(devices=["mlx0"])
    info = b.describe(theirs)
    seen = []

    def meanwhile(_):
        a.nics["mlx0"].on_post = None
        with pytest.raises(PeerTimeout, match="1 rdma runs"):
            a.transport.unregister(mine, 0.0)
        assert not a.transport.reaches(peer, mine, info)
        seen.append(errors(a.run(peer, Opcode.READ, [whole(mine, info)])))

    a.nics["mlx0"].on_post = meanwhile
    assert a.run(peer, Opcode.READ, [whole(mine, info)]) == []
    assert seen == [{0: RequestError}]
    assert (mine.owner == theirs.owner).all()
    a.transport.unregister(mine, 0.0)
    a.transport.unregister(mine, 0.0)
    assert not a.nics["mlx0"].memories


def test_device_memory_is_registered_as_a_dmabuf_and_its_descriptor_closed():
    exported = []

    def export(address, size_bytes):
        exported.append((os.open("/dev/null", os.O_RDONLY), address, size_bytes))
        return exported[0][0], 64

    engine = Engine(Fabric(), "a:1", export_dmabuf=export)
    engine.nics["mlx1"].refuses_dmabuf = CapacityError("old device")  # takes the address itself
    buffer = engine.buffer(PIECE, "cuda:0")
    assert engine.nics["mlx0"].dmabufs == [(exported[0][0], 64)]
    assert engine.nics["mlx1"].dmabufs == []
    assert set(engine.transport.rkeys(buffer)) == {"mlx0", "mlx1"}
    [(fd, address, size_bytes)] = exported
    assert (address, size_bytes) == (buffer.address, PIECE)
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(fd)


@pytest.mark.parametrize("export", [None, lambda address, size_bytes: None])
def test_device_memory_that_no_nic_takes_is_left_to_staging(export):
    engine = Engine(Fabric(), "a:1", export_dmabuf=export)
    for nic in engine.nics.values():
        nic.refuses = RequestError("not memory of this process")
    assert engine.transport.rkeys(engine.buffer(PIECE, "cuda:0")) == {}


def test_close_deregisters_what_is_still_registered():
    engine = Engine(Fabric(), "a:1")
    engine.buffer(PIECE)
    engine.transport.close()  # the fake NIC refuses to be closed with memory registered
    assert not any(nic.memories for nic in engine.nics.values())


def test_a_peer_with_a_matrix_that_is_none_is_still_reached():
    a, b, peer, mine, theirs = pair()
    peer.info = SegmentInfo("b:1", b.epoch, 1, "h", 1, [], nics=peer.info.nics, topology="nonsense")
    assert a.run(peer, Opcode.READ, [whole(mine, b.describe(theirs))], Call(60.0)) == []


def test_a_peer_unknown_to_verbs_is_not_reached():
    a, b, peer, mine, theirs = pair()
    peer = FakePeer(a, b)
    peer.info = SegmentInfo("b:1", b.epoch, 1, "h", 1, [])
    assert not a.transport.reaches(peer, mine, b.describe(theirs))
