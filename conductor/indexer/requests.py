"""Requests of upstream's indexer API, of both generations, and what is wrong with them. Pure.

Generation 1 (upstream's documentation): no hash profile, `additionalsalt`, null for what is not there.
Generation 2 (its branch dev/conductor): `hash_profile`, tokens as msgpack bytes. Every field of either is
taken in both, in JSON and in msgpack; an unknown one is refused, as a misspelt salt would find nothing.
"""

import re
from array import array
from typing import Annotated, Any, TypeVar

import msgspec

from conductor.indexer.hashes import (
    NONE_HASH_SEED,
    SEED_MAX,
    XXH3_SEED,
    ExtraKeys,
    Own,
    Profile,
    VllmV1,
    Xxh3,
)
from conductor.indexer.source import KINDS, Service
from mooncake.core.errors import RequestError

TEXT_CHARS_MAX = 4_096
"""Of a name, a salt, a path."""
BLOCK_SIZE_MAX = 16_384
"""Engines use 16 to 512."""
TOKENS_MAX = 4 << 20
"""Of one query: four times the longest context there is."""
RANK_MAX = (1 << 31) - 1
LOW64 = "low64_be"

Text = Annotated[str, msgspec.Meta(max_length=TEXT_CHARS_MAX)]
Name = Annotated[str, msgspec.Meta(min_length=1, max_length=TEXT_CHARS_MAX)]
BlockSize = Annotated[int, msgspec.Meta(ge=1, le=BLOCK_SIZE_MAX)]
Rank = Annotated[int, msgspec.Meta(ge=0, le=RANK_MAX)]
Token = Annotated[int, msgspec.Meta(ge=-(1 << 31), le=(1 << 31) - 1)]
Seed = Annotated[int, msgspec.Meta(ge=0)]

T = TypeVar("T")
_PATH = re.compile(r" - at `\$((?:\.\w+|\[\d+\]|\[\.\.\.\])*)`$")
_NAMED = re.compile(r"(missing required|contains unknown) field `(.*?)`")


class Wrong(msgspec.Struct, frozen=True, omit_defaults=True):
    """The body of an error answer, as upstream's."""

    error: str
    reason: str | None = None
    field: str | None = None
    index: int | None = None

    def __str__(self) -> str:
        """For a log."""
        return self.error


def wrong(error: str, reason: str, field: str | None = None, index: int | None = None) -> RequestError:
    """Return the exception of a bad request; its only argument is the answer's body."""
    return RequestError(Wrong(error, reason, field, index))


