"""The pure stream decides as the follower of sockets does, and always ends in step with its node."""

import asyncio

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from kvstore.directory import event_stream, follower
from kvstore.directory.event_stream import Apply, Distrust, EventStream, Reset, SnapshotPages, TakeSnapshot
from mooncake.core import rpc, wire
from mooncake.core.errors import PeerTimeout, ProtocolError
from mooncake.core.messages import SnapshotPage, StoreEvents, StoreRecord

RECORD = StoreRecord("n1", "e", "tcp://127.0.0.1:1", "tcp://127.0.0.1:1", "/none", 4096, 1)


def event(seq: int, stored: int | None = None, epoch: str = "e1") -> StoreEvents:
    """A change that stores one key, or a heartbeat."""
    return StoreEvents("n1", epoch, seq, b"" if stored is None else stored.to_bytes(32, "big"), b"")


def live(seq: int = 5) -> EventStream:
    stream = EventStream(0.0, silence_s=2.0)
    stream.on_message(0.0, event(seq))
    stream.on_snapshot(0.0, "e1", seq, [])
    assert stream.live
    return stream


def test_the_first_message_asks_for_a_snapshot_and_later_ones_wait_for_it():
    stream = EventStream(0.0)
    assert stream.on_message(0.0, event(3)) == [TakeSnapshot()]
    assert stream.on_message(0.0, event(4, stored=4)) == []
    assert stream.on_message(0.0, event(5, stored=5)) == []
    actions = stream.on_snapshot(0.1, "e1", 4, [b"page"])
    assert actions == [Reset("e1", (b"page",)), Apply((5).to_bytes(32, "big"), b"")]
    assert stream.live


def test_repeats_are_not_applied_twice():
    stream = live(5)
    assert stream.on_message(0.1, event(5, stored=5)) == []
    assert len(stream.on_message(0.1, event(6, stored=6))) == 1
    assert stream.on_message(0.1, event(6, stored=6)) == []
    assert stream.on_message(0.1, event(4)) == []


@pytest.mark.parametrize("lost", [event(7, stored=7), event(6), event(6, stored=6, epoch="e2")])
def test_a_gap_a_heartbeat_ahead_and_another_epoch_are_distrusted_once(lost):
    stream = live(5)
    (action,) = stream.on_message(0.1, lost)
    assert isinstance(action, Distrust)
    assert not stream.live
    assert stream.tick(9.0) == []
    assert stream.on_message(0.2, event(8)) == [TakeSnapshot()]


def test_silence_is_noticed_and_any_message_counts_as_a_sign_of_life():
    stream = live(5)
    stream.on_message(1.5, event(5))
    assert stream.tick(3.4) == []
    assert stream.tick(3.5) == [Distrust("silent for 2 s")]


def test_an_answer_nobody_waits_for_is_ignored():
    stream = live(5)
    assert stream.on_snapshot(0.1, "e0", 1, [b"old"]) == []
    assert stream.on_failed() == []
    assert stream.live


def test_messages_beyond_the_bound_are_lost_and_seen_as_a_gap(monkeypatch):
    monkeypatch.setattr(event_stream, "KEPT_MAX", 2)
    stream = EventStream(0.0)
    for seq in range(1, 5):
        stream.on_message(0.0, event(seq, stored=seq))
    actions = stream.on_snapshot(0.0, "e1", 1, [])
    assert [type(action) for action in actions] == [Reset, Apply, Apply]
    assert isinstance(stream.on_message(0.0, event(5, stored=5))[0], Distrust)


def test_pages_of_one_moment_make_a_snapshot():
    pages = SnapshotPages()
    assert pages.add(SnapshotPage("e1", 5, b"a" * 64, 77)) == 77
    assert pages.add(SnapshotPage("e1", 5, b"b" * 32, 0)) == 0
    assert (pages.epoch, pages.seq, pages.pages) == ("e1", 5, [b"a" * 64, b"b" * 32])


