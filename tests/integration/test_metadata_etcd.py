"""etcd does what every metadata backend does: the contract's own tests, on real servers, one of which
lets nobody in without a user and a password."""

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


Setup = tuple[EtcdServers, dict[str, str]]
"""A cluster, and what a client has to say to it."""


@pytest.fixture(scope="module", params=["anybody", "user and password"])
def setup(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setup]:
    folder = tmp_path_factory.mktemp("etcd")
    with running(folder) as servers:
        if request.param == "anybody":
            yield servers, {}
            return
        servers.enable_auth("mooncake", "secret", "/test/")
        (folder / "password").write_text("secret\n")
        yield servers, {"user": "mooncake", "password_file": str(folder / "password")}


@pytest.fixture
async def backend(setup: Setup) -> AsyncIterator[Backend]:
    """One server for all tests: a namespace of one's own is a store of one's own."""
    servers, who = setup
    options = servers.options(namespace=f"/test/{next(namespaces)}", **who)
    store = EtcdMetadata(options, poll_s=POLL_S)

    async def forget(revision: int) -> None:
        await asyncio.to_thread(servers.compact, revision)

    yield Backend(store, forget, LEASE_S_MIN)
    await store.close()
