"""Names of KV blocks: a sha256 chain that commits to the whole prefix (DESIGN 2.1 and 5.2).

`key[i] = sha256(key[i-1] || tokens of block i as little-endian u32)`; `key[-1]` is a root that
commits to everything that changes the bytes of a block: the engine's context (mooncake.core.context has
the list), codec and rank, tenant salt and LoRA adapter. A partial last block ("tail") is named by
the same rule over fewer tokens, so it can never collide with a full block.
Source of the chain: Mooncake paper (FAST'25) 3.2.1; vLLM uses the same shape.
"""

from array import array
from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import overload

import msgspec
import numpy as np
import numpy.typing as npt
from xxhash import xxh3_128_digest

from mooncake.core.errors import ProtocolError

KEY_BYTES = 32
NAME_BYTES = 8
NAME_BITS = 60
"""Of the first 64 of a key: Python's ints of up to 60 bits take 32 bytes, larger ones 48. Among four million
blocks two share a name once in 100,000 clusters."""
_NAME = np.uint64((1 << NAME_BITS) - 1)
SHARE_MARK = b"mc-share"
"""The end of every name of a share, see share_key. A block's own key ends so once in 2^64."""
_SHARE = np.frombuffer(SHARE_MARK, "<u8")[0]


def context_root(context: Mapping[str, str]) -> bytes:
    """Return the 32-byte root that commits to an engine's byte-changing settings.

    Args:
        context: setting name to value; an engine's are KvContext.settings().
    """
    # sorted pairs in msgpack: unambiguous framing, independent of insertion order
    return sha256(msgspec.msgpack.encode(["mooncake-kv-1", sorted(context.items())])).digest()


def variant_root(root: bytes, variant: Mapping[str, str]) -> bytes:
    """Return the root of the same context's blocks in another form; an empty `variant` is `root` itself.

    For what a context does not say because one engine may read or write several: a codec, a layout
    in the pool, a rank. Apply before request_root. Who does not ask for a form never meets its blocks.
    """
    if not variant:
        return root
    return sha256(b"mooncake-variant-1" + root + msgspec.msgpack.encode(sorted(variant.items()))).digest()


def request_root(root: bytes, cache_salt: str | None, lora: str | None) -> bytes:
    """Return the chain root of one request: tenants and adapters never share blocks.

    Args:
        root: of the engine's context, or of a variant of it.
        cache_salt: the tenant's; None = shared by all.
        lora: fingerprint.AdapterNames' name of the adapter's content, not what clients call it.
    """
    if cache_salt is None and lora is None:
        return root
    # the label keeps this root apart from block keys: else some salts spell tokens after `root`
    return sha256(b"mooncake-request-1" + root + msgspec.msgpack.encode([cache_salt, lora])).digest()


def token_bytes(tokens: Sequence[int]) -> bytes:
    """Return tokens as little-endian u32 (4 bytes per token)."""
    packed = array("I")
    if isinstance(tokens, list):
        packed.fromlist(tokens)  # a third less than by the sequence protocol
    else:
        packed.extend(tokens)
    assert packed.itemsize == 4
    return packed.tobytes()  # every supported platform is little-endian


def chain(parent: bytes, tokens: Sequence[int], block_size: int) -> list[bytes]:
    """Return the keys of all full blocks of `tokens` that follow `parent`, in order."""
    return chain_packed(parent, token_bytes(tokens), block_size)


def chain_packed(parent: bytes, data: bytes, block_size: int) -> list[bytes]:
    """Return the same of tokens as token_bytes makes them."""
    step = 4 * block_size
    keys = []
    for start in range(0, len(data) - step + 1, step):
        parent = sha256(parent + data[start : start + step]).digest()
        keys.append(parent)
    return keys


def tail_key(parent: bytes, tokens: Sequence[int]) -> bytes:
    """Return the key of a partial block of 1..block_size-1 `tokens` after `parent`."""
    return sha256(parent + token_bytes(tokens)).digest()


