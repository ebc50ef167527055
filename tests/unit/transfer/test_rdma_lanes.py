"""Queue pairs on both sides: made on demand, bounded, evicted, and gone when they should be."""

import threading

import pytest

from mooncake.core.errors import CapacityError, PeerGone, PeerTimeout, RequestError
from tests.unit.transfer.rdma_world import PIECE, Engine, FakePeer, FakeSession, errors, pair, whole
from transfer.messages import NicInfo, QpInfo, RdmaConnect, RdmaDisconnect
from transfer.model import Call, Opcode
from transfer.rdma.routes import Route, choose, near_and_far, rail_name, tiers
from transfer.topology import Topology
from transfer.verbs.fake import DEPTH, Fabric

ONE = ("mlx0",)


def star(peers, endpoints_max=256):
    """One engine `a` and several others, each with a buffer of one piece."""
    fabric = Fabric()
    a = Engine(fabric, "a:1", ONE, endpoints_max=endpoints_max)
    others = [Engine(fabric, f"b:{i}", ONE) for i in range(peers)]
    theirs = [other.buffer(PIECE) for other in others]
    return a, others, [FakePeer(a, other) for other in others], a.buffer(PIECE), theirs


def live(engine):
    """Queue pairs of `engine` that exist now."""
    return sum(
        pair.nic in engine.nics.values() for pair in next(iter(engine.nics.values())).fabric.pairs.values()
    )


# ---------------------------------------------------------------- the initiator's pool


def test_queue_pairs_are_made_on_demand_and_used_again():
    a, b, peer, mine, theirs = pair(devices=ONE)
    assert live(a) == live(b) == 0
    for _ in range(3):
        a.move(peer, Opcode.READ, mine, theirs)
    assert live(a) == live(b) == 1
    assert a.events["connected"] == 1


def test_a_full_pool_gives_up_the_lane_that_was_not_used_lately():
    a, others, peers, mine, theirs = star(3, endpoints_max=2)
    for i in (0, 1, 0, 2):  # 0 is used again before 2 needs a place
        a.move(peers[i], Opcode.READ, mine, theirs[i])
    assert live(a) == 2
    assert [live(other) for other in others] == [1, 0, 1]
    assert a.events["evicted"] == 1
    assert peers[1].disconnected() == [2]


def test_with_fewer_endpoints_than_nics_everything_still_arrives():
    devices = [f"mlx{i}" for i in range(5)]
    a, _b, peer, mine, theirs = pair(devices=devices, places={"cpu:0": (devices, [])}, endpoints_max=1)
    a.move(peer, Opcode.WRITE, mine, theirs)
    assert live(a) == 1


def test_when_a_lane_turns_out_dead_the_idle_ones_beside_it_are_dropped_too():
    a, b, peer, mine, theirs = pair(devices=ONE)
    more = a.buffer(PIECE)

    def second_run(_):
        a.nics["mlx0"].on_post = None
        assert a.run(peer, Opcode.READ, [whole(more, b.describe(theirs))]) == []

    a.nics["mlx0"].on_post = second_run
    a.move(peer, Opcode.READ, mine, theirs)
    assert live(a) == 2
    peer.session.end()  # the owner lost the control connection
    a.move(peer, Opcode.READ, mine, theirs)
    assert live(a) == 1
    assert a.events["failed"] == 1


def test_a_connection_that_fails_on_our_side_leaves_nothing_at_the_owner():
    a, b, peer, mine, theirs = pair(devices=ONE)
    a.nics["mlx0"].unroutable = True
    assert errors(a.run(peer, Opcode.READ, [whole(mine, b.describe(theirs))])) == {0: PeerGone}
    assert live(a) == live(b) == 0


def test_waiting_for_an_endpoint_ends_with_the_call_or_when_one_is_free():
    a, others, peers, mine, theirs = star(2, endpoints_max=1)
    outcomes = {}
    waiting = threading.Event()

    class WatchedCall(Call):
        def add_waker(self, wake):
            super().add_waker(wake)
            waiting.set()

    def other_run(name, call):
        outcomes[name] = errors(
            a.run(peers[1], Opcode.READ, [whole(mine, others[1].describe(theirs[1]))], call)
        )

    def while_leased(_):
        a.nics["mlx0"].on_post = None
        for name, call in (
            ("late", Call(0.001)),
            ("cancelled", WatchedCall(60.0)),
            ("patient", WatchedCall(60.0)),
        ):
            waiting.clear()
            threads[name] = threading.Thread(target=other_run, args=(name, call))
            threads[name].start()
            if name != "late":
                assert waiting.wait(10.0)
            if name == "cancelled":
                call.cancel()
            if name != "patient":
                threads[name].join(10.0)

    threads = {}
    a.nics["mlx0"].on_post = while_leased
    a.move(peers[0], Opcode.READ, mine, theirs[0])
    threads["patient"].join(10.0)
    assert outcomes == {"late": {0: PeerTimeout}, "cancelled": {0: PeerGone}, "patient": {}}


