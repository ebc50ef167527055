"""A pool of real processes: metadata, stores, directories; each can be killed and stopped."""

import asyncio
import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from hashlib import sha256, shake_256
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from kvstore.directory.messages import DIRECTORIES_PREFIX, DirectoryRecord
from kvstore.engine.client import PoolClient
from mooncake.core.errors import MooncakeError
from mooncake.core.keys import block_checksum
from mooncake.core.messages import STORES_PREFIX, StoreRecord
from mooncake.core.metadata_open import open_metadata
from mooncake.core.process import set_parent_death_signal
from mooncake.pool_admin import PoolAdmin

MOONCAKE = str(Path(sys.executable).parent / "mooncake")
WAIT_S = 90.0
"""For everything that may take long on a busy machine; nothing here is judged by its time."""
CALL_S = 20.0
METADATA = """
import asyncio
from mooncake.core.metadata_client import MetadataServer

async def main():
    server = MetadataServer("tcp://127.0.0.1:*")
    server.start()
    print(server.endpoint, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""

T = TypeVar("T")
Record = TypeVar("Record", StoreRecord, DirectoryRecord)


def key(number: int) -> bytes:
    return sha256(b"%d" % number).digest()


def content(one: bytes, size_bytes: int) -> bytes:
    """What lies under a key: no two keys have the same, and no part of it comes twice."""
    return shake_256(one).digest(size_bytes)


def until(condition: Callable[[], T], wait_s: float = WAIT_S, every_s: float = 0.05) -> T:
    """Return the first true value of `condition`; an error of ours counts as false."""
    end_s = time.monotonic() + wait_s
    last: object = None
    while time.monotonic() < end_s:
        try:
            value = condition()
        except MooncakeError as error:
            last = error
        else:
            if value:
                return value
            last = value
        time.sleep(every_s)
    raise AssertionError(f"not within {wait_s:g} s; last: {last!r}")


class PoolProcesses:
    """Started in a folder, ended by `close`."""

    def __init__(self, folder: Path, metadata: str = "") -> None:
        """`metadata`: an address; "" = one of our own."""
        self.folder = folder
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self.metadata = metadata or self._own_metadata()

    def _own_metadata(self) -> str:
        process = self._spawn("metadata", [sys.executable, "-c", METADATA], stdout=subprocess.PIPE)
        assert process.stdout
        return process.stdout.readline().decode().strip()

    def store(self, node: str, capacity: str = "64MiB") -> StoreRecord:
        """Start a store that is open to the others; return once it is registered."""
        pid = self._mooncake(
            *(node, "store", "--node", node, "--capacity", capacity, "--transfer", "127.0.0.1:0"),
            *("--run-dir", str(self.folder / f"run-{node}")),
        )
        return until(lambda: self._registered(node, StoreRecord, pid))

    def directory(self, name: str) -> DirectoryRecord:
        """Start a directory; return once it is registered."""
        pid = self._mooncake(name, "directory", "--name", name)
        return until(lambda: self._registered(name, DirectoryRecord, pid))

    def _registered(self, name: str, kind: type[Record], pid: int) -> Record | None:
        assert self._processes[name].poll() is None, f"{name} has ended: {self.log_tail(name)}"
        return next((record for record in self.records(kind) if record.pid == pid), None)

    def records(self, kind: type[Record]) -> list[Record]:
        """Return what is registered now."""
        prefix = STORES_PREFIX if kind is StoreRecord else DIRECTORIES_PREFIX
        return [msgspec.json.decode(value, type=kind) for value in asyncio.run(self._values(prefix))]

    async def _values(self, prefix: str) -> list[bytes]:
        store = open_metadata(self.metadata)
        try:
            return [entry.value for entry in (await store.get(prefix)).entries]
        finally:
            await store.close()

    def _mooncake(self, name: str, *words: str) -> int:
        return self._spawn(name, [MOONCAKE, *words, "--metadata", self.metadata]).pid

    def _spawn(self, name: str, command: list[str], **kwargs: Any) -> subprocess.Popen[bytes]:
        with (self.folder / f"{name}.log").open("ab") as output:
            process = self._processes[name] = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stderr=output,
                start_new_session=True,
                preexec_fn=functools.partial(set_parent_death_signal, os.getpid()),  # noqa: PLW1509
                **kwargs,
            )
        return process

    # ------------------------------------------------------------ faults

    def signal(self, name: str, number: int) -> None:
        """Send a signal to a process."""
        os.killpg(self._processes[name].pid, number)

    def kill(self, name: str) -> None:
        """End a process as a power cut would."""
        self.signal(name, signal.SIGKILL)
        self._end(name)

    def stop(self, name: str) -> int:
        """End a process politely; return its exit code."""
        self.signal(name, signal.SIGTERM)
        return self._end(name)

    def _end(self, name: str) -> int:
        process = self._processes.pop(name)
        code = process.wait(WAIT_S)
        if process.stdout:
            process.stdout.close()
        return code

    def close(self) -> None:
        """Kill what still runs."""
        for name in list(self._processes):
            self.kill(name)

    # ------------------------------------------------------------ use

    def admin(self, *names: str) -> PoolAdmin:
        """Return a client of the directories (of these alone), once they have registered."""
        found = [r.admin_url for r in self.records(DirectoryRecord) if not names or r.name in names]
        assert found
        return PoolAdmin(found, elected_s=WAIT_S)

    def leader(self) -> str:
        """Return the name of the directory that leads, by its own word."""
        for record in self.records(DirectoryRecord):
            try:
                if PoolAdmin([record.admin_url]).get("/health")["leads"]:
                    return record.name
            except MooncakeError:
                continue  # it has just died
        return ""

    def wait_exact(self, admin: PoolAdmin, entries: int | None = None) -> dict[str, Any]:
        """Wait until a directory is in step (and has so many entries)."""

        def exact() -> dict[str, Any] | None:
            health: dict[str, Any] = admin.get("/health")
            return health if health["healthy"] and entries in (None, health["entries"]) else None

        found = until(exact)
        assert found
        return found

    def put(self, record: StoreRecord, keys: Sequence[bytes], size_bytes: int, batch: int = 500) -> None:
        """Write blocks through the store's memory, as an engine does."""
        client = PoolClient(record, "test-writer")
        try:
            for start in range(0, len(keys), batch):
                slots = client.reserve(keys[start : start + batch], size_bytes, CALL_S)
                assert None not in slots
                for slot in slots:
                    assert slot
                    slot.view[:] = content(slot.key, size_bytes)
                sums = [block_checksum(slot.key, slot.view) for slot in slots if slot]
                assert all(client.commit([slot.ticket for slot in slots if slot], sums, CALL_S))
        finally:
            client.close()

    def read(
        self, record: StoreRecord, keys: Sequence[bytes], size_bytes: int, batch: int = 100
    ) -> list[bytes]:
        """Return those of `keys` that the store has, after comparing every byte."""
        client = PoolClient(record, "test-reader", touch=False)
        found: list[bytes] = []
        at = 0
        try:
            while at < len(keys):
                lease = client.acquire(keys[at : at + batch], CALL_S, 0.0, CALL_S)
                for index, one in enumerate(lease.keys[: len(lease)]):
                    assert lease.verify(index)
                    assert bytes(lease.views[index]) == content(one, size_bytes)
                    found.append(one)
                if len(lease):
                    client.release(lease.lease_id)
                at += max(1, len(lease))  # a lease ends before the first one that is missing
        finally:
            client.close()
        return found

    def log_tail(self, name: str) -> str:
        """Return the last lines that a process wrote."""
        return "\n".join((self.folder / f"{name}.log").read_text().splitlines()[-20:])
