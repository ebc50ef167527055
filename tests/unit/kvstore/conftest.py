"""A store in another process, as an engine meets it.

One parent process imports the store once and forks a process for every store: 20 ms, not a second.
"""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from mooncake.core.messages import StoreRecord

ROOT = Path(__file__).parents[3]
PARENT = """
import asyncio, ctypes, os, signal, sys, msgspec
from kvstore.store.service import StoreService
from kvstore.store.config import StoreConfig
from mooncake.core import log

async def serve(config):
    service = StoreService(msgspec.json.decode(config, type=StoreConfig))
    record = await service.start()
    os.write(1, msgspec.json.encode(record) + b"\\n")
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    await service.run_until(stop)
    await service.close()

log.setup("store")  # stdout is for answers
for line in sys.stdin.buffer:
    if line.startswith(b"wait "):
        status = os.waitpid(int(line.split()[1]), 0)[1]
        os.write(1, b"%d\\n" % status)
    elif os.fork() == 0:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # never outlive the tests
        try:
            asyncio.run(serve(line))
        except BaseException as error:
            os.write(1, repr(error).encode() + b"\\n")  # instead of the record, that nobody waits for ever
        finally:
            os._exit(0)
"""


class Parent:
    """Starts and buries stores; one question at a time."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", PARENT],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )

    def ask(self, line: bytes) -> bytes:
        self._process.stdin.write(line + b"\n")
        self._process.stdin.flush()
        return self._process.stdout.readline()

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(timeout=10)
        self._process.stdout.close()


class StoreProcess:
    """One store; `record` is its own word."""

    def __init__(self, parent: Parent, **config) -> None:
        self._parent = parent
        self._status: int | None = None
        answer = parent.ask(msgspec.json.encode(config))
        if not answer.startswith(b"{"):
            pytest.fail(f"the store did not start: {answer.decode()}")
        self.record = msgspec.json.decode(answer, type=StoreRecord)

    def signal(self, number: int) -> None:
        os.kill(self.record.pid, number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        self._bury()

    def stop(self) -> int:
        """Stop politely; returns the exit status."""
        if self._status is None:
            with contextlib.suppress(ProcessLookupError):
                self.signal(signal.SIGCONT)
                self.signal(signal.SIGTERM)
        return self._bury()

    def _bury(self) -> int:
        if self._status is None:
            self._status = int(self._parent.ask(b"wait %d" % self.record.pid))
        return self._status


@pytest.fixture(scope="session")
def store_parent():
    parent = Parent()
    yield parent
    parent.close()


@pytest.fixture(scope="module")
def shared_store(store_parent, tmp_path_factory):
    """One healthy store for many tests; each uses its own keys and writers."""
    run_dir = str(tmp_path_factory.mktemp("run"))
    store = StoreProcess(store_parent, node="shared", capacity_bytes=64 << 20, run_dir=run_dir)
    yield store
    assert store.stop() == 0


@pytest.fixture
def start_store(store_parent, tmp_path):
    stores = []

    def start(**config) -> StoreProcess:
        defaults = {"node": "n1", "capacity_bytes": 8 << 20, "run_dir": str(tmp_path / "run")}
        stores.append(StoreProcess(store_parent, **{**defaults, **config}))
        return stores[-1]

    yield start
    for store in stores:
        store.stop()
