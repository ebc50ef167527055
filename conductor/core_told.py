"""What a gateway has to tell the core, collected over a turn of the loop.

And its last measurements, which a core that takes over learns from: its cost model knows nothing yet.
"""

import asyncio
from collections import deque
from collections.abc import Callable

from conductor.core_messages import TOLD_MAX, Ended, Prefilled, Stepped, Told

RECENT = 64
"""Measurements of each kind: what decides in a cost model that forgets (cost.FORGETTING)."""


class Telling:
    """Lists of one turn; `send` gets them, in order, as one message or a few."""

    def __init__(self, send: Callable[[Told], bool]) -> None:
        """`send` returns False where nobody listens: what is told then is told by the next Join, or lost."""
        self._send = send
        self._told = Told([], [], [], [], [])
        self._soon = False
        self._prefilled: deque[Prefilled] = deque(maxlen=RECENT)
        self._stepped: deque[Stepped] = deque(maxlen=RECENT)
        self._ended: deque[Ended] = deque(maxlen=RECENT)

    def released(self, ticket: int) -> None:
        """A ticket is given back."""
        self._told.released.append(ticket)
        self._flush_soon(len(self._told.released))

    def ended(self, one: Ended) -> None:
        """A request is over."""
        if one.finished:
            self._ended.append(one)
        self._told.ended.append(one)
        self._flush_soon(len(self._told.ended))

    def prefilled(self, one: Prefilled) -> None:
        """A prefill was measured."""
        self._prefilled.append(one)
        self._told.prefilled.append(one)
        self._flush_soon(len(self._told.prefilled))

    def started(self, late_s: float) -> None:
        """A first token came."""
        self._told.late_s.append(late_s)
        self._flush_soon(len(self._told.late_s))

    def stepped(self, one: Stepped) -> None:
        """A step was measured."""
        self._stepped.append(one)
        self._told.stepped.append(one)
        self._flush_soon(len(self._told.stepped))

    def repeat(self) -> None:
        """Tell a core that has just begun what was measured last."""
        self.flush()
        self._send(Told([], list(self._ended), list(self._prefilled), list(self._stepped)))

    def flush(self) -> None:
        """Send now: before something else, or at the end of the turn."""
        self._soon = False
        told = self._told
        if told.released or told.ended or told.prefilled or told.stepped or told.late_s:
            self._told = Told([], [], [], [], [])
            self._send(told)

    def _flush_soon(self, count: int) -> None:
        if count >= TOLD_MAX:
            self.flush()
        elif not self._soon:
            self._soon = True
            asyncio.get_running_loop().call_soon(self.flush)
