"""`mooncake top`: what a running cluster does, live. Asks its gateway, and on this machine its parts."""

import http.client
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from mooncake.core.config import API_KEY_ENV, API_KEY_FILE_ENV, API_KEY_HINT, admin_token, fail, is_loopback
from mooncake.core.errors import MooncakeError, PeerGone, ProtocolError, RequestError
from mooncake.core.options import read_secret
from mooncake.top_draw import draw
from mooncake.top_pages import Look, Members, Page
from mooncake.top_stats import front_rows, instance_rows, marks, store_rows, totals

ANSWER_S_MAX = 2.0
"""Per page; a gateway that is busy with long prompts still answers within this."""
PAGE_BYTES_MAX = 16 << 20
FETCHES_MAX = 16
"""Pages asked for at the same time: a stopped process must not hold up the others."""
REFRESH_S = 1.0


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect is an error: it would carry the key elsewhere."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


class Cluster:
    """Looks at one cluster through its gateway."""

    def __init__(self, url: str, api_key: str = "", token: str = "") -> None:
        """`url` is the gateway's, as clients use it; `token` that of the admin servers of its parts.

        Raises:
            ConfigError: not an http address.
        """
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise fail("url", url, "write an address like http://127.0.0.1:8000")
        self._url = f"{parts.scheme}://{parts.netloc}"
        self._key, self._token = api_key, token
        # loopback addresses of parts mean the gateway's own machine: ask them only if that is this one
        self._is_here = is_loopback(parts.hostname)
        # no proxy: the cluster is asked as its neighbours do
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirect())

    def look(self) -> Look:
        """Return what is there now.

        Raises:
            PeerGone: the gateway does not answer.
            RequestError: it wants a key.
            ProtocolError: it is no gateway of ours.
        """
        try:
            members = msgspec.json.decode(
                self._get(f"{self._url}/mooncake/instances", self._key), type=Members
            )
            fronts = [front for front in (*members.gateways, *members.cores) if front.metrics_url]
            # of several gateways any would answer
            alone = {} if fronts else {"": Page(self._get(f"{self._url}/metrics").decode())}
        except (msgspec.MsgspecError, ValueError) as error:
            raise ProtocolError(f"{self._url} is no Mooncake gateway: {error}") from error
        with ThreadPoolExecutor(FETCHES_MAX) as pool:
            pages = pool.map(self._part, [front.metrics_url for front in fronts])
            instances = pool.map(self._part, [instance.metrics_url for instance in members.instances])
            stores = pool.map(self._part, [store.metrics_url for store in members.stores])
            return Look(
                time.monotonic(),
                members,
                alone or dict(zip([front.name for front in fronts], pages, strict=True)),
                dict(zip([instance.instance_id for instance in members.instances], instances, strict=True)),
                dict(zip([store.node for store in members.stores], stores, strict=True)),
            )

    def _part(self, url: str) -> Page:
        """Return the page of a part; of one that cannot be asked, an empty one."""
        parts = urllib.parse.urlsplit(url)
        reachable = self._is_here if is_loopback(parts.hostname or "") else bool(self._token)
        if not reachable or parts.scheme not in ("http", "https"):
            return Page()
        try:
            return Page(self._get(url, self._token).decode())
        except (MooncakeError, ValueError):
            return Page()

    def _get(self, url: str, key: str = "") -> bytes:
        request = urllib.request.Request(url, headers={"Authorization": f"Bearer {key}"} if key else {})
        try:
            with self._opener.open(request, timeout=ANSWER_S_MAX) as reply:
                body: bytes = reply.read(PAGE_BYTES_MAX)
                return body
        except urllib.error.HTTPError as error:
            error.close()
            if error.code in (401, 403):
                raise RequestError(f"{url} wants a key: {API_KEY_HINT}") from error
            raise ProtocolError(f"{url} answers HTTP {error.code}: is this a Mooncake gateway?") from error
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            raise PeerGone(f"{url} does not answer ({reason}): is the cluster up? See --url") from error


def top(
    url: str, console: Console, once: bool = False, refresh_s: float = REFRESH_S, as_json: bool = False
) -> int:
    """Show the cluster until Ctrl-C, or once, for people or as JSON; return the exit code.

    Raises:
        MooncakeError: the first look failed, see Cluster.
    """
    cluster = Cluster(url, api_key(), admin_token())
    try:
        before = cluster.look()
        if once or as_json:
            time.sleep(refresh_s)  # rates need two looks
            now = cluster.look()
            if as_json:
                console.file.write(as_text(before, now) + "\n")
            else:
                console.print(draw(before, now, console.width))
            return 0
        with Live(
            draw(before, before, console.width),
            console=console,
            auto_refresh=False,
            screen=console.is_terminal,
        ) as live:
            while True:
                time.sleep(refresh_s)
                try:
                    now = cluster.look()
                except MooncakeError as error:
                    old = draw(before, before, console.width)
                    live.update(Group(old, Text(str(error), "bold red")), refresh=True)
                    continue
                live.update(draw(before, now, console.width), refresh=True)
                before = now
    except KeyboardInterrupt:
        return 0


def api_key() -> str:
    """Return the key that clients of this cluster show, from the environment; "" = none.

    Raises:
        ConfigError: its file cannot be read.
    """
    if path := os.environ.get(API_KEY_FILE_ENV, ""):
        return read_secret(API_KEY_FILE_ENV, path)
    return os.environ.get(API_KEY_ENV, "")


def as_text(before: Look, now: Look) -> str:
    """Return all numbers as one JSON object; null = not known, names as in mooncake.top_stats."""
    found = {
        "totals": totals(before, now),
        "marks": marks(now),
        "core": now.members.core,
        "fronts": front_rows(before, now),
        "instances": instance_rows(before, now),
        "stores": store_rows(before, now),
    }
    return msgspec.json.format(msgspec.json.encode(found), indent=2).decode()
