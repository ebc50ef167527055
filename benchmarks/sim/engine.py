"""A simulated engine: prompts one after the other, answers in one continuous batch. Pure.

Between two changes of the batch every decode step is longer than the one before by the same amount
(one more token of context each), so a run of steps is one event in closed form; whoever comes in the
meantime joins at the next step boundary. A prompt is computed whole, before the batch goes on (as
prefill instances do, and coupled engines without chunked prefill), or in chunks, one with each step.

A leg's KV room is taken when it joins, answer included: real engines take blocks as they fill and
preempt when none is left, which a simulated one never does.
"""

import heapq
import itertools
import math
from collections import deque
from typing import Protocol

import msgspec

from benchmarks.sim.intervals import Gap, Run, Runs, Tbt, tbt_of
from benchmarks.sim.profile import Profile
from benchmarks.sim.timeline import Timeline


class Work(msgspec.Struct, frozen=True):
    """What computing a prompt takes, known when it begins."""

    new_tokens: int
    known_tokens: int
    load_s: float


class Job:
    """One leg in one engine. `answer_tokens` come after the first token, which the prompt gives."""

    def __init__(self, eid: str, prompt_tokens: int, answer_tokens: int) -> None:
        """Blocks it waits for count as arrived until `blocked`."""
        self.eid = eid
        self.prompt_tokens = prompt_tokens
        self.answer_tokens = answer_tokens
        self.blocked = False
        self.first_token_s = 0.0
        self.run_from = 0  # of the engine's runs
        self.resumed = False  # its answer began in engines that broke down; their last token came
        self.before: list[Gap] = []  # at first_token_s, after these intervals

    @property
    def kv_tokens(self) -> int:
        """Room it needs."""
        return self.prompt_tokens + self.answer_tokens


class Stopped(msgspec.Struct, frozen=True):
    """A leg whose engine broke down: what it had given, and computed of its prompt.

    tokens: after the first; the last of them, or the first, came at last_s. gaps: between all of them.
    """

    job: Job
    tokens: int
    last_s: float
    gaps: list[Gap]
    prompt_tokens: int


class EngineEvents(Protocol):
    """What an engine tells the world."""

    def begin(self, job: Job) -> Work:
        """The prompt begins to be computed."""

    def prefilled(self, job: Job, work: Work, seconds: float) -> None:
        """The prompt is done, the first token is out; seconds of compute, batch excluded."""

    def stepped(self, batch: int, kv_tokens: int, seconds: float) -> None:
        """A run of decode steps with nothing else in them took `seconds` each."""

    def answered(self, job: Job, tbt: Tbt) -> None:
        """The last token is out."""


