"""One instance: an engine, its relay, its registration and its metrics, in the relay's process.

Reads startup, main loop, shutdown. The main thread forwards frames; a second thread runs the
asyncio side (registration, admin server, the pool's address, the drain); the engine is a child process.
"""

import asyncio
import contextlib
import functools
import os
import shutil
import signal
import tempfile
import threading
import time
import uuid
from pathlib import Path
from typing import Any

import msgspec
import structlog
from prometheus_client import CollectorRegistry

from mooncake.core.admin import metrics_url
from mooncake.core.attend import Attended, attended
from mooncake.core.errors import MooncakeError, PeerTimeout
from mooncake.core.messages import INSTANCES_PREFIX, STORES_PREFIX, InstanceRecord, RoleOrder, StoreRecord
from mooncake.core.metadata import MetadataStore
from mooncake.core.metadata_metrics import MetadataCollector, metered, process_meter
from mooncake.core.metadata_open import open_metadata
from mooncake.core.metadata_registration import Registration, RegistrationState
from mooncake.core.options import WorkerOptions
from mooncake.core.reload import Reloader, has_terminal, reloading
from mooncake.core.vitals import Turns
from mooncake.worker.engine import refuse_insecure_serialization
from mooncake.worker.gpu_blocks import GpuBlocks
from mooncake.worker.gpu_events import GpuEvents
from mooncake.worker.launch import EngineProcess, start_engine
from mooncake.worker.leader import Leader, leading
from mooncake.worker.leave import drained
from mooncake.worker.metrics import GpuCollector, PulseCollector
from mooncake.worker.nodes import free_port
from mooncake.worker.pulse import Pulse
from mooncake.worker.relay import Relay, make_stop_pipe, request_stop
from mooncake.worker.role import HeldRole
from mooncake.worker.run_dirs import hold, remove_orphans
from mooncake.worker.spec import EngineFacts, EngineSpec, NodeSpec, current_store, write_atomically

log = structlog.get_logger(__name__)

STORE_WAIT_S = 60.0
"""A worker started before its store waits this long for it, then says so."""
ENGINE_STOP_S = 10.0
STORE_POLL_S = 1.0
ENGINE_SILENT_S = 3.0
"""An engine that has given no sign of life for so long gets no requests anyway (conductor.cluster)."""
RELAY_LOOP, ENGINE = "the relay's loop", "the engine"
REQUESTS = ("requests_running", "requests_waiting")
"""Of the pulse: what the engine has."""


async def find_store(metadata: MetadataStore, node: str, wait_s: float) -> StoreRecord:
    """Return the record of this node's store, waiting for it to register.

    Raises:
        PeerTimeout: no store on this node within `wait_s`.
    """
    end_s = time.monotonic() + wait_s
    problem = "no store has registered"
    while time.monotonic() < end_s:
        try:
            for entry in (await metadata.get(STORES_PREFIX)).entries:
                record = msgspec.json.decode(entry.value, type=StoreRecord)
                if record.node == node:
                    return record
        except MooncakeError as error:
            problem = str(error)
        await asyncio.sleep(0.1)
    raise PeerTimeout(
        f"no KV pool on node {node!r} after {wait_s:g} s ({problem}): start `mooncake store` on this host, "
        "or run without a pool (--no-pool)"
    )


def make_spec(options: WorkerOptions, store: StoreRecord | None) -> EngineSpec:
    """Return what the engine is told, in a fresh private folder."""
    parent = Path(options.run_dir)
    parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    remove_orphans(parent)
    run_dir = tempfile.mkdtemp(prefix=f"{options.instance_id}-", dir=parent)  # 0700
    nodes = None
    if options.nodes > 1:
        nodes = NodeSpec(
            count=options.nodes,
            rank=0,
            address=options.address,
            leader=options.address,
            port=free_port(options.address),
        )
    return EngineSpec(
        instance_id=options.instance_id,
        role=options.role,
        epoch=uuid.uuid4().hex[:12],
        run_dir=run_dir,
        model=options.model,
        dtype=options.dtype,
        block_size=options.block_size,
        max_model_len=options.max_model_len,
        kv_memory_bytes=options.kv_memory_bytes,
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens,
        cores=list(options.cores),
        threads=options.threads,
        load_mode=options.load_mode,
        save_decoded=options.save_decoded,
        store=store,
        vllm_args=list(options.vllm_args),
        nodes=nodes,
    )


