"""Fills in core.context.KvContext from a vLLM engine whose model is loaded."""

import hashlib
import json
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mooncake.core.context import KvContext
from mooncake.core.errors import ConfigError
from mooncake.core.fingerprint import model_fingerprint
from mooncake.worker.layout import POOL_LAYOUT
from mooncake.worker.spec import EngineSpec

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

NOT_THE_MODEL = frozenset({"_name_or_path", "_commit_hash", "transformers_version"})
"""Keys of a resolved configuration that say where it came from."""


def kv_context(vllm_config: "VllmConfig", kv_cache_config: "KVCacheConfig") -> KvContext:
    """Return what the names of this engine's blocks commit to.

    Raises:
        ConfigError: several KV cache groups, or weights or settings that nothing can be named by.
    """
    import vllm

    model, cache, parallel = vllm_config.model_config, vllm_config.cache_config, vllm_config.parallel_config
    groups = kv_cache_config.kv_cache_groups
    if len(groups) != 1:
        raise ConfigError(
            f"{model.model}: {len(groups)} KV cache groups; hybrid models are not supported yet"
        )
    group = groups[0]
    return KvContext(
        weights=_weights(model, vllm_config.load_config),
        draft=_draft(vllm_config),
        model_config=_digest(model.hf_config.to_dict()),
        implementation=f"{model.model_impl} {sorted(model.model_class_overrides.items())}",
        load=f"{vllm_config.load_config.load_format} {vllm_config.load_config.model_loader_extra_config}",
        lora="" if vllm_config.lora_config is None else str(vllm_config.lora_config.lora_dtype),
        max_model_len=model.max_model_len,
        dtype=str(model.dtype),
        quantization=""
        if model.quantization is None
        else f"{model.quantization} {model.quantization_config}",
        kv_dtype=f"{cache.cache_dtype} {cache.kv_cache_dtype_skip_layers}",
        block_size=cache.block_size,
        spec=repr(group.kv_cache_spec),
        layers=f"{len(group.layer_names)} {_digest(list(group.layer_names))}",
        page_layout=str(kv_cache_config.kv_cache_layout or cache.kv_cache_layout),
        pool_layout=POOL_LAYOUT,
        attention=_attention(vllm_config, group.layer_names),
        hardware=_hardware(),
        engine=f"vllm {vllm.__version__.partition('+')[0]}",
        tensor_parallel=parallel.tensor_parallel_size,
        pipeline_parallel=parallel.pipeline_parallel_size,
        prefill_context_parallel=parallel.prefill_context_parallel_size,
        decode_context_parallel=parallel.decode_context_parallel_size,
        context_interleave=parallel.cp_kv_cache_interleave_size,
    )


def ranks_of(vllm_config: "VllmConfig", spec: EngineSpec) -> int:
    """Return how many ranks share each block of this engine.

    Raises:
        ConfigError: they are of a kind, or asked for something, that the pool does not know.
    """
    parallel = vllm_config.parallel_config
    for name, size in (
        ("pipeline", parallel.pipeline_parallel_size),
        ("data", parallel.data_parallel_size),
        ("prefill context", parallel.prefill_context_parallel_size),
        ("decode context", parallel.decode_context_parallel_size),
    ):
        if size != 1:
            raise ConfigError(
                f"{name} parallel size {size}: the pool shares blocks of tensor parallel engines only; "
                "use --tensor-parallel-size, more instances, or no pool (--no-pool)"
            )
    if parallel.nnodes != 1:
        raise ConfigError(
            f"an engine on {parallel.nnodes} hosts: the pool shares blocks of engines on one host only; "
            "use fewer ranks, or no pool (--no-pool)"
        )
    ranks = int(parallel.tensor_parallel_size)
    if ranks > 1 and spec.load_mode != "async":
        # one rank cannot know in time that another one's bytes were bad, and would save what came of them
        raise ConfigError(f"load mode {spec.load_mode} with {ranks} ranks: use --load-mode async")
    return ranks


def _weights(model: Any, load: Any) -> str:
    """Return the name of a model's weights by their content."""
    if load.load_format == "dummy":
        return f"dummy:{model.seed}"
    if model.model_weights and model.model_weights != model.model:
        raise ConfigError(
            f"weights at {model.model_weights}: nothing here can tell one version of them from the next; "
            "copy them to a folder, or run without a pool (--no-pool)"
        )
    path = Path(model.model)
    return model_fingerprint(path if path.exists() else _hub_folder(model.model, model.revision, load))


def _hub_folder(name: str, revision: str | None, load: Any) -> Path:
    """Return the folder to which vLLM has just downloaded a hub model; asks no server."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(name, revision=revision, cache_dir=load.download_dir, local_files_only=True)
        )
    except (LocalEntryNotFoundError, ValueError) as error:
        raise ConfigError(
            f"model {name!r} is neither a folder nor in the hub's cache, so its weights have no name: "
            "give its folder, or run without a pool (--no-pool)"
        ) from error


def _draft(vllm_config: "VllmConfig") -> str:
    speculative = vllm_config.speculative_config
    if speculative is None:
        return ""
    draft = speculative.draft_model_config
    if draft is None:
        return str(speculative.method)
    weights = _weights(draft, vllm_config.load_config)
    return f"{speculative.method} {weights} {_digest(draft.hf_config.to_dict())}"


def _digest(settings: Any) -> str:
    """Return a digest of JSON-like `settings`, without what says where they came from."""
    text = json.dumps(_meaning(settings), sort_keys=True, default=_spelled)
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def _meaning(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _meaning(item) for key, item in value.items() if key not in NOT_THE_MODEL}
    if isinstance(value, (list, tuple)):
        return [_meaning(item) for item in value]
    return value


def _spelled(value: object) -> str:
    """Spell a value that JSON has no word for, such as torch.bfloat16."""
    text = repr(value)
    if " at 0x" in text:  # no repr of its own: another one in every process
        raise ConfigError(f"the model's configuration holds {text}, which nothing can be named by")
    return text


def _attention(vllm_config: "VllmConfig", layer_names: list[str]) -> str:
    """Return the backends of the layers in this process, or else the settings by which they are chosen."""
    layers = vllm_config.compilation_config.static_forward_context
    here = [layers[name] for name in layer_names if name in layers]
    chosen = vllm_config.attention_config
    found = sorted({f"{layer.get_attn_backend().get_name()}:{getattr(layer, 'isa', '')}" for layer in here})
    return " ".join(found) or f"{chosen.backend} {sorted(chosen.backend_per_kind.items())}"


def _hardware() -> str:
    """Return what the platform chooses its kernels by."""
    import torch

    if torch.cuda.is_available():
        return f"{torch.version.cuda or torch.version.hip} {torch.cuda.get_device_name()}"
    amx = torch.cpu._is_amx_tile_supported()
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()} amx={amx}"
