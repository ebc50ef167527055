"""The matrix says which NICs are near which memory, on machines with many, with soft ones and with none."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mooncake.core.errors import ConfigError
from tests.unit.transfer.fake_sysfs import ACTIVE, DOWN, FakeSysfs, two_sockets
from transfer.topology import JSON_BYTES_MAX, Topology, parse_names, read_machine

ALL = ["mlx5_0", "mlx5_1", "mlx5_2", "mlx5_3"]


def test_a_cpu_prefers_the_nics_of_its_numa_node(tmp_path: Path) -> None:
    topology = Topology.discover(two_sockets(tmp_path).root)
    assert topology.preferred("cpu:0") == ["mlx5_0", "mlx5_1"]
    assert topology.secondary("cpu:0") == ["mlx5_2", "mlx5_3"]
    assert topology.preferred("cpu:1") == ["mlx5_2", "mlx5_3"]


def test_a_gpu_prefers_the_nic_behind_its_switch(tmp_path: Path) -> None:
    topology = Topology.discover(two_sockets(tmp_path).root)
    assert topology.preferred("cuda:0") == ["mlx5_0"]
    assert topology.secondary("cuda:0") == ["mlx5_1", "mlx5_2", "mlx5_3"]
    assert topology.preferred("cuda:1") == ["mlx5_2"]


def test_a_gpu_without_a_common_way_prefers_the_nics_of_its_node(tmp_path: Path) -> None:
    sys = FakeSysfs(tmp_path, nodes=2)
    sys.nic("mlx5_0", "pci0000:10/0000:10:01.0", node=0)
    sys.nic("mlx5_1", "pci0000:80/0000:80:01.0", node=1)
    sys.gpu("pci0000:90/0000:90:01.0", node=1)
    assert Topology.discover(tmp_path).preferred("cuda:0") == ["mlx5_1"]


def test_the_matrix_is_written_as_upstream_writes_it(tmp_path: Path) -> None:
    topology = Topology.discover(two_sockets(tmp_path).root)
    assert json.loads(topology.to_json()) == {
        "cpu:0": [["mlx5_0", "mlx5_1"], ["mlx5_2", "mlx5_3"]],
        "cpu:1": [["mlx5_2", "mlx5_3"], ["mlx5_0", "mlx5_1"]],
        "cuda:0": [["mlx5_0"], ["mlx5_1", "mlx5_2", "mlx5_3"]],
        "cuda:1": [["mlx5_2"], ["mlx5_0", "mlx5_1", "mlx5_3"]],
    }


@pytest.mark.parametrize("location", ["*", "cpu:7", "npu:0", ""])
def test_memory_of_unknown_place_may_use_every_nic(tmp_path: Path, location: str) -> None:
    topology = Topology.discover(two_sockets(tmp_path).root)
    assert topology.preferred(location) == ALL
    assert topology.secondary(location) == []


def test_a_node_without_a_nic_of_its_own_prefers_all(tmp_path: Path) -> None:
    sys = FakeSysfs(tmp_path, nodes=2)
    sys.nic("mlx5_0", "pci0000:10/0000:10:01.0", node=0)
    topology = Topology.discover(tmp_path)
    assert topology.preferred("cpu:1") == ["mlx5_0"]


def test_a_machine_without_rdma_has_an_empty_matrix(tmp_path: Path) -> None:
    topology = Topology.discover(FakeSysfs(tmp_path).root)
    assert topology.rows == {"cpu:0": ([], [])}
    assert topology.names() == topology.preferred("*") == topology.preferred("cpu:0") == []


def test_a_kernel_without_numa_or_even_sysfs_has_one_node(tmp_path: Path) -> None:
    assert Topology.discover(tmp_path / "missing").rows == {"cpu:0": ([], [])}


def test_a_device_of_no_node_is_further_than_a_local_one_and_nearer_than_a_remote_one(tmp_path: Path) -> None:
    sys = FakeSysfs(tmp_path, nodes=2)
    sys.nic("mlx5_0", "pci0000:10/0000:10:01.0", node=0)
    sys.nic("mlx5_1", "pci0000:11/0000:11:01.0", node=-1)
    topology = Topology.discover(tmp_path)
    assert topology.preferred("cpu:0") == ["mlx5_0"]
    assert topology.preferred("cpu:1") == ["mlx5_1"]


def test_soft_roce_is_as_near_as_the_interface_below_it(tmp_path: Path) -> None:
    sys = FakeSysfs(tmp_path, nodes=2)
    for node, bus, below in ((0, "10", ""), (1, "80", "virtio1")):
        sys.interface(f"eth{node}", f"pci0000:{bus}/0000:{bus}:01.0", node, below)
        sys.rxe(f"rxe{node}", f"eth{node}")
    topology = Topology.discover(tmp_path)
    assert topology.rows["cpu:1"] == (["rxe1"], ["rxe0"])
    assert read_machine(tmp_path).nics[1].pci == ("pci0000:80", "0000:80:01.0")


def test_soft_roce_over_something_virtual_is_of_no_node(tmp_path: Path) -> None:
    sys = FakeSysfs(tmp_path, nodes=2)
    sys.rxe("rxelo", "lo")
    topology = Topology.discover(tmp_path)
    assert read_machine(tmp_path).nics[0].node == -1
    assert topology.rows == {"cpu:0": (["rxelo"], []), "cpu:1": (["rxelo"], [])}


def test_a_nic_without_an_active_port_is_left_out_unless_it_is_named(tmp_path: Path) -> None:
    sys = FakeSysfs(tmp_path)
    sys.nic("mlx5_0", "pci0000:10/0000:10:01.0", 0, DOWN)
    sys.nic("mlx5_1", "pci0000:10/0000:10:02.0", 0, DOWN, ACTIVE)
    assert Topology.discover(tmp_path).names() == ["mlx5_1"]
    assert Topology.discover(tmp_path, only=["mlx5_0"]).names() == ["mlx5_0"]
    assert [nic.ports for nic in read_machine(tmp_path).nics] == [(), (2,)]


def test_the_filter_is_applied_before_distances_are_compared(tmp_path: Path) -> None:
    topology = Topology.discover(two_sockets(tmp_path).root, only=["mlx5_1", "mlx5_2"])
    assert topology.preferred("cuda:0") == ["mlx5_1"]  # its switch's NIC is out; the same root is next
    assert topology.secondary("cuda:0") == ["mlx5_2"]


def test_a_filter_that_names_no_nic_of_the_machine_is_refused_with_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'mlx5_0,mlx5_9'.*'mlx5_9'.*mlx5_0, mlx5_1, mlx5_2, mlx5_3"):
        Topology.discover(two_sockets(tmp_path).root, only=["mlx5_0", "mlx5_9"])
    with pytest.raises(ConfigError, match="there are: none"):
        Topology.discover(FakeSysfs(tmp_path / "vm").root, only=["mlx5_0"])


def test_only_graphics_cards_of_nvidia_are_gpus(tmp_path: Path) -> None:
    sys = FakeSysfs(tmp_path)
    sys.gpu("pci0000:00/0000:00:03.0", 0, kind="0x030000")
    sys.gpu("pci0000:00/0000:00:04.0", 0, kind="0x068000")  # an NVSwitch
    sys.pci("pci0000:00/0000:00:05.0", 0, vendor="0x1234", kind="0x030000")
    assert [gpu.name for gpu in read_machine(tmp_path).gpus] == ["0000:00:03.0"]


@pytest.mark.parametrize(
    ("visible", "preferred"),
    [
        (None, {"cuda:0": ["mlx5_0"], "cuda:1": ["mlx5_2"]}),
        ("1", {"cuda:0": ["mlx5_2"]}),
        ("1, 0", {"cuda:0": ["mlx5_2"], "cuda:1": ["mlx5_0"]}),
        ("", {}),
        ("GPU-5c7dd28b", {}),
        ("0,9", {}),
    ],
)
def test_gpus_are_numbered_as_the_process_sees_them(
    tmp_path: Path, visible: str | None, preferred: dict[str, list[str]]
) -> None:
    topology = Topology.discover(two_sockets(tmp_path).root, visible=visible)
    assert {name: row[0] for name, row in topology.rows.items() if name.startswith("cuda")} == preferred


def test_the_tenth_nic_comes_after_the_second(tmp_path: Path) -> None:
    sys = FakeSysfs(tmp_path)
    for number in (10, 2, 1):
        sys.nic(f"mlx5_{number}", f"pci0000:10/0000:10:{number:02x}.0", 0)
    assert Topology.discover(tmp_path).names() == ["mlx5_1", "mlx5_2", "mlx5_10"]


# ---------------------------------------------------------------- a matrix from outside


def test_a_matrix_is_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "topology.json"
    path.write_text('{"cpu:0": [["mlx5_1"], ["mlx5_0"]], "*": [["mlx5_0"], []]}')
    topology = Topology.load(path)
    assert topology.preferred("cpu:0") == ["mlx5_1"]
    assert topology.preferred("*") == ["mlx5_0"]
    assert topology.preferred("cuda:0") == ["mlx5_0", "mlx5_1"]


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"missing\.json: No such file"):
        Topology.load(tmp_path / "missing.json")


def test_a_filtered_matrix_promotes_the_secondary_nics_of_a_location_that_lost_all_others() -> None:
    text = '{"cpu:0": [["a"], ["b"]], "cpu:1": [["b"], ["a", "c"]]}'
    topology = Topology.parse(text, only=["b", "c"])
    assert topology.rows == {"cpu:0": (["b"], []), "cpu:1": (["b"], ["c"])}
    with pytest.raises(ConfigError, match="no NIC 'd'; there are: a, b, c"):
        Topology.parse(text, only=["d"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "custom: not JSON"),
        ("[]", "custom: must be an object"),
        ('{"socket0": [[], []]}', "location 'socket0'"),
        ('{"cpu:0": [["a"]]}', r"cpu:0 is \[\['a'\]\]: must be two lists"),
        ('{"cpu:0": [["a"], ["b"], ["c"]]}', "must be two lists"),
        ('{"cpu:0": ["a", "b"]}', "must be two lists"),
        ('{"cpu:0": [["a"], [1]]}', "must be two lists"),
        ('{"cpu:0": [["a", ""], []]}', "NIC '' is no name"),
        ('{"cpu:0": [["a"], ["a"]]}', "cpu:0: NIC 'a' is named twice"),
        (b'{"cpu:\xff": [[], []]}', "not JSON"),
        ('{"cpu:0": ' + "[" * 10_000, "not JSON"),
        (" " * (JSON_BYTES_MAX + 1), "at most"),
    ],
)
def test_a_wrong_matrix_is_refused_with_place_and_value(text: str | bytes, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Topology.parse(text, source="custom")


def test_a_long_wrong_value_does_not_fill_the_log() -> None:
    with pytest.raises(ConfigError) as caught:
        Topology.parse(json.dumps({"cpu:0": "x" * 100_000}))
    assert len(str(caught.value)) < 500


NAMES = st.lists(st.sampled_from(["a", "b", "c", "d"]), unique=True)
MATRICES = st.dictionaries(
    st.sampled_from(["cpu:0", "cpu:1", "cuda:0", "*"]),
    st.tuples(NAMES, st.integers(0, 4)).map(lambda pair: (pair[0][: pair[1]], pair[0][pair[1] :])),
)


@given(MATRICES)
def test_what_is_written_reads_back(rows: dict[str, tuple[list[str], list[str]]]) -> None:
    assert Topology.parse(Topology(rows).to_json()).rows == rows


@given(MATRICES, NAMES)
def test_a_filter_keeps_what_it_names_and_nothing_else(
    rows: dict[str, tuple[list[str], list[str]]], only: list[str]
) -> None:
    whole = Topology(rows)
    only = [name for name in only if name in whole.names()]
    filtered = Topology.parse(whole.to_json(), only=only)
    assert set(filtered.names()) == set(only or whole.names())
    for location, row in filtered.rows.items():
        assert set(row[0] + row[1]) == {
            n for n in rows[location][0] + rows[location][1] if not only or n in only
        }


@pytest.mark.parametrize(
    ("text", "names"),
    [("", []), ("mlx5_0", ["mlx5_0"]), (" mlx5_0 ,mlx5_1,, mlx5_0", ["mlx5_0", "mlx5_1"])],
)
def test_a_list_of_devices_is_read_as_people_write_it(text: str, names: list[str]) -> None:
    assert parse_names(text) == names
