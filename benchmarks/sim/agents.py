"""Agents in the simulated world: programs of many turns with pauses between them, beside a trace.

A program is one run of an agent. Its next turn comes when the last one has been answered and the tools have
run, so it is a closed loop: what is slow comes later, and what a program takes in all is the measure. Each
turn's prompt is the last one's, the answer, and what the tools said. A seed gives the same programs.
"""

from collections.abc import Sequence
from random import Random
from statistics import fmean

import msgspec

from benchmarks.sim.nouns import Entry, WorldConfig
from benchmarks.sim.profile import Profile
from benchmarks.sim.trace import BLOCK_TOKENS, TraceRequest
from benchmarks.sim.world import World
from conductor.agents import Agents
from conductor.agents import Turn as OpenTurn
from conductor.keeper import PIN_S
from conductor.plan import Plan, Rejection
from conductor.terms import Terms

AGENT_IDS = 1 << 41
"""First block of an agent's: no trace has it."""


class AgentConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What the agents do. Tokens and pauses are medians of log-normal draws, answers a mean.

    rate: programs per second. kinds: of agents; each has a system prompt, with its tools, of its own.
    """

    rate: float = 0.15
    length_s: float = 600.0
    kinds: int = 4
    system_tokens: int = 4096
    task_tokens: int = 1500
    turns_min: int = 5
    turns_max: int = 30
    answer_tokens: int = 150
    tool_tokens: int = 900
    tool_sigma: float = 1.2
    pause_s: float = 6.0
    pause_sigma: float = 1.4
    context_tokens_max: int = 100_000


class Turn(msgspec.Struct, frozen=True):
    """One of a program. pause_s: before it, after the last one's answer."""

    input_tokens: int
    output_tokens: int
    hash_ids: tuple[int, ...]
    pause_s: float


class Program(msgspec.Struct, frozen=True):
    """One run of an agent."""

    name: str
    start_s: float
    turns: tuple[Turn, ...]

    @property
    def pauses_s(self) -> float:
        """What its tools take in all."""
        return sum(turn.pause_s for turn in self.turns)


def programs_of(config: AgentConfig, seed: int) -> list[Program]:
    """Return programs in order of their start; the same seed gives the same ones."""
    random = Random(seed)
    system_blocks = config.system_tokens // BLOCK_TOKENS
    fresh = AGENT_IDS + config.kinds * system_blocks
    programs: list[Program] = []
    now_s = random.expovariate(config.rate)
    while now_s < config.length_s:
        kind = random.randrange(config.kinds)
        first = AGENT_IDS + kind * system_blocks
        ids = list(range(first, first + system_blocks))  # of full blocks
        tokens = system_blocks * BLOCK_TOKENS + _draw(random, config.task_tokens, config.tool_sigma)
        turns: list[Turn] = []
        for number in range(random.randint(config.turns_min, config.turns_max)):
            pause_s = random.lognormvariate(0, config.pause_sigma) * config.pause_s if number else 0.0
            while len(ids) < tokens // BLOCK_TOKENS:
                ids.append(fresh)
                fresh += 1
            part = (fresh,) if tokens % BLOCK_TOKENS else ()
            fresh += 1
            answer = 1 + int(random.expovariate(1 / config.answer_tokens))
            turns.append(Turn(tokens, answer, (*ids, *part), pause_s))
            tokens += answer + _draw(random, config.tool_tokens, config.tool_sigma)
            if tokens > config.context_tokens_max:
                break
        programs.append(Program(f"run-{len(programs)}", now_s, tuple(turns)))
        now_s += random.expovariate(config.rate)
    return programs


def _draw(random: Random, median: float, sigma: float) -> int:
    return 1 + int(median * random.lognormvariate(0, sigma))


class Features(msgspec.Struct, frozen=True, kw_only=True):
    """What the Conductor does for agents."""

    keep: bool = False
    first_come: bool = False


