"""Run inside a VM: the RDMA transport on a real (software) device, through a real verbs library.

    python guest_transport.py BACKEND        prints "PASS|FAIL BACKEND check seconds detail" for each check

Several engines' transports live in this process and reach each other over rxe0, the last checks also over
rxe1; their control messages are function calls.
"""

import logging
import subprocess
import sys
import threading
import time
import traceback

import numpy as np
import structlog

from mooncake.core.errors import PeerGone, RequestError
from tests.unit.transfer.rdma_world import Engine, FakePeer, errors, part, whole
from transfer.messages import BufferInfo
from transfer.model import Call, Opcode
from transfer.verbs import load
from transfer.verbs.api import Verbs

BLOCK_BYTES = 128 << 10
SIZE = 64 * BLOCK_BYTES
"""8 MiB: 0.1 s on this device where the host is idle."""
PATIENCE_S = 30.0


class Pair:
    """Two engines with one buffer each."""

    def __init__(self, verbs: Verbs, size: int = SIZE, **settings: object) -> None:
        self.a = Engine(None, "a:1", verbs=verbs, slice_bytes=BLOCK_BYTES, **settings)
        self.b = Engine(None, "b:1", verbs=verbs, slice_bytes=BLOCK_BYTES, **settings)
        self.theirs, self.mine = self.b.buffer(size), self.a.buffer(size)
        self.mine.owner[:] = 0
        self.peer = FakePeer(self.a, self.b)
        self.info = self.b.describe(self.theirs)

    def run(self, op: Opcode, call: Call | None = None) -> dict[int, type]:
        return errors(self.a.run(self.peer, op, [whole(self.mine, self.info)], call))

    def equal(self) -> bool:
        return np.array_equal(self.mine.owner, self.theirs.owner)

    def guests(self) -> list:
        return [guest.pair for guest in list(self.b.transport._guests._guests.values())]

    def in_the_middle(self, act, op: Opcode = Opcode.WRITE, call: Call | None = None) -> dict[int, type]:
        """Run, and call `act` in another thread when some bytes have arrived, but not all."""
        target, source = (self.theirs, self.mine) if op is Opcode.WRITE else (self.mine, self.theirs)
        source.owner[:] = 1
        target.owner[:] = 0

        def watch() -> None:
            end_s = time.monotonic() + PATIENCE_S
            while not target.owner[2 * BLOCK_BYTES] and time.monotonic() < end_s:
                time.sleep(0.001)
            seen.append(bool(target.owner[0]) and not target.owner[-1])
            act()

        seen: list[bool] = []
        thread = threading.Thread(target=watch)
        thread.start()
        result = self.run(op, call)
        thread.join(PATIENCE_S)
        assert seen == [True], "it was not in the middle"
        return result

    def close(self) -> None:
        self.a.close()
        self.b.close()


def bytes_move_both_ways(verbs: Verbs) -> str:
    pair = Pair(verbs)
    rates = []
    for op in Opcode:
        pair.mine.owner[:] = np.random.default_rng(op).integers(0, 256, len(pair.mine.owner), dtype=np.uint8)
        started_s = time.monotonic()
        assert pair.run(op) == {}
        rates.append(f"{op.name} {SIZE / 1e6 / (time.monotonic() - started_s):.0f} MB/s")
        assert pair.equal()
    pair.mine.owner[:] = 5
    assert pair.a.run(pair.peer, Opcode.READ, [part(pair.mine, pair.info, 4097, 99_999)]) == []
    assert np.array_equal(pair.mine.owner[4097:][:99_999], pair.theirs.owner[4097:][:99_999])
    assert (pair.mine.owner[:4097] == 5).all()
    assert (pair.mine.owner[4097 + 99_999 :] == 5).all()
    pair.close()
    return ", ".join(rates)


