"""The drop-in engine answers what upstream's wheel (0.3.13.post1, non-cuda) was measured to answer.

`measured` in a test's name: the codes in it were read off that wheel. Where upstream crashes (a call before
`initialize`, an unknown batch id), the test says what ours answers instead.
"""

import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import structlog

import mooncake.engine as module
from mooncake.engine import TransferEngine, TransferNotify, TransferOpcode
from mooncake.http_metadata_server import KVBootstrapServer

SIZE = 1 << 20
HOST = "127.0.0.1"
SECRET = "sixteen bytes or more"
Bytes = npt.NDArray[np.uint8]


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for key in ("MOONCAKE_SECRET", "MOONCAKE_SECRET_FILE", "MC_FORCE_TCP", "MC_LOG_LEVEL"):
        monkeypatch.delenv(key, raising=False)


@pytest.fixture
def logged() -> Iterator[list[dict[str, Any]]]:
    with structlog.testing.capture_logs() as lines:
        yield lines


class Node:
    """One engine with 1 MiB registered."""

    def __init__(self, host: str = HOST, metadata: str = "P2PHANDSHAKE", fill: int = 0) -> None:
        self.engine = TransferEngine()
        assert self.engine.initialize(host, metadata, "tcp", "") == 0
        self.memory: Bytes = np.full(SIZE, fill, np.uint8)
        self.address: int = self.memory.ctypes.data
        assert self.engine.register_memory(self.address, SIZE) == 0
        self.name = f"{host}:{self.engine.get_rpc_port()}"


@pytest.fixture
def here() -> Iterator[Node]:
    node = Node(fill=1)
    yield node
    node.engine.close()


@pytest.fixture
def there() -> Iterator[Node]:
    node = Node(fill=2)
    yield node
    node.engine.close()


