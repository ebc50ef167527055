"""What the pool's calls take and answer."""

from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Protocol

import msgspec
import numpy as np
from xxhash import xxh3_128, xxh3_128_digest

from kvstore.limits import KEYS_PER_REQUEST_MAX
from mooncake.core.errors import ProtocolError, RequestError
from mooncake.core.keys import checksum_seed
from mooncake.core.messages import Findings

BATCH_KEYS_MAX = KEYS_PER_REQUEST_MAX // 2
"""Keys of one round; a longer batch goes in several."""
COPY_BYTES = 64 << 10
"""From here on a copy lets other threads run (np.copyto); below, that costs more than the copy."""


class Outcome(StrEnum):
    """What became of one key."""

    DONE = "done"
    EXISTS = "exists"  # put: the pool has it; what was there before stays
    MISSING = "missing"  # every store that may have it says that it has not
    FULL = "full"  # put: no store found room
    HELD = "held"  # remove: somebody has just read it
    FAILED = "failed"  # see `reason`; another attempt may help


class Result(msgspec.Struct, frozen=True, gc=False):
    """Of one key. `nodes`: who has it, as far as this call learned; `reason`: why that is less than asked."""

    outcome: Outcome
    size_bytes: int = 0
    nodes: tuple[str, ...] = ()
    reason: str = ""

    @property
    def ok(self) -> bool:
        """Whether the object is in the pool (put), or in its target (get)."""
        return self.outcome is Outcome.DONE or self.outcome is Outcome.EXISTS


class Place(msgspec.Struct, frozen=True, gc=False):
    """One copy: `address` in the memory of the store that is reached at `transfer`, 0 if it is on its SSD."""

    node: str
    transfer: str
    size_bytes: int
    address: int
    in_memory: bool


class Hints(msgspec.Struct, frozen=True):
    """What travels with a put, see messages.Reserve; `names` by key, of what shall be listed.

    `replace`: what the pool has under a key goes when the new bytes are there.
    """

    tenant: str = ""
    group: str = ""
    soft_pin_s: float = 0.0
    hard_pin: bool = False
    names: Mapping[bytes, bytes] = {}
    replace: bool = False

    @property
    def are_plain(self) -> bool:
        """Whether nothing but names travels with it."""
        return not (self.tenant or self.group or self.soft_pin_s or self.hard_pin or self.replace)

    def names_of(self, keys: Sequence[bytes]) -> list[bytes]:
        """Return the names that go with a commit of `keys`."""
        return [self.names.get(key, b"") for key in keys] if self.names else []


class Look(msgspec.Struct):
    """A store's answer to Find in rows; `where` is the access's own (the link it came by)."""

    keys: Sequence[bytes]
    lease_id: int
    offsets: Sequence[int]
    sizes: Sequence[int]
    checksums: bytes
    data: memoryview
    where: object = None

    @classmethod
    def of(cls, keys: Sequence[bytes], found: Findings, where: object = None) -> "Look":
        """Decode columns.

        Raises:
            ProtocolError: they are not one row per key.
        """
        rows = len(keys)
        if not len(found.offsets) == len(found.sizes) == 8 * rows or len(found.checksums) != 16 * rows:
            raise ProtocolError(f"{len(found.sizes)} bytes of sizes for {rows} keys")
        if rows == 1:
            offsets = [int.from_bytes(found.offsets, "little", signed=True)]
            sizes = [int.from_bytes(found.sizes, "little", signed=True)]
        else:
            offsets = np.frombuffer(found.offsets, "<i8").tolist()
            sizes = np.frombuffer(found.sizes, "<i8").tolist()
        return cls(keys, found.lease_id, offsets, sizes, found.checksums, memoryview(found.data), where)

    def is_sound(self, row: int, parts: Sequence[memoryview | bytes]) -> bool:
        """Return whether `parts`, in order, are what was committed under the key of `row`."""
        return checksum_of(self.keys[row], parts) == self.checksums[16 * row : 16 * row + 16]


def checksum_of(key: bytes, parts: Sequence[memoryview | bytes]) -> bytes:
    """Return the checksum of a block that lies in `parts`, in order; see core.keys.block_checksum."""
    if len(parts) == 1:
        return xxh3_128_digest(parts[0], checksum_seed(key))
    digest = xxh3_128(seed=checksum_seed(key))
    for part in parts:
        digest.update(part)
    return digest.digest()


