"""Copy and move tasks of `mooncake.store`; codes are as measured on upstream's wheel."""

import asyncio

import pytest

from mooncake.core.metadata_client import MetadataServer
from mooncake.dropin.store import tasks
from mooncake.store import MooncakeDistributedStore, QueryTaskResponse, TaskStatus, TaskType
from tests.unit.dropin.conftest import MasterThread, client
from tests.unit.dropin.master_http import until
from tests.unit.dropin.test_store import config_of


@pytest.fixture
def pair(join) -> tuple[MooncakeDistributedStore, MooncakeDistributedStore]:
    """Two clients with a segment each that know each other."""
    first, second = join("4MB", tenant_id="tasks"), join("4MB", tenant_id="tasks")
    for store in (first, second):
        until(lambda: {node(first), node(second)} <= set(store._need().pool.nodes))  # noqa: B023 - at once
    return first, second


def node(store: MooncakeDistributedStore) -> str:
    return store.get_hostname().replace(":", "-")


def ended(store: MooncakeDistributedStore, task_id: tuple[int, int]) -> QueryTaskResponse:
    def asked() -> QueryTaskResponse | None:
        task, code = store.query_task(task_id)
        assert code == 0
        assert task is not None
        return task if task.status in (TaskStatus.SUCCESS, TaskStatus.FAILED) else None

    return until(asked)


def holders(store: MooncakeDistributedStore, key: str) -> set[str]:
    return {place.node for place in store._need().places([key])[0]}


def put(store: MooncakeDistributedStore, key: str, on: MooncakeDistributedStore) -> None:
    assert store.put(key, b"value of " + key.encode(), config_of(preferred_segment=on.get_hostname())) == 0
    assert holders(store, key) == {node(on)}


def test_a_copy_task_ends_with_the_object_on_both_segments(pair) -> None:
    first, second = pair
    put(first, "copied", on=first)
    task_id, code = first.create_copy_task("copied", [second.get_hostname()])
    assert code == 0
    task = ended(second, task_id)  # any client may ask
    assert (task.id, task.type, task.status) == (task_id, TaskType.REPLICA_COPY, TaskStatus.SUCCESS)
    assert 1_600_000_000_000 < task.created_at_ms_epoch <= task.last_updated_at_ms_epoch
    assert task.message == "Task completed successfully"
    assert str(task).startswith(
        f"QueryTaskResponse(id={task_id[0]}-{task_id[1]}, type=0, status=3, created_at="
    )
    assert holders(first, "copied") == {node(first), node(second)}
    assert second.get("copied") == b"value of copied"


def test_a_copy_is_found_by_its_name_when_the_first_one_is_gone(pair) -> None:
    first, second = pair
    put(first, "named/1", on=first)
    task_id, _ = first.create_move_task("named/1", first.get_hostname(), second.get_hostname())
    assert ended(first, task_id).status is TaskStatus.SUCCESS
    first.close()
    while node(first) in second._need().pool.nodes:
        pass
    assert second.remove_by_regex("^named/", True) == 1
    assert second.get("named/1") == b""


def test_a_copy_task_to_several_segments_is_one_task(pair, join) -> None:
    first, second = pair
    third = join("4MB", tenant_id="tasks")
    put(first, "spread", on=first)
    while True:
        task_id, code = first.create_copy_task("spread", [second.get_hostname(), third.get_hostname()])
        if code == 0:  # the directory knows the third one by now
            break
    assert ended(first, task_id).status is TaskStatus.SUCCESS
    assert {node(first), node(second), node(third)} == holders(third, "spread")


def test_a_copy_to_where_it_is_already_succeeds(pair) -> None:
    first, _ = pair
    put(first, "there", on=first)
    task_id, code = first.create_copy_task("there", [first.get_hostname()])
    assert (code, ended(first, task_id).status) == (0, TaskStatus.SUCCESS)


def test_a_move_task_ends_with_the_object_on_its_target_alone(pair) -> None:
    first, second = pair
    put(first, "moved", on=first)
    task_id, code = first.create_move_task("moved", first.get_hostname(), second.get_hostname())
    assert code == 0
    assert (ended(first, task_id).type, ended(first, task_id).status) == (
        TaskType.REPLICA_MOVE,
        TaskStatus.SUCCESS,
    )
    assert holders(first, "moved") == {node(second)}
    assert first.get("moved") == b"value of moved"


def test_tasks_that_make_no_sense_are_refused(pair) -> None:
    first, second = pair
    here, there = first.get_hostname(), second.get_hostname()
    put(first, "k", on=first)
    none = (0, 0)
    assert first.create_copy_task("missing", [there]) == (none, -704)
    assert first.create_move_task("missing", here, there) == (none, -704)
    for targets in ([], ["nowhere:1"], [there, "nowhere:1"], [""]):
        assert first.create_copy_task("k", targets) == (none, -600)
    assert first.create_move_task("k", here, here) == (none, -600)
    assert first.create_move_task("k", "nowhere:1", there) == (none, -600)
    assert first.create_move_task("k", there, here) == (none, -600)
    assert holders(first, "k") == {node(first)}


def test_an_unknown_task_is_minus_1400_also_one_of_a_master_s_earlier_life(pair) -> None:
    first, second = pair
    put(first, "k", on=first)
    (life, number), _ = first.create_copy_task("k", [second.get_hostname()])
    assert first.query_task((life, number + 1)) == (None, -1400)
    assert first.query_task((life + 1, number)) == (None, -1400)
    assert first.query_task((0, 0)) == (None, -1400)
    with pytest.raises(TypeError):
        first.query_task(("1", "2"))


def test_before_setup_there_are_no_tasks() -> None:
    store = MooncakeDistributedStore()
    assert store.create_copy_task("k", ["a:1"]) == ((0, 0), -600)
    assert store.create_move_task("k", "a:1", "b:1") == ((0, 0), -600)
    assert store.query_task((1, 2)) == (None, -600)


class PlainMetadata(MasterThread):
    """Stores and clients find each other here; there is no directory."""

    async def _main(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        server = MetadataServer("tcp://127.0.0.1:*")
        server.start()
        self.address = server.endpoint.removeprefix("tcp://")
        self._ready.set()
        await self._stop.wait()
        await server.close()


def test_a_pool_without_a_directory_says_so_and_a_dead_master_is_minus_900(monkeypatch, capsys) -> None:
    monkeypatch.setattr(tasks, "ASK_S", 0.5)
    plain, master = PlainMetadata(), MasterThread()
    alone, orphan = client(plain, "4MB"), client(master, "4MB")
    try:
        master.stop()
        for store, code in ((alone, -600), (orphan, -900)):
            assert store.put("k", b"1") == 0
            assert store.create_copy_task("k", [store.get_hostname()]) == ((0, 0), code)
            assert store.query_task((1, 2)) == (None, code)
    finally:
        for one in (alone, orphan):
            one.close()
        plain.stop()
        master.stop()
    said = capsys.readouterr()  # which of the two the log goes to is for who configured it first
    assert "start mooncake_master" in said.out + said.err
