"""Leads an engine that spans several nodes: waits for followers, tells them what to start, watches them.

A thread of the instance's process with a loop of its own: it answers while the engine loads, serves and ends.
"""

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator

import msgspec
import structlog
import zmq

from mooncake import __version__
from mooncake.core.config import fail
from mooncake.core.errors import MooncakeError, PeerTimeout
from mooncake.core.options import WorkerOptions
from mooncake.core.rpc import RpcServer
from mooncake.worker.node_messages import FAILED, GATHERS, SERVES, STOPS, NodeAnswer, NodeBeat
from mooncake.worker.nodes import interface_of
from mooncake.worker.roster import Roster
from mooncake.worker.spec import EngineSpec

log = structlog.get_logger(__name__)

LOOK_S = 0.2
BIND_S = 10.0
"""A thread that has not bound a socket by then never will."""
GOODBYE_S = 3.0
"""So long a leader that ends goes on answering: followers ask twice a second, and then know why."""


class Leader:
    """`gather`, then `lead`, then `release`; all from the main thread."""

    def __init__(self, options: WorkerOptions) -> None:
        """Nothing is bound before `start`."""
        self._options = options
        self._roster = Roster(options.nodes, __version__)
        self._lock = threading.Lock()  # roster and answer: of the main thread and of this one's loop
        self._answer = NodeAnswer(GATHERS, options.instance_id)
        self._may_go: Callable[[], bool] = lambda: False
        self._on_lost: Callable[[str], None] = lambda _: None
        self._on_leaves: Callable[[str], None] = lambda _: None
        self._bound = threading.Event()
        self._refused = ""
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="leader", daemon=True)

    def start(self) -> None:
        """Listen.

        Raises:
            ConfigError: the address is not of this host, or the port is taken.
        """
        interface_of(self._options.address)
        self._thread.start()
        if not self._bound.wait(BIND_S) or self._refused:
            raise fail(
                "nodes_port", self._options.nodes_port, f"cannot listen there: {self._refused or 'stuck'}"
            )

    def gather(self) -> None:
        """Return when every follower is there.

        Raises:
            PeerTimeout: one is not after `join_s`.
        """
        options, end_s = self._options, time.monotonic() + self._options.join_s
        log.info("nodes.gathering", nodes=options.nodes, address=options.address, port=options.nodes_port)
        while missing := self._missing():
            if time.monotonic() > end_s:
                raise PeerTimeout(
                    f"no follower {', '.join(map(str, missing))} after {options.join_s:g} s: start `mooncake "
                    f"follower --leader={options.address}:{options.nodes_port} --node-rank={missing[0]}`"
                )
            time.sleep(LOOK_S)

    def _missing(self) -> list[int]:
        with self._lock:
            return self._roster.missing(time.monotonic())

    def lead(
        self,
        spec: EngineSpec,
        may_go: Callable[[], bool],
        on_lost: Callable[[str], None],
        on_leaves: Callable[[str], None],
    ) -> None:
        """Give the order to start.

        Args:
            spec: of the leader's own part; each follower puts in what is its own.
            may_go: whether nothing is in flight any more, for followers that were told to go.
            on_lost: called once, with why the engine is not whole any more.
            on_leaves: called, again and again, while a follower that was told to go waits.
        """
        order = msgspec.structs.replace(spec, run_dir="", cores=[], threads=0)
        with self._lock:
            self._roster.seal(spec.epoch)
            self._may_go, self._on_lost, self._on_leaves = may_go, on_lost, on_leaves
            self._answer = NodeAnswer(SERVES, spec.instance_id, order)

    def release(self, *, failed: bool) -> None:
        """Let followers end, and return when they know or had their time (idempotent)."""
        with self._lock:
            led = self._answer.phase == SERVES
            if self._answer.phase in (GATHERS, SERVES):
                self._answer = NodeAnswer(FAILED if failed else STOPS, self._answer.instance_id)
        end_s = time.monotonic() + GOODBYE_S
        while led and len(self._missing()) < self._options.nodes - 1 and time.monotonic() < end_s:
            time.sleep(LOOK_S)

    def close(self) -> None:
        """Stop listening (idempotent)."""
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join(GOODBYE_S)

    # ------------------------------------------------------------ its thread

    def _run(self) -> None:
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        try:
            endpoint = f"tcp://{self._options.address}:{self._options.nodes_port}"
            server = RpcServer(endpoint, NodeBeat, self._beat)
        except (zmq.ZMQError, MooncakeError) as error:
            self._refused = str(error)
            return
        finally:
            self._bound.set()
        server.start()
        told = False
        try:
            while not self._closing.is_set():
                told = self._look(told)
                await asyncio.sleep(LOOK_S)
        finally:
            await server.close()

    def _look(self, told: bool) -> bool:
        with self._lock:
            if self._answer.phase != SERVES:
                return told
            lost, leaves = self._roster.lost(time.monotonic()), self._roster.leaves
        if lost and not told:
            self._on_lost(lost)
        elif leaves and not lost:
            self._on_leaves(leaves)
        return bool(lost)

    async def _beat(self, beat: NodeBeat) -> NodeAnswer:
        with self._lock:
            self._roster.beat(time.monotonic(), beat)
            return msgspec.structs.replace(self._answer, may_go=self._may_go())


@contextlib.contextmanager
def leading(options: WorkerOptions) -> Iterator[Leader | None]:
    """Yield the leader of an engine's followers, all of them there; None: the engine has one node.

    Raises:
        ConfigError: see Leader.start.
        PeerTimeout: see Leader.gather.
    """
    if options.nodes == 1:
        yield None
        return
    leader = Leader(options)
    try:
        leader.start()
        leader.gather()
        yield leader
    finally:
        leader.release(failed=True)
        leader.close()