class Sink(Protocol):
    """Where what is read goes."""

    def refuses(self, row: int, size_bytes: int) -> str:
        """Return why an object of this size cannot be taken, "" if it can."""
        ...

    def places(self, row: int, size_bytes: int) -> Sequence[memoryview]:
        """Return the memory that has to hold it; empty: `take` makes some."""
        ...

    def take(self, row: int, source: memoryview) -> Sequence[memoryview | bytes] | None:
        """Copy the object; return the copy, to be verified. None: `refuses` tells why it could not."""
        ...


class Into:
    """Fills the caller's memory; each target is one buffer, or several that are filled in order."""

    def __init__(self, targets: Sequence[Sequence[memoryview]]) -> None:
        """`targets[row]`: writable."""
        self._targets = targets

    def refuses(self, row: int, size_bytes: int) -> str:
        """See Sink."""
        room = sum(part.nbytes for part in self._targets[row])
        return "" if size_bytes <= room else f"an object of {size_bytes} bytes, a target of {room}"

    def places(self, row: int, size_bytes: int) -> Sequence[memoryview]:
        """See Sink."""
        parts = self._targets[row]
        if len(parts) == 1:
            return parts if parts[0].nbytes == size_bytes else [parts[0][:size_bytes]]
        trimmed = []
        for part in parts:
            trimmed.append(part[:size_bytes])
            size_bytes -= trimmed[-1].nbytes
            if not size_bytes:
                break
        return trimmed

    def take(self, row: int, source: memoryview) -> Sequence[memoryview | bytes] | None:
        """See Sink."""
        parts, size_bytes = self._targets[row], source.nbytes
        if len(parts) == 1 and parts[0].nbytes == size_bytes:  # the usual case, in half the time
            copy(parts[0], source)
            return parts
        if self.refuses(row, size_bytes):
            return None
        parts = self.places(row, size_bytes)
        at = 0
        for part in parts:
            copy(part, source[at : at + part.nbytes])
            at += part.nbytes
        return parts


class Bytes:
    """Makes a bytes object of each."""

    def __init__(self, rows: int) -> None:
        """`values[row]` will be the object, None if it was not got."""
        self.values: list[bytes | None] = [None] * rows

    def refuses(self, row: int, size_bytes: int) -> str:  # noqa: ARG002 - see Sink
        """See Sink."""
        return ""

    def places(self, row: int, size_bytes: int) -> Sequence[memoryview]:  # noqa: ARG002 - see Sink
        """See Sink."""
        return ()

    def take(self, row: int, source: memoryview) -> Sequence[memoryview | bytes] | None:
        """See Sink."""
        value = self.values[row] = bytes(source)
        return (value,)


def copy(target: memoryview, source: memoryview) -> None:
    """Copy `source` into `target`, which is as long."""
    if source.nbytes < COPY_BYTES:
        target[:] = source
    else:
        np.copyto(np.frombuffer(target, np.uint8), np.frombuffer(source, np.uint8))


def fill(target: memoryview, parts: Sequence[memoryview]) -> None:
    """Copy `parts` into `target`, one behind the other."""
    if len(parts) == 1:
        copy(target, parts[0])
        return
    at = 0
    for part in parts:
        copy(target[at : at + part.nbytes], part)
        at += part.nbytes


def flat(buffer: object, *, writable: bool = False) -> memoryview:
    """Return the bytes of `buffer` (bytes, bytearray, memoryview, numpy array, ...) without a copy.

    Raises:
        RequestError: it has none in one piece, or they are read-only and must be written.
    """
    try:
        view = memoryview(buffer)  # type: ignore[arg-type]
        if view.format != "B" or view.ndim != 1:
            view = view.cast("B")
    except (TypeError, ValueError) as error:
        raise RequestError(f"{type(buffer).__name__} is no buffer in one piece: {error}") from error
    if not view.c_contiguous:
        raise RequestError(f"{type(buffer).__name__} is no buffer in one piece")
    if writable and view.readonly:
        raise RequestError(f"a target of type {type(buffer).__name__} is read-only")
    return view


def parts_of(target: object, *, writable: bool = False) -> list[memoryview]:
    """Return `target`, one buffer or a list or tuple of them, as flat views; raises as `flat`."""
    if isinstance(target, list | tuple):
        return [flat(part, writable=writable) for part in target]
    return [flat(target, writable=writable)]