class Engine:
    """See the module. The world adds legs; `begin` and the others are called back."""

    def __init__(
        self, timeline: Timeline, profile: Profile, events: EngineEvents, chunk_tokens: int, *, mixed: bool
    ) -> None:
        """`mixed`: chunks of prompts run beside the batch; else prompts go first, whole."""
        self._time = timeline
        self._profile = profile
        self._events = events
        self._chunk_tokens = chunk_tokens
        self._mixed = mixed
        self._prompts: deque[Job] = deque()
        self._answers: deque[Job] = deque()
        self._batch: list[tuple[int, int, Job]] = []  # heap of (step after which it ends, order, job)
        self._order = itertools.count()
        self._runs = Runs()
        self._steps = 0
        self._kv_tokens = 0  # in the contexts of the batch now
        self._room_tokens = profile.gpu_kv_tokens
        self._stall_s = 0.0
        self._busy = False
        self._run: tuple[float, int, float, float] | None = None  # start, steps, first step, growth
        self._run_id = 0
        self._chunked: tuple[Job, Work, int, float] | None = None  # and tokens done, seconds so far
        self._prompt: tuple[Job, Work, float, float] | None = None  # computed whole: from when, how long
        self._broken = False
        self.busy_s = 0.0
        self.prefill_busy_s = 0.0

    # ------------------------------------------------------------ from the world

    def add_prompt(self, job: Job) -> None:
        """A leg that has to be prefilled comes in."""
        self._prompts.append(job)
        self.kick()

    def add_answer(self, job: Job) -> None:
        """A leg comes in whose KV is here."""
        self._answers.append(job)
        self.kick()

    def kick(self) -> None:
        """Something changed: look at it at once if idle, else at the next boundary of steps."""
        if self._broken:
            return
        if not self._busy:
            self._busy = True
            self._time.at(self._time.now_s, self._next)  # all that come at this moment begin together
        elif self._run is not None:
            self._cut(self._run)

    def stop(self) -> list[Stopped]:
        """Break down: call nobody back any more, and return how far every leg had come."""
        now_s, k = self._time.now_s, 0
        self._broken = True
        if self._run is not None:
            start_s, steps, first_s, growth_s = self._run
            while k < steps and start_s + _run_s(k + 1, first_s, growth_s) <= now_s:
                k += 1
            if k:
                self._runs.add(Run(start_s, k, _run_s(k, first_s, growth_s) / k, self._stall_s))
        end_s = self._runs.end_s
        stopped = []
        for end_step, _, job in sorted(self._batch, key=lambda one: one[1]):
            tokens = self._steps + k - (end_step - job.answer_tokens)
            gaps = (
                job.before + self._runs.gaps(job.run_from, job.first_token_s) if tokens else list(job.before)
            )
            stopped.append(
                Stopped(job, tokens, end_s if tokens else job.first_token_s, gaps, job.prompt_tokens)
            )
        if self._prompt is not None:
            job, work, begun_s, seconds = self._prompt
            stopped.append(
                _unbegun(job, work.known_tokens + int(work.new_tokens * (now_s - begun_s) / seconds))
            )
        if self._chunked is not None:
            job, work, done_tokens, _ = self._chunked
            stopped.append(_unbegun(job, work.known_tokens + done_tokens))
        stopped += [_unbegun(job, job.prompt_tokens) for job in self._answers]
        return stopped + [_unbegun(job, 0) for job in self._prompts]

    @property
    def waiting(self) -> int:
        """Legs that have not begun."""
        return len(self._prompts) + len(self._answers)

    @property
    def batch(self) -> int:
        """Legs that are decoded."""
        return len(self._batch)

    @property
    def kv_tokens(self) -> int:
        """Tokens in the contexts of the batch."""
        return self._kv_tokens

    # ------------------------------------------------------------ what to do next

    def _next(self) -> None:
        if self._broken:
            return
        self._busy = False
        while self._answers and self._has_room(self._answers[0]):
            self._join(self._answers.popleft())
        if self._chunked is None and (job := self._next_prompt()) is not None:
            work = self._events.begin(job)
            self._room_tokens -= job.kv_tokens if job.answer_tokens else 0
            if not (self._mixed and self._batch):
                self._prefill(job, work)
                return
            self._chunked = job, work, 0, 0.0
        if self._chunked is not None:
            self._chunk(*self._chunked)
        elif self._batch:
            self._decode()

    def _next_prompt(self) -> Job | None:
        """The first, if its blocks are there and it has room; nobody overtakes it."""
        if not self._prompts or self._prompts[0].blocked:
            return None
        if self._prompts[0].answer_tokens and not self._has_room(self._prompts[0]):
            return None
        return self._prompts.popleft()

    def _has_room(self, job: Job) -> bool:
        # a context longer than the whole engine runs alone: nothing is to wait for ever
        alone = self._room_tokens == self._profile.gpu_kv_tokens
        return len(self._batch) < self._profile.sequences_max and (
            job.kv_tokens <= self._room_tokens or alone
        )

    def _join(self, job: Job, *, counted: bool = False) -> None:
        if not counted:
            self._room_tokens -= job.kv_tokens
        job.run_from = len(self._runs)
        self._kv_tokens += job.prompt_tokens + 1
        heapq.heappush(self._batch, (self._steps + job.answer_tokens, next(self._order), job))

    # ------------------------------------------------------------ prompts

    def _prefill(self, job: Job, work: Work) -> None:
        compute_s = self._profile.prompt_s(work.new_tokens, work.known_tokens, self._chunk_tokens)
        seconds = max(compute_s, work.load_s)  # layer by layer: the longer one hides the other

        def done() -> None:
            if self._broken:
                return
            self._prompt = None
            self.busy_s += seconds
            self.prefill_busy_s += seconds
            self._stall_s += seconds if self._batch else 0.0
            self._prefilled(job, work, seconds)

        self._busy = True
        self._prompt = job, work, self._time.now_s, seconds
        self._time.at(self._time.now_s + seconds, done)

    def _prefilled(self, job: Job, work: Work, seconds: float) -> None:
        if job.resumed:
            job.before.append((self._time.now_s - job.first_token_s, 1))
        job.first_token_s = self._time.now_s
        self._events.prefilled(job, work, seconds)
        if job.answer_tokens:
            self._join(job, counted=True)
        self._next()

    def _chunk(self, job: Job, work: Work, done_tokens: int, so_far_s: float) -> None:
        """One step: the batch, and as much of the prompt as the step's budget leaves."""
        budget = max(1, self._chunk_tokens - len(self._batch))
        tokens = min(budget, work.new_tokens - done_tokens)
        chunk_s = self._profile.prefill_s(tokens, work.known_tokens + done_tokens)
        if not done_tokens:
            chunk_s = max(chunk_s, work.load_s)
        step_s = self._profile.step_s(len(self._batch), self._kv_tokens) if self._batch else 0.0
        seconds = step_s + chunk_s
        start_s = self._time.now_s

        def ended() -> None:
            if self._broken:
                return
            self.busy_s += seconds
            self.prefill_busy_s += chunk_s
            if self._batch:
                self._record(start_s, 1, seconds)
            if done_tokens + tokens < work.new_tokens:
                self._chunked = job, work, done_tokens + tokens, so_far_s + chunk_s
                self._next()
                return
            self._chunked = None
            self._prefilled(job, work, so_far_s + chunk_s)

        self._busy = True
        self._time.at(start_s + seconds, ended)

    # ------------------------------------------------------------ answers

    def _decode(self) -> None:
        batch = len(self._batch)
        first_s = self._profile.step_s(batch, self._kv_tokens)
        steps = self._batch[0][0] - self._steps
        self._set_run(self._time.now_s, steps, first_s, self._profile.decode_kv_token_s * batch)

    def _set_run(self, start_s: float, steps: int, first_s: float, growth_s: float) -> None:
        self._busy = True
        self._run = start_s, steps, first_s, growth_s
        self._run_id += 1
        run_id = self._run_id
        self._time.at(start_s + _run_s(steps, first_s, growth_s), lambda: self._run_ended(run_id))

    def _cut(self, run: tuple[float, int, float, float]) -> None:
        """Let the run end with the step that is under way."""
        start_s, steps, first_s, growth_s = run
        elapsed_s = self._time.now_s - start_s
        # smallest k with k * first + growth * k * (k - 1) / 2 >= elapsed
        linear = first_s - growth_s / 2
        k = math.ceil(2 * elapsed_s / (linear + math.sqrt(linear * linear + 2 * growth_s * elapsed_s)))
        k = max(1, k)
        while _run_s(k, first_s, growth_s) < elapsed_s:  # rounding
            k += 1
        if k < steps:
            self._set_run(start_s, k, first_s, growth_s)

    def _run_ended(self, run_id: int) -> None:
        if run_id != self._run_id or self._run is None or self._broken:
            return  # it was cut
        start_s, steps, first_s, growth_s = self._run
        self._run = None
        seconds = _run_s(steps, first_s, growth_s)
        self.busy_s += seconds
        self._events.stepped(
            len(self._batch), self._kv_tokens + len(self._batch) * (steps - 1) // 2, seconds / steps
        )
        self._record(start_s, steps, seconds / steps)
        self._next()

    def _record(self, start_s: float, steps: int, step_s: float) -> None:
        self._runs.add(Run(start_s, steps, step_s, self._stall_s))
        self._stall_s = 0.0
        self._steps += steps
        self._kv_tokens += steps * len(self._batch)
        while self._batch and self._batch[0][0] <= self._steps:
            job = heapq.heappop(self._batch)[2]
            self._kv_tokens -= job.kv_tokens + 1
            self._room_tokens += job.kv_tokens
            self._events.answered(job, tbt_of(job.before + self._runs.gaps(job.run_from, job.first_token_s)))


def _run_s(steps: int, first_s: float, growth_s: float) -> float:
    return steps * first_s + growth_s * steps * (steps - 1) / 2


def _unbegun(job: Job, prompt_tokens: int) -> Stopped:
    return Stopped(job, 0, job.first_token_s, list(job.before), prompt_tokens)
