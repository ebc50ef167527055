"""Two engines meet in the pool only if nothing in their contexts differs."""

import itertools

import msgspec
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mooncake.core.context import KvContext, differences
from mooncake.core.keys import chain, request_root, tail_key, variant_root

FIELDS = KvContext.__struct_fields__
NUMBERS = {field.name for field in msgspec.structs.fields(KvContext) if field.type is int}

# few and treacherous: empty, what frames and separators look like, numbers and words for nothing
TEXTS = st.sampled_from(["", "a", "ab", "b", "=", ",", "\0", "0", "1", "None", "True", "a" * 40]) | st.text(
    st.characters(exclude_categories=["Cs"]), max_size=6
)
COUNTS = st.integers(0, 3) | st.integers(0, 2**40)
CONTEXTS = st.builds(KvContext, **{name: COUNTS if name in NUMBERS else TEXTS for name in FIELDS})


@given(CONTEXTS, CONTEXTS)
@settings(max_examples=30)
def test_two_contexts_have_one_root_only_if_they_are_equal(a, b):
    assert (a.root() == b.root()) == (a == b)


@pytest.mark.parametrize("name", FIELDS)
@given(a=CONTEXTS, text=TEXTS, count=COUNTS)
@settings(max_examples=15)
def test_changing_any_field_changes_the_root(name, a, text, count):
    value = count if name in NUMBERS else text
    assume(getattr(a, name) != value)
    b = msgspec.structs.replace(a, **{name: value})
    assert a.root() != b.root()
    assert differences(a.settings(), b.settings()) == [name]


@given(CONTEXTS)
@settings(max_examples=30)
def test_two_fields_that_swap_their_values_change_the_root(a):
    for first, second in itertools.combinations(FIELDS, 2):
        mine, other = getattr(a, first), getattr(a, second)
        if mine == other or (first in NUMBERS) != (second in NUMBERS):
            continue
        assert msgspec.structs.replace(a, **{first: other, second: mine}).root() != a.root()


@given(CONTEXTS, TEXTS, TEXTS)
@settings(max_examples=30)
def test_what_ends_one_field_does_not_begin_the_next(a, left, right):
    """Moving text over the border of two neighbours is another context."""
    for first, second in itertools.pairwise(name for name in FIELDS if name not in NUMBERS):
        b = msgspec.structs.replace(a, **{first: left, second: right})
        for at in range(len(right)):
            moved = {first: left + right[: at + 1], second: right[at + 1 :]}
            assert msgspec.structs.replace(b, **moved).root() != b.root()


@given(CONTEXTS, CONTEXTS, st.none() | TEXTS, st.none() | TEXTS, st.none() | TEXTS)
@settings(max_examples=30)
def test_contexts_tenants_adapters_and_codecs_are_four_separate_questions(a, b, salt, lora, codec):
    def roots(context):
        base = variant_root(context.root(), {} if codec is None else {"codec": codec})
        return request_root(base, salt, lora)

    assert (roots(a) == roots(b)) == (a == b)
    assert (roots(a) == a.root()) == ((salt, lora, codec) == (None, None, None))


@given(CONTEXTS, st.lists(st.integers(0, 2**32 - 1), max_size=16))
@settings(max_examples=30)
def test_no_root_is_a_block_of_another_context(a, tokens):
    keys = {*chain(a.root(), tokens, 4), tail_key(a.root(), tokens)}
    assert a.root() not in keys
    assert msgspec.structs.replace(a, block_size=a.block_size + 1).root() not in keys


@pytest.mark.parametrize("name", FIELDS)
def test_no_field_can_be_forgotten(name):
    given_fields = {other: 0 if other in NUMBERS else "" for other in FIELDS if other != name}
    with pytest.raises(TypeError, match=name):
        KvContext(**given_fields)


def test_the_root_commits_to_the_version_of_the_list():
    a = KvContext(**{name: 1 if name in NUMBERS else "x" for name in FIELDS})
    assert set(a.settings()) == {"version", *FIELDS}
    assert a.settings()["version"] == "2"
    assert all(isinstance(value, str) for value in a.settings().values())
