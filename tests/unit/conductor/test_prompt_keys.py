"""PromptKeys: the keys that engines make, in any order of asking, from a memory that is bounded."""

from array import array
from hashlib import sha256

from hypothesis import given
from hypothesis import strategies as st

from conductor.index import PrefixIndex
from conductor.prompt_keys import SPAN_BLOCKS, KeyMemo, PromptKeys
from mooncake.core.keys import chain, token_bytes

ROOT = sha256(b"root").digest()
BLOCK = 2
TOKENS = list(range(7, 7 + 3 * SPAN_BLOCKS * BLOCK + 5))
KEYS = chain(ROOT, TOKENS, BLOCK)
AT = st.integers(-len(KEYS) - 3, len(KEYS) + 3)
SLICES = st.builds(slice, AT | st.none(), AT | st.none(), st.sampled_from([None, 1, 3, -1, -2]))


@given(st.lists(SLICES | st.integers(-len(KEYS), len(KEYS) - 1), max_size=6), st.integers(0, 4))
def test_whatever_is_asked_first_they_are_the_chain(asked, spans_max):
    memo = KeyMemo(spans_max)
    for _ in range(2):
        made = PromptKeys(ROOT, TOKENS, BLOCK, memo)
        assert len(made) == len(KEYS)
        for at in asked:
            assert made[at] == KEYS[at]
        assert len(memo) <= spans_max
    assert list(PromptKeys(ROOT, TOKENS, BLOCK, memo)) == KEYS


@given(st.integers(0, len(TOKENS)), st.integers(0, 1 << 20))
def test_prompts_that_part_anywhere_have_the_keys_of_their_own_tokens(at, other):
    memo = KeyMemo()
    for tokens in (TOKENS, [*TOKENS[:at], other, *TOKENS[at:]], TOKENS[at:], TOKENS[:at]):
        assert list(PromptKeys(ROOT, tokens, BLOCK, memo)) == chain(ROOT, tokens, BLOCK)


def test_roots_and_sizes_of_blocks_are_never_mixed_up():
    memo = KeyMemo()
    for root, block in ((ROOT, BLOCK), (sha256(b"tenant").digest(), BLOCK), (ROOT, 2 * BLOCK)):
        assert list(PromptKeys(root, TOKENS, block, memo)) == chain(root, TOKENS, block)


def test_no_more_is_named_than_somebody_holds():
    index, memo = PrefixIndex(), KeyMemo()
    index.apply("a", b"".join(KEYS[:3]), b"")
    asked = PromptKeys(ROOT, TOKENS, BLOCK, memo)
    assert index.longest_prefix(asked) == {"a": 3}
    assert len(memo) == 1


def test_the_span_that_was_not_used_for_longest_is_forgotten():
    memo = KeyMemo(2)
    for name in (b"1", b"2"):
        memo.add(name, (name,))
    assert memo.find(b"1") == (b"1",)
    memo.add(b"3", (b"3",))
    assert memo.find(b"2") is None
    assert memo.find(b"1") == (b"1",)


def test_a_prompt_shorter_than_a_block_is_empty_and_false():
    assert not PromptKeys(ROOT, [1], BLOCK, KeyMemo())


@given(st.lists(st.integers(0, (1 << 32) - 1)))
def test_tokens_are_packed_alike_from_lists_and_from_what_is_no_list(tokens):
    assert token_bytes(tokens) == token_bytes(tuple(tokens)) == array("I", tokens).tobytes()
