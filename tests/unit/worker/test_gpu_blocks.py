"""An engine's own cache is known by our names, from vLLM's events in either encoding, and never wrongly."""

from hashlib import sha256
from itertools import takewhile
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mooncake.core.errors import ProtocolError
from mooncake.core.keys import prompt_keys, request_root
from mooncake.worker.gpu_blocks import GpuBlocks, LeftOut, Stored, decode_batch
from mooncake.worker.gpu_events import EventReader

ROOT = sha256(b"context").digest()
SIZE = 4
PROMPT = list(range(100, 116))
KEYS = prompt_keys(ROOT, PROMPT, SIZE)[0]
ENCODINGS = ("map", "array")
STORED = (
    "block_hashes", "parent_block_hash", "token_ids", "block_size", "lora_id", "medium", "lora_name",
    "extra_keys", "group_idx", "kv_cache_spec_kind",
)  # fmt: skip


def vllm_hash(parent: int | None, tokens: list[int], salt: str = "") -> int:
    """Something of vLLM's own that only has to be the same for the same block."""
    return int.from_bytes(sha256(f"{parent} {tokens} {salt}".encode()).digest()[:8], "big")


def hashes_of(prompt: list[int], salt: str = "") -> list[int]:
    found: list[int] = []
    for start in range(0, len(prompt) - SIZE + 1, SIZE):
        found.append(vllm_hash(found[-1] if found else None, prompt[start : start + SIZE], salt))
    return found


def stored(prompt: list[int], first: int = 0, encoding: str = "map", salt: str = "", **fields: Any) -> Any:
    """The event of a request whose blocks from `first` on are cached now."""
    hashes = hashes_of(prompt, salt)
    count = len(hashes) - first
    event = {
        "block_hashes": hashes[first:],
        "parent_block_hash": hashes[first - 1] if first else None,
        "token_ids": prompt[first * SIZE : len(hashes) * SIZE],
        "block_size": SIZE,
        "lora_id": None,
        "medium": "GPU",
        "lora_name": None,
        "extra_keys": [[salt] if salt and not first and not i else None for i in range(count)],
        "group_idx": 0,
        "kv_cache_spec_kind": "full_attention",
        **fields,
    }
    if encoding == "array":
        return ["BlockStored", *(event[name] for name in STORED)]
    return {"type": "BlockStored", **event}


def removed(*hashes: Any, encoding: str = "map", medium: str | None = "GPU", group: int | None = 0) -> Any:
    if encoding == "array":
        return ["BlockRemoved", list(hashes), medium, group]
    return {"type": "BlockRemoved", "block_hashes": list(hashes), "medium": medium, "group_idx": group}


def cleared(encoding: str = "map") -> Any:
    return ["AllBlocksCleared"] if encoding == "array" else {"type": "AllBlocksCleared"}


def payload(*events: Any) -> bytes:
    return msgspec.msgpack.encode([1.5, list(events), 0])


def message(seq: int, *events: Any) -> list[bytes]:
    return [b"", seq.to_bytes(8, "big"), payload(*events)]


class Engine:
    """What is known after some events."""

    def __init__(self, blocks_max: int = 1000) -> None:
        self.blocks = GpuBlocks(ROOT, SIZE, blocks_max)

    def tell(self, *events: Any) -> "Engine":
        self.blocks.apply(decode_batch(payload(*events)))
        return self

    @property
    def held(self) -> set[bytes]:
        return set(self.blocks.keys())


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_stored_blocks_get_the_keys_that_a_prompt_looks_up(encoding: str) -> None:
    engine = Engine().tell(stored(PROMPT[:8], encoding=encoding), stored(PROMPT, 2, encoding))
    assert engine.blocks.keys() == KEYS
    assert engine.blocks.drain() == (KEYS, [])
    engine.tell(removed(hashes_of(PROMPT)[3], encoding=encoding))
    assert engine.blocks.drain() == ([], [KEYS[3]])
    engine.tell(cleared(encoding))
    assert (engine.held, set(engine.blocks.drain()[1])) == (set(), set(KEYS[:3]))


@pytest.mark.parametrize("width", [8, 32])
def test_hashes_may_be_bytes_of_any_length(width: int) -> None:
    hashes = [bytes([n]) * width for n in range(4)]
    engine = Engine().tell(stored(PROMPT[:8], block_hashes=hashes[:2]))
    engine.tell(stored(PROMPT, 2, block_hashes=hashes[2:], parent_block_hash=hashes[1]), removed(hashes[2]))
    assert engine.blocks.keys() == [KEYS[0], KEYS[1], KEYS[3]]


