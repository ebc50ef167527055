"""What was asked for outlives who was asked: one entry per request, under a name that never comes again."""

import msgspec
import pytest

from kvstore.leader import task_book
from kvstore.leader.task_book import BOOK_KEYS_MAX, TASKS_PREFIX, Booked, TaskBook, TaskEntry
from kvstore.leader.task_types import Kind
from mooncake.core.errors import CapacityError, RequestError
from mooncake.core.metadata_memory import MemoryMetadata


def entry(kind=Kind.COPY, numbers=(1,), source="", target="b", size_bytes=0) -> TaskEntry:
    return TaskEntry(kind, [n.to_bytes(32, "big") for n in numbers], source, target, size_bytes)


DRAIN = entry(Kind.DRAIN, (), "a", "", 4096)


@pytest.fixture
async def metadata():
    made = MemoryMetadata()
    yield made
    await made.close()


@pytest.fixture
def book(metadata):
    return TaskBook(metadata)


async def test_the_same_request_is_the_same_entry_and_another_is_another(book):
    first = await book.add(entry())
    assert await book.add(entry()) == first
    others = [await book.add(entry(**what)) for what in [{"numbers": (2,)}, {"target": "c"}, {"source": "x"}]]
    assert len({first, *others}) == 4
    assert await book.entries() == sorted(await book.entries(), key=lambda one: one.task_id)
    assert Booked(first, entry()) in await book.entries()


async def test_a_node_has_one_drain_whatever_its_blocks(book):
    first = await book.add(DRAIN)
    assert await book.add(msgspec.structs.replace(DRAIN, size_bytes=1)) == first
    assert await book.entries() == [Booked(first, DRAIN)]


async def test_a_request_that_was_done_and_comes_again_has_a_new_name(book):
    first = await book.add(entry())
    await book.remove(entry().key)
    assert await book.entries() == []
    assert await book.add(entry()) > first


async def test_two_leaders_that_book_the_same_at_once_mean_the_same_task(metadata):
    one, other = TaskBook(metadata), TaskBook(metadata)
    real = metadata.get

    async def late(prefix):
        metadata.get = real
        listed = await real(prefix)
        assert await other.add(entry())
        return listed

    metadata.get = late
    assert await one.add(entry()) == await other.add(entry())


async def test_too_many_keys_or_entries_are_refused(book, monkeypatch):
    with pytest.raises(RequestError, match="in several parts"):
        await book.add(entry(numbers=range(BOOK_KEYS_MAX + 1)))
    monkeypatch.setattr(task_book, "ENTRIES_MAX", 1)
    first = await book.add(entry())
    assert await book.add(entry()) == first
    with pytest.raises(CapacityError, match="undrain"):
        await book.add(entry(numbers=(2,)))


async def test_the_largest_entry_fits_the_metadata_store(book):
    assert await book.add(entry(numbers=range(BOOK_KEYS_MAX), source="s" * 63, target="t" * 63))


async def test_what_is_no_entry_or_lies_elsewhere_is_left_out(book, metadata):
    await book.add(DRAIN)
    value = (await metadata.get(TASKS_PREFIX)).entries[0].value
    await metadata.put(TASKS_PREFIX + "drain/b", value)
    await metadata.put(TASKS_PREFIX + "copy/x", b"nonsense")
    assert [booked.entry for booked in await book.entries()] == [DRAIN]