@pytest.mark.parametrize(
    "page",
    [
        SnapshotPage("e2", 5, b"b" * 32, 0),  # restarted, and has a snapshot of the same number
        SnapshotPage("e1", 6, b"b" * 32, 0),
        SnapshotPage("e1", 5, b"b" * 31, 0),
        SnapshotPage("e1", 5, b"", 9),
        SnapshotPage("e1", 5, b"b" * 32 * 4, 0),
    ],
)
def test_a_page_that_does_not_belong_there_is_refused(page):
    pages = SnapshotPages(keys_max=4)
    pages.add(SnapshotPage("e1", 5, b"a" * 32, 8))
    with pytest.raises(ProtocolError):
        pages.add(page)


# ---------------------------------------------------------------- equal to the follower


class Socket:
    """Hands out what was sent, then nothing for ever."""

    def __init__(self, events, done):
        self.frames = [[wire.encode(one)] for one in events]
        self.done = done

    async def recv_multipart(self):
        if not self.frames:
            self.done.set()
            await asyncio.Event().wait()
        return self.frames.pop(0)


class Client:
    endpoint = "scripted"

    def __init__(self, answers):
        self.answers = list(answers)

    async def call(self, request, deadline_s):
        answer = self.answers.pop(0) if self.answers else None
        if answer is None:
            raise PeerTimeout("scripted")
        return SnapshotPage(answer[0], answer[1], b"", 0)


class Log:
    def __init__(self):
        self.calls = []

    def on_snapshot(self, node, epoch, pages):
        self.calls.append(("reset", epoch))

    def on_events(self, node, stored, removed):
        self.calls.append(("apply", stored))

    def on_stale(self, node, reason):
        self.calls.append(("stale", reason))


async def of_follower(events, answers):
    log, done = Log(), asyncio.Event()
    followed = follower.StoreFollower(RECORD, log)
    socket, client = Socket(events, done), Client(answers)

    async def run():
        while True:
            try:
                await followed._follow(socket, client)
            except follower._OutOfStep:
                continue

    task = asyncio.create_task(run())
    await done.wait()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    return log.calls


class Driven:
    """An EventStream whose snapshots are answered `patience` messages late."""

    def __init__(self, answers, patience):
        self.log, self.stream = Log(), EventStream(0.0)
        self.answers, self.patience = list(answers), patience
        self.waiting: int | None = None

    def carry_out(self, actions):
        for action in actions:
            match action:
                case TakeSnapshot():
                    self.waiting = self.patience
                case Reset(epoch, pages):
                    self.log.on_snapshot("n1", epoch, pages)
                case Apply(stored, removed):
                    self.log.on_events("n1", stored, removed)
                case Distrust(reason):
                    self.log.on_stale("n1", reason)

    def answer(self):
        self.waiting = None
        given = self.answers.pop(0) if self.answers else None
        stream = self.stream
        self.carry_out(stream.on_failed() if given is None else stream.on_snapshot(0.0, *given, [b""]))

    def take(self, one):
        self.carry_out(self.stream.on_message(0.0, one))
        if self.waiting is not None:
            self.waiting -= 1
        while self.waiting is not None and self.waiting < 0:
            self.answer()


def of_stream(events, answers, patience):
    driven = Driven(answers, patience)
    for one in events:
        driven.take(one)
    while driven.waiting is not None:
        driven.answer()
    return driven.log.calls


epochs = st.sampled_from(["e1", "e1", "e1", "e2"])
events_lists = st.lists(
    st.builds(event, st.integers(0, 6), st.none() | st.integers(0, 3), epochs), max_size=14
) | st.builds(lambda n: [event(i, stored=i) for i in range(1, n)], st.integers(2, 12))
answers_lists = st.lists(st.none() | st.tuples(epochs, st.integers(0, 6)), max_size=6)


@settings(max_examples=150, deadline=None)
@given(events=events_lists, answers=answers_lists, patience=st.integers(0, 4))
def test_it_decides_as_the_follower_whenever_the_snapshot_comes(events, answers, patience):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(follower, "RETRY_S", 0.0)
        followed = asyncio.run(of_follower(events, answers))
    assert of_stream(events, answers, patience) == followed


def test_its_bounds_are_the_followers():
    assert event_stream.SILENCE_S == follower.STALE_S
    assert event_stream.KEPT_MAX == rpc.HWM_MESSAGES
