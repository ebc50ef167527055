"""Asks the parts of a cluster for their pages, round after round, in a thread of its own.

It takes at most CPU_SHARE_MAX of a core: where a round costs more, the next one comes later.
"""

import functools
import gzip
import http.client
import threading
import time
import urllib.parse
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import msgspec
import structlog

from mooncake.core.errors import MooncakeError
from mooncake.live.ring import ROUND_S, Page, Part, Ring, Sample

log = structlog.get_logger(__name__)

ANSWER_S_MAX = 2.0
"""Per page and attempt: less than half a round, so a part that hangs delays nobody's next sample."""
PAGE_BYTES_MAX = 8 << 20
"""Unpacked; the page of a gateway in front of 64 engines has 4 MB."""
FETCHES_MAX = 8
CPU_SHARE_MAX = 0.01
"""Somebody may look; until then this is what it costs that they could."""
ROUND_S_MAX = 30.0
"""However much a round costs: rates over two minutes still say something."""
SAMPLES_PATH = "/dashboard/api/samples"
"""Where processes with a live page hand over what the boards read, as JSON: a sixth of a page's cost."""
PARTS_MAX = 256
"""Asked by one process; a larger cluster has a Prometheus (--prometheus-url)."""
CLOSE_S = 5.0


class Source:
    """One part's page, or its samples, over one kept connection. `cpu_s`: what asking has cost."""

    def __init__(self, url: str, token: str) -> None:
        """Connects with the first `fetch`, which also finds out whether this is an address."""
        self.cpu_s = 0.0
        self._url, self._path = url, ""
        self._headers = {"Accept-Encoding": "gzip"}
        if token:
            self._headers["Authorization"] = f"Bearer {token}"
        self._connection: http.client.HTTPConnection | None = None

    def fetch(self) -> Page | None:
        """Return the page; None = it cannot be had. A connection that has been closed is renewed."""
        begin_s = time.thread_time()
        try:
            return self._fetch()
        finally:
            self.cpu_s += time.thread_time() - begin_s

    def _fetch(self) -> Page | None:
        for fresh in (self._connection is None or self._connection.sock is None, True):
            try:
                connection = self._opened()
                connection.request("GET", self._path, headers=self._headers)
                with connection.getresponse() as reply:  # follows no redirect: it would get the token
                    body = reply.read(PAGE_BYTES_MAX + 1)
                    if reply.status != 200 or len(body) > PAGE_BYTES_MAX:
                        self.close()
                        return None
                    if reply.getheader("Content-Encoding") == "gzip":
                        body = _unpacked(body)
                    if self._path == SAMPLES_PATH:
                        return msgspec.json.decode(body, type=list[Sample])
                    return body.decode()
            except (
                OSError, http.client.HTTPException, ValueError, zlib.error, msgspec.MsgspecError,
            ) as error:  # fmt: skip
                self.close()
                if fresh:
                    log.debug("live.no_page", url=self._url, error=repr(error))
                    return None
        return None

    def _opened(self) -> http.client.HTTPConnection:
        if self._connection is None:
            parts = urllib.parse.urlsplit(self._url)
            self._path = parts.path or "/"
            kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
            self._connection = kind(parts.hostname or "", parts.port, timeout=ANSWER_S_MAX)
        return self._connection

    def close(self) -> None:
        """Close the connection; `fetch` opens another."""
        if self._connection is not None:
            self._connection.close()


def _unpacked(body: bytes) -> bytes:
    unpacker = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
    found = unpacker.decompress(body, PAGE_BYTES_MAX)
    if unpacker.unconsumed_tail:
        raise gzip.BadGzipFile("larger than a page")
    return found


class Scraper:
    """Fills a ring until `close`."""

    def __init__(
        self,
        ring: Ring,
        own: Part,
        own_page: Callable[[], Page],
        parts: Callable[[], Sequence[Part]],
        token: str = "",
    ) -> None:
        """Nothing runs before `start`.

        Args:
            ring: to fill.
            own: this process.
            own_page: its page, called in the scraper's thread.
            parts: the others, called there too; raises a MooncakeError while nobody knows them.
            token: shown to the others; all processes of a cluster have the same.
        """
        self._ring, self._own, self._own_page, self._parts, self._token = ring, own, own_page, parts, token
        self._sources: dict[Part, Source] = {}
        self._busy: dict[Part, Future[Page | None]] = {}
        self.round_s = ROUND_S
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def start(self) -> None:
        """Begin (idempotent)."""
        with self._lock:
            if self._thread is None and not self._closed.is_set():
                self._thread = threading.Thread(target=self._run, name="live scraper", daemon=True)
                self._thread.start()

    def close(self) -> None:
        """Stop; waits for the requests under way, each of which has a deadline."""
        with self._lock:
            self._closed.set()
            thread = self._thread
        if thread is not None:
            thread.join(CLOSE_S)

    def _run(self) -> None:
        next_s = time.monotonic()
        with ThreadPoolExecutor(FETCHES_MAX, thread_name_prefix="live page") as pool:
            while not self._closed.wait(max(0.0, next_s - time.monotonic())):
                next_s = max(next_s + self.round_s, time.monotonic())
                try:
                    self.round_s = min(ROUND_S_MAX, max(ROUND_S, self.round(pool) / CPU_SHARE_MAX))
                except Exception:  # the next round may work; the process serves on
                    log.exception("live.round_failed")
        for source in self._sources.values():
            source.close()

    def round(self, pool: ThreadPoolExecutor) -> float:
        """Ask everybody once, for at most half a round; return the seconds of CPU that it took."""
        at_s, begin_s = time.time(), time.thread_time()
        try:
            parts = [part for part in self._parts() if part.url and part.url != self._own.url][:PARTS_MAX]
        except MooncakeError as error:
            log.debug("live.parts_unknown", error=str(error))
            parts = list(self._sources)
        for part in [part for part in self._sources if part not in parts]:
            self._sources.pop(part).close()
        spent_s = sum(source.cpu_s for source in self._sources.values())
        self._busy = {part: future for part, future in self._busy.items() if not future.done()}
        for part in parts:
            if part not in self._busy:  # a part that hung is asked again when its thread is back
                self._busy[part] = pool.submit(self._source(part).fetch)
        pages: dict[Part, Page | None] = {self._own: _told(self._own, self._own_page)}
        until_s = time.monotonic() + ROUND_S / 2
        for part in parts:
            left_s = max(0.0, until_s - time.monotonic())
            pages[part] = _told(part, functools.partial(self._busy[part].result, left_s))
        self._ring.add(at_s, pages)
        fetches_s = sum(source.cpu_s for source in self._sources.values()) - spent_s
        return fetches_s + time.thread_time() - begin_s

    def _source(self, part: Part) -> Source:
        source = self._sources.get(part)
        if source is None:
            source = self._sources[part] = Source(part.url, self._token)
        return source


def _told(part: Part, ask: Callable[[], Page | None]) -> Page | None:
    """Return a page; None = there is none in time, or the part's own fault, which is nobody else's."""
    try:
        return ask()
    except TimeoutError:
        return None
    except Exception:
        log.exception("live.page_failed", process=part.process)
        return None
