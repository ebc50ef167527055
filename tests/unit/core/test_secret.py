"""Control sockets beyond this host: only those who have the cluster's secret get an answer."""

import asyncio

import pytest
import zmq
import zmq.asyncio

from mooncake.core import rpc, secret
from mooncake.core.errors import ConfigError, PeerTimeout
from mooncake.core.messages import Ok, Stats

SECRET = "correct horse battery staple"
OTHER = "incorrect horse battery staple"


@pytest.fixture
def become(monkeypatch):
    """Be a process with another secret from now on; "" = none."""

    def switch(value: str) -> None:
        monkeypatch.setenv(secret.SECRET_ENV, value)
        secret.cluster_secret.cache_clear()

    monkeypatch.delenv(secret.SECRET_FILE_ENV, raising=False)
    yield switch
    secret.cluster_secret.cache_clear()


async def answer(request):
    return Ok()


async def ask(endpoint: str, deadline_s: float):
    client = rpc.RpcClient(endpoint, Ok)
    try:
        return await client.call(Stats(), deadline_s)
    finally:
        await client.close()


@pytest.mark.parametrize("client", ["", OTHER])
def test_a_server_answers_nobody_without_its_secret(become, client):
    async def main() -> None:
        become(SECRET)
        server = rpc.RpcServer("tcp://127.0.0.1:0", Stats, answer)
        server.start()
        try:
            assert await ask(server.endpoint, 20.0) == Ok()
            become(client)
            with pytest.raises(PeerTimeout):
                await ask(server.endpoint, 0.5)
        finally:
            await server.close()

    asyncio.run(main())


def test_a_client_with_a_secret_takes_no_server_without_it(become):
    async def main() -> None:
        become("")
        server = rpc.RpcServer("tcp://127.0.0.1:0", Stats, answer)
        server.start()
        try:
            become(SECRET)
            with pytest.raises(PeerTimeout):
                await ask(server.endpoint, 0.5)
        finally:
            await server.close()

    asyncio.run(main())


def test_events_are_read_by_those_who_have_the_secret(become):
    become(SECRET)
    context = zmq.Context()
    try:
        publisher, friend, stranger = (context.socket(kind) for kind in (zmq.XPUB, zmq.SUB, zmq.SUB))
        endpoint = rpc.bind(publisher, "tcp://127.0.0.1:0")
        become("")
        rpc.connect(stranger, endpoint)
        become(SECRET)
        rpc.connect(friend, endpoint)
        for reader in (stranger, friend):
            reader.subscribe(b"")
        assert publisher.poll(20_000), "the friend has subscribed"
        publisher.recv()
        publisher.send(b"stored")
        assert friend.poll(20_000)
        assert not stranger.poll(200)
        assert not publisher.poll(0), "the stranger never got in"
    finally:
        context.destroy(linger=0)


def test_other_hosts_are_refused_without_a_secret(become):
    become("")
    assert rpc.check_endpoint("tcp://127.0.0.1:7700") == "tcp://127.0.0.1:7700"
    with pytest.raises(ConfigError, match=secret.SECRET_FILE_ENV):
        rpc.check_endpoint("tcp://10.0.0.5:7700")
    become(SECRET)
    assert rpc.check_endpoint("tcp://10.0.0.5:7700") == "tcp://10.0.0.5:7700"
    with pytest.raises(ConfigError, match="HOST:PORT"):
        rpc.check_endpoint("http://10.0.0.5:7700")


def test_sockets_in_a_folder_need_no_secret(become, tmp_path):
    async def main() -> None:
        become(SECRET)
        server = rpc.RpcServer(f"ipc://{tmp_path}/s", Stats, answer)
        server.start()
        try:
            become("")
            assert await ask(server.endpoint, 20.0) == Ok()
        finally:
            await server.close()

    asyncio.run(main())


def test_a_secret_that_is_refused_is_not_shown(become):
    become("short")
    with pytest.raises(ConfigError) as caught:
        secret.cluster_secret()
    assert "short" not in str(caught.value).replace("too short", "")
