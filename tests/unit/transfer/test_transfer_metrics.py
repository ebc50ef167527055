"""What Prometheus is told of transfers: everything once, in flight back to zero, a bounded set of labels."""

import threading
import time
from random import Random

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest

from transfer.health import Health, PathState
from transfer.metrics import LINKS_MAX, TransferCollector, TransferMetrics
from transfer.model import Opcode


def registry_of(metrics: TransferMetrics, health: Health | None = None) -> CollectorRegistry:
    registry = CollectorRegistry()
    known = health or Health()
    registry.register(TransferCollector(metrics, lambda: known.states(0.0)))
    return registry


def sample(registry: CollectorRegistry, name: str, **labels: str) -> float | None:
    return registry.get_sample_value(f"mooncake_transfer_{name}", labels)


def test_a_part_that_moved_counts_its_bytes_time_and_outcome() -> None:
    metrics = TransferMetrics()
    for _ in range(2):
        metrics.began("rdma", "mlx5_0", 100)
        metrics.moved("rdma", "mlx5_0", Opcode.READ, 100, 0.25)
    registry = registry_of(metrics)
    where = {"transport": "rdma", "link": "mlx5_0", "op": "read"}
    assert sample(registry, "bytes_total", **where) == 200
    assert sample(registry, "seconds_total", **where) == 0.5
    assert sample(registry, "parts_total", **where, outcome="moved") == 2


def test_a_part_that_failed_counts_its_reason_and_no_bytes() -> None:
    metrics = TransferMetrics()
    metrics.began("tcp", "peer:1", 100)
    metrics.failed("tcp", "peer:1", Opcode.WRITE, 100, "gone")
    registry = registry_of(metrics)
    where = {"transport": "tcp", "link": "peer:1"}
    assert sample(registry, "failures_total", **where, reason="gone") == 1
    assert sample(registry, "parts_total", **where, op="write", outcome="failed") == 1
    assert sample(registry, "bytes_total", **where, op="write") is None


def test_of_a_part_that_failed_whole_only_the_time_counts_as_moving() -> None:
    metrics = TransferMetrics()
    metrics.began("tcp", "peer:1", 100)
    metrics.moved("tcp", "peer:1", Opcode.READ, 0, 0.5)
    metrics.failed("tcp", "peer:1", Opcode.READ, 100, "gone")
    counts = metrics.counts()
    assert counts.parts == {("tcp", "peer:1", "read", "failed"): 1}
    assert counts.seconds["tcp", "peer:1", "read"] == 0.5


def test_retries_failovers_and_choices_are_counted() -> None:
    metrics = TransferMetrics()
    metrics.retried("rdma", "mlx5_0")
    metrics.failed_over("rdma", "tcp")
    metrics.chose("tcp", "hint")
    registry = registry_of(metrics)
    assert sample(registry, "retries_total", transport="rdma", link="mlx5_0") == 1
    assert sample(registry, "failovers_total", **{"from": "rdma", "to": "tcp"}) == 1
    assert sample(registry, "choices_total", transport="tcp", reason="hint") == 1


def test_bytes_are_in_flight_from_the_beginning_to_the_last_word() -> None:
    metrics = TransferMetrics()
    where = {"transport": "tcp", "link": "peer:1"}
    metrics.began("tcp", "peer:1", 100)
    assert sample(registry_of(metrics), "inflight_bytes", **where) == 100
    metrics.moved("tcp", "peer:1", Opcode.READ, 60, 0.1)
    assert sample(registry_of(metrics), "inflight_bytes", **where) == 40
    metrics.failed("tcp", "peer:1", Opcode.READ, 40, "gone")
    assert sample(registry_of(metrics), "inflight_bytes", **where) == 0


def test_the_state_of_every_path_that_ever_failed_is_told() -> None:
    health = Health()
    health.failed("rdma/peer:1", 0.0, fatal=True)
    health.failed("tcp/peer:1", 0.0)
    registry = registry_of(TransferMetrics(), health)
    assert sample(registry, "path_state", transport="rdma", link="peer:1") == PathState.QUARANTINED
    assert sample(registry, "path_state", transport="tcp", link="peer:1") == PathState.USABLE


