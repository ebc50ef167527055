"""What a process tells of itself."""

import asyncio
import os
import subprocess
import sys
import time

import pytest
from prometheus_client import CollectorRegistry

from mooncake.core.errors import ConfigError
from mooncake.core.health import ALIVE_S, Health
from mooncake.core.vitals import BEAT_S, Turns, VitalsCollector, beating, lag_histogram, refuse_shared_files

NAMES = ("resident_bytes", "open_fds", "threads", "cpu_seconds_total")


def value(registry: CollectorRegistry, name: str, kind: str) -> float | None:
    return registry.get_sample_value(f"mooncake_process_{name}", {"kind": kind})


def test_every_vital_sign_is_told_of_us():
    registry = CollectorRegistry()
    registry.register(VitalsCollector("store"))
    assert all(value(registry, name, "store") > 0 for name in NAMES)
    before = value(registry, "open_fds", "store")
    opened = [os.open("/dev/null", os.O_RDONLY) for _ in range(7)]
    assert value(registry, "open_fds", "store") == before + 7
    for fd in opened:
        os.close(fd)


def test_a_child_is_told_of_until_it_is_gone():
    registry = CollectorRegistry()
    argv = [sys.executable, "-c", "print(flush=True), input()"]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        child.stdout.readline()
        registry.register(VitalsCollector("prefill", {"engine": child.pid}))
        assert value(registry, "threads", "engine") == 1
        assert value(registry, "resident_bytes", "engine") > 1 << 20
        child.communicate(b"\n")
    assert value(registry, "threads", "engine") is None
    assert value(registry, "threads", "prefill") >= 1, "that one is gone says nothing of the others"


async def test_a_blocked_loop_shows_as_lag_and_the_beat_goes_on():
    registry, health, turned = CollectorRegistry(), Health(), asyncio.Event()
    async with beating("gateway", health, lag_histogram(registry), turned.set):
        await turned.wait()
        await asyncio.sleep(0)  # it sleeps now
        time.sleep(4 * BEAT_S)  # noqa: ASYNC251 - that is what is measured
        turned.clear()
        await turned.wait()
        assert health.alive_now(time.monotonic()).ok
        assert not health.alive_now(time.monotonic() + ALIVE_S + 1).ok, "it has to turn from now on"
    count = registry.get_sample_value("mooncake_process_event_loop_lag_seconds_sum", {"kind": "gateway"})
    assert count >= 2 * BEAT_S
    assert health.alive_now(1e9).ok, "an ended loop is not missed"


def test_of_a_loop_that_waits_for_events_the_longest_turn_of_each_beat_counts():
    registry = CollectorRegistry()
    turns = Turns(lag_histogram(registry), "relay")

    def seen() -> list[float]:
        labels = {"kind": "relay"}
        name = "mooncake_process_event_loop_lag_seconds"
        return [registry.get_sample_value(f"{name}_{end}", labels) for end in ("count", "sum")]

    turns.turned(100.0, 0.25)
    assert seen() == [1, 0.25]
    for turn in range(1, 100):  # a busy loop: a turn each ms
        turns.turned(100.0 + turn / 1000, 0.5 if turn == 50 else 0.0)
    assert seen() == [1, 0.25], "what a turn took is not what somebody waited"
    turns.turned(100.125, 0.0)
    assert seen() == [2, 0.75]
    turns.turned(100.25, 0.0)
    assert seen() == [3, 0.75], "the long turn is over"


async def test_a_look_that_fails_does_not_stop_the_beat():
    registry, health, looks, enough = CollectorRegistry(), Health(), [], asyncio.Event()

    def look() -> None:
        looks.append(1)
        if len(looks) == 3:
            enough.set()
        raise ValueError("no")

    async with beating("gateway", health, lag_histogram(registry), look), asyncio.timeout(10.0):
        await enough.wait()


def test_metrics_in_files_that_processes_share_are_refused_and_what_to_unset_is_said(monkeypatch):
    refuse_shared_files()
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", "/tmp/shared")
    with pytest.raises(ConfigError, match="PROMETHEUS_MULTIPROC_DIR = '/tmp/shared': unset it"):
        refuse_shared_files()
