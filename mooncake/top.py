"""`mooncake top`: what a running cluster does, live. Asks its gateway, and on this machine its parts."""

import http.client
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from mooncake.core.config import API_KEY_ENV, fail, format_size, is_loopback
from mooncake.core.errors import MooncakeError, PeerGone, ProtocolError, RequestError
from mooncake.top_stats import (
    Deciding,
    FrontRow,
    InstanceRow,
    Look,
    Members,
    Page,
    StoreRow,
    Totals,
    front_rows,
    instance_rows,
    store_rows,
    totals,
)

ANSWER_S_MAX = 2.0
"""Per page; a gateway that is busy with long prompts still answers within this."""
PAGE_BYTES_MAX = 16 << 20
FETCHES_MAX = 16
"""Pages asked for at the same time: a stopped process must not hold up the others."""
REFRESH_S = 1.0
STYLES = {"alive": "green", "suspect": "yellow", "dead": "bold red"}


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect is an error: it would carry the key elsewhere."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


class Cluster:
    """Looks at one cluster through its gateway."""

    def __init__(self, url: str, api_key: str = "") -> None:
        """`url` is the gateway's, as clients use it.

        Raises:
            ConfigError: not an http address.
        """
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise fail("url", url, "write an address like http://127.0.0.1:8000")
        self._url = f"{parts.scheme}://{parts.netloc}"
        self._key = api_key
        # addresses of parts mean the gateway's own machine: ask them only if that is this one
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
        if not self._is_here or parts.scheme != "http" or not is_loopback(parts.hostname or ""):
            return Page()
        try:
            return Page(self._get(url).decode())
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
                raise RequestError(f"{url} wants a key: set {API_KEY_ENV}") from error
            raise ProtocolError(f"{url} answers HTTP {error.code}: is this a Mooncake gateway?") from error
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            raise PeerGone(f"{url} does not answer ({reason}): is the cluster up? See --url") from error


def top(url: str, console: Console, once: bool = False, refresh_s: float = REFRESH_S) -> int:
    """Show the cluster until Ctrl-C, or once; return the exit code.

    Raises:
        MooncakeError: the first look failed, see Cluster.
    """
    cluster = Cluster(url, os.environ.get(API_KEY_ENV, ""))
    try:
        before = cluster.look()
        if once:
            time.sleep(refresh_s)  # rates need two looks
            console.print(draw(before, cluster.look()))
            return 0
        with Live(
            draw(before, before), console=console, auto_refresh=False, screen=console.is_terminal
        ) as live:
            while True:
                time.sleep(refresh_s)
                try:
                    now = cluster.look()
                except MooncakeError as error:
                    live.update(Group(draw(before, before), Text(str(error), "bold red")), refresh=True)
                    continue
                live.update(draw(before, now), refresh=True)
                before = now
    except KeyboardInterrupt:
        return 0


def draw(before: Look, now: Look) -> RenderableType:
    """Return the tables of two looks."""
    fronts = front_rows(before, now)
    return Group(
        _summary(totals(before, now)),
        Text(),
        *([_fronts(fronts, now.members.core), Text()] if fronts else []),
        _instances(instance_rows(now)),
        Text(),
        _stores(store_rows(now)),
    )


def _summary(found: Totals) -> RenderableType:
    lines = [
        [
            ("in flight", f"{found.in_flight}"),
            ("requests/s", _number(found.requests_per_s)),
            ("tokens/s", _number(found.tokens_per_s)),
            ("prefix hits", _percent(found.prefix_hits)),
        ],
        [
            ("TTFT p50", _latency(found.ttft_p50_s)),
            ("p95", _latency(found.ttft_p95_s)),
            ("TBT p50", _latency(found.tbt_p50_s)),
        ],
    ]
    text = Text()
    for line in lines:
        for name, value in line:
            text.append(f"{name} ", "dim").append(f"{value}   ", "bold")
        text.append("\n")
    text.right_crop(1)
    return text


def _fronts(rows: Iterable[FrontRow], core: Deciding) -> RenderableType:
    table = _table("process", "pid", "does", "in flight", "requests/s")
    for row in rows:
        does = Text("serves, decides alone", "bold yellow") if row.alone else Text(row.does)
        table.add_row(
            _plain(row.name), str(row.pid), does, _count(row.in_flight), _number(row.requests_per_s)
        )
    if core.mode == "fallback":
        return Group(table, Text("no core decides: ", "bold yellow").append(_plain(core.reason)))
    return table


def _instances(rows: Iterable[InstanceRow]) -> RenderableType:
    table = _table("instance", "role", "state", "running", "waiting", "KV", "hits", "bad")
    for row in rows:
        table.add_row(
            _plain(row.name),
            _plain(row.role),
            Text(_plain(row.state).plain, STYLES.get(row.state, "")),
            _count(row.running),
            _count(row.waiting),
            _percent(row.kv_use),
            _percent(row.pool_hits),
            _bad(row.bad_blocks),
        )
    return table


def _stores(rows: Iterable[StoreRow]) -> RenderableType:
    table = _table("pool node", "used", "capacity", "blocks", "hits", "evicted", "bad", left=1)
    for row in rows:
        table.add_row(
            _plain(row.node),
            "-" if row.used_bytes is None else format_size(int(row.used_bytes)),
            format_size(row.capacity_bytes),
            _count(row.blocks),
            _percent(row.hits),
            _count(row.evictions),
            _bad(row.bad_blocks),
        )
    return table


def _table(*names: str, left: int = 3) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for i, name in enumerate(names):
        table.add_column(name, justify="left" if i < left else "right", no_wrap=True)
    return table


def _plain(text: str) -> Text:
    return Text("".join(char if char.isprintable() else "?" for char in text))  # no terminal codes of others


def _bad(value: float | None) -> Text:
    return Text(_count(value), "bold red" if value else "")


def _count(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _latency(value_s: float | None) -> str:
    if value_s is None:
        return "-"
    return f"{value_s * 1000:.0f} ms" if value_s < 1 else f"{value_s:.2f} s"
