"""At most one leader, whatever the store, the clocks and the network do; then: there is one."""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import pytest

from mooncake.core.election import (
    Candidate,
    Claim,
    Election,
    Fence,
    Grant,
    Keep,
    Look,
    Rest,
    Step,
    Term,
)
from mooncake.core.errors import PeerGone, RequestError
from mooncake.core.metadata import MetadataStore
from mooncake.core.metadata_client import MetadataServer, RemoteMetadata
from mooncake.core.metadata_memory import MemoryMetadata, MetadataMachine
from mooncake.core.metadata_messages import MetaEntries

KEY = "/leader"
TTL_S = 3.0


# ---------------------------------------------------------------- the machine in a simulated world


@dataclass
class Call:
    """A step on its way to the store and back."""

    step: Step
    sent_s: float  # by the candidate's clock
    answer: object = None
    answered: bool = False


@dataclass
class Member:
    """A candidate with a clock that is neither right nor equally fast."""

    candidate: Candidate
    offset_s: float
    rate: float
    call: Call | None = None
    cut_until_s: float = 0.0

    def clock_s(self, now_s: float) -> float:
        return self.offset_s + self.rate * now_s


@dataclass
class World:
    """One store, three candidates, calls that take any time, are lost, or arrive long after that."""

    rng: random.Random
    now_s: float = 0.0
    lives: int = 0
    late: list[Call] = field(default_factory=list)
    terms: list[Term] = field(default_factory=list)
    fence: Fence = field(default_factory=Fence)

    def __post_init__(self) -> None:
        self.restart_store()
        self.members = [self.member(i) for i in range(3)]

    def member(self, index: int) -> Member:
        candidate = Candidate(f"c{index}", ttl_s=TTL_S)
        return Member(candidate, self.rng.uniform(-1e4, 1e4), self.rng.uniform(0.96, 1.04))

    def restart_store(self) -> None:
        self.lives += 1
        self.store = MetadataMachine(f"life-{self.lives}", first_lease_id=self.lives * 10_000)

    def run(self, steps: int, faults: bool) -> None:
        for _ in range(steps):
            stall = faults and self.rng.random() < 0.005
            self.now_s += self.rng.expovariate(0.5 if stall else 100.0)
            self.store.tick(self.now_s)
            if faults and self.rng.random() < 0.03:
                self.fault()
            self.move(self.rng.choice(self.members))
            self.check()

    def fault(self) -> None:
        kind = self.rng.choice(["lose", "late", "cut", "kill", "restart"])
        index = self.rng.randrange(3)
        member = self.members[index]
        if kind == "lose" and member.call:
            if not member.call.answered:
                self.late.append(member.call)
            member.call = None
            member.candidate.on_change()
        elif kind == "cut":
            member.cut_until_s = self.now_s + self.rng.uniform(0.0, 2 * TTL_S)
        elif kind == "late" and self.late:
            self.arrive(self.late.pop(self.rng.randrange(len(self.late))))
        elif kind == "kill" and self.rng.random() < 0.2:
            self.members[index] = self.member(index)
        elif kind == "restart" and self.rng.random() < 0.2:
            self.restart_store()

    def move(self, member: Member) -> None:
        now_s, candidate, call = member.clock_s(self.now_s), member.candidate, member.call
        if call is None:
            step = candidate.next(now_s)
            if isinstance(step, Rest):
                if self.rng.random() < 0.5:
                    candidate.on_change()
            else:
                member.call = Call(step, now_s)
        elif self.now_s < member.cut_until_s:
            pass
        elif not call.answered:
            self.arrive(call)
        else:
            member.call = None
            deliver(candidate, call, now_s)

    def arrive(self, call: Call) -> None:
        call.answered = True
        match call.step:
            case Look():
                call.answer = self.store.get(KEY)
            case Grant():
                call.answer = self.store.grant(self.now_s, TTL_S)
            case Claim(lease_id, value):
                with contextlib.suppress(RequestError):  # the lease is gone
                    self.store.put(KEY, value, lease_id, if_revision=0)
            case Keep(lease_id):
                call.answer = self.store.keep_alive(self.now_s, lease_id) > 0

    def check(self) -> None:
        acting = [m.candidate.leads(m.clock_s(self.now_s)) for m in self.members]
        terms = [term for term in acting if term]
        assert len(terms) <= 1, terms
        for term in terms:
            assert self.fence.admits(term), (term, self.terms)
            if term not in self.terms:
                self.terms.append(term)


