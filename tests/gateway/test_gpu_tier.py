"""Requests go to engines whose own cache holds their prefix, as their relays tell it."""

from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import msgspec
import pytest
from conftest import World, make_request
from fake_engine import BLOCK_SIZE, CONTEXT_ROOT, FakeEngine, encoded

from conductor.cluster import Health
from conductor.why import PrefillOption
from mooncake.core.keys import prompt_keys
from mooncake.core.messages import INSTANCES_PREFIX, gpu_node
from mooncake.worker.gpu_blocks import GpuBlocks
from mooncake.worker.gpu_events import GpuEvents
from mooncake.worker.spec import EngineSpec

PROMPT = list(range(50, 50 + 10 * BLOCK_SIZE + 1))
PromptTo = Callable[[list[int]], Awaitable[PrefillOption]]


class Teller:
    """The relay's part of a fake engine: it says what the engine's own cache holds."""

    def __init__(self, engine: FakeEngine, folder: Path) -> None:
        self.engine, self.seq = engine, 0
        spec = EngineSpec(
            instance_id=engine.instance_id,
            role=engine.role,
            epoch=engine.epoch,
            run_dir=str(folder),
            model="m",
        )
        self.events = GpuEvents(spec, GpuBlocks(bytes.fromhex(CONTEXT_ROOT), BLOCK_SIZE, 1000), "127.0.0.1")
        self.events.start()

    @property
    def record(self) -> bytes:
        endpoint, told = self.events.endpoints
        return encoded(msgspec.structs.replace(self.engine.record, gpu_endpoint=endpoint, gpu_events=told))

    def stored(self, prompt: list[int]) -> None:
        count = len(prompt) // BLOCK_SIZE
        event = {
            "type": "BlockStored",
            "block_hashes": [hash(tuple(prompt[: (i + 1) * BLOCK_SIZE])) % (1 << 64) for i in range(count)],
            "parent_block_hash": None,
            "token_ids": prompt[: count * BLOCK_SIZE],
            "block_size": BLOCK_SIZE,
            "extra_keys": [None] * count,
        }
        payload = msgspec.msgpack.encode([0.0, [event], 0])
        assert self.events.reader.take([b"", self.seq.to_bytes(8, "big"), payload])
        self.seq += 1

    def garbage(self) -> None:
        assert self.events.reader.take([b"", self.seq.to_bytes(8, "big"), b"\xc1"])
        self.seq += 1


class Site:
    def __init__(self, world: World, folder: Path) -> None:
        self.world, self._folder = world, folder
        self.tellers: list[Teller] = []

    async def engine(self, instance_id: str, role: str, epoch: str = "e1") -> Teller:
        """A fake engine that is alive and whose cache is followed."""
        engine = await self.world.engine(instance_id, role, epoch=epoch)
        teller = Teller(engine, self._folder)
        self.tellers.append(teller)
        await self.tell(teller)
        return teller

    async def tell(self, teller: Teller) -> None:
        await self.world.metadata.put(INSTANCES_PREFIX + teller.engine.instance_id, teller.record)
        await self.world.until(lambda: self.is_followed(teller.engine))

    def is_followed(self, engine: FakeEngine) -> bool:
        """Whether this start of the engine is alive, and what its relay tells is in the index."""
        name, view = engine.instance_id, self.world.view
        record = view.record(name)
        if record is None or (record.epoch, view.health(name)) != (engine.epoch, Health.ALIVE):
            return False
        return self.world.members.stores_in_step().get(gpu_node(name), False)

    def known(self, instance_id: str) -> float | None:
        return self.world.registry.get_sample_value("mooncake_gpu_blocks_known", {"instance_id": instance_id})

    async def ask(self, prompt: list[int]) -> tuple[str | None, dict[str, PrefillOption]]:
        """Where the prompt was prefilled, and what was compared."""
        rid = self.world.add(make_request(prompt))
        await self.world.finish(rid)
        (why,) = self.world.decider.decisions.last(rid)
        return why.prefill, {option.instance: option for option in why.prefills}


