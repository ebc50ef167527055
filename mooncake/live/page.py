"""The HTTP side of the live page: GET /dashboard, its files, and what it asks for under /dashboard/api/.

Files and frame are for everybody who can connect: they hold nothing of the cluster. All under /dashboard/api/
needs the admin server's token, which the page asks for.
"""

import importlib.resources
import math
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from mooncake.core.admin import JSON, AdminServer, Answer, Asked, json_answer
from mooncake.core.errors import MooncakeError, PeerTimeout, RequestError
from mooncake.live.matching import Matcher
from mooncake.live.prometheus import Prometheus
from mooncake.live.promql import evaluate, names_of, parsed
from mooncake.live.ring import ROUND_S, Ring, Sample
from mooncake.live.samples import Array, Series
from mooncake.live.scrape import SAMPLES_PATH

ROOT = "/dashboard"
STEPS_MAX = 720
"""Points of a line: more than a screen has room for, and an hour at the ring's own step."""
SERIES_MAX = 200
"""Lines of one query; nobody can tell more apart. The answer says that some are left out."""
CELLS_MAX = 2_000_000
"""Series that a query reads, times steps: its arrays have 16 MB then, and there are about ten at a time."""
AT_ONCE_MAX = 2
"""Queries evaluated at the same time: they compete with the process's own work for the interpreter."""
WAIT_S_MAX = 10.0
SPAN_S_MAX = 86_400.0
PROMETHEUS_ROUND_S = 15.0
"""How often most of them scrape; rates are taken over four times that, which suits quicker ones, too."""
_TYPES = {
    "html": "text/html; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "svg": "image/svg+xml",
    "txt": "text/plain; charset=utf-8",
}
CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self';"
    " base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": CSP,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
_API_HEADERS = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
_LABEL = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*")


