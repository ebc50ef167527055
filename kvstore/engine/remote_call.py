"""How a store of another host is reached: requests over the engine's control connection, bytes beside it."""

import time
from collections.abc import Sequence
from typing import Any

import structlog

from kvstore.limits import SERVICE
from kvstore.node.contract import ID_BITS, id_base
from mooncake.core import wire
from mooncake.core.errors import MooncakeError, PeerGone, ProtocolError
from mooncake.core.messages import StoreRecord, StoreReply, StoreRequest
from transfer.engine import TransferEngine
from transfer.model import Opcode

log = structlog.get_logger(__name__)

UNDO_S = 1.0
"""For giving back what a failed call held; the store does it by itself after its own bounds."""

Ranges = Sequence[tuple[int, int]]
"""Where one block lies here: (address, size_bytes) in registered memory, in order."""


class RemoteCall:
    """One start of one store. Thread-safe as its engine is; holds nothing open of its own."""

    def __init__(self, engine: TransferEngine, record: StoreRecord) -> None:
        """`record` has a transfer address; nothing is opened before the first call."""
        self.record = record
        self._engine = engine
        self._epoch_bits = id_base(record.epoch) >> ID_BITS

    def check_epoch(self, ids: Sequence[int]) -> None:
        """Raise PeerGone unless these ids are of the start of the store that `record` describes."""
        if any(one >> ID_BITS != self._epoch_bits for one in ids):
            raise PeerGone(f"store {self.record.node} has been restarted: its record is over")

    def ask(self, request: StoreRequest, kind: type[Any], deadline_s: float) -> Any:
        """Return the store's answer, a `kind`.

        Raises:
            PeerError: the store is away, or answers nonsense; whatever it answers as a failure.
        """
        body = self._engine.ask(self.record.transfer, SERVICE, wire.encode(request), deadline_s)
        reply: Any = wire.decode(body, StoreReply)  # type: ignore[arg-type]
        if not isinstance(reply, kind):
            raise ProtocolError(f"{self.record.transfer}: {type(reply).__name__} instead of {kind.__name__}")
        return reply

    def tell(self, request: StoreRequest) -> None:
        """Send something whose failure changes nothing: the store's own bounds do it then."""
        try:
            self._engine.ask(self.record.transfer, SERVICE, wire.encode(request), UNDO_S)
        except MooncakeError as error:
            what = type(request).__name__
            log.info("pool.not_told", node=self.record.node, request=what, reason=str(error))

    def move(self, op: Opcode, offsets: Sequence[int], places: Sequence[Ranges], end_s: float) -> None:
        """Read blocks of its segment into `places`, or write them from there, until `end_s` (monotonic).

        Raises:
            As TransferEngine.transfer.
        """
        local, remote, sizes = [], [], []
        for offset, ranges in zip(offsets, places, strict=True):
            there = self.record.segment_address + offset
            for address, size in ranges:
                local.append(address)
                remote.append(there)
                sizes.append(size)
                there += size
        if local:
            left_s = max(0.0, end_s - time.monotonic())
            self._engine.transfer(op, self.record.transfer, local, remote, sizes, deadline_s=left_s)
