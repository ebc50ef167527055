"""No engine outlives its relay, and stopping one always ends."""

import os
import select
import signal
import subprocess
import sys
import time

import msgspec
import pytest

from mooncake.worker import launch
from mooncake.worker.launch import EngineProcess, start_engine
from mooncake.worker.spec import STOP_SIGNAL, EngineSpec

WAIT_S = 5.0
RELAY = """
import os, sys, time
from mooncake.core.process import set_parent_death_signal
parent = os.getpid()
pid = os.fork()
if not pid:
    set_parent_death_signal(parent)
    print(os.getpid(), flush=True)
    time.sleep(60)
time.sleep(60)
"""


def started(*code: str) -> EngineProcess:
    """Return a python child that has printed a line."""
    readable, writable = os.pipe()
    child = subprocess.Popen([sys.executable, "-c", *code], stdout=writable)
    child.returncode = 0  # EngineProcess reaps it
    os.close(writable)
    with os.fdopen(readable) as lines:
        assert lines.readline()
    return EngineProcess(child.pid)


@pytest.fixture
def engine():
    engine = started("import time; print(1, flush=True); time.sleep(60)")
    yield engine
    engine.stop(0.0)
    os.close(engine.pidfd)


def test_the_engine_dies_within_a_second_of_its_killed_relay():
    with subprocess.Popen([sys.executable, "-c", RELAY], stdout=subprocess.PIPE, text=True) as relay:
        child = os.pidfd_open(int(relay.stdout.readline()))
        assert not select.select([child], [], [], 0)[0]
        relay.kill()
        assert select.select([child], [], [], 1.0)[0], "the engine outlived its relay"
        os.close(child)


def test_a_child_whose_parent_is_gone_already_leaves_at_once():
    code = "from mooncake.core.process import set_parent_death_signal as bind; bind(1 << 22); print('alive')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=30, check=False)
    assert (done.returncode, done.stdout) == (1, b"")


def test_a_running_engine_has_no_exit_code_and_its_pidfd_is_quiet(engine):
    assert engine.poll() is None
    assert not select.select([engine.pidfd], [], [], 0)[0]


def test_stop_asks_first(engine):
    assert engine.stop(WAIT_S) == -STOP_SIGNAL
    assert select.select([engine.pidfd], [], [], 0)[0]
    assert engine.poll() == -STOP_SIGNAL


def test_stop_kills_an_engine_that_does_not_listen_when_its_grace_is_over():
    deaf = "signal.signal(signal.SIGUSR2, signal.SIG_IGN)"
    code = f"import signal, time; {deaf}; print(1, flush=True); time.sleep(60)"
    engine = started(code)
    started_s = time.monotonic()
    assert engine.stop(0.1) == -signal.SIGKILL
    assert 0.1 <= time.monotonic() - started_s < 2.0


def test_stop_ends_a_stopped_engine_too(engine):
    os.kill(engine.pid, signal.SIGSTOP)
    # it may report the stop that waited for it: what counts is that it ended
    assert engine.stop(0.1) in (-signal.SIGKILL, -STOP_SIGNAL)
    assert engine.poll() is not None


def test_the_exit_code_of_an_engine_that_left_by_itself_is_kept():
    engine = started("print(1, flush=True); raise SystemExit(3)")
    assert select.select([engine.pidfd], [], [], WAIT_S)[0]
    assert engine.poll() == 3
    assert engine.poll() == 3
    assert engine.stop(WAIT_S) == 3


def test_an_engine_is_started_with_its_spec_its_parent_and_its_threads(tmp_path, monkeypatch):
    script = tmp_path / "python"
    script.write_text(
        '#!/bin/sh\necho "$OMP_NUM_THREADS $@" > "$3.tmp"\nmv "$3.tmp" "$3.seen"\nexec sleep 60\n'
    )
    script.chmod(0o700)
    monkeypatch.setattr(launch.sys, "executable", str(script))
    monkeypatch.delitem(sys.modules, "vllm.v1.engine.core", raising=False)
    spec = EngineSpec(instance_id="i", role="both", epoch="e", run_dir=str(tmp_path), model="m", cores=[0, 1])
    engine = start_engine(spec)
    try:
        path = tmp_path / "spec.json"
        assert msgspec.json.decode(path.read_bytes(), type=EngineSpec) == spec
        seen, end_s = tmp_path / "spec.json.seen", time.monotonic() + WAIT_S
        while not seen.exists():
            assert time.monotonic() < end_s
            time.sleep(0.01)
        told = ["2", "-m", "mooncake.worker.engine", str(path), str(os.getpid())]
        assert seen.read_text().split() == told
    finally:
        assert engine.stop(WAIT_S) < 0
