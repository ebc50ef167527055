"""The vLLM we were written against. A failure here means: read the named place again, then decide.

Every symbol that the gateway uses is listed in conductor.vllm_seam.VLLM_SYMBOLS; the shapes on
which code depends are spelled out below. The engine side: test_vllm_worker_contract.py.
"""

import importlib
import inspect

import msgspec
import pytest

from conductor import legs, vllm_seam


def resolve(symbol: str):
    module, _, name = symbol.partition(":")
    return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize("symbol", vllm_seam.VLLM_SYMBOLS)
def test_every_symbol_exists(symbol) -> None:
    assert resolve(symbol) is not None, vllm_seam.VLLM_SYMBOLS[symbol]


def test_the_installed_version_is_the_pinned_series() -> None:
    vllm_seam.check_environment()


def test_request_fields_travel_by_position() -> None:
    from vllm.v1.engine import EngineCoreRequest

    assert EngineCoreRequest.__struct_config__.array_like
    names = [field.name for field in msgspec.structs.fields(EngineCoreRequest)]
    assert names == [
        "request_id",
        "prompt_token_ids",
        "mm_features",
        "sampling_params",
        "pooling_params",
        "arrival_time",
        "lora_request",
        "cache_salt",
        "data_parallel_rank",
        "prompt_embeds",
        "prompt_is_token_ids",
        "client_index",
        "current_wave",
        "priority",
        "trace_headers",
        "resumable",
        "external_req_id",
        "reasoning_ended",
        "reasoning_parser_kwargs",
        "abort_immediately",
        "session_id",
        "kv_hints",
    ], "re-check legs.py (what a leg must reset), clients.facts_of and two_legs_possible"


def test_output_fields() -> None:
    from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs

    names = [field.name for field in msgspec.structs.fields(EngineCoreOutput)]
    assert names == [
        "request_id",
        "new_token_ids",
        "new_logprobs",
        "new_prompt_logprobs_tensors",
        "pooling_output",
        "finish_reason",
        "stop_reason",
        "events",
        "kv_transfer_params",
        "ec_transfer_params",
        "trace_headers",
        "prefill_stats",
        "routed_experts",
        "num_nans_in_logits",
        "mm_cache_miss_hashes",
        "new_sampling_mask",
        "spec_decode_metrics",
        "prompt_token_id_logprobs",
    ], "re-check legs.leg1_result, graft_leg1 and strip_continuation"
    step = {field.name for field in msgspec.structs.fields(EngineCoreOutputs)}
    assert {"engine_index", "outputs", "scheduler_stats", "timestamp", "utility_output"} <= step


def test_sampling_fields_all_have_a_fate_in_leg_1() -> None:
    from vllm.sampling_params import SamplingParams

    fields = {field.name for field in msgspec.structs.fields(SamplingParams)}
    assert set(legs.LEG1_PARAMS) == fields, "decide in legs.LEG1_PARAMS, and in mooncake.worker.resume"
    assert set(legs.PROMPT_LOGPROB_PARAMS) <= fields


def test_finish_reasons_and_request_types() -> None:
    from vllm.v1.engine import EngineCoreRequestType, FinishReason

    assert [str(reason) for reason in FinishReason] == ["stop", "length", "abort", "error", "repetition"]
    kinds = {kind.name: kind.value for kind in EngineCoreRequestType}
    assert (kinds["ADD"], kinds["ABORT"], kinds["UTILITY"]) == (b"\x00", b"\x01", b"\x03")


def test_core_client_has_one_abstract_method_and_the_factory_we_replace() -> None:
    from vllm.v1.engine.core_client import EngineCoreClient

    assert EngineCoreClient.__abstractmethods__ == {"shutdown"}
    parameters = set(inspect.signature(EngineCoreClient.make_async_mp_client).parameters)
    assert {"vllm_config", "executor_class", "log_stats", "renderer"} <= parameters
    assert isinstance(EngineCoreClient.__dict__["make_async_mp_client"], staticmethod)


def test_core_client_answers_every_call_that_async_llm_makes() -> None:
    import re

    from vllm.v1.engine import async_llm
    from vllm.v1.engine.core_client import EngineCoreClient

    from conductor.core_client import ClusterCoreClient

    called = set(re.findall(r"engine_core\.(\w+)\(", inspect.getsource(async_llm)))
    # a call that we leave to vLLM's base class answers NotImplementedError, which is HTTP 501
    left = {name for name in called if not hasattr(ClusterCoreClient, name)}
    known_gap = {"compute_weight_checksums_async"}
    assert left <= known_gap, f"new calls of AsyncLLM: {left - known_gap}"
    assert hasattr(EngineCoreClient, "get_kv_event_sources")


def test_async_llm_construction_and_error_paths() -> None:
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector

    parameters = set(inspect.signature(AsyncLLM.__init__).parameters)
    assert {
        "vllm_config",
        "executor_class",
        "log_stats",
        "log_requests",
        "aggregate_engine_logging",
    } <= parameters
    source = inspect.getsource(AsyncLLM.generate)
    assert "except (VLLMClientError, GracefulHTTPError)" in source, (
        "Unavailable must pass generate() unchanged"
    )
    assert list(inspect.signature(OutputProcessor.abort_requests).parameters) == [
        "self",
        "request_ids",
        "internal",
    ]
    assert {"put"} <= set(dir(RequestOutputCollector)), "fail_requests puts its error there"


def test_children_of_parallel_sampling_are_named_after_their_parent() -> None:
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.engine.parallel_sampling import ParentRequest

    from conductor.clients import family_of

    request = EngineCoreRequest(
        request_id="chatcmpl-1-ab",
        prompt_token_ids=[1],
        mm_features=None,
        sampling_params=SamplingParams(n=2),
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
        external_req_id="chatcmpl-1",
    )
    assert family_of(request) is None
    parent = ParentRequest(request)
    request.request_id, request.sampling_params = parent.get_child_info(1)
    assert family_of(request) == "chatcmpl-1-ab"


def test_configuration_without_an_engine() -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs

    for name in ("create_model_config", "create_logging_config", "create_structured_outputs_config"):
        assert callable(getattr(AsyncEngineArgs, name))
    fields = AsyncEngineArgs.__dataclass_fields__
    assert {"stream_interval", "max_num_queued_reqs", "max_num_queued_tokens", "block_size"} <= set(fields)


def test_metrics_registry_keeps_names_that_are_not_vllms() -> None:
    from vllm.v1.metrics import prometheus

    assert 'startswith("vllm:")' in inspect.getsource(prometheus.unregister_vllm_metrics)
