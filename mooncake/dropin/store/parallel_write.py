"""Writing tensors to the pool in pieces, with what a reader needs to put them together."""

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec

from mooncake.core.errors import RequestError
from mooncake.dropin.store.calls import Calls
from mooncake.dropin.store.parallel_layout import Layout, Split
from mooncake.dropin.store.parallel_read import Manifest
from mooncake.dropin.store.tensors import Piece, cut, dtype_of, put_pieces
from mooncake.dropin.store.types import OK, ReplicateConfig


class Writing(msgspec.Struct, frozen=True):
    """What is stored of one tensor: pieces under names of `layout`, none if that is impossible."""

    layout: Layout
    pieces: list[Piece]
    manifest: Manifest | None = None


def whole(key: str, tensor: Any, layout: Layout) -> Writing:
    """Return a tensor that is stored as it is, all of it or as the piece that it is.

    Raises:
        RequestError: it cannot be stored, or has no dimension along which it is a piece.
    """
    split = layout.split
    manifest = None
    dtype_of(tensor)
    if split is not None:
        dim = split.dim or 0
        if dim >= tensor.dim():
            raise RequestError(f"a tensor of shape {list(tensor.shape)} has no dimension {dim}")
        manifest = Manifest.of(split, tensor.shape, tensor.numel() * tensor.element_size())
    return Writing(layout, [(layout.name(key), tensor, split)], manifest)


def cut_up(key: str, tensor: Any, layout: Layout, ranks: Sequence[int]) -> Writing:
    """Return pieces of a whole tensor.

    Raises:
        RequestError: it cannot be stored, or has not so many.
    """
    split = layout.split
    if split is None or split.dim is None:
        return whole(key, tensor, layout)
    pieces = cut(tensor, split.size, split.dim)
    splits = [Split(rank, split.size, split.dim) for rank in ranks]
    return Writing(
        layout,
        [(layout.with_split(one).name(key), pieces[one.rank], one) for one in splits],
        Manifest.of(split, tensor.shape, tensor.numel() * tensor.element_size()),
    )


def write(
    calls: Calls,
    keys: Sequence[str],
    writings: Sequence[Writing | None],
    config: ReplicateConfig | None,
    *,
    replace: bool,
) -> list[int]:
    """Store tensors; 0 or the first failure of each, -600 where there is nothing to write.

    Args:
        calls: of the store.
        keys: of the tensors.
        writings: what is stored of each.
        config: how all of it is kept.
        replace: what is there gives way, and pieces of another layout go.
    """
    store = calls.upsert if replace else calls.put
    codes = put_pieces(store, keys, [one.pieces if one else [] for one in writings], config)
    asked = {
        one.layout.manifest(key): Asked(key, one.layout, one.manifest)
        for key, one, code in zip(keys, writings, codes, strict=True)
        if one is not None and one.manifest is not None and code == OK
    }
    failed = _write_manifests(calls, asked, config, replace=replace)
    for row, (key, one) in enumerate(zip(keys, writings, strict=True)):
        if one is not None and codes[row] == OK:
            codes[row] = failed.get(one.layout.manifest(key), OK)
    return codes


class Asked(NamedTuple):
    """A manifest that is to be there."""

    key: str
    layout: Layout
    manifest: Manifest


def _write_manifests(
    calls: Calls, asked: dict[str, Asked], config: ReplicateConfig | None, *, replace: bool
) -> dict[str, int]:
    """Let the manifests say what was written; return the codes of those that could not be."""
    if not asked:
        return {}
    stored = calls.get([*asked])
    new, changed = [], []
    for (name, one), data in zip(asked.items(), stored, strict=True):
        old = Manifest.read(data)
        if data is None:
            new.append(name)
        elif old is None or (old != one.manifest and _gives_way(calls, one, old, replace=replace)):
            changed.append(name)
    config = copy.copy(config)
    if config is not None:
        config.group_ids = None
    codes: dict[str, int] = {}
    for names, store in ((new, calls.put), (changed, calls.upsert)):
        sources = [[memoryview(msgspec.msgpack.encode(asked[name].manifest))] for name in names]
        codes.update(zip(names, store(names, sources, config), strict=True))
    return {name: code for name, code in codes.items() if code != OK}


def _gives_way(calls: Calls, asked: Asked, old: Manifest, *, replace: bool) -> bool:
    """Return whether readers are to look for the new layout; what an upsert leaves of the old one goes."""
    names = old.layout(asked.layout).names(asked.key)
    if replace:
        kept = {*asked.layout.names(asked.key)}
        calls.remove([name for name in names if name not in kept], force=True)
        return True
    return min(calls.sizes(names)) <= 0
