"""Events of publishers into contexts, and what queries then find: no socket."""

from array import array
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conductor.indexer import contexts as contexts_module
from conductor.indexer import source as source_module
from conductor.indexer.contexts import ContextKey, Contexts, InstanceHits, RankHits, Tier
from conductor.indexer.events import decode_engine, decode_salted, decode_told
from conductor.indexer.hashes import VllmV1, Xxh3, low64, xxh3_names
from conductor.indexer.source import LeftOut, Source
from mooncake.core.errors import CapacityError, ProtocolError, RequestError
from mooncake.worker.gpu_blocks import decode_batch
from tests.unit.conductor.indexer.make import CLEARED, SEED, SIZE, batch, removed, source, stored

PROMPT = list(range(100, 116))
PROFILE = VllmV1("sha256", "0", lora_path="/adapters/a")


def pack(tokens: Sequence[int]) -> bytes:
    return array("i", tokens).tobytes()


def ask(
    contexts: Contexts, tokens: Sequence[int] = PROMPT, salt: str | None = None, lora: str = "",
    tenant: str = "default", instance: str | None = None,
) -> dict[str, InstanceHits]:  # fmt: skip
    found = contexts.find(tenant, "m", lora, SIZE, salt)
    return {} if found is None else found[0].by_tokens(pack(tokens), found[1], instance)


def depth(contexts: Contexts, tokens: Sequence[int] = PROMPT, instance: str = "i0", **more: Any) -> int:
    """Tokens; -1 where the instance is not known."""
    hits = ask(contexts, tokens, **more).get(instance)
    return -1 if hits is None else hits.best.disk


def told(of: Source, *events: Any) -> None:
    of.apply(decode_batch(batch(*events)))


def pooled(of: Source, *events: Any) -> None:
    of.apply(decode_told(batch(*events)))


def put(hashes: Sequence[int], kind: str = "stored", **more: Any) -> dict[str, Any]:
    """An event of the master's publisher."""
    return {
        "event_id": 1, "timestamp": 1, "event_type": kind, "model_name": None, "block_size": None,
        "additional_salt": None, "lora_name": None, "tenant_id": "default", "backend_id": "b0",
        "medium": "cpu", "dp_rank": None, "seq_hashes": list(hashes), "base_block_idx": 0,
        "object_key": "", "type": "BlockStored", "block_hashes": list(hashes), **more,
    }  # fmt: skip


@pytest.fixture
def contexts() -> Contexts:
    return Contexts(SEED)


# ---------------------------------------------------------------- an engine


def test_full_blocks_of_a_prompt_are_found_as_far_as_they_are_cached(contexts: Contexts) -> None:
    told(source(contexts), stored([1, 2, 3], PROMPT[:12]))
    assert depth(contexts) == 12
    assert depth(contexts, PROMPT[:11]) == 8, "half a block is none"
    assert depth(contexts, [*PROMPT[:4], 1, 2, 3, 4]) == 4
    assert depth(contexts, [1, 2, 3, 4]) == 0


@pytest.mark.parametrize("profile", [None, Xxh3(7), PROFILE])
def test_what_the_engine_hashes_with_does_not_matter_to_a_query_by_tokens(
    contexts: Contexts, profile: Any
) -> None:
    of = source(contexts, profile=profile)
    told(of, stored([1, 2], PROMPT[:8]), stored([3], PROMPT[8:12], parent=2))
    assert depth(contexts) == 12


def test_removed_blocks_end_the_prefix_and_a_second_copy_keeps_it(contexts: Contexts) -> None:
    of = source(contexts)
    told(of, stored([1, 2], PROMPT[:8]), stored([1], PROMPT[:4]))
    told(of, removed([1]))
    assert depth(contexts) == 8
    told(of, removed([1]))
    assert depth(contexts) == 0
    told(of, stored([1], PROMPT[:4]))
    assert depth(contexts) == 8
    told(of, CLEARED)
    assert (depth(contexts), len(of)) == (0, 0)


def test_a_salted_prompt_is_found_by_its_salt_only_and_its_children_with_it(contexts: Contexts) -> None:
    of = source(contexts)
    told(of, stored([1, 2], PROMPT[:8], extra_keys=[["s"], None]), stored([3], PROMPT[8:12], parent=2))
    assert depth(contexts, salt="s") == 12
    assert depth(contexts) == depth(contexts, salt="t") == 0


