"""Drain jobs of `mooncake_master`: a segment is emptied, its objects stay in the pool."""

import contextlib

import pytest

from mooncake.dropin.master.http import SEGMENTS_MAX

from .conftest import MasterThread, client
from .master_http import ask, ask_json, until

MB = 1 << 20
JOBS = "/api/v1/drain_jobs"
BUSY = {"success": False, "error_code": -1010, "error_message": "UNAVAILABLE_IN_CURRENT_STATUS"}
NO_JOB = {"success": False, "error_code": -1402, "error_message": "JOB_NOT_FOUND"}
NO_ID = {"success": False, "error_code": -600, "error_message": "Missing or invalid job_id"}


@pytest.fixture(scope="module")
def pool():
    """A master of its own, so that nobody else's segments take part."""
    master = MasterThread()
    yield master
    master.stop()


def begin(master, *segments: str, **more) -> tuple[int, dict]:
    return ask_json(master, JOBS, "POST", {"segments": list(segments), **more})


def query(master, job_id: str) -> dict:
    status, job = ask_json(master, f"{JOBS}/query?job_id={job_id}")
    assert status == 200
    return job


def state(master, segment: str) -> str:
    return ask_json(master, f"/api/v1/segments/status?segment={segment}")[1]["status_name"]


def known(master, *segments: str) -> bool:
    return set(segments) <= set(ask(master, "/get_all_segments")[1].split())


def test_a_drained_segment_is_empty_and_every_object_is_elsewhere(pool, monkeypatch) -> None:
    monkeypatch.setattr("kvstore.leader.tasks.ROUND_S", 0.5)  # between its listings of what is left
    with contextlib.closing(client(pool)) as first:
        names = [f"k{n}" for n in range(6)]
        assert first.put_batch(names, [bytes([n]) * MB for n in range(6)]) == 0
        with contextlib.closing(client(pool)) as second:
            until(lambda: known(pool, first.get_hostname(), second.get_hostname()))
            status, answer = begin(pool, first.get_hostname())
            assert (status, answer["success"], answer["status"], answer["error_code"]) == (
                200,
                True,
                "CREATED",
                0,
            )
            job_id = answer["job_id"]
            assert state(pool, first.get_hostname()) in ("DRAINING", "DRAINED")
            assert begin(pool, first.get_hostname()) == (409, BUSY)
            job = until(lambda: (one := query(pool, job_id))["status_name"] != "RUNNING" and one)
            assert {name: job[name] for name in job if not name.endswith("_epoch")} == {
                "success": True, "job_id": job_id, "type": 0, "type_name": "DRAIN", "status": 3,
                "status_name": "SUCCEEDED", "segments": [first.get_hostname()], "succeeded_units": 6,
                "failed_units": 0, "blocked_units": 0, "active_units": 0,
                "migrated_bytes": job["migrated_bytes"], "message": "Drain job finished successfully",
                "error_code": 0, "error_message": "",
            }  # fmt: skip
            assert job["created_at_ms_epoch"] <= job["last_updated_at_ms_epoch"]
            assert 0 <= job["migrated_bytes"] <= 6 * MB
            assert state(pool, first.get_hostname()) == "DRAINED"
            assert begin(pool, first.get_hostname()) == (409, BUSY)
            details = ask_json(pool, "/get_segments_detail")[1]["segments"]
            (left,) = [one["te_endpoint"] for one in details if one["segment_name"] == first.get_hostname()]
            for n, name in enumerate(names):
                (copy,) = second.get_replica_desc(name)
                assert copy.get_memory_descriptor().buffer_descriptor.transport_endpoint != left
                assert second.get(name) == bytes([n]) * MB
            for n in range(8):
                assert first.put(f"new {n}", bytes(5000)) == 0
            copies = [copy for n in range(8) for copy in first.get_replica_desc(f"new {n}")]
            assert len(copies) == 8
            for copy in copies:
                assert copy.get_memory_descriptor().buffer_descriptor.transport_endpoint != left
            cancelled = ask_json(pool, f"{JOBS}/cancel?job_id={job_id}", "POST")
            assert cancelled == (409, BUSY), "it has ended"


def test_a_job_that_is_cancelled_leaves_the_segment_as_any_other(pool) -> None:
    with contextlib.closing(client(pool)) as only:
        only.put("k", b"x" * 5000)  # nowhere to go: the job does not end by itself soon
        segment = only.get_hostname()
        until(lambda: known(pool, segment))
        job_id = begin(pool, segment)[1]["job_id"]
        assert query(pool, job_id)["message"] == "Drain job running"
        assert ask_json(pool, f"{JOBS}/cancel?job_id={job_id}", "POST") == (
            200,
            {"success": True, "job_id": job_id, "status": "CANCELED", "error_code": 0, "error_message": ""},
        )  # fmt: skip
        job = query(pool, job_id)
        assert (job["status"], job["status_name"], job["message"]) == (5, "CANCELED", "Drain job canceled")
        assert state(pool, segment) == "OK"
        assert ask_json(pool, f"{JOBS}/cancel?job_id={job_id}", "POST") == (409, BUSY)
        again = begin(pool, segment)
        assert again[0] == 200, "it may be drained once more"
        ask_json(pool, f"{JOBS}/cancel?job_id={again[1]['job_id']}", "POST")


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"", 400, -600),
        ({}, 400, -600),
        ({"segments": []}, 400, -600),
        ({"segments": "a"}, 400, -600),
        ({"segments": [f"h{n}" for n in range(SEGMENTS_MAX + 1)]}, 400, -600),
        ({"segments": ["nobody:1"]}, 404, -101),
    ],
)
def test_a_job_that_makes_no_sense_is_refused(pool, body, status, code) -> None:
    answered, answer = ask_json(pool, JOBS, "POST", body)
    assert (answered, answer["success"], answer["error_code"]) == (status, False, code)


def test_objects_are_not_sent_to_segments_of_one_s_choice(pool) -> None:
    with contextlib.closing(client(pool)) as only:
        segment = only.get_hostname()
        until(lambda: known(pool, segment))
        status, answer = begin(pool, segment, target_segments=[segment])
        assert (status, answer["error_code"]) == (400, -600)
        assert "target_segments" in answer["error_message"]
        assert begin(pool, segment, target_segments=["nobody:1"])[0] == 404


def test_a_job_is_called_by_its_id(pool) -> None:
    for path, method in (("query", "GET"), ("cancel", "POST")):
        assert ask_json(pool, f"{JOBS}/{path}", method) == (400, NO_ID)
        assert ask_json(pool, f"{JOBS}/{path}?job_id=x", method) == (400, NO_ID)
        assert ask_json(pool, f"{JOBS}/{path}?job_id=1-2", method) == (404, NO_JOB)
    assert ask(pool, JOBS)[0] == 404
