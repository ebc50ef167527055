"""etcd does what every metadata backend does: the contract's own tests, on a real server."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Iterator

import pytest

from mooncake.core.metadata_etcd import EtcdMetadata
from tests.integration.etcd_servers import LEASE_S_MIN, NEEDS_ETCD, EtcdServers, running
from tests.unit.core.test_metadata_contract import *  # noqa: F403 - the contract
from tests.unit.core.test_metadata_contract import POLL_S, Backend

pytestmark = [pytest.mark.integration, NEEDS_ETCD]

namespaces = itertools.count()


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdServers]:
    with running(tmp_path_factory.mktemp("etcd")) as servers:
        yield servers


@pytest.fixture
async def backend(servers: EtcdServers) -> AsyncIterator[Backend]:
    """One server for all tests: a namespace of one's own is a store of one's own."""
    options = servers.options(namespace=f"/test-{next(namespaces)}")
    store = EtcdMetadata(options, poll_s=POLL_S)

    async def forget(revision: int) -> None:
        await asyncio.to_thread(servers.compact, revision)

    yield Backend(store, forget, LEASE_S_MIN)
    await store.close()