def test_one_engine_serves_its_model_and_its_adapters_side_by_side(contexts: Contexts) -> None:
    of = source(contexts)
    lora = {"lora_id": 1, "lora_name": "a"}
    told(of, stored([1, 2], PROMPT[:8]))
    told(of, stored([3], PROMPT[:4], extra_keys=[["a", "s"]], **lora))
    told(of, stored([4], PROMPT[4:8], parent=3, extra_keys=[["a"]], **lora))
    assert depth(contexts, lora="a", salt="s") == 8
    assert (depth(contexts, lora="a"), depth(contexts), depth(contexts, lora="b")) == (0, 8, -1)
    told(of, removed([4]))
    assert depth(contexts, lora="a", salt="s") == 4


def test_a_registered_adapter_counts_where_the_events_name_none(contexts: Contexts) -> None:
    told(source(contexts, lora="sql"), stored([1], PROMPT[:4]))
    assert (depth(contexts, lora="sql"), depth(contexts)) == (4, -1)


def test_a_registered_salt_names_a_context_of_its_own(contexts: Contexts) -> None:
    told(source(contexts, salt="w8a8"), stored([1], PROMPT[:4]))
    told(source(contexts, instance="i1"), stored([1, 2], PROMPT[:8]))
    assert depth(contexts, salt="w8a8") == 4
    assert list(ask(contexts, salt="w8a8")) == ["i0"]
    assert depth(contexts, instance="i1") == 8


@pytest.mark.parametrize(
    ("event", "reason"),
    [
        (stored([1], PROMPT[:4], extra_keys=[[["image", 0]]]), LeftOut.EXTRA),
        (stored([1], PROMPT[:4], extra_keys=[[b"embeds"]]), LeftOut.EXTRA),
        (stored([1], PROMPT[:4], parent=99), LeftOut.PARENT),
        (stored([1], PROMPT[:3]), LeftOut.SHAPE),
        (stored([1], PROMPT[:4], group_idx=1), LeftOut.SHAPE),
        (stored([1], PROMPT[:4], medium="tape"), LeftOut.MEDIUM),
    ],
)
def test_what_no_query_could_name_is_left_out_and_counted(contexts, event, reason) -> None:
    of = source(contexts)
    told(of, event)
    assert depth(contexts) == 0
    assert +of.left_out == {reason: 1}


def test_the_array_encoding_of_older_engines_is_read_alike(contexts: Contexts) -> None:
    of = source(contexts)
    of.apply(decode_batch(batch(["BlockStored", [1, 2], None, PROMPT[:8], SIZE, None])))
    assert depth(contexts) == 8
    of.apply(decode_batch(batch(["BlockRemoved", [2]])))
    assert depth(contexts) == 4
    of.apply(decode_batch(batch(["AllBlocksCleared"])))
    assert depth(contexts) == 0


def test_an_engine_s_own_memory_and_files_go_on_where_its_gpu_ends(contexts: Contexts) -> None:
    of = source(contexts)
    told(of, stored([1, 2, 3, 4], PROMPT))
    told(of, stored([2, 3], [], medium="CPU"), stored([4], [], medium="STORAGE"))
    told(of, removed([2, 3, 4]))
    hits = ask(contexts)["i0"]
    assert hits.best == RankHits(4, 12, 16)
    assert hits.alone == {Tier.GPU: 4, Tier.CPU: 0, Tier.DISK: 0}


def test_sglang_tells_the_salt_in_a_field_of_its_own_and_hashes_that_are_signed(contexts: Contexts) -> None:
    of = source(contexts, kind="SGLang")
    first = {"type": "BlockStored", "block_hashes": [-685567553150498463], "parent_block_hash": None}
    same = {"token_ids": PROMPT[:4], "block_size": SIZE, "lora_id": None, "medium": "GPU", "cache_salt": "s"}
    of.apply(decode_salted(batch({**first, **same})))
    again = {**same, "block_hashes": [-1], "parent_block_hash": -685567553150498463, "token_ids": PROMPT[4:8]}
    of.apply(decode_salted(batch({"type": "BlockStored", **again})))
    assert (depth(contexts, salt="s"), depth(contexts)) == (8, 0)


