"""The same questions to a real Prometheus, for the page's users: read-only, bounded, with a deadline."""

import http.client
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from typing import Any

from mooncake.core.config import fail
from mooncake.core.errors import PeerGone, RequestError

ANSWER_S_MAX = 10.0
"""A panel that takes longer is no live view; Prometheus is told to give up then, too."""
ANSWER_BYTES_MAX = 16 << 20


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect is an error: the address was the operator's choice."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


def checked_url(url: str) -> str:
    """Return the address of a Prometheus without a slash at its end.

    Raises:
        ConfigError: it is none.
    """
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise fail("prometheus_url", url, "write an address like http://prometheus:9090")
    return url.rstrip("/")


class Prometheus:
    """Asks one Prometheus. Any thread may call."""

    def __init__(self, url: str) -> None:
        """Raises ConfigError: it is no address."""
        self._url = checked_url(url)
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirect())

    def query_range(self, query: str, start_s: float, end_s: float, step_s: float) -> tuple[int, bytes]:
        """Return status and body of its answer.

        Raises:
            PeerGone: it does not answer.
        """
        asked = {"query": query, "start": start_s, "end": end_s, "step": step_s, "timeout": ANSWER_S_MAX}
        return self._get("/api/v1/query_range", {key: str(value) for key, value in asked.items()})

    def label_values(self, label: str, selector: str, start_s: float, end_s: float) -> tuple[int, bytes]:
        """Return status and body of its answer; `label` has been checked to be a name.

        Raises:
            PeerGone: it does not answer.
        """
        asked = {"match[]": selector} if selector else {}
        asked |= {"start": str(start_s), "end": str(end_s)}
        return self._get(f"/api/v1/label/{urllib.parse.quote(label, safe='')}/values", asked)

    def _get(self, path: str, asked: Mapping[str, str]) -> tuple[int, bytes]:
        url = f"{self._url}{path}?{urllib.parse.urlencode(asked)}"
        try:
            with self._opener.open(url, timeout=ANSWER_S_MAX) as reply:
                return reply.status, _bounded(reply)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, _bounded(error)
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            raise PeerGone(f"Prometheus at {self._url} does not answer ({reason})") from error


def _bounded(reply: Any) -> bytes:
    body: bytes = reply.read(ANSWER_BYTES_MAX + 1)
    if len(body) > ANSWER_BYTES_MAX:
        raise RequestError(f"Prometheus answers more than {ANSWER_BYTES_MAX} bytes: choose fewer series")
    return body