def test_links_beyond_the_limit_share_one_label() -> None:
    metrics = TransferMetrics()
    for number in range(3 * LINKS_MAX):
        metrics.moved("tcp", f"peer:{number}", Opcode.READ, 1, 0.0)
    keys = metrics.counts().bytes
    assert len(keys) == LINKS_MAX + 1
    assert keys["tcp", "other", "read"] == 2 * LINKS_MAX
    assert keys["tcp", "peer:0", "read"] == 1


def test_the_worst_of_the_paths_that_share_a_label_is_told() -> None:
    metrics, health = TransferMetrics(links_max=0), Health()
    for path, fatal in (("tcp/a", False), ("tcp/b", True), ("tcp/c", False)):
        health.failed(path, 0.0, fatal=fatal)
    registry = registry_of(metrics, health)
    assert sample(registry, "path_state", transport="tcp", link="other") == PathState.QUARANTINED


def test_an_idle_engine_can_be_scraped() -> None:
    text = generate_latest(registry_of(TransferMetrics())).decode()
    assert "# TYPE mooncake_transfer_bytes_total counter" in text
    assert "# TYPE mooncake_transfer_inflight_bytes gauge" in text


PARTS = st.lists(
    st.tuples(
        st.sampled_from(["rdma", "tcp"]),
        st.sampled_from(["a", "b", "c", "d"]),
        st.integers(0, 1 << 40),
        st.floats(0, 1),
    ),
    max_size=30,
)


@given(PARTS, st.integers(0, 4), st.randoms(use_true_random=False))
def test_nothing_is_in_flight_once_every_part_has_ended(
    parts: list[tuple[str, str, int, float]], links_max: int, random: Random
) -> None:
    metrics = TransferMetrics(links_max)
    flying: list[tuple[str, str, int, int]] = []
    for transport, link, size_bytes, share in parts:
        metrics.began(transport, link, size_bytes)
        moved_bytes = int(size_bytes * share)
        flying.append((transport, link, moved_bytes, size_bytes - moved_bytes))
    random.shuffle(flying)
    for transport, link, moved_bytes, failed_bytes in flying:
        metrics.moved(transport, link, Opcode.WRITE, moved_bytes, 0.1)
        metrics.failed(transport, link, Opcode.WRITE, failed_bytes, "timeout")
    counts = metrics.counts()
    assert all(value == 0 for value in counts.inflight_bytes.values())
    assert sum(counts.bytes.values()) == sum(moved for _, _, moved, _ in flying)


class Interrupted(float):
    """A duration in the middle of whose addition another thread gets to run."""

    def __radd__(self, other: float) -> float:
        time.sleep(0)
        return float(other) + float(self)


def test_threads_lose_no_count() -> None:
    metrics = TransferMetrics()

    def work() -> None:
        for _ in range(200):
            metrics.began("shm", "peer:1", 3)
            metrics.moved("shm", "peer:1", Opcode.READ, 3, Interrupted(0.5))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    counts = metrics.counts()
    assert counts.seconds["shm", "peer:1", "read"] == 400
    assert counts.inflight_bytes["shm", "peer:1"] == 0


def test_how_long_parts_took_is_a_histogram_of_those_that_moved_single_ones_among_them():
    metrics, registry = TransferMetrics(), CollectorRegistry()
    registry.register(TransferCollector(metrics))
    metrics.moved("tcp", "a", Opcode.READ, 10, 0.03)
    metrics.moved("tcp", "b", Opcode.READ, 0, 9.0)  # it failed whole: no time of a move
    metrics.single("tcp", "b", Opcode.READ, 10, 1e-4)

    def count(le: str) -> float | None:
        labels = {"transport": "tcp", "op": "read", "le": le}
        return registry.get_sample_value("mooncake_transfer_part_seconds_bucket", labels)

    assert [count(le) for le in ("5e-05", "0.0001", "0.02", "0.05", "+Inf")] == [0, 1, 1, 2, 2]
