"""The recovery benchmark knows what it put where, and notices a block that is wrong or missing."""

import pytest

from benchmarks import recovery
from benchmarks.recovery import NODES, SIZE, TWICE, homes_of, key_of, missing, put, read
from kvstore.engine.client import PoolClient
from mooncake.core.errors import IntegrityError
from tests.unit.kvstore.conftest import start_store, store_parent  # noqa: F401 - fixtures


@pytest.fixture
def pool(start_store):  # noqa: F811
    process = start_store(capacity_bytes=2 << 20)
    client = PoolClient(process.record, "w", deadline_s=20.0)
    yield client
    client.close()


def test_every_block_has_one_home_and_every_tenth_a_second_one():
    homes = [homes_of(number) for number in range(30 * TWICE)]
    assert {len(set(some)) for some in homes} == {1, 2}
    assert sum(len(some) == 2 for some in homes) == 30
    assert {node for some in homes for node in some} == set(NODES)
    assert len({key_of(number) for number in range(10_000)}) == 10_000


def test_blocks_are_read_as_they_were_put_and_what_is_missing_is_counted(pool):
    keys = [key_of(number) for number in range(8)]
    assert put(pool, keys) == [True] * 8
    assert put(pool, keys[:1]) == [False]  # it is there already
    assert read(pool, keys) == 8
    assert missing(pool, [0, 1, 100, 2, 101, 7]) == 2


def test_a_block_with_other_bytes_is_noticed(pool):
    put(pool, [key_of(1)])
    lease = pool.acquire([key_of(1)], 20.0)
    pool.view(lease.blocks[0].offset, SIZE)[SIZE - 1] ^= 1
    with pytest.raises(IntegrityError):
        read(pool, [key_of(1)])


def test_a_sound_block_under_another_ones_key_is_noticed(pool):
    (slot,) = pool.reserve([key_of(2)], SIZE)
    slot.view[:32] = key_of(3)
    pool.commit([slot.ticket], [recovery.block_checksum(slot.key, slot.view)])
    with pytest.raises(IntegrityError):
        read(pool, [key_of(2)])
