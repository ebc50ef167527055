"""Whom the indexer may be told to connect to: who registers a publisher must not steer it anywhere else.

A name is resolved, and its addresses checked, each time a connection is made; then the address is connected
to, not the name, so that it cannot mean another host a moment later.
"""

import asyncio
import ipaddress
import re
import socket
from collections.abc import Sequence

from mooncake.core.config import fail
from mooncake.core.errors import PeerGone, PeerTimeout, RequestError

PUBLISHERS = "127.0.0.0/8,::1/128,10.0.0.0/8,172.16.0.0/12,192.168.0.0/16,100.64.0.0/10,fc00::/7"
"""Loopback and private networks. Not in it: 169.254.169.254, where clouds hand out credentials."""
RESOLVE_S = 5.0
"""A name server that takes longer is down."""
ENDPOINT = re.compile(r"tcp://(?:\[([0-9a-fA-F:.]+)\]|([A-Za-z0-9._-]+)):([0-9]{1,5})")

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network


def networks(text: str) -> list[Network]:
    """Return the networks that a setting names.

    Raises:
        ConfigError: one is none.
    """
    try:
        return [ipaddress.ip_network(one.strip()) for one in text.split(",") if one.strip()]
    except ValueError as error:
        raise fail("publishers", text, f"{error}; write networks like 10.0.0.0/8, with commas") from None


def parse(endpoint: str, what: str) -> tuple[str, int]:
    """Return host and port.

    Raises:
        RequestError: it is not tcp://HOST:PORT.
    """
    found = ENDPOINT.fullmatch(endpoint)
    if found is None or not 0 < int(found[3]) < 1 << 16:
        raise RequestError(f"{what} {endpoint!r}: write tcp://HOST:PORT, of a host to connect to")
    return found[1] or found[2], int(found[3])


def check(endpoint: str, what: str, allowed: Sequence[Network]) -> None:
    """Refuse an endpoint that can be seen to be wrong; a name's addresses are looked at later.

    Raises:
        RequestError: it is malformed, or outside the networks of publishers.
    """
    host, _ = parse(endpoint, what)
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return
    if not _inside(address, allowed):
        raise RequestError(f"{what} {endpoint!r}: not in the networks of publishers (--publishers)")


async def resolve(endpoint: str, what: str, allowed: Sequence[Network]) -> str:
    """Return the endpoint with an address that may be connected to.

    Raises:
        RequestError: as `check`; all addresses of a name must be inside.
        PeerGone: nobody knows the name.
        PeerTimeout: no answer within RESOLVE_S.
    """
    host, port = parse(endpoint, what)
    try:
        async with asyncio.timeout(RESOLVE_S):
            found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except TimeoutError:
        raise PeerTimeout(f"{what} {endpoint!r}: its name is not resolved within {RESOLVE_S:g} s") from None
    except OSError as error:
        raise PeerGone(f"{what} {endpoint!r}: {error}") from error
    addresses = [ipaddress.ip_address(one[4][0]) for one in found]
    if not addresses or not all(_inside(one, allowed) for one in addresses):
        raise RequestError(f"{what} {endpoint!r}: not in the networks of publishers (--publishers)")
    first = addresses[0]
    return f"tcp://[{first}]:{port}" if first.version == 6 else f"tcp://{first}:{port}"


def _inside(address: Address, allowed: Sequence[Network]) -> bool:
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    return any(address.version == network.version and address in network for network in allowed)
