"""When a container counts as started, ready and alive. Pure: outcomes in, verdicts out."""

from dataclasses import dataclass, replace
from typing import Any

Object = dict[str, Any]
PERIOD_S_MIN = 0.2
"""Of scaled periods."""


@dataclass(frozen=True)
class Timing:
    """When a probe asks, and how many answers in a row count."""

    initial_delay_s: float
    period_s: float
    timeout_s: float
    successes: int
    failures: int

    def scaled(self, factor: float) -> "Timing":
        """Return the same with delays and periods `factor` times as long; the time-out stays."""
        return replace(
            self,
            initial_delay_s=self.initial_delay_s * factor,
            period_s=max(PERIOD_S_MIN, self.period_s * factor),
        )

    def pause_s(self, took_s: float) -> float:
        """Return how long to wait after an attempt that took so long: periods count from beginnings."""
        return max(0.0, self.period_s - took_s)


def timing(probe: Object) -> Timing:
    """Return the timing of a probe's spec, with Kubernetes' defaults."""
    return Timing(
        initial_delay_s=probe.get("initialDelaySeconds", 0), period_s=probe.get("periodSeconds", 10),
        timeout_s=probe.get("timeoutSeconds", 1), successes=probe.get("successThreshold", 1),
        failures=probe.get("failureThreshold", 3),
    )  # fmt: skip


class Verdict:
    """What a row of outcomes means: it changes after so many equal ones."""

    def __init__(self, timing: Timing, good: bool) -> None:
        """`good`: what is believed before the first outcome."""
        self.good = good
        self._timing = timing
        self._same, self._last = 0, good

    def on_outcome(self, ok: bool) -> bool:
        """Take the outcome of one probe; return what is believed now."""
        self._same = self._same + 1 if ok == self._last else 1
        self._last = ok
        if self._same >= (self._timing.successes if ok else self._timing.failures):
            self.good = ok
        return self.good


@dataclass(frozen=True)
class Health:
    """One container's probes together."""

    started: bool
    ready: bool
    condemned: str = ""
    """Why it has to be killed, "" = it need not."""


class Checks:
    """The three probes of one start of a container: which of them run, and what follows."""

    def __init__(self, container: Object, factor: float = 1.0) -> None:
        """`factor` scales delays and periods."""
        self.timings = {
            kind: timing(container[f"{kind}Probe"]).scaled(factor)
            for kind in ("startup", "readiness", "liveness") if f"{kind}Probe" in container
        }  # fmt: skip
        self._startup = Verdict(self.timings["startup"], good=False) if "startup" in self.timings else None
        self._readiness = (
            Verdict(self.timings["readiness"], good=False) if "readiness" in self.timings else None
        )
        self._liveness = Verdict(self.timings["liveness"], good=True) if "liveness" in self.timings else None
        self._startup_failures = 0

    @property
    def due(self) -> tuple[str, ...]:
        """Which probes run now: the others wait for the startup probe, which ends with its first success."""
        if self._startup is not None and not self._startup.good:
            return ("startup",)
        return tuple(kind for kind in ("readiness", "liveness") if kind in self.timings)

    def on_outcome(self, kind: str, ok: bool) -> Health:
        """Take the outcome of one probe."""
        if kind == "startup" and self._startup is not None:
            self._startup_failures = 0 if self._startup.on_outcome(ok) or ok else self._startup_failures + 1
            if self._startup_failures >= self.timings["startup"].failures:
                return Health(started=False, ready=False, condemned="startup probe failed")
        elif kind == "readiness" and self._readiness is not None:
            self._readiness.on_outcome(ok)
        elif kind == "liveness" and self._liveness is not None and not self._liveness.on_outcome(ok):
            return Health(started=True, ready=False, condemned="liveness probe failed")
        return self.health

    @property
    def health(self) -> Health:
        """What is believed now."""
        started = self._startup is None or self._startup.good
        return Health(started, started and (self._readiness is None or self._readiness.good))


class BackOff:
    """How long to wait before a container is started again."""

    FIRST_S, LAST_S, FORGET_S = 10.0, 300.0, 600.0
    """Kubernetes' own."""

    def __init__(self, factor: float = 1.0) -> None:
        self._factor = factor
        self._next_s = 0.0

    def on_exit(self, ran_s: float) -> float:
        """Return the delay: none the first time, then twice as long each time, until it ran for long."""
        if ran_s > self.FORGET_S:
            self._next_s = 0.0
        delay_s = self._next_s
        self._next_s = min(self.LAST_S, max(self.FIRST_S, 2 * delay_s))
        return delay_s * self._factor
