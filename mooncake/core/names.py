"""Host names to addresses, asked in threads that the end of a process does not wait for.

A name server that is away is silent: 10 s for each question and each search domain, of which a pod has three.
asyncio and uvloop ask in threads that are joined when the process ends, and uvloop (libuv) asks everything
first that is queued: a gateway that cannot find etcd would outlast the grace of its pod and be killed.
"""

import asyncio
import contextlib
import socket
import threading
from collections.abc import Callable
from typing import Any

AddressInfo = tuple[int, int, int, str, Any]
"""As `socket.getaddrinfo` has it: family, kind, protocol, canonical name, address."""


async def address_infos(host: str, port: int) -> list[AddressInfo]:
    """Return the addresses of a TCP port by name. The caller bounds the time and the number of questions.

    Raises:
        OSError: the name is unknown, or nobody knows names now.
        UnicodeError: it cannot be a name.
    """
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[list[AddressInfo]] = loop.create_future()

    def take(setter: Callable[[Any], None], value: Any) -> None:
        if not answer.done():  # its asker has not left
            setter(value)

    def ask() -> None:
        setter: Callable[[Any], None] = answer.set_result
        found: Any
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            setter, found = answer.set_exception, error
        with contextlib.suppress(RuntimeError):  # the loop has been closed meanwhile
            loop.call_soon_threadsafe(take, setter, found)

    threading.Thread(target=ask, name=f"name {host}", daemon=True).start()
    return await answer