class AgentWorld(World):
    """A world in which programs go on."""

    def __init__(
        self,
        others: Sequence[TraceRequest],
        programs: Sequence[Program],
        profile: Profile,
        config: WorldConfig,
        features: Features,
    ) -> None:
        """`others` come beside the programs, in order of arrival."""
        self._pausing = 0
        firsts = [(one.start_s, number, _request(one, 0, one.start_s)) for number, one in enumerate(programs)]
        rest = [(one.arrival_s, -1, one) for one in others]
        arrivals = sorted([*firsts, *rest], key=lambda one: one[:2])
        self._first_turns = len(arrivals)
        super().__init__([one for _, _, one in arrivals], profile, config)
        self.programs = programs
        self._features = features
        self._helped = features.keep or features.first_come
        self.agents = Agents(self.cost, self.cluster, keeps=features.keep)
        self._open_turns: dict[int, OpenTurn] = {}
        self.turns: dict[int, tuple[int, int]] = {}  # entry: program and turn
        self.took_s: dict[int, float] = {}  # program: from its start to its end
        self.cut = 0
        for entry, (_, number, _) in zip(self.entries, arrivals, strict=True):
            if number >= 0:
                self._is_turn(entry, number, 0)
        if features.keep:
            self.time.at(PIN_S, self._pin)

    def _is_turn(self, entry: Entry, program: int, turn: int) -> None:
        self.turns[entry.number] = program, turn
        name = self.programs[program].name
        entry.session = name if self.config.session_bonus_s else ""
        entry.terms = Terms(program=name, tools=True, ttft_slo_s=entry.terms.ttft_slo_s)

    def _arrive(self) -> None:
        if self._next_arrival < self._first_turns:
            super()._arrive()

    def _going(self) -> bool:
        return bool(self.in_flight or self._pausing) or self._next_arrival < self._first_turns

    def _request(self, entry: Entry) -> None:
        turn = self.agents.came(self.time.now_s, entry.terms) if self._helped else None
        if turn is not None:
            self._open_turns[entry.number] = turn
            entry.terms = turn.terms if self._features.first_come else entry.terms
        super()._request(entry)

    def _answered(self, request_id: str, answer: Plan | Rejection) -> None:
        super()._answered(request_id, answer)
        entry = self.entries[int(request_id)]
        turn = self._open_turns.get(entry.number)
        if turn is not None and isinstance(answer, Plan) and entry.machine is not None:
            # production names full blocks only, and a context goes on with those
            full = entry.keys[: entry.trace.input_tokens // BLOCK_TOKENS]
            facts = msgspec.structs.replace(entry.machine.facts, keys=full)
            turn.planned(self.time.now_s, facts, answer)

    def _done(self, entry: Entry) -> None:
        super()._done(entry)
        turn = self._open_turns.pop(entry.number, None)
        if turn is not None:
            program, number = self.turns[entry.number]
            turn.calls_tools = number + 1 < len(self.programs[program].turns)
            turn.ended(self.time.now_s, served=not entry.rejected and not entry.failed)
        self._next_turn(entry)

    def _next_turn(self, entry: Entry) -> None:
        if entry.number not in self.turns:
            return
        program, turn = self.turns[entry.number]
        turns = self.programs[program].turns
        if entry.rejected or entry.failed:
            self.cut += 1
        elif turn + 1 == len(turns):
            self.took_s[program] = self.time.now_s - self.programs[program].start_s
        else:
            self._pausing += 1
            self.time.at(self.time.now_s + turns[turn + 1].pause_s, lambda: self._go_on(program, turn + 1))

    def _pin(self) -> None:
        """Tell the stores, as conductor.keeper does."""
        now_s = self.time.now_s
        for order in self.agents.orders(now_s):
            node = self._hosts[order.node].node
            if node is not None:
                node.pin(now_s, order.keys, order.ttl_s)
        if self._going():
            self.time.at(now_s + PIN_S, self._pin)

    def _go_on(self, program: int, turn: int) -> None:
        self._pausing -= 1
        entry = Entry(len(self.entries), _request(self.programs[program], turn, self.time.now_s))
        self.entries.append(entry)
        self._is_turn(entry, program, turn)
        self._request(entry)


def _request(program: Program, turn: int, at_s: float) -> TraceRequest:
    one = program.turns[turn]
    return TraceRequest(at_s, one.input_tokens, one.output_tokens, one.hash_ids)


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """Means and 90th percentiles in seconds. later_*: of turns after the first; others_*: of the trace.

    waited_*: what a program took beyond its pauses. hit: share of prompt tokens found.
    """

    programs: int
    cut: int
    took_mean: float
    took_p90: float
    waited_mean: float
    waited_p90: float
    later_ttft_mean: float
    later_ttft_p90: float
    others_ttft_mean: float
    others_ttft_p90: float
    hit: float
    others_hit: float
    tbt_p90: float
    decisions: dict[str, int]


def report_of(world: AgentWorld) -> Report:
    """Return what became of a world that has run."""
    later, others = [], []
    decisions: dict[str, int] = {}
    for entry in world.entries:
        program, turn = world.turns.get(entry.number, (-1, 0))
        if entry.plan is not None:
            decisions[entry.plan.decision] = decisions.get(entry.plan.decision, 0) + 1
        if program < 0:
            others.append(entry)
        elif turn:
            later.append(entry)
    took = sorted(world.took_s.values())
    waited = sorted(took_s - world.programs[n].pauses_s for n, took_s in world.took_s.items())
    turns_ttft, others_ttft = _ttfts(later), _ttfts(others)
    tbt = sorted(entry.tbt.mean_s for entry in world.entries if entry.tbt is not None)
    return Report(
        programs=len(took), cut=world.cut,
        took_mean=_mean(took), took_p90=_p90(took), waited_mean=_mean(waited), waited_p90=_p90(waited),
        later_ttft_mean=_mean(turns_ttft), later_ttft_p90=_p90(turns_ttft),
        others_ttft_mean=_mean(others_ttft), others_ttft_p90=_p90(others_ttft),
        hit=_hit(later), others_hit=_hit(others), tbt_p90=_p90(tbt), decisions=decisions,
    )  # fmt: skip


def _ttfts(entries: Sequence[Entry]) -> list[float]:
    return sorted(entry.ttft_s for entry in entries if entry.ttft_s >= 0)


def _hit(entries: Sequence[Entry]) -> float:
    new, hit = sum(one.new_tokens for one in entries), sum(one.hit_tokens for one in entries)
    return hit / max(1, new + hit)


def _mean(values: Sequence[float]) -> float:
    return fmean(values) if values else 0.0


def _p90(values: Sequence[float]) -> float:
    """Return the 90th percentile of sorted values."""
    return values[min(len(values) - 1, int(0.9 * len(values)))] if values else 0.0
