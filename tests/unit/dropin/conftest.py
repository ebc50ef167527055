"""A `mooncake_master` in a thread, and clients of it."""

import asyncio
import itertools
import threading
from collections.abc import Callable, Iterator

import pytest

from mooncake.dropin.master.command import Master, MasterOptions
from mooncake.store import MooncakeDistributedStore

PATIENCE_S = 30.0


class MasterThread:
    """A master on free ports."""

    def __init__(self, **flags) -> None:
        self.address = self.url = ""
        self._options = MasterOptions(**{"rpc_port": 0, "metrics_port": 0, **flags})
        self._ready = threading.Event()
        # daemon: a test that fails must not keep the whole run from ending
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()), daemon=True)
        self._thread.start()
        assert self._ready.wait(PATIENCE_S)

    async def _main(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        master = Master(self._options)
        await master.start()
        self.address, self.url = master.endpoint.removeprefix("tcp://"), master.url
        self._ready.set()
        await self._stop.wait()
        await master.close()

    def stop(self) -> None:
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(PATIENCE_S)


def client(master: MasterThread, segment: int | str = 8 << 20, **settings) -> MooncakeDistributedStore:
    """Return a store that has joined."""
    store = MooncakeDistributedStore()
    config = {
        "local_hostname": "127.0.0.1", "metadata_server": "P2PHANDSHAKE", "global_segment_size": segment,
        "master_server_addr": master.address,
    }  # fmt: skip
    assert store.setup({**config, **settings}) == 0
    return store


@pytest.fixture(scope="module")
def master() -> Iterator[MasterThread]:
    master = MasterThread()
    yield master
    master.stop()


@pytest.fixture(scope="module")
def shared(master: MasterThread) -> Iterator[MooncakeDistributedStore]:
    store = client(master)
    yield store
    store.close()


@pytest.fixture
def store(shared: MooncakeDistributedStore) -> MooncakeDistributedStore:
    """A client of an empty pool."""
    shared.remove_all(force=True)
    return shared


@pytest.fixture
def join(master: MasterThread) -> Iterator:
    """Makes more clients."""
    stores = []

    def make(*args, **settings) -> MooncakeDistributedStore:
        stores.append(client(master, *args, **settings))
        return stores[-1]

    yield make
    for store in stores:
        store.close()


@pytest.fixture
def memory() -> Callable[[int], tuple]:
    """Makes numpy arrays that live as long as the test, each with its address."""
    import numpy as np

    kept = []

    def make(size: int) -> tuple:
        array = (np.arange(size, dtype=np.uint64) * next(seeds) % 251).astype(np.uint8)
        kept.append(array)
        return array, array.ctypes.data

    return make


seeds = itertools.count(3, 2)
