"""A publisher's messages in their order: what is missing is noticed, never passed over. Pure.

One connection is one life of the publisher, so numbers count within it. A publisher that is connected anew
may be another process with the same numbers: only if it repeats the last message that was taken does its
stream go on; else all that it told is forgotten.
"""

from collections.abc import Callable, Sequence

import structlog
from xxhash import xxh3_128_digest

from conductor.indexer.events import Told, decode_engine, decode_salted, decode_told
from conductor.indexer.source import POOL, Source
from mooncake.core.errors import ProtocolError
from mooncake.worker.gpu_blocks import Event
from mooncake.worker.gpu_events import SEQ_BYTES

log = structlog.get_logger(__name__)

DECODERS: dict[str, Callable[[bytes], Sequence[Event | Told]]] = {
    "vLLM": decode_engine,
    "SGLang": decode_salted,
    POOL: decode_told,
}


class Stream:
    """Feeds a Source from messages of [topic, number, payload]."""

    def __init__(self, source: Source) -> None:
        """Knowing nothing."""
        self.source = source
        self._decode = DECODERS[source.service.kind]
        self.expected = 0
        self.fresh = True  # nothing has been taken: any message may be the first
        self._last = b""
        self.gaps = 0
        self.lost = 0
        self.undecodable = 0
        self.restarts = 0

    def take(self, frames: Sequence[bytes]) -> bool:
        """Apply a message, or pass over one that is known; False = others are missing before it."""
        if len(frames) != 3 or len(frames[1]) != SEQ_BYTES:
            self._distrust(f"a message of {len(frames)} frames")  # the next one shows what was missed
            return True
        seq = int.from_bytes(frames[1], "big")
        if seq > self.expected and not self.fresh:
            return False
        if seq < self.expected:
            return True
        self.expected, self.fresh = seq + 1, False
        self._last = xxh3_128_digest(frames[2])
        try:
            self.source.apply(self._decode(frames[2]))
        except ProtocolError as error:
            self._distrust(str(error))
        return True

    def skip_to(self, frames: Sequence[bytes]) -> None:
        """Go on with a message before which others are missing for good."""
        self.lost += 1
        self.forget(f"messages {self.expected} to {int.from_bytes(frames[1], 'big') - 1} are lost")
        self.take(frames)

    def goes_on(self, frames: Sequence[bytes]) -> bool:
        """Return whether a publisher that is connected anew repeats what was taken last."""
        known = len(frames) == 3 and int.from_bytes(frames[1], "big") + 1 == self.expected
        return known and xxh3_128_digest(frames[2]) == self._last

    def restart(self, reason: str) -> None:
        """Begin anew: it is, or may be, another publisher."""
        self.restarts += 1
        self.forget(reason)

    def forget(self, reason: str) -> None:
        """Rely on nothing that was told."""
        log.warning(
            "indexer.forgotten", service=self.source.service.key, reason=reason, blocks=len(self.source)
        )
        self.source.forget()
        self.expected, self.fresh, self._last = 0, True, b""

    def _distrust(self, reason: str) -> None:
        self.undecodable += 1
        log.warning(
            "indexer.undecodable", service=self.source.service.key, reason=reason, blocks=len(self.source)
        )
        self.source.forget()
