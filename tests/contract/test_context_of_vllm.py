"""What vLLM calls the settings that change KV bytes, and that each of them reaches the names of blocks."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from mooncake.core.context import differences
from mooncake.core.errors import ConfigError
from mooncake.core.fingerprint import AdapterNames
from mooncake.core.keys import prompt_keys, request_root
from mooncake.worker.context import kv_context
from mooncake.worker.engine import build_config
from mooncake.worker.spec import EngineSpec
from tests.tiny_model import make_tiny_llama

ROOT = bytes(range(32))
FIELDS = {
    "vllm.config:ModelConfig": {
        "model", "revision", "model_weights", "model_impl", "model_class_overrides", "hf_config",
        "max_model_len", "dtype", "quantization", "quantization_config", "seed",
    },
    "vllm.config:CacheConfig": {
        "cache_dtype", "kv_cache_dtype_skip_layers", "block_size", "kv_cache_layout",
    },
    "vllm.config:ParallelConfig": {
        "tensor_parallel_size", "pipeline_parallel_size", "prefill_context_parallel_size",
        "decode_context_parallel_size", "cp_kv_cache_interleave_size",
    },
    "vllm.config:LoadConfig": {"load_format", "download_dir", "model_loader_extra_config"},
    "vllm.config:LoRAConfig": {"lora_dtype"},
    "vllm.config:AttentionConfig": {"backend", "backend_per_kind"},
    "vllm.config:CompilationConfig": {"static_forward_context"},
    "vllm.config:VllmConfig": {"lora_config", "speculative_config", "load_config", "attention_config"},
    "vllm.v1.kv_cache_interface:KVCacheConfig": {"kv_cache_groups", "kv_cache_layout"},
}  # fmt: skip


@pytest.mark.parametrize("name", FIELDS)
def test_every_setting_that_a_context_reads_exists(name):
    module, _, cls = name.partition(":")
    found = getattr(__import__(module, fromlist=[cls]), cls)
    assert FIELDS[name] <= {field.name for field in dataclasses.fields(found)}


def test_an_adapter_says_what_its_name_is_made_of():
    from vllm.lora.request import LoRARequest

    read = {"lora_name", "lora_path", "lora_int_id", "load_inplace", "is_3d_lora_weight"}
    assert read <= set(LoRARequest.__struct_fields__)


def test_the_gateway_names_blocks_of_an_adapter_by_its_content_or_not_at_all(tmp_path):
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest
    from vllm.v1.engine import EngineCoreRequest

    from conductor.clients import facts_of
    from conductor.prompt_keys import KeyMemo

    def keys_with(lora: LoRARequest | None) -> list[bytes]:
        request = EngineCoreRequest(
            request_id="r", prompt_token_ids=list(range(8)), mm_features=None, pooling_params=None,
            sampling_params=SamplingParams(max_tokens=2), arrival_time=0.0, lora_request=lora,
            cache_salt="tenant", data_parallel_rank=None, external_req_id="e",
        )  # fmt: skip
        facts = facts_of(
            request, ROOT.hex(), 4, AdapterNames(), KeyMemo(), first_token=False, shared=False, arrival_s=0.0
        )
        assert facts.context_root == ROOT.hex()
        return list(facts.keys)

    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"weights")
    adapter = LoRARequest("name", 1, str(tmp_path))
    root = request_root(ROOT, "tenant", AdapterNames().name_of(adapter))
    assert keys_with(adapter) == prompt_keys(root, range(8), 4)[0]
    assert keys_with(None) == prompt_keys(request_root(ROOT, "tenant", None), range(8), 4)[0]
    assert keys_with(LoRARequest("name", 1, "org/elsewhere")) == []


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("context") / "tiny")


def settings(model: Path, *arguments: str, **changes: object) -> dict[str, str]:
    """The context of an engine as far as it is known before the model is loaded."""
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        base = {"instance_id": "i", "role": "both", "epoch": "e", "run_dir": "/run/i", "dtype": "float32"}
        config = build_config(
            EngineSpec(model=str(model), vllm_args=["--max-model-len=512", *arguments], **{**base, **changes})
        )
    size = config.cache_config.block_size
    spec = FullAttentionSpec(block_size=size, num_kv_heads=2, head_size=64, dtype=config.model_config.dtype)
    group = SimpleNamespace(layer_names=["0", "1"], kv_cache_spec=spec)
    found = kv_context(config, SimpleNamespace(kv_cache_groups=[group], kv_cache_layout="LBHNC"))
    assert len(found.root()) == 32
    return found.settings()


@pytest.fixture(scope="module")
def plain(model: Path) -> dict[str, str]:
    return settings(model)


CHANGES: dict[str, tuple[Callable[[Path], dict[str, str]], str]] = {
    "rope override": (
        lambda m: settings(m, '--hf-overrides={"rope_parameters": {"rope_type": "linear", "factor": 2.0}}'),
        "model_config",
    ),
    "window override": (lambda m: settings(m, '--hf-overrides={"sliding_window": 64}'), "model_config"),
    "length": (lambda m: settings(m, "--max-model-len=256"), "max_model_len"),
    "block size": (lambda m: settings(m, block_size=64), "block_size"),
    "dtype": (lambda m: settings(m, dtype="bfloat16"), "dtype"),
    "dummy weights": (lambda m: settings(m, "--load-format=dummy"), "weights"),
    "adapters": (lambda m: settings(m, "--enable-lora"), "lora"),
    "implementation": (lambda m: settings(m, "--model-impl=transformers"), "implementation"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_flag_that_changes_kv_bytes_changes_the_context(change, model, plain):
    changed, field = CHANGES[change]
    assert field in differences(plain, changed(model))


def test_a_flag_that_changes_no_kv_bytes_does_not(model, plain):
    same = settings(model, "--max-num-seqs=3", "--seed=7", "--served-model-name=x", kv_memory_bytes=64 << 20)
    assert differences(plain, same) == []


def test_a_copy_of_the_model_has_the_same_context_and_one_changed_weight_another(model, plain, tmp_path):
    copy = shutil.copytree(model, tmp_path / "another name")
    assert settings(copy) == plain
    weights = copy / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    assert differences(plain, settings(copy)) == ["weights"]


def test_a_hub_model_is_named_by_the_weights_in_the_cache_not_by_its_name(
    model, plain, tmp_path, monkeypatch
):
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--org--tiny"
    shutil.copytree(model, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    from mooncake.worker import context

    load = SimpleNamespace(download_dir=str(tmp_path / "hub"), load_format="auto")
    hub = SimpleNamespace(model="org/tiny", revision=None, model_weights="", seed=0)
    assert context._weights(hub, load) == plain["weights"]
    hub.model = "org/another"
    with pytest.raises(ConfigError, match="neither a folder nor in the hub's cache"):
        context._weights(hub, load)


def test_weights_that_nothing_can_name_are_refused(model):
    from mooncake.worker import context

    remote = SimpleNamespace(model=str(model), revision=None, model_weights="s3://bucket/model", seed=0)
    with pytest.raises(ConfigError, match="s3://bucket/model"):
        context._weights(remote, SimpleNamespace(load_format="runai_streamer", download_dir=None))


def test_a_setting_without_a_spelling_of_its_own_is_refused():
    from mooncake.worker import context

    with pytest.raises(ConfigError, match="nothing can be named by"):
        context._digest({"rope": object()})
    assert context._digest({"a": 1, "_name_or_path": "/x"}) == context._digest({"a": 1})
