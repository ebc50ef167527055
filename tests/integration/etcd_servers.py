"""Real etcd servers on loopback, one or three, that tests kill, stop, cut off and bring back."""

import contextlib
import functools
import http.client
import os
import shutil
import signal
import ssl
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest

from mooncake.core.metadata_etcd import EtcdMetadata
from mooncake.core.metadata_etcd_options import Endpoint, EtcdOptions
from mooncake.core.metadata_etcd_wire import key_range
from mooncake.core.process import set_parent_death_signal
from tests.integration.ports import lasting_port

POLL_S = 0.2
"""Of clients in tests: shorter than in production, so that silence is noticed soon."""

ETCD = shutil.which("etcd")
NEEDS_ETCD = pytest.mark.skipif(ETCD is None, reason="no etcd here: install the package etcd-server")
READY_S = 20.0
LEASE_S_MIN = 1.0
"""etcd's shortest lease is 1.5 election time-outs: rounded up to a second with ELECTION_MS."""
HEARTBEAT_MS, ELECTION_MS = 50, 500


@dataclass(frozen=True)
class Tls:
    """Files of the servers and of a client that they accept."""

    ca: Path
    server_cert: Path
    server_key: Path
    client_cert: Path
    client_key: Path


class EtcdServers:
    """One cluster; data survives `kill` and `start`, and is gone after `wipe`."""

    def __init__(
        self, folder: Path, count: int = 1, tls: Tls | None = None, flags: tuple[str, ...] = ()
    ) -> None:
        """Nothing is started yet; of two equal `flags` the later one counts."""
        assert ETCD is not None
        self._folder = folder
        self._tls = tls
        self._flags = flags
        self._root_password = ""
        self._scheme = "https" if tls else "http"
        self.ports = [lasting_port() for _ in range(count)]
        self._peer_ports = [lasting_port() for _ in range(count)]
        self._processes: dict[int, subprocess.Popen[bytes]] = {}

    def options(self, host: str = "127.0.0.1", **settings: Any) -> EtcdOptions:
        """Return how a client reaches all servers."""
        endpoints = tuple(Endpoint(host, port) for port in self.ports)
        return EtcdOptions(endpoints=endpoints, secure=self._tls is not None, **settings)

    def start(self, *indices: int) -> None:
        """Start some servers (none named = all) and wait until they serve."""
        chosen = indices or tuple(range(len(self.ports)))
        for index in chosen:
            self._spawn(index)
        for index in chosen:
            self.wait_healthy(index)

    def kill(self, index: int = 0) -> None:
        """End one server as a power cut would end it."""
        process = self._processes.pop(index)
        process.kill()
        process.wait(READY_S)

    def pause(self, index: int = 0) -> None:
        """Let one server accept connections and never answer."""
        self._processes[index].send_signal(signal.SIGSTOP)

    def resume(self, index: int = 0) -> None:
        """Undo `pause`."""
        self._processes[index].send_signal(signal.SIGCONT)

    def wipe(self, index: int = 0) -> None:
        """Lose the data of a server that was killed."""
        shutil.rmtree(self._folder / f"data-{index}")

    def close(self) -> None:
        """Kill what still runs."""
        for index in list(self._processes):
            self.kill(index)

    def leader(self) -> int:
        """Return which server leads."""
        status = self.ask("/v3/maintenance/status", {})
        for index in self._processes:
            own = self.ask("/v3/maintenance/status", {}, index)
            if own["header"]["member_id"] == status["leader"]:
                return index
        raise AssertionError(f"no leader: {status}")

    def compact(self, revision: int) -> None:
        """Drop history up to `revision`."""
        self.ask("/v3/kv/compaction", {"revision": str(revision), "physical": True})

    def enable_auth(self, user: str, password: str, prefix: str) -> None:
        """From now on only `user` (and root) may do anything, below `prefix`."""
        for name, secret in (("root", "root"), (user, password)):
            self.ask("/v3/auth/user/add", {"name": name, "password": secret})
            self.ask("/v3/auth/role/add", {"name": name})
            self.ask("/v3/auth/user/grant", {"user": name, "role": name})
        rights = {"permType": "READWRITE"} | key_range(prefix.encode())
        self.ask("/v3/auth/role/grant", {"name": user, "perm": rights})
        self.ask("/v3/auth/enable", {})
        self._root_password = "root"

    def change_password(self, user: str, password: str) -> None:
        """Also ends the tokens of that user."""
        self.ask("/v3/auth/user/changepw", {"name": user, "password": password})

    def ask(self, path: str, request: dict[str, Any], index: int | None = None) -> Any:
        """Ask one server that runs, past the code under test."""
        index = next(iter(self._processes)) if index is None else index
        headers = {}
        if self._root_password:
            who = {"name": "root", "password": self._root_password}
            _, body = self._exchange(index, "POST", "/v3/auth/authenticate", msgspec.json.encode(who))
            headers = {"Authorization": msgspec.json.decode(body)["token"]}
        status, body = self._exchange(index, "POST", path, msgspec.json.encode(request), headers)
        assert status == 200, body
        return msgspec.json.decode(body)

    def log_tail(self, index: int = 0) -> str:
        """Return the last lines that a server wrote."""
        return "\n".join((self._folder / f"log-{index}").read_text().splitlines()[-15:])

    def wait_healthy(self, index: int) -> None:
        """Wait until one server takes part in a cluster with a leader."""
        end_s = time.monotonic() + READY_S
        while time.monotonic() < end_s:
            assert self._processes[index].poll() is None, self.log_tail(index)
            with contextlib.suppress(OSError, http.client.HTTPException):
                if self._exchange(index, "GET", "/health", b"")[0] == 200:
                    return
            time.sleep(0.05)
        raise AssertionError(f"etcd server {index} is not healthy: {self.log_tail(index)}")

    def _exchange(
        self, index: int, method: str, path: str, body: bytes, headers: dict[str, str] | None = None
    ) -> tuple[int, bytes]:
        port = self.ports[index]
        if self._tls:
            context = ssl.create_default_context(cafile=self._tls.ca)
            context.load_cert_chain(self._tls.client_cert, self._tls.client_key)
            connection: http.client.HTTPConnection = http.client.HTTPSConnection(
                "127.0.0.1", port, timeout=5.0, context=context
            )
        else:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5.0)
        with contextlib.closing(connection):
            connection.request(method, path, body or None, headers or {})
            answer = connection.getresponse()
            return answer.status, answer.read()

    def _spawn(self, index: int) -> None:
        client = f"{self._scheme}://127.0.0.1:{self.ports[index]}"
        peers = [f"http://127.0.0.1:{port}" for port in self._peer_ports]
        command = [
            str(ETCD), f"--name=e{index}", f"--data-dir={self._folder / f'data-{index}'}",
            f"--listen-client-urls={client}", f"--advertise-client-urls={client}",
            f"--listen-peer-urls={peers[index]}", f"--initial-advertise-peer-urls={peers[index]}",
            "--initial-cluster=" + ",".join(f"e{i}={peer}" for i, peer in enumerate(peers)),
            f"--heartbeat-interval={HEARTBEAT_MS}", f"--election-timeout={ELECTION_MS}",
            "--logger=zap", "--log-outputs=stderr", "--bcrypt-cost=4", *self._flags,
        ]  # fmt: skip
        if self._tls:  # also at an address that its certificate does not name
            others = f"{self._scheme}://127.0.0.2:{self.ports[index]}"
            command[command.index(f"--listen-client-urls={client}")] += f",{others}"
            command += [
                f"--cert-file={self._tls.server_cert}", f"--key-file={self._tls.server_key}",
                f"--trusted-ca-file={self._tls.ca}", "--client-cert-auth",
            ]  # fmt: skip
        with (self._folder / f"log-{index}").open("ab") as output:
            self._processes[index] = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                preexec_fn=functools.partial(set_parent_death_signal, os.getpid()),  # noqa: PLW1509 - system calls only
            )


@contextlib.contextmanager
def running(
    folder: Path, count: int = 1, tls: Tls | None = None, flags: tuple[str, ...] = ()
) -> Iterator[EtcdServers]:
    """Give a cluster that serves, and end it."""
    servers = EtcdServers(folder, count, tls, flags)
    try:
        servers.start()
        yield servers
    finally:
        servers.close()


@contextlib.asynccontextmanager
async def client(options: EtcdOptions) -> AsyncIterator[EtcdMetadata]:
    store = EtcdMetadata(options, poll_s=POLL_S)
    try:
        yield store
    finally:
        await store.close()
