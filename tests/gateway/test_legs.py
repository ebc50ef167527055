"""Legs are copies: originals never change, and every sampling field has a declared fate."""

import copy

import msgspec
import pytest
from conftest import make_request
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conductor import legs
from conductor.vllm_seam import (
    EngineCoreEvent,
    EngineCoreEventType,
    EngineCoreOutput,
    EngineCoreRequest,
    FinishReason,
    MsgpackDecoder,
    MsgpackEncoder,
    PrefillStats,
    RequestOutputKind,
    SamplingParams,
)

PARAMS = st.fixed_dictionaries(
    {"max_tokens": st.integers(20, 100)},
    optional={
        "min_tokens": st.integers(0, 20),
        "temperature": st.sampled_from([0.0, 0.5, 1.0]),
        "seed": st.one_of(st.none(), st.integers(0, 2**31)),
        "stop": st.one_of(st.none(), st.lists(st.text(min_size=1, max_size=3), max_size=2)),
        "stop_token_ids": st.lists(st.integers(0, 100), max_size=3),
        "logprobs": st.one_of(st.none(), st.integers(0, 5)),
        "prompt_logprobs": st.one_of(st.none(), st.integers(0, 5)),
        "presence_penalty": st.floats(-2, 2),
        "repetition_penalty": st.floats(0.5, 2),
        "logit_bias": st.one_of(
            st.none(), st.dictionaries(st.integers(0, 100), st.floats(-1, 1), max_size=2)
        ),
        "bad_words": st.lists(st.text(min_size=1, max_size=3), max_size=2),
        "extra_args": st.one_of(st.none(), st.just({"a": 1}), st.just({"kv_transfer_params": {"b": [2]}})),
        "output_kind": st.sampled_from(list(RequestOutputKind)),
    },
)

BUILDERS = {
    "prefill": lambda r: legs.prefill_leg(r, "r#p1", 3),
    "first": lambda r: legs.prefill_leg(r, "r#p1", 3, first=True),
    "decode": lambda r: legs.decode_leg(r, "r#d1", 3, [7, 8], prompt_logprobs_done=True),
    "whole": lambda r: legs.whole_leg(r, "r#d1", 3),
}


def through_the_wire(request: EngineCoreRequest) -> EngineCoreRequest:
    return MsgpackDecoder(EngineCoreRequest).decode(MsgpackEncoder().encode(request))


@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(params=PARAMS)
def test_a_leg_leaves_the_original_alone_and_decodes_in_the_engine(build, params) -> None:
    request = make_request([1, 2, 3, 4, 5], rid="r", **params)
    prompt = request.prompt_token_ids
    before = copy.deepcopy(request)
    leg = build(request)
    sent = through_the_wire(leg)  # SamplingParams validates here, as in the engine's decoder
    assert request == before
    assert request.prompt_token_ids is prompt
    assert request.sampling_params is not leg.sampling_params
    assert sent.client_index == 3
    assert sent.request_id != request.request_id
    assert sent.prompt_token_ids == [1, 2, 3, 4, 5]
    assert (sent.external_req_id, sent.arrival_time) == (request.external_req_id, request.arrival_time)
    kv = sent.sampling_params.extra_args["kv_transfer_params"]
    assert kv["mooncake"]["prompt_len"] == 5
    user = (params.get("extra_args") or {}).get("kv_transfer_params", {})
    assert {key: kv[key] for key in user} == user


def test_every_sampling_field_is_kept_or_neutralised_by_leg_1() -> None:
    fields = {field.name for field in msgspec.structs.fields(SamplingParams)}
    assert set(legs.LEG1_PARAMS) == fields, "decide for new fields of vLLM in legs.LEG1_PARAMS"


