"""Copies, moves, drains and hot replicas reach their goal through loss and repeats, within bounds."""

from collections import Counter

import hypothesis.strategies as st
import pytest
from hypothesis import example, given, settings

from kvstore.leader import tasks as tasks_module
from kvstore.leader.placement import Placer, Room
from kvstore.leader.task_types import Copy, Drop, State
from kvstore.leader.tasks import COMMAND_S, HOT_REST_S, PER_NODE_MAX, RETRIES_MAX, RUNNING_MAX, Tasks
from mooncake.core.errors import CapacityError, RequestError

SIZE = 4096


def key(n: int) -> bytes:
    return n.to_bytes(32, "big")


def keys(*numbers: int) -> list[bytes]:
    return [key(n) for n in numbers]


class Cluster:
    """Nodes as sets of keys, an index that knows them (`hints` it is not sure of), and a clock."""

    def __init__(self, **held: tuple[int, ...]):
        self.held = {node: set(keys(*numbers)) for node, numbers in held.items()}
        self.hints: set[str] = set()
        self.seen = self.held  # what the index says; a copy of `held` when it lags
        self.placer = Placer()
        for node in self.held:
            self.placer.update(Room(node, 1000 * SIZE, 500 * SIZE))
        self.tasks = Tasks(self, self.placer)
        self.now_s = 0.0
        self.log: list[Copy | Drop] = []
        self.lost = 0  # results that nobody will hear, of the next commands

    def replicas(self, wanted, *, exact_only=False):
        nodes = [n for n in self.held if not (exact_only and n in self.hints)]
        return [tuple(n for n in nodes if k in self.seen.get(n, ())) for k in wanted]

    def keys_of(self, node):
        return sorted(self.seen.get(node, ()))

    def is_exact(self, node):
        return node not in self.hints

    def lag(self):
        """From now on the index hears nothing."""
        self.seen = {node: set(held) for node, held in self.held.items()}

    def carry_out(self, commands):
        """Do what is commanded, at once."""
        while commands:
            command = commands.pop(0)
            self.log.append(command)
            error = self.execute(command)
            if self.lost:
                self.lost -= 1
            else:
                commands += self.tasks.on_result(self.now_s, command.command_id, error)

    def execute(self, command) -> str:
        if isinstance(command, Drop):
            self.held[command.node].discard(command.key)
            return ""
        if command.target not in self.held or command.key not in self.held.get(command.source, ()):
            return "not there"
        self.held[command.target].add(command.key)
        return ""

    def run(self, for_s=200.0, step_s=0.5):
        end_s = self.now_s + for_s
        while self.now_s < end_s:
            self.carry_out(self.tasks.tick(self.now_s))
            if not self.tasks.busy:
                return
            self.now_s += step_s

    def leave(self, node):
        del self.held[node]
        self.placer.leave(node)
        self.carry_out(self.tasks.on_leave(self.now_s, node))

    def state(self, task_id) -> State:
        return self.tasks.progress(task_id).state

    def where(self, n) -> set[str]:
        return {node for node, held in self.held.items() if key(n) in held}


def test_a_copy_to_several_nodes_ends_when_each_has_every_key():
    cluster = Cluster(a=(1, 2), b=(2,), c=())
    task = cluster.tasks.copy(keys(1, 2), "b,c")
    cluster.run()
    assert cluster.state(task) is State.DONE
    assert (cluster.where(1), cluster.where(2)) == ({"a", "b", "c"}, {"a", "b", "c"})
    assert (cluster.tasks.progress(task).done, cluster.tasks.progress(task).total) == (2, 2)


def test_a_copy_to_several_nodes_fails_if_one_of_them_leaves():
    cluster = Cluster(a=(1,), b=(), c=())
    task = cluster.tasks.copy(keys(1), "b,c")
    cluster.leave("c")
    cluster.run()
    assert cluster.state(task) is State.FAILED
    assert cluster.where(1) == {"a", "b"}


