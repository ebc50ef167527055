"""When a way breaks, another carries the rest; it is left alone for a while, and taken up again by trials."""

import time

import numpy as np
import pytest
from prometheus_client import CollectorRegistry, generate_latest

from mooncake.core.errors import CapacityError, MooncakeError, PeerGone, RequestError
from transfer.batch import Batch
from transfer.config import EngineConfig
from transfer.dispatch import ATTEMPTS_MAX
from transfer.engine import TransferEngine
from transfer.health import PathState
from transfer.model import Buffer, Call, Failure, Opcode
from transfer.verbs.fake import Fabric, FakeVerbs

SIZE = 1 << 20


class World:
    """Two engines with two fake NICs each, that share no memory."""

    def __init__(self, folder) -> None:
        fabric = Fabric()
        self.verbs = [FakeVerbs(fabric, ["nic0", "nic1"]) for _ in range(2)]
        self.here, self.there = (
            TransferEngine(
                EngineConfig(run_dir=str(folder / f"e{i}"), transports=("rdma", "tcp")), self.verbs[i]
            ).start()
            for i in range(2)
        )
        self.mine = self.here.register(np.zeros(SIZE, np.uint8))
        self.theirs = self.there.register(np.arange(SIZE, dtype=np.uint32).view(np.uint8)[:SIZE].copy())

    def read(self) -> None:
        self.mine.view[:] = bytes(SIZE)
        self.here.transfer(Opcode.READ, self.there.name, self.mine.address, self.theirs.address, SIZE)
        assert bytes(self.mine.view) == bytes(self.theirs.view)

    def nics_up(self, up: bool) -> None:
        for nic in self.verbs[0].nics.values():
            nic.up = up

    def moved(self) -> dict[str, int]:
        counts = self.here.metrics.counts()
        return {transport: int(size) for (transport, _, _), size in counts.bytes.items() if size}

    def metrics(self) -> str:
        registry = CollectorRegistry()
        registry.register(self.here.collector())
        return generate_latest(registry).decode()


@pytest.fixture
def world(tmp_path):
    world = World(tmp_path)
    yield world
    world.here.close()
    world.there.close()


def test_rdma_is_preferred_where_both_have_it(world):
    world.read()
    assert world.moved() == {"rdma": SIZE}
    assert 'mooncake_transfer_nic_bytes_total{link="nic' in world.metrics()


def test_what_rdma_cannot_carry_goes_by_tcp_and_that_is_visible(world):
    world.nics_up(False)
    world.read()
    assert world.moved() == {"tcp": SIZE}
    text = world.metrics()
    assert 'mooncake_transfer_failovers_total{from="rdma",to="tcp"} 1.0' in text
    assert f'mooncake_transfer_failures_total{{link="{world.there.name}"' in text
    assert "mooncake_transfer_path_state{link=" in text


def test_a_link_that_breaks_in_the_middle_loses_no_byte(world):
    for nic in world.verbs[0].nics.values():
        nic.kill_next = 0  # dies with its first work, after it was accepted
    world.read()
    assert world.moved().get("tcp") == SIZE


def test_rdma_comes_back_after_its_quarantine(world, monkeypatch):
    world.nics_up(False)
    for _ in range(4):
        world.read()
    assert world.here._dispatcher.states() or world.here._rdma.states()
    world.nics_up(True)
    before = world.moved().get("rdma", 0)
    real = time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: real() + 3600.0)
    for _ in range(8):
        world.read()
    assert world.moved().get("rdma", 0) > before
    assert PathState.QUARANTINED not in world.here._dispatcher.states().values()


def test_closed_buffers_hide_the_keys_of_nics_too(tmp_path):
    fabric = Fabric()
    config = EngineConfig(run_dir=str(tmp_path), transports=("rdma",), open_buffers=False)
    with TransferEngine(config, FakeVerbs(fabric, ["nic0"])) as engine:
        buffer = engine.register(np.zeros(4096, np.uint8))
        assert engine.info.buffers[0].rkeys == {}
        assert list(engine.grant(buffer)["rkeys"]) == ["nic0"]


def test_a_refusal_is_final_and_quarantines_nothing(world):
    peer = world.here.peer(world.there.name)
    peer.learn(world.theirs.buffer_id, bytes(16))
    batch = world.here.submit(
        Opcode.READ, world.there.name, [world.mine.address], [world.theirs.address], [100], transport="tcp"
    )
    assert batch.wait(30)
    assert isinstance(batch.errors[0], RequestError)
    assert world.here._dispatcher.states() == {}


def test_without_any_device_it_says_so_and_uses_tcp(tmp_path, caplog):
    engine = TransferEngine(EngineConfig(run_dir=str(tmp_path), transports=("rdma", "tcp"))).start()
    try:
        assert engine.info.nics == []
        assert list(engine._transports) == ["tcp"]
    finally:
        engine.close()


class Broken:
    """A transport on which everything fails."""

    name = "broken"
    judges_itself = False

    def __init__(self, error) -> None:
        self.error = error
        self.runs = 0

    def reaches(self, peer, mine: Buffer, theirs) -> bool:
        return True

    def lanes(self, peer) -> int:
        return 1

    def run(self, peer, op, slices, call: Call) -> list[Failure]:
        self.runs += 1
        return [Failure(piece, self.error) for piece in slices]


def test_a_bug_in_a_transport_is_an_error_of_the_batch_never_a_success(pair, monkeypatch):
    here, there = pair
    mine, theirs = here.allocate(4096), there.allocate(4096)
    monkeypatch.setattr(here._transports["shm"], "run", lambda *_: 1 / 0)
    with pytest.raises(MooncakeError, match="ZeroDivision"):
        here.transfer(Opcode.READ, there.name, mine.address, theirs.address, 4096)


@pytest.mark.parametrize(
    ("error", "runs"), [(PeerGone("cut"), 2), (CapacityError("full"), 2), (RequestError("no"), 1)]
)
def test_attempts_are_bounded(pair, error, runs):
    here, there = pair
    mine, theirs = here.allocate(4096), there.allocate(4096)
    broken = {name: Broken(error) for name in ("a", "b", "c")}
    here._transports.clear()
    here._transports.update(broken)
    batch = here.submit(Opcode.READ, there.name, [mine.address], [theirs.address], [10])
    assert isinstance(batch, Batch)
    assert batch.wait(30)
    assert batch.errors[0] is error
    total = sum(transport.runs for transport in broken.values())
    assert total == (ATTEMPTS_MAX if runs > 1 else 1)
    assert all(transport.runs <= runs for transport in broken.values())
    here._transports.clear()
