"""Bytes and messages over a connected stream socket, plain or TLS, with deadlines.

Sockets stay blocking and the kernel ends a wait after TICK_S: no poll per operation, MSG_WAITALL works,
and a cancelled or overdue transfer is noticed within a tick.
"""

import contextlib
import errno
import socket
import ssl
import struct
import time
from collections.abc import Callable, Sequence
from typing import Any

from mooncake.core import wire
from mooncake.core.errors import PeerGone, PeerTimeout, ProtocolError

TICK_S = 0.25
LOOPBACK_BUFFER_BYTES = 256 << 10
"""Within one host: the bytes in between stay in the cache (a third faster than 4 MiB, twice 128 KiB).
Between hosts the kernel tunes the buffers to the link."""
SPIN_S = 100e-6
"""Waking a sleeping core takes that long in a VM, as long as a whole small transfer."""
IOVECS_MAX = 1024
"""UIO_MAXIOV."""
MESSAGE_BYTES_MAX = 8 << 20
"""A SegmentInfo of 65,536 buffers is about 5 MB."""
KEEPALIVE_S = 10

_LENGTH = struct.Struct("<I")

Check = Callable[[], None]
"""Called after every tick without progress; raises to give up."""


def tune(sock: socket.socket, *, buffers: bool = False) -> None:
    """Set what every connection of the engine wants: no delay, notice of dead hosts, ticks."""
    if sock.family != socket.AF_UNIX:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
    if buffers and sock.getpeername()[0] == sock.getsockname()[0]:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, LOOPBACK_BUFFER_BYTES)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, LOOPBACK_BUFFER_BYTES)
    if isinstance(sock, ssl.SSLSocket):
        sock.settimeout(TICK_S)
        return
    sock.settimeout(None)
    tick = struct.pack("ll", 0, int(TICK_S * 1e6))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, tick)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, tick)


def hang_up(sock: socket.socket) -> None:
    """End both directions: whoever is blocked in `sock` is woken. Close it afterwards."""
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


def recv_into(sock: socket.socket, view: memoryview, check: Check) -> None:
    """Fill `view`.

    Raises:
        PeerGone: the connection ended before.
        Whatever `check` raises.
    """
    flags = 0 if isinstance(sock, ssl.SSLSocket) else socket.MSG_WAITALL
    while view:
        try:
            got = sock.recv_into(view, 0, flags)
        except (BlockingIOError, TimeoutError):
            check()
            continue
        except OSError as error:
            raise PeerGone(f"connection lost: {error}") from error
        if got == 0:
            raise PeerGone("connection closed by the peer")
        if got == len(view):
            return
        view = view[got:]


def recv_soon(sock: socket.socket, view: memoryview, check: Check) -> None:
    """As recv_into on a plain socket, for what is about to come: look for SPIN_S before sleeping."""
    end_s = time.perf_counter() + SPIN_S
    while True:
        try:
            got = sock.recv_into(view, 0, socket.MSG_DONTWAIT)
        except BlockingIOError:
            if time.perf_counter() < end_s:
                continue
            break
        except OSError as error:
            raise PeerGone(f"connection lost: {error}") from error
        if got == len(view):
            return
        if got == 0:
            raise PeerGone("connection closed by the peer")
        view = view[got:]
        break
    recv_into(sock, view, check)


def recv_views(sock: socket.socket, views: Sequence[memoryview], check: Check) -> None:
    """Fill all `views` in order, scattering in the kernel; raises as recv_into."""
    if len(views) == 1 or isinstance(sock, ssl.SSLSocket):
        for view in views:
            recv_into(sock, view, check)
        return
    rest = list(views)
    while rest:
        try:
            got, _, _, _ = sock.recvmsg_into(rest[:IOVECS_MAX], 0, socket.MSG_WAITALL)
        except BlockingIOError:
            check()
            continue
        except OSError as error:
            raise PeerGone(f"connection lost: {error}") from error
        if got == 0:
            raise PeerGone("connection closed by the peer")
        rest = _after(rest, got)