def test_a_restarted_peer_gets_lanes_of_its_own():
    fabric = Fabric()
    a = Engine(fabric, "a:1", ONE)
    mine = a.buffer(PIECE)
    for _ in range(2):
        b = Engine(fabric, "b:1", ONE)
        theirs = b.buffer(PIECE)
        a.move(FakePeer(a, b), Opcode.READ, mine, theirs)
    assert a.events["connected"] == 2


def test_forgetting_a_peer_drops_its_lanes_and_no_others():
    a, others, peers, mine, theirs = star(2)
    for i in range(2):
        a.move(peers[i], Opcode.READ, mine, theirs[i])
    a.transport.forget(peers[0])
    assert [live(other) for other in others] == [0, 1]
    a.move(peers[0], Opcode.READ, mine, theirs[0])


@pytest.mark.parametrize(("per_poll", "pairs_made"), [(1, 2), (DEPTH, 1)])
def test_a_lane_in_use_when_its_peer_is_forgotten_is_dropped_by_its_run(per_poll, pairs_made):
    a, _b, peer, mine, theirs = pair(devices=ONE)
    nic = a.nics["mlx0"]

    def forget(_):
        nic.on_post = None
        a.transport.forget(peer)

    nic.on_post, nic.per_poll = forget, per_poll
    a.move(peer, Opcode.READ, mine, theirs)
    assert peer.disconnected() == [1]
    assert nic.pairs_made == pairs_made
    assert live(a) == pairs_made - 1


def test_close_drops_everything_and_ends_later_runs():
    a, b, peer, mine, theirs = pair()
    a.move(peer, Opcode.READ, mine, theirs)
    info = b.describe(theirs)
    a.transport.close()
    a.transport.close()
    assert live(a) == 0
    peer.session.end()
    assert live(b) == 0
    assert not a.transport.reaches(peer, mine, info)
    assert list(errors(a.run(peer, Opcode.READ, [whole(mine, info)]))) == [0]


def test_close_waits_for_a_run_and_ends_it():
    a, b, peer, mine, theirs = pair(devices=ONE)
    closing = threading.Thread(target=a.transport.close)
    a.nics["mlx0"].hold, a.nics["mlx0"].on_post = True, lambda _: closing.is_alive() or closing.start()
    assert list(errors(a.run(peer, Opcode.READ, [whole(mine, b.describe(theirs))]))) == [0]
    closing.join(10.0)
    assert live(a) == live(b) == 0


# ---------------------------------------------------------------- the owner's half


def request(link=1, nic="mlx0"):
    return RdmaConnect(link=link, nic=nic, qp=QpInfo("mlx9", 1, 77, 0, bytes(16), 0, 4096))


def test_the_owner_bounds_what_peers_make_it_hold_and_an_evicted_peer_just_connects_again():
    fabric = Fabric()
    owner = Engine(fabric, "o:1", ONE, guests_max=1)
    theirs = owner.buffer(PIECE)
    initiators = [Engine(fabric, f"a:{i}", ONE) for i in range(2)]
    sides = [(a, FakePeer(a, owner), a.buffer(PIECE)) for a in initiators]
    for _ in range(2):
        for a, peer, mine in sides:
            a.move(peer, Opcode.READ, mine, theirs)
            assert live(owner) == 1
    assert all(a.transport.states() == {"rdma/mlx0-mlx0@o:1": 0} for a in initiators), "still usable"


def test_the_end_of_a_control_connection_takes_its_queue_pairs_along():
    owner = Engine(Fabric(), "o:1", ONE)
    first, second = FakeSession("e1"), FakeSession("e2")
    owner.transport.handle(first, request(1))
    owner.transport.handle(first, request(2))
    owner.transport.handle(second, request(1))
    assert len(first.callbacks) == 1
    first.end()
    assert live(owner) == 1
    second.end()
    assert live(owner) == 0


def test_disconnect_destroys_the_named_links_of_that_engine_only():
    owner = Engine(Fabric(), "o:1", ONE)
    sessions = FakeSession("e1"), FakeSession("e2")
    for session in sessions:
        for link in (1, 2):
            owner.transport.handle(session, request(link))
    owner.transport.handle(sessions[0], RdmaDisconnect(links=[1, 7]))
    assert live(owner) == 3
    owner.transport.handle(FakeSession("e1"), RdmaDisconnect(links=[2]))  # over a new control connection
    assert live(owner) == 2