@pytest.fixture
def dead(here: Node) -> str:
    """The name of a peer that is not there."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return f"{HOST}:{probe.getsockname()[1]}"


# ---------------------------------------------------------------- bytes


def test_a_write_arrives_and_a_read_fetches(here: Node, there: Node) -> None:
    assert here.engine.transfer_sync_write(there.name, here.address, there.address, 100) == 0
    assert bytes(there.memory[:101]) == b"\1" * 100 + b"\2"
    assert here.engine.transfer_sync_read(there.name, here.address + 500, there.address + 500, 7) == 0
    assert bytes(here.memory[499:508]) == b"\1" + b"\2" * 7 + b"\1"


def test_every_form_of_a_transfer_moves_the_bytes_it_names(here: Node, there: Node) -> None:
    engine, write, read = here.engine, TransferOpcode.Write, TransferOpcode.Read
    columns = [here.address, here.address + 10], [there.address, there.address + 20], [3, 4]
    for form in (
        lambda: engine.batch_transfer_sync_write(there.name, *columns),
        lambda: engine.batch_transfer_sync(there.name, *columns, write),
        lambda: engine.batch_transfer_sync(
            target_hostname=there.name, buffers=columns[0], peer_buffer_addresses=columns[1],
            lengths=columns[2], opcode=write, notify=None, transport_hint="tcp",
        ),
        lambda: engine.get_batch_transfer_status([engine.batch_transfer_async_write(there.name, *columns)]),
        lambda: engine.get_batch_transfer_status([engine.batch_transfer_async(there.name, *columns, write)]),
    ):  # fmt: skip
        there.memory[:] = 2
        assert form() == 0
        assert bytes(there.memory[:25]) == b"\1" * 3 + b"\2" * 17 + b"\1" * 4 + b"\2"
    there.memory[:] = 2
    for form in (
        lambda: engine.batch_transfer_sync_read(there.name, *columns),
        lambda: engine.batch_transfer_sync(there.name, *columns, read, None, ""),
        lambda: engine.get_batch_transfer_status([engine.batch_transfer_async_read(there.name, *columns)]),
    ):
        here.memory[:] = 1
        assert form() == 0
        assert bytes(here.memory[:15]) == b"\2" * 3 + b"\1" * 7 + b"\2" * 4 + b"\1"


def test_ten_threads_write_at_once_as_vllm_s_connector_does(here: Node, there: Node) -> None:
    here.memory[:] = np.arange(SIZE) % 251
    step = SIZE // 40

    def write(part: int) -> int:
        starts = [part * step, part * step + step // 2]
        return here.engine.batch_transfer_sync_write(
            there.name,
            [here.address + s for s in starts],
            [there.address + s for s in starts],
            [step // 2] * 2,
        )

    with ThreadPoolExecutor(10) as pool:
        assert set(pool.map(write, range(40))) == {0}
    assert np.array_equal(there.memory[: 40 * step], here.memory[: 40 * step])


def test_numpy_integers_are_addresses_too(here: Node, there: Node) -> None:
    here_s, there_s = np.array([here.address]), np.array([there.address])
    assert here.engine.batch_transfer_sync_write(there.name, here_s, there_s, np.array([5])) == 0
    assert bytes(there.memory[:6]) == b"\1" * 5 + b"\2"


def test_an_engine_writes_to_itself_as_measured(here: Node) -> None:
    here.memory[:3] = 9
    assert here.engine.transfer_sync_write(here.name, here.address, here.address + 100, 3) == 0
    assert bytes(here.memory[99:104]) == b"\1\x09\x09\x09\1"


# ---------------------------------------------------------------- codes of transfers


def test_nothing_to_do_is_done_as_measured(here: Node, there: Node) -> None:
    assert here.engine.transfer_sync_write(there.name, here.address, there.address, 0) == 0
    assert here.engine.batch_transfer_sync_write(there.name, [], [], []) == 0
    assert here.engine.get_batch_transfer_status([]) == 0
    batch = here.engine.batch_transfer_async_write(there.name, [], [], [])
    assert batch != 0
    assert here.engine.get_batch_transfer_status([batch]) == 0


@pytest.mark.parametrize("offset", [1 << 40, SIZE - 10])
def test_a_range_the_peer_has_not_registered_is_minus_1_as_measured(
    here: Node, there: Node, offset: int
) -> None:
    assert here.engine.transfer_sync_write(there.name, here.address, there.address + offset, 1024) == -1
    assert here.engine.transfer_sync_read(there.name, here.address, there.address + offset, 1024) == -1


def test_one_bad_range_fails_its_batch_with_minus_1_as_measured(here: Node, there: Node) -> None:
    columns = [here.address] * 2, [there.address, there.address + (1 << 40)], [10, 20]
    assert here.engine.batch_transfer_sync_write(there.name, *columns) == -1


def test_columns_of_different_lengths_are_minus_1_or_no_batch_as_measured(here: Node, there: Node) -> None:
    columns = [here.address] * 2, [there.address], [10, 20]
    assert here.engine.batch_transfer_sync_write(there.name, *columns) == -1
    assert here.engine.batch_transfer_async_write(there.name, *columns) == 0


@pytest.mark.parametrize("name", ["nonsense", ""])
def test_a_peer_s_name_that_is_none_is_minus_1_as_measured(here: Node, name: str) -> None:
    assert here.engine.transfer_sync_write(name, here.address, 1, 1024) == -1
    assert here.engine.batch_transfer_async_read(name, [here.address], [1], [1]) == 0


def test_a_missing_peer_is_minus_1_or_no_batch_as_measured(here: Node, dead: str) -> None:
    assert here.engine.transfer_sync_write(dead, here.address, 1, 1024) == -1
    assert here.engine.transfer_submit_write(dead, here.address, 1, 1024) == 0
    assert here.engine.batch_transfer_async_write(dead, [here.address], [1], [1]) == 0


def test_a_peer_that_has_ended_is_minus_1_as_measured(here: Node, there: Node) -> None:
    assert here.engine.transfer_sync_write(there.name, here.address, there.address, 10) == 0
    there.engine.close()
    assert here.engine.transfer_sync_write(there.name, here.address, there.address, 10) == -1
    assert here.engine.transfer_sync_read(there.name, here.address, there.address, 10) == -1


def test_memory_the_peer_has_unregistered_is_minus_1_as_measured(here: Node, there: Node) -> None:
    assert here.engine.transfer_sync_write(there.name, here.address, there.address, 10) == 0
    assert there.engine.unregister_memory(there.address) == 0
    assert here.engine.transfer_sync_write(there.name, here.address, there.address, 10) == -1


def test_memory_the_peer_registers_later_is_found(here: Node, there: Node) -> None:
    assert here.engine.transfer_sync_write(there.name, here.address, there.address, 10) == 0
    late = np.zeros(4096, np.uint8)
    assert there.engine.register_memory(late.ctypes.data, late.nbytes) == 0
    assert here.engine.transfer_sync_write(there.name, here.address, late.ctypes.data, 10) == 0
    assert bytes(late[:11]) == b"\1" * 10 + b"\0"
    there.engine.close()


def test_local_memory_must_be_registered_which_upstream_asks_for_rdma_only(here: Node, there: Node) -> None:
    loose = np.zeros(4096, np.uint8)
    assert here.engine.transfer_sync_write(there.name, loose.ctypes.data, there.address, 10) == -1
    assert bytes(there.memory[:2]) == b"\2\2"


def test_a_hint_that_no_transport_has_is_ignored_as_measured(here: Node, there: Node) -> None:
    for hint in ("tcp", "shm", "nonsense"):
        assert here.engine.transfer_sync_write(there.name, here.address, there.address, 10, hint) == 0


@pytest.mark.parametrize("bad", ["text", 1.5, None, -1])
def test_what_is_no_address_is_a_type_error_as_measured(here: Node, there: Node, bad: Any) -> None:
    with pytest.raises(TypeError):
        here.engine.transfer_sync_write(there.name, bad, there.address, 1)
    with pytest.raises(TypeError):
        here.engine.register_memory(here.address, bad)
    with pytest.raises(TypeError):
        here.engine.allocate_managed_buffer(bad)


def test_an_opcode_that_is_a_number_is_a_type_error_as_measured(here: Node, there: Node) -> None:
    with pytest.raises(TypeError):
        here.engine.transfer_sync(there.name, here.address, there.address, 1, 1)  # type: ignore[arg-type]


# ---------------------------------------------------------------- batches


def wait_for_end(engine: TransferEngine, batch: int) -> int:
    for _ in range(10_000_000):
        if code := engine.transfer_check_status(batch):
            return code
    raise AssertionError("the batch does not end")


def test_a_submitted_write_ends_with_1_as_measured(here: Node, there: Node) -> None:
    batch = here.engine.transfer_submit_write(there.name, here.address, there.address, 1024)
    assert batch > 0
    assert wait_for_end(here.engine, batch) == 1
    assert bytes(there.memory[1023:1025]) == b"\1\2"


def test_a_submitted_write_to_nowhere_is_taken_and_fails_with_minus_1_as_measured(
    here: Node, there: Node
) -> None:
    batch = here.engine.transfer_submit_write(there.name, here.address, there.address + (1 << 40), 1024)
    assert batch > 0
    assert wait_for_end(here.engine, batch) == -1
    batch = here.engine.batch_transfer_async_write(there.name, [here.address], [there.address + SIZE], [1])
    assert here.engine.get_batch_transfer_status([batch]) == -1


def test_an_end_is_reported_once_where_upstream_crashes_or_guesses(here: Node, there: Node) -> None:
    batch = here.engine.transfer_submit_write(there.name, here.address, there.address, 1024)
    assert wait_for_end(here.engine, batch) == 1
    assert here.engine.transfer_check_status(batch) == -1
    assert here.engine.get_batch_transfer_status([batch]) == -1


def test_an_unknown_batch_is_minus_1_where_upstream_crashes(here: Node) -> None:
    for batch in (0, 12345, 1 << 63):
        assert here.engine.transfer_check_status(batch) == -1
        assert here.engine.get_batch_transfer_status([batch]) == -1


def test_batches_that_nobody_asks_about_are_bounded(
    here: Node, there: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mooncake.dropin.engine.start.BATCHES_MAX", 2)
    first, second, third = (
        here.engine.transfer_submit_write(there.name, here.address, there.address, 0) for _ in range(3)
    )
    assert here.engine.transfer_check_status(first) == -1
    assert here.engine.get_batch_transfer_status([second, third]) == 0


# ---------------------------------------------------------------- memory


def test_registering_twice_is_minus_7_as_measured(here: Node) -> None:
    engine, address = here.engine, here.address
    assert engine.register_memory(address, SIZE) == -7
    assert engine.register_memory(address, 4096) == -7
    assert engine.register_memory(address + 4096, 4096) == -7
    assert engine.register_memory(address - 1, 2) == -7
    assert engine.batch_register_memory([address], [SIZE]) == -7


def test_registering_nothing_is_minus_1_as_measured(here: Node) -> None:
    loose = np.zeros(16, np.uint8)
    assert here.engine.register_memory(loose.ctypes.data, 0) == -1


def test_memory_that_is_not_mapped_is_minus_1_where_upstream_takes_it(here: Node) -> None:
    assert here.engine.register_memory(0, 4096) == -1
    assert here.engine.register_memory(1 << 46, 4096) == -1
    assert here.engine.register_memory(1 << 65, 4096) == -1


def test_unregistering_the_unknown_is_minus_3_as_measured(here: Node) -> None:
    assert here.engine.unregister_memory(12345678) == -3
    assert here.engine.unregister_memory(here.address + 1) == -3
    assert here.engine.unregister_memory(here.address) == 0
    assert here.engine.unregister_memory(here.address) == -3
    assert here.engine.batch_unregister_memory([here.address]) == -3


def test_batches_of_registrations_answer_as_measured(here: Node) -> None:
    first, second = np.zeros(4096, np.uint8), np.zeros(4096, np.uint8)
    addresses, sizes = [first.ctypes.data, second.ctypes.data], [4096, 4096]
    assert here.engine.batch_register_memory([], []) == 0
    assert here.engine.batch_register_memory(addresses, [1]) == -1
    assert here.engine.batch_register_memory(addresses, sizes, location="cpu:0") == 0
    assert here.engine.batch_register_memory(buffer_addresses=addresses, capacities=sizes) == -7
    assert here.engine.batch_unregister_memory(addresses) == 0
    assert here.engine.batch_unregister_memory([]) == 0
    assert here.engine.batch_unregister_memory(addresses) == -3


def test_any_location_is_taken_as_measured(here: Node) -> None:
    pages = np.zeros(3 * 4096, np.uint8)
    for index, location in enumerate(("cpu:0", "cuda:7", "bogus")):
        address = pages.ctypes.data + 4096 * index
        assert here.engine.register_memory(buffer_addr=address, capacity=16, location=location) == 0
    here.engine.close()


def test_the_first_buffer_of_a_peer_and_of_itself_as_measured(here: Node, there: Node, dead: str) -> None:
    assert here.engine.get_first_buffer_address(there.name) == there.address
    assert here.engine.get_first_buffer_address(here.name) == here.address
    assert here.engine.get_first_buffer_address(dead) == 0
    assert here.engine.get_first_buffer_address("nonsense") == 0
    there.engine.unregister_memory(there.address)
    assert here.engine.get_first_buffer_address(there.name) == 0


def test_managed_buffers_answer_as_measured(here: Node, there: Node) -> None:
    engine = here.engine
    address = engine.allocate_managed_buffer(1024)
    assert address > 0
    assert engine.register_memory(address, 1024) == -7
    assert engine.write_bytes_to_buffer(address, "hello", 5) == 0
    assert engine.read_bytes_from_buffer(address, 5) == b"hello"
    assert engine.write_bytes_to_buffer(address, b"he\xffl\0x", 6) == 0  # type: ignore[arg-type]
    assert engine.read_bytes_from_buffer(address, 6) == b"he\xffl\0x"
    assert engine.write_bytes_to_buffer(address, "ab", 1) == 0
    assert engine.read_bytes_from_buffer(address, 2) == b"ae"
    assert engine.read_bytes_from_buffer(address, 0) == b""
    assert engine.transfer_sync_write(there.name, address, there.address, 3) == 0
    assert bytes(there.memory[:4]) == b"ae\xff\2"
    assert engine.allocate_managed_buffer(0) > 0
    assert engine.free_managed_buffer(address, 1024) == 0
    assert engine.free_managed_buffer(address, 1024) == 0
    assert engine.free_managed_buffer(123, 1024) == 0
    assert engine.allocate_managed_buffer(1024) == address


def test_a_managed_buffer_the_machine_has_no_room_for_is_0(here: Node) -> None:
    assert here.engine.allocate_managed_buffer(1 << 60) == 0


def test_a_blind_access_is_refused_where_upstream_crashes_or_overruns(here: Node) -> None:
    engine = here.engine
    assert engine.read_bytes_from_buffer(8, 3) == b""
    assert engine.write_bytes_to_buffer(8, "abc", 3) == -1
    assert engine.write_bytes_to_buffer(here.address, "ab", 3) == -1
    assert bytes(here.memory[:2]) == b"\1\1"
    loose = np.frombuffer(bytearray(b"loose"), np.uint8)
    assert engine.read_bytes_from_buffer(loose.ctypes.data, 5) == b"loose"


# ---------------------------------------------------------------- notifications and probes


def test_a_notification_arrives_once_and_after_the_bytes_as_measured(here: Node, there: Node) -> None:
    columns = [here.address], [there.address], [16]
    write = TransferOpcode.Write
    args = there.name, here.address, there.address, 16, write
    assert here.engine.transfer_sync(*args, TransferNotify("name", "text")) == 0
    assert here.engine.batch_transfer_sync(there.name, *columns, write, TransferNotify("n2", "m2")) == 0
    assert [(note.name, note.msg) for note in there.engine.get_notifies()] == [("name", "text"), ("n2", "m2")]
    assert there.engine.get_notifies() == []
    assert here.engine.get_notifies() == []


def test_a_failed_transfer_notifies_nobody(here: Node, there: Node) -> None:
    args = there.name, here.address, there.address + SIZE, 16, TransferOpcode.Write
    assert here.engine.transfer_sync(*args, TransferNotify("name", "text")) == -1
    assert there.engine.get_notifies() == []


def test_a_notification_is_two_texts_that_can_be_changed_as_measured() -> None:
    note = TransferNotify("a", "b")
    note.msg = "c"
    assert (note.name, note.msg) == ("a", "c")
    assert (TransferNotify().name, TransferNotify(name="x", msg="y").msg) == ("", "y")


def test_probes_answer_as_measured(here: Node, there: Node, dead: str) -> None:
    assert here.engine.send_probe(there.name) == 0
    assert here.engine.send_probe(peer_server_name=dead) == -102
    assert here.engine.send_probe("nonsense") == -101
    there.engine.close()
    assert here.engine.send_probe(there.name) == -102


# ---------------------------------------------------------------- life


def test_before_initialize_every_call_is_a_failure_where_upstream_crashes(
    logged: list[dict[str, Any]],
) -> None:
    engine = TransferEngine()
    name, read = f"{HOST}:1", TransferOpcode.Read
    answers = [
        engine.get_rpc_port(), engine.register_memory(4096, 16), engine.unregister_memory(4096),
        engine.batch_register_memory([4096], [16]), engine.batch_unregister_memory([4096]),
        engine.transfer_sync_write(name, 1, 1, 1), engine.transfer_sync_read(name, 1, 1, 1),
        engine.transfer_sync(name, 1, 1, 1, read), engine.batch_transfer_sync(name, [1], [1], [1], read),
        engine.transfer_check_status(1), engine.get_batch_transfer_status([1]),
        engine.free_managed_buffer(4096, 1), engine.send_probe(name),
    ]  # fmt: skip
    assert set(answers) == {-1}
    assert [line["reason"][:21] for line in logged] == ["call initialize first"] * len(answers)
    nothing = [
        engine.allocate_managed_buffer(10), engine.get_first_buffer_address(name),
        engine.transfer_submit_write(name, 1, 1, 1), engine.batch_transfer_async_write(name, [1], [1], [1]),
        engine.batch_transfer_async_read(name, [1], [1], [1]), engine.get_engine_ptr(),
    ]  # fmt: skip
    assert set(nothing) == {0}
    assert engine.get_notifies() == []


def test_before_initialize_these_answer_as_measured() -> None:
    engine = TransferEngine()
    assert engine.get_engine() is None
    assert engine.warmup_efa_segment("x") == 0
    assert "cpu:0" in json.loads(engine.get_local_topology())
    loose = np.frombuffer(bytearray(b"loose"), np.uint8)
    assert engine.read_bytes_from_buffer(loose.ctypes.data, 5) == b"loose"


@pytest.mark.parametrize(
    ("host", "protocol", "device"),
    [
        (HOST, "tcp", None), (HOST, "", ""), (HOST, "rdma", ""), (HOST, "rdma", "mlx5_0"),
        (HOST, "smoke", ""), ("", "tcp", ""), ("no.such.host", "tcp", ""),
        (f"{HOST}:15555", "tcp", ""), ("[::1]", "tcp", ""),
    ],
)  # fmt: skip
def test_initialize_takes_what_upstream_was_measured_to_take(
    host: str, protocol: str, device: str | None
) -> None:
    engine = TransferEngine()
    assert engine.initialize(host, "P2PHANDSHAKE", protocol, device) == 0
    assert 15_000 <= engine.get_rpc_port() <= 17_000
    assert engine.get_engine() is not None
    engine.close()


def test_rdma_without_a_device_says_so(logged: list[dict[str, Any]]) -> None:
    engine = TransferEngine()
    engine.initialize(HOST, "P2PHANDSHAKE", "rdma", "no_such_nic")
    assert [line for line in logged if "no RDMA here" in line["event"] and "no_such_nic" in line["reason"]]
    engine.close()


@pytest.mark.parametrize(
    "metadata", ["nonsense:x", "", "redis://127.0.0.1:9", "http://127.0.0.1:9/metadata", "etcd://127.0.0.1:9"]
)
def test_a_bad_metadata_server_is_minus_1_as_measured_and_nothing_is_left_open(metadata: str) -> None:
    engine = TransferEngine()
    assert engine.initialize(HOST, metadata, "tcp", "") == -1
    assert engine.register_memory(4096, 16) == -1


def test_names_of_arguments_are_positional_as_measured() -> None:
    with pytest.raises(TypeError):
        TransferEngine().initialize(
            local_hostname=HOST, metadata_server="P2PHANDSHAKE", protocol="", device_name=""
        )  # type: ignore[call-arg]


def test_initialize_ext_puts_the_scheme_before_the_address(there: Node) -> None:
    server = KVBootstrapServer(0)
    server.run()
    engine = TransferEngine()
    try:
        assert engine.initialize_ext(HOST, "P2PHANDSHAKE", "tcp", "", "http") == 0
        assert engine.initialize_ext("me", f"127.0.0.1:{server.port}/metadata", "tcp", "", "http") == 0
        assert engine.initialize_ext("me", "127.0.0.1:9/metadata", "tcp", "", "http") == -1
    finally:
        engine.close()
        server.close()


def test_a_second_initialize_starts_anew_as_measured(here: Node) -> None:
    port = here.engine.get_rpc_port()
    assert here.engine.initialize(HOST, "P2PHANDSHAKE", "tcp", "") == 0
    assert here.engine.get_rpc_port() != port
    assert here.engine.register_memory(here.address, SIZE) == 0


def test_an_engine_ends_with_its_object(here: Node) -> None:
    there = Node()
    name = there.name
    assert here.engine.send_probe(name) == 0
    del there
    assert here.engine.send_probe(name) == -102


def test_after_close_every_call_is_a_failure(here: Node) -> None:
    here.engine.close()
    here.engine.close()
    assert here.engine.get_rpc_port() == -1
    assert here.engine.register_memory(here.address, SIZE) == -1


# ---------------------------------------------------------------- environment


@pytest.mark.parametrize(("key", "value"), [("MC_TRANSFER_TIMEOUT", "soon"), ("MOONCAKE_SECRET", "short")])
def test_a_bad_variable_is_minus_1_and_named(
    key: str, value: str, monkeypatch: pytest.MonkeyPatch, logged: list[dict[str, Any]]
) -> None:
    monkeypatch.setenv(key, value)
    assert TransferEngine().initialize(HOST, "P2PHANDSHAKE", "tcp", "") == -1
    assert key in logged[-1]["reason"]


def test_the_port_comes_from_the_range_and_the_first_wish_is_tried_first(
    here: Node, monkeypatch: pytest.MonkeyPatch, dead: str
) -> None:
    taken, free = here.engine.get_rpc_port(), int(dead.rpartition(":")[2])
    monkeypatch.setenv("MC_MIN_RPC_PORT", str(taken))
    monkeypatch.setenv("MC_MAX_RPC_PORT", str(taken))
    engine = TransferEngine()
    assert engine.initialize(HOST, "P2PHANDSHAKE", "tcp", "") == -1
    monkeypatch.setenv("MC_HANDSHAKE_PORT", str(free))
    assert engine.initialize(HOST, "P2PHANDSHAKE", "tcp", "") == 0
    assert engine.get_rpc_port() == free
    engine.close()


def test_forced_tcp_moves_bytes_without_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MC_FORCE_TCP", "1")
    here, there = Node(fill=1), Node(fill=2)
    assert here.engine.transfer_sync_write(there.name, here.address, there.address, 100) == 0
    assert bytes(there.memory[99:101]) == b"\1\2"
    inner = here.engine.get_engine()
    assert inner is not None
    assert inner.engine.config.transports == ("tcp",)
    here.engine.close()
    there.engine.close()


def test_a_peer_that_does_not_answer_costs_the_handshake_s_time_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MC_HANDSHAKE_CONNECT_TIMEOUT", "0.05")  # upstream's probe was measured to take 61.8 s
    here = Node()
    with socket.socket() as listening:
        listening.bind((HOST, 0))
        listening.listen()
        silent = f"{HOST}:{listening.getsockname()[1]}"
        assert here.engine.send_probe(silent) == -102
        assert here.engine.transfer_sync_write(silent, here.address, 4096, 1) == -1
        assert here.engine.batch_transfer_async_write(silent, [here.address], [4096], [1]) == 0
        assert here.engine.get_first_buffer_address(silent) == 0
    here.engine.close()


# ---------------------------------------------------------------- names and who may come in


@pytest.fixture
def server() -> Iterator[KVBootstrapServer]:
    server = KVBootstrapServer(0)
    server.run()
    yield server
    server.close()


def test_with_a_metadata_server_a_name_leads_to_its_engine(server: KVBootstrapServer) -> None:
    url = f"http://127.0.0.1:{server.port}/metadata"
    here, there = Node(f"{HOST}:17777", url, fill=1), Node("decode-0", url, fill=2)
    assert here.engine.transfer_sync_write("decode-0", here.address, there.address, 100) == 0
    assert bytes(there.memory[99:101]) == b"\1\2"
    assert there.engine.get_first_buffer_address(f"{HOST}:17777") == here.address
    assert there.engine.get_first_buffer_address("decode-0") == there.address
    assert here.engine.send_probe("decode-0") == 0
    assert here.engine.send_probe("nobody") == -200  # as measured on upstream
    assert here.engine.get_first_buffer_address("nobody") == 0
    here.engine.close()
    assert there.engine.send_probe(f"{HOST}:17777") in (-102, -200)
    there.engine.close()


def test_a_peer_that_moved_is_looked_up_again(server: KVBootstrapServer) -> None:
    url = f"http://127.0.0.1:{server.port}/metadata"
    here, first = Node("here", url, fill=1), Node("there", url)
    assert here.engine.send_probe("there") == 0
    first.engine.close()
    second = Node("there", url, fill=2)
    for _ in range(2):  # the first try finds the old place empty, and forgets it
        code = here.engine.transfer_sync_write("there", here.address, second.address, 100)
    assert code == 0
    assert bytes(second.memory[99:101]) == b"\1\2"
    here.engine.close()
    second.engine.close()


def own_address() -> str:
    """Return an address of this machine that is not loopback, "" if it has none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing
        except OSError:
            return ""
        return str(probe.getsockname()[0])