def test_a_task_says_when_it_began_and_when_it_last_came_on():
    cluster = Cluster(a=(1,), b=())
    cluster.tasks.tick(5.0)
    task = cluster.tasks.copy(keys(1), "b")
    assert times(cluster, task) == (5.0, 5.0)
    cluster.now_s = 7.0
    cluster.run()
    assert times(cluster, task) == (5.0, 7.0)


def times(cluster, task_id) -> tuple[float, float]:
    progress = cluster.tasks.progress(task_id)
    return progress.created_s, progress.updated_s


def test_a_copy_leaves_the_source_and_skips_what_is_there():
    cluster = Cluster(a=(1, 2), b=(2,))
    task = cluster.tasks.copy(keys(1, 2), "b")
    cluster.run()
    assert cluster.state(task) is State.DONE
    assert cluster.where(1) == {"a", "b"}
    assert [type(c) for c in cluster.log] == [Copy]
    assert cluster.tasks.progress(task).done == 2


def test_a_move_drops_the_source_after_the_copy_was_confirmed():
    cluster = Cluster(a=(1,), b=())
    task = cluster.tasks.move(keys(1), "a", "b")
    cluster.run()
    assert cluster.where(1) == {"b"}
    assert [type(c) for c in cluster.log] == [Copy, Drop]
    assert cluster.state(task) is State.DONE


def test_a_hint_is_not_enough_to_drop_the_source():
    cluster = Cluster(a=(1,), b=(1,))
    cluster.hints.add("b")
    cluster.tasks.move(keys(1), "a", "b")
    cluster.run()
    assert [type(c) for c in cluster.log] == [Copy, Drop]


def test_a_failing_copy_never_drops_and_ends_as_failed():
    cluster = Cluster(a=(1,), b=())
    cluster.execute = lambda command: "no room"
    task = cluster.tasks.move(keys(1), "a", "b")
    cluster.run()
    assert [type(c) for c in cluster.log] == [Copy] * (1 + RETRIES_MAX)
    progress = cluster.tasks.progress(task)
    assert (progress.state, progress.failed, progress.reason) == (State.FAILED, 1, "no room")


def test_a_key_that_nobody_holds_fails_after_its_retries():
    cluster = Cluster(a=(), b=())
    task = cluster.tasks.copy(keys(1), "b")
    cluster.run()
    assert cluster.tasks.progress(task).reason == "no node holds it"


def test_a_lost_result_is_tried_again_and_a_late_one_ignored():
    cluster = Cluster(a=(1,), b=())
    task = cluster.tasks.copy(keys(1), "b")
    cluster.lost = 1
    cluster.run()
    assert cluster.now_s >= COMMAND_S
    assert cluster.state(task) is State.DONE
    before = cluster.tasks.progress(task)
    assert cluster.tasks.on_result(cluster.now_s, cluster.log[0].command_id, "late") == []
    assert cluster.tasks.progress(task) == before


def test_a_drain_empties_its_node_and_keeps_every_block():
    cluster = Cluster(a=tuple(range(40)), b=(1, 2), c=())
    task = cluster.tasks.drain("a", SIZE)
    cluster.run()
    assert cluster.state(task) is State.DONE
    assert cluster.held["a"] == set()
    assert all(cluster.where(n) for n in range(40))
    assert len([c for c in cluster.log if isinstance(c, Copy)]) == 38
    assert len(cluster.held["c"]) > 10
    assert cluster.placer.choose(key(99), SIZE, 3).nodes  # and nothing new goes there
    assert "a" not in cluster.placer.choose(key(99), SIZE, 3).nodes


def test_a_drain_takes_along_what_came_meanwhile():
    cluster = Cluster(a=(1,), b=())
    task = cluster.tasks.drain("a", SIZE)
    cluster.carry_out(cluster.tasks.tick(0.0))
    cluster.held["a"].add(key(2))
    cluster.run()
    assert cluster.state(task) is State.DONE
    assert cluster.where(2) == {"b"}