# upstream's fixture sglang_map_event_vectors.json, "stored_removed_cleared"
SGLANG = bytes.fromhex(
    "93cb40290000000000009387a474797065ab426c6f636b53746f726564ac626c6f636b5f68617368657392ff02b1706172656e745f62"
    "6c6f636b5f68617368c0a9746f6b656e5f6964739401020304aa626c6f636b5f73697a6502a76c6f72615f6964c0a66d656469756da3"
    "47505583a474797065ac426c6f636b52656d6f766564ac626c6f636b5f68617368657391ffa66d656469756da347505581a474797065"
    "b0416c6c426c6f636b73436c656172656404"
)


def test_upstream_s_own_vector_of_sglang_s_events_is_read() -> None:
    one, two, three = decode_salted(SGLANG)
    assert one.block_hashes == [-1, 2]
    assert one.token_ids == [1, 2, 3, 4]
    assert two.block_hashes == [-1]
    assert type(three).__name__.startswith("_Cleared")


# ---------------------------------------------------------------- ranks, instances


def test_ranks_of_an_instance_are_told_apart_and_the_best_counts(contexts: Contexts) -> None:
    told(source(contexts), stored([1], PROMPT[:4]))
    told(source(contexts, rank=1), stored([7, 8], PROMPT[:8]))
    told(source(contexts, instance="i1"), stored([1, 2, 3], PROMPT[:12]))
    found = ask(contexts)
    assert found["i0"].ranks == {0: RankHits(4, 4, 4), 1: RankHits(8, 8, 8)}
    assert found["i0"].best.gpu == 8
    assert list(ask(contexts, instance="i1")) == ["i1"]
    assert ask(contexts, instance="nobody") == {}


def test_who_leaves_is_not_found_and_the_last_takes_the_context_along(contexts: Contexts) -> None:
    one, two = source(contexts), source(contexts, instance="i1")
    told(one, stored([1], PROMPT[:4]))
    told(two, stored([1], PROMPT[:4]))
    one.close()
    assert list(ask(contexts)) == ["i1"]
    two.close()
    assert ask(contexts) == {}
    assert not contexts.all


def test_blocks_of_who_is_not_trusted_do_not_count_until_it_is_again(contexts: Contexts) -> None:
    of = source(contexts)
    told(of, stored([1], PROMPT[:4]))
    of.trust(False)
    assert depth(contexts) == 0
    told(of, stored([2], PROMPT[4:8], parent=1))
    of.trust(True)
    assert depth(contexts) == 8


# ---------------------------------------------------------------- a pool


def engine_hashes(tokens: Sequence[int], salt: str | None = None, lora: str = "", form: int = 0) -> list[int]:
    made = PROFILE.digests(None, pack(tokens), SIZE, *PROFILE.forms(lora, salt)[form])
    return [low64(one) for one in made]


def test_a_pool_s_blocks_go_on_for_every_engine_of_the_context(contexts: Contexts) -> None:
    hashes = engine_hashes(PROMPT)
    engine = source(contexts, profile=PROFILE)
    source(contexts, instance="i1", profile=PROFILE)
    pool = source(contexts, kind="Mooncake", instance="pool", profile=PROFILE)
    told(engine, stored(hashes[:1], PROMPT[:4]))
    pooled(pool, put(hashes[1:3]), put(hashes[3:], medium="disk"))
    found = ask(contexts)
    assert set(found) == {"i0", "i1"}, "a pool takes no requests"
    assert found["i0"].best == RankHits(4, 12, 16)
    assert found["i1"].best == RankHits(0, 0, 0)
    pooled(pool, put(hashes[:1]))
    assert ask(contexts)["i1"].best == RankHits(0, 12, 16)
    pooled(pool, put(hashes[2:3], "removed"))
    assert ask(contexts)["i1"].best == RankHits(0, 8, 8)
    pooled(pool, put([], "cleared"))
    assert ask(contexts)["i1"].best == RankHits(0, 0, 0)


@pytest.mark.parametrize("form", [0, 1], ids=["tagged, vLLM 0.32", "bare, older"])
def test_a_pool_s_salted_and_adapted_blocks_are_found_in_either_form(contexts: Contexts, form: int) -> None:
    hashes = engine_hashes(PROMPT, "s", "a", form)
    source(contexts, profile=PROFILE, lora="a")
    pooled(source(contexts, kind="Mooncake", instance="pool", lora="a", profile=PROFILE), put(hashes))
    assert depth(contexts, salt="s", lora="a") == 16
    assert depth(contexts, lora="a") == 0