class ProfileBody(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """How names are made; `seed`, `extra_keys` and `lora_path` are ours."""

    strategy: Name
    algorithm: Name = "xxh3_64"
    python_hash_seed: Text = NONE_HASH_SEED
    index_projection: Name = LOW64
    seed: Seed = XXH3_SEED
    extra_keys: Name = str(ExtraKeys.AUTO)
    lora_path: Text = ""
    root_digest: Text | None = None  # upstream tells it, and takes none


class RegisterBody(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """A publisher of KV events."""

    endpoint: Name
    type: Name
    modelname: Name
    instance_id: Name
    block_size: BlockSize
    dp_rank: Rank
    replay_endpoint: Text | None = None
    lora_name: Text | None = None
    tenant_id: Text | None = None
    additionalsalt: Text | None = None
    hash_profile: ProfileBody | None = None
    cache_group: int | None = None


class UnregisterBody(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Only instance, tenant and rank count; the others are taken for generation 1."""

    instance_id: Name
    dp_rank: Rank
    tenant_id: Text | None = None
    type: Text | None = None
    modelname: Text | None = None
    lora_name: Text | None = None
    block_size: int | None = None
    additionalsalt: Text | None = None


class _Query(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    model: Name
    block_size: BlockSize
    tenant_id: Text | None = None
    lora_name: Text | None = None
    lora_id: int | None = None
    instance_id: Text | None = None
    cache_salt: Text | None = None

    @property
    def tenant(self) -> str:
        return self.tenant_id or "default"

    @property
    def lora(self) -> str:
        """The adapter's name; `#3` for one that is only numbered."""
        if self.lora_name:
            return self.lora_name
        return "" if self.lora_id is None or self.lora_id < 0 else f"#{self.lora_id}"


class QueryBody(_Query, frozen=True, kw_only=True):
    """By tokens."""

    token_ids: list[Token]


class PackedQueryBody(_Query, frozen=True, kw_only=True):
    """By tokens; as bytes they are little-endian i32."""

    token_ids: list[Token] | bytes


class HashQueryBody(_Query, frozen=True, kw_only=True):
    """By names of blocks."""

    seq_hashes: list[int] | None = None
    block_hash: list[int] | None = None


def decode(body: bytes, kind: type[T], packed: bool) -> T:
    """Return a request.

    Raises:
        RequestError: it is not one; its argument is a Wrong.
    """
    try:
        return msgspec.msgpack.decode(body, type=kind) if packed else msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise _explain(str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        form = "msgpack" if packed else "JSON"
        raise wrong(f"Invalid {form}: {error}", f"invalid_{form.lower()}") from None


def _explain(text: str) -> RequestError:
    """Return upstream's words for what msgspec says."""
    at = _PATH.search(text)
    places = re.findall(r"\.(\w+)|\[(\d+)\]", at[1]) if at else []
    field = next((name for name, _ in reversed(places) if name), None)
    index = next((int(number) for _, number in places if number), None)
    said = text[: at.start()] if at else text
    if named := _NAMED.search(said):
        if named[1].startswith("missing"):
            return wrong(f"{named[2]} is required", "missing", named[2])
        return wrong(f"unsupported request field: {named[2]}", "unknown_field", named[2])
    if field is None:
        return wrong(f"the body must be a map of fields: {said}", "invalid_type")
    what = f"{field} element" if index is not None else field
    if " of length " in said:
        empty = ">=" in said
        problem = "must not be empty" if empty else f"must have at most {TEXT_CHARS_MAX} characters"
        return wrong(f"{what} {problem}", "invalid_value", field, index)
    if ">=" in said or "<=" in said or "out of range" in said:
        return wrong(f"{what} is out of range: {said}", "out_of_range", field, index)
    reason = "not_array" if said.startswith("Expected `array") else "invalid_type"
    return wrong(f"{what} has the wrong type: {said}", reason, field, index)


# ---------------------------------------------------------------- what they mean


def service_of(body: RegisterBody) -> Service:
    """Return what is to be registered.

    Raises:
        RequestError: two fields contradict each other, or one asks for what there is not.
    """
    kinds = {kind.lower(): kind for kind in KINDS}
    kind = kinds.get(body.type.lower())
    if kind is None:
        raise wrong(f"type must be {', '.join(KINDS)}", "invalid_value", "type")
    if body.cache_group not in (None, 0):
        raise wrong("only cache group zero is supported", "unsupported", "cache_group")
    return Service(
        endpoint=body.endpoint,
        replay_endpoint=body.replay_endpoint or "",
        kind=kind,
        model=body.modelname,
        lora=body.lora_name or "",
        tenant=body.tenant_id or "default",
        instance=body.instance_id,
        block_size=body.block_size,
        rank=body.dp_rank,
        salt=body.additionalsalt or "",
        profile=None if body.hash_profile is None else profile_of(body.hash_profile),
    )


def profile_of(body: ProfileBody) -> Profile:
    """Return a profile; raises RequestError where there is no such."""
    if body.strategy == "xxh3":
        if body.algorithm != "xxh3_64":
            raise wrong("of strategy xxh3, algorithm must be xxh3_64", "invalid_value", "algorithm")
        if body.seed >= 1 << 64:
            raise wrong("seed must be below 2**64", "out_of_range", "seed")
        return Xxh3(body.seed)
    if body.strategy != "vllm_v1":
        raise wrong(f"unsupported hash strategy: {body.strategy}", "invalid_value", "strategy")
    if body.algorithm not in ("sha256", "sha256_cbor"):
        raise wrong(f"unsupported hash algorithm: {body.algorithm}", "invalid_value", "algorithm")
    if body.index_projection != LOW64:
        raise wrong(f"index_projection must be {LOW64}", "invalid_value", "index_projection")
    if body.extra_keys not in set(ExtraKeys):
        raise wrong(f"extra_keys must be {', '.join(ExtraKeys)}", "invalid_value", "extra_keys")
    seed = body.python_hash_seed
    number = seed.isascii() and seed.isdecimal() and len(seed) <= 64 and int(seed) <= SEED_MAX
    if not number and seed not in ("random", NONE_HASH_SEED):
        text = f"python_hash_seed must be a number up to {SEED_MAX}, random, or {NONE_HASH_SEED} (unset)"
        raise wrong(text, "invalid_value", "python_hash_seed")
    return VllmV1(body.algorithm, seed, ExtraKeys(body.extra_keys), body.lora_path)


def packed_tokens(tokens: list[int] | bytes) -> bytes:
    """Return tokens as little-endian i32.

    Raises:
        RequestError: there are too many, or bytes that are not whole tokens.
    """
    if isinstance(tokens, bytes):
        if len(tokens) % 4:
            raise wrong("token_ids must be whole little-endian int32", "invalid_value", "token_ids")
        data = tokens
    else:
        packed = array("i")
        packed.fromlist(tokens)
        data = packed.tobytes()  # every supported platform is little-endian
    if len(data) > 4 * TOKENS_MAX:
        raise wrong(f"at most {TOKENS_MAX} token_ids", "out_of_range", "token_ids")
    return data


def hashes_of(body: HashQueryBody) -> list[int]:
    """Return the names asked for; `block_hash` is what earlier drafts called them."""
    given = body.block_hash if body.seq_hashes is None else body.seq_hashes
    field = "block_hash" if body.seq_hashes is None and given is not None else "seq_hashes"
    if given is None:
        raise wrong("seq_hashes is required", "missing", field)
    if len(given) > TOKENS_MAX:
        raise wrong(f"at most {TOKENS_MAX} {field}", "out_of_range", field)
    if given and not -(1 << 63) <= min(given) <= max(given) < 1 << 64:
        index = next(at for at, one in enumerate(given) if not -(1 << 63) <= one < 1 << 64)
        raise wrong(f"{field} element is not of 64 bits", "out_of_range", field, index)
    return given


def check_lora(body: _Query) -> None:
    """Refuse a query that names its adapter twice."""
    if body.lora_name and body.lora_id is not None and body.lora_id >= 0:
        raise wrong("lora_id is deprecated: do not use it beside lora_name", "invalid_value", "lora_id")


def shown(profile: Profile) -> dict[str, Any]:
    """Return a profile as /services and /global_view show it."""
    if isinstance(profile, Own):
        return {"strategy": "mooncake", "root_digest": profile.root}
    if isinstance(profile, Xxh3):
        return {"strategy": "xxh3", "algorithm": "xxh3_64", "seed": profile.seed, "index_projection": "u64"}
    return {
        "strategy": "vllm_v1", "algorithm": profile.algorithm, "python_hash_seed": profile.python_hash_seed,
        "root_digest": profile.root().hex(), "index_projection": LOW64,
        "extra_keys": str(profile.extra_keys), "lora_path": profile.lora_path,
    }  # fmt: skip
