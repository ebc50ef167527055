"""Sizes, cores and hosts as people write them."""

import hypothesis.strategies as st
import pytest
from hypothesis import given

from mooncake.core.config import format_size, is_loopback, parse_cores, parse_size_bytes
from mooncake.core.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [("4096", 4096), ("512MiB", 512 << 20), ("2GiB", 2 << 30), ("1.5 kb", 1500), ("1g", 10**9), ("7B", 7)],
)
def test_sizes_are_read_with_binary_and_decimal_units(text, size_bytes):
    assert parse_size_bytes(text) == size_bytes


@pytest.mark.parametrize(
    "text", ["", "MiB", "-1", "0", "1.5", "3ib", "1 PiB", "1e9", "nan", "\u0661MiB", "0.3GB5"]
)
def test_anything_else_is_refused_with_key_and_value(text):
    with pytest.raises(ConfigError, match="kv_memory") as caught:
        parse_size_bytes(text, "kv_memory")
    assert repr(text) in str(caught.value)


@given(st.integers(1, 1 << 50))
def test_a_number_of_bytes_means_itself(size_bytes):
    assert parse_size_bytes(str(size_bytes)) == size_bytes
    assert format_size(size_bytes).endswith("B")


@pytest.mark.parametrize(
    ("text", "cores"), [("", []), ("0", [0]), ("2,0", [0, 2]), ("0-3", [0, 1, 2, 3]), ("0-1,1", [0, 1])]
)
def test_cores_are_lists_or_ranges(text, cores):
    assert parse_cores(text) == cores


@pytest.mark.parametrize("text", ["a", "3-1", "-1", "0-", "1;2"])
def test_other_cores_are_refused(text):
    with pytest.raises(ConfigError, match="cores"):
        parse_cores(text)


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("localhost", True),
     ("0.0.0.0", False), ("::", False), ("10.0.0.1", False), ("example.org", False), ("", False)],
)  # fmt: skip
def test_only_loopback_addresses_count_as_local(host, loopback):
    assert is_loopback(host) == loopback
