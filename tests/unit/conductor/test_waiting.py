"""The Conductor's waiting room: classes first, tenants by weight, bounds and deadlines hold."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from conductor.waiting import JOB_MARGIN, PROMOTED, SPARE_MAX, Left, Waiting, WaitingRoom, Why

FOREVER = 1e9
ROOM, TENANT_ROOM = 12, 6


def one(request_id: str, **kwargs) -> Waiting:
    return Waiting(request_id=request_id, **{"deadline_s": FOREVER, **kwargs})


def room(waiting_max: int = 100, tenant_max: int = 100, **weights: float) -> WaitingRoom:
    return WaitingRoom(waiting_max, tenant_max, lambda name: weights.get(name, 1.0))


def taken(waiting_room: WaitingRoom, count: int, now_s: float = 0.0) -> list[str]:
    found = []
    for _ in range(count):
        next_one = waiting_room.take(now_s)
        found.append("" if next_one is None else next_one.request_id)
    return found


def test_an_empty_room_has_nobody_to_take():
    assert room().take(0.0) is None


def test_one_tenant_s_requests_go_in_the_order_they_came():
    waiting_room = room()
    for name in "abc":
        assert waiting_room.add(one(name)) == []
    assert taken(waiting_room, 4) == ["a", "b", "c", ""]


def test_within_a_tenant_the_shortest_goes_first_until_another_s_patience_ends():
    waiting_room = room()
    for name, work, patient_s in (("long", 9.0, 5.0), ("longer", 10.0, 3.0), ("short", 1.0, 50.0)):
        waiting_room.add(one(name, work=work, patient_s=patient_s))
    assert taken(waiting_room, 1, now_s=2.0) == ["short"]
    waiting_room.add(one("shorter", work=0.1, patient_s=50.0))
    assert taken(waiting_room, 4, now_s=5.0) == ["longer", "long", "shorter", ""]


def test_who_is_short_does_not_go_before_another_tenant_s_turn():
    waiting_room = room()
    for n in range(9):
        waiting_room.add(one(f"short{n}", tenant="short", work=1.0))
    for n in range(3):
        waiting_room.add(one(f"long{n}", tenant="long", work=3.0))
    shares = Counter(name.rstrip("0123456789") for name in taken(waiting_room, 8))
    assert shares == {"long": 2, "short": 6}


def test_a_higher_class_goes_first_whenever_it_comes():
    waiting_room = room()
    for name, rank in (("batch", 3), ("default", 2), ("premium", 0), ("interactive", 1)):
        waiting_room.add(one(name, rank=rank))
    assert taken(waiting_room, 4) == ["premium", "interactive", "default", "batch"]


def test_batch_work_is_promoted_when_its_job_would_be_late():
    waiting_room = room()
    waiting_room.add(one("job", rank=3, promote_s=10.0))
    waiting_room.add(one("default", rank=2))
    assert taken(waiting_room, 1, now_s=9.0) == ["default"]
    waiting_room.add(one("later", rank=2))
    assert taken(waiting_room, 2, now_s=10.0) == ["job", "later"]


def test_tenants_share_by_weight_whoever_sends_more():
    waiting_room = room(1000, 1000, big=3.0, small=1.0)
    for n in range(200):
        waiting_room.add(one(f"big{n}", tenant="big"))
        waiting_room.add(one(f"small{n}", tenant="small"))
    shares = Counter(name.rstrip("0123456789") for name in taken(waiting_room, 80))
    assert shares["big"] == pytest.approx(60, abs=1)


def test_shares_are_of_work_not_of_requests():
    waiting_room = room()
    for n in range(40):
        waiting_room.add(one(f"long{n}", tenant="long", work=10.0))
        waiting_room.add(one(f"short{n}", tenant="short", work=1.0))
    shares = Counter(name.rstrip("0123456789") for name in taken(waiting_room, 22))
    assert shares == {"short": 20, "long": 2}


@given(
    weights=st.lists(st.floats(0.1, 10), min_size=2, max_size=4),
    works=st.lists(st.floats(0.01, 10), min_size=4, max_size=12),
    takes=st.integers(1, 120),
)
@settings(deadline=None)
def test_while_tenants_have_work_waiting_they_get_it_in_proportion_to_their_weights(weights, works, takes):
    waiting_room = room(1000, 1000, **{str(n): weight for n, weight in enumerate(weights)})
    for tenant in range(len(weights)):
        for n in range(takes):  # nobody can run out of work
            work = works[(tenant + n) % len(works)]
            waiting_room.add(one(f"{tenant}/{n}", tenant=str(tenant), work=work))
    got = [0.0] * len(weights)
    for _ in range(takes):
        taken_one = waiting_room.take(0.0)
        got[int(taken_one.tenant)] += taken_one.work / weights[int(taken_one.tenant)]
        # whoever is taken is least served then: nobody is ahead of another by more than one own request
        for ahead, weight in enumerate(weights):
            assert got[ahead] - min(got) <= max(works) / weight + 1e-6


@given(st.lists(st.tuples(st.sampled_from("abc"), st.booleans()), max_size=200))
@settings(deadline=None)
def test_a_tenant_that_always_has_work_waiting_is_not_left_behind_by_those_that_come_and_go(steps):
    weights = {"a": 4.0, "b": 1.0, "c": 0.5}
    waiting_room = room(1000, 1000, steady=2.0, **weights)
    for n in range(len(steps) + 1):
        waiting_room.add(one(f"steady{n}", tenant="steady"))
    behind = dict.fromkeys(weights, 0.0)  # by weight, beyond the steady tenant, since it was level last
    for n, (tenant, comes) in enumerate(steps):
        if comes:
            waiting_room.add(one(str(n), tenant=tenant))
            continue
        got = waiting_room.take(0.0)
        for name, weight in weights.items():
            gain = 1 / weight if got.tenant == name else -1 / 2 if got.tenant == "steady" else 0.0
            behind[name] = max(0.0, behind[name] + gain)
            assert behind[name] <= 1 / weight + 1 / 2


def test_nobody_saves_up_by_being_idle():
    waiting_room = room()
    for n in range(50):
        waiting_room.add(one(f"a{n}", tenant="a"))
    taken(waiting_room, 30)
    for n in range(30):
        waiting_room.add(one(f"b{n}", tenant="b"))
    shares = Counter(name[0] for name in taken(waiting_room, 20))
    assert shares == {"a": 10, "b": 10}


def test_a_full_room_sheds_the_latest_of_the_lowest_class_for_a_higher_one():
    waiting_room = room(3)
    waiting_room.add(one("kept", rank=3))
    for name in ("early", "late"):
        waiting_room.add(one(name, rank=3, sheddable=True))
    assert waiting_room.add(one("premium", rank=0)) == [Left(one("late", rank=3, sheddable=True), Why.SHED)]
    assert len(waiting_room) == 3


def test_a_full_room_refuses_whom_it_sheds_nobody_for():
    waiting_room = room(1)
    waiting_room.add(one("there", rank=2, sheddable=True))
    newcomer = one("peer", rank=2)
    assert waiting_room.add(newcomer) == [Left(newcomer, Why.FULL)]


def test_one_tenant_cannot_fill_the_room():
    waiting_room = room(10, 2)
    for n in range(2):
        waiting_room.add(one(f"a{n}", tenant="a"))
    newcomer = one("a2", tenant="a")
    assert waiting_room.add(newcomer) == [Left(newcomer, Why.TENANT_FULL)]
    assert waiting_room.add(one("b", tenant="b")) == []


def test_who_waited_until_the_deadline_is_told_so():
    waiting_room = room()
    late = one("late", deadline_s=5.0)
    waiting_room.add(late)
    waiting_room.add(one("early", deadline_s=6.0))
    assert waiting_room.expire(5.0) == [Left(late, Why.EXPIRED)]
    assert taken(waiting_room, 2) == ["early", ""]


def test_the_work_ahead_of_a_rank_is_known():
    waiting_room = room()
    for name, rank in (("a", 0), ("b", 2), ("c", 2), ("d", 3)):
        waiting_room.add(one(name, rank=rank, work=2.0))
    assert [waiting_room.work(rank) for rank in range(4)] == [2, 2, 6, 8]
    assert waiting_room.work() == 8


class Model(RuleBasedStateMachine):
    """Beside a list of who waits: nobody is lost, nobody comes twice, bounds and classes hold."""

    def __init__(self) -> None:
        super().__init__()
        self.room = room(ROOM, TENANT_ROOM, a=2.0)
        self.there: dict[str, Waiting] = {}
        self.count = 0
        self.now_s = 0.0

    @rule(
        tenant=st.sampled_from("abc"),
        rank=st.integers(0, 3),
        work=st.floats(0.1, 10),
        wait_s=st.floats(0, 20),
        sheddable=st.booleans(),
        promote_s=st.none() | st.floats(0, 10),
        patience=st.floats(0, 1),
    )
    def add(self, tenant, rank, work, wait_s, sheddable, promote_s, patience) -> None:
        self.count += 1
        new = Waiting(
            request_id=str(self.count),
            tenant=tenant,
            rank=rank,
            work=work,
            deadline_s=self.now_s + wait_s,
            sheddable=sheddable,
            promote_s=None if promote_s is None else self.now_s + promote_s,
            patient_s=self.now_s + wait_s * patience,
        )
        full = len(self.there) == ROOM
        gone = self.room.add(new)
        assert len(gone) <= 1
        self.there[new.request_id] = new
        for left in gone:
            del self.there[left.waiting.request_id]
            if left.why is Why.SHED:
                assert full
                assert left.waiting.sheddable
                assert left.waiting.rank > new.rank
            else:
                assert left.waiting is new
                assert full or self.of(tenant) == TENANT_ROOM

    def of(self, tenant: str) -> int:
        return sum(found.tenant == tenant for found in self.there.values())

    def rank(self, waiting: Waiting) -> int:
        due = waiting.promote_s is not None and waiting.promote_s <= self.now_s
        return min(waiting.rank, PROMOTED) if due else waiting.rank

    @rule()
    def take(self) -> None:
        got = self.room.take(self.now_s)
        if not self.there:
            assert got is None
            return
        assert got is not None
        known = self.there.pop(got.request_id)
        assert all(self.rank(known) <= self.rank(other) for other in self.there.values())
        line = known.tenant, self.rank(known)
        peers = [other for other in self.there.values() if (other.tenant, self.rank(other)) == line]
        if known.patient_s <= self.now_s:
            assert all(known.patient_s <= other.patient_s for other in peers)
        else:
            assert all(known.work <= other.work and other.patient_s > self.now_s for other in peers)

    @rule(share=st.floats(0, 1))
    def client_leaves(self, share) -> None:
        if self.there:
            name = list(self.there)[int(share * (len(self.there) - 1))]
            assert self.room.remove(name)
            assert not self.room.remove(name)
            del self.there[name]

    @rule(seconds=st.floats(0, 8))
    def time_passes(self, seconds) -> None:
        self.now_s += seconds
        late = {left.waiting.request_id for left in self.room.expire(self.now_s)}
        assert late == {name for name, found in self.there.items() if found.deadline_s <= self.now_s}
        for name in late:
            del self.there[name]

    @invariant()
    def bounds_hold(self) -> None:
        assert len(self.room) == len(self.there) <= ROOM
        for tenant in "abc":
            assert self.room.waiting(tenant) == self.of(tenant) <= TENANT_ROOM
        assert self.room.work() == pytest.approx(sum(found.work for found in self.there.values()))


TestModel = Model.TestCase
TestModel.settings = settings(deadline=None)


# ---------------------------------------------------------------- jobs


def test_jobs_are_urgent_when_those_that_end_as_soon_need_the_time_that_is_left():
    waiting_room = room()
    for n in range(10):
        waiting_room.add(one(f"job{n}", rank=3, work=1.0, end_s=100.0 + n, answer_s=5.0))
    needed_s = JOB_MARGIN * (10 / 2 + 5.0)  # by two servers, all ten and the last one's answer
    assert waiting_room.urgent(109.0 - needed_s - 0.1, 2) is None
    assert waiting_room.urgent(109.0 - needed_s + 0.1, 2).request_id == "job0"
    assert waiting_room.urgent(109.0 - needed_s + 0.1, 20) is None


def test_a_job_that_ends_sooner_makes_those_behind_it_urgent_whenever_it_comes():
    waiting_room = room()
    waiting_room.add(one("late", rank=3, work=1.0, end_s=100.0))
    waiting_room.add(one("no job", rank=3, work=1e6))
    assert waiting_room.urgent(90.0, 1) is None
    waiting_room.add(one("soon", rank=3, work=8.0, end_s=99.0))
    assert waiting_room.urgent(90.0, 1).request_id == "soon"
    waiting_room.remove("soon")
    assert waiting_room.urgent(90.0, 1) is None
    assert waiting_room.urgent(99.0, 1).request_id == "late"
    waiting_room.serve(waiting_room.next(0.0))
    waiting_room.take(0.0)
    assert waiting_room.urgent(1e6, 1) is None


def test_who_is_next_goes_on_waiting_until_it_is_served():
    waiting_room = room()
    waiting_room.add(one("a", work=1.0))
    waiting_room.add(one("b", work=2.0))
    assert waiting_room.next(0.0) is waiting_room.next(0.0)
    assert len(waiting_room) == 2
    waiting_room.serve(waiting_room.next(0.0))
    assert waiting_room.next(0.0).request_id == "b"


def test_a_request_s_own_priority_is_no_advantage_over_other_tenants():
    waiting_room = room()
    for n in range(4):
        waiting_room.add(one(f"a{n}", tenant="a", priority=-9))
        waiting_room.add(one(f"b{n}", tenant="b"))
    shares = Counter(name[0] for name in taken(waiting_room, 4))
    assert shares == {"a": 2, "b": 2}


def test_who_leaves_before_its_deadline_is_forgotten_in_time():
    waiting_room = room(10_000, 10_000)
    for n in range(5000):
        waiting_room.add(one(f"a{n}", deadline_s=1e6 + n, rank=3, promote_s=1e6))
        assert waiting_room.remove(f"a{n}")
    assert len(waiting_room._deadlines) + len(waiting_room._promotions) <= 2 * (SPARE_MAX + 2)


def test_a_request_that_comes_again_under_its_id_has_its_own_deadline():
    waiting_room = room()
    waiting_room.add(one("a", deadline_s=5.0))
    waiting_room.remove("a")
    waiting_room.add(one("a", deadline_s=50.0))
    assert waiting_room.expire(10.0) == []
    assert [left.waiting.request_id for left in waiting_room.expire(50.0)] == ["a"]
