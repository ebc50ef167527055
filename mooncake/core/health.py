"""How a process is, for whoever restarts it or sends it work. Pure: the shell tells what happens and when.

    starting --started--> started --ready--> ready <--unready/ready--> not ready
    any of these --draining--> draining: for good, a process that is told to go does not come back

Three questions, as Kubernetes asks them: is it alive (its loops turn; if not, restart it), has it started
(loaded and registered; until then nobody asks the others), is it ready (send it work).
Moved by one thread, the loop's; asked by those of the admin server: what they share are single references.
A drain may be told by them, too, for the answers that come next; then the loop has to repeat it, for a move
that was on its way does not know of it.
"""

from enum import StrEnum

import msgspec

ALIVE_S = 30.0
"""A loop that has not turned for so long is stuck, not slow: what holds one up (an import, a page-in) takes
seconds. A machine that slept answers right again with the next turn, before a probe's third try."""


class Phase(StrEnum):
    """Where a process stands."""

    STARTING = "starting"
    STARTED = "started"
    READY = "ready"
    NOT_READY = "not ready"
    DRAINING = "draining"


class Verdict(msgspec.Struct, frozen=True):
    """An answer: yes or no, and why, for people."""

    ok: bool
    why: str


class _State(msgspec.Struct, frozen=True):
    phase: Phase
    why: str = ""
    started: bool = False


class _Beat(msgspec.Struct, frozen=True):
    at_s: float
    alive_s: float


class Health:
    """One process: `started`, `ready` and `draining` move it, `beat` keeps it alive."""

    def __init__(self) -> None:
        """Starting, with no loop that has to turn."""
        self._state = _State(Phase.STARTING)
        self._beats: dict[str, _Beat] = {}

    @property
    def phase(self) -> Phase:
        """Where it stands."""
        return self._state.phase

    # ------------------------------------------------------------ told

    def beat(self, loop: str, now_s: float, alive_s: float = ALIVE_S) -> None:
        """A loop has turned, and from the first time on has to, at least every `alive_s`."""
        self._beats[loop] = _Beat(now_s, alive_s)

    def forget(self, loop: str) -> None:
        """A loop has ended as it should."""
        self._beats.pop(loop, None)

    def started(self) -> None:
        """It has loaded what it needs and is registered."""
        state = self._state
        phase = Phase.STARTED if state.phase is Phase.STARTING else state.phase
        self._state = _State(phase, state.why, started=True)

    def ready(self) -> None:
        """Work may come; only of one that has started and does not drain."""
        self._move(Phase.READY, "")

    def unready(self, why: str) -> None:
        """Work had better go elsewhere."""
        self._move(Phase.NOT_READY, why)

    def draining(self, why: str) -> None:
        """It was told to go: nothing new."""
        self._state = _State(Phase.DRAINING, why, self._state.started)

    def _move(self, phase: Phase, why: str) -> None:
        state = self._state
        if state.started and state.phase is not Phase.DRAINING:
            self._state = _State(phase, why, started=True)

    # ------------------------------------------------------------ asked

    def alive_now(self, now_s: float) -> Verdict:
        """Return whether every loop turns."""
        for name, beat in sorted(self._beats.copy().items()):
            age_s = now_s - beat.at_s
            if age_s > beat.alive_s:
                return Verdict(False, f"{name} has not turned for {age_s:.0f} s, at most {beat.alive_s:g} s")
        return Verdict(True, "alive")

    def started_now(self) -> Verdict:
        """Return whether it has loaded and registered."""
        state = self._state
        return Verdict(state.started, "started" if state.started else state.phase)

    def ready_now(self) -> Verdict:
        """Return whether work may come."""
        state = self._state
        return Verdict(
            state.phase is Phase.READY, f"{state.phase}: {state.why}" if state.why else state.phase
        )
