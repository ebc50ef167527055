"""Chunks to and from a store, by its batch calls where it has them, else one by one.

A chunk that is wanted as a whole is read straight into its target; of others only the wanted parts are
asked for (`get_into_ranges`), if the store can do that.
"""

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import numpy as np
import structlog

from mooncake.core.errors import CapacityError, MooncakeError, PeerError, PeerGone, RequestError

BATCH_BYTES_MAX = 256 << 20
"""Of one call of the store, which has a deadline for all of it."""
BATCH_KEYS_MAX = 1024
REGISTER_FROM = 3
"""Places in one piece of memory from which on registering it costs less than checking each address."""
OK = 0
INVALID_PARAMS = -600
OBJECT_NOT_FOUND = -704
NO_AVAILABLE_HANDLE = -200
CAUSES: dict[int, tuple[type[MooncakeError], str]] = {
    OBJECT_NOT_FOUND: (RequestError, "not there: removed, evicted, or never put"),
    NO_AVAILABLE_HANDLE: (CapacityError, "no room in the pool"),
    INVALID_PARAMS: (RequestError, "refused: is the store set up?"),
    -900: (PeerGone, "a store does not answer"),
}

log = structlog.get_logger(__name__)


class Want(NamedTuple):
    """Bytes of one chunk, and where they go."""

    key: str
    chunk_bytes: int
    start: int
    size: int
    target: "np.ndarray[Any, np.dtype[np.uint8]]"
    at: int

    @property
    def whole(self) -> bool:
        """Return whether it is all of the chunk."""
        return self.size == self.chunk_bytes


def failed(key: str, code: int) -> MooncakeError:
    """Return the error for a code of the store."""
    kind, reason = CAUSES.get(code, (PeerError, "failed"))
    return kind(f"{key}: {reason} (code {code})")


class Wire:
    """Moves chunks. As thread-safe as the store is."""

    def __init__(self, store: Any) -> None:
        """Use `store`, a BundleStore."""
        self._store = store

    # ------------------------------------------------------------ writing

    def put(self, keys: Sequence[str], values: Sequence[Any], config: Any) -> None:
        """Store objects; some may be there after an error.

        Raises:
            CapacityError, PeerError, RequestError: as the store's code says.
        """
        batch = getattr(self._store, "put_batch", None)
        if batch is not None:
            code = batch(keys, values, *([] if config is None else [_grouped(config, len(keys))]))
            if code != OK:
                raise failed(
                    keys[0] if len(keys) == 1 else f"one of {len(keys)} objects like {keys[0]}", code
                )
            return
        for key, value in zip(keys, values, strict=True):
            code = self._store.put(key, value, *([] if config is None else [_grouped(config, 1)]))
            if code != OK:
                raise failed(key, code)

    def remove(self, keys: Sequence[str]) -> list[str]:
        """Remove objects; return those that a store could not remove."""
        batch = getattr(self._store, "batch_remove", None)
        codes = batch(keys, True) if batch else [self._store.remove(key, True) for key in keys]
        return [key for key, code in zip(keys, codes, strict=True) if code not in (OK, OBJECT_NOT_FOUND)]

    # ------------------------------------------------------------ reading

    def get(self, key: str) -> bytes:
        """Return a whole object.

        Raises:
            RequestError: there is none.
        """
        data: bytes = self._store.get(key)
        if not data:
            raise failed(key, OBJECT_NOT_FOUND)
        return data

    def is_there(self, key: str) -> bool:
        """Return whether it is.

        Raises:
            PeerError: nobody can tell.
        """
        code = self._store.is_exist(key)
        if code not in (0, 1):
            raise failed(key, code)
        return bool(code)

    def read(self, wants: Sequence[Want], registered: Sequence[Any] = ()) -> None:
        """Fill the targets.

        Args:
            wants: what is to be read.
            registered: targets whose memory the caller has registered with the store.

        Raises:
            RequestError: an object is gone. PeerError: one could not be read.
        """
        with ExitStack() as stack:
            for target in self._worth_registering(wants, registered):
                self._register(target, stack)
            whole: Any = getattr(self._store, "batch_get_into", None)
            parts = getattr(self._store, "get_into_ranges", None)
            for some in _batches([want for want in wants if want.whole and whole]):
                codes = whole(
                    [want.key for want in some],
                    [_address(want.target) + want.at for want in some],
                    [want.size for want in some],
                )
                for want, code in zip(some, codes, strict=True):
                    _check(want, code)
            rest = [want for want in wants if not (want.whole and whole)]
            for some in _batches(rest):
                if parts is not None:
                    self._read_parts(some)
                else:
                    self._read_by_get(some)

    def _worth_registering(self, wants: Sequence[Want], registered: Sequence[Any]) -> Iterable[Any]:
        if not hasattr(self._store, "register_buffer"):
            return []
        counts = {_address(target): -len(wants) for target in registered}
        targets: dict[int, Any] = {}
        for want in wants:
            start = _address(want.target)
            counts[start] = counts.get(start, 0) + 1
            targets[start] = want.target
        return [targets[start] for start, count in counts.items() if count >= REGISTER_FROM]

    def _register(self, target: Any, stack: ExitStack) -> None:
        """Let addresses in it be known; what the caller has registered is refused, and as good."""
        if self._store.register_buffer(_address(target), target.nbytes) == OK:
            stack.callback(self._store.unregister_buffer, _address(target))

    def _read_parts(self, wants: Sequence[Want]) -> None:
        groups: dict[int, dict[str, list[Want]]] = {}
        for want in wants:
            groups.setdefault(_address(want.target), {}).setdefault(want.key, []).append(want)
        rows = list(groups.values())
        codes = self._store.get_into_ranges(
            list(groups),
            [list(row) for row in rows],
            [[[want.at for want in some] for some in row.values()] for row in rows],
            [[[want.start for want in some] for some in row.values()] for row in rows],
            [[[want.size for want in some] for some in row.values()] for row in rows],
        )
        for row, row_codes in zip(rows, codes, strict=True):
            for some, some_codes in zip(row.values(), row_codes, strict=True):
                for want, code in zip(some, some_codes, strict=True):
                    _check(want, code)

    def _read_by_get(self, wants: Sequence[Want]) -> None:
        by_key: dict[str, list[Want]] = {}
        for want in wants:
            by_key.setdefault(want.key, []).append(want)
        for key, some in by_key.items():
            data = memoryview(self.get(key))
            for want in some:
                _check(want, want.size if data.nbytes == want.chunk_bytes else INVALID_PARAMS)
                part = data[want.start : want.start + want.size]
                want.target[want.at : want.at + want.size] = np.frombuffer(part, np.uint8)