class Instance:
    """Wires the parts together; `run` returns the process's exit code."""

    def __init__(self, options: WorkerOptions) -> None:
        """Nothing is started yet."""
        self._options = options
        self._reloader: Reloader | None = None
        self._stop_read, self._stop_write = make_stop_pipe()
        self._registered: tuple[asyncio.AbstractEventLoop, Registration] | None = None
        self._attended: tuple[asyncio.AbstractEventLoop, Attended] | None = None
        self._turns: Turns | None = None
        self._control: threading.Thread | None = None
        self._leave = threading.Event()
        self._ready = threading.Event()
        self._record: InstanceRecord | None = None
        self._tells_blocks = False
        self._role = HeldRole(options.role)
        self._gpu = GpuCollector(options.instance_id, self._role_now)

    def run(self) -> int:
        """Start, serve until SIGTERM and the end of what is in flight, or the engine's end, clean up."""
        refuse_insecure_serialization()
        with leading(self._options) as leader:
            return self._run(leader)

    def _run(self, leader: Leader | None) -> int:
        store = None
        if self._options.use_pool:
            store = asyncio.run(self._find_store())
        spec = make_spec(self._options, store)
        hold(Path(spec.run_dir))
        pulse = Pulse(spec.pulse_path, create=True)
        # before any thread of ours: it may fork (not one with followers, whose leader is a thread)
        engine = start_engine(spec)
        relay = Relay(spec, pulse, f"tcp://{self._options.address}:0")
        relay.on_role = self._take_role
        relay.on_turn = self._turned
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._told)
        if not has_terminal():
            signal.signal(signal.SIGHUP, self._hung_up)
        self._start_control(spec, pulse, engine)
        if leader is not None:
            leader.lead(spec, self._is_drained, functools.partial(self._node_lost, engine), self._node_leaves)
        log.info("engine.loading", instance=spec.instance_id, pid=engine.pid, model=spec.model)
        try:
            started_s = time.monotonic()

            def ready(answer: dict[str, Any]) -> None:
                self._record = self._describe(spec, relay, answer)
                self._ready.set()
                log.info(
                    "engine.ready", instance=spec.instance_id, seconds=round(time.monotonic() - started_s, 1)
                )

            why = relay.run(engine.pidfd, self._stop_read, ready)
            return self._finish(why, relay, engine, spec, leader)
        finally:
            engine.stop(ENGINE_STOP_S)
            relay.close()
            self._stop_control()
            shutil.rmtree(spec.run_dir, ignore_errors=True)

    def _finish(
        self, why: str, relay: Relay, engine: EngineProcess, spec: EngineSpec, leader: Leader | None
    ) -> int:
        if why == "stop":
            relay.announce_death(f"{spec.instance_id} is stopping")
            if leader is not None:
                leader.release(failed=False)
            code = engine.stop(ENGINE_STOP_S)
            log.info("engine.stopped", instance=spec.instance_id, code=code)
            return 0
        code = engine.stop(0.0)
        relay.announce_death(f"engine of {spec.instance_id} ended with code {code}")
        log.error("engine.died", instance=spec.instance_id, code=code)
        return 1

    async def _find_store(self) -> StoreRecord:
        metadata = open_metadata(self._options.metadata)
        try:
            return await find_store(metadata, self._options.node, STORE_WAIT_S)
        finally:
            await metadata.close()

    def _describe(self, spec: EngineSpec, relay: Relay, answer: dict[str, Any]) -> InstanceRecord:
        facts = EngineFacts("", 0, {})
        with contextlib.suppress(FileNotFoundError):  # an engine without a pool has no block names
            facts = msgspec.json.decode(spec.facts_path.read_bytes(), type=EngineFacts)
        self._tells_blocks = facts.tells_blocks
        return InstanceRecord(
            instance_id=spec.instance_id,
            role=spec.role,
            epoch=spec.epoch,
            endpoint=relay.endpoint,
            node=self._options.node,
            pid=os.getpid(),
            model=spec.model,
            context_root=facts.context_root,
            context=facts.context,
            block_size=answer["block_size"],
            max_model_len=answer["max_model_len"],
            kv_blocks=answer["num_gpu_blocks"],
            max_num_seqs=answer["max_num_seqs"],
            max_num_batched_tokens=answer["max_num_batched_tokens"],
            block_bytes=facts.block_bytes,
            ranks=facts.ranks,
            vllm_version=answer["vllm_version"],
            metrics_url=metrics_url(
                self._options.admin_port, self._options.admin_host, self._options.address
            ),
        )

    # ------------------------------------------------------------ called by the leader's thread

    def _is_drained(self) -> bool:
        return self._attended is not None and self._attended[1].leaving.is_done

    def _node_leaves(self, why: str) -> None:
        """Drain, as a follower was told to go; it waits for that."""
        if self._attended is not None:
            self._attended[1].leaving.ask(why)

    def _node_lost(self, engine: EngineProcess, why: str) -> None:
        """End an engine that is not whole any more: its ranks may wait for the lost one for half an hour."""
        log.error("engine.node_lost", why=why)
        if self._is_drained():
            request_stop(self._stop_write)
            return
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(engine.pidfd, signal.SIGKILL)

    # ------------------------------------------------------------ the asyncio side

    def _start_control(self, spec: EngineSpec, pulse: Pulse, engine: EngineProcess) -> None:
        self._control = threading.Thread(
            target=lambda: asyncio.run(self._control_main(spec, pulse, engine)), name="control", daemon=True
        )
        self._control.start()

    def _hung_up(self, *_: object) -> None:
        if self._reloader is not None:
            self._reloader.wake()

    def _stop_control(self) -> None:
        self._leave.set()
        if self._control:
            self._control.join(timeout=5.0)

    async def _control_main(self, spec: EngineSpec, pulse: Pulse, engine: EngineProcess) -> None:
        registry = CollectorRegistry()
        registry.register(PulseCollector(pulse, spec.instance_id, self._role_now))
        registry.register(self._gpu)
        registry.register(MetadataCollector(process_meter()))
        metadata = metered(open_metadata(self._options.metadata))
        try:
            async with (
                attended(spec.role, self._options, registry) as own,
                reloading(self._options, registry, own.admin) as self._reloader,
            ):
                own.leaving.in_flight = lambda: sum(int(pulse.read(name)) for name in REQUESTS)
                own.children["engine"] = engine.pid
                self._turns = Turns(own.lag_s, "relay")
                self._attended = asyncio.get_running_loop(), own
                await self._register(spec, pulse, engine, metadata, own)
        finally:
            if self._gpu.events is not None:
                await self._gpu.events.close()
            await metadata.close()

    async def _register(
        self, spec: EngineSpec, pulse: Pulse, engine: EngineProcess, metadata: MetadataStore, own: Attended
    ) -> None:
        """Register once the engine is ready, keep the pool's address, end with the relay or the engine."""
        leaving: asyncio.Task[None] | None = None
        registration: Registration | None = None
        try:
            while not self._leave.is_set() and engine.poll() is None:
                if registration is None and own.leaving.draining.is_set():
                    own.leaving.is_done = True  # nobody knows of it, and nobody will
                    if own.leaving.told.is_set():
                        request_stop(self._stop_write)
                elif self._ready.is_set() and registration is None and self._record is not None:
                    record = self._open_gpu_events(spec, self._record)
                    own.children.update((f"rank {n}", pid) for n, pid in enumerate(pulse.rank_pids()))
                    encode = functools.partial(self._encoded, record)
                    registration = Registration(metadata, INSTANCES_PREFIX + spec.instance_id, encode)
                    registration.start()
                    self._registered = asyncio.get_running_loop(), registration
                    own.look = functools.partial(_tell_health, own, registration, pulse)
                    leaving = asyncio.create_task(self._go(own, registration), name="leaving")
                if spec.store is not None:
                    await self._refresh_store(metadata, spec)
                await asyncio.sleep(0.05 if registration is None else STORE_POLL_S)
        finally:
            if leaving is not None:
                leaving.cancel()
                await asyncio.gather(leaving, return_exceptions=True)
            if registration is not None:
                await registration.close()

    async def _go(self, own: Attended, registration: Registration) -> None:
        """Drain when asked to; when told to, let the relay end, whose registration goes first."""
        await own.leaving.draining.wait()
        self._role.leave()
        registration.refresh()
        await drained(own.leaving)
        await own.leaving.told.wait()
        await registration.close()
        request_stop(self._stop_write)

    def _told(self, number: int, frame: object) -> None:  # noqa: ARG002
        """Take a signal, in the main thread. Before there is anything to drain it ends us at once."""
        if self._attended is None or not self._ready.is_set():
            request_stop(self._stop_write)
            return
        loop, own = self._attended
        try:
            loop.call_soon_threadsafe(own.leaving.tell, signal.Signals(number).name)
        except RuntimeError:  # its loop has ended
            request_stop(self._stop_write)

    def _turned(self, now_s: float, busy_s: float) -> None:
        """Note that the relay's loop has turned, in the main thread."""
        if self._attended is not None:
            _, own = self._attended
            own.health.beat(RELAY_LOOP, now_s)
        if self._turns is not None:
            self._turns.turned(now_s, busy_s)

    def _role_now(self) -> str:
        return self._role.now(time.monotonic())

    def _encoded(self, record: InstanceRecord) -> bytes:
        return msgspec.json.encode(msgspec.structs.replace(record, role=self._role_now()))

    def _take_role(self, order: RoleOrder) -> None:
        """Called by the relay; the next beat, at once, registers with the new role."""
        self._role.order(time.monotonic(), order)
        if self._registered is not None:
            loop, registration = self._registered
            with contextlib.suppress(RuntimeError):  # the loop has ended: nothing is registered any more
                loop.call_soon_threadsafe(registration.refresh)

    def _open_gpu_events(self, spec: EngineSpec, record: InstanceRecord) -> InstanceRecord:
        """Begin to tell what the engine's own cache holds, if it says so; return where."""
        if not self._tells_blocks:
            log.info("gpu_events.off", reason="the engine publishes no KV events, or none to its relay")
            return record
        blocks = GpuBlocks(bytes.fromhex(record.context_root), record.block_size, record.kv_blocks)
        events = GpuEvents(spec, blocks, self._options.address)
        events.start()
        self._gpu.block_bytes, self._gpu.blocks_max = record.block_bytes, record.kv_blocks
        self._gpu.events = events
        endpoint, told = events.endpoints
        return msgspec.structs.replace(record, gpu_endpoint=endpoint, gpu_events=told)

    async def _refresh_store(self, metadata: MetadataStore, spec: EngineSpec) -> None:
        """Keep the store's current address where the engine's pool client looks for it."""
        with contextlib.suppress(MooncakeError):  # metadata away: the last address stays
            record = await find_store(metadata, self._options.node, 0.2)
            if current_store(spec.store_path) != record:
                write_atomically(spec.store_path, msgspec.json.encode(record))


def _tell_health(own: Attended, registration: Registration, pulse: Pulse) -> None:
    """Say how the instance is: the cluster knows it, and its engine gives signs of life."""
    now_s, beat_s = time.monotonic(), pulse.read("pulse_s")
    own.health.beat(ENGINE, beat_s)
    if registration.state is not RegistrationState.REGISTERED:
        own.health.unready("the metadata store is away")
        return
    own.health.started()
    if now_s - beat_s > ENGINE_SILENT_S:
        own.health.unready(f"its engine has been silent for {now_s - beat_s:.0f} s")
    else:
        own.health.ready()


def main(options: WorkerOptions) -> int:
    """Run one instance in this process; return its exit code."""
    return Instance(options).run()
