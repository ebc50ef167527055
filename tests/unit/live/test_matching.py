"""Regular expressions of clients: Prometheus' language, and none holds a process up."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mooncake.core.errors import RequestError
from mooncake.live.matching import PROGRAM_MAX, matches


@pytest.mark.parametrize(
    "pattern",
    [
        ".*.*.*[^|].*.*.*[^|].*.*.*[^|].*.*.*x",
        "(a+)+b",
        r"(?:\\*\\*)*x",
        "(a|a)*b",
        "(.*)(.*)(.*)(.*)(.*)(.*)(.*)x",
        "a?" * 100 + "a" * 500,
    ],
)
def test_no_shape_of_a_pattern_takes_more_than_one_pass_over_a_value(pattern):
    assert not matches(pattern, "a" * 400)
    assert not matches(pattern, "\\" * 400)


@pytest.mark.parametrize(
    ("pattern", "value", "holds"),
    [
        ("a|b", "b", True),
        ("a|b", "ab", False),
        ("a", "ab", False),
        ("[*+?]+x", "*+?x", True),
        (r"engine\.0\|1", "engine.0|1", True),
        ("a.b", "a\nb", True),
        (".*", "", True),
        (".+", "", False),
        ("", "", True),
        ("(?i)gateway-[0-9]{1,3}", "GATEWAY-12", True),
        ("é.", "éa", True),
        (".", "é", True),
        (".+", "x" * 1000, True),
        ("a$|^b", "b", True),
    ],
)
def test_a_pattern_means_what_it_means_to_prometheus(pattern, value, holds):
    assert matches(pattern, value) is holds


@pytest.mark.parametrize(
    "pattern", ["[a", "(", "a(?=b)", r"(a)\1", "*", "(a{1000}){1000}", "a" * (PROGRAM_MAX + 1), "\ud800"]
)
def test_what_is_none_or_is_too_large_is_refused_with_its_text(pattern):
    with pytest.raises(RequestError, match="regular expression"):
        matches(pattern, "a")


@given(st.text(max_size=20), st.text(max_size=20))
@settings(max_examples=200, deadline=None)
def test_a_value_that_is_quoted_matches_itself_alone(value, other):
    quoted = "".join(rf"\x{{{ord(char):x}}}" for char in value)
    assert matches(quoted, value)
    assert matches(quoted, other) == (value == other)
