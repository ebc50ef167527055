"""Prompts of a replay: what is shared in the trace is shared on the wire, and nothing else."""

from itertools import takewhile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.replay.prompts import FIRST_TOKEN, Shape, digest, prompt_of, tokens_max
from benchmarks.sim.trace import BLOCK_TOKENS, TraceRequest, synthesize
from mooncake.core.errors import ConfigError


def request(ids: list[int], rest: int = BLOCK_TOKENS, output: int = 100) -> TraceRequest:
    return TraceRequest(0.0, BLOCK_TOKENS * (len(ids) - 1) + rest, output, tuple(ids))


def common(left, right) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(left, right, strict=False)))


ids = st.lists(st.integers(0, 10**9), min_size=1, max_size=6)
scales = st.sampled_from([1 / 16, 1 / 3, 0.5, 1.0, 1.7])


@given(shared=st.lists(st.integers(0, 10**9), max_size=4), left=ids, right=ids, scale=scales)
def test_two_prompts_share_exactly_the_blocks_that_their_traces_share(shared, left, right, scale):
    shape = Shape(scale=scale)
    a = prompt_of(request(shared + left), shape).content
    b = prompt_of(request(shared + right), shape).content
    blocks = common(shared + left, shared + right)
    together = blocks * shape.block_tokens
    if blocks == min(len(shared + left), len(shared + right)):
        assert common(a, b) == together
    else:
        assert together <= common(a, b) < together + shape.block_tokens


@given(ids=ids, rest=st.integers(1, BLOCK_TOKENS), scale=scales, vocabulary=st.integers(64, 1 << 16))
def test_a_prompt_has_the_scaled_length_and_keeps_to_the_vocabulary(ids, rest, scale, vocabulary):
    made = prompt_of(request(ids, rest), Shape(scale=scale, vocabulary=vocabulary))
    whole = round(BLOCK_TOKENS * scale)
    assert (len(ids) - 1) * whole < len(made.content) == made.input_tokens <= len(ids) * whole
    assert FIRST_TOKEN <= min(made.content) <= max(made.content) < vocabulary
    assert abs(made.output_tokens - 100 * scale) <= 0.5
    assert made.input_tokens + made.output_tokens <= tokens_max([request(ids, rest)], Shape(scale=scale))


def test_the_same_seed_gives_the_same_requests_on_every_machine():
    trace = synthesize(20, 2.0, seed=3)
    assert digest(trace, Shape(scale=0.1)) == "6dd149e367b76ff2"
    assert digest(trace, Shape(scale=0.1, seed=1)) != digest(trace, Shape(scale=0.1))
    assert prompt_of(request([5], 4), Shape()).content == [60, 689, 304, 600]


def test_a_text_has_a_word_for_each_token_and_shares_prefixes_alike():
    a = prompt_of(request([1, 2]), Shape(scale=1 / 16, text=True)).content
    b = prompt_of(request([1, 3]), Shape(scale=1 / 16, text=True)).content
    assert isinstance(a, str)
    assert isinstance(b, str)
    assert len(a.split()) == 64
    assert common(a.split(), b.split()) == 32


@pytest.mark.parametrize("wrong", [{"scale": 0}, {"scale": 17}, {"vocabulary": 3}, {"vocabulary": 1 << 17}])
def test_a_shape_out_of_range_is_refused_by_name(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Shape(**wrong).check()
