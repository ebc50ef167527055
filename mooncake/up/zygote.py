"""The warm process: imports vLLM once (about 20 CPU-seconds), then forks children in milliseconds.

    up  <- SOCK_SEQPACKET pair ->  zygote  -> fork -> engine | conductor

A forked child leads its own session, dies with the zygote (and the zygote with `up`), writes to
its own log, gets its own environment, then runs its target. The zygote itself must stay what a
fork can copy safely: no threads, no event loop, no open devices; it reaps children and reports
their ends. One message per packet, msgpack. The socket pair is inherited, nobody else can reach it.
"""

import contextlib
import gc
import importlib
import os
import select
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable

import msgspec

from mooncake.core import wire
from mooncake.core.process import open_log, set_parent_death_signal

PACKET_BYTES_MAX = 128 << 10
"""Below the kernel's default socket buffer (208 KiB); options are about 1 KiB."""
PRELOAD = "mooncake.worker.preload:preload"


class Fork(msgspec.Struct, frozen=True, tag="fork"):
    """Start a child that runs `target` (module:function, called with role and options).

    `env` is added to the zygote's environment. `ticket` comes back in the answer.
    """

    ticket: int
    target: str
    role: str
    options: bytes
    env: dict[str, str]
    log_path: str
    cores: list[int] = []


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """Imports are done. `threads` other than 1: forking is not safe, the zygote ends."""

    seconds: float
    threads: int


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """Imports failed; the zygote ends."""

    reason: str


class Forked(msgspec.Struct, frozen=True, tag="forked"):
    """The child of `ticket` runs; pid 0 = the fork failed."""

    ticket: int
    pid: int


class Exited(msgspec.Struct, frozen=True, tag="exited"):
    """A child ended; `code` negative = the signal."""

    pid: int
    code: int


Report = Ready | Failed | Forked | Exited


def resolve(target: str) -> Callable[..., object]:
    """Return the function that `module:function` names."""
    module, _, name = target.partition(":")
    function: Callable[..., object] = getattr(importlib.import_module(module), name)
    return function


class _Zygote:
    def __init__(self, control: socket.socket, parent_pid: int) -> None:
        self._control = control
        self._parent_pid = parent_pid
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def run(self, preload: str) -> int:
        """Import, then fork on command until the other end closes."""
        set_parent_death_signal(self._parent_pid)
        start_s = time.monotonic()
        try:
            resolve(preload)()
        except Exception as error:  # noqa: BLE001 - whatever an import raises is told to `up`
            traceback.print_exc()
            self._send(Failed(f"{type(error).__name__}: {error}"))
            return 1
        gc.collect()
        gc.freeze()  # children share these pages as long as no collection touches them
        threads = len(os.listdir("/proc/self/task"))
        self._send(Ready(time.monotonic() - start_s, threads))
        if threads != 1:
            return 1
        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        return self._serve()

    def _serve(self) -> int:
        poller = select.poll()
        poller.register(self._control, select.POLLIN)
        poller.register(self._wake_read, select.POLLIN)
        while True:
            ready = {fd for fd, _ in poller.poll()}
            if self._wake_read in ready:
                os.read(self._wake_read, 4096)
                self._reap()
            if self._control.fileno() in ready:
                data = self._control.recv(PACKET_BYTES_MAX)
                if not data:
                    return 0  # `up` is gone; the children follow by their death signal
                request = wire.decode(data, Fork)
                self._send(Forked(request.ticket, self._fork(request)))

    def _reap(self) -> None:
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    return
                self._send(Exited(pid, os.waitstatus_to_exitcode(status)))

    def _send(self, report: Report) -> None:
        with contextlib.suppress(OSError):  # the other end is gone: the next recv says so
            self._control.send(wire.encode(report))

    def _fork(self, request: Fork) -> int:
        zygote_pid = os.getpid()
        sys.stdout.flush()
        sys.stderr.flush()
        try:
            pid = os.fork()
        except OSError:
            traceback.print_exc()
            return 0
        if pid:
            return pid
        code = 1
        try:
            self._become_child(request, zygote_pid)
            code = int(resolve(request.target)(request.role, request.options) or 0)  # type: ignore[call-overload]
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else int(error.code is not None)
        except BaseException:  # noqa: BLE001 - the child must never return into the zygote's loop
            traceback.print_exc()
        finally:
            with contextlib.suppress(OSError, ValueError):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)  # no atexit of the zygote's imports

    def _become_child(self, request: Fork, zygote_pid: int) -> None:
        os.setsid()
        set_parent_death_signal(zygote_pid)
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for fd in (self._wake_read, self._wake_write):
            os.close(fd)
        self._control.close()
        log_fd = open_log(request.log_path)  # type: ignore[arg-type]
        for fd in (1, 2):
            os.dup2(log_fd, fd)
        os.close(log_fd)
        os.environ.update(request.env)
        if request.cores:
            os.sched_setaffinity(0, request.cores)


def main() -> int:
    """Entry of `python -m mooncake.up.zygote FD PARENT_PID [PRELOAD]`."""
    control = socket.socket(fileno=int(sys.argv[1]))
    control.set_inheritable(False)
    return _Zygote(control, int(sys.argv[2])).run(sys.argv[3] if len(sys.argv) > 3 else PRELOAD)


if __name__ == "__main__":
    sys.exit(main())
