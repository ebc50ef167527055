"""The methods of MooncakeDistributedStore for objects in the caller's memory, under upstream's names."""

import functools
import threading
from collections.abc import Callable, Sequence

import structlog

from mooncake.core.errors import MooncakeError, RequestError
from mooncake.dropin.client.dummy import DummyStarted
from mooncake.dropin.store.answers import answers_code, answers_codes
from mooncake.dropin.store.calls import Calls, Parts, texts
from mooncake.dropin.store.types import INVALID_PARAMS, OK, ReplicateConfig
from transfer.model import Buffer

UNREGISTER_S = 10.0

log = structlog.get_logger(__name__)


class MemoryForms:
    """Memory is named by address and size; every method may be called from any thread."""

    _lock: threading.Lock
    _calls: Calls | None
    _buffers: dict[int, Buffer]

    def _need(self) -> Calls:
        raise NotImplementedError

    @answers_code
    def register_buffer(self, buffer_ptr: int, size: int) -> int:
        """Let bytes of other hosts go straight into and out of this memory; -600: it overlaps another."""
        calls = self._need()
        if size <= 0:
            raise RequestError(f"{size} bytes: nothing to register")
        buffer = calls.started.engine.register(buffer_ptr, size)
        with self._lock:
            self._buffers[buffer_ptr] = buffer
        return OK

    @answers_code
    def unregister_buffer(self, buffer_ptr: int) -> int:
        """End the registration that begins at this address; -600: there is none."""
        calls = self._need()
        with self._lock:
            buffer = self._buffers.get(buffer_ptr)
        if buffer is None:
            raise RequestError(f"no buffer is registered at {buffer_ptr:#x}")
        calls.started.engine.unregister(buffer, UNREGISTER_S)
        with self._lock:
            self._buffers.pop(buffer_ptr, None)
        return OK

    def alloc_from_mem_pool(self, arg0: int, /) -> int:
        """Return the address of memory that a dummy client shares with its mooncake_client, 0: there is none.

        Bytes of other hosts go straight into and out of it. It is given back by `close`.
        """
        try:
            started = self._need().started
            if not isinstance(started, DummyStarted):
                raise RequestError("only a client of setup_dummy has a shared memory pool")
            return started.allocate(arg0)
        except MooncakeError as error:
            log.error("mooncake.store: no shared memory", size=arg0, reason=str(error))
            return 0

    def put_from(self, key: str, buffer_ptr: int, size: int, config: ReplicateConfig | None = None) -> int:
        """Store `size` bytes at an address of this process; it need not be registered."""
        return self.batch_put_from([key], [buffer_ptr], [size], config)[0]

    def upsert_from(self, key: str, buffer_ptr: int, size: int, config: ReplicateConfig | None = None) -> int:
        """As put_from, in the place of what is there."""
        return self.batch_upsert_from([key], [buffer_ptr], [size], config)[0]

    @answers_code
    def put_from_with_metadata(
        self,
        key: str,
        buffer_ptr: int,
        metadata_buffer_ptr: int,
        size: int,
        metadata_size: int,
        config: ReplicateConfig | None = None,
    ) -> int:
        """Store metadata and data as one object, the metadata first."""
        calls = self._need()
        parts = [calls.memory(metadata_buffer_ptr, metadata_size), calls.memory(buffer_ptr, size)]
        return calls.put(texts([key]), [parts], config)[0]

    @answers_codes
    def batch_put_from(
        self,
        keys: Sequence[str],
        buffer_ptrs: Sequence[int],
        sizes: Sequence[int],
        config: ReplicateConfig | None = None,
    ) -> list[int]:
        """Store memory of this process; one code each."""
        calls = self._calls if config is None else None
        if calls and (put := calls.put_straight(texts(keys), buffer_ptrs, sizes)) is not None:
            return put
        return self.batch_put_from_multi_buffers(keys, _each(buffer_ptrs), _each(sizes), config)

    @answers_codes
    def batch_upsert_from(
        self,
        keys: Sequence[str],
        buffer_ptrs: Sequence[int],
        sizes: Sequence[int],
        config: ReplicateConfig | None = None,
    ) -> list[int]:
        """As batch_put_from, in the place of what is there."""
        calls = self._need()
        write = functools.partial(calls.upsert, config=config)
        return _with_memory(calls, keys, _each(buffer_ptrs), _each(sizes), write)

    @answers_codes
    def batch_put_from_multi_buffers(
        self,
        keys: Sequence[str],
        all_buffer_ptrs: Sequence[Sequence[int]],
        all_sizes: Sequence[Sequence[int]],
        config: ReplicateConfig | None = None,
    ) -> list[int]:
        """Store objects that lie in pieces in this process; one code each."""
        calls = self._need()
        write = functools.partial(calls.put, config=config)
        return _with_memory(calls, keys, all_buffer_ptrs, all_sizes, write)

    def get_into(self, key: str, buffer_ptr: int, size: int) -> int:
        """Read an object into memory of this process; return its size, -600: `size` is too small."""
        return self.batch_get_into([key], [buffer_ptr], [size])[0]

    @answers_codes
    def batch_get_into(
        self, keys: Sequence[str], buffer_ptrs: Sequence[int], sizes: Sequence[int]
    ) -> list[int]:
        """As get_into, for several; memory of one that failed may have been written to."""
        if self._calls and (read := self._calls.get_straight(texts(keys), buffer_ptrs, sizes)) is not None:
            return read
        return self.batch_get_into_multi_buffers(keys, _each(buffer_ptrs), _each(sizes))

    @answers_codes
    def batch_get_into_multi_buffers(
        self,
        keys: Sequence[str],
        all_buffer_ptrs: Sequence[Sequence[int]],
        all_sizes: Sequence[Sequence[int]],
        prefer_alloc_in_same_node: bool = False,  # noqa: ARG002 - means nothing for a read
    ) -> list[int]:
        """Read objects into several pieces of memory each, which are filled in order."""
        calls = self._need()
        return _with_memory(calls, keys, all_buffer_ptrs, all_sizes, calls.get_into)


def _each(values: Sequence[int]) -> list[list[int]]:
    return [[value] for value in values]


def _with_memory(
    calls: Calls,
    keys: Sequence[str],
    addresses: Sequence[Sequence[int]],
    sizes: Sequence[Sequence[int]],
    call: Callable[[Sequence[str], list[Parts]], list[int]],
) -> list[int]:
    """Return what `call` answers for the memory of each key; -600 for those whose memory makes no sense."""
    if not len(keys) == len(addresses) == len(sizes):
        raise RequestError(f"{len(keys)} keys, {len(addresses)} addresses, {len(sizes)} sizes")
    codes = [INVALID_PARAMS] * len(keys)
    rows: list[int] = []
    memory: list[Parts] = []
    for row, (starts, lengths) in enumerate(zip(addresses, sizes, strict=True)):
        if len(starts) != len(lengths):
            log.error("mooncake.store: not a size for each address", key=keys[row])
            continue
        try:
            memory.append([calls.memory(at, length) for at, length in zip(starts, lengths, strict=True)])
            rows.append(row)
        except RequestError as error:
            log.error("mooncake.store: no such memory", key=keys[row], reason=str(error))
    if rows:
        done = call(texts([keys[row] for row in rows]), memory)
        for row, code in zip(rows, done, strict=True):
            codes[row] = code
    return codes
