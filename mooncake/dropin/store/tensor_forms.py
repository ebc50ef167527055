"""The tensor methods of MooncakeDistributedStore, under upstream's names."""

from collections.abc import Sequence
from typing import Any

from mooncake.dropin.store.answers import answers_code, answers_codes
from mooncake.dropin.store.calls import Calls
from mooncake.dropin.store.parallel_layout import PARTS_MAX, Layout, Split
from mooncake.dropin.store.parallel_read import Want, read
from mooncake.dropin.store.tensor_outside import get_tensors_into_cuda, load_tensor, save_tensor
from mooncake.dropin.store.tensors import (
    get_tensors,
    get_tensors_into,
    memory_for,
    put_shards,
    put_tensors,
    tensors_at,
)
from mooncake.dropin.store.types import ReplicateConfig


class TensorForms:
    """Needs torch; every method may be called from any thread."""

    def _need(self) -> Calls:
        raise NotImplementedError

    # ------------------------------------------------------------ whole tensors

    def put_tensor(self, key: str, tensor: Any) -> int:
        """Store a tensor; 0 also if the key is there."""
        return self.batch_put_tensor([key], [tensor])[0]

    def pub_tensor(self, key: str, tensor: Any, config: ReplicateConfig | None = None) -> int:
        """As put_tensor, kept as `config` says."""
        return self.batch_pub_tensor([key], [tensor], config)[0]

    def upsert_tensor(self, key: str, tensor: Any) -> int:
        """As put_tensor, in the place of what is there."""
        return self.batch_upsert_tensor([key], [tensor])[0]

    def upsert_pub_tensor(self, key: str, tensor: Any, config: ReplicateConfig | None = None) -> int:
        """As upsert_tensor, kept as `config` says."""
        return self.batch_upsert_pub_tensor([key], [tensor], config)[0]

    def batch_put_tensor(self, keys: Sequence[str], tensors_list: Sequence[Any]) -> list[int]:
        """Store tensors; one code each, -600 for what is none."""
        return self.batch_pub_tensor(keys, tensors_list)

    @answers_codes
    def batch_pub_tensor(
        self, keys: Sequence[str], tensors_list: Sequence[Any], config: ReplicateConfig | None = None
    ) -> list[int]:
        """As batch_put_tensor, kept as `config` says."""
        return put_tensors(self._need().put, keys, tensors_list, config)

    def batch_upsert_tensor(self, keys: Sequence[str], tensors_list: Sequence[Any]) -> list[int]:
        """As batch_put_tensor, in the place of what is there."""
        return self.batch_upsert_pub_tensor(keys, tensors_list)

    @answers_codes
    def batch_upsert_pub_tensor(
        self, keys: Sequence[str], tensors_list: Sequence[Any], config: ReplicateConfig | None = None
    ) -> list[int]:
        """As batch_upsert_tensor, kept as `config` says."""
        return put_tensors(self._need().upsert, keys, tensors_list, config)

    def get_tensor(self, key: str) -> Any:
        """Return the tensor, None if it is missing or none; raises as get."""
        return self.batch_get_tensor([key])[0]

    def batch_get_tensor(self, keys: Sequence[str]) -> list[Any]:
        """As get_tensor, for several."""
        return list(get_tensors(self._need(), keys))

    # ------------------------------------------------------------ in the caller's memory

    def get_tensor_into(self, key: str, buffer_ptr: int, size: int) -> Any:
        """Read a tensor, header and all, into memory; return it there, None as in get_tensor."""
        return self.batch_get_tensor_into([key], [buffer_ptr], [size])[0]

    def batch_get_tensor_into(
        self, keys: Sequence[str], buffer_ptrs: Sequence[int], sizes: Sequence[int]
    ) -> list[Any]:
        """As get_tensor_into, for several."""
        return list(get_tensors_into(self._need(), keys, buffer_ptrs, sizes))

    def put_tensor_from(self, key: str, buffer_ptr: int, size: int) -> int:
        """Store what get_tensor_into has left in memory."""
        return self.batch_put_tensor_from([key], [buffer_ptr], [size])[0]

    @answers_codes
    def batch_put_tensor_from(
        self, keys: Sequence[str], buffer_ptrs: Sequence[int], sizes: Sequence[int]
    ) -> list[int]:
        """As put_tensor_from, for several."""
        calls = self._need()
        return put_tensors(calls.put, keys, tensors_at(calls, keys, buffer_ptrs, sizes), None)

    def upsert_tensor_from(self, key: str, buffer_ptr: int, size: int) -> int:
        """As put_tensor_from, in the place of what is there."""
        return self.batch_upsert_tensor_from([key], [buffer_ptr], [size])[0]

    @answers_codes
    def batch_upsert_tensor_from(
        self, keys: Sequence[str], buffer_ptrs: Sequence[int], sizes: Sequence[int]
    ) -> list[int]:
        """As upsert_tensor_from, for several."""
        calls = self._need()
        return put_tensors(calls.upsert, keys, tensors_at(calls, keys, buffer_ptrs, sizes), None)

    # ------------------------------------------------------------ elsewhere

    def get_tensor_into_cuda(self, key: str, tensor: Any) -> int:
        """Copy a stored tensor into a CUDA tensor of its type and shape; return its bytes.

        It goes through host memory. It was tried with stand-ins for CUDA tensors only, never on a GPU.

        Returns:
            -600: no CUDA tensor, or another type or shape; -704: not there; -800: CUDA refused the copy.
        """
        return self.batch_get_tensor_into_cuda([key], [tensor])[0]

    @answers_codes
    def batch_get_tensor_into_cuda(self, keys: Sequence[str], tensors_list: Sequence[Any]) -> list[int]:
        """As get_tensor_into_cuda, for several."""
        return get_tensors_into_cuda(self._need(), keys, tensors_list)

    @answers_code
    def save_tensor_to_safetensor(self, key: str, file_name: str | None = None) -> int:
        """Write a tensor into a safetensors file, named as its key if by no other; -1100: there is none."""
        return save_tensor(self._need(), key, key if file_name is None else file_name)

    def load_tensor_from_safetensor(self, key: str | None = None, file_name: str = "") -> Any:
        """Store a tensor of a safetensors file and return it, None if that fails; see the log.

        Args:
            key: in the file (if it has no such tensor, its first one is taken) and in the store; None: the
                first one, stored under the name of the file.
            file_name: its path.

        Raises:
            TypeError: no file; RequestError: not set up; ConfigError: the package safetensors is missing.
        """
        if not file_name:
            raise TypeError("load_tensor_from_safetensor needs a file_name")
        return load_tensor(self._need(), key, file_name)

    # ------------------------------------------------------------ shards of tensor parallelism

    def put_tensor_with_tp(
        self, key: str, tensor: Any, tp_rank: int = 0, tp_size: int = 1, split_dim: int = 0
    ) -> int:
        """Store a tensor as tp_size shards along split_dim; `tp_rank` changes nothing."""
        return self.pub_tensor_with_tp(key, tensor, None, tp_rank, tp_size, split_dim)

    def pub_tensor_with_tp(
        self,
        key: str,
        tensor: Any,
        config: ReplicateConfig | None = None,
        tp_rank: int = 0,
        tp_size: int = 1,
        split_dim: int = 0,
    ) -> int:
        """As put_tensor_with_tp, kept as `config` says."""
        return self.batch_pub_tensor_with_tp([key], [tensor], config, tp_rank, tp_size, split_dim)[0]

    def batch_put_tensor_with_tp(
        self,
        base_keys: Sequence[str],
        tensors_list: Sequence[Any],
        tp_rank: int = 0,
        tp_size: int = 1,
        split_dim: int = 0,
    ) -> list[int]:
        """As put_tensor_with_tp, for several."""
        return self.batch_pub_tensor_with_tp(base_keys, tensors_list, None, tp_rank, tp_size, split_dim)

    @answers_codes
    def batch_pub_tensor_with_tp(
        self,
        base_keys: Sequence[str],
        tensors_list: Sequence[Any],
        config: ReplicateConfig | None = None,
        tp_rank: int = 0,  # noqa: ARG002 - all shards are stored
        tp_size: int = 1,
        split_dim: int = 0,
    ) -> list[int]:
        """As pub_tensor_with_tp, for several."""
        return put_shards(self._need().put, base_keys, tensors_list, tp_size, split_dim, config)

    def put_tensor_with_tp_from(
        self, key: str, buffer_ptr: int, size: int, tp_rank: int = 0, tp_size: int = 1, split_dim: int = 0
    ) -> int:
        """As put_tensor_with_tp, of the whole tensor that get_tensor_into has left in memory."""
        return self.batch_put_tensor_with_tp_from([key], [buffer_ptr], [size], tp_rank, tp_size, split_dim)[0]

    @answers_codes
    def batch_put_tensor_with_tp_from(
        self,
        base_keys: Sequence[str],
        buffer_ptrs: Sequence[int],
        sizes: Sequence[int],
        tp_rank: int = 0,  # noqa: ARG002 - all shards are stored
        tp_size: int = 1,
        split_dim: int = 0,
    ) -> list[int]:
        """As put_tensor_with_tp_from, for several."""
        calls = self._need()
        tensors = tensors_at(calls, base_keys, buffer_ptrs, sizes)
        return put_shards(calls.put, base_keys, tensors, tp_size, split_dim, None)

    def get_tensor_with_tp(self, key: str, tp_rank: int = 0, tp_size: int = 1, split_dim: int = 0) -> Any:  # noqa: ARG002 - the shards know
        """Return the shard of one rank, put together if it is stored in others; None as in get_tensor."""
        return self.batch_get_tensor_with_tp([key], tp_rank, tp_size)[0]

    def batch_get_tensor_with_tp(
        self, base_keys: Sequence[str], tp_rank: int = 0, tp_size: int = 1
    ) -> list[Any]:
        """As get_tensor_with_tp, for several."""
        return list(read(self._need(), base_keys, [_shard(tp_rank, tp_size)] * len(base_keys)))

    def get_tensor_with_tp_into(
        self,
        key: str,
        buffer_ptr: int,
        size: int,
        tp_rank: int = 0,
        tp_size: int = 1,
        split_dim: int = 0,  # noqa: ARG002 - the shards know
    ) -> Any:
        """As get_tensor_into, for the shard of one rank."""
        return self.batch_get_tensor_with_tp_into([key], [buffer_ptr], [size], tp_rank, tp_size)[0]

    def batch_get_tensor_with_tp_into(
        self,
        base_keys: Sequence[str],
        buffer_ptrs: Sequence[int],
        sizes: Sequence[int],
        tp_rank: int = 0,
        tp_size: int = 1,
    ) -> list[Any]:
        """As get_tensor_with_tp_into, for several."""
        calls = self._need()
        memory = memory_for(calls, base_keys, buffer_ptrs, sizes)
        return list(read(calls, base_keys, [_shard(tp_rank, tp_size)] * len(base_keys), memory))


def _shard(rank: int, size: int) -> Want | None:
    if size <= 1:
        return Want(Layout(), exact=True)
    return Want(Layout((), Split(rank, size, None))) if 0 <= rank < size <= PARTS_MAX else None