@pytest.mark.skipif(not own_address(), reason="this machine has no address but loopback")
def test_without_a_secret_only_this_host_can_connect_and_the_log_says_so(
    here: Node, logged: list[dict[str, Any]]
) -> None:
    host = own_address()
    there = Node(host, fill=2)
    assert any("MOONCAKE_SECRET" in line["event"] for line in logged)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((host, there.engine.get_rpc_port()), 5.0)
    assert here.engine.transfer_sync_write(there.name, here.address, there.address, 10) == 0
    assert bytes(there.memory[9:11]) == b"\1\2"
    there.engine.close()


@pytest.mark.skipif(not own_address(), reason="this machine has no address but loopback")
def test_with_a_secret_the_given_address_is_bound_and_strangers_are_refused(
    here: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOONCAKE_SECRET", SECRET)
    there, friend = Node(own_address(), fill=2), Node(own_address(), fill=3)
    assert here.engine.transfer_sync_write(there.name, here.address, there.address, 10) == -1
    assert friend.engine.transfer_sync_write(there.name, friend.address, there.address, 10) == 0
    assert bytes(there.memory[9:11]) == b"\3\2"
    there.engine.close()
    friend.engine.close()


# ---------------------------------------------------------------- the rest


def test_the_module_has_upstream_s_items() -> None:
    assert (module.Read, module.Write) == (TransferOpcode.Read, TransferOpcode.Write)
    assert TransferEngine.TransferOpcode is TransferOpcode
    assert (int(TransferOpcode.Read), TransferOpcode.Write.value, TransferOpcode(1).name) == (0, 1, "Write")
    for name in ("CUDA", "EFA", "HIP", "INTRA_NVLINK", "MNNVL", "MUSA"):
        assert getattr(module, f"SUPPORT_{name}") is False


def test_the_topology_is_a_matrix_and_an_unknown_device_is_in_no_row(here: Node) -> None:
    assert all(len(row) == 2 for row in json.loads(here.engine.get_local_topology()).values())
    rows = json.loads(here.engine.get_local_topology(device_name="mlx5_99"))
    assert rows
    assert all(row == [[], []] for row in rows.values())


def test_there_is_no_cpp_engine_behind_it(here: Node, logged: list[dict[str, Any]]) -> None:
    assert here.engine.get_engine_ptr() == 0
    assert "no C++ object" in logged[-1]["event"]
