"""Reading tensors that lie in the pool in pieces, as the reader wants them: a piece, or all of it.

The piece itself is read if it is there. Otherwise it is put together from the pieces of another layout, of
which a manifest (or the first piece) says how it was cut. Bytes are used only if every header says what its
place in that layout says: pieces of two layouts are never mixed.
"""

from collections.abc import Sequence
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
        try:
            if value is not None and _is_piece(head_of(value), want):
                found[row] = tensor_of(value)
            elif not want.exact:
                room = memory[row] if memory is not None else None
                found[row] = _put_together(calls, keys[row], want.layout, room)
        except RequestError as error:
            log.error("mooncake.store: no such tensor", key=keys[row], reason=str(error))
    return found


def _objects(calls: Calls, names: Sequence[str], memory: Sequence[memoryview] | None) -> Sequence[Any]:
    if memory is None:
        return calls.get(names)
    codes = calls.get_into(names, [[room] for room in memory])
    return [room[:code] if code > 0 else None for room, code in zip(memory, codes, strict=True)]


def _is_piece(head: Head, want: Want) -> bool:
    """Return whether an object of the right name is what is wanted: not every name says the layout."""
    split, stored = want.layout.split, head.split
    if want.exact or split is None:
        return True
    if stored is None:
        return split.dim is None  # a caller of the _with_tp forms has named his shards himself
    return (stored.rank, stored.size) == (split.rank, split.size) and split.dim in {None, stored.dim}


def _put_together(calls: Calls, key: str, layout: Layout, memory: memoryview | None) -> "torch.Tensor | None":
    """Return a piece, or all of a tensor, from other pieces; the first set of them that is whole is used."""
    whole = layout.with_split(None)
    split = layout.split
    if split is not None and split.dim is not None:
        made = _from_pieces(calls, [whole.name(key)], Manifest(1, split.dim, 0), split, memory)
        if made is not None:
            return made
    sets = [whole] if whole.owners else [Layout(writer=True), whole]
    stored = calls.get([one.manifest(key) for one in sets])
    for one, data in zip(sets, stored, strict=True):
        manifest = Manifest.read(data)
        if manifest is None:
            continue
        made = _from_pieces(calls, manifest.layout(one).names(key), manifest, split, memory)
        if made is not None:
            return made
    manifest = None if whole.owners else _manifest_of_first(calls, key)
    if manifest is None:
        return None
    return _from_pieces(calls, manifest.layout(whole).names(key), manifest, split, memory)


def _manifest_of_first(calls: Calls, key: str) -> Manifest | None:
    """Return how the pieces of put_tensor_with_tp, which have no manifest, were cut."""
    value = calls.get([Layout((), Split(0, 1, None)).name(key)])[0]
    if value is None:
        return None
    head = head_of(value)
    return Manifest.of(head.split, head.shape, head.data_bytes) if head.split else None


def _from_pieces(
    calls: Calls, names: Sequence[str], manifest: Manifest, split: Split | None, memory: memoryview | None
) -> "torch.Tensor | None":
    """Return what is wanted from one set of pieces; None if one that is needed is missing or of another set.

    Raises:
        RequestError: the tensor has no such piece; PeerError.
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
    values = calls.get([names[piece] for piece in chosen])
    heads = {piece: head_of(value) for piece, value in zip(chosen, values, strict=True) if value is not None}
    sides = sides or [_side(heads.get(piece), manifest.dim) for piece in chosen]
    reason = _mismatch(heads, chosen, manifest, sides)
    if reason:
        log.warning("mooncake.store: not one tensor", pieces=names[0], reason=reason)
        return None
    first = heads[chosen[0]]
    shape = [*first.shape]
    shape[manifest.dim] = sum(sides)
    return _copy_all(dict(zip(chosen, values, strict=True)), first, shape, manifest.dim, sides, split, memory)


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


def _mismatch(heads: dict[int, Head], chosen: Sequence[int], manifest: Manifest, sides: Sequence[int]) -> str:
    """Return why these are not the pieces of one tensor; empty: they are."""
    first = heads.get(chosen[0])
    for piece in chosen:
        head = heads.get(piece)
        if head is None or first is None:
            return f"piece {piece} is gone"
        if manifest.dim >= len(head.shape):
            return f"piece {piece} has no dimension {manifest.dim}"
        if manifest.size > 1 and head.split != Split(piece, manifest.size, manifest.dim):
            return f"piece {piece} is {head.split}"
        shape = [*first.shape]
        shape[manifest.dim] = sides[piece]
        if (head.dtype, [*head.shape]) != (first.dtype, shape):
            return f"piece {piece} is {head.dtype}{list(head.shape)}, not {first.dtype}{shape}"
    return ""


def _copy_all(
    values: dict[int, bytes | None],
    first: Head,
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
    head = Head(first.dtype, tuple(shape), split)
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
        value = values[move.piece]
        source_shape = [*first.shape]
        source_shape[dim] = sides[move.piece]
        source = _elements(value, Head(first.dtype, tuple(source_shape), None))
        target[move.target] = source[move.source]
    return tensor_of(memory)


def _elements(data: Any, head: Head) -> "np.ndarray[Any, Any]":
    """Return an object's elements as numbers of the same width: which ones they are changes no copy."""
    kind = "c16" if head.item_bytes == 16 else f"u{head.item_bytes}"
    return np.frombuffer(data, kind, offset=HEAD_BYTES).reshape(head.shape)
