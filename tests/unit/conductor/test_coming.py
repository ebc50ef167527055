"""What is about to be computed counts for whoever waits behind it, and for nobody once it is over."""

from hypothesis import given
from hypothesis import strategies as st

from conductor.coming import PROMPTS_MAX, Coming
from mooncake.core.keys import chain

ROOT = bytes(32)


def keys(*tokens: int) -> list[bytes]:
    return chain(ROOT, list(tokens), 1)


def test_a_later_prompt_finds_what_it_shares_with_one_that_waits():
    coming = Coming()
    coming.add(1, "p0", keys(1, 2, 3, 4, 5), known=2)
    assert coming.match(keys(1, 2, 3, 4, 9), known=2) == {"p0": 4}
    assert coming.match(keys(1, 2, 3, 4, 5), known=2) == {"p0": 5}
    assert coming.match(keys(1, 2, 7), known=2) == {}


def test_what_is_over_counts_no_more():
    coming = Coming()
    coming.add(1, "p0", keys(1, 2), known=0)
    coming.add(2, "p0", keys(1, 2, 3), known=0)
    coming.remove(2)
    coming.remove(2)
    assert coming.match(keys(1, 2, 3), known=0) == {"p0": 2}
    coming.remove(1)
    assert coming.match(keys(1, 2, 3), known=0) == {}
    assert len(coming) == 0


def test_a_prompt_that_is_known_whole_and_one_without_ticket_are_not_waited_for():
    coming = Coming()
    coming.add(1, "p0", keys(1, 2), known=2)
    coming.add(0, "p0", keys(1, 2), known=0)
    assert len(coming) == 0
    assert coming.match(keys(1, 2), known=2) == {}


def test_a_crowd_behind_one_prefix_takes_a_bounded_place():
    coming = Coming()
    for ticket in range(1, 101):
        coming.add(ticket, "p0", keys(1, 2, ticket + 10), known=0)
    assert len(coming) == PROMPTS_MAX
    assert coming.match(keys(1, 2, 3), known=0) == {"p0": 2}
    for ticket in range(1, 101):
        coming.remove(ticket)
    assert len(coming) == 0


prompts = st.lists(st.integers(0, 1), min_size=1, max_size=12)


@given(
    st.lists(st.tuples(prompts, st.sampled_from(["p0", "p1"]), st.booleans()), max_size=6),
    prompts,
    st.integers(0, 12),
)
def test_it_says_what_comparing_with_every_prompt_says(planned, asked, known):
    coming, there = Coming(), []
    for ticket, (tokens, instance, over) in enumerate(planned, 1):
        coming.add(ticket, instance, keys(*tokens), known)
        if over:
            coming.remove(ticket)
        elif known < len(tokens):
            there.append((tokens, instance))
    expected: dict[str, int] = {}
    for tokens, instance in there:
        shared = 0
        while shared < min(len(tokens), len(asked)) and tokens[shared] == asked[shared]:
            shared += 1
        if shared > known:
            expected[instance] = max(expected.get(instance, 0), shared)
    assert coming.match(keys(*asked), known) == expected