def test_leg_1_is_one_token_that_ends_by_length() -> None:
    request = make_request(
        [1, 2, 3], max_tokens=50, min_tokens=20, stop=["a"], stop_token_ids=[4], logprobs=3, seed=1
    )
    params = through_the_wire(legs.prefill_leg(request, "r#p1", 0)).sampling_params
    assert (params.max_tokens, params.min_tokens, params.ignore_eos) == (1, 0, True)
    assert (params.stop, params.stop_token_ids, params.logprobs, params.seed) == ([], [], None, None)
    assert params._all_stop_token_ids == set()
    assert params.temperature == 0.0


def test_leg_1_of_first_token_mode_samples_as_the_client_asked() -> None:
    request = make_request([1, 2, 3], max_tokens=50, min_tokens=20, temperature=0.8, seed=9, logprobs=3)
    params = through_the_wire(legs.prefill_leg(request, "r#p1", 0, first=True)).sampling_params
    # min_tokens above 0 still masks the end token, as it does in the undivided request
    assert (params.max_tokens, params.min_tokens) == (1, 1)
    assert (params.temperature, params.seed, params.logprobs) == (0.8, 9, 3)


def test_a_continuation_keeps_all_parameters_and_names_what_was_emitted() -> None:
    request = make_request([1, 2, 3], max_tokens=50, min_tokens=20, seed=9, frequency_penalty=0.5)
    leg = through_the_wire(legs.decode_leg(request, "r#d2", 0, [7, 8, 9], prompt_logprobs_done=True))
    kv = leg.sampling_params.extra_args["kv_transfer_params"]["mooncake"]
    assert kv == {"leg": "decode", "prompt_len": 3, "emitted": [7, 8, 9]}
    assert (leg.sampling_params.max_tokens, leg.sampling_params.min_tokens) == (50, 20)
    assert leg.sampling_params.seed == 9


def test_prompt_logprobs_are_computed_once() -> None:
    request = make_request([1, 2, 3], prompt_logprobs=2)
    leg1 = legs.prefill_leg(request, "r#p1", 0).sampling_params
    leg2 = legs.decode_leg(request, "r#d1", 0, [], prompt_logprobs_done=True).sampling_params
    alone = legs.whole_leg(request, "r#d1", 0).sampling_params
    assert (leg1.prompt_logprobs, leg1.skip_reading_prefix_cache) == (2, True)
    assert (leg2.prompt_logprobs, leg2.skip_reading_prefix_cache) == (None, False)
    assert alone.prompt_logprobs == 2


@pytest.mark.parametrize(
    ("params", "exact"),
    [
        ({}, True),
        ({"temperature": 1.0}, True),
        ({"seed": 4, "temperature": 1.0}, True),
        ({"frequency_penalty": 0.5}, True),
        ({"thinking_token_budget": 10}, False),
    ],
)
def test_first_token_mode_only_where_it_is_exact(params, exact) -> None:
    request = make_request([1], **params)
    assert legs.exact_first(request) is exact
    assert not legs.exact_first(request, sharers=2)


def test_leg_1s_story_replaces_leg_2s() -> None:
    done = EngineCoreOutput("r#p1", [5], finish_reason=FinishReason.LENGTH)
    done.prefill_stats = PrefillStats(num_prompt_tokens=9, num_cached_tokens=2)
    done.events = [EngineCoreEvent(EngineCoreEventType.QUEUED, 1.0)]
    first = EngineCoreOutput("r", [6], prefill_stats=PrefillStats(num_prompt_tokens=9, num_cached_tokens=9))
    legs.graft_leg1(first, legs.leg1_result(done))
    assert first.prefill_stats is done.prefill_stats
    assert first.events is done.events
    legs.strip_continuation(first)
    assert first.prefill_stats is None
    assert first.events is None


def test_event_times_move_to_the_gateways_clock() -> None:
    output = EngineCoreOutput("r", [6], events=[EngineCoreEvent(EngineCoreEventType.QUEUED, 1.0)])
    legs.shift_events([output], 100.0)
    assert output.events[0].timestamp == 101.0
