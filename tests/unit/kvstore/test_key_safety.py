"""No block answers for another: what decides its bytes, or who may see them, is in its key (DESIGN 2.1).

Every property here compares all keys of two prompts. The arithmetic of single functions is tested with
mooncake.core.keys itself.
"""

import itertools
import os
import subprocess
import sys

import msgspec
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mooncake.core.keys import (
    block_checksum,
    chain,
    checksum_seed,
    context_root,
    prompt_keys,
    request_root,
    tail_key,
    variant_root,
)

CONTEXT = ("model", "dtype", "kv_dtype", "block_size", "layout", "layers", "isa", "tp", "pp", "revision")
VARIANT = ("codec", "pool_layout", "rank")

# few and treacherous: empty, what frames and separators look like, two spellings of one letter
TREACHEROUS = ("", "a", "ab", "b", "=", ",", "\0", "a=b", "0", "1", "None", "\u00e9", "e\u0301", "a" * 40)
VALUES = st.sampled_from(TREACHEROUS)
TOKENS = st.lists(st.integers(0, 3) | st.sampled_from([0xFF, 0x100, 2**32 - 1]), max_size=20)


class Identity(msgspec.Struct, frozen=True):
    """Everything that names the blocks of one prompt."""

    context: dict[str, str]
    variant: dict[str, str]
    salt: str | None
    lora: str | None
    tokens: list[int]

    @property
    def block_size(self) -> int:
        """As in an engine: what it cuts by stands in its context."""
        return 1 + len(self.context["block_size"])

    @property
    def root(self) -> bytes:
        root = variant_root(context_root(self.context), self.variant)
        return request_root(root, self.salt, self.lora)

    @property
    def keys(self) -> list[bytes]:
        full, tail = prompt_keys(self.root, self.tokens, self.block_size)
        return [*full, *([tail] if tail else [])]

    @property
    def blocks(self) -> list[tuple[int, ...]]:
        """What each key stands for: all tokens up to the end of its block."""
        size = self.block_size
        ends = range(size, len(self.tokens) + size, size)
        return [tuple(self.tokens[:end]) for end in ends]


CONTEXTS = st.fixed_dictionaries(dict.fromkeys(CONTEXT, VALUES), optional={"more": VALUES, "": VALUES})
IDENTITIES = st.builds(
    Identity,
    context=CONTEXTS,
    variant=st.dictionaries(st.sampled_from(VARIANT), VALUES, max_size=3),
    salt=st.none() | VALUES,
    lora=st.none() | VALUES,
    tokens=TOKENS,
)


def strangers(a: Identity, b: Identity) -> bool:
    return not set(a.keys) & set(b.keys)


@pytest.mark.parametrize("name", CONTEXT)
@given(IDENTITIES, VALUES)
@settings(max_examples=15)
def test_engines_that_differ_in_one_setting_share_no_key(name, a, other):
    assume(a.context[name] != other)
    assert strangers(a, msgspec.structs.replace(a, context={**a.context, name: other}))


@pytest.mark.parametrize("name", CONTEXT)
@given(IDENTITIES)
@settings(max_examples=10)
def test_an_unknown_setting_is_not_an_empty_one(name, a):
    a = msgspec.structs.replace(a, context={**a.context, name: ""})
    without = context_root({key: value for key, value in a.context.items() if key != name})
    assert without != context_root(a.context)


@pytest.mark.parametrize("name", VARIANT)
@given(IDENTITIES, VALUES)
@settings(max_examples=15)
def test_codecs_layouts_and_ranks_share_no_key_with_each_other_or_with_the_plain_form(name, a, other):
    b = msgspec.structs.replace(a, variant={**a.variant, name: other})
    assume(a.variant != b.variant)
    assert strangers(a, b)
    assert strangers(b, msgspec.structs.replace(b, variant={}))


def test_no_salt_and_adapter_are_mistaken_for_others():
    values = [None, *TREACHEROUS]
    roots = {request_root(bytes(32), salt, lora) for salt in values for lora in values}
    assert len(roots) == len(values) ** 2


@pytest.mark.parametrize("root_of", [context_root, lambda settings_of: variant_root(bytes(32), settings_of)])
def test_no_settings_are_mistaken_for_others_however_they_are_spelled(root_of):
    names = ("a", "b", "a=c", "")
    values = (None, "", "c", "c,b=c", "=c")  # None: not set
    drawn = itertools.product(values, repeat=len(names))
    several = [{n: v for n, v in zip(names, row, strict=True) if v is not None} for row in drawn]
    assert len({root_of(each) for each in several}) == len(several) == len(values) ** len(names)


@given(IDENTITIES, st.none() | VALUES, st.none() | VALUES)
def test_tenants_and_adapters_share_no_key(a, salt, lora):
    b = msgspec.structs.replace(a, salt=salt, lora=lora)
    assume((a.salt, a.lora) != (salt, lora))
    assert strangers(a, b)


