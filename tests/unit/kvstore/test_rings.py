"""Rings: what a writer puts into one is read once, whole and in order, or it does not fit."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.rings import (
    COUNTERS_BYTES,
    FRAME_BYTES_MAX,
    KEPT_S,
    RING_BYTES,
    RINGS,
    RINGS_BYTES,
    Fill,
    Rings,
    RingWriter,
)
from mooncake.core.errors import MooncakeError

LATE_S = 1e9


def memory() -> memoryview:
    return memoryview(bytearray(RINGS_BYTES))


def nonsense(writer: str, error: MooncakeError) -> None:
    pytest.fail(f"{writer}: {error}")


def frame(number: int, name_bytes: int = 10, at_s: float | None = None) -> Fill:
    at_s = float(number) if at_s is None else at_s
    return Fill(at_s, [number], b"k" * 32, b"c" * 16, [b"n" * name_bytes])


def taken(rings: Rings, now_s: float = LATE_S) -> list[int]:
    read = [fill.tickets[0] for fill in rings.read(now_s)]
    rings.done()
    return read


@given(st.lists(st.one_of(st.integers(1, FRAME_BYTES_MAX - 200), st.none()), max_size=60))
@settings(max_examples=60, deadline=None)
def test_frames_of_any_sizes_are_read_once_and_in_order(steps):
    shared = memory()
    rings = Rings(shared, nonsense)
    writer = RingWriter(shared, rings.lend("w", 0.0))
    waiting: list[int] = []
    for number, name_bytes in enumerate(steps):
        if name_bytes is None:
            assert taken(rings) == waiting
            waiting = []
        elif writer.write(frame(number, name_bytes)):
            waiting.append(number)
        else:
            assert waiting, "an empty ring takes every frame"
        assert rings.is_read == (not waiting)
    assert taken(rings) == waiting
    assert rings.is_read


def test_a_frame_that_no_ring_could_take_is_refused():
    shared = memory()
    writer = RingWriter(shared, Rings(shared, nonsense).lend("w", 0.0))
    assert not writer.write(frame(1, FRAME_BYTES_MAX))


def test_frames_of_several_writers_come_in_the_order_of_their_moments():
    shared = memory()
    rings = Rings(shared, nonsense)
    first, second = (RingWriter(shared, rings.lend(name, 0.0)) for name in "ab")
    second.write(frame(1))
    first.write(frame(2))
    first.write(frame(3))
    second.write(frame(4))
    assert taken(rings) == [1, 2, 3, 4]


def test_what_is_written_while_the_rings_are_read_waits_its_turn():
    shared = memory()
    rings = Rings(shared, nonsense)
    writer = RingWriter(shared, rings.lend("a", 0.0))
    writer.write(frame(1))
    writer.write(frame(2))
    assert taken(rings, 1.5) == [1]
    assert not rings.is_read
    assert taken(rings, 2.5) == [2]


def test_readers_see_that_something_waits_until_it_is_done_with():
    shared = memory()
    rings = Rings(shared, nonsense)
    RingWriter(shared, rings.lend("a", 0.0)).write(frame(1))
    rings.read(LATE_S)
    assert not rings.is_read
    rings.done()
    assert rings.is_read


def test_a_ring_is_its_writers_until_it_was_silent_for_long():
    rings = Rings(memory(), nonsense)
    numbers = [rings.lend(f"w{number}", 0.0) for number in range(RINGS)]
    assert sorted(numbers) == list(range(RINGS))
    assert rings.lend("w3", 1.0) == numbers[3]
    assert rings.lend("late", KEPT_S - 0.1) == -1
    rings.end("w5")
    assert rings.lend("late", KEPT_S - 0.1) == numbers[5]
    assert rings.lend("later", KEPT_S) in numbers
    assert rings.lend("w3", KEPT_S) == numbers[3]


@pytest.mark.parametrize("written", [8, RING_BYTES, 2 * RING_BYTES + 8, (1 << 64) - 8])
def test_nonsense_harms_nobody_but_its_writer(written):
    shared = memory()
    told = []
    rings = Rings(shared, lambda writer, _: told.append(writer))
    bad, good = rings.lend("bad", 0.0), rings.lend("good", 0.0)
    shared[COUNTERS_BYTES + RING_BYTES * bad :][:16] = b"\x07\0\0\0nonsense\xff\xff\xff\xff"
    shared[:COUNTERS_BYTES].cast("Q")[bad] = written
    RingWriter(shared, good).write(frame(1))
    assert taken(rings) == [1]
    assert rings.is_read
    assert told == ["bad"]
