"""Starts processes through the zygote, or as plain subprocesses; both look like supervise.Child."""

import asyncio
import contextlib
import itertools
import os
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mooncake.core import wire
from mooncake.core.errors import ConfigError, PeerGone
from mooncake.core.process import kill_group, spawn
from mooncake.up import zygote

FORK_S = 5.0
"""A fork of a 1 GB process takes milliseconds; on a busy machine not more than this."""


class ZygoteChild:
    """A process that the zygote forked. Implements supervise.Child."""

    def __init__(self, pid: int, ended: "asyncio.Future[int]") -> None:
        """`ended` gets the exit code."""
        self._pid = pid
        self._ended = ended

    @property
    def pid(self) -> int:
        """Process id; it leads its process group."""
        return self._pid

    async def wait(self) -> int:
        """Return the exit code; negative = the signal."""
        return await asyncio.shield(self._ended)


class Zygote:
    """`up`'s end of the warm process."""

    def __init__(self, process: asyncio.subprocess.Process, control: socket.socket, log_path: Path) -> None:
        """Use `Zygote.start`."""
        self.process = process
        self.log_path = log_path
        self.seconds = 0.0
        """How long the imports took."""
        self._control = control
        self._tickets = itertools.count(1)
        loop = asyncio.get_running_loop()
        self._ready: asyncio.Future[None] = loop.create_future()
        self._forks: dict[int, asyncio.Future[ZygoteChild]] = {}
        self._ends: dict[int, asyncio.Future[int]] = {}
        self._reader = asyncio.create_task(self._read(), name="zygote reader")

    @classmethod
    async def start(cls, env: Mapping[str, str], log_path: Path, preload: str = zygote.PRELOAD) -> "Zygote":
        """Start the process; `wait_ready` returns when its imports are done."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        argv = [sys.executable, "-m", "mooncake.up.zygote", str(theirs.fileno()), str(os.getpid()), preload]
        try:
            process = await spawn(argv, env=env, log_path=log_path, pass_fds=[theirs.fileno()])
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        return cls(process, ours, log_path)

    async def wait_ready(self) -> None:
        """Return when children can be forked.

        Raises:
            ConfigError: vLLM cannot be imported.
            PeerGone: the process ended.
        """
        await asyncio.shield(self._ready)

    async def fork(
        self,
        target: str,
        role: str,
        options: bytes,
        env: Mapping[str, str],
        log_path: Path,
        cores: Sequence[int],
    ) -> ZygoteChild:
        """Start `target(role, options)` in a forked child.

        Raises:
            PeerGone: the zygote ended, or could not fork.
        """
        await self.wait_ready()
        request = zygote.Fork(
            next(self._tickets), target, role, options, dict(env), str(log_path), list(cores)
        )
        answer: asyncio.Future[ZygoteChild] = asyncio.get_running_loop().create_future()
        self._forks[request.ticket] = answer
        try:
            async with asyncio.timeout(FORK_S):
                await asyncio.get_running_loop().sock_sendall(self._control, wire.encode(request))
                return await answer
        except (TimeoutError, OSError) as error:
            raise PeerGone(f"the warm process does not fork: {error!r}; see {self.log_path}") from error
        finally:
            self._forks.pop(request.ticket, None)

    async def close(self) -> None:
        """End the process and, by their death signal, whatever it forked."""
        self._reader.cancel()
        await asyncio.gather(self._reader, return_exceptions=True)
        self._control.close()  # an idle zygote leaves by itself
        await kill_group(self.process.pid, 2.0)
        await self.process.wait()

    async def _read(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while data := await loop.sock_recv(self._control, zygote.PACKET_BYTES_MAX):
                self._on_report(wire.decode(data, zygote.Report))  # type: ignore[arg-type]
        except ConnectionError:
            pass
        self._fail(PeerGone(f"the warm process ended; see {self.log_path}"))

    def _on_report(self, report: zygote.Report) -> None:
        match report:
            case zygote.Ready(seconds, threads):
                self.seconds = seconds
                if threads == 1:
                    self._ready.set_result(None)
                else:
                    self._fail(ConfigError(f"imports started {threads - 1} threads: use --no-zygote"))
            case zygote.Failed(reason):
                advice = "pip install 'mooncake-serving[cpu]', or see `mooncake doctor`"
                self._fail(ConfigError(f"vLLM cannot be imported ({reason}): {advice}; log {self.log_path}"))
            case zygote.Forked(ticket, pid):
                self._on_forked(ticket, pid)
            case zygote.Exited(pid, code):
                ended = self._ends.pop(pid, None)
                if ended and not ended.done():
                    ended.set_result(code)

    def _on_forked(self, ticket: int, pid: int) -> None:
        answer = self._forks.get(ticket)
        waiting = answer is not None and not answer.done()
        if pid:
            self._ends[pid] = asyncio.get_running_loop().create_future()
            if not waiting:  # the caller has given up: nobody will look after this child
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        if answer is not None and waiting:
            if pid:
                # made here: a child may have ended before the caller runs again
                answer.set_result(ZygoteChild(pid, self._ends[pid]))
            else:
                answer.set_exception(PeerGone(f"the warm process could not fork; see {self.log_path}"))

    def _fail(self, error: Exception) -> None:
        waiting: list[asyncio.Future[Any]] = [self._ready, *self._forks.values()]
        for future in waiting:
            if not future.done():
                future.set_exception(error)
                future.exception()  # seen here: a future nobody awaits is no warning
        for ended in self._ends.values():
            if not ended.done():
                ended.set_result(-signal.SIGKILL)  # by their death signal


def write_options(path: Path, options: bytes) -> Path:
    """Write a child's options to a file that only we can read; return `path`."""
    path.unlink(missing_ok=True)
    path.touch(mode=0o600)
    path.write_bytes(options)
    return path
