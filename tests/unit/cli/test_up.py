"""A whole cluster of light fakes around the real store: starts, restarts, gives up, stops."""

import asyncio
import contextlib
import io
import os
import signal
import socket
import stat
import sys
import time
import urllib.request
from pathlib import Path

import msgspec
import pytest
from rich.console import Console

from mooncake.core.errors import ConfigError, MooncakeError, PeerGone
from mooncake.core.process import alive, wait_gone
from mooncake.core.shared_port import check_port
from mooncake.up.cluster import Cluster, Entry, prepare_run_dir
from mooncake.up.metrics import with_admin_ports
from mooncake.up.plan import UpOptions, base_env, make_plan
from mooncake.up.run import ready_text
from mooncake.up.show import Board
from tests.unit.cli.fake_roles import FAKE_STORE_ENV

FAKE = "tests.unit.cli.fake_roles"
KEY = "k" * 20


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def fetch(url: str) -> str:
    with urllib.request.urlopen(url, timeout=2) as reply:
        return reply.read().decode()


class Up:
    """A cluster of fakes; `real_store` starts the store as `mooncake up` does, which takes a second."""

    def __init__(
        self,
        run_dir: Path,
        use_zygote: bool = True,
        preload: str = "preload",
        real_store: bool = False,
        **wish,
    ) -> None:
        self.run_dir = run_dir
        prepare_run_dir(run_dir)
        self.port = free_port()
        options = UpOptions(
            model="/m", served_name="m", run_dir=str(run_dir), port=self.port, pool_bytes=4 << 20,
            api_key=KEY, **wish,
        )  # fmt: skip
        self.options = options = with_admin_ports(options)
        self.output = io.StringIO()
        board = Board(Console(file=self.output, width=200))
        self.stop = asyncio.Event()
        plan = make_plan(options, [0])
        if not real_store:
            plan[0] = msgspec.structs.replace(plan[0], heavy=True, env={FAKE_STORE_ENV: "1"})
        env = base_env(os.environ, True)
        self.cluster = Cluster(plan, run_dir, env, board, use_zygote, Entry(FAKE, f"{FAKE}:{preload}"))

    async def ready(self) -> bool:
        await self.cluster.start()
        async with asyncio.timeout(20):
            return await self.cluster.wait_ready(self.stop, "127.0.0.1", self.port)

    def pids(self) -> list[int]:
        return [supervised.pid for supervised in self.cluster._supervised.values()]

    async def shown(self, text: str) -> None:
        for _ in range(500):
            if text in self.output.getvalue():
                return
            await asyncio.sleep(0.02)
        raise AssertionError(f"no {text!r} in:\n{self.output.getvalue()}")

    def log(self, name: str) -> str:
        return self.cluster.log_path(name).read_text()


@contextlib.asynccontextmanager
async def running(run_dir, **options):
    up = Up(run_dir, **options)
    try:
        yield up
    finally:
        pids = up.pids()
        await up.cluster.close()
        assert not [pid for pid in pids if pid and alive(pid)]


@pytest.fixture
def run_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("r") / "x"  # short: unix sockets


@pytest.mark.parametrize("use_zygote", [True, False])
async def test_a_cluster_gets_ready_shows_how_and_stops_in_order(run_dir, use_zygote):
    async with running(run_dir, use_zygote=use_zygote, real_store=True) as up:
        assert await up.ready()
        shown = up.output.getvalue()
        for name in ("store", "conductor", "prefill-0", "decode-0"):
            assert f"{name:<12} ready" in shown
        url = f"http://127.0.0.1:{up.options.admin_ports['store']}/metrics"
        assert 'mooncake_store_capacity_bytes{node="local"}' in await asyncio.to_thread(fetch, url)
        assert up.log("conductor").startswith("key True in options False")
    ends = [float(up.log(name).split()[-1]) for name in ("conductor", "prefill-0")]
    assert ends == sorted(ends)
    assert "stopped" in up.output.getvalue().splitlines()[-1]
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in run_dir.iterdir() if path.is_file()}
    assert {mode for name, mode in modes.items() if name.endswith((".log", ".options"))} == {0o600}


@pytest.mark.chaos
async def test_a_killed_engine_is_reported_and_comes_back(run_dir, monkeypatch):
    monkeypatch.setattr("mooncake.core.supervise.BACKOFF_S_MIN", 0.05)
    async with running(run_dir) as up:
        await up.ready()
        victim = up.cluster._supervised["decode-0"].pid
        os.kill(victim, signal.SIGKILL)
        await up.shown("restarting: killed by SIGKILL")
        await up.shown("restart 1")
        await up.shown(f"ready: pid {up.cluster._supervised['decode-0'].pid}")
        assert "decode-0" in up.cluster._registered
        assert up.cluster._supervised["decode-0"].pid != victim


@pytest.mark.chaos
async def test_gateways_share_the_port_and_one_that_is_killed_comes_back(run_dir, monkeypatch):
    monkeypatch.setattr("mooncake.core.supervise.BACKOFF_S_MIN", 0.05)
    async with running(run_dir, gateways=2) as up:
        assert await up.ready()
        first, second = (up.cluster._supervised[f"gateway-{i}"].pid for i in range(2))

        async def served() -> set[int]:
            url = f"http://127.0.0.1:{up.port}"
            return {int(await asyncio.to_thread(fetch, url)) for _ in range(40)}

        assert await served() == {first, second}
        os.kill(first, signal.SIGKILL)
        await up.shown("restarting: killed by SIGKILL")
        await up.shown("restart 1")
        restarted = up.cluster._supervised["gateway-0"].pid
        await up.shown(f"ready: pid {restarted}")
        assert await served() == {restarted, second}


