"""A verbs library is found, or the reason is told; what both share decides GIDs, statuses and errors."""

import errno
import importlib
from typing import Any

import pytest

from mooncake.core.errors import CapacityError, ConfigError, PeerGone, RequestError
from transfer import verbs
from transfer.messages import QpInfo
from transfer.model import Opcode
from transfer.verbs import common, ibverbs_backend, pyverbs_backend
from transfer.verbs.api import Done, Work, WorkStatus

V4 = bytes(10) + b"\xff\xff\x0a\x00\x00\x01"
LINK_LOCAL = b"\xfe\x80" + bytes(14)
ZERO = bytes(16)


class Stub:
    """A library that sees `names`."""

    def __init__(self, name: str, names: list[str]) -> None:
        self.name = name
        self.names = names

    def devices(self) -> list[str]:
        return self.names


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine whose kernel has InfiniBand, with the given libraries: name -> devices or what is missing."""

    def make(kernel: bool = True, **libraries: list[str] | str) -> None:
        def load(name: str, found: list[str] | str) -> Any:
            if isinstance(found, str):
                raise ConfigError(found)
            return Stub(name, found)

        monkeypatch.setattr(verbs, "KERNEL", tmp_path if kernel else tmp_path / "absent")
        backends = {name: lambda n=name, f=found: load(n, f) for name, found in libraries.items()}
        monkeypatch.setattr(verbs, "_BACKENDS", backends)

    return make


def test_the_wheel_is_preferred(machine):
    machine(ibverbs=["mlx5_0", "mlx5_1"], pyverbs=["mlx5_0", "mlx5_1"])
    found = verbs.load()
    assert found.verbs is not None
    assert (found.verbs.name, found.reason) == ("ibverbs", "ibverbs: mlx5_0, mlx5_1")


def test_pyverbs_stands_in_when_the_wheel_is_missing(machine):
    machine(ibverbs="ibverbs: No module named 'ibverbs'", pyverbs=["rxe0"])
    found = verbs.load()
    assert found.verbs is not None
    assert found.verbs.name == "pyverbs"


def test_a_named_library_is_the_only_one_tried(machine):
    machine(ibverbs=["rxe0"], pyverbs="pyverbs: no such library")
    found = verbs.load("pyverbs")
    assert found.verbs is None
    assert found.reason == "no RDMA here: pyverbs: no such library"


def test_a_kernel_without_infiniband_is_named(machine):
    machine(kernel=False, ibverbs=["never asked"])
    found = verbs.load()
    assert found.verbs is None
    assert "kernel has no InfiniBand support" in found.reason


def test_every_library_says_why_it_is_not_used(machine):
    machine(ibverbs=[], pyverbs="pyverbs: version IBVERBS_PRIVATE_59 not found")
    assert verbs.load().reason == (
        "no RDMA here: ibverbs: no device; pyverbs: version IBVERBS_PRIVATE_59 not found"
    )


def test_an_unknown_library_is_a_config_error():
    with pytest.raises(ConfigError, match="choose one of auto, ibverbs, pyverbs"):
        verbs.load("libfabric")


@pytest.mark.parametrize("backend", [ibverbs_backend, pyverbs_backend])
@pytest.mark.parametrize(
    "failure", [ImportError("No module named x"), OSError("libibverbs.so.1: cannot open shared object file")]
)
def test_a_library_that_cannot_be_loaded_is_named_with_what_to_do(monkeypatch, backend, failure):
    def fail(name: str) -> None:
        raise failure

    monkeypatch.setattr(importlib, "import_module", fail)
    with pytest.raises(ConfigError) as raised:
        backend.load()
    assert str(raised.value).startswith(f"{backend.NAME}: {failure}")
    assert "install" in str(raised.value)


@pytest.mark.skipif(verbs.KERNEL.is_dir(), reason="this kernel has InfiniBand")
def test_the_real_wheel_on_a_kernel_without_infiniband_sees_no_device_and_raises_nothing():
    pytest.importorskip("ibverbs")
    library = ibverbs_backend.load()
    assert library.devices() == []
    with pytest.raises(ConfigError, match="rxe0"):
        library.open("rxe0")


@pytest.mark.parametrize(
    ("gids", "types", "chosen"),
    [
        ([LINK_LOCAL, V4], {}, 1),
        ([LINK_LOCAL, LINK_LOCAL, V4, V4], {2: "IB/RoCE v1", 3: "RoCE v2"}, 3),
        ([ZERO, V4, V4], {1: "IB/RoCE v1", 2: "IB/RoCE v1"}, 1),
        ([ZERO, LINK_LOCAL], {}, 1),
        ([ZERO, ZERO], {}, None),
    ],
)
def test_the_gid_is_the_first_ipv4_one_that_routers_pass(gids, types, chosen):
    assert common.choose_gid(gids, lambda index: types.get(index, "")) == chosen


class PortAttributes:
    gid_tbl_len = 3
    lid = 7
    active_mtu = 5
    link_layer = common.LINK_ETHERNET


def test_a_port_is_described_by_its_gid_and_its_mtu_in_bytes():
    info = common.describe_port("none", 1, None, PortAttributes(), [ZERO, LINK_LOCAL, V4].__getitem__)
    assert (info.gid, info.gid_index, info.mtu, info.lid, info.link_layer) == (V4, 2, 4096, 7, "ethernet")


@pytest.mark.parametrize("index", [0, -1, 3])
def test_a_gid_index_that_is_empty_or_outside_names_the_good_ones(index):
    with pytest.raises(ConfigError, match=r"there are \[1, 2\]"):
        common.describe_port("none", 1, index, PortAttributes(), [ZERO, LINK_LOCAL, V4].__getitem__)


@pytest.mark.parametrize(
    ("size_bytes", "code"), [(256, 1), (511, 1), (512, 2), (1024, 3), (4095, 4), (4096, 5), (9000, 5), (1, 1)]
)
def test_the_path_mtu_is_the_largest_that_fits(size_bytes, code):
    assert common.mtu_code(size_bytes) == code


def test_completion_codes_become_statuses():
    named = {0: "DONE", 5: "FLUSHED", 9: "REFUSED", 10: "REFUSED", 12: "UNREACHABLE", 13: "UNREACHABLE"}
    for code in range(30):
        assert common.status_of(code) is WorkStatus[named.get(code, "FAILED")]
        assert f"status {code}, vendor 0x81" in common.status_words(code, 0x81)
    assert common.status_words(10, 0).startswith("remote access")
    assert common.status_words(12, 0).startswith("retries exhausted")
    assert common.status_words(21, 0).startswith("general")


def test_a_registration_that_fails_says_whose_fault_it_is():
    assert isinstance(common.registration_error(errno.EFAULT, "x"), RequestError)
    assert isinstance(common.registration_error(errno.EINVAL, "x"), RequestError)
    limit = common.registration_error(errno.ENOMEM, "x")
    assert isinstance(limit, CapacityError)
    assert "memlock" in str(limit)
    assert "ENOSPC" in str(common.registration_error(errno.ENOSPC, "x"))


GOOD = QpInfo("mlx5_0", 1, 17, 0xFFFFFF, V4, 0, 4096)


def test_a_peers_queue_pair_is_taken_as_it_is():
    common.check_remote(GOOD)


@pytest.mark.parametrize(
    "wrong",
    [
        {"gid": b"short"},
        {"gid": V4 + b"x"},
        {"qpn": 1 << 24},
        {"qpn": -1},
        {"psn": 1 << 24},
        {"lid": 1 << 16},
        {"port": 0},
    ],
)
def test_a_peers_nonsense_is_refused_before_a_library_sees_it(wrong):
    fields = {name: getattr(GOOD, name) for name in GOOD.__struct_fields__} | wrong
    with pytest.raises(PeerGone, match="no queue pair"):
        common.check_remote(QpInfo(**fields))


class Memory:
    """Counts what pyverbs allocates and frees: SGEs, and the list that each SendWR copies for itself."""

    def __init__(self) -> None:
        self.live: set[int] = set()
        self.made = 0

    def malloc(self) -> int:
        self.made += 1
        self.live.add(self.made)
        return self.made

    def free(self, block: int) -> None:
        assert block in self.live, "freed twice: the process would die"
        self.live.remove(block)


class FakeWr:
    """pyverbs' SGE and SendWR as its source has them: nothing is freed but by `close`, a bare free."""

    def __init__(self, memory: Memory) -> None:
        class SGE:
            def __init__(self, addr: int, length: int, lkey: int) -> None:
                self.addr, self.length, self.lkey = addr, length, lkey
                self.block = memory.malloc()

            def close(self) -> None:
                memory.free(self.block)

        class SendWR:
            def __init__(self, num_sge: int, sg: list[SGE], send_flags: int) -> None:
                self.block = memory.malloc()
                self.sg_list: SGE | None = None
                self.next_wr: SendWR | None = None
                self.wr_id = self.opcode = 0
                self.remote = (0, 0)

            def close(self) -> None:
                memory.free(self.block)

            def set_wr_rdma(self, rkey: int, addr: int) -> None:
                self.remote = (rkey, addr)

        self.SGE, self.SendWR = SGE, SendWR


