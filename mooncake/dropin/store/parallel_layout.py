"""How a tensor is cut along an axis and what its pieces are called: arithmetic on shapes and names alone.

A layout is a list of axes, one at most of each kind. "tp" cuts the tensor along a dimension; "dp", "ep" and
"pp" say whose tensor it is, and the bytes do not depend on them. Rules and names are those measured on
upstream's wheel (0.3.13.post1). Pieces are cut as torch.chunk does: all of one length, the last one shorter.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec

from mooncake.core.errors import RequestError

KINDS = ("dp", "tp", "ep", "pp")
"""In the order in which they stand in names."""
PARTS_MAX = 1 << 16
"""Of one tensor; a reader may have to ask for each of them."""

Span = tuple[int, int]


class Split(msgspec.Struct, frozen=True):
    """Piece `rank` of `size` along `dim`; None: along the one it is stored along."""

    rank: int
    size: int
    dim: int | None


class Axis(msgspec.Struct, frozen=True):
    """One axis of a layout, as callers say it."""

    kind: str
    rank: int
    size: int
    split_dim: int | None = None
    expert_id: int | None = None
    stage_id: int | None = None

    def check(self) -> None:
        """Pass if these values make sense together.

        Raises:
            RequestError: they do not.
        """
        if self.kind not in KINDS:
            raise RequestError(f"an axis is one of {', '.join(KINDS)}, not {self.kind!r}")
        if not 0 <= self.rank < self.size <= PARTS_MAX:
            raise RequestError(f"axis {self.kind}: rank {self.rank} of {self.size}")
        if self.kind == "tp" and (self.split_dim is None or self.split_dim < 0):
            raise RequestError(f"axis tp: split_dim must be 0 or more, not {self.split_dim}")
        if self.kind != "tp" and self.split_dim is not None:
            raise RequestError(f"axis {self.kind}: split_dim is for tp alone")
        if self.kind == "ep" and self.expert_id is None:
            raise RequestError("axis ep: needs expert_id")
        if self.kind == "pp" and self.stage_id is None:
            raise RequestError("axis pp: needs stage_id")

    def text(self) -> str:
        """Return its part of a name."""
        marks = (("sd", self.split_dim), ("eid", self.expert_id), ("sid", self.stage_id))
        more = "".join(f"_{mark}{value}" for mark, value in marks if value is not None)
        return f"{self.kind}_{self.rank}of{self.size}{more}"


class Layout(msgspec.Struct, frozen=True):
    """What one object holds of a tensor: whose it is (`owners`) and which piece; None: all of it."""

    owners: tuple[Axis, ...] = ()
    split: Split | None = None
    writer: bool = False
    """Pieces of one tensor that several writers cut for themselves have names of their own."""

    @classmethod
    def of(cls, axes: Sequence[Axis]) -> "Layout":
        """Return the layout that these axes describe.

        Raises:
            RequestError: none, one kind twice, or one that makes no sense.
        """
        for axis in axes:
            axis.check()
        kinds = [axis.kind for axis in axes]
        if not kinds or len({*kinds}) != len(kinds):
            raise RequestError(f"axes of different kinds, one at least; not {kinds}")
        cut = next((axis for axis in axes if axis.kind == "tp"), None)
        others = sorted((axis for axis in axes if axis is not cut), key=lambda axis: KINDS.index(axis.kind))
        return cls(tuple(others), Split(cut.rank, cut.size, cut.split_dim) if cut else None)

    def name(self, key: str) -> str:
        """Return the name of the object."""
        split = self.split
        if split is None:
            return f"{key}{self._suffix(self.owners)}"
        if self.writer:
            return f"{key}__writer_{split.rank}of{split.size}_sd{split.dim}"
        if not self.owners:
            return f"{key}_tp_{split.rank}"
        axes = [*self.owners, Axis("tp", split.rank, split.size, split.dim)]
        return f"{key}{self._suffix(sorted(axes, key=lambda axis: KINDS.index(axis.kind)))}"

    def names(self, key: str) -> list[str]:
        """Return the names of all pieces, in their order."""
        if self.split is None:
            return [self.name(key)]
        size, dim = self.split.size, self.split.dim
        return [self.with_split(Split(rank, size, dim)).name(key) for rank in range(size)]

    def manifest(self, key: str) -> str:
        """Return the name of the object that says how the pieces were cut."""
        kind = "writer" if self.writer else "parallelism"
        return f"{key}{self._suffix(self.owners)}__{kind}_manifest"

    def with_split(self, split: Split | None) -> "Layout":
        """Return the layout of another piece of the same tensor."""
        return Layout(self.owners, split, self.writer)

    @staticmethod
    def _suffix(axes: Sequence[Axis]) -> str:
        return "".join(f"__{axis.text()}" for axis in axes)


def axis_of(given: Any) -> Axis:
    """Return what a ParallelAxis, or anything with its fields, says.

    Raises:
        RequestError: a field is missing or of a wrong type.
    """
    try:
        values = {field: getattr(given, field) for field in Axis.__struct_fields__}
        if isinstance(values["kind"], str):
            values["kind"] = values["kind"].lower()
        return msgspec.convert(values, Axis)
    except (AttributeError, msgspec.ValidationError) as error:
        raise RequestError(f"{type(given).__name__} is no ParallelAxis: {error}") from error


def span(side: int, rank: int, size: int) -> Span:
    """Return where piece `rank` of `size` of a side begins and ends; behind the last one it is empty."""
    step = -(-side // size)
    return min(rank * step, side), min((rank + 1) * step, side)


class Copy(NamedTuple):
    """Elements that go from one piece into the target; slices of every dimension."""

    piece: int
    source: tuple[slice, ...]
    target: tuple[slice, ...]


def overlapping(sides: Sequence[int], wanted: Span) -> list[int]:
    """Return which pieces, `sides` long and one behind the other, have some of `wanted`."""
    begin, found = 0, []
    for piece, side in enumerate(sides):
        if max(begin, wanted[0]) < min(begin + side, wanted[1]):
            found.append(piece)
        begin += side
    return found


def copies(
    shape: Sequence[int], dim: int, sides: Sequence[int], wanted: Split | None
) -> tuple[list[int], list[Copy]]:
    """Return the shape of a target and what fills it.

    Args:
        shape: of the whole tensor.
        dim: along which it lies in pieces.
        sides: their lengths there, which make up that of the whole.
        wanted: the piece to make, None = the whole; its `dim` is none of None.
    """
    box = [(0, side) for side in shape]
    if wanted is not None and wanted.dim is not None:
        box[wanted.dim] = span(shape[wanted.dim], wanted.rank, wanted.size)
    into = [slice(0, end - begin) for begin, end in box]
    moves, begin = [], 0
    for piece, side in enumerate(sides):
        low, high = max(begin, box[dim][0]), min(begin + side, box[dim][1])
        if low < high:
            source = [slice(*one) for one in box]
            source[dim] = slice(low - begin, high - begin)
            target = [*into]
            target[dim] = slice(low - box[dim][0], high - box[dim][0])
            moves.append(Copy(piece, tuple(source), tuple(target)))
        begin += side
    return [end - first for first, end in box], moves
