"""Start the engine process so that it can never outlive its relay.

Two ways with one result: in a process that has vLLM imported already (a child of the warm zygote)
a fork costs milliseconds; elsewhere a fresh interpreter imports for about 20 CPU-seconds. Both set
PR_SET_PDEATHSIG, so a SIGKILLed relay takes its engine along.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import structlog

from mooncake.core.cpu import compiler_env
from mooncake.core.process import set_parent_death_signal
from mooncake.worker.spec import STOP_SIGNAL, EngineSpec

log = structlog.get_logger(__name__)

KILL_WAIT_S = 5.0


class EngineProcess:
    """A running engine: its pid, a pidfd to wait on, and how to end it."""

    def __init__(self, pid: int) -> None:
        """Take over a child of this process."""
        self.pid = pid
        self.pidfd = os.pidfd_open(pid)
        self._code: int | None = None

    def poll(self) -> int | None:
        """Return the exit code (negative = signal), or None while it runs."""
        if self._code is None:
            with contextlib.suppress(ChildProcessError):
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                if pid:
                    self._code = os.waitstatus_to_exitcode(status)
        return self._code

    def stop(self, grace_s: float) -> int:
        """STOP_SIGNAL, then SIGKILL after `grace_s`; return the exit code."""
        for number, wait_s in ((STOP_SIGNAL, grace_s), (signal.SIGKILL, KILL_WAIT_S)):
            if self.poll() is not None:
                break
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)
            end_s = time.monotonic() + wait_s
            while self.poll() is None and time.monotonic() < end_s:
                time.sleep(0.02)
        code = self.poll()
        return -signal.SIGKILL if code is None else code


def start_engine(spec: EngineSpec) -> EngineProcess:
    """Start the engine of `spec` as a child of this process. No threads may run yet (fork)."""
    path = Path(spec.run_dir) / "spec.json"
    path.write_bytes(msgspec.json.encode(spec))
    if "vllm.v1.engine.core" in sys.modules:
        return EngineProcess(_fork(spec))
    parent = os.getpid()
    environment = {**compiler_env(), **os.environ, "OMP_NUM_THREADS": str(spec.threads_used)}
    child = subprocess.Popen(
        [sys.executable, "-m", "mooncake.worker.engine", str(path), str(parent)],
        env=environment,
        stdin=subprocess.DEVNULL,
    )
    child.returncode = 0  # EngineProcess reaps it; Popen must not
    return EngineProcess(child.pid)


def _fork(spec: EngineSpec) -> int:
    parent = os.getpid()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        set_parent_death_signal(parent)
        from mooncake.worker import engine

        code = engine.run(spec)
    except BaseException:  # noqa: BLE001 - the child must never return into its parent's code
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