@pytest.mark.chaos
async def test_the_death_of_the_core_takes_no_gateway_along(run_dir, monkeypatch):
    monkeypatch.setattr("mooncake.core.supervise.BACKOFF_S_MIN", 0.05)
    async with running(run_dir, gateways=1) as up:
        assert await up.ready()
        gateway = up.cluster._supervised["gateway-0"].pid
        os.kill(up.cluster._supervised["core"].pid, signal.SIGKILL)
        await up.shown("restart 1")
        await up.shown(f"core         ready: pid {up.cluster._supervised['core'].pid}")
        assert int(await asyncio.to_thread(fetch, f"http://127.0.0.1:{up.port}")) == gateway


@pytest.mark.chaos
async def test_an_engine_that_keeps_dying_ends_up_with_its_log_and_last_words(run_dir, monkeypatch):
    monkeypatch.setattr("mooncake.core.supervise.BACKOFF_S_MIN", 0.01)
    async with running(run_dir, vllm_args=["die=7"]) as up:
        with pytest.raises(PeerGone, match="4 time") as caught:
            await up.ready()
        assert "last words" in str(caught.value)
        assert ".log" in str(caught.value)
        assert "exit code 7" in up.output.getvalue()


async def test_a_bad_setting_is_not_tried_again(run_dir):
    async with running(run_dir, vllm_args=["die=2"]) as up:
        with pytest.raises(PeerGone, match="1 time"):
            await up.ready()


@pytest.mark.chaos
async def test_the_end_of_the_warm_process_ends_up_and_says_so(run_dir):
    async with running(run_dir) as up:
        await up.ready()
        up.cluster._zygote.process.kill()
        with pytest.raises(PeerGone, match="warm process"):
            async with asyncio.timeout(10):
                await up.cluster.watch(up.stop)


async def test_missing_vllm_is_told_at_once_with_what_to_do(run_dir):
    async with running(run_dir, preload="preload_fails") as up:
        with pytest.raises(MooncakeError, match=r"no vllm here.*\[cpu\]"):
            await up.ready()


async def test_stop_while_loading_ends_quietly(run_dir):
    async with running(run_dir) as up:
        up.stop.set()
        assert await up.ready() is False


@pytest.mark.chaos
async def test_a_stubborn_engine_is_killed_after_its_grace(run_dir, monkeypatch):
    monkeypatch.setattr("mooncake.up.plan.WORKER_STOP_S", 0.3)
    async with running(run_dir, vllm_args=["stubborn"], drain_s=0.0) as up:
        assert await up.ready()
    assert "killed after 0.3 s" in up.output.getvalue()


SCRIPT = """
import asyncio, sys
from pathlib import Path
sys.path.insert(0, {root!r})
from tests.unit.cli.test_up import Up
async def main():
    up = Up(Path({run_dir!r}), real_store=True)
    assert await up.ready()
    print(*up.pids(), up.cluster._zygote.process.pid, flush=True)
    await asyncio.sleep(60)
asyncio.run(main())
"""


@pytest.mark.chaos
async def test_sigkill_of_up_leaves_no_process_behind(run_dir):
    root = str(Path(__file__).parents[3])
    script = SCRIPT.format(root=root, run_dir=str(run_dir))
    up = await asyncio.create_subprocess_exec(sys.executable, "-c", script, stdout=asyncio.subprocess.PIPE)
    async with asyncio.timeout(20):
        pids = [int(word) for word in (await up.stdout.readline()).split()]
    assert len(pids) == 5
    assert all(alive(pid) for pid in pids)
    up.kill()
    await up.wait()
    end_s = time.monotonic() + 3
    assert all([await wait_gone(pid, max(0.1, end_s - time.monotonic())) for pid in pids])


# ---------------------------------------------------------------- checks before the start


def test_a_port_in_use_is_told_before_anything_starts():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(ConfigError, match="--port"):
            check_port("127.0.0.1", other.getsockname()[1])


def test_the_run_directory_must_be_ours_alone_and_unused(tmp_path):
    prepare_run_dir(tmp_path / "mine")
    assert (tmp_path / "mine").stat().st_mode & 0o777 == 0o700
    with pytest.raises(ConfigError, match="another"):
        prepare_run_dir(tmp_path / "mine")
    (tmp_path / "open").mkdir(mode=0o755)
    with pytest.raises(ConfigError, match="chmod 700"):
        prepare_run_dir(tmp_path / "open")


@pytest.mark.parametrize(
    ("host", "shown"), [("127.0.0.1", "//127.0.0.1:8000"), ("0.0.0.0", "//127.0.0.1:"), ("::1", "//[::1]:")]
)
def test_the_ready_text_can_be_pasted(host, shown):
    options = UpOptions(model="/m", served_name="org/m", run_dir="/r", host=host)
    text = ready_text(options, 12.3, has_key=False)
    assert shown in text
    assert "12.3 s" in text
    data = text.split("-d '")[1].split("'\n")[0]
    assert msgspec.json.decode(data)["model"] == "org/m"
    compile(text.split("\n\n")[2].replace("\n    ", "\n").strip(), "example", "exec")


def test_with_a_key_the_examples_take_it_from_the_environment():
    options = UpOptions(model="/m", served_name="org/m", run_dir="/r")
    assert "Bearer $MOONCAKE_API_KEY" in ready_text(options, 1, has_key=True)
