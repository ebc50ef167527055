"""The indexer's hash profiles make the hashes that the installed vLLM makes, and read what it tells of them.

A failure means: read vllm/v1/core/kv_cache_utils.py (hash_block_tokens, generate_block_hash_extra_keys) and
vllm/utils/hashing.py again, then conductor.indexer.hashes.
"""

from array import array
from collections.abc import Iterator

import cbor2
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.lora.request import LoRARequest
from vllm.utils.hashing import get_hash_fn_by_name, sha256
from vllm.v1.core import kv_cache_utils

from conductor.indexer.contexts import Contexts
from conductor.indexer.hashes import NONE_HASH_SEED, ExtraKeys, VllmV1, cbor_block, low64
from conductor.indexer.source import Source
from mooncake.worker.gpu_blocks import decode_batch
from tests.contract.test_kv_events_of_vllm import SIZE, Cache
from tests.unit.conductor.indexer.make import service

INT32 = (1 << 31) - 1
tokens_of = st.lists(st.one_of(st.integers(0, 300), st.integers(0, INT32)), min_size=1, max_size=40)
texts = st.text(min_size=2, max_size=20).filter(str.isprintable).map(lambda text: text.encode().decode())
"""Each an object of its own, as in requests: `sha256` pickles, and pickle writes an object that it meets
again (a constant of the code, which hypothesis likes to draw) in another way than one that is equal."""


@pytest.fixture(autouse=True)
def seeds(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test chooses; others of this folder begin with vLLM's default."""
    yield
    monkeypatch.undo()
    kv_cache_utils.init_none_hash(sha256)


def pack(tokens: list[int]) -> bytes:
    return array("i", tokens).tobytes()


def request(cache: Cache, prompt: list[int], salt: str | None, lora: str) -> list[bytes]:
    """Return the hashes that vLLM gives a request's full blocks."""
    made = cache.request(prompt, salt, LoRARequest(lora, 1, f"/of/{lora}") if lora else None)
    return [bytes(one) for one in made.block_hashes]


@pytest.mark.parametrize("algorithm", ["sha256", "sha256_cbor"])
@pytest.mark.parametrize("seed", [None, "0", "00", "4294967295", "random"])
def test_the_root_is_that_of_vllm(algorithm, seed, monkeypatch) -> None:
    if seed is None:
        monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    else:
        monkeypatch.setenv("PYTHONHASHSEED", seed)
    kv_cache_utils.init_none_hash(get_hash_fn_by_name(algorithm))
    assert VllmV1(algorithm, NONE_HASH_SEED if seed is None else seed).root() == kv_cache_utils.NONE_HASH


@pytest.mark.parametrize("algorithm", ["sha256", "sha256_cbor"])
@settings(max_examples=60, deadline=None)
@given(tokens=tokens_of, salt=st.none() | texts, lora=st.just("") | texts, size=st.integers(1, 9))
def test_any_tokens_salt_and_adapter_make_the_hashes_of_hash_block_tokens(
    algorithm, tokens, salt, lora, size
) -> None:
    function = get_hash_fn_by_name(algorithm)
    kv_cache_utils.init_none_hash(function)
    path = f"/of/{lora}"
    profile = VllmV1(algorithm, kv_cache_utils.get_none_hash_seed(), ExtraKeys.TAGGED, path if lora else "")
    ((first, others),) = profile.forms(lora, salt)
    made = list(profile.digests(None, pack(tokens), size, first, others))
    parent = None
    for number, digest in enumerate(made):
        extra = ([("lora", lora, path)] if lora else []) + (
            [("cache_salt", salt)] if salt and not number else []
        )
        block = tokens[number * size : (number + 1) * size]
        parent = kv_cache_utils.hash_block_tokens(function, parent, block, tuple(extra) or None)
        assert digest == parent
    assert len(made) == len(tokens) // size


@settings(max_examples=100, deadline=None)
@given(
    tokens=st.lists(st.integers(-INT32, INT32), min_size=1, max_size=40),
    extra=st.none() | st.lists(texts | st.tuples(texts, texts), min_size=1, max_size=3).map(tuple),
)
def test_cbor_is_spelled_as_vllm_s_library_does(tokens, extra) -> None:
    value = (b"p" * 32, tuple(tokens), extra)
    assert cbor_block(b"p" * 32, tokens, extra) == cbor2.dumps(value, canonical=True)


PROMPT = [*range(10, 10 + 3 * SIZE), 7]
WHO = [(None, ""), ("tenant", ""), (None, "adapter"), ("tenant", "adapter")]


@pytest.mark.parametrize(("salt", "lora"), WHO)
def test_a_request_s_own_hashes_are_the_tagged_form_and_not_the_bare_one_of_upstream(salt, lora) -> None:
    """The keys of 0.32: bare ones, as upstream's conductor makes them, find nothing of these requests."""
    hashes = request(Cache(), PROMPT, salt, lora)
    profile = VllmV1("sha256", kv_cache_utils.get_none_hash_seed(), lora_path=f"/of/{lora}" if lora else "")
    made = [list(profile.digests(None, pack(PROMPT), SIZE, *form)) for form in profile.forms(lora, salt)]
    assert made[0] == hashes
    assert all(set(form).isdisjoint(hashes) for form in made[1:])
    assert len(made) == (2 if salt or lora else 1)


@pytest.mark.parametrize(("salt", "lora"), WHO)
def test_what_vllm_tells_is_found_by_tokens_and_by_its_own_hashes(salt, lora) -> None:
    cache, contexts = Cache(), Contexts(1337)
    profile = VllmV1("sha256", kv_cache_utils.get_none_hash_seed())
    source = Source(service(block_size=SIZE, profile=profile), contexts)
    cache.start(PROMPT, salt, LoRARequest(lora, 1, f"/of/{lora}") if lora else None)
    source.apply(decode_batch(msgspec.msgpack.encode(cache.batch())))
    found = contexts.find("default", "m", lora, SIZE, salt)
    assert found is not None
    context, own = found
    assert context.by_tokens(pack(PROMPT), own, None)["i0"].best.gpu == 3 * SIZE
    assert context.by_tokens(pack(PROMPT), "another", None)["i0"].best.gpu == 0
    hashes = [low64(one) for one in request(cache, PROMPT, salt, lora)]
    assert context.by_hashes(hashes, None)["i0"].best.gpu == 3 * SIZE