@given(IDENTITIES, IDENTITIES, st.booleans())
def test_two_keys_are_equal_only_if_everything_up_to_the_end_of_the_block_is(a, b, kin):
    if kin:  # most pairs that differ anywhere would share nothing for that reason alone
        b = msgspec.structs.replace(a, tokens=a.tokens[: len(b.tokens)] + b.tokens)
    same_root = (a.context, a.variant, a.salt, a.lora) == (b.context, b.variant, b.salt, b.lora)
    for key, block in zip(a.keys, a.blocks, strict=True):
        for other_key, other_block in zip(b.keys, b.blocks, strict=True):
            assert (key == other_key) == (same_root and block == other_block)


@given(IDENTITIES)
def test_no_key_of_a_prompt_comes_twice_and_none_is_a_root(a):
    roots = [context_root(a.context), variant_root(context_root(a.context), a.variant), a.root]
    assert len({*a.keys, *roots}) == len(a.keys) + len(set(roots))


@given(IDENTITIES, VALUES)
def test_a_setting_in_the_context_is_not_the_same_setting_in_a_variant_or_a_request(a, value):
    root = context_root(a.context)
    spelled = [
        context_root({**a.context, "codec": value}),
        variant_root(root, {"codec": value}),
        variant_root(variant_root(root, {"codec": value}), {"codec": value}),
        request_root(root, "codec", value),
        request_root(variant_root(root, {"codec": value}), "codec", value),
        variant_root(request_root(root, "codec", value), {"codec": value}),
    ]
    assert len(set(spelled)) == len(spelled)


@given(IDENTITIES, st.randoms(use_true_random=False))
def test_equal_settings_in_any_order_give_equal_keys(a, shuffler):
    def shuffled(settings_of):
        items = list(settings_of.items())
        shuffler.shuffle(items)
        return dict(items)

    b = msgspec.structs.replace(a, context=shuffled(a.context), variant=shuffled(a.variant))
    assert a.keys == b.keys


def test_without_a_variant_the_context_itself_is_the_root():
    root = context_root({"model": "m"})
    assert variant_root(root, {}) == root


@given(st.dictionaries(st.sampled_from(VARIANT), VALUES, min_size=1), TOKENS)
@settings(max_examples=50)
def test_no_tokens_can_forge_the_root_of_a_variant(variant, tokens):
    """What a root is hashed from begins with a label, what a block key is hashed from with a key."""
    root = context_root({"model": "m"})
    spelled = msgspec.msgpack.encode(sorted(variant.items()))
    spelled += bytes(-len(spelled) % 4)
    forged = [int.from_bytes(spelled[i : i + 4], "little") for i in range(0, len(spelled), 4)]
    assert variant_root(root, variant) not in {tail_key(root, forged), *chain(root, forged + tokens, 1)}


@given(IDENTITIES, st.binary(min_size=1, max_size=40))
@settings(max_examples=50)
def test_bytes_under_the_key_of_another_block_fail_their_checksum(a, data):
    """The second line: an index that mixes two names up is found out when the block is read."""
    b = msgspec.structs.replace(a, salt=f"not {a.salt}")
    for mine, other in zip(a.keys, b.keys, strict=True):
        assert checksum_seed(mine) != checksum_seed(other)
        assert block_checksum(mine, data) != block_checksum(other, data)


# ------------------------------------------------------------ for ever

SAMPLE = """
from mooncake.core.keys import *
context = {"model": "m", "dtype": "bfloat16", "layout": "l", "isa": "avx2", "block_size": "4"}
root = context_root(context)
for each in (
    root,
    request_root(root, "tenant", None),
    request_root(root, None, "adapter"),
    *chain(root, range(8), 4),
    tail_key(chain(root, range(8), 4)[-1], [8, 9]),
    variant_root(root, {"codec": "int8", "rank": "1"}),
    chain(request_root(variant_root(root, {"codec": "int8"}), "tenant", "adapter"), [2**32 - 1] * 4, 4)[0],
):
    print(each.hex())
"""
KEYS = """
0e9b405a59cf76d66a7eb727671d261ad3367f039a80164ad501b26f28a1a4c3
94e7570cfcc77c1a2b233dc2ac74f591cf8884aff255f57b7e8b9c85beea634c
b341c28e91fe16d89aca6e931deb4d68891923463b18f6d4ed34a7b44ecf0e17
86a2040308ff95a80549cfcb4013772af1698851599032d5ce0e4ab4c1e54fba
b713b582604112a762b9dd4f0989ae58910bcde17172b9886c7317eff3f7c92f
6c8152a2199d7026181e0afd1fcec104eff0ec99a26a1a125bcf6d22c60e29af
eba134d54f6e72f74d3ba1269e47b5d80daeaaebe35cfd343b4b82b82d967f72
d97c53ddce5ce91341c5429724649913c90d534afb29857ff2c69d3e853b1b2c
"""


@pytest.mark.parametrize("seed", ["0", "1", "31337"])
def test_keys_are_the_same_in_every_process_and_in_every_release(seed):
    """Changing them loses every cached block and, in a mixed cluster, half of the hits."""
    environment = {**os.environ, "PYTHONHASHSEED": seed}
    argv = [sys.executable, "-c", SAMPLE]
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == KEYS.split()
