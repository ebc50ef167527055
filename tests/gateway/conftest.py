"""A cluster of fake engines around the production dispatcher, on one event loop."""

import asyncio
import itertools
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # importlib mode: helpers beside the tests

from fake_engine import BLOCK_SIZE, FakeEngine, encoded
from prometheus_client import CollectorRegistry

from conductor.cluster import ClusterView, Health
from conductor.cost import CostModel
from conductor.dispatch import Dispatcher
from conductor.gate import Gate, GateConfig
from conductor.http import FATE, HttpFate
from conductor.index import PrefixIndex
from conductor.local_decider import LocalDecider
from conductor.members import Members
from conductor.metrics import GatewayMetrics
from conductor.observe import Observer
from conductor.scheduler import Mode, Scheduler, SchedulerConfig
from conductor.tenants import Quotas
from conductor.terms import DEFAULT_TERMS, Terms
from conductor.vllm_seam import (
    EngineCoreOutput,
    EngineCoreRequest,
    SamplingParams,
)
from mooncake.core.messages import INSTANCES_PREFIX
from mooncake.core.metadata_memory import MemoryMetadata

__all__ = ["BLOCK_SIZE"]

DEADLINE_S = 10.0
_ids = itertools.count()


def make_request(
    prompt: list[int], *, rid: str = "", external: str = "", arrival_time: float = 1.0, **params: object
) -> EngineCoreRequest:
    """A request as InputProcessor makes it."""
    number = next(_ids)
    external = external or f"cmpl-{number}"
    return EngineCoreRequest(
        request_id=rid or f"{external}-abcd",
        prompt_token_ids=prompt,
        mm_features=None,
        sampling_params=SamplingParams(**{"max_tokens": 8, "temperature": 0.0, **params}),
        pooling_params=None,
        arrival_time=arrival_time,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
        external_req_id=external,
    )


class Front:
    """A dispatcher with what is in front of it: requests go in, and what clients get is kept."""

    def __init__(self, dispatcher: Dispatcher, registry: CollectorRegistry) -> None:
        self.dispatcher = dispatcher
        self.registry = registry
        self.failed: dict[str, Exception] = {}
        self.outputs: dict[str, list[EngineCoreOutput]] = {}
        self.stats: list[int] = []
        self.running: dict[int, int] = {}  # as vLLM's gauge shows it, by number of an engine
        self.finished: dict[str, asyncio.Event] = {}
        self.collecting = asyncio.create_task(self._collect())

    async def until(self, condition: Callable[[], bool], deadline_s: float = DEADLINE_S) -> None:
        async with asyncio.timeout(deadline_s):
            while not condition():  # noqa: ASYNC110 -- conditions look at other threads
                await asyncio.sleep(0.005)

    def add(self, request: EngineCoreRequest, terms: Terms = DEFAULT_TERMS) -> str:
        """Hand a request in as the HTTP front end does that read `terms` from its headers."""
        self.finished[request.request_id] = asyncio.Event()
        token = FATE.set(HttpFate(terms))
        try:
            self.dispatcher.add(request)
        finally:
            FATE.reset(token)
        return request.request_id

    def note_failures(self) -> None:
        """Keep what clients are told instead of ending their streams."""

        def fail(request_id: str, error: Exception) -> list[str]:
            self.failed[request_id] = error
            self.finished[request_id].set()
            return []

        self.dispatcher.fail_request = fail

    def tokens(self, rid: str) -> list[int]:
        return [token for output in self.outputs.get(rid, []) for token in output.new_token_ids]

    async def finish(self, rid: str, deadline_s: float = DEADLINE_S) -> list[int]:
        async with asyncio.timeout(deadline_s):
            await self.finished[rid].wait()
        return self.tokens(rid)

    async def _collect(self) -> None:
        while True:
            step = await self.dispatcher.outputs.get()
            if step.scheduler_stats is not None:
                self.stats.append(step.engine_index)
                self.running[step.engine_index] = step.scheduler_stats.num_running_reqs
            for output in step.outputs:
                self.outputs.setdefault(output.request_id, []).append(output)
                if output.finish_reason is not None:
                    self.finished[output.request_id].set()

    def metric(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(name, labels) or 0.0


class World(Front):
    """Fake engines, metadata, and the production shell over them."""

    def __init__(
        self,
        first_token: bool,
        mode: Mode,
        gate: GateConfig,
        cost: CostModel,
        quotas: Quotas | None = None,
        **config: object,
    ) -> None:
        self.metadata = MemoryMetadata()
        self.view = ClusterView()
        registry = CollectorRegistry()
        self.metrics = GatewayMetrics(registry)
        self.cost = cost
        index = PrefixIndex()
        self.members = Members(self.metadata, self.view, index, "gw", self.metrics)
        scheduler = Scheduler(SchedulerConfig(mode=mode, **config), index, self.cost, self.view)
        quotas = Quotas() if quotas is None else quotas
        self.decider = LocalDecider(
            self.view,
            scheduler,
            self.cost,
            Gate(gate, self.view, quotas.tenants.weight),
            quotas,
            Observer(self.cost, self.metrics),
            self.members.stores_in_step,
            self.metrics,
        )
        dispatcher = Dispatcher(self.members, self.decider, self.metrics, first_token=first_token)
        super().__init__(dispatcher, registry)
        self.members.start(self.dispatcher)
        self.engines: list[FakeEngine] = []

    async def engine(self, instance_id: str, role: str, **kwargs: object) -> FakeEngine:
        """Start and register a fake engine; returns when the view calls it alive."""
        engine = FakeEngine(instance_id, role, **kwargs)
        self.engines.append(engine)
        await self.register(engine)
        await self.until(lambda: self.view.health(instance_id) is Health.ALIVE)
        return engine

    async def register(self, engine: FakeEngine) -> None:
        await self.metadata.put(INSTANCES_PREFIX + engine.instance_id, encoded(engine.record))

    async def close(self) -> None:
        self.collecting.cancel()
        await self.members.close()
        await self.metadata.close()
        for engine in self.engines:
            engine.frozen.clear()
            engine.kill()


@pytest.fixture
async def make_world() -> AsyncIterator[Callable[..., World]]:
    worlds: list[World] = []

    def make(
        first_token: bool = False,
        mode: Mode = Mode.DISAGGREGATED,
        gate: GateConfig = GateConfig(),  # noqa: B008 - frozen
        cost: CostModel | None = None,
        **config: object,
    ) -> World:
        worlds.append(World(first_token, mode, gate, cost or CostModel(), **config))
        return worlds[-1]

    yield make
    for world in worlds:
        await world.close()
