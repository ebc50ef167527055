"""Keys of a prompt's blocks, made when they are looked at: a prompt nobody holds costs a few of them. Pure.

A chain of sha256 takes 1 ms for 128k tokens, and conversations send the same prefix again with every turn, so
the keys of whole spans are remembered by a quick hash of all tokens up to their end. Should two prefixes ever
collide there, a hit is predicted wrongly: engines name blocks themselves, and by sha256.
"""

from collections.abc import Sequence
from typing import overload

from xxhash import xxh3_128

from mooncake.core.keys import chain_packed, token_bytes

SPAN_BLOCKS = 32
"""A quick hash and a look-up cost about two sha256: nothing beside 32."""
SPANS_MAX = 4_096
"""Remembered; 12 MB. The last 130,000 blocks, which is what a busy hour's conversations hold."""

Span = tuple[bytes, ...]


class KeyMemo:
    """Spans by the hash of all tokens up to their end; the one not used for longest is forgotten first."""

    def __init__(self, spans_max: int = SPANS_MAX) -> None:
        """Empty."""
        self._max = spans_max
        self._spans: dict[bytes, Span] = {}

    def __len__(self) -> int:
        return len(self._spans)

    def find(self, prefix: bytes) -> Span | None:
        """Return the keys of a span."""
        span = self._spans.pop(prefix, None)
        if span is not None:
            self._spans[prefix] = span
        return span

    def add(self, prefix: bytes, span: Span) -> None:
        """Remember a span."""
        self._spans[prefix] = span
        if len(self._spans) > self._max:
            del self._spans[next(iter(self._spans))]


class PromptKeys(Sequence[bytes]):
    """The same bytes as mooncake.core.keys.chain; its length is known without making any."""

    __slots__ = ("_block_size", "_count", "_known", "_memo", "_prefix", "_root", "_tokens")

    def __init__(self, root: bytes, tokens: Sequence[int], block_size: int, memo: KeyMemo) -> None:
        """`tokens` must not change as long as this lives."""
        self._root = root
        self._tokens = tokens
        self._block_size = block_size
        self._count = len(tokens) // block_size
        self._memo = memo
        self._known: list[bytes] = []
        self._prefix = xxh3_128(root + block_size.to_bytes(4))  # and of all tokens whose keys are known

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, at: int) -> bytes: ...
    @overload
    def __getitem__(self, at: slice) -> list[bytes]: ...
    def __getitem__(self, at: int | slice) -> bytes | list[bytes]:
        """Make what is missing; what comes before too, as each key names its whole prefix."""
        if not isinstance(at, slice):
            at = range(self._count)[at]
            self._make(at + 1)
            return self._known[at]
        wanted = range(self._count)[at]
        if wanted:
            self._make(max(wanted[0], wanted[-1]) + 1)
        if wanted.step == 1:
            return self._known[wanted.start : wanted.stop]
        return [self._known[one] for one in wanted]

    def _make(self, count: int) -> None:
        known, size = self._known, self._block_size
        while len(known) < count:
            begin = len(known)
            some = self._tokens[begin * size : min(begin + SPAN_BLOCKS, self._count) * size]
            packed = token_bytes(some)
            self._prefix.update(packed)
            prefix = self._prefix.digest()
            span = self._memo.find(prefix)
            if span is None:
                span = tuple(chain_packed(known[-1] if known else self._root, packed, size))
                self._memo.add(prefix, span)
            known += span
