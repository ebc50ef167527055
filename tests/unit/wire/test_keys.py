"""The name of a block commits to everything that decides its bytes, and to nothing else."""

from hashlib import sha256

import msgspec
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mooncake.core.keys import (
    KEY_BYTES,
    SHARE_MARK,
    block_checksum,
    block_names,
    chain,
    context_root,
    prompt_keys,
    request_root,
    share_key,
    share_keys,
    short_names,
    tail_key,
    token_bytes,
)

TOKENS = st.lists(st.integers(0, 2**32 - 1), max_size=40)
BLOCK_SIZES = st.integers(1, 9)
ROOT = context_root({"model": "m", "dtype": "bfloat16"})
NAMES = st.none() | st.text(max_size=8)

pytestmark = pytest.mark.filterwarnings("error")


@given(tokens=TOKENS, size=BLOCK_SIZES)
def test_a_prompt_has_one_key_per_full_block_and_a_tail_key_for_the_rest(tokens, size):
    full, tail = prompt_keys(ROOT, tokens, size)
    assert len(full) == len(tokens) // size
    assert (tail is None) == (len(tokens) % size == 0)
    assert all(len(key) == KEY_BYTES for key in [*full, *([tail] if tail else [])])


@given(tokens=TOKENS, size=BLOCK_SIZES)
def test_the_chain_is_sha256_of_parent_and_little_endian_tokens(tokens, size):
    parent, expected = ROOT, []
    for start in range(0, len(tokens) - size + 1, size):
        raw = b"".join(token.to_bytes(4, "little") for token in tokens[start : start + size])
        parent = sha256(parent + raw).digest()
        expected.append(parent)
    assert chain(ROOT, tokens, size) == expected


@given(tokens=TOKENS, more=TOKENS, size=BLOCK_SIZES)
def test_a_longer_prompt_keeps_the_full_keys_of_its_prefix(tokens, more, size):
    full = chain(ROOT, tokens, size)
    assert chain(ROOT, tokens + more, size)[: len(full)] == full


@given(tokens=TOKENS, size=BLOCK_SIZES, cut=st.integers(0, 40))
def test_a_chain_goes_on_from_any_of_its_keys(tokens, size, cut):
    full = chain(ROOT, tokens, size)
    cut = min(cut, len(full))
    parent = full[cut - 1] if cut else ROOT
    assert chain(parent, tokens[cut * size :], size) == full[cut:]


