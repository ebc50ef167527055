"""Children never outlive their parent and never hang it. Real processes, but tiny ones."""

import asyncio
import os
import signal
import subprocess
import sys
import time

import pytest

from mooncake.core.errors import ConfigError, PeerGone
from mooncake.core.process import alive, kill_group, pick_cores, set_parent_death_signal, spawn, wait_gone
from mooncake.core.supervise import Ended, GiveUp, Restart, RestartPolicy, Started, Supervised

SLEEP = ["sleep", "60"]
STUBBORN = ["sh", "-c", "trap '' TERM; sleep 60 & echo up; wait; sleep 60"]
WITH_HELPER = ["sh", "-c", "sleep 60 & echo $!; wait"]


async def until(condition) -> None:
    for _ in range(500):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("not within 5 s")


async def first_line(path) -> str:
    for _ in range(200):
        if path.exists() and "\n" in (text := path.read_text()):
            return text.split("\n")[0]
        await asyncio.sleep(0.02)
    raise AssertionError("the child wrote nothing")


async def test_a_child_leads_its_own_session_and_logs_to_a_private_file(tmp_path):
    log_path = tmp_path / "log"
    env = {"GREETING": "hello", "PATH": os.environ["PATH"]}
    child = await spawn(["sh", "-c", "echo $GREETING; pwd >&2; sleep 0.2"], env, tmp_path, log_path)
    assert os.getsid(child.pid) == child.pid
    assert await child.wait() == 0
    assert log_path.read_text().splitlines() == ["hello", str(tmp_path)]
    assert log_path.stat().st_mode & 0o777 == 0o600


async def test_a_child_runs_on_its_cores_only():
    core = min(os.sched_getaffinity(0))
    child = await spawn(SLEEP, cores=[core])
    assert os.sched_getaffinity(child.pid) == {core}
    await kill_group(child.pid, 1)
    await child.wait()


async def test_a_missing_program_is_a_config_error():
    with pytest.raises(ConfigError, match="no-such-program"):
        await spawn(["/no-such-program"])


async def test_sigterm_is_enough_for_a_polite_child():
    child = await spawn(SLEEP)
    assert await kill_group(child.pid, 5) is True
    assert await child.wait() == -signal.SIGTERM
    assert not alive(child.pid)


async def test_a_stubborn_child_is_killed_after_its_grace_and_not_before(tmp_path):
    child = await spawn(STUBBORN, log_path=tmp_path / "log")
    await first_line(tmp_path / "log")
    start_s = time.monotonic()
    assert await kill_group(child.pid, 0.3) is False
    assert 0.3 <= time.monotonic() - start_s < 3
    assert await child.wait() == -signal.SIGKILL


async def test_what_a_child_started_ends_with_it(tmp_path):
    child = await spawn(WITH_HELPER, log_path=tmp_path / "log")
    helper = int(await first_line(tmp_path / "log"))
    assert alive(helper)
    await kill_group(child.pid, 1)
    assert await wait_gone(helper, 2)
    await child.wait()


async def test_killing_what_is_already_gone_is_fine():
    child = await spawn(["true"])
    await child.wait()
    assert await kill_group(child.pid, 0.1) is True


async def test_a_zombie_is_not_alive():
    process = subprocess.Popen(["true"])  # noqa: ASYNC220 - must stay unreaped
    assert await wait_gone(process.pid, 2)
    assert not alive(process.pid)  # nobody has waited for it yet
    process.wait()


PARENT = """
import asyncio, sys
from mooncake.core.process import spawn
async def main():
    child = await spawn(["sleep", "60"])
    print(child.pid, flush=True)
    await asyncio.sleep(60)
asyncio.run(main())
"""


async def test_sigkill_of_the_parent_ends_the_child():
    parent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", PARENT, stdout=asyncio.subprocess.PIPE
    )
    child = int(await parent.stdout.readline())
    assert alive(child)
    parent.kill()
    await parent.wait()
    assert await wait_gone(child, 2)


def test_a_parent_that_is_already_gone_is_noticed():
    """Run in a child: the death signal would stay set in this process."""
    pid = os.fork()
    if pid == 0:
        try:
            set_parent_death_signal(1 << 22)
        except PeerGone:
            os._exit(7)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7


@pytest.mark.parametrize(
    ("count", "available", "expected"),
    [
        (1, [0, 1], [[0, 1]]),
        (2, [0, 1], [[0], [1]]),
        (3, [0, 1], [[0], [1], [0]]),
        (2, [0, 1, 2, 3, 4], [[0, 1], [2, 3]]),
        (2, [5], [[5], [5]]),
    ],
)
def test_engines_get_equal_disjoint_cores_or_share_round_robin(count, available, expected):
    assert [pick_cores(index, count, available) for index in range(count)] == expected


# ---------------------------------------------------------------- supervision


def test_restarts_back_off_then_give_up():
    policy = RestartPolicy(restarts_max=3, window_s=60)
    delays = [policy.on_exit(float(now_s)) for now_s in range(4)]
    assert delays == [Restart(0.5), Restart(1.0), Restart(2.0), GiveUp(4, 60)]


def test_old_ends_are_forgiven():
    policy = RestartPolicy(restarts_max=1, window_s=60)
    assert [policy.on_exit(now_s) for now_s in (0.0, 60.0, 120.0)] == [Restart(0.5)] * 3


async def test_a_child_that_ends_is_started_again_until_patience_ends():
    events = []
    supervised = Supervised("flaky", lambda: spawn(["sh", "-c", "exit 3"]), events.append,
                            RestartPolicy(restarts_max=1, window_s=60))  # fmt: skip
    assert await supervised.run() == GiveUp(2, 60)
    assert [type(event) for event in events] == [Started, Ended, Started, Ended]
    assert events[1].reason == "exit code 3"
    assert supervised.restarts == 1


async def test_a_child_that_cannot_be_started_counts_as_ended():
    events = []
    policy = RestartPolicy(restarts_max=0)
    supervised = Supervised("missing", lambda: spawn(["/no-such-program"]), events.append, policy)
    await supervised.run()
    (event,) = events
    assert "did not start" in event.reason
    assert "/no-such-program" in event.reason


async def test_a_killed_child_is_reported_by_its_signal():
    events = []
    policy = RestartPolicy(restarts_max=0)
    task = Supervised("victim", lambda: spawn(SLEEP), events.append, policy).run()
    await until(lambda: bool(events))
    os.kill(events[0].pid, signal.SIGKILL)
    await task
    assert events[1].reason == "killed by SIGKILL"


async def test_stop_ends_the_child_and_no_event_follows():
    events = []
    supervised = Supervised("steady", lambda: spawn(SLEEP), events.append)
    supervised.run()
    await until(lambda: supervised.pid > 0)
    pid = supervised.pid
    assert await supervised.stop(5)
    assert not alive(pid)
    assert [type(event) for event in events] == [Started]
