"""`mooncake.async_store`: methods as coroutines; no cancelled call is left in the caller's memory."""

import asyncio
import inspect
import threading
from collections.abc import Iterator

import pytest

from mooncake.async_store import WORKERS, MooncakeDistributedStoreAsync
from mooncake.core.errors import RequestError
from mooncake.store import MooncakeDistributedStore

PATIENCE_S = 30.0


@pytest.fixture(scope="module")
def joined(master) -> Iterator[MooncakeDistributedStoreAsync]:
    store = MooncakeDistributedStoreAsync()
    config = {
        "local_hostname": "127.0.0.1", "metadata_server": "P2PHANDSHAKE", "global_segment_size": 8 << 20,
        "master_server_addr": master.address,
    }  # fmt: skip
    assert asyncio.run(store.async_setup(config)) == 0
    yield store
    assert asyncio.run(store.async_close()) == 0


class Slow(MooncakeDistributedStoreAsync):
    """Its get_size waits until it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.begun = threading.Semaphore(0)
        self.go = threading.Event()
        self.ended = 0

    def get_size(self, arg0: str, /) -> int:
        self.begun.release()
        assert self.go.wait(PATIENCE_S)
        self.ended += 1
        return 7

    async def wait_begun(self) -> None:
        assert await asyncio.to_thread(self.begun.acquire, timeout=PATIENCE_S)


@pytest.fixture
def slow() -> Iterator[Slow]:
    store = Slow()
    yield store
    store.go.set()
    store.close()


def test_every_method_is_there_as_a_coroutine() -> None:
    names = [name for name in dir(MooncakeDistributedStore) if not name.startswith("_")]
    for name in names:
        method = getattr(MooncakeDistributedStoreAsync, f"async_{name}")
        assert inspect.iscoroutinefunction(method)
        assert inspect.signature(method) == inspect.signature(getattr(MooncakeDistributedStore, name))
    assert not hasattr(MooncakeDistributedStoreAsync, "async_nothing")


async def test_coroutines_do_and_answer_what_the_methods_do(joined: MooncakeDistributedStoreAsync) -> None:
    assert await joined.async_put("k", b"value") == 0
    assert joined.get("k") == await joined.async_get("k") == b"value"
    assert await joined.async_get_size("missing") == -704
    assert await joined.async_remove("k", force=True) == 0
    with pytest.raises(TypeError):
        await joined.async_get(7)


async def test_many_calls_at_once_are_all_answered(joined: MooncakeDistributedStoreAsync) -> None:
    keys = [f"many/{index}" for index in range(4 * WORKERS)]
    assert await asyncio.gather(*(joined.async_put(key, key.encode()) for key in keys)) == [0] * len(keys)
    values = await asyncio.gather(*(joined.async_get(key) for key in keys))
    assert values == [key.encode() for key in keys]


async def test_a_bounded_number_of_threads_runs_calls(slow: Slow) -> None:
    calls = [asyncio.create_task(slow.async_get_size("k")) for _ in range(WORKERS + 5)]
    for _ in range(WORKERS):
        await slow.wait_begun()
    assert slow._executor._work_queue.empty()
    slow.go.set()
    assert await asyncio.gather(*calls) == [7] * (WORKERS + 5)


async def test_a_call_that_is_cancelled_before_it_begins_never_runs(slow: Slow) -> None:
    running = [asyncio.create_task(slow.async_get_size("k")) for _ in range(WORKERS)]
    for _ in range(WORKERS):
        await slow.wait_begun()
    waiting = asyncio.create_task(slow.async_get_size("k"))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    slow.go.set()
    await asyncio.gather(*running)
    assert slow.ended == WORKERS


async def test_a_cancelled_call_that_has_begun_is_waited_for(slow: Slow) -> None:
    call = asyncio.create_task(slow.async_get_size("k"))
    await slow.wait_begun()
    for _ in range(3):
        call.cancel()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert not call.done()
    slow.go.set()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert slow.ended == 1


async def test_an_error_of_a_cancelled_call_is_not_raised_later(slow: Slow) -> None:
    slow.get_size = lambda _: (slow.begun.release(), slow.go.wait(PATIENCE_S), 1 / 0)
    call = asyncio.create_task(slow.async_get_size("k"))
    await slow.wait_begun()
    call.cancel()
    await asyncio.sleep(0)
    slow.go.set()
    with pytest.raises(asyncio.CancelledError):
        await call


def test_one_store_serves_several_loops(joined: MooncakeDistributedStoreAsync) -> None:
    for turn in range(3):
        assert asyncio.run(joined.async_put(f"loop/{turn}", b"x")) == 0
    assert asyncio.run(joined.async_get_batch([f"loop/{turn}" for turn in range(3)])) == [b"x"] * 3


def test_before_setup_and_after_close_calls_are_errors(master) -> None:
    store = MooncakeDistributedStoreAsync()
    assert asyncio.run(store.async_put("k", b"v")) == -600
    with pytest.raises(RequestError, match="call setup first"):
        asyncio.run(store.async_get("k"))
    assert asyncio.run(store.async_close()) == 0
    assert asyncio.run(store.async_put("k", b"v")) == -600
    store.close()
