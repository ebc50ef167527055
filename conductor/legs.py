"""One client request as the engine requests that serve it: pure functions over vLLM's structs.

vLLM's front end keeps the original `EngineCoreRequest` (its OutputProcessor, LogprobsProcessor and
ParentRequest read it for as long as the client listens), so nothing here changes an original: every
leg is a shallow copy of the request AND of its sampling params. Three shapes:

    prefill   leg 1: compute and save the prompt's KV; its one token is thrown away, so everything
              that only steers sampling is neutralised (see LEG1_PARAMS)
    first     leg 1 that keeps all sampling fields: its token is the client's first token
    decode /  the original request, told by KvParams what to load and which tokens an earlier engine
    whole     already emitted (the engine seeds them as output tokens: mooncake.core.messages)

Facts behind it: the two-leg prototype and its traps (min_tokens > max_tokens kills the decoder;
prompt_logprobs force a full recompute; a second QUEUED event makes queue times negative).
"""

import enum
from collections.abc import Sequence
from copy import copy
from typing import Any, Final

import msgspec

from conductor.vllm_seam import (
    EngineCoreEvent,
    EngineCoreOutput,
    EngineCoreRequest,
    FinishReason,
    PrefillStats,
    RequestOutputKind,
    SamplingParams,
)
from mooncake.core.messages import KvParams

KV_TRANSFER_KEY: Final = "kv_transfer_params"
MOONCAKE_KEY: Final = "mooncake"


class Keep(enum.Enum):
    """Marker in LEG1_PARAMS: leg 1 keeps the client's value."""

    KEEP = 0


KEEP: Final = Keep.KEEP

LEG1_PARAMS: Final[dict[str, Any]] = {
    # -- steer sampling of a token nobody reads
    "n": 1,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "temperature": 0.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "seed": None,
    "logit_bias": None,
    "allowed_token_ids": None,
    "bad_words": [],
    "_bad_words_token_ids": None,
    "thinking_token_budget": None,
    "repetition_detection": None,
    "trace_decode_token_ids": None,
    # waiting for a grammar to compile would delay the prefill
    "structured_outputs": None,
    # -- end: exactly one token, reason "length"
    "max_tokens": 1,
    "min_tokens": 0,  # min_tokens > max_tokens raises in the engine's decoder
    "stop": [],
    "stop_token_ids": [],
    "_all_stop_token_ids": frozenset(),
    "_eos_token_id": None,
    "ignore_eos": True,
    # -- say less
    "logprobs": None,
    "logprob_token_ids": None,
    "output_kind": RequestOutputKind.FINAL_ONLY,
    "stream_interval": None,
    "output_text_buffer_length": 0,
    # -- belong to the prompt, or change nothing in an engine
    "watermarking": KEEP,
    "_watermarking_skipped": KEEP,
    "prompt_logprobs": KEEP,
    "prompt_logprob_token_ids": KEEP,
    "prompt_logprob_start": KEEP,
    "flat_logprobs": KEEP,
    "detokenize": KEEP,
    "skip_special_tokens": KEEP,
    "spaces_between_special_tokens": KEEP,
    "include_stop_str_in_output": KEEP,
    "skip_clone": KEEP,
    "extra_args": KEEP,
    "skip_reading_prefix_cache": KEEP,
    "routed_experts_prompt_start": KEEP,
}
"""Every field of SamplingParams: the neutral value of leg 1, or KEEP. A field of a new vLLM that is
missing here fails tests/contract, where someone decides."""

PROMPT_LOGPROB_PARAMS: Final[dict[str, Any]] = {
    "prompt_logprobs": None,
    "prompt_logprob_token_ids": None,
    "prompt_logprob_start": None,
    # set by vLLM when prompt logprobs are asked for: left on, it would make the engine recompute
    # the whole prompt instead of loading it
    "skip_reading_prefix_cache": False,
}
"""Cleared in a leg that follows leg 1: leg 1 already computed them."""

_INEXACT_FIRST: Final = ("structured_outputs", "thinking_token_budget", "trace_decode_token_ids")
"""Sampling features whose state lives in the engine's scheduler; handing it over after one token is
not shown to be exact, so leg 1 throws its token away instead."""


def two_legs_possible(request: EngineCoreRequest) -> bool:
    """Return whether `request` may be prefilled on one engine and decoded on another.

    Pooling, streaming input, embeddings and images are served whole, by one engine.
    """
    params = request.sampling_params
    return (
        params is not None
        and request.prompt_token_ids is not None
        and request.prompt_embeds is None
        and not request.mm_features
        and not request.resumable
        and not request.abort_immediately
    )


def exact_first(request: EngineCoreRequest, sharers: int = 1) -> bool:
    """Return whether leg 1's own token may be the client's first token.

    Args:
        request: the client's request.
        sharers: requests that share this leg 1 (n > 1); they need different samples.
    """
    params = request.sampling_params
    if params is None or sharers > 1:
        return False
    return all(getattr(params, name) is None for name in _INEXACT_FIRST)


def wants_prompt_logprobs(request: EngineCoreRequest) -> bool:
    """Return whether the client asked for logprobs of its prompt."""
    params = request.sampling_params
    return params is not None and (
        params.prompt_logprobs is not None or params.prompt_logprob_token_ids is not None
    )


def _with_kv(params: SamplingParams, kv: KvParams) -> SamplingParams:
    """Return a copy of `params` that carries `kv`; everything the user put beside it stays."""
    params = copy(params)
    extra = dict(params.extra_args or {})
    transfer = dict(extra.get(KV_TRANSFER_KEY) or {})
    transfer[MOONCAKE_KEY] = msgspec.to_builtins(kv)
    extra[KV_TRANSFER_KEY] = transfer
    params.extra_args = extra
    return params


