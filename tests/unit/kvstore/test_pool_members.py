"""The pool knows who is there: it follows the metadata store, uses directories, and does without both."""

import asyncio
import contextlib
import os

import msgspec
import pytest

from kvstore.client.model import Outcome
from kvstore.client.pool import Pool
from kvstore.directory.directory import Mode
from kvstore.directory.messages import DIRECTORIES_PREFIX, DirectoryRecord
from kvstore.directory.service import DirectoryService
from kvstore.leader.placement import Room
from mooncake.core.errors import PeerTimeout
from mooncake.core.messages import STORES_PREFIX, StoreRecord
from mooncake.core.metadata_client import MetadataServer
from transfer.config import EngineConfig

PATIENCE_S = 20.0


def distant(record: StoreRecord) -> StoreRecord:
    """The store as another host's pool sees it."""
    return msgspec.structs.replace(record, fd_path="", door="")


async def eventually(condition, limit_s: float = PATIENCE_S) -> None:
    async with asyncio.timeout(limit_s):
        while not condition():  # noqa: ASYNC110 - what is waited for is another process or thread
            await asyncio.sleep(0.02)


def in_step(service: DirectoryService, blocks: int) -> bool:
    """Whether a directory knows every store, and so many keys."""
    nodes = service.directory.status(0.0)
    return len(service.directory) == blocks and all(one.mode is Mode.EXACT for one in nodes)


class World:
    """A metadata server, stores in processes of their own, directories, pools."""

    def __init__(self, start_store, folder):
        self.start_store = start_store
        self.folder = folder
        self.server = MetadataServer("tcp://127.0.0.1:0")
        self.server.start()
        self.closing = contextlib.AsyncExitStack()

    async def store(self, node: str, *, far: bool = False) -> StoreRecord:
        transfer = EngineConfig(run_dir=str(self.folder / f"e-{node}"))
        run_dir = str(self.folder / node)
        config = {"node": node, "run_dir": run_dir, "transfer": transfer}
        record = (await asyncio.to_thread(self.start_store, **config)).record
        await self.register(distant(record) if far else record)
        return record

    async def register(self, record: StoreRecord) -> None:
        await self.server.store.put(STORES_PREFIX + record.node, msgspec.json.encode(record))

    async def directory(self, name: str = "d1") -> DirectoryService:
        made = DirectoryService(self.server.store)
        endpoint = await made.start()
        self.closing.push_async_callback(made.close)
        record = DirectoryRecord(name, endpoint, "", os.getpid())
        await self.server.store.put(DIRECTORIES_PREFIX + name, msgspec.json.encode(record))
        return made

    async def pool(self) -> Pool:
        engine = EngineConfig(run_dir=str(self.folder / "e"))
        pool = await asyncio.to_thread(Pool, self.server.endpoint, engine=engine, start_s=PATIENCE_S)
        self.closing.push_async_callback(asyncio.to_thread, pool.close)
        return pool


@pytest.fixture
async def world(start_store, tmp_path):
    made = World(start_store, tmp_path)
    yield made
    await made.closing.aclose()
    await made.server.close()


async def put(pool: Pool, name: str, data: bytes = b"1", **options):
    return (await asyncio.to_thread(pool.put, [name], [data], deadline_s=PATIENCE_S, **options))[0]


async def get(pool: Pool, name: str) -> bytes | None:
    return (await asyncio.to_thread(pool.get, [name], deadline_s=PATIENCE_S))[0]


async def test_stores_come_and_go_and_the_pool_follows(world):
    first = await world.store("n1")
    pool = await world.pool()
    assert pool.nodes == ["n1"], "known when the pool is there"
    assert (await put(pool, "a")).nodes == ("n1",)
    await world.store("n2", far=True)
    await eventually(lambda: len(pool.nodes) == 2)
    assert (await put(pool, "b", preferred=["n2"])).nodes == ("n2",)
    await world.server.store.delete(STORES_PREFIX + first.node)
    await eventually(lambda: pool.nodes == ["n2"])
    assert [await get(pool, name) for name in "ab"] == [None, b"1"]


async def test_the_pool_goes_on_when_the_metadata_store_is_away(world):
    await world.store("n1")
    pool = await world.pool()
    await world.server.close()
    assert (await put(pool, "a")).ok
    assert await get(pool, "a") == b"1"


