"""Reads and writes of one tier's file, and what is done about a sick disk (see kvstore.ssd.tier).

Whoever hands memory or a place in the file to a disk that hangs gets it back late: such a batch is
*parked* until it has ended, and the caller's `settle` is called then, else at once; in either case once.
"""

import math
import threading
from collections.abc import Callable, Sequence

import structlog

from mooncake.core.errors import CapacityError, ConfigError, MooncakeError, PeerTimeout
from transfer.file import FileBatch, FileIO, Request
from transfer.file_disk import DirectFile
from transfer.model import Opcode

log = structlog.get_logger(__name__)

WRITE_ERRORS_MAX = 8
"""Failed writes in a row before writing is given up: one bad sector must not end it, a dead disk must."""
FULL_PAUSE_S = 10.0
"""After a full disk. Each failed put costs room in its segment, and in the end a segment of good objects."""

Errors = dict[int, MooncakeError]
"""Of the requests that failed, by index."""


class Disk:
    """One file and its state of health. Methods may be called from any thread."""

    def __init__(self, file: DirectFile, io: FileIO, deadline_s: float, clock: Callable[[], float]) -> None:
        """Take over `file`; `io` stays the caller's.

        Args:
            file: open for writing.
            io: its threads.
            deadline_s: of one access with its queue.
            clock: any monotonic seconds.
        """
        self.file = file
        self.write_error: MooncakeError | None = None
        self.write_errors = 0
        self._io = io
        self._deadline_s = deadline_s
        self._clock = clock
        self._full_until_s = -math.inf
        self._lock = threading.Lock()
        self._parked: list[tuple[FileBatch, Callable[[], None]]] = []
        self._dirty = False
        self._errors_in_row = 0

    def read(self, requests: Sequence[Request]) -> FileBatch:
        """Begin to read; raises as FileIO.submit. `land` it."""
        return self._io.submit(Opcode.READ, self.file, requests, self._deadline_s)

    def land(self, batch: FileBatch, settle: Callable[[], None]) -> Errors:
        """Wait for a batch and return its errors. After PeerTimeout see `unsettled`."""
        try:
            errors = batch.wait()
        except PeerTimeout as error:
            self.park(batch, settle)
            return dict.fromkeys(range(len(batch.requests)), error)
        settle()
        return errors

    def write(self, requests: Sequence[Request], settle: Callable[[Errors], None]) -> Errors:
        """Write and wait. What hangs has failed, even if it reaches the disk later."""
        try:
            batch = self._io.submit(Opcode.WRITE, self.file, requests, self._deadline_s)
        except MooncakeError as error:
            errors: Errors = dict.fromkeys(range(len(requests)), error)
        else:
            try:
                errors = batch.wait()
            except PeerTimeout as error:
                errors = dict.fromkeys(range(len(requests)), error)
                self.park(batch, lambda: settle(errors))
                return errors
        self._dirty = True
        self._note(list(errors.values()))
        settle(errors)
        return errors

    def sync(self) -> bool:
        """Make all that was written durable; returns False, and counts it, if the disk refuses."""
        if not self._dirty:
            return True
        self._dirty = False
        try:
            self.file.sync()
        except MooncakeError as error:
            self._dirty = True
            self._note([error])
            return False
        return True

    def close(self) -> None:
        """Sync and close."""
        self.sync()
        self.file.close()

    # ------------------------------------------------------------ health

    def refusal(self) -> MooncakeError | None:
        """Return why nothing can be written now; None = it can."""
        if self.write_error is not None:
            return self.write_error
        if self.is_stalled():
            return CapacityError(f"{self.file.path}: the disk hangs")
        if self._clock() < self._full_until_s:
            return CapacityError(f"{self.file.path}: the disk was full less than {FULL_PAUSE_S} s ago")
        return None

    def is_stalled(self) -> bool:
        """Return whether something is parked; ends what no longer hangs."""
        with self._lock:
            ended = [then for batch, then in self._parked if batch.done()]
            self._parked = [pair for pair in self._parked if not pair[0].done()]
            stalled = bool(self._parked)
        for then in ended:
            then()
        return stalled

    @property
    def unsettled(self) -> list[memoryview]:
        """Memory that the disk may still read or write."""
        self.is_stalled()
        with self._lock:
            batches = [batch for batch, _ in self._parked]
        return [view for batch in batches for view in batch.unsettled]

    def park(self, batch: FileBatch, then: Callable[[], None]) -> None:
        """Call `then` when `batch` has ended."""
        log.error("ssd.stalled", path=self.file.path, op=batch.op.name, requests=len(batch.requests))
        with self._lock:
            self._parked.append((batch, then))

    def _note(self, errors: list[MooncakeError]) -> None:
        """Count failed writes; give writing up when they cannot come back."""
        with self._lock:
            self.write_errors += len(errors)
            # a full disk is no sick disk: others' bytes may go
            if any(isinstance(error, CapacityError) for error in errors):
                self._full_until_s = self._clock() + FULL_PAUSE_S
            bad = [error for error in errors if not isinstance(error, CapacityError)]
            self._errors_in_row = self._errors_in_row + len(bad) if errors else 0
            fatal = [e for e in bad if isinstance(e, ConfigError) or self._errors_in_row >= WRITE_ERRORS_MAX]
            if not fatal or self.write_error is not None:
                return
            self.write_error = type(fatal[0])(
                f"{self.file.path}: nothing is written from now on, what is there is still served: {fatal[0]}"
            )
        log.error("ssd.writes_disabled", path=self.file.path, error=str(self.write_error))