def prompt_keys(root: bytes, tokens: Sequence[int], block_size: int) -> tuple[list[bytes], bytes | None]:
    """Return (keys of full blocks, key of the partial tail or None) of a whole prompt."""
    full = chain(root, tokens, block_size)
    rest = tokens[len(full) * block_size :]
    if not rest:
        return full, None
    return full, tail_key(full[-1] if full else root, rest)


def share_key(key: bytes, rank: int) -> bytes:
    """Return the name of what rank `rank` of an engine of several has of the block `key`.

    Each rank's share is an object of its own in the pool: rank 0's is called as the block itself, so that
    whoever looks for the block finds it, those of the others end in SHARE_MARK. 192 bits of a hash remain.
    """
    if not rank:
        return key
    digest = sha256(b"mooncake-share-1" + key + rank.to_bytes(4, "little")).digest()
    return digest[: KEY_BYTES - len(SHARE_MARK)] + SHARE_MARK


def share_keys(keys: Sequence[bytes], ranks: int) -> list[bytes]:
    """Return the names of all shares of blocks, block by block: so a store finds whole blocks first.

    Args:
        keys: of blocks.
        ranks: that share each of them.
    """
    return [share_key(key, rank) for key in keys for rank in range(ranks)]


def block_names(blob: bytes) -> npt.NDArray[np.uint64]:
    """Return short_names of the keys in `blob` without those of shares of other ranks than 0: one a block.

    Raises:
        ProtocolError: as short_names.
    """
    names = short_names(blob)
    of_blocks: npt.NDArray[np.uint64] = names[
        np.frombuffer(blob, "<u8")[KEY_BYTES // 8 - 1 :: KEY_BYTES // 8] != _SHARE
    ]
    return of_blocks


def short_names(blob: bytes) -> npt.NDArray[np.uint64]:
    """Return NAME_BITS of each of the keys in `blob`: enough to look for a block, not to take it for another.

    Raises:
        ProtocolError: it is not a whole number of keys.
    """
    if len(blob) % KEY_BYTES:
        raise ProtocolError(f"blob of {len(blob)} bytes is not a whole number of {KEY_BYTES}-byte keys")
    return np.frombuffer(blob, "<u8")[:: KEY_BYTES // 8] & _NAME


class BlockNames(Sequence[bytes]):
    """Stands for the keys of blocks of which only short names are known; items are padded to a key's length.

    Good for an index, which looks at names, and for nothing that needs whole keys.
    """

    __slots__ = ("names",)

    def __init__(self, names: npt.NDArray[np.uint64]) -> None:
        """Take what `short_names` gave."""
        self.names = names

    @classmethod
    def unpacked(cls, data: bytes) -> "BlockNames":
        """Return what was packed.

        Raises:
            ProtocolError: it is not a whole number of names.
        """
        if len(data) % NAME_BYTES:
            raise ProtocolError(f"{len(data)} bytes are not a whole number of {NAME_BYTES}-byte names")
        return cls(np.frombuffer(data, "<u8"))

    def __len__(self) -> int:
        return len(self.names)

    @overload
    def __getitem__(self, at: int) -> bytes: ...
    @overload
    def __getitem__(self, at: slice) -> "BlockNames": ...
    def __getitem__(self, at: int | slice) -> "bytes | BlockNames":
        """Return a key's length of bytes, equal where names are; or some of the names, without a copy."""
        if isinstance(at, slice):
            return BlockNames(self.names[at])
        name: bytes = self.names[at].tobytes()
        return name.ljust(KEY_BYTES, b"\0")


def names_of(keys: Sequence[bytes]) -> npt.NDArray[np.uint64]:
    """Return the short names of keys, which may be names already."""
    return keys.names if isinstance(keys, BlockNames) else short_names(b"".join(keys))


def block_checksum(key: bytes, data: memoryview | bytes) -> bytes:
    """Return the 16-byte xxh3-128 of a block's bytes, seeded with its key.

    The seed makes the checksum commit to the name: right bytes under a wrong key (two index
    entries swapped, a stale slot) fail like corrupted ones. xxhash releases the interpreter lock.
    """
    return xxh3_128_digest(data, seed=checksum_seed(key))


def checksum_seed(key: bytes) -> int:
    """Return the seed of the checksum of a block that is called `key`."""
    return int.from_bytes(key[:8], "little")
