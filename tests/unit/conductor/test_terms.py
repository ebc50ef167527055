"""What a request asks of its service, from its headers."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conductor.terms import CLASSES, DEFAULT_TERMS, Terms, terms_of
from mooncake.core.errors import RequestError


def test_a_request_that_says_nothing_is_of_the_default_class_with_the_conductor_s_objectives():
    assert terms_of([(b"accept", b"*/*")]) is DEFAULT_TERMS
    assert DEFAULT_TERMS.ttft_slo_s is None


def test_headers_say_class_tenant_and_objectives():
    headers = [
        (b"x-slo-class", b"Batch"),
        (b"x-slo-ttft-ms", b"1500"),
        (b"x-slo-tpot-ms", b"40.5"),
        (b"x-slo-job-ms", b"600000"),
        (b"x-mooncake-tenant", b"team-a"),
        (b"x-session-id", b"chat-7"),
    ]
    assert terms_of(headers) == Terms(
        slo_class=CLASSES["batch"],
        says_class=True,
        tenant="team-a",
        session="chat-7",
        ttft_slo_s=1.5,
        tbt_slo_s=0.0405,
        job_s=600.0,
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (b"x-slo-class", b"gold"),
        (b"x-slo-ttft-ms", b"soon"),
        (b"x-slo-ttft-ms", b"0"),
        (b"x-slo-ttft-ms", b"nan"),
        (b"x-slo-tpot-ms", b"-1"),
        (b"x-slo-tpot-ms", b"1e99"),
        (b"x-mooncake-tenant", b"a" * 129),
        (b"x-mooncake-tenant", b"a\nb"),
        (b"x-session-id", b"a" * 129),
    ],
)
def test_a_header_that_makes_no_sense_is_refused_by_name(name, value):
    with pytest.raises(RequestError, match=name.decode()):
        terms_of([(name, value)])


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from([b"x-slo-class", b"x-slo-ttft-ms", b"x-mooncake-tenant"]), st.binary())
    )
)
def test_whatever_comes_is_understood_or_refused(headers):
    try:
        terms = terms_of(headers)
    except RequestError:
        return
    assert terms.slo_class.name in CLASSES
    assert terms.ttft_slo_s is None or terms.ttft_slo_s > 0


def test_classes_that_go_first_here_go_first_in_engines_too():
    ordered = sorted(CLASSES.values(), key=lambda one: one.rank)
    assert [one.priority for one in ordered] == sorted(one.priority for one in ordered)
    assert CLASSES["default"].priority == 0
