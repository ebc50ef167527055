"""Leases nobody asked for any more: a look-up was given up, its answer comes all the same.

Such a lease would pin its blocks for its whole term. One short-lived thread waits for late answers
(an idle engine makes no calls that could notice them) and gives the leases back.
"""

import contextlib
import threading
import time

from kvstore.engine.link import Call
from kvstore.limits import LEASE_S_MAX
from mooncake.core.errors import MooncakeError
from mooncake.core.messages import Acquired, Release

LOOK_S = 0.05
"""Pause between two looks: a lease that lies idle this long harms nobody."""
ORPHANS_MAX = 256
"""More than these are left to end by their term: the store has other troubles then."""


class Orphans:
    """Takes in look-ups that were given up. Thread-safe."""

    def __init__(self, look_s: float = LOOK_S) -> None:
        """The thread starts with the first orphan and ends with the last."""
        self._look_s = look_s
        self._lock = threading.Lock()
        self._calls: list[Call] = []
        self._thread: threading.Thread | None = None
        self._closing = threading.Event()

    def adopt(self, call: Call) -> bool:
        """Wait for the answer of `call` in its owner's place; False: too many, or closed."""
        with self._lock:
            if self._closing.is_set() or len(self._calls) >= ORPHANS_MAX:
                return False
            self._calls.append(call)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="pool-orphans", daemon=True)
                self._thread.start()
            return True

    def close(self) -> None:
        """Stop (idempotent); what is still open ends by its term."""
        self._closing.set()
        with self._lock:
            thread = self._thread
        if thread is not None:
            thread.join()

    def _run(self) -> None:
        while not self._closing.wait(self._look_s):
            with self._lock:
                calls = list(self._calls)
            done = {id(call) for call in calls if self._settle(call)}
            with self._lock:
                self._calls = [call for call in self._calls if id(call) not in done]
                if not self._calls:
                    self._thread = None
                    return

    @staticmethod
    def _settle(call: Call) -> bool:
        """Return whether nothing is left to wait for."""
        with contextlib.suppress(MooncakeError):  # refused, nonsense or closed: then there is no lease
            if not call.link.poll(call.call_id):
                if time.monotonic() - call.began_s < LEASE_S_MAX:
                    return False
                call.link.forget(call.call_id)
                return True
            reply = call.link.finish(call.call_id, 0.0, Acquired)
            if call.link.is_mine(reply.lease_id):
                call.link.send(Release(reply.lease_id))
        return True
