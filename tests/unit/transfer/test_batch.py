"""A batch settles once, after its last part; cutting it loses and doubles no byte."""

import asyncio
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mooncake.core.errors import PeerGone, PeerTimeout, RequestError
from transfer.batch import Batch, divide
from transfer.messages import BufferInfo
from transfer.model import Buffer, Call, Failure, Opcode, Slice

MINE = Buffer(1, 1 << 20, 1 << 30, "cpu:0", b"", None)
THEIRS = BufferInfo(2, 1 << 40, 1 << 30, "cpu:0")


def piece(index: int, size: int, at: int = 0) -> Slice:
    return Slice(index, MINE.address + at, THEIRS.address + at, size, MINE, THEIRS)


def batch(deadline_s: float = 60.0) -> Batch:
    return Batch(Opcode.READ, 100, 2, Call(deadline_s))


@given(st.lists(st.integers(1, 100_000), min_size=1, max_size=30), st.integers(1, 6))
def test_dividing_keeps_every_byte_in_order_in_at_most_so_many_parts(sizes, parts):
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    divided = divide([piece(i, n, s) for i, (n, s) in enumerate(zip(sizes, starts, strict=True))], parts)
    assert len(divided) <= parts
    at = 0
    for part in divided:
        for cut in part:
            assert cut.local - MINE.address == cut.remote - THEIRS.address == at
            assert starts[cut.index] <= at < starts[cut.index] + sizes[cut.index]
            at += cut.size_bytes
    assert at == sum(sizes)
    loads = [sum(cut.size_bytes for cut in part) for part in divided]
    assert max(loads) <= -(-sum(sizes) // parts) + 4096


def test_it_settles_after_its_last_part():
    it = batch()
    it.begin(2)
    it.part_ended()
    assert not it.done()
    assert not it.wait(0.0)
    with pytest.raises(PeerTimeout, match="still under way"):
        it.check()
    it.part_ended()
    assert it.done()
    assert it.wait(0.0)
    it.check()


def test_nothing_to_do_is_settled_at_once():
    it = batch()
    it.begin(0)
    assert it.done()


def test_the_first_error_of_each_transfer_counts_and_the_first_transfer_is_raised():
    it = batch()
    it.begin(1)
    it.fail([Failure(piece(7, 1), PeerGone("seven")), Failure(piece(3, 1), RequestError("three"))])
    it.fail([Failure(piece(3, 1), PeerGone("again"))])
    it.part_ended()
    assert {index: str(error) for index, error in it.errors.items()} == {7: "seven", 3: "three"}
    with pytest.raises(RequestError, match="three"):
        it.check()


def test_several_threads_can_wait():
    it, woken = batch(), []
    it.begin(1)
    threads = [threading.Thread(target=lambda: woken.append(it.wait(30))) for _ in range(4)]
    for thread in threads:
        thread.start()
    it.part_ended()
    for thread in threads:
        thread.join(30)
    assert woken == [True] * 4


async def test_it_can_be_awaited():
    it = batch()
    it.begin(1)
    waiting = asyncio.create_task(it.finished())
    await asyncio.sleep(0)
    assert not waiting.done()
    threading.Thread(target=it.part_ended).start()
    assert await asyncio.wait_for(waiting, 30)
    assert await it.finished()  # and once more when it is long settled


def test_callbacks_run_once_also_when_they_come_late():
    it, calls = batch(), []
    it.on_settled(lambda: calls.append("early"))
    it.begin(1)
    it.part_ended()
    it.on_settled(lambda: calls.append("late"))
    assert calls == ["early", "late"]


def test_cancelling_wakes_whoever_is_blocked_and_stops_whoever_looks():
    call, woken = Call(60.0), []
    call.check("x")
    call.add_waker(lambda: woken.append(1))
    removed = lambda: woken.append(2)  # noqa: E731
    call.add_waker(removed)
    call.remove_waker(removed)
    call.cancel()
    call.cancel()
    assert woken == [1]
    assert call.left_s() == 0.0
    with pytest.raises(PeerGone, match="x: cancelled"):
        call.check("x")
    call.add_waker(lambda: woken.append(3))  # too late to be blocked: woken at once
    assert woken == [1, 3]


def test_a_passed_deadline_is_a_timeout():
    with pytest.raises(PeerTimeout, match="deadline"):
        Call(0.0).check("x")
