"""What a killed instance leaves on its host is removed by the next one, and nothing else is."""

import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mooncake.core.options import WorkerOptions
from mooncake.worker.instance import make_spec
from mooncake.worker.run_dirs import LOCK, hold, remove_orphans

HOLD = """
import os, sys
from pathlib import Path
from mooncake.worker.run_dirs import hold
hold(Path(sys.argv[1]))
if len(sys.argv) > 2 and not os.fork():
    print(os.getpid(), flush=True)
    sys.stdin.read()
    os._exit(0)
if len(sys.argv) <= 2:
    print("held", flush=True)
sys.stdin.read()
"""


def held(path: Path, *args: str) -> "subprocess.Popen[str]":
    """Return another process that holds a folder with something in it, and says so."""
    path.mkdir()
    (path / "pulse").write_bytes(b"x" * 100)
    return subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path), *args],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def line(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def kill(process: "subprocess.Popen[str]") -> None:
    process.kill()
    process.communicate(timeout=30)


def test_the_folder_of_a_killed_instance_goes_and_that_of_a_live_one_stays(tmp_path: Path):
    killed, alive = held(tmp_path / "prefill-0-a"), held(tmp_path / "prefill-1-b")
    try:
        assert (line(killed), line(alive)) == ("held", "held")
        assert remove_orphans(tmp_path) == []
        kill(killed)
        assert remove_orphans(tmp_path) == ["prefill-0-a"]
        assert [path.name for path in tmp_path.iterdir()] == ["prefill-1-b"]
        assert (tmp_path / "prefill-1-b" / "pulse").exists()
    finally:
        kill(killed)
        kill(alive)


def test_a_forked_engine_keeps_the_folder_that_it_still_uses(tmp_path: Path):
    relay = held(tmp_path / "decode-0-a", "fork")
    engine = int(line(relay))
    try:
        relay.kill()
        relay.wait(30)
        assert remove_orphans(tmp_path) == []
    finally:
        os.kill(engine, signal.SIGKILL)
        relay.communicate(timeout=30)  # its output ends with the last of the two
    assert remove_orphans(tmp_path) == ["decode-0-a"]


def test_what_has_no_lock_of_ours_is_left_alone(tmp_path: Path):
    (tmp_path / "store-n.sock").touch()
    (tmp_path / "made-a-moment-ago").mkdir()
    (tmp_path / "half-made").mkdir()
    (tmp_path / "half-made" / f"{LOCK}.new").touch()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "kept").touch()
    (tmp_path / "elsewhere" / LOCK).symlink_to(tmp_path / "outside" / "kept")
    there = sorted(path.name for path in tmp_path.rglob("*"))
    assert remove_orphans(tmp_path) == []
    assert sorted(path.name for path in tmp_path.rglob("*")) == there


def test_a_link_to_a_folder_is_not_followed(tmp_path: Path):
    outside, parent = tmp_path / "outside", tmp_path / "run"
    outside.mkdir()
    parent.mkdir()
    os.close(hold(outside))
    (parent / "link").symlink_to(outside)
    assert remove_orphans(parent) == []
    assert (outside / LOCK).exists()


def test_an_instance_that_starts_removes_what_a_killed_one_left(tmp_path: Path):
    orphan = tmp_path / "prefill-0-x"
    orphan.mkdir()
    os.close(hold(orphan))
    options = WorkerOptions(
        metadata="ipc:///nowhere", instance_id="prefill-0", node="n", model="/m", run_dir=str(tmp_path)
    )
    spec = make_spec(options, None)
    assert [str(path) for path in tmp_path.iterdir()] == [spec.run_dir]


def test_a_folder_never_has_a_lock_that_is_not_held(tmp_path: Path):
    descriptor = hold(tmp_path)
    try:
        assert [path.name for path in tmp_path.iterdir()] == [LOCK]
        with (tmp_path / LOCK).open() as other, pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(descriptor)
