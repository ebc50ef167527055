"""`mooncake follower`: one node, above the first, of an engine that spans several.

A light process (no vLLM) beside the ranks of its node: it joins the leader, starts what that one orders,
tells it twice a second how it is, and ends when it does. Reads startup, main loop, shutdown.
"""

import asyncio
import contextlib
import shutil
import tempfile
import time
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import structlog
from prometheus_client import CollectorRegistry

from mooncake import __version__
from mooncake.core.attend import Attended, attended
from mooncake.core.errors import ConfigError, MooncakeError, PeerGone, PeerTimeout
from mooncake.core.messages import Failure
from mooncake.core.options import FollowerOptions
from mooncake.core.rpc import RpcClient
from mooncake.worker.engine import refuse_insecure_serialization
from mooncake.worker.launch import EngineProcess, start_engine
from mooncake.worker.node_messages import FAILED, STOPS, NodeAnswer, NodeBeat
from mooncake.worker.nodes import interface_of, is_present
from mooncake.worker.pulse import Pulse
from mooncake.worker.roster import SILENT_S
from mooncake.worker.run_dirs import hold, remove_orphans
from mooncake.worker.spec import EngineSpec

log = structlog.get_logger(__name__)

BEAT_S = 0.5
CALL_S = 2.0
ENGINE_STOP_S = 5.0
"""Its ranks save nothing: they end at once, or are killed."""


