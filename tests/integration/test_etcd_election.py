"""The election's own tests, on a real etcd."""

import itertools
from collections.abc import AsyncIterator, Iterator

import pytest

from mooncake.core.metadata_etcd import EtcdMetadata
from tests.integration.etcd_servers import LEASE_S_MIN, NEEDS_ETCD, EtcdServers, running
from tests.unit.core.test_election import (  # noqa: F401 - collected here
    Cluster,
    elections,
    test_a_leader_stays_leader_beyond_its_first_lease,
    test_a_leader_that_is_no_longer_heard_is_followed_after_its_lease,
    test_a_leader_that_resigns_is_followed_at_once_by_one_with_a_higher_number,
    test_a_leader_whose_key_an_operator_removes_gives_way,
    test_one_of_three_leads_and_all_know_its_address,
)

pytestmark = [pytest.mark.integration, NEEDS_ETCD]

namespaces = itertools.count()


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdServers]:
    with running(tmp_path_factory.mktemp("etcd")) as servers:
        yield servers


@pytest.fixture
async def cluster(servers: EtcdServers) -> AsyncIterator[Cluster]:
    options = servers.options(namespace=f"/election-{next(namespaces)}")
    clients = [EtcdMetadata(options, poll_s=0.1) for _ in range(3)]
    yield Cluster(list(clients), LEASE_S_MIN)
    for client in clients:
        await client.close()
