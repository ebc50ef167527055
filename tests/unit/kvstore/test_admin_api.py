"""What operators may ask, what they are told, and that nonsense is answered with what to do about it."""

import asyncio
from types import SimpleNamespace

import msgspec
import pytest

from kvstore.directory.directory import Directory
from kvstore.directory.messages import (
    CancelTask,
    CopyKeys,
    DirectoryRecord,
    DrainNode,
    ForgetHot,
    KeepHot,
    MoveKeys,
    TaskProgress,
    TasksAre,
    TaskStarted,
    UndrainNode,
)
from kvstore.directory.metrics import DirectoryMetrics
from kvstore.leader import admin_api
from kvstore.leader.admin_api import KEYS_PAGE_MAX, AdminApi
from kvstore.leader.placement import Placer
from kvstore.leader.task_types import Kind, Progress, State
from kvstore.leader.tasks import Tasks
from mooncake.core.election import LeaderRecord
from mooncake.core.errors import CapacityError, NotLeader, PeerGone, RequestError
from mooncake.core.messages import Ok, StoreRecord, StoreStats, Term

SIZE = 4096
TASK = Progress(5, Kind.DRAIN, State.RUNNING, 10, 3, 0, "", "a", "")


def keys(*numbers: int) -> list[bytes]:
    return [n.to_bytes(32, "big") for n in numbers]


def hexes(*numbers: int) -> list[str]:
    return [key.hex() for key in keys(*numbers)]


class Coordinator:
    """Node a holds 1 and 2 in step, b holds 2 and is not; it leads unless told otherwise."""

    def __init__(self):
        directory = self.directory = Directory()
        directory.members_known = True
        for node, numbers in [("a", (1, 2)), ("b", (2,))]:
            directory.join(0.0, node, f"{node}-1")
            directory.on_snapshot(0.0, node, f"{node}-1", [b"".join(keys(*numbers))])
        self.config = SimpleNamespace(name="d1")
        self.metrics = DirectoryMetrics()
        self.service = SimpleNamespace(metadata_connected=True, see_members=lambda: None)
        self.election = SimpleNamespace(leader=LeaderRecord("d1", "tcp://x"))
        self.leading = SimpleNamespace(term=Term("l", 9, "d1"), tasks=Tasks(directory, Placer()))
        record = StoreRecord("a", "a-1", "e", "v", "", 100 * SIZE, 1, transfer="h:1")
        self.clients = SimpleNamespace(records={"a": record})
        stats = StoreStats(100 * SIZE, 2 * SIZE, 2, *[0] * 7)
        self.polls = SimpleNamespace(stats={"a": stats})
        self.handled = []
        self.error = None

    def now_s(self):
        return 10.0

    async def handle(self, request):
        self.handled.append(request)
        if self.error:
            raise self.error
        match request:
            case TaskProgress(task_id):
                return TasksAre([TASK] if task_id in (None, 5) else [])
            case CopyKeys() | MoveKeys() | DrainNode():
                return TaskStarted(5)
        return Ok()

    async def leader_record(self):
        return DirectoryRecord("d2", "tcp://d2", "http://d2:1", 1)


@pytest.fixture
def coordinator():
    return Coordinator()


@pytest.fixture
def ask(coordinator):
    api = AdminApi(coordinator)

    async def asked(method, path, query=None, body=b""):
        return await api.answer(method, path, query or {}, body)

    return asked


async def test_health_is_200_in_step_and_503_with_every_reason_otherwise(ask, coordinator):
    healthy = await ask("GET", "/health")
    assert (healthy.status, healthy.body["reasons"], healthy.body["leads"]) == (200, [], True)
    coordinator.directory.on_stale(8.0, "b", "silent for 2 s")
    coordinator.service.metadata_connected = False
    ill = await ask("GET", "/health/")
    assert ill.status == 503
    assert ill.body["reasons"] == ["the metadata store does not answer", "node b: silent for 2 s (2.0 s)"]
    coordinator.service.metadata_connected = True
    coordinator.directory.members_known = False
    assert "list of stores" in (await ask("GET", "/health")).body["reasons"][0]


async def test_segments_show_every_node_also_one_that_has_not_reported(ask, coordinator):
    coordinator.directory.on_stale(8.0, "b", "gap")
    a, b = (await ask("GET", "/segments")).body["segments"]
    tier = {"tier": "memory", "capacity_bytes": 100 * SIZE, "used_bytes": 2 * SIZE, "blocks": 2}
    assert a == {
        "node": "a", "epoch": "a-1", "mode": "exact", "lag_s": 0.0, "reason": "",
        "capacity_bytes": 100 * SIZE, "used_bytes": 2 * SIZE, "blocks": 2, "tiers": [tier], "transfer": "h:1",
    }  # fmt: skip
    assert (b["mode"], b["lag_s"], b["reason"], b["used_bytes"]) == ("degraded", 2.0, "gap", None)


