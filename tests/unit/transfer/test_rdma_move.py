"""The RDMA transport as an initiator: what arrives, over which NICs, and what becomes of errors."""

import itertools
import sys
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mooncake.core.errors import CapacityError, PeerError, PeerGone, PeerTimeout, RequestError
from tests.unit.transfer.rdma_world import PIECE, Engine, FakePeer, errors, pair, part, whole
from transfer.health import PathState
from transfer.messages import BufferInfo, RdmaConnect, RdmaDisconnect
from transfer.model import Call, Opcode
from transfer.rdma import lanes as lanes_module
from transfer.rdma.config import ATTEMPTS, GIVES_UP_S, STALL_S
from transfer.verbs.fake import DEPTH, Fabric

BOTH = {"cpu:0": (["mlx0", "mlx1"], [])}
FIRST = {"cpu:0": (["mlx0"], ["mlx1"])}


# ---------------------------------------------------------------- bytes


@pytest.mark.parametrize("op", list(Opcode))
def test_bytes_arrive_and_nothing_else_is_touched(op):
    a, b, peer, mine, theirs = pair()
    source, target = (theirs.owner, mine.owner) if op is Opcode.READ else (mine.owner, theirs.owner)
    target[:] = 7
    source[:] = 9
    assert a.run(peer, op, [part(mine, b.describe(theirs), 100, 3 * PIECE + 5)]) == []
    assert (target[100 : 100 + 3 * PIECE + 5] == 9).all()
    assert (target[:100] == 7).all()
    assert (target[100 + 3 * PIECE + 5 :] == 7).all()
    a.close()
    b.close()


@settings(max_examples=30, deadline=None)
@given(
    cuts=st.lists(st.integers(1, 64 * PIECE - 1), unique=True, max_size=30),
    piece=st.sampled_from([PIECE, 3 * PIECE]),
    per_poll=st.integers(1, 5),
)
def test_any_list_of_slices_arrives(cuts, piece, per_poll):
    a, b, peer, mine, theirs = pair(64 * PIECE, slice_bytes=piece)
    for nic in a.nics.values():
        nic.per_poll = per_poll
    edges = [0, *sorted(cuts), 64 * PIECE]
    info = b.describe(theirs)
    slices = [part(mine, info, lo, hi - lo) for lo, hi in itertools.pairwise(edges)]
    assert a.run(peer, Opcode.READ, slices[::-1]) == []
    assert (mine.owner == theirs.owner).all()


def test_nothing_to_move_is_done_at_once():
    a, _, peer, *_ = pair()
    assert a.run(peer, Opcode.READ, []) == []
    assert peer.asked == []


def test_more_pieces_than_the_queue_takes_are_posted_as_it_drains():
    a, _b, peer, mine, theirs = pair(4 * DEPTH * PIECE, devices=["mlx0"])
    a.nics["mlx0"].per_poll = 3
    a.move(peer, Opcode.READ, mine, theirs)  # the fake asserts that depth is never exceeded
    assert a.nics["mlx0"].works_posted == 4 * DEPTH


def test_the_configured_depth_bounds_what_is_in_flight():
    a, _b, peer, mine, theirs = pair(8 * PIECE, devices=["mlx0"], depth_max=2)
    in_flight = []
    a.nics["mlx0"].on_post = lambda pair: in_flight.append(len(pair._posted))
    a.move(peer, Opcode.READ, mine, theirs)
    assert max(in_flight) == 2


def test_the_bytes_in_flight_are_bounded_too(monkeypatch):
    monkeypatch.setattr(lanes_module, "WINDOW_BYTES", 3 * PIECE)
    a, _b, peer, mine, theirs = pair(8 * PIECE, devices=["mlx0"])
    in_flight = []
    a.nics["mlx0"].on_post = lambda pair: in_flight.append(len(pair._posted))
    a.move(peer, Opcode.READ, mine, theirs)
    assert max(in_flight) == 3


# ---------------------------------------------------------------- choice of NICs


