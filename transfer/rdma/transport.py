"""The RDMA transport: one-sided READ and WRITE through verbs, over every NIC that is near.

The life of a slice: `run` cuts it into pieces, spreads them over lanes (connected queue pairs, pooled) on
all preferred NICs, counts what is in flight itself, polls, and sends what a broken lane left behind over
another; what no NIC can carry is handed back, and the engine uses another transport.
"""

from collections.abc import Sequence
from typing import Any

import structlog

from mooncake.core.errors import ConfigError, MooncakeError, PeerGone, RequestError
from mooncake.core.messages import Ok
from transfer.health import PathState
from transfer.messages import BufferInfo, RdmaConnect, RdmaConnected, RdmaDisconnect
from transfer.model import Buffer, Call, Failure, Opcode, Peer, Slice
from transfer.rdma.config import CLOSE_S, Meter, RdmaConfig, no_meter
from transfer.rdma.guests import Guests, Session
from transfer.rdma.lanes import Lanes
from transfer.rdma.memory import HANDLE, ExportDmabuf, Memories, Registration
from transfer.rdma.mover import Clock, Mover
from transfer.rdma.paths import Paths
from transfer.rdma.routes import Places, rail_name
from transfer.verbs import Loaded
from transfer.verbs.api import Nic

log = structlog.get_logger(__name__)


def open_rdma(
    loaded: Loaded,
    config: RdmaConfig,
    places: Places,
    export_dmabuf: ExportDmabuf | None = None,
    meter: Meter = no_meter,
    clock: Clock | None = None,
) -> "RdmaTransport | None":
    """Open the NICs.

    Args:
        loaded: the library (transfer.verbs.load).
        config: settings.
        places: which NICs are near which memory (transfer.topology), or the override of the configuration.
        export_dmabuf: for memory of GPUs; None = it is not reachable by rdma.
        meter: told of everything that is counted.
        clock: for tests.

    Returns:
        None if there is no RDMA here, which is logged and no error.

    Raises:
        ConfigError: `config` names a device that cannot be opened.
    """
    nics: dict[str, Nic] = {}
    verbs = loaded.verbs
    if verbs is None:
        log.info("rdma.off", reason=loaded.reason)
        return None
    found = verbs.devices()
    for spec in config.devices or found:
        device, _, port = spec.partition(":")
        try:
            nic = verbs.open(device, int(port or 1), config.gid_index)
        except ConfigError as error:
            if config.devices:
                for opened in nics.values():
                    opened.close()
                raise
            log.warning("rdma.device_left_out", device=spec, reason=str(error))
            continue
        nics[rail_name(nic.info)] = nic
    if not nics:
        log.info("rdma.off", verbs=verbs.name, reason="none of its devices can be used", devices=found)
        return None
    log.info("rdma.on", verbs=verbs.name, nics=list(nics))
    return RdmaTransport(nics, config, places, export_dmabuf, meter, clock or Clock())


class RdmaTransport:
    """See model.Transport. Made by `open_rdma`."""

    name = "rdma"
    judges_itself = True

    def __init__(
        self,
        nics: dict[str, Nic],
        config: RdmaConfig,
        places: Places,
        export_dmabuf: ExportDmabuf | None,
        meter: Meter,
        clock: Clock,
    ) -> None:
        """Take over opened `nics`, by rail name; the rest is as for `open_rdma`."""
        self._nics = nics
        self._config = config
        self._meter = meter
        self._clock = clock
        self._memories = Memories(nics, export_dmabuf)
        infos = {rail: nic.info for rail, nic in nics.items()}
        self._paths = Paths(infos, places, meter, clock.now_s)
        self._lanes = Lanes(nics, config.endpoints_max, config.depth_max, meter)
        self._guests = Guests(nics, config.guests_max)
        self._closed = False

    # ------------------------------------------------------------ memory

    def register(self, buffer: Buffer) -> None:
        """See Transport: on every NIC; device memory as a dma-buf."""
        self._memories.register(buffer)

    def unregister(self, buffer: Buffer, deadline_s: float) -> None:
        """See Transport: deregistering is the fence."""
        self._memories.unregister(buffer, deadline_s)

    def rkeys(self, buffer: Buffer) -> dict[str, int]:
        """Return what peers need to reach `buffer`, for BufferInfo.rkeys."""
        found: Registration | None = buffer.handles.get(HANDLE)
        return dict(found.rkeys) if found else {}

    def describe(self, info: dict[str, Any]) -> None:
        """See Transport: adds `nics`."""
        info["nics"] = [nic.info for nic in self._nics.values()]

    # ------------------------------------------------------------ initiator

    def reaches(self, peer: Peer, mine: Buffer, theirs: BufferInfo) -> bool:
        """See Transport: both are registered on NICs that can talk, and one such path is not quarantined."""
        found: Registration | None = mine.handles.get(HANDLE)
        if found is None or found.closing or not theirs.rkeys:
            return False
        groups = self._paths.tiers(peer, mine, found.lkeys, theirs)
        return any(self._paths.admits(route.path(peer.info.name)) for group in groups for route in group)

    def lanes(self, peer: Peer) -> int:  # noqa: ARG002 - Transport's signature
        """See Transport."""
        return self._config.lanes

    def run(self, peer: Peer, op: Opcode, slices: Sequence[Slice], call: Call) -> list[Failure]:
        """See Transport. May take FENCE_S longer than the call's deadline, to be sure that nothing lands."""
        taken = self._memories.take(slices)
        try:
            lost = [item for item in slices if item.mine.buffer_id not in taken]
            kept = [item for item in slices if item.mine.buffer_id in taken]
            mover = Mover(
                peer,
                op,
                kept,
                call,
                taken,
                self._lanes,
                self._paths,
                self._config.slice_bytes,
                self._meter,
                self._clock,
            )
            return [Failure(item, _not_registered(item)) for item in lost] + mover.run()
        finally:
            self._memories.give(taken)

    def forget(self, peer: Peer) -> None:
        """See Transport. Lanes that are in use go as soon as their run sees it."""
        self._lanes.forget(peer.info.epoch)

    def states(self) -> dict[str, PathState]:
        """Return the state of every path that ever failed, for metrics."""
        return self._paths.states()

    # ------------------------------------------------------------ owner

    def handle(self, session: Session, message: RdmaConnect | RdmaDisconnect) -> RdmaConnected | Ok:
        """Answer a peer.

        Raises:
            MooncakeError: refused; travels to the peer.
        """
        if isinstance(message, RdmaConnect):
            return RdmaConnected(qp=self._guests.connect(session, message))
        self._guests.disconnect(session, message.links)
        return Ok()

    # ------------------------------------------------------------ end

    def close(self) -> None:
        """See Transport."""
        if self._closed:
            return
        self._closed = True
        self._guests.close()
        if not self._lanes.close(CLOSE_S):
            log.warning("rdma.not_closed", reason="runs are still under way", bound_s=CLOSE_S)
            return
        self._memories.close()
        for nic in self._nics.values():
            nic.close()


def _not_registered(item: Slice) -> MooncakeError:
    if HANDLE in item.mine.handles:
        return RequestError(f"buffer {item.mine.address:#x} is being unregistered")
    return PeerGone(f"buffer {item.mine.address:#x} is not registered with rdma")