def test_disconnect_answers_only_when_the_queue_pair_is_gone_also_if_another_thread_destroys_it():
    owner = Engine(Fabric(), "o:1", ONE)
    session = FakeSession("e1")
    owner.transport.handle(session, request(1))
    [made] = owner.nics["mlx0"].fabric.pairs.values()
    destroying, go_on = threading.Event(), threading.Event()
    close = made.close

    def slow_close():
        destroying.set()
        assert go_on.wait(10.0)
        close()

    made.close = slow_close
    threads = [threading.Thread(target=session.end)]
    threads[0].start()
    assert destroying.wait(10.0)
    answered = []

    def disconnect():
        owner.transport.handle(FakeSession("e1"), RdmaDisconnect(links=[1]))
        answered.append(live(owner))

    destroying.clear()
    threads.append(threading.Thread(target=disconnect))
    threads[1].start()
    assert destroying.wait(10.0)  # the second thread waits for the queue pair as well
    assert answered == []
    go_on.set()
    for thread in threads:
        thread.join(10.0)
    assert answered == [0]


def test_a_connect_that_is_asked_again_replaces_the_first_and_outlives_its_connection():
    owner = Engine(Fabric(), "o:1", ONE)
    lost, fresh = FakeSession("e1"), FakeSession("e1")
    owner.transport.handle(lost, request(1))
    owner.transport.handle(fresh, request(1))
    assert live(owner) == 1
    lost.end()
    assert live(owner) == 1


def test_a_nic_that_is_not_there_and_a_full_device_are_refused_and_leave_nothing():
    owner = Engine(Fabric(), "o:1", ONE)
    session = FakeSession("e1")
    with pytest.raises(RequestError, match="no NIC mlx7"):
        owner.transport.handle(session, request(nic="mlx7"))
    owner.nics["mlx0"].unroutable = True
    with pytest.raises(PeerGone, match="no route"):
        owner.transport.handle(session, request())
    owner.nics["mlx0"].pairs_max = 0
    with pytest.raises(CapacityError):
        owner.transport.handle(session, request())
    assert live(owner) == 0


def test_a_closed_owner_makes_no_queue_pair():
    owner = Engine(Fabric(), "o:1", ONE)
    owner.transport.close()
    with pytest.raises(CapacityError, match="closing"):
        owner.transport.handle(FakeSession("e1"), request())
    assert live(owner) == 0


# ---------------------------------------------------------------- routes


def test_equal_names_are_paired_first_then_the_near_ones_then_all():
    groups = tiers((["n0", "n1"], ["n2"]), (["n1", "n0"], ["n2"]), lambda _: True)
    assert groups[0] == [Route("n0", "n0"), Route("n1", "n1")]
    assert set(groups[1]) == {Route("n0", "n1"), Route("n1", "n0")}
    assert groups[2] == [Route("n2", "n2")]
    routes = [route for group in groups for route in group]
    assert len(routes) == len(set(routes)) == 9


def test_unlike_names_are_paired_in_turn():
    groups = tiers((["a", "b", "c"], []), (["x", "y"], []), lambda _: True)
    assert groups[0] == [Route("a", "x"), Route("b", "y"), Route("c", "x")]


def test_nics_of_different_link_layers_are_never_paired():
    groups = tiers(
        (["ib", "eth"], []), (["eth"], []), lambda route: (route.local == "eth") == (route.remote == "eth")
    )
    assert groups == [[Route("eth", "eth")]]
    assert tiers((["a"], []), ([], []), lambda _: True) == []


def test_the_best_group_with_a_usable_route_is_chosen():
    groups = [[Route("a", "a"), Route("b", "b")], [Route("a", "b")]]
    assert choose(groups, lambda route: route.local == "b") == [Route("b", "b")]
    assert choose(groups, lambda route: route == Route("a", "b")) == [Route("a", "b")]
    assert choose(groups, lambda _: False) == []


def test_near_is_what_the_matrix_prefers_among_the_rails_there_are():
    places = Topology({"cpu:0": (["n0", "n1"], ["n2"])})
    assert near_and_far(places, "cpu:0", ["n0", "n0:2", "n2"]) == (["n0", "n0:2"], ["n2"])
    assert near_and_far(places, "cpu:0", ["n2", "n9"]) == (["n2"], ["n9"])
    assert near_and_far(places, "cpu:0", ["n9"]) == (["n9"], [])
    assert near_and_far(places, "*", ["n2", "n1"]) == (["n1", "n2"], [])
    assert near_and_far(places, "cpu:0", []) == ([], [])


def test_the_first_port_is_called_as_the_device():
    names = [rail_name(NicInfo("n0", port, bytes(16), 0, 0, 4096, "ethernet")) for port in (1, 2)]
    assert names == ["n0", "n0:2"]
