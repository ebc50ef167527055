"""Detokenising from the end of a prompt gives the text that detokenising from all of it gives."""

from typing import Any

import pytest
from conftest import make_request
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders

from conductor.decode_tail import PROMPT_TOKENS_MIN, begin_with_tail, byte_level
from tests.tiny_model import SPECIALS, make_tokenizer

TINY = make_tokenizer()
PARTS = [TINY.token_to_id(byte) for byte in ("ð", "Ł", "ļ", "Ģ", "Ã", "©")]
"""Bytes of characters that are whole only together (as the byte-level alphabet writes them)."""
ids = st.one_of(
    st.integers(0, len(SPECIALS) - 1), st.sampled_from(PARTS), st.integers(0, TINY.get_vocab_size() - 1)
)


def wrapped(backend: Any) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=backend)


TOKENIZER = wrapped(TINY)


def detokenizer(prompt: list[int], **params: Any) -> Any:
    from vllm.v1.engine.detokenizer import FastIncrementalDetokenizer

    return FastIncrementalDetokenizer(TOKENIZER, make_request(prompt, **params))


def text_of(one: Any, answer: list[int]) -> list[str]:
    found = []
    for token in answer:
        one.update([token], False)
        found.append(one.get_next_output_text(finished=False, delta=True))
    return [*found, one.get_next_output_text(finished=True, delta=True)]


@given(
    prompt=st.lists(ids, min_size=PROMPT_TOKENS_MIN, max_size=PROMPT_TOKENS_MIN + 70),
    answer=st.lists(ids, max_size=12),
    skip=st.booleans(),
)
@settings(max_examples=30)
def test_every_token_adds_the_same_text(prompt: list[int], answer: list[int], skip: bool) -> None:
    whole, ours = (detokenizer(prompt, skip_special_tokens=skip) for _ in range(2))
    begin_with_tail(ours, prompt)
    assert text_of(ours, answer) == text_of(whole, answer)


def test_a_prompt_of_whole_characters_is_begun_with_its_tail() -> None:
    prompt = TINY.encode("many words " * PROMPT_TOKENS_MIN).ids
    ours, whole = detokenizer(prompt), detokenizer(prompt)
    before = ours.stream
    assert begin_with_tail(ours, prompt)
    assert ours.stream is not before
    answer = TINY.encode(" und weiter: é \U0001f680!").ids
    assert text_of(ours, answer) == text_of(whole, answer)


@pytest.mark.parametrize(
    ("end", "why"), [(PARTS[:1], "ends within a character"), ([0] * 64, "its tail has no text")]
)
def test_a_tail_that_does_not_say_where_text_begins_is_not_used(end: list[int], why: str) -> None:
    prompt = [*TINY.encode("many words " * PROMPT_TOKENS_MIN).ids, *end]
    assert not begin_with_tail(detokenizer(prompt), prompt), why


def test_short_prompts_and_other_detokenizers_stay_as_they_are() -> None:
    from vllm.v1.engine.detokenizer import IncrementalDetokenizer

    assert not begin_with_tail(detokenizer([5] * 10), [5] * 10)
    assert not begin_with_tail(IncrementalDetokenizer(), [5] * PROMPT_TOKENS_MIN)
    assert not begin_with_tail(None, [5] * PROMPT_TOKENS_MIN)


def test_only_decoders_whose_tokens_are_bytes_qualify() -> None:
    other = make_tokenizer()
    other.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    assert byte_level(TOKENIZER)
    assert not byte_level(wrapped(other))
    assert not byte_level(None)
