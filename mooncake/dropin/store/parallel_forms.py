"""The methods of MooncakeDistributedStore for tensors by parallelism axes, under upstream's names."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import msgspec
import structlog

from mooncake.core.errors import RequestError
from mooncake.dropin.store.answers import answers_codes
from mooncake.dropin.store.calls import Calls
from mooncake.dropin.store.parallel_layout import Axis, Layout, Split, axis_of
from mooncake.dropin.store.parallel_read import Want, read
from mooncake.dropin.store.parallel_types import MODES
from mooncake.dropin.store.parallel_write import Writing, cut_up, whole, write
from mooncake.dropin.store.tensors import memory_for, tensors_at
from mooncake.dropin.store.types import ReplicateConfig

log = structlog.get_logger(__name__)
T = TypeVar("T")


class ParallelForms:
    """Needs torch; every method may be called from any thread.

    With "tp" as its only axis, `tensor` is the piece of that rank; with others besides, and for a writer
    partition, it is the whole tensor, of which the piece of that rank is stored; without "tp" it is stored
    as it is. The `_from` forms take a whole tensor and store all its pieces, whatever the rank. A reader gets
    any piece, along any dimension, or all of it, if its other axes are those it was written with.
    """

    def _need(self) -> Calls:
        raise NotImplementedError

    # ------------------------------------------------------------ writing

    def put_tensor_with_parallelism(
        self,
        key: str,
        tensor: Any,
        parallelism: Any = None,
        config: ReplicateConfig | None = None,
        writer_partition: Any = None,
    ) -> int:
        """Store a tensor, or the piece of it that `parallelism` or `writer_partition` names."""
        return self.batch_put_tensor_with_parallelism(
            [key], [tensor], _one(parallelism), config, _one(writer_partition)
        )[0]

    @answers_codes
    def batch_put_tensor_with_parallelism(
        self,
        keys: Sequence[str],
        tensors_list: Sequence[Any],
        parallelisms: Any = None,
        config: ReplicateConfig | None = None,
        writer_partitions: Any = None,
    ) -> list[int]:
        """As put_tensor_with_parallelism, for several; lists, or None, of what each is."""
        writings = _writings(keys, tensors_list, parallelisms, writer_partitions, _as_given)
        return write(self._need(), keys, writings, config, replace=False)

    def upsert_tensor_with_parallelism(
        self,
        key: str,
        tensor: Any,
        parallelism: Any = None,
        config: ReplicateConfig | None = None,
        writer_partition: Any = None,
    ) -> int:
        """As put_tensor_with_parallelism, in the place of what is there."""
        return self.batch_upsert_tensor_with_parallelism(
            [key], [tensor], _one(parallelism), config, _one(writer_partition)
        )[0]

    @answers_codes
    def batch_upsert_tensor_with_parallelism(
        self,
        keys: Sequence[str],
        tensors_list: Sequence[Any],
        parallelisms: Any = None,
        config: ReplicateConfig | None = None,
        writer_partitions: Any = None,
    ) -> list[int]:
        """As upsert_tensor_with_parallelism, for several."""
        writings = _writings(keys, tensors_list, parallelisms, writer_partitions, _as_given)
        return write(self._need(), keys, writings, config, replace=True)

    # ------------------------------------------------------------ writing from the caller's memory

    def put_tensor_with_parallelism_from(
        self,
        key: str,
        buffer_ptr: int,
        size: int,
        parallelism: Any = None,
        config: ReplicateConfig | None = None,
        writer_partition: Any = None,
    ) -> int:
        """Store the whole tensor that get_tensor_into has left in memory, in all its pieces."""
        return self.batch_put_tensor_with_parallelism_from(
            [key], [buffer_ptr], [size], _one(parallelism), config, _one(writer_partition)
        )[0]

    @answers_codes
    def batch_put_tensor_with_parallelism_from(
        self,
        keys: Sequence[str],
        buffer_ptrs: Sequence[int],
        sizes: Sequence[int],
        parallelisms: Any = None,
        config: ReplicateConfig | None = None,
        writer_partitions: Any = None,
    ) -> list[int]:
        """As put_tensor_with_parallelism_from, for several."""
        calls = self._need()
        tensors = tensors_at(calls, keys, buffer_ptrs, sizes)
        writings = _writings(keys, tensors, parallelisms, writer_partitions, _in_pieces)
        return write(calls, keys, writings, config, replace=False)

    def upsert_tensor_with_parallelism_from(
        self,
        key: str,
        buffer_ptr: int,
        size: int,
        parallelism: Any = None,
        config: ReplicateConfig | None = None,
        writer_partition: Any = None,
    ) -> int:
        """As put_tensor_with_parallelism_from, in the place of what is there."""
        return self.batch_upsert_tensor_with_parallelism_from(
            [key], [buffer_ptr], [size], _one(parallelism), config, _one(writer_partition)
        )[0]

    @answers_codes
    def batch_upsert_tensor_with_parallelism_from(
        self,
        keys: Sequence[str],
        buffer_ptrs: Sequence[int],
        sizes: Sequence[int],
        parallelisms: Any = None,
        config: ReplicateConfig | None = None,
        writer_partitions: Any = None,
    ) -> list[int]:
        """As upsert_tensor_with_parallelism_from, for several."""
        calls = self._need()
        tensors = tensors_at(calls, keys, buffer_ptrs, sizes)
        writings = _writings(keys, tensors, parallelisms, writer_partitions, _in_pieces)
        return write(calls, keys, writings, config, replace=True)

    # ------------------------------------------------------------ reading

    def get_tensor_with_parallelism(self, key: str, target: Any = None) -> Any:
        """Return the tensor of that name, or what the ReadTarget asks for; None, raises: as get_tensor."""
        return self.batch_get_tensor_with_parallelism([key], _one(target))[0]

    def batch_get_tensor_with_parallelism(self, keys: Sequence[str], targets: Any = None) -> list[Any]:
        """As get_tensor_with_parallelism, for several; a list of targets, or None."""
        return list(read(self._need(), keys, _wants(keys, targets)))

    def get_tensor_with_parallelism_into(
        self, key: str, buffer_ptr: int, size: int, target: Any = None
    ) -> Any:
        """As get_tensor_with_parallelism, header and all, into memory; return it there."""
        return self.batch_get_tensor_with_parallelism_into([key], [buffer_ptr], [size], _one(target))[0]

    def batch_get_tensor_with_parallelism_into(
        self, keys: Sequence[str], buffer_ptrs: Sequence[int], sizes: Sequence[int], targets: Any = None
    ) -> list[Any]:
        """As get_tensor_with_parallelism_into, for several."""
        calls = self._need()
        try:
            memory = memory_for(calls, keys, buffer_ptrs, sizes)
        except RequestError as error:
            log.error("mooncake.store: not read", keys=list(keys), reason=str(error))
            return [None] * len(keys)
        return list(read(calls, keys, _wants(keys, targets), memory))


def _one(given: Any) -> list[Any] | None:
    return None if given is None else [given]


def _each(what: str, keys: Sequence[str], given: Any) -> list[Any]:
    if given is None:
        return [None] * len(keys)
    if not isinstance(given, list | tuple) or len(given) != len(keys):
        raise RequestError(f"{what}: None, or a list with one for each of {len(keys)} keys")
    return list(given)


def _layouts(keys: Sequence[str], parallelisms: Any, writers: Any) -> list[Layout | None]:
    """Return what each object is to hold, None for those where that makes no sense (it is logged).

    Raises:
        RequestError: lists of a wrong length, or both of them.
    """
    if parallelisms is not None and writers is not None:
        raise RequestError("parallelism and writer_partition exclude each other")
    if writers is not None:
        return _try_each(keys, _each("writer_partitions", keys, writers), _writer_layout)
    return _try_each(keys, _each("parallelisms", keys, parallelisms), _layout)


def _layout(parallelism: Any) -> Layout:
    if parallelism is None:
        return Layout()
    axes = getattr(parallelism, "axes", None)
    if not isinstance(axes, list | tuple):
        raise RequestError(f"a TensorParallelism has a list of axes, {type(parallelism).__name__} has not")
    return Layout.of([axis_of(axis) for axis in axes])


def _writer_layout(writer: Any) -> Layout:
    if writer is None:
        return Layout()
    try:
        values = {name: getattr(writer, name) for name in ("rank", "size", "split_dim")}
        axis = msgspec.convert({"kind": "tp", **values}, Axis)
    except (AttributeError, msgspec.ValidationError) as error:
        raise RequestError(f"a writer partition has rank, size and split_dim: {error}") from error
    axis.check()
    return Layout((), Split(axis.rank, axis.size, axis.split_dim), writer=True)


def _wants(keys: Sequence[str], targets: Any) -> list[Want | None]:
    try:
        given = _each("targets", keys, targets)
    except RequestError as error:
        log.error("mooncake.store: not read", reason=str(error))
        return [None] * len(keys)
    return _try_each(keys, given, _want)


def _want(target: Any) -> Want:
    if target is None:
        return Want(Layout(), exact=True)
    mode, parallelism = getattr(target, "mode", None), getattr(target, "parallelism", None)
    if mode not in MODES:
        raise RequestError(f"a ReadTarget has a mode of {', '.join(MODES)}; this is {target!r}")
    if mode == "as_stored":
        if parallelism is not None:
            raise RequestError(
                'mode "as_stored" is the object of that name: use "shard" for one of its pieces'
            )
        return Want(Layout(), exact=True)
    if mode == "shard" and parallelism is None:
        raise RequestError('mode "shard" needs a parallelism')
    layout = _layout(parallelism)
    return Want(layout if mode == "shard" else layout.with_split(None))


def _as_given(key: str, tensor: Any, layout: Layout) -> Writing:
    if layout.split is not None and (layout.writer or layout.owners):
        return cut_up(key, tensor, layout, [layout.split.rank])
    return whole(key, tensor, layout)


def _in_pieces(key: str, tensor: Any, layout: Layout) -> Writing:
    split = layout.split
    if split is None:
        return whole(key, tensor, layout)
    return cut_up(key, tensor, layout, [split.rank] if layout.writer else range(split.size))


def _writings(
    keys: Sequence[str],
    tensors: Sequence[Any],
    parallelisms: Any,
    writers: Any,
    make: Callable[[str, Any, Layout], Writing],
) -> list[Writing | None]:
    layouts = _layouts(keys, parallelisms, writers)
    if len(tensors) != len(keys):
        raise RequestError(f"{len(keys)} keys, {len(tensors)} tensors")
    rows = list(zip(keys, tensors, layouts, strict=True))
    return _try_each(keys, rows, lambda row: None if row[2] is None else make(row[0], row[1], row[2]))


def _try_each(keys: Sequence[str], given: Sequence[Any], make: Callable[[Any], T]) -> list[T | None]:
    """Return what `make` makes of each, None where it makes no sense."""
    made: list[T | None] = []
    for key, one in zip(keys, given, strict=True):
        try:
            made.append(make(one))
        except RequestError as error:
            log.error("mooncake.store: makes no sense", key=key, reason=str(error))
            made.append(None)
    return made
