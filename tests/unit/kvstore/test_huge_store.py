"""A store whose memory is of huge pages serves engines as any other does."""

import numpy as np
import pytest

from kvstore.engine.client import PoolClient
from kvstore.store.config import StoreConfig
from kvstore.store.service import StoreService
from mooncake.core.errors import ConfigError
from mooncake.core.keys import block_checksum
from mooncake.core.messages import StoreRecord
from tests.unit.huge import more_huge_pages
from transfer.hugepages import free_huge_bytes
from transfer.segment import HUGE_PAGE_BYTES

pytestmark = pytest.mark.serial
PAGES = 4
BLOCK_BYTES = HUGE_PAGE_BYTES // 2 + 4096
"""So that some lie across the border of two huge pages."""


def key(n: int) -> bytes:
    return n.to_bytes(32, "big")


def exchange(record: StoreRecord) -> None:
    """One engine writes, another reads the same bytes."""
    writer, reader = (PoolClient(record, name, deadline_s=10.0) for name in ("a", "b"))
    try:
        slots = writer.reserve([key(n) for n in range(4)], BLOCK_BYTES, 10.0)
        for n, slot in enumerate(slots):
            slot.view[:] = np.random.default_rng(n).bytes(BLOCK_BYTES)
        sums = [block_checksum(slot.key, slot.view) for slot in slots]
        assert all(writer.commit([slot.ticket for slot in slots], sums, 10.0))
        lease = reader.acquire([key(n) for n in range(4)], lease_s=5)
        assert len(lease) == 4
        for n, view in enumerate(lease.views):
            assert bytes(view) == np.random.default_rng(n).bytes(BLOCK_BYTES)
            assert lease.verify(n)
    finally:
        writer.close()
        reader.close()


def test_engines_share_blocks_in_huge_pages_which_go_back_to_the_machine(start_store):
    with more_huge_pages(PAGES):
        before = free_huge_bytes()
        store = start_store(capacity_bytes=PAGES * HUGE_PAGE_BYTES, hugepages="require")
        assert before - free_huge_bytes() == PAGES * HUGE_PAGE_BYTES
        exchange(store.record)
        store.stop()
        assert free_huge_bytes() == before


async def test_a_store_that_must_have_huge_pages_does_not_start_without(tmp_path, monkeypatch):
    monkeypatch.setattr("transfer.hugepages.free_huge_bytes", lambda: 0)
    config = StoreConfig(
        node="n", capacity_bytes=HUGE_PAGE_BYTES, run_dir=str(tmp_path / "run"), hugepages="require"
    )
    with pytest.raises(ConfigError, match=r"hugepages=require: 0 MiB .*vm\.nr_hugepages"):
        await StoreService(config).start()