def a_wrong_key_is_refused_and_the_rest_is_moved(verbs: Verbs) -> str:
    pair = Pair(verbs)
    forged = BufferInfo(99, pair.info.address, SIZE, "cpu:0", rkeys=dict.fromkeys(pair.info.rkeys, 12345))
    for op in Opcode:
        slices = [
            part(pair.mine, forged if i == 3 else pair.info, i * SIZE // 8, SIZE // 8, i) for i in range(8)
        ]
        assert errors(pair.a.run(pair.peer, op, slices)) == {3: RequestError}
    mine, theirs = (np.delete(each.owner.reshape(8, -1), 3, 0) for each in (pair.mine, pair.theirs))
    assert np.array_equal(mine, theirs)
    pair.close()
    return ""


def a_queue_pair_killed_in_the_middle_costs_a_reconnection(verbs: Verbs) -> str:
    pair = Pair(verbs)
    for op in Opcode:
        before = pair.a.events["connected"]
        assert pair.in_the_middle(lambda: pair.guests()[0].close(), op) == {}
        assert pair.equal()
        assert pair.a.events["connected"] > before
    pair.close()
    return f"retried {pair.a.bytes['retried'] >> 10} of {2 * SIZE >> 10} KiB"


def memory_unregistered_in_the_middle_is_refused(verbs: Verbs) -> str:
    pair = Pair(verbs)
    ended = pair.in_the_middle(lambda: pair.b.transport.unregister(pair.theirs, 1.0))
    assert ended == {0: RequestError}, ended
    snapshot = pair.theirs.owner.copy()
    ended = pair.run(Opcode.READ)
    assert list(ended) == [0]
    assert issubclass(ended[0], RequestError | PeerGone)
    assert np.array_equal(snapshot, pair.theirs.owner)
    pair.close()
    return f"READ later: {ended[0].__name__}"


def after_a_cancelled_write_nothing_lands(verbs: Verbs) -> str:
    pair = Pair(verbs)
    call = Call(60.0)
    assert pair.in_the_middle(call.cancel, call=call) == {0: PeerGone}
    snapshot = pair.theirs.owner.copy()
    time.sleep(0.3)  # for what would land late
    assert np.array_equal(snapshot, pair.theirs.owner)
    assert pair.run(Opcode.WRITE) == {}, "the next run connects again"
    assert pair.equal()
    pair.close()
    fenced = len(pair.peer.disconnected())
    return f"{int(snapshot.sum()) >> 10} of {SIZE >> 10} KiB had landed, {fenced} lanes fenced"


def a_cap_of_two_endpoints_serves_four_peers(verbs: Verbs) -> str:
    a = Engine(None, "a:1", verbs=verbs, endpoints_max=2)
    owners = [Engine(None, f"b:{i}", verbs=verbs, guests_max=1) for i in range(4)]
    peers, theirs = [FakePeer(a, owner) for owner in owners], [owner.buffer(65_536) for owner in owners]
    mine = a.buffer(65_536)
    for _ in range(2):
        for peer, buffer in zip(peers, theirs, strict=True):
            a.move(peer, Opcode.READ, mine, buffer)
            assert len(a.transport._lanes) <= 2
            assert sum(len(owner.transport._guests) for owner in owners) <= 2
    for engine in [a, *owners]:
        engine.close()
    return f"{a.events['connected']} connected, {a.events['evicted']} evicted"


def an_owner_that_evicts_is_connected_to_again(verbs: Verbs) -> str:
    owner = Engine(None, "o:1", verbs=verbs, guests_max=1)
    theirs = owner.buffer(65_536)
    initiators = [Engine(None, f"a:{i}", verbs=verbs) for i in range(2)]
    sides = [(a, FakePeer(a, owner), a.buffer(65_536)) for a in initiators]
    started_s = time.monotonic()
    for _ in range(2):
        for a, peer, mine in sides:
            a.move(peer, Opcode.READ, mine, theirs)
    for engine in [*initiators, owner]:
        engine.close()
    return f"{time.monotonic() - started_s:.2f} s for two reconnections"


def two_rails_share_the_bytes(verbs: Verbs) -> str:
    subprocess.run(["sh", "-ec", RAIL], check=True)
    pair = Pair(verbs)
    for op in Opcode:
        pair.mine.owner[:] = 3
        assert pair.run(op) == {}
        assert pair.equal()
    assert dict(pair.a.moved_over) == {"rdma/rxe0-rxe0@b:1": SIZE, "rdma/rxe1-rxe1@b:1": SIZE}
    pair.close()
    return str(dict(pair.a.moved_over))


def a_rail_that_is_down_is_left_out(verbs: Verbs) -> str:
    pair = Pair(verbs)
    subprocess.run(["ip", "link", "set", "rail1", "down"], check=True)
    assert pair.run(Opcode.READ) == {}
    assert pair.equal()
    assert dict(pair.a.moved_over) == {"rdma/rxe0-rxe0@b:1": SIZE}
    pair.close()
    return ""


RAIL = """
ip link add rail1 type dummy
ip link set rail1 mtu 4200 up
ip addr add 10.0.1.1/24 dev rail1
rdma link add rxe1 type rxe netdev rail1
for try in 1 2 3 4 5 6 7 8 9 10; do
  grep -qs 0000:ffff /sys/class/infiniband/rxe1/ports/1/gids/* && break; sleep 0.1
done
"""

CHECKS = (
    bytes_move_both_ways,
    a_wrong_key_is_refused_and_the_rest_is_moved,
    a_queue_pair_killed_in_the_middle_costs_a_reconnection,
    memory_unregistered_in_the_middle_is_refused,
    after_a_cancelled_write_nothing_lands,
    a_cap_of_two_endpoints_serves_four_peers,
    an_owner_that_evicts_is_connected_to_again,
    two_rails_share_the_bytes,
    a_rail_that_is_down_is_left_out,
)


def main(backend: str) -> int:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    loaded = load(backend)
    assert loaded.verbs is not None, loaded.reason
    failed = 0
    for check in CHECKS:
        started_s = time.monotonic()
        try:
            verdict, detail = "PASS", check(loaded.verbs)
        except Exception:  # noqa: BLE001 - whatever it is, the other checks go on and the host is told
            verdict, detail = "FAIL", traceback.format_exc().strip().replace("\n", " | ")
            failed += 1
        print(verdict, backend, check.__name__, f"{time.monotonic() - started_s:.2f}s", detail, flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
