"""What gateways and core tell each other survives the wire, bounded; names of blocks do for keys."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conductor.cluster import Charge
from conductor.coming import Coming
from conductor.core_messages import (
    CONTEXTS_MAX,
    TOLD_MAX,
    Answer,
    Ask,
    ChangeRole,
    Checked,
    Context,
    Ended,
    FromCore,
    FromGateway,
    Join,
    Joined,
    ListDecisions,
    Listed,
    ListInstances,
    NotLeader,
    Ping,
    Pong,
    Prefilled,
    Question,
    Refused,
    Replan,
    Running,
    SecondCheck,
    Stepped,
    Told,
    Waiting,
)
from conductor.index import PrefixIndex
from conductor.plan import Decision, Need, Plan, Reason, Rejection, RequestFacts
from conductor.terms import CLASSES, Terms
from mooncake.core import wire
from mooncake.core.errors import ProtocolError
from mooncake.core.keys import BlockNames, names_of
from mooncake.core.messages import Term
from tests.unit.conductor.make import keys

TEXT = st.text(max_size=20)
COUNT = st.integers(0, (1 << 40) - 1)
SECONDS = st.floats(0, 1e9)
MAYBE = st.none() | SECONDS
TICKET = st.integers(0, (1 << 63) - 1)
TERM = st.builds(Term, TEXT, COUNT, TEXT)
CHARGES = st.lists(st.builds(Charge, TICKET, TEXT, st.booleans(), SECONDS, COUNT), max_size=3)
CONTEXTS = st.lists(
    st.builds(Context, TEXT, st.integers(1, 256), st.binary(max_size=64), st.booleans()),
    max_size=CONTEXTS_MAX,
)
FACTS = st.builds(
    RequestFacts,
    request_id=TEXT, prompt_len=COUNT, max_tokens=COUNT, keys=st.just([]), arrival_s=SECONDS,
    ttft_slo_s=MAYBE, tbt_slo_s=MAYBE, context_root=TEXT, session=TEXT, tenant=TEXT, slo_class=TEXT,
)  # fmt: skip
TERMS = st.builds(Terms, slo_class=st.sampled_from(list(CLASSES.values())), tenant=TEXT, ttft_slo_s=MAYBE)
QUESTION = st.builds(Question, FACTS, TERMS, TEXT, SECONDS, st.booleans(), TEXT, CONTEXTS)
PLAN = st.builds(
    Plan,
    request_id=TEXT, prefill=st.none() | TEXT, decode=st.none() | TEXT, decision=st.sampled_from(Decision),
    predicted_ttft_s=SECONDS, prefill_ticket=TICKET, decode_ticket=TICKET,
)  # fmt: skip
REJECTION = st.builds(
    Rejection, request_id=TEXT, reason=st.sampled_from(Reason), retry_after_s=SECONDS, detail=TEXT
)
FROM_GATEWAY = st.one_of(
    st.builds(Join, TEXT, CHARGES, st.lists(st.builds(Running, TEXT, TEXT, TEXT, COUNT, COUNT), max_size=3)),
    st.builds(Ask, QUESTION),
    st.builds(Replan, QUESTION, COUNT, st.lists(TEXT, max_size=3), st.sampled_from(Need)),
    st.builds(SecondCheck, QUESTION, TEXT, TICKET),
    st.builds(
        Told,
        st.lists(TICKET, max_size=3),
        st.lists(st.builds(Ended, TEXT, TEXT, TEXT, COUNT, COUNT, st.booleans(), st.booleans()), max_size=3),
        st.lists(st.builds(Prefilled, COUNT, COUNT, SECONDS), max_size=3),
        st.lists(st.builds(Stepped, COUNT, COUNT, SECONDS), max_size=3),
        st.lists(st.floats(-1e3, 1e3), max_size=3),
    ),
    st.builds(Ping),
    st.builds(ListInstances),
    st.builds(ListDecisions, TEXT),
    st.builds(ChangeRole, TEXT, TEXT),
)
FROM_CORE = st.one_of(
    st.builds(Joined, TERM),
    st.builds(NotLeader),
    st.builds(Waiting, TERM),
    st.builds(Answer, TERM, PLAN, st.none(), TEXT, CHARGES),
    st.builds(Answer, TERM, st.none(), REJECTION),
    st.builds(Checked, TERM, st.none() | REJECTION),
    st.builds(Pong, TERM),
    st.builds(Listed, st.lists(st.dictionaries(TEXT, COUNT | TEXT, max_size=2), max_size=2)),
    st.builds(Refused, TEXT, TEXT),
)


@given(FROM_GATEWAY)
def test_what_a_gateway_says_is_what_the_core_hears(message):
    assert wire.decode(wire.encode(message), FromGateway) == message


@given(FROM_CORE)
def test_what_the_core_says_is_what_a_gateway_hears(message):
    assert wire.decode(wire.encode(message), FromCore) == message


@given(st.binary(max_size=200))
def test_garbage_is_an_error_of_the_protocol_and_nothing_else(data):
    for kind in (FromGateway, FromCore):
        try:
            wire.decode(data, kind)
        except ProtocolError:
            continue


def test_messages_are_bounded():
    question = Question(
        RequestFacts(request_id="r", prompt_len=1, max_tokens=1, keys=[], arrival_s=0.0), Terms(), "", 0.0,
        False, "", [Context("", 1, b"")] * (CONTEXTS_MAX + 1),
    )  # fmt: skip
    for message in (Ask(question), Told([1] * (TOLD_MAX + 1)), ChangeRole("x" * 2000, "decode")):
        with pytest.raises(ProtocolError, match="length"):
            wire.decode(wire.encode(message), FromGateway)


# ---------------------------------------------------------------- names for keys


def named(some: list[bytes]) -> BlockNames:
    """As they arrive at the core."""
    return BlockNames.unpacked(names_of(some).tobytes())


@given(st.lists(st.integers(0, 300), min_size=1, max_size=4), st.integers(0, 400))
def test_an_index_finds_as_much_by_names_as_by_keys(held, asked):
    index, prompt = PrefixIndex(), keys(400)
    for number, depth in enumerate(held):
        index.apply(f"n{number}", b"".join(prompt[:depth]), b"")
    assert index.longest_prefix(named(prompt[:asked])) == index.longest_prefix(prompt[:asked])


def test_prompts_under_way_are_found_by_names_too():
    coming, prompt = Coming(), keys(100)
    coming.add(7, "p0", named(prompt), 10)
    assert coming.match(named(prompt[:60] + keys(40, "other")), 10) == {"p0": 60}
    coming.remove(7)
    assert coming.match(named(prompt), 10) == {}


def test_names_are_as_many_as_keys_and_of_their_length():
    prompt = keys(5)
    names = named(prompt)
    assert (len(names), len(names[1:3]), len(names[0])) == (5, 2, 32)
    assert names[1:][0] == names[1]
    assert list(names) == [names[n] for n in range(5)]
    assert not named([])
    with pytest.raises(ProtocolError, match="whole number"):
        BlockNames.unpacked(b"123")
