"""An etcd that lets nobody in without a user and a password, and what goes wrong with those."""

import asyncio
import contextlib
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from mooncake.core.errors import ConfigError, PeerError
from mooncake.core.messages import STORES_PREFIX
from mooncake.core.metadata_etcd_options import PASSWORD_ENV, EtcdOptions, parse_etcd
from mooncake.core.metadata_follow import Follower, follow
from mooncake.core.metadata_registration import Registration, RegistrationState
from tests.integration.etcd_servers import LEASE_S_MIN, NEEDS_ETCD, EtcdServers, client, running
from tests.integration.etcd_tls import make_tls

pytestmark = [pytest.mark.integration, NEEDS_ETCD]

USER, PASSWORD = "mooncake", "open-sesame"
WAIT_S = 30.0
TOKEN_TTL_S = 1
"""etcd's default is 300 s after the last use."""
MOONCAKE = str(Path(sys.executable).parent / "mooncake")


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[EtcdServers]:
    with running(tmp_path, flags=(f"--auth-token-ttl={TOKEN_TTL_S}",)) as servers:
        yield servers


@pytest.fixture
def password_file(tmp_path: Path) -> Path:
    path = tmp_path / "password"
    path.write_text(PASSWORD + "\n")
    return path


def who(servers: EtcdServers, password_file: Path, **settings: str) -> EtcdOptions:
    return servers.options(user=USER, password_file=str(password_file), **settings)


def guard(servers: EtcdServers) -> None:
    servers.enable_auth(USER, PASSWORD, "/mooncake/")


@contextlib.asynccontextmanager
async def member(options: EtcdOptions) -> AsyncIterator[tuple[Registration, Follower]]:
    """One process registers, another one watches it."""
    async with client(options) as theirs, client(options) as ours:
        registration = Registration(theirs, "/n1", lambda: b"here", ttl_s=LEASE_S_MIN)
        registration.start()
        seen = follow(ours, "/", grace_s=WAIT_S)

        async def run() -> None:
            async for _ in seen:
                pass

        task = asyncio.create_task(run())
        try:
            yield registration, seen
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await registration.close()


async def until(condition: Callable[[], bool]) -> None:
    end_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end_s
        await asyncio.sleep(0.01)


def healthy(registration: Registration, seen: Follower) -> bool:
    registered = registration.state is RegistrationState.REGISTERED
    return registered and seen.connected and "/n1" in seen.entries


async def test_nobody_else_is_let_in_and_the_message_says_what_to_do(servers, password_file, tmp_path):
    guard(servers)
    other = tmp_path / "other"
    other.write_text("wrong")
    async with client(servers.options()) as store:
        with pytest.raises(ConfigError, match=r"user name is empty.*etcd://USER@"):
            await store.get("/")
    async with client(who(servers, other)) as store:
        with pytest.raises(ConfigError, match=f"does not sign in user '{USER}'.*{other}"):
            await store.get("/")
    async with client(who(servers, password_file, namespace="/elsewhere")) as store:
        with pytest.raises(ConfigError, match=r"permission denied.*etcd://USER@"):
            await store.get("/")
        with pytest.raises(ConfigError, match="permission denied"):
            await anext(store.watch("/", 1))


async def test_a_token_that_expired_is_replaced_without_an_error(servers, password_file):
    guard(servers)
    async with client(who(servers, password_file)) as store:
        await store.put("/a", b"1")
        token = store._token.value
        mark = msgspec.json.decode(store._ask_mark)

        async def refused() -> bool:
            # the server's own log tells nothing, and to ask with the token would make it live longer
            await asyncio.sleep(TOKEN_TTL_S + 0.5)
            headers = {"Authorization": token}
            exchange = servers._exchange
            body = msgspec.json.encode(mark)
            status, _ = await asyncio.to_thread(exchange, 0, "POST", "/v3/kv/range", body, headers)
            return status != 200

        async with asyncio.timeout(WAIT_S):
            while not await refused():
                pass
        assert (await store.put("/a", b"2")).done
        assert store._token.value != token
        assert [entry.value for entry in (await store.get("/a")).entries] == [b"2"]


