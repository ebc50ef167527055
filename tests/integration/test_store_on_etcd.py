"""The commands find each other through etcd: a store registers there, and its death ends its lease."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest

from mooncake.core.messages import STORES_PREFIX, StoreRecord
from mooncake.core.metadata_open import open_metadata
from tests.integration.etcd_servers import NEEDS_ETCD, running

pytestmark = [pytest.mark.integration, NEEDS_ETCD]

WAIT_S = 30.0
MOONCAKE = str(Path(sys.executable).parent / "mooncake")


@pytest.fixture(scope="module")
def etcd(tmp_path_factory):
    with running(tmp_path_factory.mktemp("etcd")) as servers:
        yield f"etcd://{servers.options().endpoints[0]}/store-test"


async def stores(metadata) -> list[StoreRecord]:
    entries = (await metadata.get(STORES_PREFIX)).entries
    return [msgspec.json.decode(entry.value, type=StoreRecord) for entry in entries]


async def until(metadata, count: int) -> list[StoreRecord]:
    end_s = time.monotonic() + WAIT_S
    while len(found := await stores(metadata)) != count:
        assert time.monotonic() < end_s, found
        await asyncio.sleep(0.1)
    return found


async def test_a_store_registers_in_etcd_and_is_gone_after_its_death(etcd, tmp_path):
    process = subprocess.Popen(  # noqa: ASYNC220
        [
            *(MOONCAKE, "store", "--metadata", etcd, "--capacity", "16MiB"),
            *("--node", "n1", "--run-dir", str(tmp_path / "run")),
        ],
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    metadata = open_metadata(etcd)
    try:
        (record,) = await until(metadata, 1)
        assert (record.node, record.pid) == ("n1", process.pid)
        os.killpg(process.pid, signal.SIGKILL)
        assert await until(metadata, 0) == []
    finally:
        process.kill()
        process.communicate()
        await metadata.close()


def test_an_etcd_that_is_not_there_is_said_and_the_store_stays_useful(tmp_path):
    """Its host's engines reach it by its socket; membership follows when etcd comes."""
    process = subprocess.Popen(
        [
            *(MOONCAKE, "store", "--metadata", "etcd://127.0.0.1:1/x"),
            *("--capacity", "16MiB", "--node", "n1", "--run-dir", str(tmp_path / "run")),
        ],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        end_s = time.monotonic() + WAIT_S
        while not (tmp_path / "run" / "store-n1.sock").is_socket():
            assert process.poll() is None
            assert time.monotonic() < end_s
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(WAIT_S) == 0
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("address", "words"),
    [("etcd://", "etcd"), ("http://127.0.0.1:1", "http://127.0.0.1:1"), ("etcds://h:1?ca=/no", "/no")],
)
def test_a_bad_metadata_address_is_named(address, words, tmp_path):
    done = subprocess.run(
        [MOONCAKE, "store", "--metadata", address, "--run-dir", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=False,
    )
    assert done.returncode == 2
    assert words in done.stderr
