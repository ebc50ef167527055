"""Bundles in a store: members in chunks, then the manifest, which makes them one visible object.

A crash half-way leaves chunks that nothing names; the pool evicts them. A put that fails removes what it
wrote. Removal begins with the manifest.
"""

import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import structlog

from mooncake.core.errors import CapacityError, PeerError
from mooncake.dropin.structured import manifest as manifests
from mooncake.dropin.structured.fields import Encoded, Reading, index_reading, reading
from mooncake.dropin.structured.manifest import Field, Manifest, Payload
from mooncake.dropin.structured.model import RemoteBundleRef
from mooncake.dropin.structured.wire import BATCH_BYTES_MAX, BATCH_KEYS_MAX, Want, Wire, with_group

log = structlog.get_logger(__name__)

Ref = RemoteBundleRef | Mapping[str, Any]


class Member(NamedTuple):
    """One that is to be read. `base`: of the names of its chunks; `rows`: which of it, None = all."""

    name: str
    payload: Payload
    base: str
    rows: Sequence[int] | None = None
    destination: Any = None


class Bundles:
    """What bundles of one prefix a store has."""

    def __init__(self, store: Any, prefix: str) -> None:
        """Use `store`, under names that begin with `prefix`."""
        self.wire = Wire(store)
        self.prefix = prefix
        self._store = store

    # ------------------------------------------------------------ writing

    def write(
        self,
        members: Mapping[str, Encoded],
        *,
        partition: str,
        chunk_bytes: int,
        metadata: Mapping[str, Any],
        meta: Any = None,
        config: Any = None,
        group: str | None = None,
        after: Manifest | None = None,
    ) -> RemoteBundleRef:
        """Store a bundle.

        Args:
            members: by name.
            partition: part of its name.
            chunk_bytes: of one object at most.
            metadata: kept in the manifest.
            meta: bytes that are kept beside the members, None: none.
            config: the store's ReplicateConfig.
            group: what is evicted together with it; None: itself.
            after: a bundle whose members become this one's too; they stay its own.

        Raises:
            CapacityError, PeerError, RequestError: the store refuses or fails; nothing is left then.
        """
        object_id = f"{partition}/{uuid.uuid4().hex}"
        config = with_group(self._store, config, object_id if group is None else group)
        shared = after.ids() if after else []
        writing = _Writing(self.wire, f"{self.prefix}/{object_id}", chunk_bytes, config, len(shared))
        with ExitStack() as undo:
            undo.callback(self._undo, writing)
            buffers = dict(after.buffers) if after else {}
            for name, encoded in members.items():
                buffers[name] = writing.member(encoded)
            kept = None if meta is None else writing.member(Encoded(Field(), [memoryview(meta).cast("B")]))
            writing.flush()
            manifest = Manifest(object_id, 1, "bundle", buffers, dict(metadata), kept, shared)
            writing.put(manifests.key_of(self.prefix, object_id), manifests.encode(manifest))
            undo.pop_all()
        return manifests.ref_of(manifest, self.prefix)

    def _undo(self, writing: "_Writing") -> None:
        left = self.wire.remove(writing.keys[::-1])  # the manifest first
        if left:
            log.warning("mooncake.structured: a failed put has left objects", count=len(left), one=left[0])

    # ------------------------------------------------------------ looking and removing

    def resolve(self, ref: Ref) -> Manifest:
        """Return the manifest of a bundle, from the ref or the store.

        Raises:
            RequestError: it is not there. IntegrityError: it is no manifest, or one of other objects.
            ValueError: no ref.
        """
        key, known = _parts(ref)
        if not key and known:
            key = manifests.key_of(self.prefix, str(known.get("object_id")))
        if not key:
            raise ValueError("bundle ref must include manifest_key")
        return manifests.decode(known or self.wire.get(key), key, self.prefix)

    def remove(self, ref: Ref) -> None:
        """Remove a bundle with all that it shares; one that is gone is no error.

        Raises:
            PeerError: some of it could not be removed; it is gone as an object all the same.
        """
        key, known = _parts(ref)
        if not known and key and not self.wire.is_there(key):
            return
        self.remove_since(self.resolve(ref), 0)

    def remove_since(self, manifest: Manifest, since: int) -> None:
        """Remove the manifests of a bundle's sources from `since` on, the newest first, then their chunks."""
        names = [manifests.key_of(self.prefix, one) for one in reversed(manifest.ids()[since:])]
        left = self.wire.remove(names) + self.wire.remove(manifest.keys(self.prefix, since))
        if left:
            raise PeerError(
                f"{len(left)} objects of bundle {manifest.object_id} could not be removed, like {left[0]}: "
                "remove them by their names, or leave them to eviction"
            )

    # ------------------------------------------------------------ reading

    def member(
        self, manifest: Manifest, name: str, rows: Sequence[int] | None = None, destination: Any = None
    ) -> Member:
        """Return what is to be read of a member; raises KeyError."""
        payload = manifest.buffers[name]
        return Member(name, payload, f"{self.prefix}/{manifest.ids()[payload.source]}/", rows, destination)

    def read(self, members: Sequence[Member]) -> list[Any]:
        """Return the values of members, of any bundles.

        Raises:
            RequestError: a chunk is not there. PeerError: one could not be read.
            IntegrityError: bytes are not what was stored. TypeError, ValueError: see reading.
        """
        try:
            return self._read(members)
        except MemoryError as error:
            total = sum(one.payload.bytes for one in members)
            raise CapacityError(
                f"no memory for members of {total} bytes: read fewer, or some rows"
            ) from error

    def _read(self, members: Sequence[Member]) -> list[Any]:
        indexes = [index_reading(one.payload) if one.rows is not None else None for one in members]
        bases = [one.base for one in members]
        starts = iter(self._fill(bases, indexes))
        readings = [
            reading(one.name, one.payload, one.rows, None if index is None else next(starts), one.destination)
            for one, index in zip(members, indexes, strict=True)
        ]
        return self._fill(bases, readings)

    def _fill(self, bases: Sequence[str], readings: Sequence[Reading | None]) -> list[Any]:
        there = [(base, one) for base, one in zip(bases, readings, strict=True) if one is not None]
        wants = [want for base, one in there for want in _wants(base, one)]
        self.wire.read(wants, [one.target for _, one in there if one.registered])
        return [one.finish() for _, one in there]


