"""What was read a moment ago can be spared by those who remove."""

import pytest

from kvstore.client.model import Outcome
from kvstore.node import reads
from kvstore.node.reads import Reads
from mooncake.core.errors import RequestError
from tests.unit.kvstore.test_kvstore_node import keys, make, put
from tests.unit.kvstore.test_pool import PATIENCE_S, open_pool, outcomes, start_node

__all__ = ["open_pool", "start_node"]  # fixtures


def test_the_last_reads_are_known_by_their_time():
    last = Reads()
    last.note(1.0, keys(1, 2))
    last.note(5.0, keys(2))
    assert last.since(0.0, keys(1, 2, 3)) == keys(1, 2)
    assert last.since(1.0, keys(1, 2, 3)) == keys(2)
    last.forget(keys(2)[0])
    assert last.since(0.0, keys(1, 2, 3)) == keys(1)


def test_of_too_many_reads_the_oldest_are_forgotten(monkeypatch):
    monkeypatch.setattr(reads, "READS_MAX", 2)
    last = Reads()
    last.note(1.0, keys(1, 2))
    last.note(2.0, keys(1, 3))
    assert last.since(0.0, keys(1, 2, 3)) == keys(1, 3)


def test_a_block_that_was_dropped_and_put_again_has_not_been_read():
    node = make()
    put(node, 1, now_s=1.0)
    node.note_reads(keys(1))
    assert node.read_within(2.0, keys(1, 2), 5.0) == keys(1)
    assert node.read_within(9.0, keys(1), 5.0) == []
    node.drop(9.0, keys(1))
    put(node, 1, now_s=9.0)
    assert node.read_within(9.0, keys(1), 100.0) == []
    with pytest.raises(RequestError, match="unless_read_s"):
        node.read_within(9.0, keys(1), float("nan"))


def read(pool, node: str, name: str) -> None:
    """Read it, and return when its store knows."""
    before = pool.stats(node).hits
    assert pool.get([name], deadline_s=PATIENCE_S) != [None]
    while pool.stats(node).hits == before:
        pass


@pytest.mark.parametrize("size", [100, 100_000])
def test_what_one_pool_has_read_another_one_spares(start_node, open_pool, size):
    store = start_node("n1")
    reader, remover = open_pool(store.record), open_pool(store.record)
    names = ["read", "only looked at", "missing"]
    reader.put(names[:2], [b"x" * size] * 2)
    read(reader, "n1", "read")
    assert reader.exists(names) == [True, True, False]
    assert outcomes(remover.remove(names, unless_read_s=3600.0, deadline_s=PATIENCE_S)) == [
        Outcome.HELD,
        Outcome.DONE,
        Outcome.MISSING,
    ]
    assert remover.get(["read"]) == [b"x" * size]
    assert outcomes(remover.remove(["read"])) == [Outcome.DONE]


def test_a_copy_that_nobody_read_stays_beside_one_that_was_read(start_node, open_pool):
    stores = [start_node("n1"), start_node("n2")]
    both = open_pool(*(store.record for store in stores))
    second = open_pool(stores[1].record)
    both.put(["x"], [b"x"], replicas=2, deadline_s=PATIENCE_S)
    read(second, "n2", "x")
    assert outcomes(both.remove(["x"], unless_read_s=3600.0, deadline_s=PATIENCE_S)) == [Outcome.HELD]
    assert [len(places) for places in both.places(["x"])] == [2]
    assert outcomes(both.remove(["x"], nodes=["n1"], unless_read_s=3600.0)) == [Outcome.DONE]
    assert [len(places) for places in both.places(["x"])] == [1]
