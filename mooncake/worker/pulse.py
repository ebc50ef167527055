"""Counters and a sign of life that the engine shares with its relay: one small mapped file.

The engine process has no HTTP server and must not pay for metrics, so it adds to 8-byte slots in
shared memory; the relay reads them for /metrics and heartbeats. A slot has one writer process and
8-byte aligned stores do not tear on the machines we run on. The pulse comes from a thread: an
engine in a long prefill step still pulses, a stopped process does not.

An engine of several ranks has more processes, each with a page of its own (RankPulse): counters add up, and
the engine is as silent as the most silent of them.
"""

import mmap
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from mooncake.core.errors import ConfigError

FIELDS = (
    "pulse_s",  # CLOCK_MONOTONIC of the engine's last sign of life (same host, same clock)
    "load_bytes",
    "load_seconds",
    "load_blocks",
    "save_bytes",
    "save_seconds",
    "save_blocks",
    "late_saves",
    "bad_blocks",
    "failed_loads",
    "lookup_timeouts",
    "pool_errors",
    "hit_tokens",
    "lookup_tokens",
    "fetch_bytes",
    "fetch_seconds",
    "resumed_requests",
    "steps",
    "preemptions",
    "prefix_lookup_tokens",
    "prefix_hit_tokens",
    "requests_running",  # from here on: how it is now
    "requests_waiting",
    "requests_deferred",
    "kv_use_ratio",
)
PULSE_INTERVAL_S = 0.1
RANKS_MAX = 64
"""Of one host: no machine has more accelerators. A page of the file for each, 13 KiB in all."""
COUNTED_ONCE = frozenset({"load_seconds", "load_blocks", "save_seconds", "save_blocks"})
"""By rank 0: all ranks move their shares of the same blocks at the same time."""
_RANKS = len(FIELDS)  # a slot behind the others: of the engine, how many ranks; of a rank, its pid
_PAGE = _RANKS + 1
_SIZE_BYTES = 8 * _PAGE * (1 + RANKS_MAX)


class Pulse:
    """The shared slots, by name."""

    def __init__(self, path: Path, *, create: bool, page: int = 0) -> None:
        """Map `path`; `create` makes it first (the relay does, before it starts the engine).

        `page`: which one is written; 0 is the engine's own.
        """
        if create:
            path.write_bytes(b"\0" * _SIZE_BYTES)
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), _SIZE_BYTES)
        self._pages = np.frombuffer(self._map, dtype=np.float64).reshape(-1, _PAGE)
        self._slots = self._pages[page]
        self._index = {name: index for index, name in enumerate(FIELDS)}
        self._stop = threading.Event()
        self.at_beat: Callable[[], None] | None = None
        """Called at each beat: for what nobody else would say when nothing happens. Must not raise."""

    def add(self, name: str, amount: float) -> None:
        """Add to a counter. One thread at a time per counter."""
        self._slots[self._index[name]] += amount

    def set(self, name: str, value: float) -> None:
        """Say how something is now."""
        self._slots[self._index[name]] = value

    def has_ranks(self, ranks: int) -> None:
        """Say that the engine has several ranks, each a process with a page of its own."""
        if ranks > RANKS_MAX:
            raise ConfigError(f"{ranks} ranks on one host: at most {RANKS_MAX}")
        self._slots[_RANKS] = ranks

    def rank_pids(self) -> list[int]:
        """Return the processes of the ranks that have begun, if there are several."""
        return [int(page[_RANKS]) for page in self._pages[1 : 1 + int(self._slots[_RANKS])] if page[_RANKS]]

    def read(self, name: str) -> float:
        """Return a slot's value, of all ranks together."""
        at = self._index[name]
        if not at:
            return self._oldest_s()
        value = float(self._slots[at])
        if ranks := int(self._slots[_RANKS]):
            value += float(self._pages[1 : 1 + ranks, at].sum())
        return value

    def snapshot(self) -> dict[str, float]:
        """Return all counters (without the pulse itself)."""
        return {name: self.read(name) for name in FIELDS[1:]}

    def age_s(self, now_s: float) -> float:
        """Return the age of the last sign of life; `now_s` is time.monotonic()."""
        return max(0.0, now_s - self._oldest_s())

    def _oldest_s(self) -> float:
        """Return the last sign of life of whoever gave his first and has been silent for longest."""
        beats = self._pages[1 : 1 + int(self._slots[_RANKS]), 0]
        return float(min([self._slots[0], *beats[beats > 0]]))

    def beat(self) -> None:
        """Give one sign of life."""
        self._slots[0] = time.monotonic()

    def start_beating(self) -> None:
        """Beat from a daemon thread until the process ends."""

        def loop() -> None:
            while not self._stop.wait(PULSE_INTERVAL_S):
                self.beat()
                if self.at_beat is not None:
                    self.at_beat()

        self.beat()
        threading.Thread(target=loop, name="pulse", daemon=True).start()


class RankPulse(Pulse):
    """As one of several ranks writes it."""

    def __init__(self, path: Path, rank: int) -> None:
        """`path` as the engine's."""
        super().__init__(path, create=False, page=1 + rank)
        self._leaves = COUNTED_ONCE if rank else frozenset()
        self._slots[_RANKS] = os.getpid()

    def add(self, name: str, amount: float) -> None:
        """Add to a counter, unless another rank counts the same."""
        if name not in self._leaves:
            super().add(name, amount)
