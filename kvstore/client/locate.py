"""Who has which keys: by a directory, or by asking every store.

A directory answers in one message. Without one, or when all of them are away or out of step, every store is
asked at once with one message each, ASK_STORES_MAX of them at most: fine for tens of hosts, and the reason
to run a directory for more. A directory learns of a put some milliseconds later: who must not miss what was
just put on another host has its word confirmed (`sure`).
"""

import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait

import msgspec
import structlog

from kvstore.client.access import Access
from kvstore.client.members import AWAY_S, Members
from kvstore.directory.directory import Mode
from kvstore.directory.messages import DirectoryReply, Locate, Located
from mooncake.core.errors import MooncakeError
from mooncake.core.rpc import BlockingRpcClient

log = structlog.get_logger(__name__)

ASK_STORES_MAX = 64
"""Stores one call asks without a directory; those beyond are not asked, and the result says so."""
ASKERS = 8
"""Of them at once."""
DIRECTORY_S = 1.0
"""Longest wait for a directory: every store can be asked instead."""


class Holders(msgspec.Struct):
    """`nodes[i]` have `keys[i]`, best first; `sizes[i]` is 0 if it is not known yet.

    `unsure`: why a key without nodes may be somewhere all the same.
    """

    nodes: list[list[str]]
    sizes: list[int]
    unsure: str = ""


class Locator:
    """Thread-safe; keeps one connection per directory."""

    def __init__(self, members: Members, sure: bool = False) -> None:
        """Ask what `members` knows at the time of each call; `sure`: see Pool."""
        self._members = members
        self._sure = sure
        self._lock = threading.Lock()
        self._clients: dict[str, BlockingRpcClient] = {}
        self._away: dict[str, float] = {}
        self._askers = ThreadPoolExecutor(ASKERS, thread_name_prefix="pool-ask")

    def close(self) -> None:
        """Hang up (idempotent)."""
        self._askers.shutdown(wait=False)
        with self._lock:
            clients, self._clients = self._clients, {}
        for client in clients.values():
            client.close()

    def locate(self, keys: Sequence[bytes], end_s: float, *, without: Sequence[str] = ()) -> Holders:
        """Return who has `keys`.

        Args:
            keys: 32 bytes each.
            end_s: what is not known by then is `unsure`.
            without: nodes that have been asked already.
        """
        reply = self._ask_directories(keys, end_s)
        if reply is None or reply.mode is Mode.DEGRADED:
            asked = self._ask_stores(keys, end_s, without)
            if reply is None:
                return asked
            self._add(asked, reply, without)
            return asked
        found = Holders([[] for _ in keys], [0] * len(keys))
        self._add(found, reply, without)
        if self._sure:
            self._confirm(keys, found, end_s, without)
        return found

    def _confirm(self, keys: Sequence[bytes], found: Holders, end_s: float, without: Sequence[str]) -> None:
        """Ask the stores for what a directory knows nothing of; its word counts for those that are away."""
        rows = [row for row, nodes in enumerate(found.nodes) if not nodes]
        if rows:
            asked = self._ask_stores([keys[row] for row in rows], end_s, without)
            for row, nodes, size in zip(rows, asked.nodes, asked.sizes, strict=True):
                found.nodes[row], found.sizes[row] = nodes, size

    def _add(self, found: Holders, reply: Located, without: Sequence[str]) -> None:
        """Add a directory's word, behind that of the stores themselves."""
        stores = self._members.stores
        for nodes, holders in zip(found.nodes, reply.holders, strict=True):
            for at in holders:
                node = reply.nodes[at] if 0 <= at < len(reply.nodes) else ""
                if node in stores and node not in without and node not in nodes:
                    nodes.append(node)

    # ------------------------------------------------------------ a directory

    def _ask_directories(self, keys: Sequence[bytes], end_s: float) -> Located | None:
        for endpoint in self._members.directories.values():
            now_s = time.monotonic()
            if self._away.get(endpoint, 0.0) > now_s:
                continue
            try:
                client = self._client(endpoint)
                reply = client.call(Locate(list(keys)), max(0.0, min(DIRECTORY_S, end_s - now_s)))
            except MooncakeError as error:
                self._away[endpoint] = time.monotonic() + AWAY_S
                log.info("pool.directory_away", endpoint=endpoint, error=str(error))
                continue
            if isinstance(reply, Located) and len(reply.holders) == len(keys):
                return reply
        return None

    def _client(self, endpoint: str) -> BlockingRpcClient:
        with self._lock:
            client = self._clients.get(endpoint)
            if client is None:
                known = set(self._members.directories.values())
                for gone in [one for one in self._clients if one not in known]:
                    self._clients.pop(gone).close()
                client = self._clients[endpoint] = BlockingRpcClient(endpoint, DirectoryReply)
            return client

    # ------------------------------------------------------------ every store

    def _ask_stores(self, keys: Sequence[bytes], end_s: float, without: Sequence[str]) -> Holders:
        stores = [access for node, access in self._members.stores.items() if node not in without]
        found = Holders([[] for _ in keys], [0] * len(keys))
        asked = stores[:ASK_STORES_MAX]
        if len(asked) < len(stores):
            found.unsure = f"{len(stores) - len(asked)} stores were not asked: run a directory"
        if len(asked) == 1:
            answers = [self._ask(asked[0], keys, end_s)]
        else:
            waits = [self._askers.submit(self._ask, access, keys, end_s) for access in asked]
            wait(waits, timeout=max(0.0, end_s - time.monotonic()))
            answers = [one.result() if one.done() else "no answer in time" for one in waits]
        for access, answer in zip(asked, answers, strict=True):
            if isinstance(answer, str):
                found.unsure = f"{access.node}: {answer}"
                continue
            for row, size in enumerate(answer):
                if size:
                    found.nodes[row].append(access.node)
                    found.sizes[row] = size
        return found

    def _ask(self, access: Access, keys: Sequence[bytes], end_s: float) -> Sequence[int] | str:
        """Return sizes, or why there are none."""
        if self._members.is_away(access.node):
            return "it did not answer a moment ago"
        try:
            return access.find(keys, end_s).sizes
        except MooncakeError as error:
            self._members.lost(access, error)
            return str(error)