class FakeLibrary:
    def __init__(self, memory: Memory) -> None:
        self.wr = FakeWr(memory)


def chain(head: Any) -> list[Work]:
    """Read back what the device would be given."""
    found = []
    while head is not None:
        entry, (rkey, remote) = head.sg_list, head.remote
        op = next(op for op, code in common.OPCODES.items() if code == head.opcode)
        found.append(Work(head.wr_id, op, entry.addr, entry.lkey, remote, rkey, entry.length))
        head = head.next_wr
    return found


def test_pyverbs_requests_are_used_again_and_freed_exactly_once():
    memory = Memory()
    requests = pyverbs_backend._Requests(FakeLibrary(memory), 8)  # type: ignore[arg-type]
    made = memory.made
    for count in (8, 1, 5, 8, 3):
        works = [
            Work(count * 100 + i, Opcode(i % 2), 10 + i, 20 + i, 30 + i, 40 + i, 50 + i) for i in range(count)
        ]
        assert chain(requests.fill(works)) == works  # all of them, in order, and nothing of an earlier fill
    assert memory.made == made
    requests.close()
    assert memory.live == set()


def test_a_completion_that_failed_says_why_in_words():
    class Completion:
        wr_id, status, vendor_err = 4, 12, 0x81

    expected = Done(4, WorkStatus.UNREACHABLE, "retries exhausted (status 12, vendor 0x81)")
    assert ibverbs_backend._done(Completion()) == pyverbs_backend._done(Completion()) == expected
