"""An instance's own asyncio side: what it does with an order to go before anybody knows of it."""

import asyncio
import os
from types import SimpleNamespace
from typing import Any, cast

from mooncake.core.drain import Leaving
from mooncake.core.health import Health
from mooncake.core.metadata_memory import MemoryMetadata
from mooncake.core.options import WorkerOptions
from mooncake.worker.instance import Instance


def is_told(instance: Instance) -> bool:
    """Whether the relay's loop has been told to stop."""
    os.set_blocking(instance._stop_read, False)
    try:
        return bool(os.read(instance._stop_read, 1))
    except BlockingIOError:
        return False


async def until(condition: Any) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.01)


async def test_asked_to_go_before_anybody_knows_of_it_it_is_drained_and_ends_when_it_is_told() -> None:
    metadata = MemoryMetadata()
    instance = Instance(WorkerOptions(instance_id="d0", run_dir="/nowhere", metadata="tcp://127.0.0.1:1"))
    own = cast("Any", SimpleNamespace(leaving=Leaving(Health(), 60.0)))
    engine = cast("Any", SimpleNamespace(poll=lambda: None))
    spec = cast("Any", SimpleNamespace(store=None, instance_id="d0"))
    task = asyncio.create_task(instance._register(spec, cast("Any", None), engine, metadata, own))
    try:
        await asyncio.sleep(0.1)
        assert not own.leaving.is_done
        own.leaving.ask("a pod is deleted while its engine loads")
        await until(lambda: own.leaving.is_done)
        instance._record = cast("Any", spec)
        instance._ready.set()  # too late: it does not register any more
        await asyncio.sleep(0.1)
        assert not is_told(instance), "who asked may want to see it drained"
        own.leaving.tell()
        await until(lambda: is_told(instance))
        assert (await metadata.get("/mooncake/")).entries == []
    finally:
        instance._leave.set()
        await task
        await metadata.close()
        os.close(instance._stop_read)
        os.close(instance._stop_write)
