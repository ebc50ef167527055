"""Hand a segment's memfd to processes of the same user on the same host (DESIGN 7, shm).

The socket file lies in a private directory (0700) and is 0600 itself; both ends also ask the kernel
who the other is (SO_PEERCRED). One connection = one message = one descriptor, then end of file.
"""

import asyncio
import contextlib
import os
import socket
import stat
import struct
import time
from pathlib import Path

import msgspec
import structlog

from mooncake.core import wire
from mooncake.core.errors import ConfigError, PeerGone, PeerTimeout, ProtocolError
from transfer.segment import Progress, Segment

log = structlog.get_logger(__name__)

BACKLOG = 16
"""Peers that may knock at once: the engines of one host."""
PATH_BYTES_MAX = 107
"""sun_path of a unix socket, less its NUL."""
NOTE_BYTES_MAX = 2048
"""A store's record is about 300 bytes."""
HANDOVER_BYTES_MAX = NOTE_BYTES_MAX + 1024

_UCRED = struct.Struct("3i")


class Handover(msgspec.Struct, frozen=True, array_like=True, tag="fd"):
    """Travels with the descriptor; `note` is the owner's, for a store its encoded StoreRecord."""

    name: str
    size_bytes: int
    note: bytes = b""


def private_dir(path: str | Path) -> Path:
    """Return `path` as a directory that only this user may enter, made if it is missing.

    Raises:
        ConfigError: it exists and belongs to somebody else, is open to others or no directory.
    """
    directory = Path(path)
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    info = directory.lstat()
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.getuid() or info.st_mode & 0o077:
        raise ConfigError(f"run_dir {str(directory)!r} must be a directory of yours with mode 0700")
    return directory


def peer_uid(connection: socket.socket) -> int:
    """Return the user id of the process at the other end, as the kernel saw it connect."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    return int(_UCRED.unpack(raw)[1])


class FdServer:
    """Gives `segment` to every same-user peer that connects to `path`."""

    def __init__(self, path: str | Path, segment: Segment, note: bytes = b"") -> None:
        """Bind at once; `path`'s directory becomes private. `note` goes to every peer (Segment.note).

        Raises:
            ConfigError: the path is too long, not private, or a living server sits there.
        """
        self.path = Path(path)
        if len(os.fsencode(self.path)) > PATH_BYTES_MAX:
            raise ConfigError(
                f"socket path {str(self.path)!r} exceeds {PATH_BYTES_MAX} bytes: shorten run_dir"
            )
        if len(note) > NOTE_BYTES_MAX:
            raise ConfigError(f"a note of {len(note)} bytes exceeds {NOTE_BYTES_MAX}")
        private_dir(self.path.parent)
        self._segment = segment
        self._note = note
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            _remove_stale(self.path)
            self._socket.bind(str(self.path))
            self.path.chmod(0o600)
            self._socket.listen(BACKLOG)
        except BaseException:
            self._socket.close()
            raise
        self._socket.setblocking(False)
        self._inode = self.path.stat().st_ino
        self.task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to serve on the running loop; watch `task` to learn of its death."""
        self.task = asyncio.create_task(self._serve(), name=f"fd server {self.path}")

    async def close(self) -> None:
        """Stop and remove the socket file, unless a successor has already replaced it."""
        if self.task:
            self.task.cancel()
            await asyncio.gather(self.task, return_exceptions=True)
        self._socket.close()
        with contextlib.suppress(FileNotFoundError):
            if self.path.stat().st_ino == self._inode:
                self.path.unlink()

    async def _serve(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            connection, _ = await loop.sock_accept(self._socket)
            with connection, contextlib.suppress(OSError):  # a peer that left is its own problem
                self._hand_over(connection)

    def _hand_over(self, connection: socket.socket) -> None:
        uid = peer_uid(connection)
        if uid != os.getuid():
            log.warning("fd.refused", path=str(self.path), peer_uid=uid)
            return
        message = wire.encode(Handover(self._segment.name, self._segment.size_bytes, self._note))
        # one small packet into an empty socket buffer: this never blocks
        socket.send_fds(connection, [message], [self._segment.fd])


def fetch_segment(
    path: str | Path, deadline_s: float, *, touch: bool = True, progress: Progress | None = None
) -> Segment:
    """Fetch and map the segment that is served at `path`.

    Args:
        path: socket of an FdServer on this host.
        deadline_s: for the hand-over; touching the mapped pages (about 0.1 s per GiB) comes on top.
        touch: see Segment.attach.
        progress: see Segment.attach.

    Raises:
        PeerTimeout: no descriptor within `deadline_s`.
        PeerGone: nobody serves there, or the server refused us.
        ProtocolError: the server runs as another user, or sent something else than a segment.
    """
    end_s = time.monotonic() + deadline_s
    fds: list[int] = []
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            connection.settimeout(max(deadline_s, 1e-3))
            connection.connect(str(path))
            if (uid := peer_uid(connection)) != os.getuid():
                raise ProtocolError(f"{path} is served by user {uid}, not by us")
            connection.settimeout(max(end_s - time.monotonic(), 1e-3))
            data, fds, _, _ = socket.recv_fds(connection, HANDOVER_BYTES_MAX, 1)
    except TimeoutError:
        raise PeerTimeout(f"{path}: no segment within {deadline_s:g} s") from None
    except OSError as error:
        raise PeerGone(f"{path}: {error}") from error
    if len(fds) != 1:
        for fd in fds:
            os.close(fd)
        raise PeerGone(f"{path}: the server closed without a descriptor")
    os.set_inheritable(fds[0], False)
    try:
        handover = wire.decode(data, Handover)
    except ProtocolError:
        os.close(fds[0])
        raise
    segment = Segment.attach(fds[0], handover.name, touch=touch, progress=progress)
    if segment.size_bytes != handover.size_bytes:
        segment.close()
        raise ProtocolError(f"{path}: announced {handover.size_bytes} bytes, sent {segment.size_bytes}")
    segment.note = handover.note
    return segment


def _remove_stale(path: Path) -> None:
    """Remove the socket file of a server that died without its close."""
    if not path.is_socket():
        return  # absent, or not ours to remove: bind will say so
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
        probe.settimeout(0.2)
        try:
            probe.connect(str(path))
        except OSError:
            path.unlink(missing_ok=True)
            return
    raise ConfigError(f"{str(path)!r} is served by a living process: is another store of that name running?")
