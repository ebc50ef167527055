"""The methods of TransferEngine that move bytes, under upstream's names."""

from collections.abc import Sequence

import structlog

from mooncake.core.errors import MooncakeError, PeerTimeout, RequestError
from mooncake.dropin.engine.answers import (
    DONE,
    FAILED,
    PENDING,
    TIMED_OUT,
    answers,
    check_opcode,
    natural,
    naturals,
    texts,
)
from mooncake.dropin.engine.start import TRANSPORTS, Started
from mooncake.dropin.engine.types import Direction, Read, TransferNotify, Write
from transfer.batch import Batch
from transfer.model import Call, Opcode

log = structlog.get_logger(__name__)


class TransferForms:
    """Between memory of this process and that of a peer; every method may be called from any thread."""

    def _need(self) -> Started:
        raise NotImplementedError

    def transfer_sync_write(
        self,
        target_hostname: str,
        buffer: int,
        peer_buffer_address: int,
        length: int,
        transport_hint: str = "",
    ) -> int:
        """Write to the peer; 0 or a negative code."""
        return self.transfer_sync(
            target_hostname, buffer, peer_buffer_address, length, Write, None, transport_hint
        )

    def transfer_sync_read(
        self,
        target_hostname: str,
        buffer: int,
        peer_buffer_address: int,
        length: int,
        transport_hint: str = "",
    ) -> int:
        """Read from the peer; 0 or a negative code."""
        return self.transfer_sync(
            target_hostname, buffer, peer_buffer_address, length, Read, None, transport_hint
        )

    def transfer_sync(
        self,
        target_hostname: str,
        buffer: int,
        peer_buffer_address: int,
        length: int,
        opcode: Direction,
        notify: TransferNotify | None = None,
        transport_hint: str = "",
    ) -> int:
        """Transfer, then tell the peer `notify`; 0 or a negative code."""
        return self.batch_transfer_sync(
            target_hostname, [buffer], [peer_buffer_address], [length], opcode, notify, transport_hint
        )

    def batch_transfer_sync_write(
        self,
        target_hostname: str,
        buffers: Sequence[int],
        peer_buffer_addresses: Sequence[int],
        lengths: Sequence[int],
        transport_hint: str = "",
    ) -> int:
        """Write all; 0 if all arrived, else a negative code."""
        return self.batch_transfer_sync(
            target_hostname, buffers, peer_buffer_addresses, lengths, Write, None, transport_hint
        )

    def batch_transfer_sync_read(
        self,
        target_hostname: str,
        buffers: Sequence[int],
        peer_buffer_addresses: Sequence[int],
        lengths: Sequence[int],
        transport_hint: str = "",
    ) -> int:
        """Read all; 0 if all arrived, else a negative code."""
        return self.batch_transfer_sync(
            target_hostname, buffers, peer_buffer_addresses, lengths, Read, None, transport_hint
        )

    @answers(FAILED)
    def batch_transfer_sync(
        self,
        target_hostname: str,
        buffers: Sequence[int],
        peer_buffer_addresses: Sequence[int],
        lengths: Sequence[int],
        opcode: Direction,
        notify: TransferNotify | None = None,
        transport_hint: str = "",
    ) -> int:
        """Transfer all, then tell the peer `notify`; 0 if all arrived, else a negative code."""
        check_opcode(opcode)
        texts(target_hostname, transport_hint)
        columns = naturals(buffers), naturals(peer_buffer_addresses), naturals(lengths)
        started = self._need()
        with started.at(target_hostname) as address:
            deadline_s = started.env.transfer_s
            started.engine.peer(address, min(deadline_s, started.env.connect_s))
            started.engine.transfer(
                Opcode(opcode), address, *columns, deadline_s=deadline_s, transport=_hint(transport_hint)
            )
            if notify is not None:
                started.engine.notify(address, notify.name, notify.msg)
        return 0

    def transfer_submit_write(
        self,
        target_hostname: str,
        buffer: int,
        peer_buffer_address: int,
        length: int,
        transport_hint: str = "",
    ) -> int:
        """Begin a write; return its id for `transfer_check_status`, 0 = refused."""
        return self.batch_transfer_async(
            target_hostname, [buffer], [peer_buffer_address], [length], Write, transport_hint
        )

    def batch_transfer_async_write(
        self,
        target_hostname: str,
        buffers: Sequence[int],
        peer_buffer_addresses: Sequence[int],
        lengths: Sequence[int],
        transport_hint: str = "",
    ) -> int:
        """Begin writes; return their id for `get_batch_transfer_status`, 0 = refused."""
        return self.batch_transfer_async(
            target_hostname, buffers, peer_buffer_addresses, lengths, Write, transport_hint
        )

    def batch_transfer_async_read(
        self,
        target_hostname: str,
        buffers: Sequence[int],
        peer_buffer_addresses: Sequence[int],
        lengths: Sequence[int],
        transport_hint: str = "",
    ) -> int:
        """Begin reads; return their id for `get_batch_transfer_status`, 0 = refused."""
        return self.batch_transfer_async(
            target_hostname, buffers, peer_buffer_addresses, lengths, Read, transport_hint
        )

    @answers(0)
    def batch_transfer_async(
        self,
        target_hostname: str,
        buffers: Sequence[int],
        peer_buffer_addresses: Sequence[int],
        lengths: Sequence[int],
        opcode: Direction,
        transport_hint: str = "",
    ) -> int:
        """Begin transfers; return their id, 0 = refused. The memory stays in use until they have ended."""
        check_opcode(opcode)
        texts(target_hostname, transport_hint)
        columns = naturals(buffers), naturals(peer_buffer_addresses), naturals(lengths)
        started = self._need()
        if not len(columns[0]) == len(columns[1]) == len(columns[2]):
            raise RequestError("as many addresses as lengths, on both sides")
        op, deadline_s = Opcode(opcode), started.env.transfer_s
        with started.at(target_hostname) as address:
            started.engine.peer(address, min(deadline_s, started.env.connect_s))
            try:
                batch = started.engine.submit(
                    op, address, *columns, deadline_s=deadline_s, transport=_hint(transport_hint)
                )
            except RequestError as error:  # a range that is not registered: upstream's batches fail later
                batch = Batch(op, 0, 1, Call(0.0))
                batch.errors[0] = error
                batch.begin(0)
        return started.keep(batch)

    @answers(FAILED)
    def transfer_check_status(self, arg0: int, /) -> int:
        """Return 1 = done, 0 = under way, -1 = failed, -2 = timed out. An end is reported once."""
        started = self._need()
        number = natural(arg0)
        batch = started.batch(number)
        if not batch.done():
            return PENDING
        started.forget(number)
        for error in batch.errors.values():
            log.error("mooncake.engine: transfer failed", batch=number, reason=str(error))
            return TIMED_OUT if isinstance(error, PeerTimeout) else FAILED
        return DONE

    @answers(FAILED)
    def get_batch_transfer_status(self, arg0: Sequence[int], /) -> int:
        """Wait until all these batches have ended; 0 = all done, -1 = one failed. Ends are reported once."""
        started = self._need()
        numbers = naturals(arg0)
        code = 0
        for number, batch in [(number, started.batch(number)) for number in numbers]:
            if not batch.wait():
                batch.cancel()
            else:
                started.forget(number)
            try:
                batch.check()
            except MooncakeError as error:
                log.error("mooncake.engine: transfer failed", batch=number, reason=str(error))
                code = FAILED
        return code


def _hint(text: str) -> str:
    """Return the transport to prefer; upstream takes any text and ignores what it does not know."""
    return text if text in TRANSPORTS[""] else ""
