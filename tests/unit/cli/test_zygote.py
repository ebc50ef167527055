"""The warm process forks children that are whole processes of their own, and never outlive it."""

import asyncio
import os
import signal

import pytest
import pytest_asyncio

from mooncake.core.errors import ConfigError, PeerGone
from mooncake.core.process import alive, wait_gone
from mooncake.up.starter import Zygote

FAKE = "tests.unit.cli.fake_roles"


SHARED = pytest.mark.asyncio(loop_scope="module")


async def start(folder) -> Zygote:
    warm = await Zygote.start(dict(os.environ), folder / "zygote.log", f"{FAKE}:preload")
    await warm.wait_ready()
    return warm


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(tmp_path_factory):
    warm = await start(tmp_path_factory.mktemp("zygote"))
    yield warm
    await warm.close()


async def fork(zygote, tmp_path, function, cores=()):
    return await zygote.fork(
        f"{FAKE}:{function}", "role", b"options", {"COLOUR": "red"}, tmp_path / "child.log", cores
    )


@SHARED
async def test_a_child_has_its_own_session_environment_and_log_and_returns_its_code(shared, tmp_path):
    child = await fork(shared, tmp_path, "echo")
    assert await child.wait() == 5
    assert (tmp_path / "child.log").read_text().split() == ["role", "b'options'", "True", "red"]
    assert (tmp_path / "child.log").stat().st_mode & 0o777 == 0o600


@SHARED
async def test_children_run_at_the_same_time_on_their_cores(shared, tmp_path):
    core = min(os.sched_getaffinity(0))
    children = [await fork(shared, tmp_path, "sleep", cores=[core]) for _ in range(3)]
    assert len({child.pid for child in children}) == 3
    await until_written(tmp_path / "child.log", "sleeping")
    assert os.sched_getaffinity(children[0].pid) == {core}
    for child in children:
        os.kill(child.pid, signal.SIGKILL)
    assert [await child.wait() for child in children] == [-signal.SIGKILL] * 3


@SHARED
async def test_an_exception_in_a_child_is_its_end_not_the_zygotes(shared, tmp_path):
    child = await fork(shared, tmp_path, "crash")
    assert await child.wait() == 1
    assert "RuntimeError: boom" in (tmp_path / "child.log").read_text()
    assert await (await fork(shared, tmp_path, "echo")).wait() == 5


@SHARED
async def test_children_that_end_at_once_are_not_lost(shared, tmp_path):
    children = await asyncio.gather(*(fork(shared, tmp_path, "echo") for _ in range(20)))
    async with asyncio.timeout(10):
        assert await asyncio.gather(*(child.wait() for child in children)) == [5] * 20


async def test_the_end_of_the_zygote_is_the_end_of_its_children_and_is_told(tmp_path):
    zygote = await start(tmp_path)
    child = await fork(zygote, tmp_path, "sleep")
    await until_written(tmp_path / "child.log", "sleeping")
    zygote.process.kill()
    async with asyncio.timeout(5):
        assert await child.wait() == -signal.SIGKILL
    assert await wait_gone(child.pid, 2)
    await zygote.process.wait()
    with pytest.raises(PeerGone, match=r"zygote\.log"):
        await fork(zygote, tmp_path, "echo")
    await zygote.close()


async def test_close_leaves_no_process_behind(tmp_path):
    zygote = await start(tmp_path)
    child = await fork(zygote, tmp_path, "sleep")
    await until_written(tmp_path / "child.log", "sleeping")
    await zygote.close()
    assert await wait_gone(child.pid, 2)
    assert not alive(zygote.process.pid)


@pytest.mark.parametrize(
    ("preload", "match"), [("preload_fails", "no vllm here"), ("preload_starts_a_thread", "--no-zygote")]
)
async def test_imports_that_fail_or_make_forking_unsafe_are_told_with_what_to_do(tmp_path, preload, match):
    warm = await Zygote.start(dict(os.environ), tmp_path / "zygote.log", f"{FAKE}:{preload}")
    with pytest.raises(ConfigError, match=match):
        await warm.wait_ready()
    await warm.close()


async def until_written(path, text):
    for _ in range(200):
        if path.exists() and text in path.read_text():
            return
        await asyncio.sleep(0.02)
    raise AssertionError(f"no {text!r} in {path}")