def test_a_drain_is_not_over_while_the_index_is_out_of_step():
    cluster = Cluster(a=(), b=())
    cluster.hints.add("a")
    task = cluster.tasks.drain("a", SIZE)
    cluster.run(for_s=20.0)
    assert cluster.state(task) is State.RUNNING
    cluster.held["a"].add(key(1))
    cluster.hints.clear()
    cluster.run()
    assert cluster.state(task) is State.DONE
    assert cluster.where(1) == {"b"}


def test_a_drain_without_another_node_fails_and_drops_nothing():
    cluster = Cluster(a=(1, 2))
    task = cluster.tasks.drain("a", SIZE)
    cluster.run()
    assert cluster.state(task) is State.FAILED
    assert cluster.tasks.progress(task).reason == "no node to drain to"
    assert cluster.where(1) == {"a"}


@pytest.mark.parametrize("lagging", [False, True])
def test_two_drains_never_trust_each_others_copy(lagging):
    cluster = Cluster(a=tuple(range(20)), b=tuple(range(20)), c=())
    if lagging:
        cluster.lag()
    drains = [cluster.tasks.drain(node, SIZE) for node in "ab"]
    cluster.run(for_s=5.0)
    assert cluster.held == {"a": set(), "b": set(), "c": set(keys(*range(20)))}
    cluster.seen = cluster.held
    cluster.run()
    assert [cluster.state(drain) for drain in drains] == [State.DONE] * 2


def test_a_move_to_a_node_that_is_being_drained_loses_nothing():
    cluster = Cluster(a=(1,), b=(), c=())
    move = cluster.tasks.move(keys(1), "a", "b")
    drain = cluster.tasks.drain("b", SIZE)
    cluster.run()
    assert len(cluster.where(1) - {"b"}) == 1
    assert (cluster.state(move), cluster.state(drain)) == (State.DONE, State.DONE)


def test_a_drain_whose_node_leaves_is_over():
    cluster = Cluster(a=tuple(range(100)), b=())
    cluster.lost = 10**6
    task = cluster.tasks.drain("a", SIZE)
    cluster.carry_out(cluster.tasks.tick(0.0))
    cluster.lost = 0
    cluster.leave("a")
    cluster.run()
    assert cluster.state(task) is State.DONE


def test_the_same_wish_is_the_same_task_until_it_ends():
    cluster = Cluster(a=(1,), b=())
    tasks = cluster.tasks
    first = tasks.copy(keys(1), "b")
    assert tasks.copy(keys(1), "b") == first
    assert tasks.move(keys(1), "a", "b") != first
    cluster.run()
    assert tasks.copy(keys(1), "b") != first
    drain = tasks.drain("a", SIZE)
    cluster.held["a"].add(key(7))
    assert tasks.drain("a", SIZE) == drain


def test_hot_keys_get_their_copies_on_distinct_nodes():
    cluster = Cluster(a=(1, 2), b=(2,), c=(), d=())
    cluster.tasks.keep_hot(keys(1, 2), 3, SIZE)
    cluster.run()
    assert len(cluster.where(1)) == len(cluster.where(2)) == 3
    assert len(cluster.log) == 3
    assert cluster.tasks.progress(0).done == 2


def test_a_hot_key_that_lost_a_replica_is_copied_again():
    cluster = Cluster(a=(1,), b=(), c=(), d=())
    cluster.tasks.keep_hot(keys(1), 2, SIZE)
    cluster.run()
    (other,) = cluster.where(1) - {"a"}
    cluster.leave(other)
    cluster.run()
    assert len(cluster.where(1)) == 2
    cluster.leave("a")
    cluster.run()
    assert len(cluster.where(1)) == 2


def test_a_hot_key_lost_everywhere_or_forgotten_or_everywhere_costs_nothing():
    cluster = Cluster(a=(1, 2), b=(2,))
    cluster.tasks.keep_hot(keys(1, 2, 3), 5, SIZE)
    cluster.tasks.forget_hot(keys(1, 99))
    cluster.run()
    assert cluster.log == []


