"""The engine's counters and sign of life cross the process border; a stopped engine shows."""

import os
import signal
import subprocess
import sys
import time

import pytest

from mooncake.core.errors import ConfigError
from mooncake.worker.pulse import COUNTED_ONCE, FIELDS, PULSE_INTERVAL_S, RANKS_MAX, Pulse, RankPulse

ENGINE = """
import sys, time
from pathlib import Path
from mooncake.worker.pulse import Pulse
pulse = Pulse(Path(sys.argv[1]), create=False)
pulse.add("load_bytes", 7)
pulse.add("load_bytes", 0.5)
pulse.start_beating()
print("beating", flush=True)
time.sleep(60)
"""


@pytest.fixture
def engine(tmp_path):
    """A beating process; yields (its Popen, the relay's view)."""
    pulse = Pulse(tmp_path / "pulse", create=True)
    with subprocess.Popen(
        [sys.executable, "-c", ENGINE, str(tmp_path / "pulse")], stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout.readline() == "beating\n"
        yield child, pulse
        child.kill()


def test_a_new_pulse_counts_from_zero_and_has_never_beaten(tmp_path):
    pulse = Pulse(tmp_path / "pulse", create=True)
    assert pulse.snapshot() == dict.fromkeys(FIELDS[1:], 0.0)
    assert pulse.age_s(50.0) == 50.0


def test_a_file_that_the_relay_has_not_made_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        Pulse(tmp_path / "pulse", create=False)


def test_an_unknown_counter_is_an_error(tmp_path):
    with pytest.raises(KeyError):
        Pulse(tmp_path / "pulse", create=True).add("no such counter", 1)


def test_an_age_is_never_negative(tmp_path):
    pulse = Pulse(tmp_path / "pulse", create=True)
    pulse.beat()
    assert pulse.age_s(0.0) == 0.0


def test_counters_and_beats_of_another_process_are_seen_and_a_stopped_one_ages(engine):
    child, pulse = engine
    assert pulse.read("load_bytes") == 7.5
    assert pulse.age_s(time.monotonic()) < 2.0
    os.kill(child.pid, signal.SIGSTOP)
    os.waitid(os.P_PID, child.pid, os.WSTOPPED)
    first_s = pulse.read("pulse_s")
    time.sleep(3 * PULSE_INTERVAL_S)
    assert pulse.read("pulse_s") == first_s
    assert pulse.age_s(time.monotonic()) >= 3 * PULSE_INTERVAL_S
    os.kill(child.pid, signal.SIGCONT)
    end_s = time.monotonic() + 5
    while pulse.read("pulse_s") == first_s:
        assert time.monotonic() < end_s, "the pulse did not come back"
        time.sleep(0.01)


# ---------------------------------------------------------------- several ranks


def test_what_ranks_count_adds_up_and_what_they_do_together_counts_once(tmp_path):
    pulse = Pulse(tmp_path / "pulse", create=True)
    pulse.has_ranks(3)
    pulse.add("pool_errors", 1)
    for rank in range(3):
        for name in ("pool_errors", "load_bytes", *COUNTED_ONCE):
            RankPulse(tmp_path / "pulse", rank).add(name, 10)
    assert pulse.read("pool_errors") == 31
    assert pulse.read("load_bytes") == pulse.snapshot()["load_bytes"] == 30
    assert {pulse.read(name) for name in COUNTED_ONCE} == {10}


def test_an_engine_is_as_silent_as_the_most_silent_of_its_ranks(tmp_path, monkeypatch):
    now_s = 100.0
    monkeypatch.setattr("mooncake.worker.pulse.time.monotonic", lambda: now_s)
    pulse = Pulse(tmp_path / "pulse", create=True)
    pulse.has_ranks(2)
    ranks = [RankPulse(tmp_path / "pulse", rank) for rank in range(2)]
    pulse.beat()
    assert pulse.age_s(101.0) == 1.0, "ranks that have not begun are not silent"
    for one in ranks:
        one.beat()
    now_s = 110.0
    pulse.beat()
    ranks[0].beat()
    assert pulse.age_s(110.0) == 10.0
    ranks[1].beat()
    assert pulse.age_s(110.0) == 0.0


def test_the_relay_learns_which_processes_the_ranks_are(tmp_path):
    pulse = Pulse(tmp_path / "pulse", create=True)
    assert pulse.rank_pids() == []
    pulse.has_ranks(2)
    assert pulse.rank_pids() == [], "none has begun"
    for rank in range(2):
        RankPulse(tmp_path / "pulse", rank)
    assert pulse.rank_pids() == [os.getpid()] * 2


def test_more_ranks_than_have_a_page_are_refused(tmp_path):
    pulse = Pulse(tmp_path / "pulse", create=True)
    pulse.has_ranks(RANKS_MAX)
    RankPulse(tmp_path / "pulse", RANKS_MAX - 1).add("load_bytes", 1)
    assert pulse.read("load_bytes") == 1
    with pytest.raises(ConfigError, match="ranks on one host"):
        pulse.has_ranks(RANKS_MAX + 1)
