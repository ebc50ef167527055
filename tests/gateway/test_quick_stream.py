"""Quick streams send, byte for byte, what vLLM's own generators send."""

import re
from collections.abc import AsyncIterator
from http import HTTPStatus
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
from vllm.outputs import CompletionOutput, RequestOutput

from conductor.quick_stream import CHAT_TEXT, quick_chat, quick_completion, template
from conductor.vllm_seam import Unavailable

MESSAGES = [{"role": "user", "content": "hello"}]
SAID = st.text(max_size=8)
STEP = st.tuples(SAID, st.integers(0, 3))
STEPS = st.lists(STEP, max_size=6)
"""Text and tokens of each result; the first may have neither."""


def results(steps: list[tuple[str, int]], finish: str = "length") -> list[RequestOutput]:
    made = []
    for at, (text, tokens) in enumerate(steps):
        last = at == len(steps) - 1
        output = CompletionOutput(
            index=0,
            text=text,
            token_ids=[7] * tokens,
            cumulative_logprob=None,
            logprobs=None,
            finish_reason=finish if last else None,
            stop_reason=None,
        )
        made.append(
            RequestOutput(
                request_id="r",
                prompt="said before",
                prompt_token_ids=[1, 2, 3],
                prompt_logprobs=None,
                outputs=[output],
                finished=last,
                num_cached_tokens=2,
            )
        )
    return made


async def given_by(some: list[Any], error: Exception | None = None) -> AsyncIterator[Any]:
    for one in some:
        yield one
    if error is not None:
        raise error


def bare(kind: type, **changes: Any) -> Any:
    """A serving object with what its generator reads, and nothing else."""
    made = kind.__new__(kind)
    state = {
        "parser_cls": None, "enable_log_outputs": False, "enable_force_include_usage": False,
        "enable_prompt_tokens_details": True, "enable_per_request_metrics": False, "request_logger": None,
        "system_fingerprint": "fp", "response_role": "assistant", "_include_reasoning_tokens_details": False,
        "models": SimpleNamespace(lora_requests={}),
    }  # fmt: skip
    vars(made).update({**state, **changes})
    return made


def metadata() -> Any:
    return SimpleNamespace(final_usage_info=None)


async def sent(generator: AsyncIterator[str | bytes]) -> tuple[bytes, int]:
    """Return the bytes, with the second of their making left out, and how many chunks were not str."""
    chunks = [chunk async for chunk in generator]
    whole = b"\n".join(chunk.encode() if isinstance(chunk, str) else chunk for chunk in chunks)
    return re.sub(rb'"created":\d+', b'"created":0', whole), sum(isinstance(c, bytes) for c in chunks)


async def both_chats(make: Any, error: Exception | None = None, **asked: Any) -> tuple[Any, Any, int]:
    """Return what vLLM's and ours sent with the usage they told, and how many chunks ours made itself."""
    request = ChatCompletionRequest(model="m", messages=MESSAGES, stream=True, max_tokens=9, **asked)
    found, quick = [], 0
    serving = bare(OpenAIServingChat)
    for one in (serving, quick_chat(serving)):
        told = metadata()
        generator = one.chat_completion_stream_generator(
            request, given_by(make(), error), "chatcmpl-1", 'm"delta":{"content":""}', [], None, told
        )
        whole, quick = await sent(generator)
        found.append((whole, told.final_usage_info))
    return found[0], found[1], quick


async def both_completions(make: Any, error: Exception | None = None, **asked: Any) -> tuple[Any, Any, int]:
    request = CompletionRequest(model="m", prompt="said before", stream=True, max_tokens=9, **asked)
    found, quick = [], 0
    serving = bare(OpenAIServingCompletion)
    for one in (serving, quick_completion(serving)):
        told = metadata()
        pairs = [(0, result) for result in make()]
        generator = one.completion_stream_generator(
            request, [{}], given_by(pairs, error), "cmpl-1", 0, 'm"text":"",', 1, None, told
        )
        whole, quick = await sent(generator)
        found.append((whole, told.final_usage_info))
    return found[0], found[1], quick


BOTH = [both_chats, both_completions]
USAGE = [None, {"include_usage": True}, {"include_usage": True, "continuous_usage_stats": True}]


@pytest.mark.parametrize("options", USAGE)
@pytest.mark.parametrize("both", BOTH)
@given(
    steps=STEPS, end=st.tuples(SAID, st.integers(0, 3)), finish=st.sampled_from(["stop", "length", "error"])
)
@settings(max_examples=25)
async def test_any_answer_is_sent_as_vllm_sends_it(
    both: Any, options: Any, steps: list[Any], end: Any, finish: str
) -> None:
    theirs, ours, _ = await both(lambda: results([*steps, end], finish), stream_options=options)
    assert ours == theirs


@pytest.mark.parametrize("both", BOTH)
async def test_chunks_in_the_middle_cost_no_model(both: Any) -> None:
    steps = [("one", 1), (' "two"\n', 1), ("", 1), ("\u00e9\x01\x7f\u2028", 2), ("end", 1)]
    theirs, ours, quick = await both(lambda: results(steps))
    assert ours == theirs
    assert quick == 3  # of five: the first shows how, the last says why it ended
    assert ours[1].completion_tokens == 6


@pytest.mark.parametrize("both", BOTH)
@pytest.mark.parametrize(
    "asked",
    [{"n": 2}, {"return_token_ids": True}, {"echo": True}, {"stream_options": USAGE[2]}],
)
async def test_chunks_that_carry_more_are_vllms(both: Any, asked: dict[str, Any]) -> None:
    theirs, ours, quick = await both(lambda: results([("a", 1), ("b", 1), ("c", 1)]), **asked)
    assert ours == theirs
    assert quick == 0


async def test_logprobs_reasoning_and_tools_are_vllms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which generator runs is decided by what is asked for and how the server parses answers."""
    used = []
    monkeypatch.setattr(
        OpenAIServingChat, "chat_completion_stream_generator", lambda *args, **_: used.append(args[2])
    )
    own = object()
    for parser, asked in ((None, {"logprobs": True, "top_logprobs": 1}), (object, {})):
        handler = quick_chat(bare(OpenAIServingChat, parser_cls=parser))
        request = ChatCompletionRequest(model="m", messages=MESSAGES, stream=True, **asked)
        handler.chat_completion_stream_generator(request, own, "id", "m", [], None, metadata())
    assert used == [own, own]


@pytest.mark.parametrize("both", BOTH)
@pytest.mark.parametrize("before", [0, 1, 3])
async def test_an_error_is_told_as_vllm_tells_it(both: Any, before: int) -> None:
    error = Unavailable("no instance", 1.0, HTTPStatus.SERVICE_UNAVAILABLE)
    steps = [("a", 1)] * before
    theirs, ours, _ = await both(lambda: results([*steps, ("", 1)])[:before], error=error)
    assert ours == theirs
    assert b"no instance" in ours[0]


def test_a_serving_object_of_another_kind_is_left_alone() -> None:
    class Special(OpenAIServingChat):
        pass

    special = bare(Special)
    assert quick_chat(special) is special
    assert quick_completion(None) is None


def test_a_chunk_that_does_not_hold_its_text_gives_no_template() -> None:
    assert template('data: {"choices":[]}\n\n', "text", CHAT_TEXT) is None