def _check(want: Want, code: int) -> None:
    if code < 0:
        raise failed(want.key, code)
    if code != want.size:
        raise PeerError(f"{want.key}: {code} of {want.size} bytes were read")


def _address(target: Any) -> int:
    return int(target.__array_interface__["data"][0])


def _batches(wants: Sequence[Want]) -> Iterator[list[Want]]:
    batch: list[Want] = []
    size_bytes = 0
    keys: set[str] = set()
    for want in wants:
        added = 0 if want.key in keys else want.chunk_bytes
        if batch and (size_bytes + added > BATCH_BYTES_MAX or len(keys) >= BATCH_KEYS_MAX):
            yield batch
            batch, size_bytes, keys, added = [], 0, set(), want.chunk_bytes
        batch.append(want)
        keys.add(want.key)
        size_bytes += added
    if batch:
        yield batch


def _grouped(config: Any, count: int) -> Any:
    """Return `config` with its one group for each of `count` keys."""
    groups = getattr(config, "group_ids", None)
    if not groups or count == 1:
        return config
    copied = copy.copy(config)
    copied.group_ids = [groups[0]] * count
    return copied


def group_of(config: Any) -> str | None:
    """Return the group that a caller wants for all of an object, None: no wish.

    Raises:
        ValueError: several; it is one object to the caller.
    """
    groups = getattr(config, "group_ids", None)
    names = [groups] if isinstance(groups, str) else list(groups or [])
    if len(names) > 1 or not all(isinstance(name, str) for name in names):
        raise ValueError(f"group_ids {names}: exactly one, a text; it holds for all parts of the object")
    return names[0] if names else None


def with_group(store: Any, config: Any, group: str | None) -> Any:
    """Return a config by which all parts of an object are evicted together; a plain store's is left alone."""
    if not group or not hasattr(store, "put_batch"):
        return config
    from mooncake.dropin.store.types import ReplicateConfig

    grouped = ReplicateConfig() if config is None else copy.copy(config)
    grouped.group_ids = [group]
    return grouped
