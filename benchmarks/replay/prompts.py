"""What a replayed request says, made from the names of its blocks. Pure.

A trace does not hold prompts: it names blocks of 512 tokens, each together with all before it. A block's
tokens are drawn from its name and the seed alone, so requests share tokens exactly where they share names,
on every machine and in every process.
"""

import math
from collections.abc import Sequence
from hashlib import sha256, shake_128

import msgspec
import numpy as np

from benchmarks.sim.trace import BLOCK_TOKENS, TraceRequest
from mooncake.core.errors import ConfigError

FIRST_TOKEN = 20
"""Below it, small vocabularies keep what begins or ends a text."""
VOCABULARY_MIN = 64
SYLLABLES = [
    first + second for first in "bdfgklmnprst" for second in ("a", "e", "i", "o", "u", "an", "el", "or")
]
"""Of the words of prompts as text: 96."""


class Shape(msgspec.Struct, frozen=True, kw_only=True):
    """How prompts are made.

    scale: tokens sent for a token of the trace; of prompts and of answers.
    vocabulary: token ids are FIRST_TOKEN to this.
    text: words instead of token ids; about as many as tokens were wanted.
    seed: another one gives other tokens, with the same prefixes shared.
    """

    scale: float = 1.0
    vocabulary: int = 1000
    text: bool = False
    seed: int = 0

    def check(self) -> None:
        """Raises ConfigError: a number is out of range."""
        if not 0 < self.scale <= 16:
            raise ConfigError(f"scale={self.scale}: must be above 0, at most 16")
        if not VOCABULARY_MIN <= self.vocabulary <= 1 << 16:
            raise ConfigError(f"vocabulary={self.vocabulary}: must be {VOCABULARY_MIN} to {1 << 16}")

    @property
    def block_tokens(self) -> int:
        """Tokens of a whole block."""
        return max(1, round(BLOCK_TOKENS * self.scale))


class Prompt(msgspec.Struct, frozen=True):
    """One request as it is sent: token ids or a text, and how long the answer is to be."""

    content: list[int] | str
    input_tokens: int
    output_tokens: int


def prompt_of(request: TraceRequest, shape: Shape) -> Prompt:
    """Return what `request` says."""
    whole = shape.block_tokens
    rest = request.input_tokens - BLOCK_TOKENS * (len(request.hash_ids) - 1)
    last = min(whole, max(1, math.ceil(rest * shape.scale)))
    draws = [_draw(block, whole, shape.seed) for block in request.hash_ids[:-1]]
    draws.append(_draw(request.hash_ids[-1], whole, shape.seed)[:last])
    numbers = np.concatenate(draws)
    output = max(1, round(request.output_tokens * shape.scale))
    if shape.text:
        return Prompt(_text(numbers), len(numbers), output)
    tokens: list[int] = (numbers % (shape.vocabulary - FIRST_TOKEN) + FIRST_TOKEN).tolist()
    return Prompt(tokens, len(tokens), output)


def tokens_max(requests: Sequence[TraceRequest], shape: Shape) -> int:
    """Return an upper bound of the longest context, prompt and answer, in tokens."""
    whole = shape.block_tokens
    return max(len(one.hash_ids) * whole + max(1, round(one.output_tokens * shape.scale)) for one in requests)


def digest(requests: Sequence[TraceRequest], shape: Shape) -> str:
    """Return what is equal only if the same requests are sent at the same times."""
    found = sha256(msgspec.json.encode(shape))
    for one in requests:
        made = prompt_of(one, shape)
        found.update(f"{one.arrival_s:.6f} {made.output_tokens} {made.content}\n".encode())
    return found.hexdigest()[:16]


def _draw(block: int, count: int, seed: int) -> "np.ndarray[tuple[int], np.dtype[np.uint16]]":
    return np.frombuffer(shake_128(f"{seed} {block}".encode()).digest(2 * count), "<u2")


def _text(numbers: "np.ndarray[tuple[int], np.dtype[np.uint16]]") -> str:
    n = len(SYLLABLES)
    return " ".join(SYLLABLES[number % n] + SYLLABLES[number // n % n] for number in numbers.tolist())
