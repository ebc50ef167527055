"""Host names of etcd servers to addresses: one question at a time per name, however many wait for it.

A name server that is away is silent for 5 s and more, while a call waits one second and is tried
again: each try with a question of its own would fill the few threads that the process has for
names. And uvloop's own connecting leaves behind a question whose asker is gone; when it fails at
last, nobody takes its error, and the event loop reports that on each occasion.
"""

import asyncio
import ipaddress
from functools import partial

from mooncake.core.errors import PeerGone
from mooncake.core.metadata_etcd_options import Endpoint
from mooncake.core.names import AddressInfo, address_infos


class Names:
    """Questions of one client, which are bounded by its endpoints."""

    def __init__(self) -> None:
        """Nothing is asked yet."""
        self._asking: dict[Endpoint, asyncio.Task[list[AddressInfo]]] = {}

    async def addresses(self, endpoint: Endpoint) -> list[str]:
        """Return where a server may be, at least one address. The caller bounds the time.

        Raises:
            PeerGone: the name is unknown, or nobody knows names now.
        """
        if _is_address(endpoint.host):
            return [endpoint.host]
        asking = self._asking.get(endpoint)
        if asking is None:
            asking = asyncio.create_task(address_infos(endpoint.host, endpoint.port))
            self._asking[endpoint] = asking
            asking.add_done_callback(partial(self._answered, endpoint))
        await asyncio.wait({asking})  # not `await asking`: who gives up would end it for all
        try:
            found = asking.result()
        except (OSError, UnicodeError, asyncio.CancelledError) as error:
            raise PeerGone(f"etcd server {endpoint}: no address for this name: {error!r}") from error
        return list(dict.fromkeys(address[0] for *_, address in found))

    async def close(self) -> None:
        """Give up what is being asked."""
        asking = list(self._asking.values())
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)

    def _answered(self, endpoint: Endpoint, asking: "asyncio.Task[list[AddressInfo]]") -> None:
        self._asking.pop(endpoint, None)
        if not asking.cancelled():
            asking.exception()  # taken, although everybody may have left


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