def test_a_shorter_array_of_an_older_vllm_is_read_as_far_as_it_goes() -> None:
    event = stored(PROMPT, encoding="array")[:6]
    (read,) = decode_batch(payload(event))
    assert isinstance(read, Stored)
    assert read.block_hashes == hashes_of(PROMPT)
    engine = Engine().tell(event)
    assert engine.blocks.left_out[LeftOut.EXTRA] == 4  # it does not say that nothing else counts


def test_what_happens_between_two_looks_is_told_net() -> None:
    engine = Engine().tell(stored(PROMPT))
    engine.blocks.drain()
    last = hashes_of(PROMPT)[3]
    engine.tell(removed(last), stored(PROMPT, 3), stored([1, 2, 3, 4]), removed(*hashes_of([1, 2, 3, 4])))
    assert engine.blocks.drain() == ([], [])


def test_a_block_computed_twice_is_there_until_both_copies_have_gone() -> None:
    engine = Engine().tell(stored(PROMPT), stored(PROMPT), stored(PROMPT[:4]))
    first = hashes_of(PROMPT)[0]
    for _ in range(2):
        assert KEYS[0] in engine.tell(removed(first)).held
    assert KEYS[0] not in engine.tell(removed(first)).held
    assert KEYS[0] not in engine.tell(removed(first)).held  # once more says nothing


def test_a_tenant_s_blocks_have_the_tenant_s_keys() -> None:
    salted = prompt_keys(request_root(ROOT, "tenant", None), PROMPT, SIZE)[0]
    engine = Engine().tell(stored(PROMPT[:8], salt="tenant"), stored(PROMPT, 2, salt="tenant"))
    assert engine.blocks.keys() == salted


@pytest.mark.parametrize(
    ("fields", "reason", "named"),
    [
        ({"lora_id": 1, "lora_name": "a", "extra_keys": [["a"]] * 4}, LeftOut.LORA, 0),
        ({"lora_id": None, "lora_name": "a"}, LeftOut.LORA, 0),
        ({"extra_keys": [None, None, [["picture", 3]], None]}, LeftOut.EXTRA, 2),
        ({"extra_keys": [[b"embeds"], None, None, None]}, LeftOut.EXTRA, 0),
        ({"extra_keys": [["salt", ["picture", 0]], None, None, None]}, LeftOut.EXTRA, 0),
        ({"extra_keys": [None, ["not the first"], None, None]}, LeftOut.EXTRA, 1),
        ({"extra_keys": None}, LeftOut.EXTRA, 0),
        ({"extra_keys": [None]}, LeftOut.EXTRA, 0),
        ({"parent_block_hash": 99}, LeftOut.PARENT, 0),
        ({"block_size": 2 * SIZE}, LeftOut.SHAPE, 0),
        ({"token_ids": PROMPT[4:]}, LeftOut.SHAPE, 0),
        ({"group_idx": 1}, LeftOut.SHAPE, 0),
    ],
)
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_what_has_no_name_is_left_out_and_counted_with_all_that_follows_it(
    fields: dict[str, Any], reason: LeftOut, named: int, encoding: str
) -> None:
    engine = Engine().tell(stored(PROMPT, encoding=encoding, **fields))
    assert engine.blocks.keys() == KEYS[:named]
    assert +engine.blocks.left_out == {reason: 4 - named}
    more = [*PROMPT, 1, 2, 3, 4]
    engine.tell(stored(more, 4, encoding))
    assert engine.blocks.keys() == KEYS[:named]
    assert engine.blocks.left_out[LeftOut.PARENT] == 1 + (4 if reason is LeftOut.PARENT else 0)
    engine.tell(removed(*hashes_of(more), encoding=encoding))
    assert engine.held == set()


def test_other_tiers_and_types_that_nobody_knows_are_not_ours() -> None:
    engine = Engine().tell(stored(PROMPT[:8], medium=None))
    engine.tell(
        {"type": "BlockMoved", "block_hashes": "elsewhere"}, ["BlockMoved", 5], stored(PROMPT, medium="CPU")
    )
    engine.tell(removed(*hashes_of(PROMPT), medium="STORAGE"), removed(*hashes_of(PROMPT), group=1))
    assert engine.blocks.keys() == KEYS[:2]