async def test_keys_come_in_pages_that_join_without_gap_or_repeat(ask, coordinator):
    coordinator.directory.on_events(0.0, "a", b"".join(keys(*range(3, 30))), b"")
    seen, cursor = [], ""
    while True:
        page = (await ask("GET", "/keys", {"limit": "4", "cursor": cursor})).body
        seen += [row["key"] for row in page["keys"]]
        assert len(page["keys"]) <= 4
        cursor = page["cursor"]
        if not cursor:
            break
    assert seen == hexes(*range(1, 30))


async def test_keys_are_chosen_by_node_and_prefix(ask, coordinator):
    other = bytes.fromhex("abcd") + bytes(30)
    coordinator.directory.on_events(0.0, "b", other, b"")
    page = await ask("GET", "/keys", {"node": "b"})
    assert page.body["keys"] == [
        {"key": hexes(2)[0], "nodes": ["a", "b"]},
        {"key": other.hex(), "nodes": ["b"]},
    ]
    assert [row["key"] for row in (await ask("GET", "/keys", {"prefix": "abcd"})).body["keys"]] == [
        other.hex()
    ]
    assert (await ask("GET", "/keys", {"node": "a", "prefix": "abcd"})).body == {"keys": [], "cursor": ""}


async def test_one_listing_at_a_time(ask, coordinator, monkeypatch):
    free = asyncio.Event()

    async def slow(*_):
        await free.wait()
        return []

    monkeypatch.setattr(admin_api.asyncio, "to_thread", slow)
    first = asyncio.create_task(ask("GET", "/keys"))
    await asyncio.sleep(0)
    assert (await ask("GET", "/keys")).status == 503
    free.set()
    assert (await first).status == 200


async def test_one_key_tells_who_holds_it_and_who_only_may(ask, coordinator):
    coordinator.directory.on_stale(8.0, "b", "gap")
    found = await ask("GET", f"/keys/{hexes(2)[0].upper()}")
    assert found.body["nodes"] == [{"node": "a", "sure": True}, {"node": "b", "sure": False}]
    missing = await ask("GET", f"/keys/{hexes(77)[0]}")
    assert missing.status == 404
    assert "degraded" in missing.body["error"]


@pytest.mark.parametrize(
    ("path", "query", "words"),
    [
        ("/keys", {"limit": "0"}, f"1 to {KEYS_PAGE_MAX}"),
        ("/keys", {"limit": str(KEYS_PAGE_MAX + 1)}, "1 to"),
        ("/keys", {"limit": "many"}, "whole number"),
        ("/keys", {"limit": "9" * 40}, "whole number"),
        ("/keys", {"prefix": "abc"}, "even number"),
        ("/keys", {"prefix": "zz"}, "hexadecimal"),
        ("/keys", {"cursor": "00" * 33}, "a key has 64"),
        ("/keys", {"color": "red"}, "unknown parameter 'color'"),
        ("/keys/12", {}, "64 hexadecimal digits"),
        ("/tasks/x", {}, "whole number"),
    ],
)
async def test_bad_input_is_400_and_says_what_to_write(ask, path, query, words):
    answer = await ask("GET", path, query)
    assert answer.status == 400
    assert words in answer.body["error"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nothing", 404),
        ("GET", "/", 404),
        ("GET", "/keys/a/b", 405),
        ("POST", "/health", 405),
        ("DELETE", "/keys", 405),
        ("GET", "/tasks/drain", 405),
        ("POST", "/tasks/nothing", 405),
        ("GET", "/tasks/6", 404),
        ("DELETE", "/tasks/6", 404),
    ],
)
async def test_what_is_unknown_or_not_offered_is_told_apart(ask, method, path, status):
    answer = await ask(method, path)
    assert (answer.status, bool(answer.body["error"])) == (status, True)


async def test_an_unknown_node_has_no_keys_to_list(ask):
    assert (await ask("GET", "/keys", {"node": "x"})).status == 404


