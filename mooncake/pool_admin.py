"""A client of the admin HTTP: asks any directory, goes on to the leader. Blocking, for commands."""

import http.client
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from typing import Any

import msgspec

from mooncake.core.config import fail
from mooncake.core.errors import (
    CapacityError,
    MooncakeError,
    NotLeader,
    PeerError,
    PeerGone,
    ProtocolError,
    RequestError,
)

ANSWER_S = 12.0
"""A little more than the directory gives itself."""
BODY_BYTES_MAX = 16 << 20
ELECTED_S = 12.0
"""A new leader is there after two leases at most; so long a follower's answer is not the last word."""
RETRY_S = 0.3
FIND_S = 5.0
TOKEN_ADVICE = "it wants the admin token: set MOONCAKE_ADMIN_TOKEN, or name its file: --token-file"


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect is an error: it would carry the token elsewhere."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


class PoolAdmin:
    """Talks to one pool through any of its directories."""

    def __init__(self, urls: Sequence[str], token: str = "", elected_s: float = ELECTED_S) -> None:
        """`urls`: admin addresses, tried in this order; `elected_s`: how long an election is waited for.

        Raises:
            ConfigError: one is no http address.
        """
        for url in urls:
            parts = urllib.parse.urlsplit(url)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise fail("url", url, "write an address like http://127.0.0.1:7710")
        self._urls = [url.rstrip("/") for url in urls]
        self._token = token
        self._elected_s = elected_s
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirect())

    @property
    def url(self) -> str:
        """The directory that answered last."""
        return self._urls[0]

    def get(self, path: str) -> Any:
        """Return what GET answers; raises as `call`."""
        return self.call("GET", path)

    def post(self, path: str, body: Any) -> Any:
        """Return what POST answers; raises as `call`."""
        return self.call("POST", path, body)

    def delete(self, path: str) -> Any:
        """Return what DELETE answers; raises as `call`."""
        return self.call("DELETE", path)

    def call(self, method: str, path: str, body: Any = None) -> Any:
        """Return the answer of the first directory that has one; the leader's, if only it may answer.

        Raises:
            RequestError: bad input, or something unknown; PeerGone: no directory answers.
            NotLeader: none has been elected in time.
        """
        end_s = time.monotonic() + self._elected_s
        while True:
            last: MooncakeError = PeerGone("no directory is known")
            for url in list(self._urls):
                try:
                    answer = self._call(url, method, path, body)
                except (PeerError, NotLeader) as error:
                    last = error
                    continue
                self._prefer(url)
                return answer
            if not isinstance(last, NotLeader) or time.monotonic() >= end_s:
                raise last
            time.sleep(RETRY_S)

    def _call(self, url: str, method: str, path: str, body: Any) -> Any:
        status, answer = self._ask(url, method, path, body)
        if status < 300 or (status == 503 and "healthy" in answer):
            return answer
        text = f"{url}{path}: {answer.get('error', f'HTTP {status}')}"
        if status == 409:
            if answer.get("leader"):
                self._prefer(str(answer["leader"]).rstrip("/"))
            raise NotLeader(text)
        if status == 401:
            raise RequestError(f"{url}: {TOKEN_ADVICE}")
        if status == 503:
            raise CapacityError(text)
        raise RequestError(text) if status < 500 else PeerGone(text)

    def _ask(self, url: str, method: str, path: str, body: Any) -> tuple[int, dict[str, Any]]:
        headers = {"Authorization": f"Bearer {self._token}"} if self._token else {}
        data = None
        if body is not None:
            data, headers["Content-Type"] = msgspec.json.encode(body), "application/json"
        request = urllib.request.Request(url + path, data, headers, method=method)
        try:
            with self._opener.open(request, timeout=ANSWER_S) as reply:
                return reply.status, _decode(url, reply.read(BODY_BYTES_MAX))
        except urllib.error.HTTPError as error:
            with error:
                return error.code, _decode(url, error.read(BODY_BYTES_MAX))
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            raise PeerGone(f"directory {url} does not answer: {reason}") from error

    def _prefer(self, url: str) -> None:
        self._urls = [url, *(known for known in self._urls if known != url)]


def find_directories(metadata: str) -> list[str]:
    """Return the admin addresses of the directories that are registered.

    Raises:
        ConfigError: `metadata` names no metadata store.
        PeerGone: it has no directory with an admin address.
    """
    import asyncio

    if not metadata:
        raise fail("metadata", metadata, "give --metadata of the cluster, or --url of a directory")
    urls = asyncio.run(_find(metadata))
    if not urls:
        raise PeerGone(
            f"no directory is registered in {metadata}: "
            f"start one with `mooncake directory --metadata {metadata}`"
        )
    return urls


async def _find(metadata: str) -> list[str]:
    import asyncio

    from kvstore.directory.messages import DIRECTORIES_PREFIX, DirectoryRecord
    from mooncake.core.metadata_open import open_metadata

    store = open_metadata(metadata)
    try:
        async with asyncio.timeout(FIND_S):
            entries = (await store.get(DIRECTORIES_PREFIX)).entries
        records = [msgspec.json.decode(entry.value, type=DirectoryRecord) for entry in entries]
    except TimeoutError:
        raise PeerGone(f"metadata store {metadata} does not answer within {FIND_S:g} s") from None
    except msgspec.MsgspecError as error:
        raise ProtocolError(f"{metadata}: a directory's record: {error}") from error
    finally:
        await store.close()
    return [record.admin_url for record in records if record.admin_url]


def _decode(url: str, body: bytes) -> dict[str, Any]:
    try:
        answer = msgspec.json.decode(body)
    except msgspec.MsgspecError as error:
        raise ProtocolError(f"{url} is no admin address of a directory: {error}") from error
    if not isinstance(answer, dict):
        raise ProtocolError(f"{url} is no admin address of a directory")
    return answer