@pytest.mark.parametrize(
    "broken",
    [
        b"",
        b"\xc1",
        msgspec.msgpack.encode({"ts": 1}),
        payload(7),
        payload({"no": "type"}),
        payload([]),
        payload(stored(PROMPT, token_ids=["a"] * 16)),
        payload(stored(PROMPT, token_ids=[-1] * 16)),
        payload(stored(PROMPT, token_ids=[1 << 32] * 16)),
        payload(stored(PROMPT, encoding="array")[:3]),
        payload(removed(1.5)),
        payload(stored(PROMPT))[:-20],
    ],
)
def test_what_is_no_event_is_a_protocol_error(broken: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode_batch(broken)


def test_a_hash_of_two_blocks_and_more_blocks_than_there_are_are_contradictions() -> None:
    with pytest.raises(ProtocolError, match="two blocks"):
        Engine().tell(stored(PROMPT), stored([9, 9, 9, 9], block_hashes=hashes_of(PROMPT)[:1]))
    with pytest.raises(ProtocolError, match="more blocks"):
        Engine(blocks_max=7).tell(stored(PROMPT), stored(PROMPT))


# ---------------------------------------------------------------- messages


def reader() -> EventReader:
    return EventReader(GpuBlocks(ROOT, SIZE, 1000))


def test_messages_apply_in_order_and_a_repeated_one_once() -> None:
    one = reader()
    first = message(0, stored(PROMPT))
    assert [one.take(first), one.take(first), one.take(message(1, stored(PROMPT)))] == [True] * 3
    one.take(message(2, removed(hashes_of(PROMPT)[3])))
    assert one.blocks.keys() == KEYS  # stored twice, not three times, and removed once
    one.take(message(3, removed(hashes_of(PROMPT)[3])))
    assert one.blocks.keys() == KEYS[:3]


def test_a_gap_is_told_and_what_is_missing_fills_it() -> None:
    one = reader()
    late = message(2, removed(hashes_of(PROMPT)[3]))
    assert [one.take(message(0, stored(PROMPT[:8]))), one.take(late)] == [True, False]
    assert one.expected == 1
    assert [one.take(message(1, stored(PROMPT, 2))), one.take(late)] == [True, True]
    assert one.blocks.keys() == KEYS[:3]


def test_a_gap_that_stays_costs_all_that_was_known_and_what_follows_is_learned_anew() -> None:
    one = reader()
    one.take(message(0, stored(PROMPT)))
    one.skip_to(message(5, stored([1, 2, 3, 4])))
    assert (one.blocks.keys(), one.lost, one.expected) == (prompt_keys(ROOT, [1, 2, 3, 4], 4)[0], 1, 6)


@pytest.mark.parametrize("broken", [[b"", (1).to_bytes(8, "big"), b"\xc1"], [b"x"], [b"", b"1", b""]])
def test_a_message_that_cannot_be_read_is_counted_and_costs_all_that_was_known(broken: list[bytes]) -> None:
    one = reader()
    one.take(message(0, stored(PROMPT)))
    assert one.take(broken)
    assert (one.undecodable, one.blocks.keys()) == (1, [])
    assert set(one.blocks.drain()[1]) == set()  # nobody had heard of them
    one.take(message(one.expected, stored([1, 2, 3, 4])))
    assert len(one.blocks) == 1


# ---------------------------------------------------------------- against a model

prompts = st.lists(st.integers(0, 1), min_size=1, max_size=4).map(
    lambda blocks: [token for block in blocks for token in [block] * SIZE]
)


class Model:
    """A prefix cache of blocks with copies, as vLLM's: each knows its prompt so far."""

    def __init__(self) -> None:
        self.copies: list[tuple[int, ...]] = []

    def store(self, prompt: list[int], first: int) -> None:
        self.copies += [tuple(prompt[: SIZE * (i + 1)]) for i in range(first, len(prompt) // SIZE)]

    def hits(self, prompt: list[int]) -> int:
        there = (tuple(prompt[:end]) in self.copies for end in range(SIZE, len(prompt) + 1, SIZE))
        return sum(takewhile(bool, there))

    def held(self) -> set[bytes]:
        return {prompt_keys(ROOT, list(one), SIZE)[0][-1] for one in self.copies}


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_order_of_stores_removals_and_clears_is_followed_and_told_net(data: st.DataObject) -> None:
    model, engine = Model(), Engine()
    told: set[bytes] = set()
    for _ in range(data.draw(st.integers(1, 12))):
        encoding = data.draw(st.sampled_from(ENCODINGS))
        action = data.draw(st.sampled_from(["store", "store", "remove", "clear", "look"]))
        if action == "store":
            prompt = data.draw(prompts)
            # a request has the blocks before those it stores: as many as are there without a gap
            deepest = model.hits(prompt)
            first = min(data.draw(st.integers(0, deepest)), len(prompt) // SIZE - 1)
            model.store(prompt, first)
            engine.tell(stored(prompt, first, encoding))
        elif action == "remove" and model.copies:
            gone = model.copies.pop(data.draw(st.integers(0, len(model.copies) - 1)))
            engine.tell(removed(hashes_of(list(gone))[-1], encoding=encoding))
        elif action == "clear":
            model.copies.clear()
            engine.tell(cleared(encoding))
        elif action == "look":
            came, went = engine.blocks.drain()
            assert not set(came) & told  # nothing twice
            assert set(went) <= told
            told = told - set(went) | set(came)
            assert told == model.held()
        assert engine.held == model.held()
    assert not +engine.blocks.left_out
