"""One TCP port for several gateway processes of one host (SO_REUSEPORT).

Linux deals new connections out over all sockets that listen on the port with SO_REUSEPORT. It lets any
process of the same user join in, a second `mooncake up` by mistake among them. So the parent of the
gateways holds the port first: `Held` takes it as its only owner, or fails, and only then opens it to
sockets with SO_REUSEPORT; whoever else tries to hold it is refused for as long as the parent lives.
"""

import errno
import socket
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Self

from mooncake.core.config import fail
from mooncake.core.errors import ConfigError

ADDRESSES_MAX = 16
"""What one name resolves to: `localhost` has two."""
NOT_HERE = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
"""A name may have an IPv6 address on a machine without IPv6."""


class Held:
    """A port that is ours; nothing listens on it yet. `close`, or the end of this process, frees it."""

    def __init__(self, host: str, port: int) -> None:
        """Take `port` on every address of `host`.

        Raises:
            ConfigError: it is in use, or not ours to bind.
        """
        self._sockets: list[socket.socket] = []
        try:
            for one in _sockets(host, port):
                self._sockets.append(one)
                one.listen(1)  # fails if anybody holds or serves it; a mere bind may not
                # from now on others need SO_REUSEPORT, whatever else they set
                one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
                one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
                one.shutdown(socket.SHUT_RD)  # bound still, but it gets no connections
        except OSError as error:
            self.close()
            raise _taken(host, port, error) from error

    def close(self) -> None:
        """Free the port (idempotent)."""
        for one in self._sockets:
            one.close()
        self._sockets.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def check_port(host: str, port: int) -> None:
    """Raise if nobody could serve on `port` now, before minutes of loading.

    Raises:
        ConfigError: it is in use, or not ours to bind.
    """
    Held(host, port).close()


def join(host: str, port: int) -> list[socket.socket]:
    """Return sockets, bound and not listening yet, that share `port` with those of our siblings.

    Raises:
        ConfigError: somebody who does not share it has it.
    """
    joined: list[socket.socket] = []
    try:
        joined.extend(_sockets(host, port, socket.SO_REUSEPORT))
    except OSError as error:
        for one in joined:
            one.close()
        raise _taken(host, port, error) from error
    return joined


def _sockets(host: str, port: int, *options: int) -> Iterator[socket.socket]:
    """Give a bound socket for each address of `host` that this machine has."""
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise fail("host", host, f"is no address of this machine ({error.strerror})") from error
    missing, given = None, 0
    for family, kind, protocol, _, address in dict.fromkeys(found[:ADDRESSES_MAX]):
        try:
            one = _bound(family, kind, protocol, address, options)
        except OSError as error:
            if error.errno not in NOT_HERE:
                raise
            missing = error
            continue
        given += 1
        yield one
    if missing is not None and not given:
        raise missing


def _bound(family: int, kind: int, protocol: int, address: Any, options: tuple[int, ...]) -> socket.socket:
    one = socket.socket(family, kind, protocol)
    try:
        for option in (socket.SO_REUSEADDR, *options):  # past connections in TIME_WAIT are no obstacle
            one.setsockopt(socket.SOL_SOCKET, option, 1)
        if family == socket.AF_INET6:
            one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        one.bind(address)
    except BaseException:
        one.close()
        raise
    return one


def _taken(host: str, port: int, error: OSError) -> ConfigError:
    return ConfigError(f"port = {port}: cannot bind {host}:{port} ({error.strerror}); use --port")
