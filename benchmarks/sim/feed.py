"""What one store says to the Conductor's index: numbered messages, a link that delays and loses. Pure.

The production EventStream decides what is applied, when a snapshot is taken and what is distrusted. Of the
heartbeats only those are simulated that say something: the first, which begins the stream, the one after a
lost message, which shows the gap if nothing else is said until then, and the one after that, which asks anew.
"""

from collections.abc import Callable, Sequence

from benchmarks.sim.timeline import Timeline
from conductor.index import PrefixIndex
from kvstore.directory.event_stream import Action, Apply, Distrust, EventStream, Reset, TakeSnapshot
from kvstore.limits import HEARTBEAT_S
from mooncake.core.messages import StoreEvents


class Feed:
    """From one store to the index, for as long as the Conductor knows of the store."""

    def __init__(
        self,
        time: Timeline,
        node: str,
        index: PrefixIndex,
        delay_s: float,
        is_lost: Callable[[], bool],
        keys: Callable[[], Sequence[bytes]],
    ) -> None:
        """`keys`: all that the store holds, and has told. delay_s 0: what is said is known at once."""
        self._time = time
        self._node = node
        self._index = index
        self._delay_s = delay_s
        self._is_lost = is_lost
        self._keys = keys
        self._epoch = ""
        self._seq = 0
        self._stream: EventStream | None = None
        self.lost = 0
        self.gaps = 0
        self.snapshots = 0

    def start(self, epoch: str) -> None:
        """The Conductor reads the store's record, and subscribes."""
        self.stop()
        self._epoch, self._seq = epoch, 0
        self._stream = EventStream(self._time.now_s)
        self._say(StoreEvents(self._node, epoch, 0, b"", b""))

    def stop(self) -> None:
        """The record is gone."""
        self._stream = None
        self._index.drop(self._node)

    def publish(self, stored: Sequence[bytes], removed: Sequence[bytes]) -> None:
        """Say what has changed."""
        self._seq += 1
        message = StoreEvents(self._node, self._epoch, self._seq, b"".join(stored), b"".join(removed))
        if not self._is_lost():
            self._say(message)
            return
        self.lost += 1
        self._beat_later()

    def _beat_later(self) -> None:
        heartbeat = StoreEvents(self._node, self._epoch, self._seq, b"", b"")
        self._time.at(self._time.now_s + HEARTBEAT_S, lambda: self._say(heartbeat))

    def _say(self, message: StoreEvents) -> None:
        self._later(self._delay_s, lambda stream: stream.on_message(self._time.now_s, message))

    def _later(self, delay_s: float, hear: Callable[[EventStream], list[Action]]) -> None:
        """Let the Conductor hear something, unless it has stopped listening to this life of the store."""
        stream = self._stream

        def heard() -> None:
            if stream is not None and stream is self._stream:
                self._act(hear(stream))

        if delay_s:
            self._time.at(self._time.now_s + delay_s, heard)
        else:
            heard()

    def _act(self, actions: Sequence[Action]) -> None:
        for action in actions:
            match action:
                case TakeSnapshot():
                    self._later(self._delay_s, self._snapshot)
                case Reset(_, pages):
                    self._index.reset(self._node)
                    for page in pages:
                        self._index.apply(self._node, page, b"")
                case Apply(stored, removed):
                    self._index.apply(self._node, stored, removed)
                case Distrust():
                    self.gaps += 1
                    self._index.reset(self._node)
                    self._beat_later()

    def _snapshot(self, _: EventStream) -> list[Action]:
        """The question has come to the store; its answer has the same way to go."""
        self.snapshots += 1
        epoch, seq, page = self._epoch, self._seq, b"".join(self._keys())
        self._later(self._delay_s, lambda stream: stream.on_snapshot(self._time.now_s, epoch, seq, [page]))
        return []