@pytest.mark.parametrize(
    ("path", "body", "request_", "status"),
    [
        ("copy", b'{"keys": ["%s"], "target": "b"}', CopyKeys(keys(1), "b"), 202),
        ("move", b'{"keys": ["%s"], "source": "a", "target": "b"}', MoveKeys(keys(1), "a", "b"), 202),
        ("drain", b'{"node": "a", "size_bytes": 7}', DrainNode("a", 7), 202),
        ("undrain", b'{"node": "a"}', UndrainNode("a"), 200),
        ("hot", b'{"keys": ["%s"], "copies": 2, "size_bytes": 9}', KeepHot(keys(1), 2, 9), 200),
        ("cool", b'{"keys": ["%s"]}', ForgetHot(keys(1)), 200),
    ],
)
async def test_tasks_are_asked_for_with_json(ask, coordinator, path, body, request_, status):
    answer = await ask("POST", f"/tasks/{path}", body=body.replace(b"%s", hexes(1)[0].encode()))
    assert (answer.status, coordinator.handled) == (status, [request_])
    if status == 202:
        assert answer.body == {"task_id": 5}


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("drain", b"", "request body"),
        ("drain", b"{}", "node"),
        ("drain", b'{"node": 3}', "node"),
        ("drain", b'{"node": "a", "size": 3}', "size"),
        ("drain", b'{"node": "a", "size_bytes": -3}', "size_bytes"),
        ("drain", b'{"node": "\xff"}', "request body"),
        ("copy", b'{"keys": ["12"], "target": "b"}', "64 hexadecimal digits"),
        ("move", b'{"keys": [], "target": "b"}', "source"),
    ],
)
async def test_a_wrong_body_is_400_and_asks_nobody(ask, coordinator, path, body, words):
    answer = await ask("POST", f"/tasks/{path}", body=body)
    assert (answer.status, coordinator.handled) == (400, [])
    assert words in answer.body["error"]


async def test_tasks_are_listed_looked_at_and_ended(ask, coordinator):
    (listed,) = (await ask("GET", "/tasks")).body["tasks"]
    one = (await ask("GET", "/tasks/5")).body
    assert listed == one
    assert (one["kind"], one["state"], one["done"], one["source"]) == ("drain", "running", 3, "a")
    assert (await ask("DELETE", "/tasks/5")).status == 200
    assert coordinator.handled[-1] == CancelTask(5)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (NotLeader("ask d2"), 409),
        (RequestError("no"), 400),
        (CapacityError("full"), 503),
        (PeerGone("away"), 503),
    ],
)
async def test_errors_have_their_status_and_the_leader_its_address(ask, coordinator, error, status):
    coordinator.error = error
    answer = await ask("POST", "/tasks/drain", body=b'{"node": "a"}')
    assert (answer.status, answer.body["error"]) == (status, str(error))
    assert answer.body.get("leader", "") == ("http://d2:1" if status == 409 else "")


async def test_metrics_tell_mode_leader_replicas_and_commands(ask, coordinator):
    coordinator.metrics.on_commands("copy", "ok", 3, 0.01)
    coordinator.leading.tasks.keep_hot(keys(1), 2, SIZE)
    coordinator.directory.on_stale(4.0, "b", "gap")
    answer = await ask("GET", "/metrics")
    assert answer.status == 200
    lines = answer.text.decode().splitlines()
    for line in [
        "mooncake_directory_exact 0.0",
        "mooncake_directory_lag_seconds 6.0",
        "mooncake_directory_blocks 2.0",
        "mooncake_directory_entries 2.0",
        "mooncake_directory_nodes 2.0",
        "mooncake_directory_nodes_exact 1.0",
        "mooncake_directory_leader 1.0",
        "mooncake_directory_term 9.0",
        "mooncake_directory_hot_keys 1.0",
        'mooncake_directory_replicas{copies="1"} 1.0',
        'mooncake_directory_replicas{copies="2"} 1.0',
        'mooncake_directory_replicas{copies="4+"} 0.0',
        'mooncake_directory_tasks{kind="drain",state="running"} 0.0',
        'mooncake_directory_commands_total{command="copy",result="ok"} 3.0',
    ]:
        assert line in lines


async def test_replicas_are_not_counted_at_every_scrape(ask, coordinator):
    await ask("GET", "/metrics")
    coordinator.directory.leave("b")
    text = (await ask("GET", "/metrics")).text.decode()
    assert 'mooncake_directory_replicas{copies="2"} 1.0' in text
    coordinator.now_s = lambda: 10.0 + admin_api.CENSUS_S
    text = (await ask("GET", "/metrics")).text.decode()
    assert 'mooncake_directory_replicas{copies="2"} 0.0' in text


async def test_a_node_with_an_ssd_shows_both_tiers(ask, coordinator):
    stats = coordinator.polls.stats["a"]
    coordinator.polls.stats["a"] = msgspec.structs.replace(
        stats, ssd_capacity_bytes=900 * SIZE, ssd_used_bytes=7 * SIZE, ssd_blocks=7
    )
    tiers = (await ask("GET", "/segments")).body["segments"][0]["tiers"]
    assert [tier["tier"] for tier in tiers] == ["memory", "ssd"]
    assert tiers[1] == {"tier": "ssd", "capacity_bytes": 900 * SIZE, "used_bytes": 7 * SIZE, "blocks": 7}
