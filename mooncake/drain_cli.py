"""`mooncake drain`: the preStop command of a pod. Imports nothing heavy before it runs, as mooncake.cli."""

import contextlib
import http.client
import os
import time
import urllib.parse
from typing import Annotated, Any

import typer

POLL_S = 0.2
ANSWER_S = 5.0
"""An admin server answers in milliseconds, also on a busy machine."""
PORT_ENV = "MOONCAKE_ADMIN_PORT"
BUSY = (TimeoutError, ConnectionResetError, BrokenPipeError)
"""How a process looks that is there and cannot answer just now."""


def register(app: typer.Typer) -> None:
    """Add our command to `mooncake`."""
    app.command()(drain)


def drain(
    url: Annotated[str, typer.Option(help=f"Of its admin server; empty = this host, port {PORT_ENV}.")] = "",
    wait_s: Annotated[float, typer.Option(help="For what is in flight, at most; 0 = do not wait.")] = 60.0,
) -> None:
    """Let a process take nothing new, wait until nothing is in flight; exit code 1 if something is left."""
    from mooncake.cli_common import console, errors_told

    with errors_told():
        left = drained(url or default_url(), wait_s)
        if left is not None and wait_s:
            console(stderr=True).print(f"mooncake: {left} in flight after {wait_s:g} s", style="red")
            raise typer.Exit(1)


def default_url() -> str:
    """Return where the environment says that the process of this host has its admin server.

    Raises:
        ConfigError: it does not.
    """
    from mooncake.core.errors import ConfigError

    port = os.environ.get(PORT_ENV, "")
    if not port.isdecimal():
        raise ConfigError(f"which process? Say --url http://127.0.0.1:ADMIN_PORT, or set {PORT_ENV}")
    return f"http://127.0.0.1:{port}"


def drained(url: str, wait_s: float) -> int | None:
    """Ask the process at `url` to drain; return what is in flight after `wait_s`, None = it is drained.

    An answer that does not come says nothing of the process: it may be busy, or all connections of its admin
    server taken. It is asked again. That nobody listens there any more says that it has ended.

    Raises:
        ConfigError: no such address.
        RequestError: it does not let us, cannot drain, or refuses to tell in the end.
        PeerGone: nobody answers there, or nobody does in the end.
    """
    from mooncake.core.config import admin_token
    from mooncake.core.errors import PeerGone, RequestError

    headers = {"Authorization": f"Bearer {token}"} if (token := admin_token()) else {}
    end_s = time.monotonic() + wait_s
    answer = _begun(url, headers, end_s)
    failed: PeerGone | RequestError | None = None
    while answer.get("state") != "drained":
        if time.monotonic() >= end_s:
            if failed is not None:
                raise failed
            return int(answer.get("in_flight", 0))
        time.sleep(POLL_S)
        try:
            answer, failed = _ask(url, "GET", headers), None
        except PeerGone as error:
            if isinstance(error.__cause__, ConnectionRefusedError):  # it was told to end meanwhile, and has
                return None
            failed = error
        except RequestError as error:
            failed = error
    return None


def _begun(url: str, headers: dict[str, str], end_s: float) -> dict[str, Any]:
    """Return the first answer; one that did not listen to the end is asked again until `end_s`."""
    from mooncake.core.errors import PeerGone

    while True:
        try:
            return _ask(url, "POST", headers)
        except PeerGone as error:
            # a wrong address is told at once; a process whose connections are all taken breaks off
            if not isinstance(error.__cause__, BUSY) or time.monotonic() >= end_s:
                raise
        time.sleep(POLL_S)


def _ask(url: str, method: str, headers: dict[str, str]) -> dict[str, Any]:
    import msgspec

    from mooncake.core.errors import PeerGone, RequestError

    connection = http.client.HTTPConnection(*_place(url), timeout=ANSWER_S)
    try:
        connection.request(method, "/drain", headers=headers)
        answer = connection.getresponse()
        body = answer.read()
    except (OSError, http.client.HTTPException) as error:
        raise PeerGone(
            f"{url} does not answer ({error}): is this the admin port of a running process?"
        ) from error
    finally:
        connection.close()
    if answer.status >= 400:
        raise RequestError(f"{url}/drain: {answer.status} {body.decode(errors='replace').strip()}")
    try:
        found: dict[str, Any] = msgspec.json.decode(body, type=dict[str, Any])
    except msgspec.MsgspecError as error:
        raise RequestError(f"{url}/drain: not an admin server of ours: {error}") from error
    return found


def _place(url: str) -> tuple[str, int | None]:
    from mooncake.core.errors import ConfigError

    with contextlib.suppress(ValueError):  # of a port that is none, and of half a pair of brackets
        parts = urllib.parse.urlsplit(url)
        if parts.scheme == "http" and parts.hostname:
            return parts.hostname, parts.port
    raise ConfigError(f"url = {url!r}: write http://HOST:PORT")
