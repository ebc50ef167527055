"""`EngramStore` of `mooncake.store`: embedding tables as objects of the pool, looked up by row.

One layer has a table of float32 rows for each head; its object is named "engram:l<layer>:h<head>" and holds
the rows one behind the other, as upstream's. A lookup reads each table once, verified as every object is,
and takes the rows from it: good for tables of some megabytes, not for gigabytes.
"""

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mooncake.core.errors import CapacityError, MooncakeError, PeerGone, RequestError
from mooncake.dropin.store.types import (
    INVALID_PARAMS,
    NO_AVAILABLE_HANDLE,
    OBJECT_HAS_LEASE,
    OBJECT_NOT_FOUND,
    OK,
)

ROW_BYTES = np.dtype(np.float32).itemsize


class EngramStoreConfig:
    """Shape of a layer's tables; the fields are plain attributes, as upstream's."""

    def __init__(self) -> None:
        """One head of 1024 rows of 64 numbers."""
        self.table_vocab_sizes: list[int] = [1024]
        self.embedding_dim = 64


class EngramStore:
    """The tables of one layer."""

    def __init__(self, layer_id: int, config: EngramStoreConfig, store: Any = None) -> None:
        """Write and read nothing yet.

        Args:
            layer_id: part of the tables' names.
            config: their shape; copied.
            store: a MooncakeDistributedStore that is set up when it is used.

        Raises:
            RequestError: a size is not positive, or `store` is no store.
        """
        sizes = [operator.index(size) for size in config.table_vocab_sizes]
        if not sizes:
            raise RequestError("EngramStoreConfig.table_vocab_sizes must not be empty")
        if min(sizes) <= 0:
            raise RequestError("EngramStoreConfig.table_vocab_sizes must contain only positive values")
        if config.embedding_dim <= 0:
            raise RequestError("EngramStoreConfig.embedding_dim must be positive")
        if store is not None and not hasattr(store, "get_buffer"):
            raise RequestError(f"EngramStore: {type(store).__name__} is no store")
        self._sizes, self._dim = sizes, operator.index(config.embedding_dim)
        self._keys = [f"engram:l{operator.index(layer_id)}:h{head}" for head in range(len(sizes))]
        self._store = store

    def get_table_vocab_sizes(self) -> list[int]:
        """Return the rows of each head's table."""
        return list(self._sizes)

    def get_store_keys(self) -> list[str]:
        """Return the names of the tables' objects, by head."""
        return list(self._keys)

    def get_num_heads(self) -> int:
        """Return how many tables there are."""
        return len(self._keys)

    def get_embedding_dim(self) -> int:
        """Return how many numbers a row has."""
        return self._dim

    def populate(self, embedding_buffers: Sequence[npt.NDArray[Any]]) -> None:
        """Store the tables; they stay as long as other objects do, so that a full pool may evict them.

        Args:
            embedding_buffers: for each head an array [its rows, embedding_dim]; converted to float32.

        Raises:
            RequestError: wrong shapes, or a table is there already: call remove_from_store first.
            CapacityError: they do not fit; PeerError: a store does not answer. None is left behind then.
        """
        tables = self._tables(embedding_buffers)
        store = self._need()
        for key, there in zip(self._keys, store.batch_is_exist(self._keys), strict=True):
            if there < 0:
                raise _error(f"{key}: is it there", there)
            if there:
                raise RequestError(f"{key} is in the store already: call remove_from_store first")
        code = store.put_batch(self._keys, tables)
        if code != OK:
            store.batch_remove(self._keys, force=True)
            raise _error(f"populate: {self._keys[0]} and its like", code)

    def _tables(self, buffers: Sequence[npt.NDArray[Any]]) -> list[npt.NDArray[np.float32]]:
        if len(buffers) != len(self._keys):
            raise RequestError(f"{len(buffers)} embedding buffers for {len(self._keys)} heads")
        tables = []
        for head, (buffer, rows) in enumerate(zip(buffers, self._sizes, strict=True)):
            shape = getattr(buffer, "shape", None)
            if shape is None or tuple(shape) != (rows, self._dim):
                raise RequestError(f"head {head}: an array of shape {(rows, self._dim)}, not {shape}")
            tables.append(np.ascontiguousarray(buffer, np.float32))
        return tables

    def lookup(self, row_ids: Any) -> npt.NDArray[np.float32]:
        """Return embeddings for row numbers.

        Args:
            row_ids: [B, L, heads], a number of a row of each head's table; nested lists or an array.

        Returns:
            [B, L, heads, embedding_dim].

        Raises:
            RequestError: wrong shape, a row that no table has, or the tables are not in the store.
            PeerError: they may be there and cannot be read.
        """
        rows = self._rows(row_ids)
        found = np.empty((*rows.shape, self._dim), np.float32)
        for head, value in enumerate(self._need().get_batch(self._keys)):
            key, size = self._keys[head], self._sizes[head]
            if len(value) != size * self._dim * ROW_BYTES:
                raise RequestError(f"{key}: {len(value)} bytes in the store, not {size} rows: populate it")
            table = np.frombuffer(value, np.float32).reshape(size, self._dim)
            found[:, :, head] = table[rows[:, :, head]]
        return found

    def _rows(self, row_ids: Any) -> npt.NDArray[np.int64]:
        try:
            given = np.asarray(row_ids)
            rows = given.astype(np.int64)
        except (TypeError, ValueError) as error:
            raise RequestError(f"row_ids: {error}") from error
        if rows.ndim != 3 or not rows.size or rows.shape[2] != len(self._keys):
            raise RequestError(f"row_ids of shape {rows.shape}, not [B, L, {len(self._keys)}]")
        if (rows != given).any() or (rows < 0).any() or (rows >= np.asarray(self._sizes)).any():
            raise RequestError(f"row_ids: rows of tables that have {self._sizes} of them")
        return rows

    def remove_from_store(self, force: bool = False) -> int:
        """Remove this layer's tables; return how many were there.

        Raises:
            RequestError: one was read just now and `force` is not given; PeerError: a store does not answer.
        """
        codes = self._need().batch_remove(self._keys, force=force)
        for key, code in zip(self._keys, codes, strict=True):
            if code not in (OK, OBJECT_NOT_FOUND):
                raise _error(f"remove_from_store: {key}", code)
        return sum(code == OK for code in codes)

    def _need(self) -> Any:
        if self._store is None:
            raise RequestError("this EngramStore was made without a store")
        return self._store


def _error(what: str, code: int) -> MooncakeError:
    if code == NO_AVAILABLE_HANDLE:
        return CapacityError(f"{what}: no room in the pool")
    if code == OBJECT_HAS_LEASE:
        return RequestError(f"{what}: it was read just now: pass force=True")
    if code == INVALID_PARAMS:
        return RequestError(f"{what}: refused, rc={code}: is the store set up?")
    return PeerGone(f"{what}: rc={code}")
