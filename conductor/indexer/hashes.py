"""The names that others give to KV blocks: the XXH3-64 standard, and vLLM's hashes, old and new. Pure.

XXH3 (Mooncake's RFC 1403 and 1527; Dynamo and SMG with seed 1337): a block's local hash is XXH3 of its tokens
as little-endian u32, its name XXH3 of the name before and the local hash, both little-endian u64; the first
block's name is its local hash. A salt stands where the name before the first would: the standard has none.

vLLM: sha256 over (hash before, tokens, extra keys), spelled as pickle protocol 5 or as canonical CBOR; of it
the low 64 bits. What is pickled is never unpickled: these few lines write the bytes that vLLM hashes, and
nothing here reads any. Extra keys are bare up to 0.22 and tagged in 0.32, where an adapter's path counts.
"""

import struct
from collections.abc import Callable, Sequence
from enum import StrEnum
from hashlib import sha256
from typing import Protocol, overload

import msgspec
import numpy as np
from xxhash import xxh3_64_intdigest, xxh3_128

from conductor.prompt_keys import SPAN_BLOCKS, KeyMemo

XXH3_SEED = 1337
"""Dynamo's and SMG's."""
NONE_HASH_SEED = "vllm-none-hash"
"""vLLM's since 0.32, where PYTHONHASHSEED is not set."""
SEED_MAX = (1 << 32) - 1
"""Largest that PYTHONHASHSEED may be."""
U64 = (1 << 64) - 1
_TWO = struct.Struct("<QQ").pack
KEY_BYTES = 32
FRAME_BYTES = 64 << 10
"""A frame of pickle's ends with the first object beyond."""
PACKED_MAX = 128
"""Names up to which struct is quicker than numpy, by five times at 32; it remembers a hundred formats."""
SPELLED_MAX = 1 << 18
"""Token ids whose spelling is remembered: a vocabulary."""

Extra = tuple[str | tuple[str, ...], ...] | None
"""Of one block: texts in a row, or tagged."""
Salt = str | None


def key_of(name: int) -> bytes:
    """Return a 64-bit name in the form in which PrefixIndex takes keys."""
    return name.to_bytes(KEY_BYTES, "little")


def low64(block_hash: int | bytes) -> int:
    """Return the low 64 bits, which is what vLLM tells of a hash, or SGLang as a signed number."""
    return int.from_bytes(block_hash[-8:], "big") if isinstance(block_hash, bytes) else block_hash & U64


