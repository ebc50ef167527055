"""The kube-proxy: connections to a Service's address and port go to one of its ready pods.

As with the real one, whoever is connected stays connected when a pod leaves the Service; a change reaches
the proxy a little later than the pod itself learns of it (`lag_s`); nobody is tried in place of who refuses.
"""

import asyncio
import contextlib
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from tests.kube.standin import endpoints
from tests.kube.standin.sandbox import run
from tests.kube.standin.store import ObjectStore

CHUNK_BYTES = 1 << 16
CONNECT_S = 10.0
BACKLOG = 512
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close sends a reset

Where = tuple[str, str, int]  # namespace, service, port


@dataclass(frozen=True)
class Published:
    """A socket on the machine's own network that leads to a Service, as a load balancer's."""

    listener: socket.socket
    where: Where


class Proxy:
    """Listens for all Services."""

    def __init__(self, store: ObjectStore, published: Sequence[Published] = (), lag_s: float = 0.0) -> None:
        self._store, self._published, self._lag_s = store, published, lag_s
        self._known: dict[Where, tuple[tuple[str, int], ...]] = {}
        self._serving: dict[Where, tuple[tuple[str, int], ...]] = {}
        self._turns: dict[Where, int] = {}
        self._servers: dict[tuple[str, int], asyncio.Server] = {}
        self._addresses: set[str] = set()
        self._pumps: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Follow Services and pods, until cancelled."""
        watch = self._store.watch()
        try:
            for one in self._published:
                await self._listen(one.where, one.listener)
            while True:
                await self._look()
                await watch.queue.get()
                while not watch.queue.empty():
                    watch.queue.get_nowait()
        finally:
            self._store.unwatch(watch)
            for server in self._servers.values():
                server.close()
            for task in self._pumps:
                task.cancel()
            await asyncio.gather(*self._pumps, return_exceptions=True)

    async def _look(self) -> None:
        pods = self._store.all("pods")
        known: dict[Where, tuple[tuple[str, int], ...]] = {}
        for service in self._store.all("services"):
            meta, address = service["metadata"], service["spec"].get("clusterIP", "None")
            for port in endpoints.ports(service, pods):
                where = (meta["namespace"], meta["name"], port.port)
                known[where] = port.backends
                if address != "None" and (address, port.port) not in self._servers:
                    await self._open(where, address, port.port)
        if known != self._known:
            self._known = known
            asyncio.get_running_loop().call_later(self._lag_s, setattr, self, "_serving", known)

    async def _open(self, where: Where, address: str, port: int) -> None:
        if address not in self._addresses:
            await run("ip", "addr", "add", f"{address}/32", "dev", "lo")
            self._addresses.add(address)
        listener = socket.create_server((address, port), backlog=BACKLOG)
        await self._listen(where, listener)

    async def _listen(self, where: Where, listener: socket.socket) -> None:
        def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.create_task(self._serve(where, reader, writer))
            self._pumps.add(task)
            task.add_done_callback(self._pumps.discard)

        name = listener.getsockname()
        self._servers[name[0], name[1]] = await asyncio.start_server(accepted, sock=listener, backlog=BACKLOG)

    def _pick(self, where: Where) -> tuple[str, int] | None:
        """Return whose turn it is, None if no pod is ready."""
        backends = self._serving.get(where, ())
        turn = self._turns[where] = self._turns.get(where, -1) + 1
        return backends[turn % len(backends)] if backends else None

    async def _serve(self, where: Where, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        backend = self._pick(where)
        try:
            if backend is None:
                raise ConnectionRefusedError(f"no pod of {where[1]} is ready")
            async with asyncio.timeout(CONNECT_S):
                far_reader, far_writer = await asyncio.open_connection(*backend)
        except (OSError, TimeoutError):
            _reset(writer)
            return
        try:
            await asyncio.gather(_pump(reader, far_writer), _pump(far_reader, writer))
        except OSError:
            _reset(writer)
            _reset(far_writer)
        finally:
            for one in (writer, far_writer):
                one.close()
                with contextlib.suppress(OSError):
                    await one.wait_closed()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Copy until the end, and hand on the end."""
    while chunk := await reader.read(CHUNK_BYTES):
        writer.write(chunk)
        await writer.drain()
    if writer.can_write_eof():
        writer.write_eof()


def _reset(writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        raw = writer.get_extra_info("socket")
        if raw is not None:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    writer.close()
