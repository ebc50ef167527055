"""`mooncake up` as a command: it starts, says so, stops when told, and never leaves a process behind."""

import contextlib
import os
import signal
import socket
import subprocess
import time

import httpx
import pytest

from tests.integration.cluster import Cluster, free_port, up_command, wait_until
from tests.integration.setups import AGGREGATED, FIRST_TOKEN

pytestmark = pytest.mark.integration

ENDED_S = 3.0


def can_bind(port: int) -> bool:
    """A process that has just ended may hold its sockets a moment longer than its memory."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return True
    return False


@pytest.mark.parametrize("cluster", [AGGREGATED], ids=lambda setup: setup.name, indirect=True)
class TestCtrlC:
    def test_the_ready_line_tells_how_to_ask(self, cluster: Cluster):
        told = cluster.output.read_text()
        assert f"at {cluster.url} serving {cluster.client.model}" in told
        assert f"curl {cluster.url}/v1/chat/completions" in told
        assert str(cluster.run_dir) in told, "where the logs are"
        answer = httpx.post(
            f"{cluster.url}/v1/chat/completions",
            json={
                "model": cluster.client.model,
                "messages": [{"role": "user", "content": "Hello!"}],
                "max_tokens": 8,
            },
            timeout=30.0,
        )
        assert answer.status_code == 200
        assert httpx.get(f"{cluster.url}/health").status_code == 200

    def test_objectives_change_while_a_stream_runs(self, cluster: Cluster):
        def ask() -> int:
            body = {"model": cluster.client.model, "prompt": [9, 8, 7], "max_tokens": 1}
            return httpx.post(f"{cluster.url}/v1/completions", json=body, timeout=30.0).status_code

        def holds(text: str) -> None:
            before = cluster.metric("mooncake_config_reloads_total")
            cluster.settings.write_text(text)
            os.kill(cluster.view()["pid"], signal.SIGHUP)
            wait_until("a reload", lambda: cluster.metric("mooncake_config_reloads_total") > before, 30.0)

        stream = cluster.client.stream([5, 6, 7, 8], max_tokens=400, temperature=0.0, ignore_eos=True)
        stream.wait_tokens(5)
        assert ask() == 200
        holds("up:\n  ttft_slo_s: 0.000001\n")
        assert ask() == 429
        holds("up:\n  ttft_slo_s: never\n")
        assert ask() == 429, "a wrong file changes nothing"
        assert cluster.metric("mooncake_config_last_reload_success") == 0
        holds("")
        assert ask() == 200
        assert cluster.metric("mooncake_config_last_reload_success") == 1
        assert len(stream.result().tokens) == 400, "what was in flight went on"

    @pytest.mark.last
    def test_ctrl_c_finishes_requests_and_leaves_nothing(self, cluster: Cluster):
        stream = cluster.client.stream([5, 6, 7, 8], max_tokens=400, temperature=0.0, ignore_eos=True)
        stream.wait_tokens(5)
        ours = cluster.processes()
        assert len(ours) >= 8, "up, zygote, store, conductor, two workers, two engines"
        assert cluster.interrupt() == 0
        assert len(stream.result().tokens) == 400, "what was in flight was finished"
        assert cluster.processes() == []
        assert not [path for path in cluster.run_dir.rglob("*") if path.is_socket()]
        assert not list(cluster.run_dir.glob("both-*-*")), "folders of engines are removed"
        assert "stopped" in cluster.output.read_text()


@pytest.mark.parametrize("cluster", [FIRST_TOKEN], ids=lambda setup: setup.name, indirect=True)
class TestSigkill:
    @pytest.mark.last
    def test_sigkill_of_up_leaves_nothing(self, cluster: Cluster):
        assert len(cluster.processes()) >= 8
        cluster.process.kill()
        started_s = time.monotonic()
        wait_until("all processes end", lambda: not cluster.processes(), ENDED_S)
        print(f"all gone after {time.monotonic() - started_s:.2f} s")
        cluster.process.wait(5.0)
        wait_until("its port is free", lambda: can_bind(cluster.port), ENDED_S)


def run_up(model, tmp_path, port: int, *flags: str) -> tuple[int, str, float]:
    """Return exit code, output and duration of an `up` that must end by itself."""
    started_s = time.monotonic()
    command = [*up_command(model, port, tmp_path / "run", AGGREGATED), *flags]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=30.0, start_new_session=True, check=False
    )
    return done.returncode, done.stdout + done.stderr, time.monotonic() - started_s


def test_a_port_in_use_is_told_before_anything_is_loaded(model, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, out, seconds = run_up(model, tmp_path, port)
    assert code == 2
    assert f"127.0.0.1:{port}" in out
    assert "--port" in out, "what to do"
    assert seconds < 10.0


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--host=0.0.0.0"], "others can reach it"),
        (["--dtype=int3"], "dtype"),
        (["--block-size=33"], "block_size"),
        (["--aggregated=0", "--prefill=0"], "at least one of each"),
        (["--pool-size=lots"], "pool_size"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_wrong_setting_is_told_at_once(model, tmp_path, flags: list[str], said: str):
    code, out, seconds = run_up(model, tmp_path, free_port(), *flags)
    assert code == 2
    assert said in out
    assert "Traceback" not in out
    assert seconds < 10.0