def test_slices_spread_over_all_preferred_nics():
    a, _b, peer, mine, theirs = pair(places=BOTH)
    a.move(peer, Opcode.READ, mine, theirs)
    assert a.nics["mlx0"].bytes_moved == a.nics["mlx1"].bytes_moved == 8 * PIECE


def test_each_location_uses_its_own_nics():
    places = {"cpu:0": (["mlx0"], ["mlx1"]), "cpu:1": (["mlx1"], ["mlx0"])}
    a, _b, peer, mine, theirs = pair(places=places, location="cpu:1")
    a.move(peer, Opcode.READ, mine, theirs)
    assert a.nics["mlx0"].bytes_moved == 0
    assert a.nics["mlx1"].bytes_moved == 16 * PIECE


def test_a_busy_nic_gets_less():
    a, b, peer, mine, theirs = pair(places=BOTH)
    more = a.buffer(8 * PIECE, "cpu:0")

    def second_run(_):
        a.nics["mlx0"].on_post = None
        before = a.nics["mlx1"].works_posted
        assert a.run(peer, Opcode.READ, [part(more, b.describe(theirs), 0, PIECE)]) == []
        posted_on_idle.append(a.nics["mlx1"].works_posted - before)

    posted_on_idle = []
    a.nics["mlx0"].on_post = second_run
    failures = a.run(peer, Opcode.READ, [part(mine, b.describe(theirs), 0, PIECE)])  # one piece: on mlx0
    assert failures == []
    assert posted_on_idle == [1]


def test_pieces_of_different_locations_share_the_nics_evenly():
    places = {"cpu:0": (["mlx0", "mlx1"], []), "cpu:1": (["mlx0", "mlx1"], [])}
    a, b, peer, mine, theirs = pair(places=places)
    other = a.buffer(PIECE, "cpu:1")
    info = b.describe(theirs)
    assert a.run(peer, Opcode.READ, [part(mine, info, 0, PIECE), part(other, info, 0, PIECE, 1)]) == []
    assert a.nics["mlx0"].bytes_moved == a.nics["mlx1"].bytes_moved == PIECE


def test_two_ports_of_a_device_are_two_rails():
    a, _b, peer, mine, theirs = pair(
        devices=["mlx0"], ports=("mlx0", "mlx0:2"), places={"cpu:0": (["mlx0"], [])}
    )
    a.move(peer, Opcode.READ, mine, theirs)
    assert a.nics["mlx0"].bytes_moved == a.nics["mlx0:2"].bytes_moved == 8 * PIECE


def test_a_nic_on_which_the_memory_is_not_registered_is_not_used():
    fabric = Fabric()
    a, b = Engine(fabric, "a:1", places=BOTH), Engine(fabric, "b:1", places=BOTH)
    a.nics["mlx0"].refuses = CapacityError("memlock")
    peer, theirs, mine = FakePeer(a, b), b.buffer(4 * PIECE), a.buffer(4 * PIECE)
    peer.info = b.info()
    a.move(peer, Opcode.READ, mine, theirs)
    assert a.nics["mlx0"].works_posted == 0


# ---------------------------------------------------------------- errors of the owner


