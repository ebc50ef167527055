"""What publishers send, decoded: events of vLLM and SGLang, and the envelope of Mooncake's RFC 1527. Pure."""

import re
from collections.abc import Sequence
from typing import Any

import msgspec

from conductor.indexer.hashes import U64
from mooncake.core import wire
from mooncake.core.errors import ProtocolError
from mooncake.worker.gpu_blocks import Event, Hash, Stored, decode_batch

HEX = re.compile("[0-9a-fA-F]+")
HEX_DIGITS_MIN = 16
"""Of a hash within an object's key: 64 bits, of which all are needed."""


class Told(msgspec.Struct, frozen=True, gc=False):
    """An event of the standard's envelope."""

    kind: str  # stored | removed | cleared
    hashes: list[Hash]
    medium: str = ""
    backend: str = ""
    tenant: str = ""
    model: str = ""
    lora: str = ""
    block_size: int | None = None


class _Envelope(msgspec.Struct, frozen=True, gc=False):
    event_type: str
    seq_hashes: list[Hash] | None = None
    object_key: str | None = None
    medium: str | None = None
    backend_id: str | None = None
    tenant_id: str | None = None
    model_name: str | None = None
    lora_name: str | None = None
    block_size: int | None = None


class _Kind(msgspec.Struct, frozen=True):
    event_type: str | None = None
    cache_salt: str | None = None
    type: str | None = None


class _Batch(msgspec.Struct, array_like=True):
    at_s: float
    events: list[msgspec.Raw]


def decode_told(payload: bytes) -> list[Told]:
    """Return a message's events of the envelope; what is of another kind is left out.

    Raises:
        ProtocolError: it is no batch of maps, or an event is not what it should be.
    """
    told = []
    for raw in wire.decode(payload, _Batch).events:
        if wire.decode(memoryview(raw), _Kind).event_type not in ("stored", "removed", "cleared"):
            continue
        event = wire.decode(memoryview(raw), _Envelope)
        hashes = event.seq_hashes or _of_key(event.object_key or "")
        told.append(
            Told(
                kind=event.event_type,
                hashes=hashes,
                medium=event.medium or "",
                backend=event.backend_id or "",
                tenant=event.tenant_id or "",
                model=event.model_name or "",
                lora=event.lora_name or "",
                block_size=event.block_size,
            )
        )
    return told


def decode_engine(payload: bytes) -> Sequence[Event | Told]:
    """Return vLLM's events, or those of an engine that speaks the standard's envelope.

    Raises:
        ProtocolError: they are neither.
    """
    try:
        return decode_batch(payload)
    except ProtocolError:
        if told := decode_told(payload):
            return told
        raise


def decode_salted(payload: bytes) -> Sequence[Event]:
    """Return SGLang's events: vLLM's words, with the salt in a field of its own.

    Raises:
        ProtocolError: see decode_batch.
    """
    events: list[Event] = []
    for raw in wire.decode(payload, _Batch).events:
        (event,) = decode_batch(msgspec.msgpack.encode([0.0, [raw]])) or (None,)
        if isinstance(event, Stored) and event.extra_keys is None and (salt := _sglang_salt(raw)):
            first: list[list[Any] | None] = [[salt] if event.parent_block_hash is None else None]
            event = msgspec.structs.replace(event, extra_keys=first + [None] * (len(event.block_hashes) - 1))
        if event is not None:
            events.append(event)
    return events


def _sglang_salt(raw: msgspec.Raw) -> str | None:
    try:
        return wire.decode(memoryview(raw), _Kind).cache_salt
    except ProtocolError:  # an array: it has no such field
        return None


def _of_key(key: str) -> list[Hash]:
    """Return the hash that a pool's object is named by: a number, or the last part of vLLM's store keys."""
    if key.isascii() and key.isdecimal() and len(key) <= 20:
        return [int(key) & U64]
    head, _, last = key.rpartition("@")
    digits = last.removeprefix("0x")
    shortest = HEX_DIGITS_MIN if head else 1
    if (head or digits != last) and len(digits) >= shortest and HEX.fullmatch(digits):
        return [int(digits[-HEX_DIGITS_MIN:], 16)]
    return []
