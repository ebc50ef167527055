"""Tokens of remembered pieces: the same as a tokenizer's of the whole text, in bounded memory."""

import inspect
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from conductor.token_cache import PIECE_CHARS_MIN, TokenCache, quicken
from mooncake.model import default_folder, is_complete
from tests.tiny_model import SPECIALS, make_tokenizer


def hugging_face(backend: Tokenizer, **settings: Any) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=backend, **settings)


def smollm() -> Any:
    """The default model's tokenizer, where a machine has it; integration tests fetch it."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(default_folder()) if is_complete(default_folder()) else None


TINY = hugging_face(make_tokenizer())
TOKENIZERS = {"tiny": TINY} | ({"SmolLM2": known} if (known := smollm()) is not None else {})
CACHES = {name: TokenCache.of(tokenizer, 20_000) for name, tokenizer in TOKENIZERS.items()}
parts = st.one_of(
    st.sampled_from(
        [
            *SPECIALS, "<|im_", "start|>", "<|endof", " ", "\n", "\r\n", "\t", "  ", "12345", "'s", "\u0301",
            "\U0001f680", "user\n", "assistant\nA whole message, said again and again.", "caf\u00e9",
        ]
    ),
    st.text(max_size=30),
)  # fmt: skip
texts = st.lists(parts, max_size=20).map("".join)


@pytest.mark.parametrize("name", TOKENIZERS)
@given(text=texts)
def test_tokens_are_those_of_the_whole_text(name: str, text: str) -> None:
    cache = CACHES[name]
    assert cache is not None
    whole = TOKENIZERS[name](text, add_special_tokens=False)["input_ids"]
    assert cache.tokens(text) == whole
    assert cache.tokens(text) == whole  # now from memory
    assert cache.bytes <= 20_000


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_conversation_that_goes_on_encodes_its_last_message_alone(name: str) -> None:
    cache = TokenCache.of(TOKENIZERS[name])
    assert cache is not None
    turns = [f"<|im_start|>user\nThe message number {n}, which is long enough.<|im_end|>" for n in range(5)]
    cache.tokens("\n".join(turns[:4]))
    assert [cache.cut("\n".join(turns)).texts[at] for at in cache.cut("\n".join(turns)).missing] == [
        "\n", "\n", "\n", "\n", "user\nThe message number 4, which is long enough."
    ]  # fmt: skip


def test_nobody_learns_from_the_time_of_an_answer_what_another_tenant_has_sent() -> None:
    cache = TokenCache.of(TINY)
    assert cache is not None
    secret = "a message that only one of them has sent"
    pieces = cache.cut(secret, "one")
    cache.encode(pieces)
    cache.join(pieces)
    assert not cache.cut(secret, "one").missing
    assert cache.cut(secret, "another").missing
    assert cache.cut(secret).missing


def test_what_was_not_used_for_longest_is_forgotten_first() -> None:
    pieces = [f"{letter}{' word' * 10}" for letter in "abc"]
    one = TokenCache.of(TINY)
    assert one is not None
    one.tokens(pieces[0])
    cache = TokenCache.of(TINY, 2 * one.bytes)
    assert cache is not None
    for piece in (pieces[0], pieces[1], pieces[0], pieces[2]):
        cache.tokens(piece)
    assert [bool(cache.cut(piece).missing) for piece in pieces] == [False, True, False]
    assert cache.bytes <= 2 * one.bytes


def test_a_piece_that_would_take_all_memory_is_not_kept() -> None:
    cache = TokenCache.of(TINY, 1000)
    assert cache is not None
    assert len(cache.tokens("word " * 1000)) >= 1000
    assert len(cache) == 0
    assert cache.bytes == 0


def test_short_pieces_are_not_kept() -> None:
    cache = TokenCache.of(TINY)
    assert cache is not None
    cache.tokens("x" * (PIECE_CHARS_MIN - 1))
    assert len(cache) == 0


def byte_tokenizer() -> Tokenizer:
    backend = make_tokenizer()
    return Tokenizer.from_str(backend.to_str())


def stripping() -> Tokenizer:
    backend = byte_tokenizer()
    backend.add_special_tokens([AddedToken("<eat>", lstrip=True, rstrip=True, special=True)])
    return backend


def first_apart() -> Tokenizer:
    backend = byte_tokenizer()
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    return backend


def random_merges() -> Tokenizer:
    settings = json.loads(byte_tokenizer().to_str())
    settings["model"]["dropout"] = 0.5
    return Tokenizer.from_str(json.dumps(settings))


def words() -> Tokenizer:
    backend = Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    backend.add_special_tokens(["<|end|>"])
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Whitespace(), decoders.ByteLevel()
    return backend


def never_cut() -> Tokenizer:
    backend = Tokenizer(models.BPE({chr(n): n for n in range(97, 123)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return backend


@pytest.mark.parametrize("make", [stripping, first_apart, random_merges, words, never_cut])
def test_tokenizers_whose_pieces_may_depend_on_each_other_are_left_alone(make) -> None:
    assert TokenCache.of(hugging_face(make())) is None


def test_a_tokenizer_that_does_not_split_special_tokens_is_left_alone() -> None:
    assert TokenCache.of(hugging_face(make_tokenizer(), split_special_tokens=True)) is None


def test_a_tokenizer_of_another_kind_is_left_alone() -> None:
    assert TokenCache.of(None) is None
    assert TokenCache.of(object()) is None


class Renderer:
    """What `quicken` asks of vLLM's renderer; vLLM's own way answers [-1]."""

    def __init__(self, tokenizer: Any) -> None:
        from concurrent.futures import ThreadPoolExecutor

        self.tokenizer = tokenizer
        self._executor = ThreadPoolExecutor(1)
        self._tokenize_prompt_async = self._whole

    async def _whole(self, prompt: Any, params: Any) -> Any:
        del params
        return {"prompt_token_ids": [-1], **prompt}

    def _wants_offsets(self, prompt: Any, params: Any) -> bool:
        del prompt
        return bool(params.return_token_offsets)

    def _build_tokens_prompt(self, tokens: Any, prompt: Any) -> Any:
        return {"prompt_token_ids": list(tokens), **prompt}


def asked(**changes: Any) -> Any:
    from vllm.renderers.params import TokenizeParams

    return TokenizeParams(**{"max_total_tokens": 50, "add_special_tokens": False, **changes})


@pytest.mark.parametrize(
    ("changes", "count", "ours"),
    [
        ({}, 50, True),
        ({}, 52, False),  # too long: vLLM says so
        ({"truncate_prompt_tokens": 10}, 11, False),
        ({"truncate_prompt_tokens": 10}, 10, True),
        ({"return_token_offsets": True}, 5, False),
        ({"add_special_tokens": True}, 5, True),  # this tokenizer adds none
    ],
)
async def test_what_a_cache_cannot_give_stays_vllms(changes: dict[str, Any], count: int, ours: bool) -> None:
    renderer = Renderer(TINY)
    assert quicken(renderer)
    text = "<|im_start|>" * count
    got = await renderer._tokenize_prompt_async({"prompt": text}, asked(**changes))
    expected = TINY(text, add_special_tokens=False)["input_ids"] if ours else [-1]
    assert got == {"prompt": text, "prompt_token_ids": expected}


def test_a_renderer_whose_tokenizer_does_not_allow_it_is_left_alone() -> None:
    renderer = Renderer(None)
    assert not quicken(renderer)
    assert renderer._tokenize_prompt_async == renderer._whole


def test_the_renderer_is_as_we_know_it() -> None:
    """The names that `quicken` uses, as vLLM has them."""
    from vllm.renderers.base import BaseRenderer

    source = inspect.getsource(BaseRenderer)
    assert "self._tokenize_prompt_async = make_async(" in source
    assert "prompt = await self._tokenize_prompt_async(prompt, params)" in source
    assert {"_wants_offsets", "_build_tokens_prompt"} <= vars(BaseRenderer).keys()
