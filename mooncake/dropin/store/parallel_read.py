"""Reading tensors that lie in the pool in pieces, as the reader wants them: a piece, or all of it.

The piece itself is read if it is there. Otherwise it is put together from the pieces of another layout, of
which a manifest (or the first piece) says how it was cut. Bytes are used only if every header says what its
place in that layout says: pieces of two layouts are never mixed.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import structlog

from mooncake.core.errors import PeerGone, RequestError
from mooncake.dropin.store.calls import Calls
from mooncake.dropin.store.parallel_layout import PARTS_MAX, Layout, Split, copies, overlapping, span
from mooncake.dropin.store.tensors import HEAD_BYTES, Head, check_keys, head_of, tensor_of
from mooncake.dropin.store.types import OBJECT_NOT_FOUND

if TYPE_CHECKING:
    import torch

log = structlog.get_logger(__name__)


class Manifest(msgspec.Struct, frozen=True, array_like=True):
    """How a tensor was cut."""

    size: int
    dim: int
    step_bytes: int
    """Of one index along `dim`, so that the size of a piece tells its length there."""

    @classmethod
    def of(cls, split: Split, shape: Sequence[int], data_bytes: int) -> "Manifest":
        """Return that of the layout to which such a piece belongs."""
        dim = split.dim or 0
        return cls(split.size, dim, data_bytes // shape[dim] if shape[dim] else 0)

    @classmethod
    def read(cls, data: bytes | None) -> "Manifest | None":
        """Return what was stored, None if that is none."""
        try:
            found = msgspec.msgpack.decode(data or b"", type=cls)
        except msgspec.DecodeError:
            return None
        return found if 0 < found.size <= PARTS_MAX and found.dim >= 0 and found.step_bytes >= 0 else None

    def layout(self, whole: Layout) -> Layout:
        """Return the layout of the first piece of such a tensor."""
        return whole.with_split(Split(0, self.size, self.dim))


class Want(msgspec.Struct, frozen=True):
    """What is to be read under a key; `exact`: the object of that name, or nothing."""

    layout: Layout
    exact: bool = False


def read(
    calls: Calls,
    keys: Sequence[str],
    wants: Sequence[Want | None],
    memory: Sequence[memoryview] | None = None,
) -> "list[torch.Tensor | None]":
    """Return what is wanted, None for what is not there.

    Args:
        calls: of the store.
        keys: of the tensors.
        wants: for each key; None: nothing.
        memory: for each key, which is filled as get_tensors_into does; None: memory of its own.

    Raises:
        PeerError: it may be there and cannot be read.
    """
    found: list[torch.Tensor | None] = [None] * len(check_keys(keys))
    asked = [(row, want) for row, want in enumerate(wants) if want is not None]
    names = [want.layout.name(keys[row]) for row, want in asked]
    values = _objects(calls, names, [memory[row] for row, _ in asked] if memory is not None else None)
    for (row, want), value in zip(asked, values, strict=True):
        key, room = keys[row], memory[row] if memory is not None else None
        if value is not None and _is_piece(key, value, want):
            found[row] = tensor_of(value)
        elif not want.exact:
            found[row] = _put_together(calls, key, want.layout, room)
    return found


def _objects(calls: Calls, names: Sequence[str], memory: Sequence[memoryview] | None) -> Sequence[Any]:
    if memory is None:
        return calls.get(names)
    codes = calls.get_into(names, [[room] for room in memory])
    return [room[:code] if code > 0 else None for room, code in zip(memory, codes, strict=True)]


def _is_piece(key: str, value: Any, want: Want) -> bool:
    """Return whether an object of the right name is what is wanted: not every name says the layout."""
    try:
        stored = head_of(value).split
    except RequestError as error:
        log.error("mooncake.store: no tensor", key=key, reason=str(error))
        return False
    split = want.layout.split
    if want.exact or split is None:
        return True
    if stored is None:
        return split.dim is None  # a caller of the _with_tp forms has named his shards himself
    return (stored.rank, stored.size) == (split.rank, split.size) and split.dim in {None, stored.dim}


def _put_together(calls: Calls, key: str, layout: Layout, memory: memoryview | None) -> "torch.Tensor | None":
    """Return a piece, or all of a tensor, from other pieces; the first set of them that serves is used."""
    for names, manifest in _sets(calls, key, layout):
        try:
            made = _from_pieces(calls, names, manifest, layout.split, memory)
        except RequestError as error:
            log.warning("mooncake.store: not read from these", pieces=names[0], reason=str(error))
            continue
        if made is not None:
            return made
    return None


def _sets(calls: Calls, key: str, layout: Layout) -> Iterator[tuple[list[str], Manifest]]:
    """Give the pieces in which the tensor may lie."""
    whole, split = layout.with_split(None), layout.split
    if split is not None and split.dim is not None:
        yield [whole.name(key)], Manifest(1, split.dim, 0)
    stored = [whole] if whole.owners else [Layout(writer=True), whole]
    for one, data in zip(stored, calls.get([one.manifest(key) for one in stored]), strict=True):
        manifest = Manifest.read(data)
        if manifest is not None:
            yield manifest.layout(one).names(key), manifest
    manifest = None if whole.owners else _manifest_of_first(calls, key)
    if manifest is not None:
        yield manifest.layout(whole).names(key), manifest


def _manifest_of_first(calls: Calls, key: str) -> Manifest | None:
    """Return how the pieces of put_tensor_with_tp, which have no manifest, were cut."""
    value = calls.get([Layout((), Split(0, 1, None)).name(key)])[0]
    if value is None:
        return None
    try:
        head = head_of(value)
    except RequestError:
        return None  # which is logged where it is asked for by this name
    return Manifest.of(head.split, head.shape, head.data_bytes) if head.split else None


def _from_pieces(
    calls: Calls, names: Sequence[str], manifest: Manifest, split: Split | None, memory: memoryview | None
) -> "torch.Tensor | None":
    """Return what is wanted from one set of pieces, None if one that is needed is missing.

    Raises:
        RequestError: they are not the pieces of one tensor, or it has no such piece; PeerError.
    """
    sizes = calls.sizes(names)
    if any(size == OBJECT_NOT_FOUND for size in sizes):
        return None
    if min(sizes) < 0:
        raise PeerGone(f"{names[0]}: some of its pieces may be there and cannot be read")
    sides = _sides(sizes, manifest.step_bytes)
    if split is not None and split.dim is None:
        split = Split(split.rank, split.size, manifest.dim)
    chosen = list(range(len(names)))
    if _as_cut(sides) and split is not None and split.dim == manifest.dim:
        chosen = overlapping(sides, span(sum(sides), split.rank, split.size))
        if not chosen:
            raise RequestError(f"{sum(sides)} long, it has no piece {split.rank} of {split.size}")
    found = calls.get([names[piece] for piece in chosen])
    values = {piece: value for piece, value in zip(chosen, found, strict=True) if value is not None}
    if len(values) < len(chosen):
        return None  # gone since it was looked for
    heads = {piece: head_of(value) for piece, value in values.items()}
    sides = sides or [_side(heads[piece], manifest.dim) for piece in chosen]
    first = heads[chosen[0]]
    for piece, head in heads.items():
        _check(piece, head, first, manifest, sides)
    shape = [*first.shape]
    shape[manifest.dim] = sum(sides)
    return _copy_all(values, heads, shape, manifest.dim, sides, split, memory)


def _sides(sizes: Sequence[int], step_bytes: int) -> list[int]:
    """Return the lengths of pieces, none if their sizes do not say them."""
    return [(size - HEAD_BYTES) // step_bytes for size in sizes] if step_bytes else []


def _as_cut(sides: Sequence[int]) -> bool:
    """Return whether pieces have the lengths of one layout; if not, the headers of all have to say so."""
    total, size = sum(sides), len(sides)
    spans = [span(total, rank, size) for rank in range(size)]
    return size > 0 and all(end - begin == side for (begin, end), side in zip(spans, sides, strict=True))


def _side(head: Head | None, dim: int) -> int:
    return head.shape[dim] if head is not None and dim < len(head.shape) else 0


def _check(piece: int, head: Head, first: Head, manifest: Manifest, sides: Sequence[int]) -> None:
    """Pass if a piece belongs where the manifest has it, beside the first one.

    Raises:
        RequestError: it does not.
    """
    if manifest.dim >= len(head.shape):
        raise RequestError(f"piece {piece} of shape {list(head.shape)} has no dimension {manifest.dim}")
    if manifest.size > 1 and head.split != Split(piece, manifest.size, manifest.dim):
        raise RequestError(f"piece {piece} is one of another layout: {head.split}")
    shape = [*first.shape]
    shape[manifest.dim] = sides[piece]
    if (head.dtype, [*head.shape]) != (first.dtype, shape):
        raise RequestError(f"piece {piece} is {head.dtype}{list(head.shape)}, not {first.dtype}{shape}")


def _copy_all(
    values: Mapping[int, bytes],
    heads: Mapping[int, Head],
    whole: Sequence[int],
    dim: int,
    sides: Sequence[int],
    split: Split | None,
    memory: memoryview | None,
) -> "torch.Tensor":
    if split is not None and (split.dim is None or split.dim >= len(whole)):
        raise RequestError(f"of shape {list(whole)}, it has no dimension {split.dim}")
    shape, moves = copies(whole, dim, sides, split)
    if split is not None and split.dim is not None and not shape[split.dim]:
        raise RequestError(f"of shape {list(whole)}, it has no piece {split.rank} of {split.size}")
    head = next(iter(heads.values()))._replace(shape=tuple(shape), split=split)
    size_bytes = HEAD_BYTES + head.data_bytes
    if memory is None:
        fresh: Any = np.empty(size_bytes, np.uint8)
        memory = memoryview(fresh)
    if memory.nbytes < size_bytes:
        raise RequestError(f"it needs {size_bytes} bytes, there are {memory.nbytes}")
    memory = memory[:size_bytes]
    memory[:HEAD_BYTES] = head.pack()
    target = _elements(memory, head)
    for move in moves:
        target[move.target] = _elements(values[move.piece], heads[move.piece])[move.source]
    return tensor_of(memory)


def _elements(data: Any, head: Head) -> "np.ndarray[Any, Any]":
    """Return an object's elements as numbers of the same width: which ones they are changes no copy."""
    kind = "c16" if head.item_bytes == 16 else f"u{head.item_bytes}"
    return np.frombuffer(data, kind, offset=HEAD_BYTES).reshape(head.shape)
