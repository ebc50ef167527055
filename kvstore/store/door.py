"""The short way into the store of the own host: a unix socket, one call at a time per connection.

The store's ZMQ socket serves engines that overlap calls with their own work; a call there passes two
threads and a task on either side, 0.3 ms. Here a blocked caller is woken by the store's loop itself: the
request is decoded, decided and answered in one turn, 30 us. Frames: [u32 length][u32 wanted][message of
core.messages]; wanted 0 = no answer, for what may be lost (Release). The socket file lies in the store's
private directory; both ends are of the same user, as in transfer.fdpass. Callers: kvstore.engine.door.
"""

import asyncio
import contextlib
import errno
import os
import socket
import struct
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import structlog

from mooncake.core import wire
from mooncake.core.errors import MooncakeError
from mooncake.core.messages import Failure, StoreRequest
from mooncake.core.rpc import failure_of
from transfer.fdpass import peer_uid

log = structlog.get_logger(__name__)

CONNECTIONS_MAX = 256
"""Callers of one host at once: threads that are inside a call of their pool."""
BACKLOG = 64
PAUSE_S = 0.1
"""Before the next caller is let in when this process has no descriptor left."""
RECV_BYTES = 64 << 10
"""One read of the socket: 2000 keys. From 128 KiB on malloc maps fresh pages for each: 20 us more."""
OUTPUT_BYTES_MAX = 4 * wire.MESSAGE_BYTES_MAX
"""Unread answers of one connection; a caller waits for each before it asks again."""
HEADER = struct.Struct("<II")

Now = Callable[[Any], Any | None]
Later = Callable[[Any], Awaitable[Any]]


class Door:
    """Serves StoreRequests on the loop that starts it."""

    def __init__(self, path: str, now: Now, later: Later) -> None:
        """Bind; an old file is removed: FdServer has made sure that no living store has this name.

        Args:
            path: of the socket, in a private directory.
            now: returns the answer, or None if the request has to wait for something.
            later: answers what `now` did not.
        """
        self.path = Path(path)
        self._now, self._later = now, later
        self._connections: dict[int, _Connection] = {}
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self.path.unlink(missing_ok=True)
            self._socket.bind(str(self.path))
            self.path.chmod(0o600)
            self._socket.listen(BACKLOG)
        except BaseException:
            self._socket.close()
            raise
        self._socket.setblocking(False)
        self._inode = self.path.stat().st_ino
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> None:
        """Begin to serve on the running loop."""
        self._loop = asyncio.get_running_loop()
        self._listen()

    def _listen(self) -> None:
        if self._loop:
            self._loop.add_reader(self._socket, self._accept)

    async def close(self) -> None:
        """Hang up on everybody, remove the socket file unless a successor has replaced it (idempotent)."""
        if self._loop:
            self._loop.remove_reader(self._socket)
            self._loop = None
        for connection in list(self._connections.values()):
            await connection.close()
        self._socket.close()
        with contextlib.suppress(FileNotFoundError):
            if self.path.stat().st_ino == self._inode:
                self.path.unlink()

    def _accept(self) -> None:
        try:
            caller, _ = self._socket.accept()
        except OSError as error:  # it has left already, or we are out of descriptors: it will see no answer
            if error.errno in (errno.EMFILE, errno.ENFILE) and self._loop:
                log.warning("door.no_descriptors", path=str(self.path), connections=len(self._connections))
                self._loop.remove_reader(self._socket)  # it would be told of the same caller again, at once
                self._loop.call_later(PAUSE_S, self._listen)
            return
        if peer_uid(caller) != os.getuid() or len(self._connections) >= CONNECTIONS_MAX:
            log.warning("door.refused", path=str(self.path), connections=len(self._connections))
            caller.close()
            return
        assert self._loop
        connection = _Connection(caller, self._loop, self._now, self._later, self._connections.pop)
        self._connections[caller.fileno()] = connection


class _Connection:
    """One caller. Reads nothing more while a call of it waits: order is kept, memory bounded."""

    def __init__(
        self,
        sock: socket.socket,
        loop: asyncio.AbstractEventLoop,
        now: Now,
        later: Later,
        ended: Callable[[int], object],
    ) -> None:
        sock.setblocking(False)
        self._socket, self._loop, self._ended = sock, loop, ended
        self._now, self._later = now, later
        self._number = sock.fileno()
        self._input = bytearray()
        self._output = bytearray()
        self._task: asyncio.Task[None] | None = None
        self._open = True
        loop.add_reader(sock, self._read)

    async def close(self) -> None:
        """Hang up."""
        task = self._task
        self._end()
        if task:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def _end(self) -> None:
        if self._open:
            self._open = False
            self._loop.remove_reader(self._socket)
            self._loop.remove_writer(self._socket)
            self._socket.close()
            self._ended(self._number)

    def _read(self) -> None:
        try:
            data = self._socket.recv(RECV_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._end()
            return
        if not self._input and len(data) > HEADER.size:
            length, wanted = HEADER.unpack_from(data)
            if len(data) == HEADER.size + length:  # nearly always: one call, whole
                self._answer(data[HEADER.size :], bool(wanted))
                return
        self._input += data
        self._serve()

    def _serve(self) -> None:
        """Answer whole frames until there is none, or one has to wait."""
        while self._open and self._task is None and len(self._input) >= HEADER.size:
            length, wanted = HEADER.unpack_from(self._input)
            end = HEADER.size + length
            if length > wire.MESSAGE_BYTES_MAX:
                log.warning("door.too_long", length_bytes=length)
                self._end()
                return
            if len(self._input) < end:
                return
            body = bytes(self._input[HEADER.size : end])
            del self._input[:end]
            self._answer(body, bool(wanted))

    def _answer(self, body: bytes, wanted: bool) -> None:
        reply = None
        try:
            request: Any = wire.decode(body, StoreRequest)  # type: ignore[arg-type]
            reply = self._now(request)
        except MooncakeError as error:
            reply = failure_of(error)
        except Exception as error:
            log.exception("door.handler_failed")
            reply = Failure("internal", f"{type(error).__name__}: {error}")
        if reply is None:
            self._loop.remove_reader(self._socket)
            self._task = asyncio.create_task(self._wait(request, wanted))
        elif wanted:
            self._send(reply)

    async def _wait(self, request: Any, wanted: bool) -> None:
        try:
            reply = await self._later(request)
        except MooncakeError as error:
            reply = failure_of(error)
        except Exception as error:
            log.exception("door.handler_failed")
            reply = Failure("internal", f"{type(error).__name__}: {error}")
        self._task = None
        if not self._open:
            return
        if wanted:
            self._send(reply)
        if self._open:
            self._loop.add_reader(self._socket, self._read)
            self._serve()

    def _send(self, reply: Any) -> None:
        body = wire.encode(reply)
        data = HEADER.pack(len(body), 1) + body
        if not self._output:
            try:
                sent = self._socket.send(data)
            except BlockingIOError:
                sent = 0
            except OSError:
                self._end()
                return
            if sent == len(data):
                return
            data = data[sent:]
            self._loop.add_writer(self._socket, self._write)
        self._output += data
        if len(self._output) > OUTPUT_BYTES_MAX:
            log.warning("door.not_read", bytes=len(self._output))
            self._end()

    def _write(self) -> None:
        try:
            sent = self._socket.send(self._output)
        except BlockingIOError:
            return
        except OSError:
            self._end()
            return
        del self._output[:sent]
        if not self._output:
            self._loop.remove_writer(self._socket)