def test_nodes_of_a_pool_together_hold_a_prefix(contexts: Contexts) -> None:
    hashes = engine_hashes(PROMPT)
    source(contexts, profile=PROFILE)
    pool = source(contexts, kind="Mooncake", instance="pool", profile=PROFILE)
    for number, block in enumerate(hashes):
        pooled(pool, put([block], backend_id=f"b{number % 2}"))
    assert depth(contexts) == 16


def test_who_changes_nodes_too_often_is_told_less_never_more(
    contexts: Contexts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contexts_module, "HOPS_MAX", 2)
    test_hashes = engine_hashes(PROMPT)
    source(contexts, profile=PROFILE)
    pool = source(contexts, kind="Mooncake", instance="pool", profile=PROFILE)
    for number, block in enumerate(test_hashes):
        pooled(pool, put([block], backend_id=f"b{number % 2}"))
    assert depth(contexts) == 8


def test_objects_are_named_by_their_keys_where_no_hash_is_told(contexts: Contexts) -> None:
    first, *_ = PROFILE.digests(None, pack(PROMPT), SIZE, None, None)
    source(contexts, profile=PROFILE)
    pool = source(contexts, kind="Mooncake", instance="pool", profile=PROFILE)
    keys = [f"m@tp_rank:0@pcp0@dcp0@pp_rank:0@{first.hex()}", "weights/3", "", "m@x"]
    pooled(pool, *(put([], object_key=key) for key in keys))
    assert depth(contexts) == 4
    assert +pool.left_out == {LeftOut.KEY: 3}
    assert [one.hashes for one in decode_told(batch(put([], object_key="18446744073709551615")))] == [
        [2**64 - 1]
    ]
    assert [one.hashes for one in decode_told(batch(put([], object_key="0x1F")))] == [[31]]


def test_a_publisher_of_the_standard_needs_no_tokens_and_may_have_a_gpu(contexts: Contexts) -> None:
    names = list(xxh3_names(None, pack(PROMPT), SIZE, SEED))
    engine = source(contexts)
    envelope = put(names[:2], medium="gpu")
    del envelope["type"]
    engine.apply(decode_engine(batch(envelope)))
    pooled(source(contexts, kind="Mooncake", instance="pool"), put(names[2:], medium=None))
    assert ask(contexts)["i0"].best == RankHits(8, 16, 16)


def test_objects_of_another_model_or_tenant_stay_apart(contexts: Contexts) -> None:
    names = list(xxh3_names(None, pack(PROMPT), SIZE, SEED))
    source(contexts)
    pool = source(contexts, kind="Mooncake", instance="pool")
    pooled(pool, put(names, model_name="other"), put(names, block_size=SIZE + 1), put(names, tenant_id="t"))
    assert depth(contexts) == 0
    assert pool.left_out[LeftOut.KEY] == 8
    assert ContextKey("t", "m", "", SIZE) in contexts.all


def test_what_is_told_twice_of_an_object_is_gone_at_once(contexts: Contexts) -> None:
    names = list(xxh3_names(None, pack(PROMPT), SIZE, SEED))
    source(contexts)
    pool = source(contexts, kind="Mooncake", instance="pool")
    pooled(pool, put(names), put(names), put(names, "removed"))
    assert depth(contexts) == 0


# ---------------------------------------------------------------- by hash


def test_hashes_of_the_profile_are_found_as_tokens_are(contexts: Contexts) -> None:
    hashes = engine_hashes(PROMPT)
    told(source(contexts, profile=PROFILE), stored(hashes[:3], PROMPT[:12]))
    (context,) = contexts.all.values()
    assert context.by_hashes(hashes, None)["i0"].best.gpu == 12
    assert context.by_hashes(hashes[1:], None)["i0"].best.gpu == 8, "they are believed to be a prefix"


def test_bytes_of_a_whole_hash_and_its_low_half_are_one_name(contexts: Contexts) -> None:
    whole = list(PROFILE.digests(None, pack(PROMPT), SIZE, None, None))
    told(source(contexts, profile=PROFILE), stored(whole, PROMPT))
    (context,) = contexts.all.values()
    assert context.by_hashes(engine_hashes(PROMPT), None)["i0"].best.gpu == 16


