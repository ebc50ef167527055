"""What the pages of a cluster said in the last minutes, in bounded memory: pages in, samples out.

Only the metrics that the dashboards name are kept. All pages of one round share its time, and a series that
is on no page of a round has a hole there, so a table of numbers holds everything: 1.5 kB a series.
A line's text up to its value names the series, and is looked up as it is: only new ones are taken apart.
Who can, hands over samples instead of a page: making the text is most of what a scrape costs.
"""

import threading
import urllib.parse
from collections.abc import Iterable, Mapping
from itertools import groupby
from math import isfinite

import msgspec
import numpy as np
import structlog
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from mooncake.live.matching import Matcher, selected
from mooncake.live.samples import NAME, Labels, Samples

log = structlog.get_logger(__name__)

WINDOW_S = 900.0
"""What an operator wants to see who opens the page after an alert."""
ROUND_S = 5.0
"""As `mooncake up`'s Prometheus; rates over $__rate_interval need four of them. Scrapers may take longer."""
ROUNDS = int(WINDOW_S / ROUND_S) + 12
"""A minute more than the window: the first rates of the page have something to look back at."""
SERIES_MAX = 20_000
"""30 MB; 64 engines with vLLM's histograms are about 10,000. What comes beyond is counted and not kept."""
SERIES_FIRST = 512
KEY_CHARS_MAX = 1024
"""Name and labels of a series; longer ones are not kept."""
JOB = "mooncake"


Sample = tuple[str, dict[str, str], float]
"""Name, labels, value."""
Page = str | list[Sample]
_Key = str | tuple[str, ...]


class Part(msgspec.Struct, frozen=True):
    """A process that is asked: its name in the cluster, and where its page is ("" = this process)."""

    process: str
    url: str = ""
    instance: str = ""  # host:port, as Prometheus names targets


def part_of(process: str, url: str) -> Part:
    """Return a part, named as Prometheus names a target."""
    return Part(process, url, urllib.parse.urlsplit(url).netloc)


