"""Tokens of texts that came before: a conversation sends all its earlier messages with every turn.

A tokenizer cuts a text at its special tokens before anything else and encodes what is between them piece by
piece, so the tokens of a prompt are those of its pieces, one after the other, and a chat template that puts
special tokens between messages makes each message a piece of its own. Pieces are remembered by their text,
not by a hash of it: what is found is what was asked for. And by tenant: when an answer begins tells nobody
what others have sent. Other tokenizers keep vLLM's way.
"""

import json
import re
from array import array
from collections.abc import Callable, Sequence
from typing import Any, Final

import msgspec
from tokenizers import Tokenizer

PIECE_CHARS_MIN: Final = 16
"""Shorter pieces are encoded sooner than looked for: line breaks, names of roles."""
BYTES_MAX: Final = 128 << 20
"""Of texts and tokens: conversations of about 20 million tokens."""
PIECE_BYTES_MAX: Final = 16 << 20
"""A piece that would drive out everything else is not kept."""
TOKEN_BYTES: Final = array("I").itemsize
PROBES: Final = (
    "hello world",
    " two  spaces ",
    "line\n\n\tbreak\n",
    "\u00e9 \u4f60\u597d \U0001f680 12345",
    "x",
)
"""A cache that answers otherwise than its tokenizer is not used."""

_NORMALIZERS = frozenset(("NFC", "NFD", "NFKC", "NFKD", "Lowercase"))
_PRE_TOKENIZERS = frozenset(
    ("ByteLevel", "Digits", "Split", "Whitespace", "WhitespaceSplit", "Punctuation", "UnicodeScripts")
)
"""What works on each piece alone, wherever it stands. Metaspace, for one, treats the first apart."""


def _kinds(part: dict[str, Any] | None, inner: str) -> list[str]:
    """Return the types that a normalizer or pre-tokenizer is made of."""
    if part is None:
        return []
    if part["type"] == "Sequence":
        return [kind for one in part[inner] for kind in _kinds(one, inner)]
    return [str(part["type"])]


def _separators(settings: dict[str, Any]) -> list[str] | None:
    """Return the texts at which a tokenizer cuts first; None: its pieces are not known to be independent."""
    tokens = [token for token in settings["added_tokens"] if not token["normalized"]]
    if any(token["lstrip"] or token["rstrip"] or token["single_word"] for token in tokens):
        return None
    model = settings["model"]
    if model.get("type") != "BPE" or model.get("dropout"):
        return None
    if not _NORMALIZERS.issuperset(_kinds(settings["normalizer"], "normalizers")):
        return None
    if not _PRE_TOKENIZERS.issuperset(_kinds(settings["pre_tokenizer"], "pretokenizers")):
        return None
    return [token["content"] for token in tokens] or None


class Pieces(msgspec.Struct):
    """A text, cut: its tokens, where they are known, and which pieces are missing."""

    texts: list[str]
    tokens: list[Sequence[int] | None]
    missing: list[int]
    tenant: str = ""


