"""A publisher of KV events on real sockets, and an indexer to query: what the tests here share."""

import asyncio
import json
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import zmq
import zmq.asyncio
from prometheus_client import CollectorRegistry

from conductor.indexer.api import Api
from conductor.indexer.contexts import Contexts
from conductor.indexer.http import IndexerServer
from conductor.indexer.metrics import IndexerCollector
from conductor.indexer.service import Indexer, Options
from conductor.indexer.source import Service, Source

SIZE = 4
SEED = 1337
DEADLINE_S = 30.0


def service(**changes: Any) -> Service:
    made = Service(
        endpoint="tcp://127.0.0.1:5557", replay_endpoint="", kind="vLLM", model="m", lora="",
        tenant="default", instance="i0", block_size=SIZE, rank=0, salt="", profile=None,
    )  # fmt: skip
    return msgspec.structs.replace(made, **changes)


def source(contexts: Contexts | None = None, **changes: Any) -> Source:
    return Source(service(**changes), Contexts(SEED) if contexts is None else contexts)


def stored(
    hashes: Sequence[int], tokens: Sequence[int], parent: int | None = None, **more: Any
) -> dict[str, Any]:
    """An event as vLLM 0.32 spells it."""
    return {
        "type": "BlockStored", "block_hashes": list(hashes), "parent_block_hash": parent,
        "token_ids": list(tokens), "block_size": SIZE, "lora_id": None, "medium": "GPU", "lora_name": None,
        **more,
    }  # fmt: skip


def removed(hashes: Sequence[int], **more: Any) -> dict[str, Any]:
    return {"type": "BlockRemoved", "block_hashes": list(hashes), "medium": "GPU", **more}


CLEARED = {"type": "AllBlocksCleared"}


def batch(*events: Any) -> bytes:
    return msgspec.msgpack.encode([1.0, list(events), 0])


class Publisher:
    """PUB and ROUTER as vLLM's, with a memory of `kept` messages."""

    def __init__(self, kept: int = 100, ports: tuple[int, int] = (0, 0)) -> None:
        self._context = zmq.asyncio.Context()
        self._pub = self._context.socket(zmq.PUB)
        self._router = self._context.socket(zmq.ROUTER)
        self.ports = tuple(
            self._bind(socket, port) for socket, port in zip((self._pub, self._router), ports, strict=True)
        )
        self.seq = 0
        self._kept: deque[tuple[int, bytes]] = deque(maxlen=kept)
        self._task = asyncio.create_task(self._repeat())

    @staticmethod
    def _bind(socket: Any, port: int) -> int:
        socket.setsockopt(zmq.LINGER, 0)
        socket.bind(f"tcp://127.0.0.1:{port or '*'}")
        return int(socket.getsockopt_string(zmq.LAST_ENDPOINT).rpartition(":")[2])

    @property
    def endpoint(self) -> str:
        return f"tcp://127.0.0.1:{self.ports[0]}"

    @property
    def replay(self) -> str:
        return f"tcp://127.0.0.1:{self.ports[1]}"

    async def publish(self, *events: Any) -> None:
        await self._pub.send_multipart([b"", self.seq.to_bytes(8, "big"), batch(*events)])
        self.lose(*events)

    def lose(self, *events: Any) -> None:
        """Keep a message that no subscriber gets."""
        self._kept.append((self.seq, batch(*events)))
        self.seq += 1

    async def _repeat(self) -> None:
        while True:
            who, _, start = await self._router.recv_multipart()
            for seq, payload in list(self._kept):
                if seq >= int.from_bytes(start, "big"):
                    await self._router.send_multipart([who, b"", b"", seq.to_bytes(8, "big"), payload])
            await self._router.send_multipart([who, b"", b"", b"\xff" * 8, b""])

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._context.destroy(linger=0)


class Site:
    """An indexer with its HTTP server; to be made on a running loop."""

    def __init__(self, api_key: str = "", **options: Any) -> None:
        self.indexer = Indexer(Options(**options))
        registry = CollectorRegistry()
        registry.register(IndexerCollector(self.indexer))
        self.api = Api(self.indexer, asyncio.get_running_loop(), registry)
        self.server = IndexerServer(self.api, "127.0.0.1", 0, api_key)
        self.url = self.server.start()

    async def close(self) -> None:
        await self.server.close()
        await self.indexer.close()

    async def send(
        self, path: str, body: Any = None, headers: dict[str, str] | None = None, raw: bytes | None = None
    ) -> tuple[int, Any]:
        """Return status and decoded body of a request in JSON; a GET without a body."""
        return await asyncio.to_thread(send, self.url + path, body, headers, raw)

    async def pack(self, path: str, body: Any) -> tuple[int, Any]:
        """The same in msgpack."""
        data = msgspec.msgpack.encode(body)
        status, answer = await asyncio.to_thread(
            send, self.url + path, None, {"Content-Type": "application/msgpack"}, data, True
        )
        return status, msgspec.msgpack.decode(answer)

    async def query(self, tokens: Sequence[int], **more: Any) -> dict[str, Any]:
        """Return the answer's instances, in the words of generation 2."""
        body = {"model": "m", "block_size": SIZE, "token_ids": list(tokens), **more}
        status, answer = await self.send("/query?generation=2", body)
        assert status == 200, answer
        return answer["instances"]

    async def longest(self, tokens: Sequence[int], instance: str = "i0", **more: Any) -> int:
        found = await self.query(tokens, **more)
        return found.get(instance, {"longest_matched": -1})["longest_matched"]

    async def state(self) -> dict[str, Any]:
        """Return the one registration, as /services shows it."""
        _, answer = await self.send("/services")
        (one,) = answer["services"]
        return one

    async def until(self, what: Callable[[], Any]) -> None:
        """Wait for what a coroutine function returns to be true."""
        async with asyncio.timeout(DEADLINE_S):
            while not await what():  # noqa: ASYNC110 -- told over sockets
                await asyncio.sleep(0.01)


def send(
    url: str,
    body: Any = None,
    headers: dict[str, str] | None = None,
    raw: bytes | None = None,
    packed: bool = False,
) -> tuple[int, Any]:
    data = raw if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json", **(headers or {})})
    try:
        with urllib.request.urlopen(request, timeout=DEADLINE_S) as response:
            status, answer = response.status, response.read()
    except urllib.error.HTTPError as error:
        with error:
            status, answer = error.code, error.read()
    if packed:
        return status, answer
    return status, json.loads(answer) if answer[:1] in (b"{", b"[") else answer.decode()