def test_a_hint_counts_as_a_replica_of_a_hot_key():
    cluster = Cluster(a=(1,), b=(1,), c=())
    cluster.hints.add("b")  # one lost message must not start a storm of copies
    cluster.tasks.keep_hot(keys(1), 2, SIZE)
    cluster.run()
    assert cluster.log == []


def test_a_hot_key_that_cannot_be_copied_rests_and_is_tried_again():
    cluster = Cluster(a=(1,), b=())
    works, cluster.execute = cluster.execute, lambda command: "no room"
    cluster.tasks.keep_hot(keys(1), 2, SIZE)
    cluster.run()
    assert len(cluster.log) == 1 + RETRIES_MAX
    cluster.execute = works
    cluster.run()
    assert len(cluster.log) == 1 + RETRIES_MAX  # it rests
    cluster.now_s += HOT_REST_S
    cluster.run()
    cluster.run()
    assert cluster.where(1) == {"a", "b"}


def test_commands_are_bounded_in_all_and_per_node():
    cluster = Cluster(a=tuple(range(500)), **{f"n{i}": tuple(range(500 + i, 1000, 20)) for i in range(20)})
    for i in range(20):
        cluster.tasks.move(cluster.keys_of(f"n{i}"), f"n{i}", f"n{(i + 1) % 20}")
    cluster.tasks.drain("a", SIZE)
    commands = cluster.tasks.tick(0.0)
    assert len(commands) == RUNNING_MAX
    load = Counter(node for c in commands for node in (c.source, c.target))
    assert max(load.values()) <= PER_NODE_MAX
    assert cluster.tasks.tick(0.1) == []
    cluster.carry_out(commands)
    cluster.run()
    assert not cluster.tasks.busy
    assert cluster.held["a"] == set()


def test_wishes_are_bounded(monkeypatch):
    monkeypatch.setattr(tasks_module, "TASKS_MAX", 1)
    monkeypatch.setattr(tasks_module, "KEYS_MAX", 2)
    monkeypatch.setattr(tasks_module, "HOT_MAX", 2)
    monkeypatch.setattr(tasks_module, "FINISHED_MAX", 1)
    cluster = Cluster(a=(), b=())
    with pytest.raises(RequestError, match="at most 2"):
        cluster.tasks.copy(keys(1, 2, 3), "b")
    with pytest.raises(RequestError, match="itself"):
        cluster.tasks.move(keys(1), "a", "a")
    first = cluster.tasks.copy(keys(1), "b")
    with pytest.raises(CapacityError):
        cluster.tasks.copy(keys(2), "b")
    with pytest.raises(CapacityError):
        cluster.tasks.keep_hot(keys(1, 2, 3), 2, SIZE)
    with pytest.raises(RequestError):
        cluster.tasks.keep_hot(keys(1), 1, SIZE)
    cluster.run()
    cluster.tasks.copy([], "b")
    cluster.run()
    assert cluster.tasks.progress(first) is None  # forgotten for the newer one
    assert len(cluster.tasks.all_progress()) == 2


def test_a_copy_that_another_task_dropped_does_not_count_for_ever():
    """A move confirmed its copy; its drop never arrives; meanwhile a drain takes that copy away, unheard."""
    cluster = Cluster(n0=(), n1=(0,), n2=())
    cluster.tasks.move(keys(0), "n1", "n2")
    (copy,) = cluster.tasks.tick(0.0)
    assert cluster.execute(copy) == ""
    (drop,) = cluster.tasks.on_result(0.0, copy.command_id)  # nobody will hear of it
    assert (drop.node, cluster.where(0)) == ("n1", {"n1", "n2"})
    cluster.tasks.drain("n2", SIZE)
    cluster.now_s = COMMAND_S
    cluster.lost = 1
    cluster.run()
    assert cluster.log[0] == Drop(cluster.log[0].command_id, key(0), "n2")
    assert cluster.where(0)