class Follower:
    """Wires the parts together; `run` returns the process's exit code."""

    def __init__(self, options: FollowerOptions) -> None:
        """Nothing is started yet."""
        self._options = options
        self._life = uuid.uuid4().hex[:12]
        self._epoch = ""
        self._heard_s = 0.0
        self._engine: EngineProcess | None = None

    def run(self) -> int:
        """Join, follow until the leader ends or this node is told to go; return the exit code.

        Raises:
            PeerTimeout: the leader is not there, or its other followers are not, for `join_s`.
            PeerGone: the leader, or its engine, has ended without a word.
        """
        refuse_insecure_serialization()
        interface_of(self._options.address)
        return asyncio.run(self._main())

    async def _main(self) -> int:
        async with attended("follower", self._options, CollectorRegistry()) as own, self._link() as link:
            own.leaving.on_signals()
            order = await self._join(own, link)
            if order is None:
                return 0
            spec = self._own_spec(order)
            self._epoch = order.epoch
            try:
                hold(Path(spec.run_dir))
                Pulse(spec.pulse_path, create=True)
                self._engine = start_engine(spec)
                own.children["engine"] = self._engine.pid
                own.leaving.in_flight = lambda: int(not own.leaving.is_done)
                return await self._follow(own, link, spec)
            finally:
                if self._engine is not None:
                    self._engine.stop(ENGINE_STOP_S)
                shutil.rmtree(spec.run_dir, ignore_errors=True)

    @contextlib.asynccontextmanager
    async def _link(self) -> AsyncIterator[RpcClient]:
        link = RpcClient(f"tcp://{self._options.leader}", NodeAnswer | Failure)
        try:
            yield link
        finally:
            await link.close()

    # ------------------------------------------------------------ startup

    async def _join(self, own: Attended, link: RpcClient) -> EngineSpec | None:
        """Return what to start; None: told to go before.

        Raises:
            ConfigError: the leader wants another follower, or another version.
        """
        options, end_s = self._options, time.monotonic() + self._options.join_s
        log.info("follower.joining", leader=options.leader, node_rank=options.node_rank)
        while not own.leaving.draining.is_set():
            try:
                answer = await self._beat(link)
                if answer.order is not None:
                    return answer.order
                why = "it waits for other followers"
            except MooncakeError as error:  # also: one that runs with our last life starts again soon
                if not error.retryable:
                    raise
                why = str(error)
            if time.monotonic() > end_s:
                raise PeerTimeout(
                    f"leader {options.leader}: nothing to do after {options.join_s:g} s ({why}): start "
                    "`mooncake prefill` or `decode` there with --nodes, and all its followers"
                )
            own.health.unready(why)
            await own.leaving.pause(BEAT_S)
        await self._say_gone(link, "was told to go")
        own.leaving.is_done = True
        await own.leaving.told.wait()
        return None

    def _own_spec(self, order: EngineSpec) -> EngineSpec:
        """Return the order with what is this node's own, in a fresh private folder."""
        options = self._options
        model = options.model or order.model
        if not is_present(model):
            raise ConfigError(
                f"model = {model!r}: no such folder here, only on the leader: say --model with its place"
            )
        if order.nodes is None:
            raise PeerGone(f"leader {options.leader}: its order is of an engine with one node")
        parent = Path(options.run_dir)
        parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        remove_orphans(parent)
        return msgspec.structs.replace(
            order,
            run_dir=tempfile.mkdtemp(prefix=f"{order.instance_id}-{options.node_rank}-", dir=parent),  # 0700
            epoch=self._life,  # names what the ranks of one host share: never with those of another
            model=model,
            cores=list(options.cores),
            threads=options.threads,
            nodes=msgspec.structs.replace(order.nodes, rank=options.node_rank, address=options.address),
        )

    # ------------------------------------------------------------ main loop

    async def _follow(self, own: Attended, link: RpcClient, spec: EngineSpec) -> int:
        assert self._engine is not None
        rank = self._options.node_rank
        log.info("engine.loading", instance=spec.instance_id, node_rank=rank, pid=self._engine.pid)
        while True:
            if (code := self._engine.poll()) is not None:
                await self._say_gone(link, f"lost its ranks, code {code}")
                log.error("engine.died", instance=spec.instance_id, code=code)
                return 1
            if await self._turn(own, link, spec):
                return 0
            await own.leaving.pause(BEAT_S)

    async def _turn(self, own: Attended, link: RpcClient, spec: EngineSpec) -> bool:
        """Exchange one word with the leader; return whether this is the end."""
        leaving, since_s = own.leaving, self._heard_s
        try:
            answer = await self._beat(link, leaves=leaving.draining.is_set())
        except PeerTimeout:
            silent_s = time.monotonic() - since_s
            own.health.unready(f"its leader has been silent for {silent_s:.0f} s")
            if silent_s > SILENT_S:
                raise PeerGone(
                    f"leader {self._options.leader} has been silent for {silent_s:.0f} s: its engine is lost"
                ) from None
            return leaving.at_once.is_set()
        if answer.phase == FAILED:
            await self._say_gone(link, "ends with its leader")
            raise PeerGone(f"leader {self._options.leader}: the engine of {answer.instance_id} has ended")
        leaving.is_done = leaving.draining.is_set() and answer.may_go
        done = (
            answer.phase == STOPS or leaving.at_once.is_set() or (leaving.is_done and leaving.told.is_set())
        )
        if done:
            assert self._engine is not None
            await self._say_gone(link, "ends with its leader" if answer.phase == STOPS else "was told to go")
            log.info("engine.stopped", instance=spec.instance_id, code=self._engine.stop(ENGINE_STOP_S))
        elif spec.facts_path.exists():
            own.health.started()
            own.health.ready()
        return done

    async def _beat(self, link: RpcClient, *, leaves: bool = False, gone: str = "") -> NodeAnswer:
        beat = NodeBeat(self._options.node_rank, self._life, __version__, self._epoch, leaves, gone)
        answer: NodeAnswer = await link.call(beat, CALL_S)
        self._heard_s = time.monotonic()
        return answer

    async def _say_gone(self, link: RpcClient, why: str) -> None:
        try:
            await self._beat(link, gone=why)
        except MooncakeError as error:  # it notices by itself
            log.debug("follower.goodbye_lost", error=str(error))


def main(options: FollowerOptions) -> int:
    """Run one follower in this process; return its exit code."""
    return Follower(options).run()
