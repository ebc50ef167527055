import ctypes
import json
import os
from collections.abc import Callable

import pytest

from mooncake.core.errors import RequestError
from mooncake.engine import SharedSegment

SIZE = 10_000


def view(segment: SharedSegment) -> memoryview:
    return memoryview((ctypes.c_ubyte * segment.size()).from_address(segment.base_addr())).cast("B")


def in_child(work: Callable[[], bool]) -> bool:
    """Return what `work` returns in a forked process."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            code = 0 if work() else 1
        finally:
            os._exit(code)
    return os.waitpid(pid, 0)[1] == 0


def test_only_host_memory_is_supported_as_measured_on_upstream() -> None:
    assert SharedSegment.supported()
    assert SharedSegment.supported(mmap=True, host_register=False)
    assert not SharedSegment.supported(mmap=False)
    assert not SharedSegment.supported(mmap=True, host_register=True)
    with pytest.raises(RequestError):
        SharedSegment.create("s", SIZE, 1, 0, host_register=True)


def test_address_and_size_are_known_before_the_others_are_as_measured_on_upstream() -> None:
    segment, blob = SharedSegment.create("s", SIZE, 2, 1)
    assert isinstance(blob, bytes)
    assert segment.base_addr() > 0
    assert (segment.size(), segment.device_addr(), segment.ready()) == (SIZE, 0, False)


def test_every_rank_sees_the_owner_s_bytes_at_its_own_address() -> None:
    ranks = [SharedSegment.create("s", SIZE, 3, rank, owner_rank=1) for rank in range(3)]
    blobs = [blob for _, blob in ranks]
    before = [segment.base_addr() for segment, _ in ranks]
    for segment, _ in ranks:
        segment.complete(blobs)
        assert segment.ready()
    assert [segment.base_addr() for segment, _ in ranks] == before
    assert len(set(before)) == 3
    view(ranks[0][0])[SIZE - 5 :] = b"hello"
    assert all(bytes(view(segment)[SIZE - 5 :]) == b"hello" for segment, _ in ranks)


def test_another_process_sees_them_too() -> None:
    owner, first = SharedSegment.create("s", SIZE, 2, 0)
    view(owner)[:5] = b"hello"

    def other() -> bool:
        rank, second = SharedSegment.create("s", SIZE, 2, 1)
        rank.complete([first.decode(), second.decode()])
        view(rank)[5:10] = b"there"
        return bytes(view(rank)[:5]) == b"hello"

    assert in_child(other)
    assert bytes(view(owner)[:10]) == b"hellothere"


def test_a_rank_that_has_ended_leaves_the_memory_to_the_others() -> None:
    (owner, first), (other, second) = (SharedSegment.create("s", SIZE, 2, rank) for rank in range(2))
    other.complete([first, second])
    view(owner)[:2] = b"ok"
    del owner
    assert bytes(view(other)[:2]) == b"ok"


@pytest.mark.parametrize("change", [{"size_bytes": 1}, {"world_size": 3}, {"owner": 1}, {"name": "t"}])
def test_ranks_that_disagree_are_told_so(change: dict[str, object]) -> None:
    segment, first = SharedSegment.create("s", SIZE, 2, 0)
    _, second = SharedSegment.create("s", SIZE, 2, 1)
    with pytest.raises(RequestError, match="rank 1 disagrees"):
        segment.complete([first, json.dumps(json.loads(second) | change)])
    assert not segment.ready()


def test_a_missing_or_doubled_rank_is_named() -> None:
    segment, first = SharedSegment.create("s", SIZE, 2, 0)
    for blobs in ([first], [first, first]):
        with pytest.raises(RequestError, match="not of all"):
            segment.complete(blobs)
    with pytest.raises(RequestError, match="not a blob"):
        segment.complete([first, b"nonsense"])


def test_an_owner_that_is_gone_or_shows_something_else_is_refused() -> None:
    segment, mine = SharedSegment.create("s", SIZE, 2, 1)
    gone = json.loads(mine) | {"rank": 0, "fd": 1 << 20}
    with pytest.raises(RequestError, match="of its owner"):
        segment.complete([json.dumps(gone), mine])


@pytest.mark.parametrize("numbers", [(0, 1, 0, 0), (SIZE, 0, 0, 0), (SIZE, 2, 2, 0), (SIZE, 2, 0, -1)])
def test_numbers_that_make_no_sense_are_refused(numbers: tuple[int, int, int, int]) -> None:
    with pytest.raises(RequestError):
        SharedSegment.create("s", *numbers)
