"""Which requests belong to one run of an agent, since when, and how long its next turn is awaited."""

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conductor.programs import (
    PAUSE_S_MAX,
    TTL_MAX_S,
    TTL_MIN_S,
    TTL_PRIOR_S,
    Programs,
    calls_tools,
)
from conductor.terms import NAME_CHARS_MAX, Terms, said_in, terms_of, with_body
from mooncake.core.errors import RequestError

RUN = Terms(tenant="t", program="run", tools=True)


def body(**fields: object) -> bytes:
    return msgspec.json.encode({"model": "m", "messages": [], **fields})


def asked(headers: dict[bytes, bytes], **fields: object) -> Terms:
    return with_body(terms_of(list(headers.items())), said_in(body(**fields)))


def paused(programs: Programs, pauses_s: list[float], terms: Terms = RUN) -> float:
    """Let turns come with these pauses, each answered at once by a call of a tool; return when."""
    now_s = 0.0
    for pause_s in (*pauses_s, None):
        programs.came(now_s, terms)
        programs.ended(now_s, terms, goes_on=pause_s is not None)
        now_s += pause_s or 0.0
    return now_s


# ---------------------------------------------------------------- names


def test_a_program_is_named_by_header_or_body_and_the_header_counts():
    assert asked({b"x-program-id": b"a"}).program == "a"
    assert asked({}, program_id="b").program == "b"
    assert asked({b"x-program-id": b"a"}, program_id="b").program == "a"


def test_a_session_is_the_header_s_then_vllm_s_then_openai_s():
    both = {"session_id": "v", "prompt_cache_key": "o"}
    assert asked({b"x-session-id": b"h"}, **both).session == "h"
    assert asked({}, **both).session == "v"
    assert asked({}, prompt_cache_key="o").session == "o"


def test_without_a_program_its_session_is_one_and_without_both_there_is_none():
    assert asked({}, program_id="p", session_id="s").run != asked({}, session_id="s").run
    assert asked({}, session_id="s").run == asked({b"x-session-id": b"s"}).run != ""
    assert asked({}).run == ""
    assert asked({}, session_id="x").run != asked({}, program_id="x").run  # two kinds of names


def test_tenants_share_no_program():
    runs = {Terms(tenant=tenant, program="p").run for tenant in ("", "a", "b")}
    assert len(runs) == 3


def test_long_and_odd_names_of_bodies_are_shortened_and_those_of_headers_refused():
    for name in ("n" * 1000, "line\nbreak"):
        short = asked({}, program_id=name).program
        assert len(short) <= NAME_CHARS_MAX
        assert short.isprintable()
    with pytest.raises(RequestError, match="x-program-id"):
        terms_of([(b"x-program-id", b"n" * 1000)])


def test_a_time_to_live_is_bounded_and_one_that_makes_no_sense_is_refused():
    assert asked({b"x-cache-ttl-s": b"90"}).cache_ttl_s == 90
    assert asked({}, cache_ttl_s=30).cache_ttl_s == 30
    assert asked({b"x-cache-ttl-s": b"90"}, cache_ttl_s=30).cache_ttl_s == 90
    assert asked({}, cache_ttl_s=-1).cache_ttl_s is None
    for text in (b"0", b"-1", b"nan", b"soon", b"1e9"):
        with pytest.raises(RequestError, match="x-cache-ttl-s"):
            terms_of([(b"x-cache-ttl-s", text)])
    assert Programs().ttl_s(Terms(cache_ttl_s=20_000.0)) == TTL_MAX_S


def test_tools_are_seen_and_none_are_none():
    assert asked({}, tools=[{"type": "function", "function": {"name": "f"}}]).tools
    assert not asked({}, tools=None).tools
    assert not asked({}).tools


@pytest.mark.parametrize(
    ("part", "calls"),
    [
        (b'{"choices":[{"finish_reason":"tool_calls"}]}', True),
        (b'data: {"choices":[{"delta":{},"finish_reason":"tool_calls"}]}\n\n', True),
        (b'{"type":"message_delta","delta":{"stop_reason":"tool_use"}}', True),
        (b'{"output":[{"type":"function_call","name":"f"}]}', True),
        (b'{"choices":[{"finish_reason":"stop"}]}', False),
        (msgspec.json.encode({"content": '"finish_reason":"tool_calls"'}), False),  # what a model writes
    ],
)
def test_an_answer_that_calls_a_tool_is_known_by_how_it_ends(part, calls):
    assert calls_tools(part) is calls


# ---------------------------------------------------------------- what is learned


def test_turns_of_an_agent_say_when_its_first_one_came_and_those_of_a_chat_do_not():
    programs = Programs()
    assert programs.came(5.0, RUN).since_s == 5.0
    assert programs.came(9.0, RUN).since_s == 5.0
    chat = Terms(session="s")
    assert programs.came(1.0, chat).since_s is None
    programs.ended(2.0, chat, goes_on=False)
    assert programs.came(60.0, chat).since_s is None
    programs.ended(61.0, chat, goes_on=True)  # it calls tools, so it is an agent's
    assert programs.came(70.0, chat).since_s == 1.0
    assert programs.came(70.0, Terms()).since_s is None


def test_the_time_to_wait_is_learned_from_pauses_of_the_same_tenant_within_bounds():
    programs = Programs()
    assert programs.ttl_s(RUN) == TTL_PRIOR_S
    paused(programs, [10.0] * 40)
    assert 8 < programs.ttl_s(RUN) < 12
    other = Terms(tenant="other", program="run", tools=True)
    assert programs.ttl_s(other) == pytest.approx(programs.ttl_s(RUN))  # until it knows its own
    paused(programs, [100.0] * 40, other)
    assert 80 < programs.ttl_s(other) < 120
    assert 8 < programs.ttl_s(RUN) < 12


def test_nine_of_ten_pauses_are_waited_for():
    programs = Programs()
    paused(programs, [float(second % 100 + 1) for second in range(400)])
    assert 75 < programs.ttl_s(RUN) < 110


def test_a_long_absence_is_no_pause():
    programs = Programs()
    paused(programs, [10.0] * 40 + [PAUSE_S_MAX + 1] * 60)
    assert programs.ttl_s(RUN) < 12


def test_programs_that_end_after_a_call_make_the_next_one_less_likely():
    programs = Programs()
    before = programs.chance(RUN)
    for number in range(100):
        terms = Terms(tenant="t", program=f"one-{number}")
        programs.came(float(number), terms)
        programs.ended(float(number), terms, goes_on=True)  # and nothing more
    assert programs.chance(RUN) < before / 2
    assert programs.chance(Terms(cache_ttl_s=5.0)) == 1.0


def test_what_is_remembered_is_bounded():
    programs = Programs(programs_max=8)
    for number in range(100):
        programs.came(0.0, Terms(program=str(number)))
    assert len(programs) == 8
    programs.ended(1.0, Terms(program="0"), goes_on=True)  # forgotten: nothing happens


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 2 * PAUSE_S_MAX), max_size=60))
def test_the_time_to_wait_and_the_chance_stay_within_their_bounds(pauses_s):
    programs = Programs()
    paused(programs, pauses_s)
    assert TTL_MIN_S <= programs.ttl_s(RUN) <= TTL_MAX_S
    assert 0 < programs.chance(RUN) <= 1
