"""Reading and writing parts of objects: ranges, and sessions that hold an object meanwhile.

A put session keeps the object in this process until its end makes it one object of the pool, at once and
immutable. A get session reads the object once, so that ranges of it are copies within this process and
all of one version. Codes are as measured on upstream's wheel.
"""

import threading
from collections.abc import Sequence
from typing import Any

import msgspec
import structlog

from mooncake.core.errors import CapacityError, RequestError
from mooncake.dropin.store.answers import answers_code, answers_codes
from mooncake.dropin.store.calls import Calls
from mooncake.dropin.store.types import (
    INVALID_PARAMS,
    NO_AVAILABLE_HANDLE,
    OBJECT_ALREADY_EXISTS,
    OBJECT_NOT_FOUND,
    OK,
    ReplicateConfig,
)

BYTES_MAX = 16 << 30
"""Of all sessions of one client together: they are forgotten more easily than anything else."""

log = structlog.get_logger(__name__)


class Writing(msgspec.Struct):
    """An object that is being filled."""

    data: bytearray
    config: ReplicateConfig | None


class Sessions:
    """What is open. Thread-safe."""

    def __init__(self) -> None:
        """Nothing is."""
        self.lock = threading.Lock()
        self.writing: dict[str, Writing] = {}
        self.reading: dict[str, bytes] = {}

    def check_room(self, size_bytes: int) -> None:
        """Pass if so many more bytes may be held.

        Raises:
            CapacityError: they may not.
        """
        held = sum(len(one.data) for one in self.writing.values()) + sum(map(len, self.reading.values()))
        if held + size_bytes > BYTES_MAX:
            raise CapacityError(f"sessions hold {held} bytes: end some")