class LivePage:
    """Answers for one process, from its ring or from a Prometheus."""

    def __init__(
        self,
        boards: Mapping[str, Mapping[str, Any]],
        ring: Ring,
        prometheus: Prometheus | None = None,
        visited: Callable[[], None] = lambda: None,
        now: Callable[[], float] = time.time,
        samples: Callable[[], list[Sample]] = list,
        round_s: Callable[[], float] = lambda: ROUND_S,
    ) -> None:
        """Nothing is served before `register`.

        Args:
            boards: Grafana's JSON by uid.
            ring: what is asked.
            prometheus: what is asked instead.
            visited: called whenever somebody with the token asks for something.
            now: the clock of the ring, which the page goes by.
            samples: what the boards read of this process, for the rings of others.
            round_s: from one sample of the ring to the next; of a Prometheus PROMETHEUS_ROUND_S is believed.
        """
        self._boards, self._ring, self._prometheus, self._visited = boards, ring, prometheus, visited
        self._now, self._samples = now, samples
        self._round_s = round_s if prometheus is None else lambda: PROMETHEUS_ROUND_S
        self._files = _files()
        self._turns = threading.BoundedSemaphore(AT_ONCE_MAX)

    def register(self, admin: AdminServer) -> None:
        """Serve from now on."""
        admin.route(ROOT, self._frame, needs_token=False)
        admin.route(f"{ROOT}/", self._file, needs_token=False)
        admin.route(f"{ROOT}/api/", self._api)

    # ------------------------------------------------------------ files

    def _frame(self, asked: Asked) -> Answer:  # noqa: ARG002
        return Answer(200, self._files["index.html"], _TYPES["html"], _HEADERS)

    def _file(self, asked: Asked) -> Answer:
        name = asked.path.removeprefix(f"{ROOT}/") or "index.html"
        body = self._files.get(name)  # of a fixed set: no path of a client's touches the disk
        if body is None:
            return Answer(404, b"no such file\n", headers=_HEADERS)
        return Answer(200, body, _TYPES[name.rpartition(".")[2]], _HEADERS)

    # ------------------------------------------------------------ data

    def _api(self, asked: Asked) -> Answer:
        path = asked.path.removeprefix(f"{ROOT}/api/")
        if asked.path == SAMPLES_PATH:
            return json_answer(200, self._samples())
        self._visited()
        try:
            status, value = self._data(path, asked.query)
        except RequestError as error:
            status, value = 400, {"status": "error", "errorType": "bad_data", "error": str(error)}
        except MooncakeError as error:
            kind = "timeout" if isinstance(error, PeerTimeout) else "unavailable"
            status, value = 503, {"status": "error", "errorType": kind, "error": str(error)}
        if isinstance(value, bytes):
            return Answer(status, value, JSON, _API_HEADERS)
        made = json_answer(status, value)
        return Answer(made.status, made.body, made.content_type, _API_HEADERS)

    def _data(self, path: str, query: Mapping[str, str]) -> tuple[int, object]:
        if path == "status":
            source = "memory" if self._prometheus is None else "prometheus"
            told = {"source": source, "now_s": self._now(), "round_s": self._round_s()}
            return 200, {**told, **self._ring.status()}
        if path == "boards":
            return 200, [
                {"uid": uid, "title": board.get("title", uid)} for uid, board in self._boards.items()
            ]
        if path.startswith("boards/"):
            board = self._boards.get(path.removeprefix("boards/"))
            return (200, board) if board is not None else (404, _bad("no such board"))
        if path == "query_range":
            return self._query_range(query)
        label = path.removeprefix("label/").removesuffix("/values")
        if path == f"label/{label}/values" and _LABEL.fullmatch(label):
            return self._label_values(label, query)
        return 404, _bad("no such path")

    def _query_range(self, query: Mapping[str, str]) -> tuple[int, object]:
        expression = query.get("query", "")
        start_s, end_s, step_s = (_number(query, key) for key in ("start", "end", "step"))
        if not 0 <= end_s - start_s <= SPAN_S_MAX or step_s <= 0 or (end_s - start_s) / step_s > STEPS_MAX:
            raise RequestError(f"start..end must be at most {SPAN_S_MAX:.0f} s in {STEPS_MAX} steps")
        if self._prometheus is not None:
            return self._prometheus.query_range(expression, start_s, end_s, step_s)
        times_s: Array = start_s + step_s * np.arange(int((end_s - start_s) / step_s) + 1, dtype=np.float64)
        with self._turn():
            names = names_of(expression)
            series_n = len(self._ring.labels(names))
            if series_n * len(times_s) > CELLS_MAX:
                raise RequestError(f"{series_n} series at {len(times_s)} times: ask for less")
            found = evaluate(expression, self._ring.samples(names), times_s)
        answer: dict[str, object] = {
            "status": "success",
            "data": {
                "resultType": "matrix",
                "result": [_matrix(series, times_s) for series in found[:SERIES_MAX]],
            },
        }
        if len(found) > SERIES_MAX:
            answer["warnings"] = [f"{SERIES_MAX} of {len(found)} series are shown"]
        return 200, answer

    def _label_values(self, label: str, query: Mapping[str, str]) -> tuple[int, object]:
        selector = query.get("match[]", "")
        if self._prometheus is not None:
            start_s, end_s = _number(query, "start"), _number(query, "end")
            return self._prometheus.label_values(label, selector, start_s, end_s)
        with self._turn():
            names = names_of(selector) if selector else self._ring.names
            found = self._ring.labels(names, _matchers(selector) if selector else ())
            values = {value for labels in found for name, value in labels if name == label}
        return 200, {"status": "success", "data": sorted(values - {""})}

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Wait for one of AT_ONCE_MAX turns; raise PeerTimeout after WAIT_S_MAX."""
        if not self._turns.acquire(timeout=WAIT_S_MAX):
            raise PeerTimeout("too many ask: try again")
        try:
            yield
        finally:
            self._turns.release()


def _matchers(selector: str) -> list[Matcher]:
    node = parsed(selector)
    if type(node).__name__ != "VectorSelector":
        raise RequestError("match[] takes one selector")
    return [Matcher(str(m.op).rpartition(".")[2], m.name, m.value) for m in node.matchers.matchers]


def _matrix(series: Series, times_s: Array) -> dict[str, object]:
    at = np.flatnonzero(series.there)
    values = [
        [when, _text(value)]
        for when, value in zip(times_s[at].tolist(), series.values[at].tolist(), strict=True)
    ]
    return {"metric": dict(series.labels), "values": values}


def _text(value: float) -> str:
    """Return a number as Prometheus writes it."""
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    return repr(value).removesuffix(".0")


def _number(query: Mapping[str, str], key: str) -> float:
    try:
        value = float(query[key])
    except (KeyError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        raise RequestError(f"{key} = {query.get(key, '')[:50]!r}: write seconds")
    return value


def _bad(text: str) -> dict[str, str]:
    return {"status": "error", "errorType": "not_found", "error": text}


def _files() -> dict[str, bytes]:
    folder = importlib.resources.files("mooncake.live") / "static"
    return {
        file.name: file.read_bytes() for file in folder.iterdir() if file.name.rpartition(".")[2] in _TYPES
    }