class TokenCache:
    """Not for several threads at once, but for `encode`."""

    def __init__(self, tokenizer: Tokenizer, separators: Sequence[str], bytes_max: int = BYTES_MAX) -> None:
        """Use `of`, which knows whether a tokenizer may be used."""
        self._tokenizer = tokenizer
        self._cut = re.compile(f"({'|'.join(map(re.escape, sorted(separators, key=len, reverse=True)))})")
        self._separators = {
            text: (token,) for text in separators if (token := tokenizer.token_to_id(text)) is not None
        }
        self._bytes_max = bytes_max
        self._known: dict[tuple[str, str], array[int]] = {}  # by tenant and text
        self.bytes = 0

    @classmethod
    def of(cls, tokenizer: Any, bytes_max: int = BYTES_MAX) -> "TokenCache | None":
        """Return a cache for a Hugging Face tokenizer; None: its pieces are not known to be independent."""
        from transformers import TokenizersBackend

        if getattr(type(tokenizer), "_encode_plus", None) is not TokenizersBackend._encode_plus:
            return None  # not of this kind, or with a way of its own
        backend: Tokenizer = tokenizer._tokenizer
        if tokenizer.split_special_tokens or backend.encode_special_tokens:
            return None
        text = backend.to_str()
        separators = _separators(json.loads(text))
        if separators is None:
            return None
        own = Tokenizer.from_str(text)  # others set truncation on theirs
        own.no_truncation()
        own.no_padding()
        made = cls(own, separators, bytes_max)
        between = separators[0].join(PROBES)
        probes = (*PROBES, between, f"{separators[0]}{between}{separators[-1]}")
        if any(made.tokens(probe) != _whole(tokenizer, probe) for probe in probes):
            return None
        return made

    def __len__(self) -> int:
        return len(self._known)

    def cut(self, text: str, tenant: str = "") -> Pieces:
        """Return the pieces of a tenant's text; those that it has sent before have their tokens."""
        texts = [piece for piece in self._cut.split(text) if piece]
        pieces = Pieces(texts, [], [], tenant)
        for at, piece in enumerate(texts):
            tokens: Sequence[int] | None = self._separators.get(piece)
            key = tenant, piece
            if tokens is None and (known := self._known.pop(key, None)) is not None:
                self._known[key] = tokens = known  # the one not used for longest is forgotten first
            if tokens is None:
                pieces.missing.append(at)
            pieces.tokens.append(tokens)
        return pieces

    def encode(self, pieces: Pieces) -> None:
        """Encode what is missing; touches nothing but `pieces`, so it may run in any thread."""
        texts = [pieces.texts[at] for at in pieces.missing]
        encoded = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        for at, one in zip(pieces.missing, encoded, strict=True):
            pieces.tokens[at] = one.ids

    def join(self, pieces: Pieces) -> list[int]:
        """Return the tokens of the whole text, and remember what was missing."""
        for at in pieces.missing:
            self._remember((pieces.tenant, pieces.texts[at]), pieces.tokens[at] or ())
        whole: list[int] = []
        for tokens in pieces.tokens:
            whole += tokens or ()
        return whole

    def tokens(self, text: str) -> list[int]:
        """Return the tokens of `text`."""
        pieces = self.cut(text)
        if pieces.missing:
            self.encode(pieces)
        return self.join(pieces)

    def _remember(self, key: tuple[str, str], tokens: Sequence[int]) -> None:
        text = key[1]
        size = _size(text, len(tokens))
        if len(text) < PIECE_CHARS_MIN or size > min(PIECE_BYTES_MAX, self._bytes_max) or key in self._known:
            return
        self._known[key] = array("I", tokens)
        self.bytes += size
        while self.bytes > self._bytes_max:
            oldest = next(iter(self._known))
            self.bytes -= _size(oldest[1], len(self._known.pop(oldest)))


def _size(text: str, tokens: int) -> int:
    """Return about how many bytes an entry takes; characters beyond ASCII take up to four."""
    return 200 + (len(text) if text.isascii() else 4 * len(text)) + tokens * TOKEN_BYTES


def _whole(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def quicken(renderer: Any, tenant: Callable[[], str] = str) -> bool:
    """Let vLLM's renderer ask a TokenCache first; False where its tokenizer does not allow it.

    `tenant` says whose request is being rendered. Offsets, truncation and special tokens that a tokenizer
    adds by itself stay vLLM's.
    """
    from vllm.utils.async_utils import make_async

    cache = TokenCache.of(renderer.tokenizer)
    if cache is None:
        return False
    adds = renderer.tokenizer.num_special_tokens_to_add() > 0
    whole = renderer._tokenize_prompt_async
    encode = make_async(cache.encode, executor=renderer._executor)

    async def tokenize(prompt: Any, params: Any) -> Any:
        asked = params.get_encode_kwargs()
        if (adds and asked["add_special_tokens"]) or renderer._wants_offsets(prompt, params):
            return await whole(prompt, params)
        pieces = cache.cut(prompt["prompt"], tenant())
        if pieces.missing:
            await encode(pieces)
        tokens = cache.join(pieces)
        if asked["truncation"] and len(tokens) > asked["max_length"]:
            return await whole(prompt, params)
        return renderer._build_tokens_prompt(tokens, prompt)

    renderer._tokenize_prompt_async = tokenize
    return True
