"""Detokenisation that begins with the end of a prompt: vLLM decodes all of it twice for the first token.

A decode stream needs the text before its first token only to know where a character or word begins. With a
byte-level decoder, text is the bytes of its tokens, so what comes after a whole character is the same after
any tail that ends in it. Other decoders (byte fallback, which joins runs of bytes) keep the whole prompt.
"""

from collections.abc import Sequence
from typing import Any, Final

from tokenizers.decoders import ByteLevel, DecodeStream

TAIL_TOKENS: Final = 64
"""A character has four bytes at most; some tokens have no text."""
PROMPT_TOKENS_MIN: Final = 4 * TAIL_TOKENS
REPLACEMENT: Final = "\ufffd"


def byte_level(tokenizer: Any) -> bool:
    """Whether the tokens of `tokenizer` are bytes of the text, and nothing else."""
    backend = getattr(tokenizer, "_tokenizer", None)
    return isinstance(getattr(backend, "decoder", None), ByteLevel)


def begin_with_tail(detokenizer: Any, prompt: Sequence[int]) -> bool:
    """Prime the stream of a detokenizer that has decoded nothing yet with the end of `prompt` alone.

    Args:
        detokenizer: vLLM's, for a tokenizer that is `byte_level`.
        prompt: token ids.
    """
    from vllm.v1.engine.detokenizer import FastIncrementalDetokenizer

    if type(detokenizer) is not FastIncrementalDetokenizer or len(prompt) < PROMPT_TOKENS_MIN:
        return False
    tail = list(prompt[-TAIL_TOKENS:])
    skip = detokenizer.skip_special_tokens
    text = detokenizer.tokenizer.decode(tail, skip_special_tokens=skip)
    if not text or text.endswith(REPLACEMENT):
        return False  # within a character, or no text at all
    detokenizer.stream = DecodeStream(ids=tail, skip_special_tokens=skip)
    return True
