"""`mooncake.async_store`: every method `x` of the store as a coroutine `async_x`.

Calls run in threads of the store's own, at most WORKERS at once; further ones wait in their tasks, so the
loop's default executor stays free for others.

Cancelling a call that has not begun means that it never does. One that has begun cannot be stopped, and it
may be reading or writing the caller's memory: its task waits until it has ended, which each call does
within its own deadline, and then raises CancelledError. What it did stays done.
"""

import asyncio
import functools
import threading
import weakref
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from mooncake.store import MooncakeDistributedStore

WORKERS = 32
"""As many as asyncio's default executor has at most: one call to a store that hangs takes one."""


class MooncakeDistributedStoreAsync(MooncakeDistributedStore):
    """A store whose methods are there twice: `get` waits, `await async_get` does not. Any loop may use it."""

    def __init__(self) -> None:
        """Open nothing; `setup` or `async_setup` does."""
        super().__init__()
        self._pool_lock = threading.Lock()
        self._executor: ThreadPoolExecutor | None = None
        # a semaphore belongs to one loop; a program may use several one after the other
        self._turns: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore] = (
            weakref.WeakKeyDictionary()
        )

    def close(self) -> int:
        """Leave the pool; calls that are under way end as those of any closed store."""
        code = super().close()
        with self._pool_lock:
            executor, self._executor = self._executor, None
        if executor is not None:
            executor.shutdown(wait=False)
        return code

    async def _in_thread(self, method: str, *args: Any, **kwargs: Any) -> Any:
        with self._pool_lock:
            turn = self._turns.setdefault(asyncio.get_running_loop(), asyncio.Semaphore(WORKERS))
        async with turn:
            with self._pool_lock:
                if self._executor is None:
                    self._executor = ThreadPoolExecutor(WORKERS, thread_name_prefix="mooncake-async")
                call = self._executor.submit(functools.partial(getattr(self, method), *args, **kwargs))
            ended = asyncio.wrap_future(call)
            try:
                return await asyncio.shield(ended)
            except asyncio.CancelledError:
                if not call.cancel():
                    await _wait_for(ended)
                raise


async def _wait_for(ended: "asyncio.Future[Any]") -> None:
    """Return when the call has ended, however often its task is cancelled meanwhile."""
    while not ended.done():
        try:
            await asyncio.wait([ended])
        except asyncio.CancelledError:
            continue
    if not ended.cancelled():
        ended.exception()  # looked at, so that nobody reports it as never retrieved


def _coroutine(name: str) -> Callable[..., Awaitable[Any]]:
    method = getattr(MooncakeDistributedStore, name)

    @functools.wraps(method)
    async def call(self: MooncakeDistributedStoreAsync, *args: Any, **kwargs: Any) -> Any:
        return await self._in_thread(name, *args, **kwargs)

    call.__name__ = f"async_{name}"
    call.__qualname__ = f"{MooncakeDistributedStoreAsync.__name__}.async_{name}"
    return call


for _name in dir(MooncakeDistributedStore):
    if not _name.startswith("_"):
        setattr(MooncakeDistributedStoreAsync, f"async_{_name}", _coroutine(_name))
