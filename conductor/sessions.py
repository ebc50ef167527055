"""Which instances served a session last: a soft preference beside predictions. Pure.

A session is what a client says it is (x-session-id). What its turns share, the prefix index knows better,
so the preference is a bonus of some milliseconds: it decides between instances that look alike, above all
while the index knows nothing of the session's blocks (events on their way, or lost).
"""

from collections import OrderedDict

import msgspec

SESSIONS_MAX = 65_536
"""Remembered; about 20 MB. The one that was used least lately is forgotten first."""


class Served(msgspec.Struct, frozen=True):
    """Ids of instances; "" = none yet."""

    prefill: str = ""
    decode: str = ""


NOBODY = Served()


class Sessions:
    """Bounded; constant time per call."""

    def __init__(self, sessions_max: int = SESSIONS_MAX) -> None:
        """Empty."""
        self._max = sessions_max
        self._served: OrderedDict[str, Served] = OrderedDict()

    def last(self, session: str) -> Served:
        """Return who served it last; "" is no session."""
        return self._served.get(session, NOBODY)

    def served(self, session: str, prefill: str, decode: str) -> None:
        """A turn was planned there."""
        if not session:
            return
        self._served[session] = Served(prefill, decode)
        self._served.move_to_end(session)
        if len(self._served) > self._max:
            self._served.popitem(last=False)

    def __len__(self) -> int:
        return len(self._served)
