"""Modules of upstream's wheel that are not here: importing one says why, and what to use instead.

Each is a file of two lines, so that `importlib.util.find_spec` finds it as it finds upstream's, whose
import fails as well without the hardware. docs/store-modules.md lists them all.
"""

from typing import NoReturn

_EXPERTS = "expert-parallel kernels need GPUs with RDMA or NVLink: use vLLM's own all2all backends (DeepEP)"
_GPU_MEMORY = "it allocates GPU memory for NVLink or fabric transfers: vLLM's own allocator serves"
_NVMEOF = "NVMe-oF by SPDK needs its hardware: the SSD tier is `mooncake store --ssd-path`"
REASONS = {
    "allocator": _GPU_MEMORY,
    "cli_bench": "upstream's transfer_engine_bench is C++: use `python -m benchmarks.transfer`",
    "ep": _EXPERTS,
    "fabric_allocator_utils": _GPU_MEMORY,
    "mooncake_connector_v1": "vLLM has it in its own tree: use kv_connector MooncakeConnector, by its name",
    "mooncake_elastic_buffer": _EXPERTS,
    "mooncake_ep_buffer": _EXPERTS,
    "mooncake_ssd_register": _NVMEOF,
    "mooncake_ssd_unregister": _NVMEOF,
    "pg": "its collectives need GPUs: use torch.distributed with nccl, or gloo on CPUs",
    "reshard": "weights are not resharded here: put_tensor and the _with_parallelism forms cut tensors",
    "spdk_tgt_create": _NVMEOF,
    "vllm_v1_proxy_server": "it is a toy in front of one prefill and one decode engine: use `mooncake up` or "
    "`mooncake conductor`",
}
"""By the name below `mooncake.`."""


def refuse(module: str) -> NoReturn:
    """Say why `mooncake.<module>` is not here.

    Raises:
        ImportError: always.
    """
    name = f"mooncake.{module}"
    raise ImportError(f"{name} is not in this package: {REASONS[module]} (docs/store-modules.md)", name=name)
