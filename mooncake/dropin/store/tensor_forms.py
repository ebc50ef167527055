"""The tensor methods of MooncakeDistributedStore, under upstream's names."""

from collections.abc import Sequence
from typing import Any

from mooncake.dropin.store.answers import answers_code, answers_codes
from mooncake.dropin.store.calls import Calls
from mooncake.dropin.store.tensors import (
    get_tensors,
    get_tensors_into,
    put_shards,
    put_tensors,
    put_tensors_from,
    shard_key,
)
from mooncake.dropin.store.types import INVALID_PARAMS, ReplicateConfig


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
        return put_tensors_from(calls.put, calls, keys, buffer_ptrs, sizes)

    def upsert_tensor_from(self, key: str, buffer_ptr: int, size: int) -> int:
        """As put_tensor_from, in the place of what is there."""
        return self.batch_upsert_tensor_from([key], [buffer_ptr], [size])[0]

    @answers_codes
    def batch_upsert_tensor_from(
        self, keys: Sequence[str], buffer_ptrs: Sequence[int], sizes: Sequence[int]
    ) -> list[int]:
        """As upsert_tensor_from, for several."""
        calls = self._need()
        return put_tensors_from(calls.upsert, calls, keys, buffer_ptrs, sizes)

    # ------------------------------------------------------------ shards of tensor parallelism

    def put_tensor_with_tp(
        self, key: str, tensor: Any, tp_rank: int = 0, tp_size: int = 1, split_dim: int = 0
    ) -> int:
        """Store a tensor as tp_size shards along split_dim; `tp_rank` changes nothing."""
        return self.pub_tensor_with_tp(key, tensor, None, tp_rank, tp_size, split_dim)

    @answers_code
    def pub_tensor_with_tp(
        self,
        key: str,
        tensor: Any,
        config: ReplicateConfig | None = None,
        tp_rank: int = 0,  # noqa: ARG002 - all shards are stored
        tp_size: int = 1,
        split_dim: int = 0,
    ) -> int:
        """As put_tensor_with_tp, kept as `config` says."""
        return put_shards(self._need().put, key, tensor, tp_size, split_dim, config)

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

    def batch_pub_tensor_with_tp(
        self,
        base_keys: Sequence[str],
        tensors_list: Sequence[Any],
        config: ReplicateConfig | None = None,
        tp_rank: int = 0,
        tp_size: int = 1,
        split_dim: int = 0,
    ) -> list[int]:
        """As pub_tensor_with_tp, for several."""
        if len(base_keys) != len(tensors_list):
            return [INVALID_PARAMS] * len(base_keys)
        rows = zip(base_keys, tensors_list, strict=True)
        return [
            self.pub_tensor_with_tp(key, tensor, config, tp_rank, tp_size, split_dim) for key, tensor in rows
        ]

    def get_tensor_with_tp(self, key: str, tp_rank: int = 0, tp_size: int = 1, split_dim: int = 0) -> Any:  # noqa: ARG002 - the shard knows
        """Return the shard of one rank, None as in get_tensor."""
        return self.get_tensor(shard_key(key, tp_rank, tp_size))

    def batch_get_tensor_with_tp(
        self, base_keys: Sequence[str], tp_rank: int = 0, tp_size: int = 1
    ) -> list[Any]:
        """As get_tensor_with_tp, for several."""
        return self.batch_get_tensor([shard_key(key, tp_rank, tp_size) for key in base_keys])

    def get_tensor_with_tp_into(
        self,
        key: str,
        buffer_ptr: int,
        size: int,
        tp_rank: int = 0,
        tp_size: int = 1,
        split_dim: int = 0,  # noqa: ARG002 - the shard knows
    ) -> Any:
        """As get_tensor_into, for the shard of one rank."""
        return self.get_tensor_into(shard_key(key, tp_rank, tp_size), buffer_ptr, size)

    def batch_get_tensor_with_tp_into(
        self,
        base_keys: Sequence[str],
        buffer_ptrs: Sequence[int],
        sizes: Sequence[int],
        tp_rank: int = 0,
        tp_size: int = 1,
    ) -> list[Any]:
        """As get_tensor_with_tp_into, for several."""
        keys = [shard_key(key, tp_rank, tp_size) for key in base_keys]
        return self.batch_get_tensor_into(keys, buffer_ptrs, sizes)
