"""Methods of upstream's store that do nothing here; each says why, instead of pretending."""

from typing import Any, NoReturn

from mooncake.core.errors import RequestError

_NO_CUDA = "tensors in GPU memory: use get_tensor_into with host memory, then copy"
_PARALLELISM = "tensors by parallelism axes are not stored yet: use the _with_tp forms"
REASONS = {
    "batch_get_tensor_into_cuda": _NO_CUDA,
    "batch_get_tensor_with_parallelism": _PARALLELISM,
    "batch_get_tensor_with_parallelism_into": _PARALLELISM,
    "batch_put_tensor_with_parallelism": _PARALLELISM,
    "batch_put_tensor_with_parallelism_from": _PARALLELISM,
    "batch_upsert_tensor_with_parallelism": _PARALLELISM,
    "batch_upsert_tensor_with_parallelism_from": _PARALLELISM,
    "batch_put_tensor_with_tp_from": "a buffer of one rank is not cut into shards: use batch_put_tensor_from",
    "get_tensor_into_cuda": _NO_CUDA,
    "get_tensor_with_parallelism": _PARALLELISM,
    "get_tensor_with_parallelism_into": _PARALLELISM,
    "init_all": "use setup",
    "load_tensor_from_safetensor": "read the file with safetensors and put_tensor it",
    "mount_segment": "memory of a file is not given to the pool: use allocate_and_mount_segment",
    "put_tensor_with_parallelism": _PARALLELISM,
    "put_tensor_with_parallelism_from": _PARALLELISM,
    "put_tensor_with_tp_from": "a buffer of one rank is not cut into shards: use put_tensor_from",
    "save_tensor_to_safetensor": "get_tensor it and write the file with safetensors",
    "upsert_tensor_with_parallelism": _PARALLELISM,
    "upsert_tensor_with_parallelism_from": _PARALLELISM,
}


class LeftOut:
    """Has them all."""


def _refuse(name: str, reason: str) -> Any:
    def call(self: Any, *args: Any, **kwargs: Any) -> NoReturn:  # noqa: ARG001 - refused whatever they are
        raise RequestError(f"mooncake.store: {name}: {reason}")

    call.__name__ = name
    call.__doc__ = f"Not here: {reason}.\n\nRaises:\n    RequestError: always."
    return call


for _name, _reason in REASONS.items():
    setattr(LeftOut, _name, _refuse(_name, _reason))
