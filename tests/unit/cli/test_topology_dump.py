"""The dump prints what the engine would use, in the form that the engine reads back."""

import json
from pathlib import Path

import pytest

from mooncake.topology_dump import main
from tests.unit.transfer.fake_sysfs import DOWN, FakeSysfs, two_sockets
from transfer.topology import Topology


def test_the_dump_is_json_that_reads_back_as_a_custom_topology(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sys_root = two_sockets(tmp_path / "sys").root
    assert main(["--sys-root", str(sys_root)]) == 0
    file = tmp_path / "custom.json"
    file.write_text(capsys.readouterr().out)
    assert Topology.load(file).rows == Topology.discover(sys_root).rows


def test_a_filter_leaves_the_other_nics_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--sys-root", str(two_sockets(tmp_path).root), "--only", "mlx5_2"]) == 0
    assert json.loads(capsys.readouterr().out)["cpu:0"] == [["mlx5_2"], []]


def test_a_filter_that_fits_no_nic_is_an_error_with_nothing_on_the_output(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--sys-root", str(two_sockets(tmp_path).root), "--only", "mlx4_0"]) == 1
    told = capsys.readouterr()
    assert told.out == ""
    assert "there is no NIC 'mlx4_0'" in told.err


def test_a_machine_without_rdma_prints_an_empty_matrix(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--sys-root", str(FakeSysfs(tmp_path).root)]) == 0
    assert json.loads(capsys.readouterr().out) == {"cpu:0": [[], []]}


def test_the_table_shows_devices_ports_and_matrix(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    sys = two_sockets(tmp_path)
    sys.nic("mlx5_9", "pci0000:99/0000:99:01.0", -1, DOWN)
    assert main(["--sys-root", str(sys.root), "--table"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["cuda:0", "mlx5_0", "mlx5_1", "mlx5_2", "mlx5_3"] in lines
    assert ["mlx5_1", "0", "1", "pci0000:10", "0000:10:02.0", "0000:15:00.0"] in lines
    down = next(line for line in lines if line[:1] == ["mlx5_9"])
    assert down[1:3] == ["-", "none:"]


def test_the_table_says_what_is_used_where_there_is_no_rdma(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["--sys-root", str(FakeSysfs(tmp_path).root), "--table"]) == 0
    assert capsys.readouterr().out.startswith("No RDMA device: transfers use shared memory")