def send_views(sock: socket.socket, views: Sequence[memoryview | bytes], check: Check) -> None:
    """Send all `views`; raises as recv_into."""
    rest: list[memoryview | bytes] = list(views)
    tls = isinstance(sock, ssl.SSLSocket)
    while rest:
        try:
            sent = sock.send(rest[0]) if tls else sock.sendmsg(rest[:IOVECS_MAX])
        except (BlockingIOError, TimeoutError):
            check()
            continue
        except OSError as error:
            raise PeerGone(f"connection lost: {error}") from error
        rest = _after(rest, sent)


def _after(views: list[Any], done_bytes: int) -> list[Any]:
    """Return what is left of `views` once their first `done_bytes` bytes are done."""
    for at, view in enumerate(views):
        size = len(view)
        if done_bytes < size:
            return [memoryview(view)[done_bytes:], *views[at + 1 :]] if done_bytes else views[at:]
        done_bytes -= size
    return []


def send_now(sock: socket.socket, views: Sequence[memoryview | bytes], size_bytes: int, check: Check) -> None:
    """As send_views, for `size_bytes` that mostly go at once, over a plain socket."""
    try:
        sent = sock.sendmsg(views)
    except BlockingIOError:
        sent = 0
    except OSError as error:
        raise PeerGone(f"connection lost: {error}") from error
    if sent != size_bytes:
        send_views(sock, _after(list(views), sent), check)


class Stall:
    """A check that gives a peer `limit_s` without progress; `begin` anew for every frame."""

    def __init__(self, what: str, limit_s: float) -> None:
        """`what` names the peer."""
        self._what = what
        self._limit_s = limit_s
        self._end_s = 0.0

    def begin(self) -> None:
        """Start anew."""
        self._end_s = 0.0

    def __call__(self) -> None:
        """Raise PeerTimeout once the limit has passed."""
        now_s = time.monotonic()
        if not self._end_s:
            self._end_s = now_s + self._limit_s - TICK_S  # one tick has passed already
        elif now_s >= self._end_s:
            raise PeerTimeout(f"{self._what}: no progress for {self._limit_s:g} s")


def until(end_s: float, what: str) -> Check:
    """Return a check that raises PeerTimeout after `end_s` (time.monotonic)."""

    def check() -> None:
        if time.monotonic() >= end_s:
            raise PeerTimeout(f"{what}: no progress before the deadline")

    return check


def send_message(sock: socket.socket, message: Any, check: Check) -> None:
    """Send one framed message; raises as recv_into."""
    data = wire.encode(message)
    send_views(sock, [_LENGTH.pack(len(data)) + data], check)


def recv_message(sock: socket.socket, kind: Any, check: Check, bytes_max: int = MESSAGE_BYTES_MAX) -> Any:
    """Receive one framed message of type `kind` (or a union).

    Raises:
        ProtocolError: too long, or not such a message.
        PeerGone: the connection ended; whatever `check` raises.
    """
    head = bytearray(_LENGTH.size)
    recv_into(sock, memoryview(head), check)
    (size,) = _LENGTH.unpack(head)
    if size > bytes_max:
        raise ProtocolError(f"a message of {size} bytes exceeds {bytes_max}")
    data = bytearray(size)
    recv_into(sock, memoryview(data), check)
    return wire.decode(bytes(data), kind)


def connect(address: tuple[str, int] | str, deadline_s: float) -> socket.socket:
    """Return a connected socket: TCP for (host, port), unix for a path.

    Raises:
        PeerTimeout: no answer within `deadline_s`.
        PeerGone: nobody listens there, or the name has no address.
    """
    what = address if isinstance(address, str) else f"{address[0]}:{address[1]}"
    try:
        if isinstance(address, str):
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                sock.settimeout(deadline_s)
                sock.connect(address)
            except BaseException:
                sock.close()
                raise
            return sock
        return socket.create_connection(address, timeout=max(deadline_s, 1e-3))
    except TimeoutError:
        raise PeerTimeout(f"{what}: no connection within {deadline_s:g} s") from None
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            raise PeerGone(f"{what}: out of file descriptors here (ulimit -n): {error}") from error
        raise PeerGone(f"{what}: {error}") from error
