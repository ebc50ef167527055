"""Names become keys that never meet: neither another tenant's, nor a block of KV."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.client.object_names import key_of, object_key
from mooncake.core.errors import RequestError
from mooncake.core.keys import KEY_BYTES, chain, context_root, request_root

names = st.text(st.characters(codec="utf-8"), max_size=40) | st.binary(max_size=40)
tenants = st.text(st.characters(codec="utf-8"), max_size=10)


def raw(name: str | bytes) -> bytes:
    return name.encode() if isinstance(name, str) else name


@given(a=st.tuples(tenants, names), b=st.tuples(tenants, names))
def test_keys_are_equal_exactly_when_tenant_and_name_are(a, b):
    same = (a[0], raw(a[1])) == (b[0], raw(b[1]))
    assert (object_key(a[1], a[0]) == object_key(b[1], b[0])) is same
    assert len(object_key(a[1], a[0])) == KEY_BYTES


@given(key=st.binary(min_size=KEY_BYTES, max_size=KEY_BYTES), tenant=tenants)
def test_a_key_is_taken_as_it_is_and_text_never_is_one(key, tenant):
    assert key_of(key, tenant) == key
    assert key_of("x" * KEY_BYTES, tenant) != b"x" * KEY_BYTES


def test_the_hash_is_part_of_the_format():
    # a store that outlives a release must be asked the same
    assert object_key("weights/0").hex() == EXPECTED
    assert object_key(b"weights/0") == object_key("weights/0")


@given(name=st.binary(max_size=80), salt=st.text(max_size=8))
def test_a_name_made_to_look_like_a_block_s_preimage_is_no_block(name, salt):
    root = context_root({"model": "m"})
    blocks = chain(request_root(root, salt, None), [1, 2, 3, 4], 2)
    assert object_key(root + name) not in {root, request_root(root, salt, None), *blocks}


def test_text_without_utf8_is_refused():
    with pytest.raises(RequestError, match="surrogates"):
        object_key("\ud800")
    with pytest.raises(RequestError):
        object_key("x", "\ud800")


EXPECTED = "3c846a2ed86caab47b83924fb37cc62b447d999496fa66d6e0ea906af7b18cb0"
