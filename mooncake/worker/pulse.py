"""Counters and a sign of life that the engine shares with its relay: one small mapped file.

The engine process has no HTTP server and must not pay for metrics, so it adds to 8-byte slots in
shared memory; the relay reads them for /metrics and heartbeats. A slot has one writer process and
8-byte aligned stores do not tear on the machines we run on. The pulse comes from a thread: an
engine in a long prefill step still pulses, a stopped process does not.
"""

import mmap
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

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
_SIZE_BYTES = 8 * len(FIELDS)


class Pulse:
    """The shared slots, by name."""

    def __init__(self, path: Path, *, create: bool) -> None:
        """Map `path`; `create` makes it first (the relay does, before it starts the engine)."""
        if create:
            path.write_bytes(b"\0" * _SIZE_BYTES)
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), _SIZE_BYTES)
        self._slots = np.frombuffer(self._map, dtype=np.float64)
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

    def read(self, name: str) -> float:
        """Return a slot's value."""
        return float(self._slots[self._index[name]])

    def snapshot(self) -> dict[str, float]:
        """Return all counters (without the pulse itself)."""
        return {name: float(self._slots[i]) for i, name in enumerate(FIELDS) if i > 0}

    def age_s(self, now_s: float) -> float:
        """Return the age of the last sign of life; `now_s` is time.monotonic()."""
        return max(0.0, now_s - self.read("pulse_s"))

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
