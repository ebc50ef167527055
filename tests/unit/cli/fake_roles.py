"""Roles that need no vLLM: they register like the real ones and do what their vllm_args say.

Arguments: die=N (exit code N at once), die-once=FILE (exit 3 unless FILE exists), stubborn.
"""

import asyncio
import http.server
import os
import signal
import sys
import threading
import time
from pathlib import Path

from mooncake.core.config import API_KEY_ENV
from mooncake.core.messages import CORES_PREFIX, GATEWAYS_PREFIX, INSTANCES_PREFIX, STORES_PREFIX
from mooncake.core.metadata_client import MetadataServer, RemoteMetadata
from mooncake.core.metadata_registration import Registration
from mooncake.core.options import GatewayOptions, StoreOptions, WorkerOptions
from mooncake.core.shared_port import join
from mooncake.up import launch

FAKE_STORE_ENV = "FAKE_STORE"


def preload() -> None:
    """Nothing to import."""


def preload_fails() -> None:
    raise ImportError("no vllm here")


def preload_starts_a_thread() -> None:
    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()


def echo(*words: object) -> int:
    """A target for the zygote: say what this process is."""
    print(*words, os.getpid() == os.getsid(0), os.environ.get("COLOUR"), flush=True)
    return 5


def sleep(*_: object) -> int:
    print("sleeping", flush=True)
    time.sleep(60)
    return 0


def crash(*_: object) -> int:
    raise RuntimeError("boom")


class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


async def _until_term() -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    await stop.wait()


async def _conductor(options: GatewayOptions) -> None:
    print("key", bool(os.environ.get(API_KEY_ENV)), "in options", bool(options.api_key), flush=True)
    server = MetadataServer(options.metadata_endpoint)
    server.start()
    web = http.server.ThreadingHTTPServer((options.host, options.port), Health)
    threading.Thread(target=web.serve_forever, daemon=True).start()
    await _until_term()
    print("conductor stops", time.monotonic(), flush=True)
    await server.close()


async def _core(options: GatewayOptions) -> None:
    server = MetadataServer(options.metadata_endpoint)
    server.start()
    await _registered(options.metadata_endpoint, CORES_PREFIX + options.name)
    await server.close()


async def _gateway(options: GatewayOptions) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n%d" % os.getpid())
        writer.close()

    assert options.share_port
    for one in join(options.host, options.port):
        await asyncio.start_server(answer, sock=one)
    await _registered(options.metadata_endpoint, GATEWAYS_PREFIX + options.name)
    print("gateway stops", time.monotonic(), flush=True)


async def _registered(endpoint: str, key: str, stubborn: bool = False) -> None:
    registration = Registration(RemoteMetadata(endpoint), key, lambda: b"%d" % os.getpid())
    registration.start()
    if stubborn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        await asyncio.sleep(60)
    await _until_term()


async def _worker(options: WorkerOptions) -> None:
    key = INSTANCES_PREFIX + options.instance_id
    await _registered(options.metadata, key, stubborn="stubborn" in options.vllm_args)
    print("worker stops", time.monotonic(), flush=True)  # the lease is left to end by itself


def run(role: str, data: bytes) -> int:
    if role == "store" and FAKE_STORE_ENV not in os.environ:
        return launch.run(role, data)
    if role == "store":
        store = StoreOptions.decoded(data)
        asyncio.run(_registered(store.metadata, STORES_PREFIX + store.node))
        return 0
    if role == "conductor":
        asyncio.run(_conductor(GatewayOptions.decoded(data)))
        return 0
    if role in ("core", "gateway"):
        front = GatewayOptions.decoded(data)
        asyncio.run(_core(front) if role == "core" else _gateway(front))
        return 0
    options = WorkerOptions.decoded(data)
    for argument in options.vllm_args:
        name, _, value = argument.partition("=")
        if name == "die":
            print("last words", flush=True)
            return int(value)
        if name == "die-once" and not Path(value).exists():
            Path(value).touch()
            return 3
    asyncio.run(_worker(options))
    return 0


if __name__ == "__main__":
    sys.exit(run(sys.argv[1], Path(sys.argv[2]).read_bytes()))