def test_an_undrained_node_gets_copies_again_and_its_drain_ends():
    cluster = Cluster(a=(1,), b=())
    task = cluster.tasks.drain("b", SIZE)
    cluster.tasks.keep_hot(keys(1), 2, SIZE)
    cluster.run(for_s=2.0)
    assert cluster.where(1) == {"a"}
    cluster.tasks.undrain("b")
    assert cluster.state(task) is not State.RUNNING
    cluster.run()
    assert cluster.where(1) == {"a", "b"}


def test_a_task_keeps_the_name_that_another_leader_gave_it():
    cluster = Cluster(a=(1,), b=())
    assert cluster.tasks.copy(keys(1), "b", task_id=77) == 77
    cluster.run()
    progress = cluster.tasks.progress(77)
    assert (progress.state, progress.source, progress.target) == (State.DONE, "", "b")
    assert cluster.tasks.copy(keys(1), "b", task_id=77) == 77
    assert [p.state for p in cluster.tasks.all_progress() if p.task_id == 77] == [State.RUNNING]


def test_a_drain_of_many_blocks_makes_steps_only_of_those_it_looks_at():
    cluster = Cluster(a=tuple(range(5_000)), b=())
    task = cluster.tasks.drain("a", SIZE)
    cluster.tasks.tick(0.0)
    assert cluster.tasks.progress(task).total == 5_000
    assert len(cluster.tasks._begun()) <= PER_NODE_MAX + 1
    cluster.tasks.cancel(task)
    assert not cluster.tasks.busy


def test_a_cancelled_task_commands_nothing_more():
    cluster = Cluster(a=tuple(range(100)), b=())
    task = cluster.tasks.move(cluster.keys_of("a"), "a", "b")
    commands = cluster.tasks.tick(0.0)
    assert len(commands) == PER_NODE_MAX
    assert cluster.tasks.cancel(task)
    assert not cluster.tasks.cancel(task)
    assert cluster.state(task) is State.CANCELLED
    cluster.carry_out(commands)
    assert len(cluster.log) == PER_NODE_MAX
    assert not cluster.tasks.busy


faults = st.lists(st.sampled_from(["ok", "ok", "ok", "error", "lost", "twice"]), max_size=60)


@settings(max_examples=60, deadline=None)
@example(faults=["lost", "ok", "lost", "ok", "ok", "ok"], held=[set(), {0}, {1}], leaver=False)
@given(
    faults=faults, held=st.lists(st.sets(st.integers(0, 11)), min_size=3, max_size=4), leaver=st.booleans()
)
def test_whatever_fails_no_block_is_lost_and_every_task_ends(faults, held, leaver):
    cluster = Cluster(**{f"n{i}": tuple(numbers) for i, numbers in enumerate(held)})
    before = set().union(*cluster.held.values())
    ids = [
        cluster.tasks.drain("n0", SIZE),
        cluster.tasks.drain("n2", SIZE),
        cluster.tasks.move(cluster.keys_of("n1"), "n1", "n2"),
        cluster.tasks.copy(keys(1, 2, 3), "n1"),
    ]
    cluster.tasks.keep_hot(keys(0, 1, 2), 2, SIZE)

    def carry_out(commands):
        while commands:
            command = commands.pop(0)
            fault = faults.pop() if faults else "ok"
            error = "broken" if fault == "error" else cluster.execute(command)
            for _ in range({"lost": 0, "twice": 2}.get(fault, 1)):
                commands += cluster.tasks.on_result(cluster.now_s, command.command_id, error)

    cluster.carry_out = carry_out
    if leaver and len(held) == 4:
        carry_out(cluster.tasks.tick(0.0))
        survivors = set().union(*(h for n, h in cluster.held.items() if n != "n3"))
        before &= survivors
        cluster.leave("n3")
    cluster.run()
    assert not cluster.tasks.busy
    assert before <= set().union(*cluster.held.values())
    assert all(cluster.tasks.progress(i).state is not State.RUNNING for i in ids)
    if cluster.state(ids[0]) is State.DONE:
        assert not cluster.held["n0"]