class Ring:
    """The last ROUNDS rounds. Any thread may call."""

    def __init__(self, names: Iterable[str], *, rounds: int = ROUNDS, series_max: int = SERIES_MAX) -> None:
        """`names`: of the metrics to keep."""
        self._names = frozenset(names)
        self._rounds, self._series_max = rounds, series_max
        self._lock = threading.Lock()
        self._times_s = np.full(rounds, np.nan)
        self._values = np.full((min(SERIES_FIRST, series_max), rounds), np.nan)
        self._round = -1  # counts up; its column is the rest by `rounds`
        self._labels: dict[int, Labels] = {}  # by row
        self._by_name: dict[str, dict[int, None]] = {}
        self._rows: dict[Part, dict[_Key, int]] = {}
        self._seen: dict[int, int] = {}  # row -> the last round with a sample
        self._free: list[int] = []
        self._dropped: dict[str, None] = {}

    @property
    def names(self) -> frozenset[str]:
        """Of the metrics that are kept."""
        return self._names

    def status(self) -> dict[str, float]:
        """Return how much there is, JSON-ready."""
        with self._lock:
            known = self._times_s[~np.isnan(self._times_s)]
            span_s = float(known.max() - known.min()) if len(known) else 0.0
            return {"series": len(self._labels), "dropped": len(self._dropped), "span_s": span_s}

    def add(self, at_s: float, pages: Mapping[Part, Page | None]) -> None:
        """Take one round; None = the part did not answer. Times rise from round to round."""
        taken = {part: self._taken(page) for part, page in pages.items() if page is not None}
        with self._lock:
            self._round += 1
            self._forget()
            column = self._round % self._rounds
            self._times_s[column] = at_s
            self._values[:, column] = np.nan
            for part in pages:
                self._put(part, "up", None, float(part in taken), column)
                for key, labels, value in taken.get(part, []):
                    self._put(part, key, labels, value, column)

    def samples(self, names: Iterable[str], matchers: Iterable[Matcher] = ()) -> Samples:
        """Return all there is of these metrics.

        Raises:
            RequestError: the regular expression of a matcher is none, or too large.
        """
        with self._lock:
            rows = [row for name in names for row in self._by_name.get(name, ())]
            found = {row: self._labels[row] for row in rows}
            order = [n % self._rounds for n in range(max(0, self._round + 1 - self._rounds), self._round + 1)]
            times_s, values = self._times_s[order], self._values[np.ix_(rows, order)]
        labels = list(found.values())
        kept = selected(labels, range(len(labels)), list(matchers))
        return Samples(times_s, [labels[row] for row in kept], values[kept])

    def labels(self, names: Iterable[str], matchers: Iterable[Matcher] = ()) -> list[Labels]:
        """Return the labels of all series of these metrics; their values are not touched.

        Raises:
            RequestError: the regular expression of a matcher is none, or too large.
        """
        with self._lock:
            found = [self._labels[row] for name in names for row in self._by_name.get(name, ())]
        return [found[row] for row in selected(found, range(len(found)), list(matchers))]

    # ------------------------------------------------------------ parts

    def _taken(self, page: Page) -> list[tuple[_Key, dict[str, str] | None, float]]:
        """Return what is kept: what it is known by, its labels if they have been taken apart, its value."""
        if isinstance(page, str):
            return self._lines(page)
        return [
            ((name, *labels, *labels.values()), labels, value)
            for name, labels, value in page
            if name in self._names
        ]

    def _lines(self, page: str) -> list[tuple[_Key, dict[str, str] | None, float]]:
        found: list[tuple[_Key, dict[str, str] | None, float]] = []
        for name, lines in groupby(page.split("\n"), _name):
            if name not in self._names:
                continue
            for line in lines:
                key, _, text = line.rpartition(" ")
                try:
                    found.append((key, None, float(text)))
                except ValueError:
                    log.debug("live.line", line=line[:200])
        return found

    def _put(self, part: Part, key: _Key, labels: dict[str, str] | None, value: float, column: int) -> None:
        rows = self._rows.setdefault(part, {})
        row = rows.get(key)
        if row is None:
            row = self._new(part, key, labels)
            if row is None:
                return
            rows[key] = row
        self._values[row, column] = value
        self._seen[row] = self._round

    def _new(self, part: Part, key: _Key, told: dict[str, str] | None) -> int | None:
        labels = _labels(part, key, told)
        if labels is None:
            return None
        if not self._free:
            rows_n = len(self._labels)
            if rows_n >= self._series_max:
                if not self._dropped:
                    log.warning("live.full", series_max=self._series_max)
                if len(self._dropped) < self._series_max:
                    self._dropped[f"{part.process} {key}"] = None
                return None
            if rows_n == len(self._values):
                more = min(rows_n * 2, self._series_max) - rows_n
                self._values = np.concatenate([self._values, np.full((more, self._rounds), np.nan)])
            self._free.append(rows_n)
        row = self._free.pop()
        self._values[row] = np.nan
        self._labels[row] = labels
        self._by_name.setdefault(dict(labels)[NAME], {})[row] = None
        return row

    def _forget(self) -> None:
        """Give up the series that had no sample for all of the window; looked for once a window."""
        if self._round % self._rounds:
            return
        for part, rows in list(self._rows.items()):
            for key, row in list(rows.items()):
                if self._seen[row] <= self._round - self._rounds:
                    name = dict(self._labels.pop(row))[NAME]
                    del rows[key], self._seen[row], self._by_name[name][row]
                    self._free.append(row)
            if not rows:
                del self._rows[part]
        self._dropped.clear()


def _name(line: str) -> str:
    brace = line.find("{")
    return line[: brace if brace >= 0 else line.find(" ")]


def _labels(part: Part, key: _Key, told: dict[str, str] | None) -> Labels | None:
    """Return the labels of a new series; those of the process win, as with Prometheus' honor_labels off."""
    if sum(map(len, key)) > KEY_CHARS_MAX:
        return None
    if isinstance(key, str):
        try:
            (sample,) = next(iter(text_string_to_metric_families(f"{key} 0\n"))).samples
        except (ValueError, StopIteration):
            log.debug("live.series", key=key[:200])
            return None
        name, told = sample.name, sample.labels
    else:
        name = key[0]
    own = {"job": JOB, "process": part.process, "instance": part.instance or part.process}
    labels = {f"exported_{label}" if label in own else label: value for label, value in (told or {}).items()}
    return tuple(sorted({**labels, **own, NAME: name}.items()))


def samples_of(registry: CollectorRegistry, names: Iterable[str]) -> list[Sample]:
    """Return these metrics of a registry as they are now; what is no number is none in JSON either."""
    families = registry.restricted_registry(names).collect()
    return [
        (sample.name, sample.labels, float(sample.value))  # some collectors say True
        for family in families
        for sample in family.samples
        if isfinite(sample.value)
    ]
