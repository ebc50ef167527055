"""What a process says of a metadata store that is away: one line when it goes, one when it is back.

Everybody who asks the store (registrations, followers, an election) meets the same outage; each of
them goes on trying and says nothing, the client they share tells it.
"""

import time
from collections.abc import Callable
from datetime import UTC, datetime

import structlog

from mooncake.core.errors import ConfigError, MooncakeError, PeerError

log = structlog.get_logger(__name__)

START_S = 30.0
"""Processes start in any order, and one that serves metadata may import vLLM first, which takes 12 s."""
STILL_WORKS = "requests, engines and the pool, as this process knows them"
DOES_NOT = "to join, to leave, to be elected; what changes elsewhere is seen when it is back"


class Outage:
    """Of one store, as one client sees it."""

    def __init__(self, store: str, clock_s: Callable[[], float] = time.time) -> None:
        """`store`: as an operator knows it, without secrets. `clock_s`: seconds since 1970."""
        self._store = store
        self._clock_s = clock_s
        self._since_s = clock_s()  # the last answer, or else the start
        self._known = False  # it has answered before
        self._told = False

    def answered(self) -> None:
        """The store did what it was asked, or said why not."""
        now_s = self._clock_s()
        if self._told:
            log.warning("metadata.back", store=self._store, away_s=round(now_s - self._since_s, 1))
        self._since_s, self._known, self._told = now_s, True, False

    def failed(self, error: MooncakeError) -> None:
        """No server answered, or none lets us in.

        Nothing is told of one that may still be on its way up; a command that asks once says itself
        that it got no answer.
        """
        if not isinstance(error, PeerError | ConfigError):
            self.answered()
        elif not self._told and (self._known or self._clock_s() - self._since_s >= START_S):
            self._told = True
            since = datetime.fromtimestamp(self._since_s, UTC).isoformat(timespec="seconds")
            log.warning(
                "metadata.away",
                store=self._store,
                error=str(error),
                since=since,
                works=STILL_WORKS,
                does_not_work=DOES_NOT,
            )