async def test_a_metadata_store_that_never_answers_is_an_error_in_time(tmp_path):
    engine = EngineConfig(run_dir=str(tmp_path))
    with pytest.raises(PeerTimeout, match="metadata"):
        await asyncio.to_thread(Pool, "tcp://127.0.0.1:1", engine=engine, start_s=0.2)


async def test_records_that_make_no_sense_are_left_out(world):
    record = await world.store("n1")
    await world.server.store.put(STORES_PREFIX + "n2", b"{}")
    await world.server.store.put(STORES_PREFIX + "n3", msgspec.json.encode(record))
    await world.server.store.put(DIRECTORIES_PREFIX + "d", b"no json")
    pool = await world.pool()
    assert pool.nodes == ["n1"]
    assert (await put(pool, "a")).ok


async def test_a_store_that_only_its_own_host_reaches_is_left_out_elsewhere(world):
    record = await world.store("n1")
    await world.register(msgspec.structs.replace(distant(record), transfer=""))
    assert (await world.pool()).nodes == []


async def test_a_record_of_another_start_behind_the_same_path_is_not_taken_for_it(world):
    record = await world.store("n1")
    await world.register(msgspec.structs.replace(record, epoch="another host's"))
    pool = await world.pool()
    assert not pool._members.stores["n1"].near


async def test_a_restarted_store_is_used_anew(world):
    old = await world.store("n1")
    pool = await world.pool()
    assert (await put(pool, "a")).ok
    os.kill(old.pid, 9)
    await world.store("n1")
    await eventually(lambda: pool._members.stores["n1"].record.epoch != old.epoch)
    assert await get(pool, "a") is None
    assert (await put(pool, "a", b"2")).outcome is Outcome.DONE
    assert await get(pool, "a") == b"2"


async def test_a_directory_is_asked_and_without_it_every_store(world, monkeypatch):
    for node in ("n1", "n2"):
        await world.store(node, far=True)
    directory = await world.directory()
    writer, reader = await world.pool(), await world.pool()
    assert (await put(writer, "a", b"A" * 50_000, preferred=["n2"])).nodes == ("n2",)
    await eventually(lambda: in_step(directory, 1))
    with monkeypatch.context() as patch:
        patch.setattr(type(reader._locator), "_ask_stores", None)  # calling it would be an error
        assert await get(reader, "a") == b"A" * 50_000
        assert await get(reader, "none") is None
        looked = await asyncio.to_thread(reader.look, ["a"], deadline_s=PATIENCE_S)
        assert (looked[0].size_bytes, looked[0].nodes) == (50_000, ("n2",))
    await directory.close()
    assert await get(reader, "a") == b"A" * 50_000
    assert (await put(reader, "a")).outcome is Outcome.EXISTS


async def test_a_directory_s_word_is_a_hint_the_store_decides(world):
    await world.store("n1", far=True)
    directory = await world.directory()
    pool = await world.pool()
    assert (await put(pool, "a")).ok
    await eventually(lambda: in_step(directory, 1))
    directory.directory.on_events(0.0, "n1", b"k" * 32, b"")
    assert (await asyncio.to_thread(pool.get, [b"k" * 32], deadline_s=PATIENCE_S)) == [None]
    assert (await asyncio.to_thread(pool.exists, [b"k" * 32], deadline_s=PATIENCE_S)) == [False]


async def test_where_there_is_a_choice_stores_are_asked_how_full_they_are(world, monkeypatch):
    from kvstore.client import members as pool_members

    monkeypatch.setattr(pool_members, "ROOM_EVERY_S", 0.05)
    for node in ("n1", "n2"):
        await world.store(node, far=True)
    pool = await world.pool()
    rooms: dict[str, Room] = {}
    update = pool._members.placer.update

    def note(room: Room) -> None:
        rooms[room.node] = room
        update(room)

    monkeypatch.setattr(pool._members.placer, "update", note)
    size = 1 << 20
    assert (await put(pool, "a", b"1" * size, preferred=["n1"])).nodes == ("n1",)
    await eventually(lambda: len(rooms) == 2 and rooms["n1"].free_bytes == rooms["n2"].free_bytes - size)