@given(data=st.data(), tokens=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=40), size=BLOCK_SIZES)
def test_changing_one_token_changes_its_block_and_all_later_keys_and_no_earlier_one(data, tokens, size):
    at = data.draw(st.integers(0, len(tokens) - 1))
    other = list(tokens)
    other[at] ^= 1 + data.draw(st.integers(0, 2**32 - 2))
    assume(other != tokens)
    old, old_tail = prompt_keys(ROOT, tokens, size)
    new, new_tail = prompt_keys(ROOT, other, size)
    assert old[: at // size] == new[: at // size]
    assert not set(old[at // size :]) & set(new[at // size :])
    assert old_tail is None or old_tail != new_tail


@given(tokens=TOKENS, size=BLOCK_SIZES, other=BLOCK_SIZES)
def test_a_tail_key_is_never_a_full_key_of_any_prompt_with_the_same_tokens(tokens, size, other):
    full, tail = prompt_keys(ROOT, tokens, size)
    assert tail not in full
    # the same tokens and one more block: where the tail was partial there is now a full block
    assert tail not in chain(ROOT, tokens + [0] * size, size)
    if other > size:  # an engine of another block size has another root, by its context
        assert tail is None or tail not in chain(context_root({"block_size": str(other)}), tokens, other)


@given(context=st.dictionaries(st.text(max_size=6), st.text(max_size=6), max_size=6), seed=st.randoms())
def test_the_insertion_order_of_a_context_does_not_matter(context, seed):
    items = list(context.items())
    seed.shuffle(items)
    assert context_root(dict(items)) == context_root(context)


@given(
    a=st.dictionaries(st.text(max_size=4), st.text(max_size=4), max_size=4),
    b=st.dictionaries(st.text(max_size=4), st.text(max_size=4), max_size=4),
)
def test_two_contexts_share_a_root_only_if_they_are_equal(a, b):
    assert (context_root(a) == context_root(b)) == (a == b)


def test_moving_a_character_between_a_name_and_its_value_changes_the_root():
    assert context_root({"ab": "c"}) != context_root({"a": "bc"})


@given(a=st.tuples(NAMES, NAMES), b=st.tuples(NAMES, NAMES))
def test_two_requests_share_a_root_only_with_the_same_salt_and_adapter(a, b):
    assert (request_root(ROOT, *a) == request_root(ROOT, *b)) == (a == b)


def test_no_salt_differs_from_an_empty_salt_and_a_salt_from_an_adapter_of_that_name():
    roots = {request_root(ROOT, *pair) for pair in [(None, None), ("", None), ("x", None), (None, "x")]}
    assert len(roots) == 4


def test_without_salt_and_adapter_the_root_of_the_engine_is_used():
    assert request_root(ROOT, None, None) == ROOT


@given(salt=st.text(max_size=16), lora=NAMES)
@settings(max_examples=60)
def test_no_tokens_can_forge_the_root_of_a_salted_request(salt, lora):
    """A tenant's root is outside the space of block keys, whatever the salt spells in msgpack."""
    spelled = msgspec.msgpack.encode([salt, lora])
    assume(len(spelled) % 4 == 0)
    tokens = [int.from_bytes(spelled[i : i + 4], "little") for i in range(0, len(spelled), 4)]
    assert request_root(ROOT, salt, lora) != tail_key(ROOT, tokens)


def test_tokens_are_four_little_endian_bytes_each():
    assert token_bytes([1, 0x01020304]) == bytes([1, 0, 0, 0, 4, 3, 2, 1])


@pytest.mark.parametrize("token", [-1, 2**32])
def test_a_number_that_is_no_token_is_refused(token):
    with pytest.raises(OverflowError):
        token_bytes([token])


@given(data=st.binary(min_size=1, max_size=200), at=st.integers(0, 199), bit=st.integers(0, 7))
def test_a_checksum_commits_to_every_bit(data, at, bit):
    at %= len(data)
    flipped = bytearray(data)
    flipped[at] ^= 1 << bit
    key = bytes(range(32))
    assert block_checksum(key, data) != block_checksum(key, bytes(flipped))
    assert len(block_checksum(key, data)) == 16


@given(
    data=st.binary(max_size=64), a=st.binary(min_size=32, max_size=32), b=st.binary(min_size=32, max_size=32)
)
def test_a_checksum_commits_to_the_key(data, a, b):
    assume(a[:8] != b[:8])
    assert block_checksum(a, data) != block_checksum(b, data)


def test_a_checksum_is_the_same_for_bytes_and_for_a_view_of_them():
    data = bytes(range(256)) * 16
    assert block_checksum(b"k" * 32, data) == block_checksum(b"k" * 32, memoryview(bytearray(data)))


# ---------------------------------------------------------------- shares of ranks

BLOCKS = st.lists(st.binary(min_size=KEY_BYTES, max_size=KEY_BYTES), unique=True, max_size=6)


@given(blocks=BLOCKS, ranks=st.integers(1, 9))
def test_every_share_of_every_block_has_a_name_of_its_own(blocks, ranks):
    shares = share_keys(blocks, ranks)
    assert len(set(shares)) == len(shares) == len(blocks) * ranks
    assert all(len(key) == KEY_BYTES for key in shares)
    assert shares == share_keys(blocks, ranks)


@given(blocks=BLOCKS, ranks=st.integers(1, 9))
def test_shares_come_block_by_block_and_the_first_is_called_as_the_block(blocks, ranks):
    shares = share_keys(blocks, ranks)
    assert shares[::ranks] == blocks
    for rank in range(ranks):
        assert shares[rank::ranks] == [share_key(key, rank) for key in blocks]


@given(blocks=BLOCKS, ranks=st.integers(1, 9), data=st.data())
def test_who_counts_blocks_counts_each_once_however_many_share_it(blocks, ranks, data):
    assume(not any(key.endswith(SHARE_MARK) for key in blocks))
    shares = data.draw(st.permutations(share_keys(blocks, ranks)))
    counted = sorted(block_names(b"".join(shares)).tolist())
    assert counted == sorted(short_names(b"".join(blocks)).tolist())


def test_names_of_shares_do_not_change_from_release_to_release():
    key = bytes(range(32))
    assert share_key(key, 1).hex() == sha256(b"mooncake-share-1" + key + b"\1\0\0\0").hexdigest()[:48] + (
        b"mc-share".hex()
    )