@pytest.mark.parametrize("op", list(Opcode))
def test_a_wrong_key_is_refused_and_the_rest_is_moved(op):
    a, b, peer, mine, theirs = pair(devices=["mlx0"])
    good = b.describe(theirs)
    forged = BufferInfo(99, good.address, good.size_bytes, "cpu:0", rkeys={"mlx0": 12345})
    slices = [part(mine, forged if i == 5 else good, i * PIECE, PIECE, i) for i in range(16)]
    assert errors(a.run(peer, op, slices)) == {5: RequestError}
    rest = [i for i in range(16 * PIECE) if i // PIECE != 5]
    assert (mine.owner[rest] == theirs.owner[rest]).all()
    assert (mine.owner[5 * PIECE : 6 * PIECE] != theirs.owner[5 * PIECE : 6 * PIECE]).any()
    assert a.transport.states() == {}, "the path is not to blame"


def test_memory_outside_the_registration_is_refused():
    a, b, peer, mine, theirs = pair()
    info = b.describe(theirs)
    longer = BufferInfo(info.buffer_id, info.address, 2 * info.size_bytes, "cpu:0", rkeys=info.rkeys)
    outside = part(mine, longer, 0, PIECE)
    beyond = type(outside)(0, outside.local, info.address + info.size_bytes, PIECE, mine, longer)
    assert errors(a.run(peer, Opcode.WRITE, [beyond])) == {0: RequestError}


def test_many_refused_buffers_cost_their_slices_and_nothing_else():
    a, b, peer, mine, theirs = pair(devices=["mlx0"])
    good = b.describe(theirs)
    forged = [BufferInfo(90 + i, good.address, good.size_bytes, "cpu:0", rkeys={"mlx0": 9}) for i in range(6)]
    slices = [part(mine, forged[i // 2] if i < 12 else good, i * PIECE, PIECE, i) for i in range(16)]
    assert errors(a.run(peer, Opcode.READ, slices)) == dict.fromkeys(range(12), RequestError)
    assert (mine.owner[12 * PIECE :] == theirs.owner[12 * PIECE :]).all()


def test_an_owner_that_died_is_gone_not_refusing():
    a, b, peer, mine, theirs = pair(devices=["mlx0"])
    slices = [whole(mine, b.describe(theirs))]
    assert a.run(peer, Opcode.READ, slices) == []
    b.transport.unregister(theirs, 1.0)  # the kernel takes the memory first when a process is killed
    peer.unanswered[RdmaDisconnect] = PeerGone("connection reset")
    assert errors(a.run(peer, Opcode.READ, slices)) == {0: PeerGone}


# ---------------------------------------------------------------- errors of the path


@pytest.mark.parametrize("op", list(Opcode))
def test_a_queue_pair_that_dies_in_the_middle_is_replaced_and_the_rest_is_moved(op):
    a, _b, peer, mine, theirs = pair(64 * PIECE, devices=["mlx0"])  # more than one burst
    nic = a.nics["mlx0"]
    nic.kill_next, nic.on_post = 5, lambda _: setattr(nic, "kill_next", None)
    a.move(peer, op, mine, theirs)
    assert nic.pairs_made == 2
    assert peer.disconnected() == [1]
    assert a.bytes["moved"] == 64 * PIECE
    assert a.bytes["retried"] == 59 * PIECE


def test_a_path_that_breaks_every_time_is_given_up_after_a_few_attempts():
    a, b, peer, mine, theirs = pair(devices=["mlx0"])
    a.nics["mlx0"].kill_next = 1
    assert errors(a.run(peer, Opcode.READ, [whole(mine, b.describe(theirs))])) == {0: PeerGone}
    assert a.nics["mlx0"].pairs_made == ATTEMPTS


def test_many_bad_paths_cost_no_more_attempts_than_one():
    devices = [f"mlx{i}" for i in range(4)]
    a, b, peer, mine, theirs = pair(devices=devices, places={"cpu:0": (devices, [])})
    for nic in a.nics.values():
        nic.kill_next = 0
    assert errors(a.run(peer, Opcode.READ, [part(mine, b.describe(theirs), 0, PIECE)])) == {0: PeerGone}
    assert sum(nic.pairs_made for nic in a.nics.values()) == ATTEMPTS


@pytest.mark.parametrize("side", ["ours", "theirs"])
def test_when_a_nic_goes_down_its_share_goes_over_the_other(side):
    a, b, peer, mine, theirs = pair(places=BOTH)
    failing = (a if side == "ours" else b).nics["mlx0"]
    a.nics["mlx0"].on_post = lambda _: setattr(failing, "up", False)
    a.move(peer, Opcode.WRITE, mine, theirs)
    assert a.nics["mlx1"].bytes_moved == 16 * PIECE


def test_without_a_preferred_nic_a_secondary_one_is_used():
    a, _b, peer, mine, theirs = pair(places=FIRST)
    a.nics["mlx0"].up = False
    a.move(peer, Opcode.READ, mine, theirs)
    assert a.nics["mlx0"].pairs_made == 0
    assert a.nics["mlx1"].bytes_moved == 16 * PIECE


def test_a_rail_that_is_cut_is_gone_around_by_another_pair_of_nics():
    a, b, peer, mine, theirs = pair(places=FIRST)
    fabric = a.nics["mlx0"].fabric
    for mine_, theirs_ in (("mlx0", "mlx0"), ("mlx0", "mlx1"), ("mlx1", "mlx1")):
        fabric.cut(a.nics[mine_], b.nics[theirs_])
    a.move(peer, Opcode.READ, mine, theirs)
    assert a.nics["mlx1"].bytes_moved == 16 * PIECE


def test_a_dead_path_is_quarantined_and_tried_again_after_a_while():
    a, _b, peer, mine, theirs = pair(places=BOTH)
    mlx0 = a.nics["mlx0"]
    mlx0.kill_next = 0
    a.move(peer, Opcode.READ, mine, theirs)
    assert a.transport.states() == {"rdma/mlx0-mlx0@b:1": PathState.QUARANTINED}
    assert a.events["quarantined"] == 1
    made, mlx0.kill_next = mlx0.pairs_made, None
    a.move(peer, Opcode.READ, mine, theirs)
    assert mlx0.pairs_made == made
    a.clock.nap(10.0)
    a.move(peer, Opcode.READ, mine, theirs)
    assert mlx0.pairs_made == made + 1
    assert mlx0.bytes_moved > 0
    a.move(peer, Opcode.READ, mine, theirs)
    a.move(peer, Opcode.READ, mine, theirs)
    assert a.transport.states() == {"rdma/mlx0-mlx0@b:1": PathState.USABLE}


def test_a_path_on_trial_is_tried_by_one_run_at_a_time():
    a, b, peer, mine, theirs = pair(devices=["mlx0"])
    slices = [whole(mine, b.describe(theirs))]
    nic = a.nics["mlx0"]
    nic.kill_next = 0
    assert errors(a.run(peer, Opcode.READ, slices)) == {0: PeerGone}
    a.clock.nap(10.0)
    nic.kill_next = None
    outcomes = []
    nic.on_post = lambda _: outcomes.append(errors(a.run(peer, Opcode.READ, slices)))
    assert a.run(peer, Opcode.READ, slices) == []
    assert outcomes == [{0: PeerGone}]


def test_with_every_path_dead_the_slices_come_back_and_nothing_is_reached():
    a, b, peer, mine, theirs = pair(places=BOTH)
    info = b.describe(theirs)
    assert a.transport.reaches(peer, mine, info)
    for nic in a.nics.values():
        nic.kill_next = 0
    assert errors(a.run(peer, Opcode.READ, [whole(mine, info, 3)])) == {3: PeerGone}
    a.run(peer, Opcode.READ, [whole(mine, info)])  # the pairs of unlike NICs
    assert not a.transport.reaches(peer, mine, info)


def test_a_path_on_which_nothing_completes_is_left_after_a_bound():
    a, _b, peer, mine, theirs = pair(places=FIRST)
    a.nics["mlx0"].hold = True
    began_s = a.clock.now_s()
    a.move(peer, Opcode.READ, mine, theirs)
    assert STALL_S < a.clock.now_s() - began_s < STALL_S + 0.1
    assert a.nics["mlx1"].bytes_moved == 16 * PIECE


def test_a_refused_connection_is_a_path_that_does_not_work():
    a, b, peer, mine, theirs = pair(places=FIRST)
    b.nics["mlx0"].pairs_max = 0
    a.move(peer, Opcode.READ, mine, theirs)
    assert a.nics["mlx1"].bytes_moved == 16 * PIECE
    assert len([pair for pair in a.nics["mlx0"].fabric.pairs.values() if pair.nic is a.nics["mlx0"]]) == 0


def test_a_device_without_queue_pairs_left_is_a_path_that_does_not_work():
    a, _b, peer, mine, theirs = pair(places=FIRST)
    a.nics["mlx0"].pairs_max = 0
    a.move(peer, Opcode.READ, mine, theirs)
    assert a.nics["mlx1"].bytes_moved == 16 * PIECE


def test_a_peer_that_does_not_answer_is_a_failure_not_an_exception():
    a, b, peer, mine, theirs = pair()
    peer.unanswered[object] = PeerTimeout("no answer")
    [failure] = a.run(peer, Opcode.READ, [whole(mine, b.describe(theirs))])
    assert isinstance(failure.error, PeerTimeout)


# ---------------------------------------------------------------- the fence


def held_write(op=Opcode.WRITE):
    """A write that is in the network when its call is cancelled."""
    a, b, peer, mine, theirs = pair(devices=["mlx0"])
    call = Call(60.0)
    nic = a.nics["mlx0"]
    nic.hold, nic.on_post = True, lambda _: call.cancel()
    before = theirs.owner.copy()
    return a, peer, lambda: a.run(peer, op, [whole(mine, b.describe(theirs))], call), (theirs.owner, before)


def test_after_a_failed_write_nothing_lands_any_more():
    a, peer, run, (memory, before) = held_write()
    assert errors(run()) == {0: PeerGone}
    assert peer.disconnected() == [1]
    assert a.nics["mlx0"].fabric.deliver_late() == 0
    assert (memory == before).all()


def test_without_the_owners_answer_a_write_may_land_and_the_failure_says_so():
    a, peer, run, (memory, before) = held_write()
    peer.unanswered[RdmaDisconnect] = PeerTimeout("no answer")
    [failure] = run()
    assert isinstance(failure.error, PeerTimeout)
    assert "did not confirm within 1.0 s" in str(failure.error)
    assert a.nics["mlx0"].fabric.deliver_late() > 0, "the fake network would show a missing fence"
    assert (memory != before).any()


def test_a_write_that_is_not_fenced_is_not_repeated_but_a_read_is():
    for op, expected in ((Opcode.WRITE, {0: PeerGone}), (Opcode.READ, {})):
        a, b, peer, mine, theirs = pair(places=BOTH)
        peer.unanswered[RdmaDisconnect] = PeerGone("control connection lost")
        for nic in a.nics.values():
            nic.kill_next, nic.on_post = 2, lambda pair: setattr(pair.nic, "kill_next", None)
        assert errors(a.run(peer, op, [whole(mine, b.describe(theirs))])) == expected


def test_flushed_writes_may_have_been_sent_and_are_not_repeated_without_a_fence():
    a, b, peer, mine, theirs = pair(devices=["mlx0"])
    peer.unanswered[RdmaDisconnect] = PeerGone("control connection lost")
    a.nics["mlx0"].kill_next = 2
    slices = [part(mine, b.describe(theirs), i * PIECE, PIECE, i) for i in range(16)]
    assert errors(a.run(peer, Opcode.WRITE, slices)) == dict.fromkeys(range(2, 16), PeerGone)
    assert a.nics["mlx0"].pairs_made == 1


def test_an_interrupt_leaves_nothing_in_flight():
    a, b, peer, mine, theirs = pair(devices=["mlx0"])
    before = theirs.owner.copy()

    def interrupt(_):
        raise KeyboardInterrupt

    a.nics["mlx0"].on_post = interrupt
    with pytest.raises(KeyboardInterrupt):
        a.run(peer, Opcode.WRITE, [whole(mine, b.describe(theirs))])
    assert a.nics["mlx0"].fabric.deliver_late() == 0
    assert (theirs.owner == before).all()
    assert not a.nics["mlx0"].fabric.pairs


# ---------------------------------------------------------------- deadline and cancellation


def test_a_passed_deadline_hands_everything_back():
    a, b, peer, mine, theirs = pair()
    assert errors(a.run(peer, Opcode.READ, [whole(mine, b.describe(theirs))], Call(0.0))) == {0: PeerTimeout}
    assert peer.asked == []


def test_a_deadline_that_passes_under_way_ends_the_run():
    a, b, peer, mine, theirs = pair(devices=["mlx0"])
    call = Call(60.0)
    a.nics["mlx0"].hold = True
    a.nics["mlx0"].on_post = lambda _: setattr(call, "end_s", 0.0)
    assert errors(a.run(peer, Opcode.READ, [whole(mine, b.describe(theirs))], call)) == {0: PeerTimeout}
    assert a.transport.states() == {}, "a short deadline is not the path's fault"
    assert peer.disconnected() == [1]


@pytest.mark.parametrize("ending", ["deadline", "cancelled"])
def test_calls_that_pass_without_any_completion_count_against_the_path_unless_cancelled(ending):
    a, b, peer, mine, theirs = pair(devices=["mlx0"])
    a.nics["mlx0"].hold = True
    for _ in range(3):
        call, began_s = Call(60.0), a.clock.now_s()

        def pass_away(call=call, began_s=began_s):
            if a.clock.now_s() > began_s + 2 * GIVES_UP_S:
                call.cancel() if ending == "cancelled" else setattr(call, "end_s", 0.0)

        a.clock.on_nap = pass_away
        a.run(peer, Opcode.READ, [whole(mine, b.describe(theirs))], call)
    quarantined = {"rdma/mlx0-mlx0@b:1": PathState.QUARANTINED}
    assert a.transport.states() == (quarantined if ending == "deadline" else {})


def test_a_deadline_that_passes_while_connecting_is_not_the_paths_fault():
    a, b, _, mine, theirs = pair()
    call = Call(60.0)

    class LatePeer(FakePeer):
        def ask(self, message, kind, deadline_s):
            call.end_s = 0.0
            raise PeerTimeout("too late")

    peer = LatePeer(a, b)
    assert errors(a.run(peer, Opcode.READ, [whole(mine, b.describe(theirs))], call)) == {0: PeerTimeout}
    assert a.transport.states() == {}


def test_what_was_done_before_a_cancellation_is_not_reported_as_failed():
    a, b, peer, mine, theirs = pair(devices=["mlx0"], depth_max=1)
    call = Call(60.0)
    posts = []
    a.nics["mlx0"].on_post = lambda _: posts.append(1) or (len(posts) == 5 and call.cancel())
    info = b.describe(theirs)
    failures = a.run(peer, Opcode.READ, [part(mine, info, i * PIECE, PIECE, i) for i in range(16)], call)
    assert errors(failures) == dict.fromkeys(range(5, 16), PeerGone)  # the fifth landed with the cancellation


def test_runs_of_many_threads_share_few_endpoints_and_all_arrive():
    a, b, peer, *_ = pair(places=BOTH, endpoints_max=2)
    pairs = [(a.buffer(8 * PIECE), b.buffer(8 * PIECE)) for _ in range(6)]
    results = []

    def work(mine, theirs):
        mine.owner[:] = 0
        for _ in range(10):
            results.append(a.run(peer, Opcode.READ, [whole(mine, b.describe(theirs))]))

    threads = [threading.Thread(target=work, args=pair_) for pair_ in pairs]
    switch_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # a lane passes from thread to thread in the worst moment
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30.0)
    finally:
        sys.setswitchinterval(switch_s)
    assert results == [[]] * 60
    assert all((mine.owner == theirs.owner).all() for mine, theirs in pairs)
    assert len(a.transport._lanes) <= 2


def test_errors_of_peers_never_escape_a_run():
    for error in (PeerGone("x"), PeerTimeout("x"), RequestError("x"), CapacityError("x")):
        a, b, peer, mine, theirs = pair(places=BOTH)
        peer.unanswered[RdmaConnect] = error
        [failure] = a.run(peer, Opcode.WRITE, [whole(mine, b.describe(theirs))])
        assert isinstance(failure.error, PeerError)