async def test_members_stay_while_tokens_expire_again_and_again(servers, password_file):
    guard(servers)
    async with member(who(servers, password_file)) as (registration, seen):
        await until(lambda: healthy(registration, seen))
        end_s = time.monotonic() + 4 * TOKEN_TTL_S
        while time.monotonic() < end_s:
            assert seen.entries == {"/n1": b"here"}
            await asyncio.sleep(0.02)
        assert registration.registrations == 1


@pytest.mark.chaos
async def test_a_killed_server_forgets_all_tokens_and_everybody_signs_in_again(servers, password_file):
    guard(servers)
    async with member(who(servers, password_file)) as (registration, seen):
        await until(lambda: healthy(registration, seen))
        servers.kill()
        await until(lambda: registration.state is RegistrationState.AWAY and not seen.connected)
        await asyncio.to_thread(servers.start)
        await until(lambda: healthy(registration, seen))
        assert seen.entries == {"/n1": b"here"}


async def test_a_changed_password_is_taken_from_its_file_without_a_restart(servers, password_file):
    guard(servers)
    async with member(who(servers, password_file)) as (registration, seen):
        await until(lambda: healthy(registration, seen))
        servers.change_password(USER, "another")
        await until(lambda: not seen.connected)
        assert seen.entries == {"/n1": b"here"}  # and a lease is kept alive without a token
        password_file.write_text("another\n")
        await until(lambda: healthy(registration, seen))
        assert registration.registrations == 1


async def test_authentication_that_is_switched_on_later_disturbs_nobody_who_has_a_password(
    servers, password_file
):
    async with member(who(servers, password_file)) as (registration, seen):
        await until(lambda: healthy(registration, seen))
        guard(servers)
        async with client(who(servers, password_file)) as store:
            await store.put("/n2", b"later")
        await until(lambda: seen.entries == {"/n1": b"here", "/n2": b"later"})
        assert registration.registrations == 1


@pytest.mark.chaos
async def test_three_servers_under_one_name_with_tls_and_a_password_survive_their_leader(
    tmp_path, password_file
):
    tls = make_tls(tmp_path, client_name="")
    with running(tmp_path, count=3, tls=tls) as three:
        guard(three)
        hosts = ",".join(f"localhost:{port}" for port in three.ports)
        files = f"ca={tls.ca}&cert={tls.client_cert}&key={tls.client_key}&password_file={password_file}"
        async with member(parse_etcd(f"etcds://{USER}@{hosts}?{files}")) as (registration, seen):
            await until(lambda: healthy(registration, seen))
            three.kill(await asyncio.to_thread(three.leader))
            async with client(parse_etcd(f"etcds://{USER}@{hosts}?{files}")) as store:
                async with asyncio.timeout(WAIT_S):
                    while True:
                        with contextlib.suppress(PeerError):
                            await store.put("/n2", b"after")
                            break
            await until(lambda: healthy(registration, seen) and seen.entries.get("/n2") == b"after")


async def test_a_certificate_with_a_common_name_is_refused_beside_a_password_and_the_message_says_so(
    tmp_path, password_file
):
    tls = make_tls(tmp_path)
    with running(tmp_path, tls=tls) as servers:
        guard(servers)
        files = {"ca": str(tls.ca), "cert": str(tls.client_cert), "key": str(tls.client_key)}
        async with client(who(servers, password_file, **files)) as store:
            with pytest.raises(ConfigError, match=r"certificate with a common name.*without"):
                await store.get("/")


def test_a_store_process_takes_its_password_from_the_environment_and_shows_it_to_nobody(servers, tmp_path):
    guard(servers)
    address = f"etcd://{USER}@{servers.options().endpoints[0]}"
    process = subprocess.Popen(
        [
            *(MOONCAKE, "store", "--metadata", address, "--capacity", "16MiB", "--log-level", "debug"),
            *("--node", "n1", "--run-dir", str(tmp_path / "run")),
        ],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {PASSWORD_ENV: PASSWORD},
    )

    async def registered() -> None:
        async with client(servers.options(user=USER)) as store, asyncio.timeout(WAIT_S):
            seen = follow(store, STORES_PREFIX)
            await anext(seen)

    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(PASSWORD_ENV, PASSWORD)
            asyncio.run(registered())
        assert PASSWORD not in Path(f"/proc/{process.pid}/cmdline").read_text()
        process.terminate()
        _, log = process.communicate(timeout=WAIT_S)
        assert process.returncode == 0
        assert PASSWORD not in log
    finally:
        process.kill()
        process.communicate()