def blob_of(names: Sequence[int]) -> bytes:
    """Return key_of of every name, in a row."""
    if len(names) <= PACKED_MAX:
        return struct.pack("<" + "Q24x" * len(names), *names)
    keys = np.zeros((len(names), KEY_BYTES // 8), "<u8")
    keys[:, 0] = names
    return keys.tobytes()


class Naming(Protocol):
    """How a prompt's blocks are named; keys as PrefixIndex takes them, in a row."""

    identity: bytes
    """Of all that names depend on besides tokens."""

    def span(self, parent: bytes | None, packed: bytes) -> bytes:
        """Return the keys of blocks that follow one with key `parent`; None = of a prompt's first blocks."""


class Keys(Sequence[bytes]):
    """Keys in a row. A slice has them in one piece: who looks them up would join the pieces."""

    def __init__(self, row: bytes, count: int) -> None:
        """`count` keys, of which `row` has the first ones."""
        self._row = bytearray(row)
        self._count = count

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, at: int) -> bytes: ...
    @overload
    def __getitem__(self, at: slice) -> list[bytes]: ...
    def __getitem__(self, at: int | slice) -> bytes | list[bytes]:
        """Return one key, or a list of one piece that is all keys of the slice."""
        if not isinstance(at, slice):
            at = range(self._count)[at]
            return self[at : at + 1][0]
        wanted = range(self._count)[at]
        assert wanted.step == 1
        self._make(wanted.stop)
        return [bytes(self._row[KEY_BYTES * wanted.start : KEY_BYTES * wanted.stop])]

    def _make(self, count: int) -> None:
        """Have so many."""


class LazyKeys(Keys):
    """Keys that are made when they are looked at: most prompts end to be known long before they end.

    Spans are remembered by a quick hash of all tokens up to their end, as conversations send the same prefix
    again with every turn.
    """

    def __init__(self, naming: Naming, packed: bytes, block_size: int, memo: KeyMemo) -> None:
        """`packed`: tokens as little-endian u32."""
        super().__init__(b"", len(packed) // (4 * block_size))
        self._naming = naming
        self._packed = packed
        self._span_bytes = 4 * block_size * SPAN_BLOCKS
        self._memo = memo
        self._begin = 0
        self._prefix = xxh3_128(naming.identity + block_size.to_bytes(4))

    def _make(self, count: int) -> None:
        row = self._row
        while len(row) < KEY_BYTES * count:
            packed = self._packed[self._begin : self._begin + self._span_bytes]
            self._begin += self._span_bytes
            self._prefix.update(packed)
            prefix = self._prefix.digest()
            span = self._memo.find(prefix)
            if span is None:
                span = (self._naming.span(bytes(row[-KEY_BYTES:]) or None, packed),)
                self._memo.add(prefix, span)
            row += span[0]


class After(Sequence[bytes]):
    """Keys from a place on."""

    def __init__(self, keys: Keys, start: int) -> None:
        """`keys` beginning with number `start`."""
        self._keys, self._start = keys, start

    def __len__(self) -> int:
        return max(0, len(self._keys) - self._start)

    @overload
    def __getitem__(self, at: int) -> bytes: ...
    @overload
    def __getitem__(self, at: slice) -> list[bytes]: ...
    def __getitem__(self, at: int | slice) -> bytes | list[bytes]:
        """See Keys."""
        wanted = range(len(self))[at]
        if isinstance(wanted, int):
            return self._keys[wanted + self._start]
        return self._keys[wanted.start + self._start : wanted.stop + self._start]


# ---------------------------------------------------------------- XXH3


def xxh3_root(salt: Salt, seed: int) -> int | None:
    """Return what the first block follows; None without a salt."""
    return xxh3_64_intdigest(salt.encode(), seed) if salt else None


def xxh3_names(parent: int | None, packed: bytes, block_size: int, seed: int) -> list[int]:
    """Return the names of all full blocks.

    Args:
        parent: name of the block before the first; None = there is none.
        packed: tokens as little-endian u32.
        block_size: tokens per block.
        seed: of both levels.
    """
    step = 4 * block_size
    names = [
        xxh3_64_intdigest(packed[start : start + step], seed)
        for start in range(0, len(packed) - step + 1, step)
    ]
    for at, local in enumerate(names):
        if parent is not None:
            names[at] = xxh3_64_intdigest(_TWO(parent, local), seed)
        parent = names[at]
    return names


class Xxh3Naming:
    """Names of the standard, for one salt."""

    def __init__(self, seed: int, block_size: int, salt: Salt) -> None:
        """See xxh3_names."""
        self._seed, self._size = seed, block_size
        self._root = xxh3_root(salt, seed)
        self.identity = f"xxh3 {seed} {self._root}".encode()

    def span(self, parent: bytes | None, packed: bytes) -> bytes:
        """See Naming."""
        before = self._root if parent is None else int.from_bytes(parent[:8], "little")
        return blob_of(xxh3_names(before, packed, self._size, self._seed))


# ---------------------------------------------------------------- vLLM: how values are spelled


class _Spelled(dict[int, bytes]):
    """Token id -> its bytes, remembered: looking up is five times as quick as spelling."""

    def __init__(self, spell: Callable[[int], bytes]) -> None:
        super().__init__()
        self._spell = spell

    def __missing__(self, token: int) -> bytes:
        if len(self) >= SPELLED_MAX:
            self.clear()
        spelled = self[token] = self._spell(token)
        return spelled


def _pickled_int(value: int) -> bytes:
    if 0 <= value < 1 << 8:
        return b"K" + value.to_bytes()
    if 0 <= value < 1 << 16:
        return b"M" + value.to_bytes(2, "little")
    return b"J" + value.to_bytes(4, "little", signed=True)


def _pickled_text(text: str) -> bytes:
    data = text.encode()
    head = b"\x8c" + len(data).to_bytes() if len(data) < 256 else b"X" + len(data).to_bytes(4, "little")
    return head + data + b"\x94"


def _pickled_tuple(parts: Sequence[bytes]) -> bytes:
    if not parts:
        return b")"
    if len(parts) <= 3:
        return b"".join(parts) + bytes([0x84 + len(parts)]) + b"\x94"
    return b"(" + b"".join(parts) + b"t\x94"


def _pickled_extra(extra: Extra) -> bytes:
    if extra is None:
        return b"N"
    tagged = ([_pickled_text(text) for text in one] for one in extra if not isinstance(one, str))
    return _pickled_tuple(
        [_pickled_text(one) if isinstance(one, str) else _pickled_tuple(next(tagged)) for one in extra]
    )


def _pickle_framed(body: Sequence[bytes]) -> bytes:
    """Return a pickle of objects that end where `body` is cut."""
    frames, frame = [], b""
    for piece in body:
        if len(frame) >= FRAME_BYTES:
            frames.append(frame)
            frame = b""
        frame += piece
    frames.append(frame)
    return b"\x80\x05" + b"".join(b"\x95" + len(one).to_bytes(8, "little") + one for one in frames)


_PICKLED = _Spelled(_pickled_int)


def pickle_block(parent: bytes, tokens: Sequence[int], extra: Extra) -> bytes:
    """Return what pickle makes of (parent, tuple of tokens, extra): 32 bytes, i32, see Extra."""
    spelled = list(map(_PICKLED.__getitem__, tokens))
    begin, end = b"C\x20" + parent + b"\x94", _pickled_extra(extra) + b"\x87\x94."
    body = begin + _pickled_tuple(spelled) + end
    if len(body) < FRAME_BYTES:
        return b"\x80\x05\x95" + len(body).to_bytes(8, "little") + body
    return _pickle_framed([begin, b"(" + spelled[0], *spelled[1:], b"t\x94" + end])


def pickle_text(text: str) -> bytes:
    """Return what pickle makes of a short text."""
    return _pickle_framed([_pickled_text(text) + b"."])


def _cbor_head(major: int, value: int) -> bytes:
    if value < 24:
        return bytes([major << 5 | value])
    for code, size in ((24, 1), (25, 2), (26, 4)):
        if value < 1 << 8 * size:
            return bytes([major << 5 | code]) + value.to_bytes(size, "big")
    return bytes([major << 5 | 27]) + value.to_bytes(8, "big")


def _cbor_int(value: int) -> bytes:
    return _cbor_head(0, value) if value >= 0 else _cbor_head(1, -1 - value)


_CBOR = _Spelled(_cbor_int)


def cbor_text(text: str) -> bytes:
    """Return a text in CBOR."""
    data = text.encode()
    return _cbor_head(3, len(data)) + data


def _cbor_extra(extra: Extra) -> bytes:
    if extra is None:
        return b"\xf6"
    parts = [
        cbor_text(one) if isinstance(one, str) else _cbor_head(4, len(one)) + b"".join(map(cbor_text, one))
        for one in extra
    ]
    return _cbor_head(4, len(parts)) + b"".join(parts)


def cbor_block(parent: bytes, tokens: Sequence[int], extra: Extra) -> bytes:
    """Return the canonical CBOR of [parent, tokens, extra]."""
    spelled = b"".join(map(_CBOR.__getitem__, tokens))
    return b"\x83\x58\x20" + parent + _cbor_head(4, len(tokens)) + spelled + _cbor_extra(extra)


# ---------------------------------------------------------------- profiles


class ExtraKeys(StrEnum):
    """How an engine's hashes take in adapters and salts."""

    AUTO = "auto"  # look for both
    TAGGED = "tagged"  # vLLM 0.32
    BARE = "bare"  # older


class Xxh3(msgspec.Struct, frozen=True):
    """Names of the standard."""

    seed: int = XXH3_SEED


class VllmV1(msgspec.Struct, frozen=True):
    """Names that an engine gives; `lora_path` counts in vLLM 0.32 and no event tells it."""

    algorithm: str  # sha256 | sha256_cbor
    python_hash_seed: str = NONE_HASH_SEED
    extra_keys: ExtraKeys = ExtraKeys.AUTO
    lora_path: str = ""

    def root(self) -> bytes:
        """Return the hash that a prompt's first block follows."""
        spell = cbor_text if self.algorithm == "sha256_cbor" else pickle_text
        return sha256(spell(self.python_hash_seed)).digest()

    def forms(self, lora: str, salt: Salt) -> list[tuple[Extra, Extra]]:
        """Return the extra keys of the first block and of the others, in each form that may be meant."""
        forms: list[tuple[Extra, Extra]] = []
        if self.extra_keys is not ExtraKeys.BARE and (not lora or self.lora_path):
            forms.append(
                _extra((("lora", lora, self.lora_path),) if lora else (), salt and ("cache_salt", salt))
            )
        if self.extra_keys is not ExtraKeys.TAGGED:
            forms.append(_extra((lora,) if lora else (), salt))
        return forms if lora or salt else forms[:1]

    def digests(
        self, parent: bytes | None, packed: bytes, block_size: int, first: Extra, others: Extra
    ) -> list[bytes]:
        """Return the hashes of all full blocks.

        Args:
            parent: hash of the block before the first; None = there is none.
            packed: tokens as little-endian i32.
            block_size: tokens per block.
            first: extra keys of a prompt's first block.
            others: of all the others.
        """
        spell = cbor_block if self.algorithm == "sha256_cbor" else pickle_block
        block = struct.Struct(f"<{block_size}i")
        extra = others if parent else first
        parent = parent or self.root()
        made = []
        for start in range(0, len(packed) - block.size + 1, block.size):
            parent = sha256(spell(parent, block.unpack_from(packed, start), extra)).digest()
            extra = others
            made.append(parent)
        return made


class VllmNaming:
    """An engine's names, for one form of extra keys.

    A key is a hash backwards: so its first bytes are the low 64 bits, as key_of has them.
    """

    def __init__(self, profile: VllmV1, block_size: int, form: tuple[Extra, Extra]) -> None:
        """`form`: see VllmV1.forms."""
        self._profile, self._size, self._form = profile, block_size, form
        self.identity = repr((profile, form)).encode()

    def span(self, parent: bytes | None, packed: bytes) -> bytes:
        """See Naming."""
        before = None if parent is None else parent[::-1]
        made = self._profile.digests(before, packed, self._size, *self._form)
        return b"".join(one[::-1] for one in made)


def _extra(
    lora: tuple[str | tuple[str, ...], ...], salt: str | tuple[str, ...] | None
) -> tuple[Extra, Extra]:
    return (*lora, salt) if salt else lora or None, lora or None


class Own(msgspec.Struct, frozen=True):
    """Our cluster's names, mooncake.core.keys."""

    root: str  # in hexadecimal


Profile = Xxh3 | VllmV1 | Own