class _Writing:
    """Chunks on their way to the store, a batch at a time."""

    def __init__(self, wire: Wire, base: str, chunk_bytes: int, config: Any, source: int) -> None:
        self.keys: list[str] = []
        self._source = source
        self._wire = wire
        self._base = base
        self._chunk_bytes = chunk_bytes
        self._config = config
        self._waiting: list[tuple[str, Any]] = []
        self._waiting_bytes = 0

    def member(self, encoded: Encoded) -> Payload:
        first = len(self.keys)
        groups = [encoded.parts[: encoded.alone], encoded.parts[encoded.alone :]]
        head, rest = (sum(part.nbytes for part in parts) for parts in groups)
        for pieces in (chunk for parts in groups for chunk in _cut(parts, self._chunk_bytes)):
            value = pieces[0] if len(pieces) == 1 else memoryview(b"".join(pieces))
            if self._waiting_bytes + value.nbytes > BATCH_BYTES_MAX or len(self._waiting) >= BATCH_KEYS_MAX:
                self.flush()
            self.keys.append(f"{self._base}/{len(self.keys)}")
            self._waiting.append((self.keys[-1], value))
            self._waiting_bytes += value.nbytes
        return Payload(head + rest, self._chunk_bytes, first, head, self._source, encoded.field)

    def flush(self) -> None:
        waiting, self._waiting, self._waiting_bytes = self._waiting, [], 0
        if waiting:
            self._wire.put([key for key, _ in waiting], [value for _, value in waiting], self._config)

    def put(self, key: str, value: bytes) -> None:
        self.keys.append(key)
        self._wire.put([key], [value], self._config)


def _cut(parts: Sequence[memoryview], chunk_bytes: int) -> Iterator[list[memoryview]]:
    """Yield the pieces of each chunk, of at most `chunk_bytes`."""
    chunk: list[memoryview] = []
    room = chunk_bytes
    for part in parts:
        begin = 0
        while begin < part.nbytes:
            piece = part[begin : begin + room]
            chunk.append(piece)
            begin, room = begin + piece.nbytes, room - piece.nbytes
            if not room:
                yield chunk
                chunk, room = [], chunk_bytes
    if chunk:
        yield chunk


def _wants(base: str, one: Reading) -> Iterator[Want]:
    """Yield which bytes of which chunks the ranges are."""
    done = 0
    for begin, size in one.ranges:
        at, end = begin, begin + size
        while at < end:
            number, start, stop = one.payload.chunk_at(at)
            length = min(end, stop) - at
            yield Want(f"{base}{number}", stop - start, at - start, length, one.target, done)
            at, done = at + length, done + length


def _parts(ref: Ref) -> tuple[str, Mapping[str, Any] | None]:
    if isinstance(ref, RemoteBundleRef):
        return ref.manifest_key, ref.manifest
    if not isinstance(ref, Mapping):
        raise TypeError(f"a RemoteBundleRef or a mapping, not {type(ref).__name__}")
    key, known = ref.get("manifest_key", ""), ref.get("manifest")
    if not isinstance(key, str) or not isinstance(known, Mapping | None):
        raise TypeError("bundle ref: manifest_key is a text, manifest a mapping")
    return key, known
