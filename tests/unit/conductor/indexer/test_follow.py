"""Publishers on real sockets: late, losing messages, gone, restarted. What cannot be known is never told."""

import asyncio
import struct
from collections.abc import AsyncIterator
from typing import Any

import pytest

from conductor.indexer import follow as follow_module
from conductor.indexer.source import Service, Source
from tests.unit.conductor.indexer.make import DEADLINE_S, Publisher, Site, removed, service, stored

PROMPT = list(range(100, 116))


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that stands still for two seconds is not what these tests are about."""
    monkeypatch.setattr(follow_module, "REPLAY_S", DEADLINE_S)


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    made = Site()
    yield made
    await made.close()


@pytest.fixture
async def publisher() -> AsyncIterator[Publisher]:
    made = Publisher()
    yield made
    await made.close()


async def follow(site: Site, publisher: Publisher, replay: bool = True, **more: Any) -> Service:
    endpoints = {"endpoint": publisher.endpoint, "replay_endpoint": publisher.replay if replay else ""}
    wish = service(**endpoints, **more)
    assert await site.indexer.register(wish)
    await is_state(site, "live")
    return wish


async def is_state(site: Site, state: str) -> None:
    async def reached() -> bool:
        return (await site.state())["State"] == state

    await site.until(reached)


async def has(site: Site, tokens: int, prompt: list[int] = PROMPT) -> None:
    async def found() -> bool:
        return await site.longest(prompt) == tokens

    await site.until(found)


async def heard(site: Site, publisher: Publisher) -> None:
    """Publish until it comes through: from then on the subscription is known to work."""
    async with asyncio.timeout(30.0):
        while await site.longest([9, 9, 9, 9]) != 4:
            await publisher.publish(removed([0]), stored([0], [9, 9, 9, 9]))
            await asyncio.sleep(0.02)


async def test_what_an_engine_stores_and_gives_up_is_told_on_and_on(site: Site, publisher: Publisher) -> None:
    await follow(site, publisher)
    await heard(site, publisher)
    await publisher.publish(stored([1, 2], PROMPT[:8]))
    await has(site, 8)
    await publisher.publish(removed([2]))
    await has(site, 4)


async def test_who_registers_late_learns_what_the_engine_repeats(site: Site, publisher: Publisher) -> None:
    await publisher.publish(stored([1, 2], PROMPT[:8]))
    await publisher.publish(stored([3], PROMPT[8:12], parent=2))
    await follow(site, publisher)
    await has(site, 12)


async def test_messages_that_were_lost_are_asked_for_again(site: Site, publisher: Publisher) -> None:
    await follow(site, publisher)
    await heard(site, publisher)
    before = (await site.state())["Gaps"]
    publisher.lose(stored([1, 2], PROMPT[:8]))
    await publisher.publish(stored([3], PROMPT[8:12], parent=2))
    await has(site, 12)
    state = await site.state()
    assert (state["Gaps"], state["Lost"]) == (before + 1, 0)


async def test_a_last_message_that_was_lost_is_asked_for_when_it_is_quiet(
    site: Site, publisher: Publisher
) -> None:
    await follow(site, publisher)
    await heard(site, publisher)
    publisher.lose(stored([1], PROMPT[:4]))
    await has(site, 4)


async def test_a_gap_that_cannot_be_filled_costs_all_that_was_known(site: Site, publisher: Publisher) -> None:
    await follow(site, publisher, replay=False)
    await heard(site, publisher)
    publisher.lose(removed([0]))
    await publisher.publish(stored([1], PROMPT[:4]))
    await has(site, 4)
    assert await site.longest([9, 9, 9, 9]) == 0, "the lost message may have removed it"
    assert (await site.state())["Lost"] == 1


async def test_blocks_of_an_engine_that_is_gone_do_not_count_until_it_is_back(site: Site) -> None:
    publisher = Publisher()
    await publisher.publish(stored([1, 2], PROMPT[:8]))
    await follow(site, publisher)
    await has(site, 8)
    await publisher.close()
    await is_state(site, "stale")
    assert await site.longest(PROMPT) == 0
    again = Publisher(ports=publisher.ports)
    await again.publish(stored([1], PROMPT[:4]))
    await is_state(site, "live")
    await has(site, 4)
    assert (await site.state())["Restarts"] == 1
    await again.close()


async def test_a_connection_that_breaks_costs_nothing_if_the_engine_repeats_what_it_said_last(
    site: Site,
) -> None:
    publisher = Publisher()
    await publisher.publish(stored([1], PROMPT[:4]))
    await publisher.publish(stored([2], PROMPT[4:8], parent=1))
    await follow(site, publisher)
    await has(site, 8)
    kept = list(publisher._kept)
    await publisher.close()
    await is_state(site, "stale")
    again = Publisher(ports=publisher.ports)
    again._kept.extend(kept[1:])  # the first is not kept any more
    again.seq = 2
    await is_state(site, "live")
    await has(site, 8)
    assert (await site.state())["Restarts"] == 0
    await again.close()


async def test_without_a_replay_endpoint_a_lost_connection_costs_all(site: Site) -> None:
    publisher = Publisher()
    await follow(site, publisher, replay=False)
    await heard(site, publisher)
    await publisher.close()
    await is_state(site, "stale")
    state = await site.state()
    assert (state["Blocks"], state["Restarts"]) == (0, 1)


async def test_a_message_that_cannot_be_read_costs_what_was_known_and_the_stream_goes_on(
    site: Site, publisher: Publisher
) -> None:
    await follow(site, publisher)
    await heard(site, publisher)
    await publisher.publish({"type": "BlockStored", "block_hashes": "no list"})
    await publisher.publish(stored([1], PROMPT[:4]))
    await has(site, 4)
    assert await site.longest([9, 9, 9, 9]) == 0
    assert (await site.state())["Undecodable"] == 1


async def test_blocks_do_not_count_any_more_when_following_ends_by_a_bug_of_ours(
    site: Site, publisher: Publisher, monkeypatch: pytest.MonkeyPatch
) -> None:
    await follow(site, publisher)
    await heard(site, publisher)

    def broken(*_: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(Source, "apply", broken)
    await publisher.publish(stored([1], PROMPT[:4]))
    await is_state(site, "stale")
    assert await site.longest([9, 9, 9, 9]) == 0


async def test_an_engine_that_is_not_there_yet_is_waited_for(site: Site) -> None:
    gone = Publisher()
    await gone.close()
    wish = service(endpoint=gone.endpoint, replay_endpoint=gone.replay)
    assert await site.indexer.register(wish)
    assert await site.query(PROMPT) == {
        "i0": {
            "longest_matched": 0, "gpu": 0, "cpu": 0, "disk": 0, "dp": {"0": 0},
            "rank_matches": {"0": {"gpu": 0, "cpu": 0, "disk": 0}},
        }
    }  # fmt: skip
    publisher = Publisher(ports=gone.ports)
    await publisher.publish(stored([1], PROMPT[:4]))
    await has(site, 4)
    await publisher.close()


async def test_upstream_s_proxy_registers_and_asks_as_it_does(site: Site, publisher: Publisher) -> None:
    """The very maps that example/cache_aware_disagg_proxy.py sends, in msgpack."""
    profile = {
        "strategy": "vllm_v1", "algorithm": "sha256_cbor", "python_hash_seed": "0",
        "index_projection": "low64_be",
    }  # fmt: skip
    registration = {
        "endpoint": publisher.endpoint, "type": "vLLM", "modelname": "m", "instance_id": "i0",
        "block_size": 4, "dp_rank": 0, "tenant_id": "default", "lora_name": "", "hash_profile": profile,
    }  # fmt: skip
    status, answer = await site.pack("/register", registration)
    assert (status, answer) == (200, {"status": "registered successfully", "instance_id": "i0"})
    await is_state(site, "live")
    await heard(site, publisher)
    query = {
        "model": "m", "block_size": 4, "token_ids": struct.pack("<5i", 9, 9, 9, 9, 7),
        "tenant_id": "default", "lora_name": "", "cache_salt": None,
    }  # fmt: skip
    status, answer = await site.pack("/query", query)
    assert status == 200
    assert answer["instances"]["i0"]["longest_matched"] == 4