def deliver(candidate: Candidate, call: Call, now_s: float) -> None:
    match call.step, call.answer:
        case Look(), MetaEntries() as listing:
            candidate.on_listing(now_s, KEY, listing)
        case Grant(), int(lease_id):
            candidate.on_lease(call.sent_s, lease_id)
        case Claim(), _:
            candidate.on_claim()
        case Keep(), bool(alive):
            candidate.on_kept(call.sent_s, alive)


def test_never_two_leaders_and_their_orders_can_be_told_apart_under_any_faults():
    terms = 0
    for seed in range(40):
        world = World(random.Random(seed))
        world.run(5000, faults=True)
        terms += len(world.terms)
    assert terms > 200  # there were leaders to compare


def test_once_faults_end_somebody_leads_and_goes_on_leading():
    for seed in range(30):
        world = World(random.Random(seed))
        world.run(1000, faults=True)
        world.run(1000, faults=False)
        acting = [term for m in world.members if (term := m.candidate.leads(m.clock_s(world.now_s)))]
        assert len(acting) == 1, seed
        before = len(world.terms)
        world.run(1000, faults=False)
        assert len(world.terms) == before, seed


# ---------------------------------------------------------------- the machine, step by step


def listing(epoch: str = "e", revision: int = 1) -> MetaEntries:
    return MetaEntries(revision, [], epoch)


def elected(now_s: float = 0.0) -> tuple[Candidate, MetadataMachine]:
    """A candidate that won in a store of which it has known the life for long."""
    store, candidate = MetadataMachine("e"), Candidate("me", ttl_s=TTL_S)
    candidate.on_listing(now_s - 100, KEY, store.get(KEY))
    assert isinstance(candidate.next(now_s), Grant)
    candidate.on_lease(now_s, store.grant(now_s, TTL_S))
    step = candidate.next(now_s)
    assert isinstance(step, Claim)
    store.put(KEY, step.value, step.lease_id, if_revision=0)
    candidate.on_claim()
    assert isinstance(candidate.next(now_s), Look)
    candidate.on_listing(now_s, KEY, store.get(KEY))
    return candidate, store


def test_a_leader_that_hears_nothing_stops_before_its_lease_ends():
    candidate, _ = elected()
    assert candidate.leads(0.0) == Term("e", 1, "me")
    assert candidate.leads(TTL_S * 0.89)
    assert candidate.leads(TTL_S * 0.9) is None


def test_a_term_counts_from_when_the_keep_alive_was_sent_not_answered():
    candidate, _ = elected()
    candidate.on_kept(1.0, True)
    assert candidate.leads(1.0 + TTL_S * 0.89)
    assert candidate.leads(1.0 + TTL_S * 0.9) is None


@pytest.mark.parametrize("step", [Keep(7), Grant()])
async def test_the_shell_takes_the_time_before_it_asks(step):
    now_s = 0.0

    class Slow:
        async def keep_alive(self, _lease_id: int) -> bool:
            nonlocal now_s
            now_s += 2.0
            return True

        async def grant(self, _ttl_s: float) -> int:
            nonlocal now_s
            now_s += 2.0
            return 7

    election = Election(Slow(), KEY, "me", ttl_s=TTL_S, clock_s=lambda: now_s)
    await election._perform(step)
    assert election._candidate.acts_until_s == pytest.approx(TTL_S * 0.9)


async def test_a_claim_never_takes_the_key_from_another():
    store = MemoryMetadata()
    await store.put(KEY, b"another's")
    election = Election(store, KEY, "me")
    await election._perform(Claim(0, b"mine"))
    assert (await store.get(KEY)).entries[0].value == b"another's"


def test_a_winner_in_a_life_of_the_store_that_it_does_not_know_for_long_waits():
    """The store may have just lost its data, and with it a leader who has not noticed yet."""
    candidate, store = elected()
    store.epoch = "after a restart"
    candidate.on_listing(1.0, KEY, store.get(KEY))
    candidate.on_kept(1.0, True)
    assert candidate.leads(1.0) is None
    candidate.on_kept(1.0 + TTL_S, True)
    assert candidate.leads(1.0 + TTL_S)


def test_a_leader_whose_key_was_removed_steps_down():
    candidate, _ = elected()
    candidate.on_listing(0.5, KEY, listing())
    assert candidate.leads(0.5) is None
    assert isinstance(candidate.next(0.5), Grant)