def _leg(
    request: EngineCoreRequest,
    engine_id: str,
    slot: int,
    leg: str,
    emitted: Sequence[int],
    source: str,
    target: str = "",
    trace: str = "",
) -> EngineCoreRequest:
    out = copy(request)
    out.request_id = engine_id
    out.client_index = slot
    if out.sampling_params is not None:
        prompt_len = len(out.prompt_token_ids or ())
        kv = KvParams(
            leg=leg, prompt_len=prompt_len, emitted=list(emitted), source=source, target=target, trace=trace
        )
        out.sampling_params = _with_kv(out.sampling_params, kv)
    return out


def prefill_leg(
    request: EngineCoreRequest,
    engine_id: str,
    slot: int,
    source: str = "",
    target: str = "",
    first: bool = False,
    trace: str = "",
) -> EngineCoreRequest:
    """Return leg 1 of `request`.

    Args:
        request: the client's request; unchanged.
        engine_id: the id the engine knows this leg by.
        slot: this gateway's client_index at the engine's relay.
        source: node whose store has what the engine's own may lack; "" = none.
        target: node that is going to decode; "" = the same.
        first: keep the sampling fields, because the token goes to the client (see exact_first).
        trace: the leg's span (mooncake.core.tracing); "" = it is not traced.
    """
    out = _leg(request, engine_id, slot, "prefill", (), source, target, trace)
    params = out.sampling_params
    assert params is not None
    if first:
        params.max_tokens = 1
        params.min_tokens = min(params.min_tokens, 1)
        params.output_kind = RequestOutputKind.DELTA
        params.stream_interval = None
        return out
    for name, value in LEG1_PARAMS.items():
        if value is not KEEP:
            # fresh containers: a later copy of the params must not share ours
            fresh = set(value) if isinstance(value, frozenset) else copy(value)
            setattr(params, name, fresh)
    out.reasoning_ended = None
    out.reasoning_parser_kwargs = None
    return out


def decode_leg(
    request: EngineCoreRequest,
    engine_id: str,
    slot: int,
    emitted: Sequence[int],
    prompt_logprobs_done: bool,
    source: str = "",
    trace: str = "",
) -> EngineCoreRequest:
    """Return leg 2 of `request`, or its continuation on another engine.

    Args:
        request: the client's request; unchanged.
        engine_id: the id the engine knows this leg by; a new one for every attempt.
        slot: this gateway's client_index at the engine's relay.
        emitted: token ids the client already has.
        prompt_logprobs_done: leg 1 delivered them, so this leg need not compute them.
        source: as in prefill_leg.
        trace: the same.
    """
    out = _leg(request, engine_id, slot, "decode", emitted, source, trace=trace)
    return _without_prompt_logprobs(out) if prompt_logprobs_done else out


def whole_leg(
    request: EngineCoreRequest,
    engine_id: str,
    slot: int,
    emitted: Sequence[int] = (),
    prompt_logprobs_done: bool = False,
    source: str = "",
    trace: str = "",
) -> EngineCoreRequest:
    """Return `request` for one engine that prefills and decodes (aggregated); see decode_leg."""
    out = _leg(request, engine_id, slot, "whole", emitted, source, trace=trace)
    return _without_prompt_logprobs(out) if prompt_logprobs_done else out


def _without_prompt_logprobs(out: EngineCoreRequest) -> EngineCoreRequest:
    params = out.sampling_params  # our own copy since _leg
    if params is not None and wants_prompt_logprobs(out):
        for name, value in PROMPT_LOGPROB_PARAMS.items():
            setattr(params, name, value)
    return out


class Leg1Result(msgspec.Struct, frozen=True):
    """What leg 1 leaves for the client's first output: usage, queue times, prompt logprobs."""

    prefill_stats: PrefillStats | None
    events: list[EngineCoreEvent] | None
    prompt_logprobs: Any
    prompt_token_id_logprobs: Any


def leg1_result(output: EngineCoreOutput) -> Leg1Result:
    """Return what must survive of leg 1's final output."""
    return Leg1Result(
        output.prefill_stats,
        output.events,
        output.new_prompt_logprobs_tensors,
        output.prompt_token_id_logprobs,
    )


def graft_leg1(output: EngineCoreOutput, leg1: Leg1Result | None) -> None:
    """Make `output`, the first the client sees after leg 1, tell leg 1's story.

    A decode engine would report the loaded prompt as cached (usage, created_cache_tokens) and a
    second QUEUED event; both are leg 1's to say.
    """
    if leg1 is None:
        return
    output.prefill_stats = leg1.prefill_stats
    output.events = leg1.events
    if leg1.prompt_logprobs is not None:
        output.new_prompt_logprobs_tensors = leg1.prompt_logprobs
    if leg1.prompt_token_id_logprobs is not None:
        output.prompt_token_id_logprobs = leg1.prompt_token_id_logprobs


def strip_continuation(output: EngineCoreOutput) -> None:
    """Remove from an output of a later engine what the client's accounting already has."""
    output.prefill_stats = None
    output.events = None


def shift_events(outputs: Sequence[EngineCoreOutput], offset_s: float) -> None:
    """Move event times from the engine's monotonic clock to the gateway's.

    Args:
        outputs: of one EngineCoreOutputs.
        offset_s: the gateway's clock now minus the engine's stamp of these outputs.
    """
    for output in outputs:
        for event in output.events or ():
            event.timestamp += offset_s


def error_output(rid: str) -> EngineCoreOutput:
    """Return the output that ends `rid` with vLLM's finish reason "error" (HTTP 500)."""
    return EngineCoreOutput(request_id=rid, new_token_ids=[], finish_reason=FinishReason.ERROR)