def test_names_of_the_standard_are_the_hashes_of_a_context_without_a_profile(contexts: Contexts) -> None:
    told(source(contexts), stored([1, 2, 3, 4], PROMPT))
    (context,) = contexts.all.values()
    assert context.by_hashes(list(xxh3_names(None, pack(PROMPT), SIZE, SEED)), None)["i0"].best.gpu == 16
    assert context.by_hashes([1, 2, 3, 4], None)["i0"].best.gpu == 0


# ---------------------------------------------------------------- bounds


def test_a_context_has_one_profile(contexts: Contexts) -> None:
    source(contexts, profile=PROFILE)
    source(contexts, instance="i1")  # says nothing of it: takes what is there
    with pytest.raises(RequestError, match="profile"):
        source(contexts, instance="i2", profile=VllmV1("sha256", "1"))


def test_contexts_are_bounded_and_an_event_cannot_make_more(
    contexts: Contexts, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = source(contexts)
    monkeypatch.setattr(contexts_module, "CONTEXTS_MAX", 1)
    told(of, stored([1], PROMPT[:4], lora_name="a", extra_keys=[["a"]]))
    assert +of.left_out == {LeftOut.CONTEXTS: 1}
    with pytest.raises(CapacityError):
        source(contexts, model="another")


def test_a_publisher_that_tells_too_much_loses_its_oldest_blocks_everywhere(
    contexts: Contexts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source_module, "SOURCE_BLOCKS_MAX", 3)
    of = source(contexts)
    told(of, stored([1], PROMPT[:4]), stored([2, 3], range(8)))
    assert depth(contexts) == 4
    told(of, stored([4], [7, 7, 7, 7]))
    assert (depth(contexts), depth(contexts, range(8)), len(of)) == (0, 8, 3)


def test_a_full_context_drops_its_oldest_blocks_and_says_so() -> None:
    contexts = Contexts(SEED, blocks_max=16)
    of = source(contexts)
    for number in range(40):
        told(of, stored([number], [number] * SIZE))
    (context,) = contexts.all.values()
    assert context.blocks() <= 16
    assert context.dropped() >= 24


@pytest.mark.parametrize(
    "payload", [b"", b"\xc1", batch(["BlockStored", 1]), msgspec.msgpack.encode([1.0, 5])]
)
def test_what_is_no_batch_is_a_protocol_error(payload: bytes) -> None:
    for decode in (decode_engine, decode_told, decode_salted):
        with pytest.raises(ProtocolError):
            decode(payload)


# ---------------------------------------------------------------- against a model

steps = st.lists(
    st.one_of(
        st.tuples(st.just("store"), st.integers(0, 2), st.integers(1, 4), st.sampled_from(["", "s"])),
        st.tuples(st.just("remove"), st.integers(0, 2), st.integers(0, 3), st.sampled_from(["", "s"])),
        st.tuples(st.just("clear"), st.just(0), st.just(0), st.just("")),
    ),
    max_size=30,
)


@settings(max_examples=100, deadline=None)
@given(steps=steps, profile=st.sampled_from([None, PROFILE]))
def test_queries_tell_what_an_engine_holds_whatever_it_goes_through(steps: list, profile: Any) -> None:
    contexts, held = Contexts(SEED), dict[tuple[int, int, str], int]()
    of = source(contexts, profile=profile)
    prompts = [[number * 100 + at for at in range(16)] for number in range(3)]
    name = lambda number, block, salt: 1 + number * 8 + block + (1000 if salt else 0)  # noqa: E731
    for kind, number, count, salt in steps:
        if kind == "clear":
            held.clear()
            told(of, CLEARED)
        elif kind == "store":
            hashes = [name(number, block, salt) for block in range(count)]
            extra = [[salt] if salt else None, *[None] * (count - 1)]
            told(of, stored(hashes, prompts[number][: SIZE * count], extra_keys=extra))
            for block in range(count):
                held[number, block, salt] = held.get((number, block, salt), 0) + 1
        elif held.get((number, count, salt)):
            told(of, removed([name(number, count, salt)]))
            held[number, count, salt] -= 1
        for at, prompt in enumerate(prompts):
            for one in ("", "s"):
                blocks = next((block for block in range(4) if not held.get((at, block, one))), 4)
                assert depth(contexts, prompt, salt=one or None) == SIZE * blocks
