"""Child processes that never outlive us and never hang us. Linux only.

A child leads its own session and process group (a signal reaches what it started), and the kernel
ends it when its parent ends (PR_SET_PDEATHSIG), so that a SIGKILL of `mooncake up` leaves nothing
behind. The parent of that rule is the *thread* that forked: fork from the main thread.
"""

import asyncio
import contextlib
import ctypes
import os
import select
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path

from mooncake.core.errors import ConfigError, PeerGone

PR_SET_PDEATHSIG = 1
KILL_S = 5.0
"""After SIGKILL a process is gone in milliseconds, unless the kernel holds it in IO."""
LOG_MODE = 0o600

# bound at import: after a fork in a threaded process a dlopen could wait for a lost lock
_libc = ctypes.CDLL(None, use_errno=True)
_prctl = _libc.prctl
_prctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong]
_prctl.restype = ctypes.c_int


def set_parent_death_signal(parent_pid: int, signal_number: int = signal.SIGKILL) -> None:
    """Ask the kernel to send `signal_number` to this process when its parent ends.

    Args:
        parent_pid: who the parent should be; read it before the fork.
        signal_number: SIGKILL cannot be ignored by what the child runs.

    Raises:
        PeerGone: the parent was already gone, so the signal would never come.
    """
    if _prctl(PR_SET_PDEATHSIG, signal_number, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent_pid:  # it died between fork and prctl
        raise PeerGone(f"parent process {parent_pid} ended before its child was ready")


async def spawn(
    argv: Sequence[str],
    env: Mapping[str, str] | None = None,
    cwd: str | Path | None = None,
    log_path: Path | None = None,
    cores: Sequence[int] = (),
    pass_fds: Sequence[int] = (),
) -> asyncio.subprocess.Process:
    """Start `argv` as leader of a new session that dies with us.

    Args:
        argv: program and arguments; never a secret, the whole machine can read them.
        env: the whole environment; None = ours.
        cwd: working directory; None = ours.
        log_path: stdout and stderr are appended there, readable by us alone; None = inherited.
        cores: CPU affinity; empty = ours.
        pass_fds: descriptors that the child inherits; all others are closed.

    Raises:
        ConfigError: the program does not exist or may not be run.
    """
    parent_pid = os.getpid()

    def in_child() -> None:  # between fork and exec: system calls only, no locks, no logging
        set_parent_death_signal(parent_pid)
        if cores:
            os.sched_setaffinity(0, cores)

    log_fd = open_log(log_path) if log_path else None
    try:
        return await asyncio.create_subprocess_exec(
            *argv,
            env=dict(env) if env is not None else None,
            cwd=cwd,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=log_fd,
            stderr=log_fd,
            start_new_session=True,
            pass_fds=pass_fds,
            preexec_fn=in_child,
        )
    except (FileNotFoundError, PermissionError) as error:
        raise ConfigError(f"cannot start {argv[0]!r}: {error.strerror}") from error
    finally:
        if log_fd is not None:
            os.close(log_fd)


def open_log(path: Path) -> int:
    """Return a file descriptor that appends to `path`, for us alone."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, LOG_MODE)


def alive(pid: int) -> bool:
    """Return whether `pid` runs. A zombie does not."""
    try:
        pid_fd = os.pidfd_open(pid)
    except OSError:
        return False
    try:
        poller = select.poll()  # not select(): a descriptor may be above 1023
        poller.register(pid_fd, select.POLLIN)
        return not poller.poll(0)
    finally:
        os.close(pid_fd)


async def wait_gone(pid: int, deadline_s: float) -> bool:
    """Return whether `pid` ended within `deadline_s`; it need not be our child."""
    try:
        pid_fd = os.pidfd_open(pid)
    except OSError:
        return True
    loop = asyncio.get_running_loop()
    gone = asyncio.Event()
    loop.add_reader(pid_fd, gone.set)
    try:
        async with asyncio.timeout(deadline_s):
            await gone.wait()
        return True
    except TimeoutError:
        return False
    finally:
        loop.remove_reader(pid_fd)
        os.close(pid_fd)


async def kill_group(pid: int, grace_s: float) -> bool:
    """End the process group that `pid` leads: SIGTERM, then SIGKILL after `grace_s`.

    Returns:
        Whether the leader ended by itself within the grace.

    Raises:
        PeerGone: it still runs KILL_S after SIGKILL (stuck in the kernel).
    """
    _signal_group(pid, signal.SIGTERM)
    by_itself = await wait_gone(pid, grace_s)
    _signal_group(pid, signal.SIGKILL)  # what the leader left behind too
    if not by_itself and not await wait_gone(pid, KILL_S):
        raise PeerGone(f"process {pid} does not end {KILL_S:g} s after SIGKILL: stuck in the kernel?")
    return by_itself


def _signal_group(pid: int, signal_number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal_number)


def pick_cores(index: int, count: int, available: Sequence[int] | None = None) -> list[int]:
    """Return the cores of engine `index` of `count`: disjoint and equal, or shared round-robin.

    Two engines on one core halve each other; a core left over is better left to the front end.
    """
    cores = sorted(os.sched_getaffinity(0)) if available is None else list(available)
    each = len(cores) // count
    if each == 0:
        return [cores[index % len(cores)]]
    return cores[index * each : (index + 1) * each]