@pytest.fixture
async def site(make_world: Callable[..., World], tmp_path: Path) -> AsyncIterator[Site]:
    made = Site(make_world(), tmp_path)
    yield made
    for teller in made.tellers:
        await teller.events.close()


async def test_the_second_prompt_goes_to_the_engine_that_has_the_first_and_no_load_is_priced(
    site: Site,
) -> None:
    for name in ("p0", "p1", "p2"):
        await site.engine(name, "prefill")
    await site.engine("d0", "decode")
    chosen, options = await site.ask(PROMPT)
    assert (chosen, options["p0"].hit_blocks) == ("p0", 0)
    site.tellers[2].stored(PROMPT)
    await site.world.until(lambda: site.known("p2") == 10)
    chosen, options = await site.ask([*PROMPT, 1, 2, 3])
    assert chosen == "p2"
    assert (options["p2"].hit_blocks, options["p2"].gpu_blocks, options["p2"].fetch_blocks) == (10, 10, 0)
    assert {options[name].hit_blocks for name in ("p0", "p1")} == {0}
    computed_s = site.world.cost.prefill_s(4, 10 * BLOCK_SIZE)
    assert options["p2"].work_s == pytest.approx(computed_s, rel=0.5)  # it has learned from two prompts since


async def test_what_a_relay_can_no_longer_vouch_for_counts_no_more(site: Site) -> None:
    teller = await site.engine("p0", "prefill")
    teller.stored(PROMPT)
    await site.world.until(lambda: site.known("p0") == 10)
    teller.garbage()
    await site.world.until(lambda: site.known("p0") == 0)
    teller.stored(PROMPT[:8])
    await site.world.until(lambda: site.known("p0") == 2)


async def test_another_start_of_an_engine_begins_with_nothing(site: Site) -> None:
    old = await site.engine("p0", "prefill")
    await site.engine("d0", "decode")
    old.stored(PROMPT)
    await site.world.until(lambda: site.known("p0") == 10)
    old.engine.kill()
    await site.engine("p0", "prefill", epoch="e2")
    assert site.known("p0") == 0
    _, options = await site.ask(PROMPT)
    assert options["p0"].hit_blocks == 0


async def test_an_engine_that_leaves_takes_its_cache_along(site: Site) -> None:
    teller = await site.engine("p0", "prefill")
    teller.stored(PROMPT)
    await site.world.until(lambda: site.known("p0") == 10)
    await site.world.metadata.delete(INSTANCES_PREFIX + "p0")
    await site.world.until(lambda: site.known("p0") is None)
    assert site.world.members.stores_in_step() == {}
    assert (
        site.world.members._feed._index.holders(
            prompt_keys(bytes.fromhex(CONTEXT_ROOT), PROMPT, BLOCK_SIZE)[0][0]
        )
        == ()
    )


async def test_the_index_says_what_it_holds_and_what_it_gave_up(site: Site) -> None:
    teller = await site.engine("p0", "prefill")
    teller.stored(PROMPT)
    await site.world.until(lambda: site.known("p0") == 10)
    names = ("index_blocks", "index_holders", "index_dropped_total", "index_sweeps_total")
    found = [site.world.registry.get_sample_value(f"mooncake_{name}") for name in names]
    assert found == [10, 1, 0, 0]


async def test_a_cache_that_falls_silent_is_forgotten_and_the_index_is_said_to_be_poorer(site: Site) -> None:
    teller = await site.engine("p0", "prefill")
    teller.stored(PROMPT)
    await site.world.until(lambda: site.known("p0") == 10)
    await teller.events.close()
    await site.world.until(lambda: site.world.members.stores_in_step() == {gpu_node("p0"): False})
    assert site.known("p0") == 0
