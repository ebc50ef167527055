"""Tensors of `mooncake.store` in other places than host memory: on a CUDA device, in safetensors files."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import structlog

from mooncake.core.errors import ConfigError
from mooncake.dropin.store.calls import Calls
from mooncake.dropin.store.tensors import HEAD_BYTES, get_tensors, put_tensors, tensor_or_none
from mooncake.dropin.store.types import INVALID_PARAMS, OBJECT_NOT_FOUND, OK, TRANSFER_FAIL

if TYPE_CHECKING:
    import torch

FILE_NOT_WRITTEN = -1100
"""Upstream's code where there is no tensor to write."""

log = structlog.get_logger(__name__)


def get_tensors_into_cuda(calls: Calls, keys: Sequence[str], tensors: Sequence[Any]) -> list[int]:
    """Copy stored tensors, through host memory, into CUDA tensors of the same type and shape.

    Returns:
        The bytes of each; -704: not there; -600: it is no such tensor; -800: CUDA refused the copy.
    """
    if len(keys) != len(tensors):
        log.error("mooncake.store: not a tensor for each key", keys=len(keys), tensors=len(tensors))
        return [INVALID_PARAMS] * len(keys)
    codes = [INVALID_PARAMS] * len(keys)
    rows = [row for row, tensor in enumerate(tensors) if _is_cuda(keys[row], tensor)]
    for row, value in zip(rows, calls.get([keys[row] for row in rows]), strict=True):
        codes[row] = _copy_to_device(keys[row], value, tensors[row])
    return codes


def _is_cuda(key: str, tensor: Any) -> bool:
    import torch

    if isinstance(tensor, torch.Tensor) and tensor.is_cuda:
        return True
    kind = f"a tensor on {tensor.device}" if isinstance(tensor, torch.Tensor) else type(tensor).__name__
    log.error(
        "mooncake.store: a CUDA tensor is needed; for host memory use get_tensor_into", key=key, got=kind
    )
    return False


def _copy_to_device(key: str, value: bytes | None, target: Any) -> int:
    if value is None:
        return OBJECT_NOT_FOUND
    tensor = tensor_or_none(key, value)
    if tensor is None:
        return INVALID_PARAMS
    if (tensor.dtype, tensor.shape) != (target.dtype, target.shape):
        log.error(
            "mooncake.store: not read: another type or shape",
            key=key,
            stored=f"{tensor.dtype}{list(tensor.shape)}",
            wanted=f"{target.dtype}{list(target.shape)}",
        )
        return INVALID_PARAMS
    try:
        target.detach().copy_(tensor)
    except RuntimeError as error:  # as torch calls every failure of CUDA
        log.error("mooncake.store: not copied to the device", key=key, reason=str(error))
        return TRANSFER_FAIL
    return len(value) - HEAD_BYTES


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ConfigError(
            "safetensors files need the package safetensors: pip install safetensors"
        ) from error
    return safetensors


def save_tensor(calls: Calls, key: str, path: str) -> int:
    """Write a tensor into a file, under the name of its key; 0, -1100: there is none, -600: not written.

    Raises:
        ConfigError: the package safetensors is missing; PeerError: see get.
    """
    package = _safetensors()
    tensor = get_tensors(calls, [key])[0]
    if tensor is None:
        log.error("mooncake.store: no such tensor to save", key=key)
        return FILE_NOT_WRITTEN
    try:
        package.torch.save_file({key: tensor}, path)
    except (OSError, ValueError, package.SafetensorError) as error:
        log.error("mooncake.store: not saved", key=key, file=path, reason=str(error))
        return INVALID_PARAMS
    return OK


def load_tensor(calls: Calls, key: str | None, path: str) -> "torch.Tensor | None":
    """Store a tensor of a file and return it; None: no such file, no tensor in it, or not stored.

    Args:
        calls: of the store.
        key: of the tensor in the file, the first one's if it has none of that name, and in the store;
            None: the first one, stored under the name of the file.
        path: of the file.

    Raises:
        ConfigError: the package safetensors is missing.
    """
    package = _safetensors()
    try:
        with package.safe_open(path, framework="pt") as file:
            names = list(file.keys())
            if not names:
                log.error("mooncake.store: no tensor in the file", file=path)
                return None
            name = key if key in names else names[0]
            if key is not None and name != key:
                log.warning("mooncake.store: the file has no such tensor", file=path, key=key, taken=name)
            tensor = file.get_tensor(name)
    except (OSError, ValueError, package.SafetensorError) as error:
        log.error("mooncake.store: not loaded", file=path, reason=str(error))
        return None
    code = put_tensors(calls.put, [path if key is None else key], [tensor], None)[0]
    return tensor if code == OK else None