def test_a_key_that_only_begins_like_ours_is_somebody_elses():
    candidate, store = Candidate("me"), MetadataMachine("e")
    store.put(KEY + "/other", b"{}")
    candidate.on_listing(0.0, KEY, store.get(KEY))
    assert candidate.holder is None


def test_a_damaged_record_is_respected_as_anothers():
    candidate, store = Candidate("me"), MetadataMachine("e")
    store.put(KEY, b"\xff")
    candidate.on_listing(0.0, KEY, store.get(KEY))
    assert isinstance(candidate.next(0.0), Rest)


def test_a_fence_admits_a_term_again_but_no_earlier_one_and_no_earlier_life():
    fence = Fence()
    assert fence.admits(Term("a", 5, "x"))
    assert fence.admits(Term("a", 5, "x"))
    assert fence.admits(Term("a", 7, "y"))
    assert not fence.admits(Term("a", 5, "x"))
    assert fence.admits(Term("b", 1, "z"))  # a store that lost its data counts anew
    assert not fence.admits(Term("a", 9, "y"))


# ---------------------------------------------------------------- with a real store and a real clock


@dataclass
class Cluster:
    """Clients of one store; `lease_s` is a short lease that it can give."""

    clients: list[MetadataStore]
    lease_s: float


@pytest.fixture(params=["memory", "memory over rpc"])
async def cluster(request: pytest.FixtureRequest) -> AsyncIterator[Cluster]:
    memory = MemoryMetadata(poll_s=0.1, tick_s=0.02)
    if request.param == "memory":
        yield Cluster([memory] * 3, 0.4)
        await memory.close()
        return
    server = MetadataServer("tcp://127.0.0.1:*", memory)
    server.start()
    clients = [RemoteMetadata(server.endpoint, poll_s=0.1) for _ in range(3)]
    yield Cluster(list(clients), 0.4)
    for client in clients:
        await client.close()
    await server.close()


@pytest.fixture
async def elections(cluster: Cluster) -> AsyncIterator[list[Election]]:
    elections = [
        Election(client, KEY, f"c{i}", f"tcp://c{i}", ttl_s=cluster.lease_s)
        for i, client in enumerate(cluster.clients)
    ]
    for election in elections:
        election.start()
    yield elections
    for election in elections:
        await election.close()


async def leading(elections: list[Election]) -> Election:
    """Return who leads, once somebody does."""
    waiting = [asyncio.create_task(election.wait_leading()) for election in elections]
    try:
        async with asyncio.timeout(15):
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        (leader,) = [e for e, task in zip(elections, waiting, strict=True) if task.done()]
        return leader
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)


async def test_one_of_three_leads_and_all_know_its_address(elections):
    leader = await leading(elections)
    for _ in range(500):  # nobody waits for what followers know, so it has no event
        if all(e.leader == leader.leader for e in elections):
            break
        await asyncio.sleep(0.01)
    assert {e.leader for e in elections} == {leader.leader}
    assert leader.leader.address.endswith(leader.term.leader)
    assert [e.term for e in elections].count(None) == 2


async def test_a_leader_that_resigns_is_followed_at_once_by_one_with_a_higher_number(elections):
    first = await leading(elections)
    term = first.term
    await first.close()
    assert first.term is None
    rest = [election for election in elections if election is not first]
    second = await leading(rest)
    assert second.term.number > term.number
    assert second.term.life == term.life


async def test_a_leader_that_is_no_longer_heard_is_followed_after_its_lease(elections, monkeypatch):
    first = await leading(elections)
    term = first.term

    class Away:
        async def keep_alive(self, _lease_id: int) -> bool:
            raise PeerGone("cut off")

        async def get(self, _prefix: str) -> MetaEntries:
            raise PeerGone("cut off")

    monkeypatch.setattr(first, "_store", Away())
    async with asyncio.timeout(15):
        await first.wait_over(term)
    second = await leading([election for election in elections if election is not first])
    assert first.term is None
    assert second.term.number > term.number
    monkeypatch.undo()


async def test_a_leader_stays_leader_beyond_its_first_lease(elections, cluster):
    leader = await leading(elections)
    term = leader.term
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(cluster.lease_s * 1.5):
            await leader.wait_over(term)
    assert leader.term == term


async def test_a_leader_whose_key_an_operator_removes_gives_way(elections, cluster):
    leader = await leading(elections)
    term = leader.term
    await cluster.clients[0].delete(KEY)
    async with asyncio.timeout(15):
        await leader.wait_over(term)
    assert (await leading(elections)).term.number > term.number