class SessionForms:
    """The methods, under upstream's names."""

    _sessions: Sessions

    def _need(self) -> Calls:
        raise NotImplementedError

    # ------------------------------------------------------------ writing

    @answers_codes
    def batch_put_session_start(
        self, keys: Sequence[str], sizes: Sequence[int], config: ReplicateConfig | None = None
    ) -> list[int]:
        """Begin to write objects of these sizes; -705: it is there, -600: no size, or begun already."""
        if len(keys) != len(sizes):
            return [INVALID_PARAMS] * len(keys)
        there = self._need().sizes(keys)
        sessions = self._sessions
        codes = []
        with sessions.lock:
            for key, size, known in zip(keys, sizes, there, strict=True):
                if size <= 0 or key in sessions.writing:
                    codes.append(INVALID_PARAMS)
                elif known != OBJECT_NOT_FOUND:
                    codes.append(OBJECT_ALREADY_EXISTS if known > 0 else known)
                else:
                    codes.append(self._begin(key, size, config))
        return codes

    def _begin(self, key: str, size: int, config: ReplicateConfig | None) -> int:
        try:
            self._sessions.check_room(size)
            self._sessions.writing[key] = Writing(bytearray(size), config)
        except (CapacityError, MemoryError) as error:
            log.error("mooncake.store: no session", key=key, reason=str(error))
            return NO_AVAILABLE_HANDLE
        return OK

    @answers_codes
    def batch_put_from_multi_buffer_ranges(
        self,
        keys: Sequence[str],
        all_buffer_ptrs: Sequence[Sequence[int]],
        all_sizes: Sequence[Sequence[int]],
        all_dst_offsets: Sequence[Sequence[int]],
    ) -> list[int]:
        """Fill parts of objects whose sessions are open; return the bytes of each, -600: beyond its end."""
        calls = self._need()
        writing = self._sessions.writing
        objects = [memoryview(one.data) if (one := writing.get(key)) else None for key in keys]
        return _for_each(calls, objects, all_buffer_ptrs, all_sizes, all_dst_offsets, write=True)

    @answers_codes
    def batch_put_session_end(self, keys: Sequence[str]) -> list[int]:
        """Make the objects visible; -600: no session of this key is open."""
        calls = self._need()
        codes = []
        for key in keys:
            with self._sessions.lock:
                one = self._sessions.writing.pop(key, None)
            codes.append(
                INVALID_PARAMS if one is None else calls.put([key], [[memoryview(one.data)]], one.config)[0]
            )
        return codes

    @answers_codes
    def batch_put_session_revoke(self, keys: Sequence[str]) -> list[int]:
        """Give the objects up; -600: no session of this key is open."""
        self._need()
        with self._sessions.lock:
            return [INVALID_PARAMS if self._sessions.writing.pop(key, None) is None else OK for key in keys]

    # ------------------------------------------------------------ reading

    @answers_codes
    def batch_get_session_start(self, keys: Sequence[str]) -> list[int]:
        """Hold objects for reading by ranges; -704: it is not there."""
        values = self._need().get(keys)
        with self._sessions.lock:
            self._sessions.check_room(sum(len(value) for value in values if value))
            self._sessions.reading.update(
                {key: value for key, value in zip(keys, values, strict=True) if value is not None}
            )
        return [OBJECT_NOT_FOUND if value is None else OK for value in values]

    @answers_codes
    def batch_get_into_multi_buffer_ranges(
        self,
        keys: Sequence[str],
        all_buffer_ptrs: Sequence[Sequence[int]],
        all_sizes: Sequence[Sequence[int]],
        all_src_offsets: Sequence[Sequence[int]],
    ) -> list[int]:
        """Copy parts of held objects into memory; return the bytes of each, -600: not held, or beyond."""
        calls = self._need()
        reading = self._sessions.reading
        objects = [memoryview(value) if (value := reading.get(key)) else None for key in keys]
        return _for_each(calls, objects, all_buffer_ptrs, all_sizes, all_src_offsets, write=False)

    @answers_code
    def batch_get_session_end(self, keys: Sequence[str]) -> int:
        """Let go of held objects; those that are not held are ignored."""
        self._need()
        with self._sessions.lock:
            for key in keys:
                self._sessions.reading.pop(key, None)
        return OK

    def get_into_ranges(
        self,
        buffer_ptrs: Sequence[int],
        all_keys: Sequence[Sequence[str]],
        all_dst_offsets: Sequence[Sequence[Sequence[int]]],
        all_src_offsets: Sequence[Sequence[Sequence[int]]],
        all_sizes: Sequence[Sequence[Sequence[int]]],
    ) -> list[list[list[int]]]:
        """Copy parts of objects to offsets of buffers; each object is read once, needs no session.

        Returns:
            For each buffer, key and part its bytes; -704: not there, -600: beyond its end or nonsense.

        Raises:
            RequestError: not set up; PeerError: see get.
        """
        calls = self._need()
        names = list(dict.fromkeys(key for keys in all_keys for key in keys))
        values = dict(zip(names, calls.get(names), strict=True))
        rows = zip(buffer_ptrs, all_keys, all_dst_offsets, all_src_offsets, all_sizes, strict=True)
        return [
            [
                [
                    OBJECT_NOT_FOUND
                    if (value := values[key]) is None
                    else _copy(calls, memoryview(value), base + there, size, offset, write=False)
                    for there, offset, size in zip(theres, offsets, sizes, strict=True)
                ]
                for key, theres, offsets, sizes in zip(keys, to, of, lengths, strict=True)
            ]
            for base, keys, to, of, lengths in rows
        ]


def _for_each(
    calls: Calls,
    objects: Sequence[memoryview | None],
    addresses: Sequence[Sequence[int]],
    sizes: Sequence[Sequence[int]],
    offsets: Sequence[Sequence[int]],
    *,
    write: bool,
) -> list[int]:
    if not len(objects) == len(addresses) == len(sizes) == len(offsets):
        return [INVALID_PARAMS] * len(objects)
    codes = []
    for row, value in enumerate(objects):
        parts: list[tuple[Any, Any, Any]] = []
        if len(addresses[row]) == len(sizes[row]) == len(offsets[row]):
            parts = list(zip(addresses[row], sizes[row], offsets[row], strict=True))
        if value is None or not parts or any(at < 0 or at + size > len(value) for _, size, at in parts):
            codes.append(INVALID_PARAMS)
            continue
        done = [_copy(calls, value, address, size, at, write=write) for address, size, at in parts]
        codes.append(min(done) if min(done) < 0 else sum(done))
    return codes


def _copy(calls: Calls, value: memoryview, address: int, size: int, offset: int, *, write: bool) -> int:
    """Copy between `value` at `offset` and memory; return the bytes, or a code."""
    if offset < 0 or size < 0 or offset + size > len(value):
        return INVALID_PARAMS
    try:
        memory = calls.memory(address, size)
    except RequestError as error:
        log.error("mooncake.store: no such memory", reason=str(error))
        return INVALID_PARAMS
    if write:
        value[offset : offset + size] = memory
    else:
        memory[:] = value[offset : offset + size]
    return size
