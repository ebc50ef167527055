"""What a rolling restart costs: requests that failed (bar: none), and how much later tokens come meanwhile.

`mooncake up --gateways 2` with one prefill and one decode instance. Clients stream all the time, each request
over a new connection, for a while undisturbed and then while every process gets SIGTERM in turn and is
started again: the store, both instances, both gateways, the core (which serves the cluster's metadata). Old
ones end before new ones start: while an instance is away the other one does the work of both, on a core that
also starts its successor, so what is measured is an upper bound of what a cluster with more instances sees.
"""

import argparse
import asyncio
import itertools
import os
import signal
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import msgspec

from benchmarks import harness
from mooncake.core.process import alive
from mooncake.model import resolve_model
from tests.tiny_model import make_tiny_llama

STREAMS = 2
"""At a time: one for each core."""
PROMPT_TOKENS, ANSWER_TOKENS = 96, 48
STEADY = 40
"""Requests before the first restart; a quarter with --quick."""
BETWEEN = 4
"""Requests between two restarts."""
BACK_S_MAX = 300.0
ASK_S = 10.0
BARS = "bar: dropped 0"


class Asked(msgspec.Struct, frozen=True):
    """One request: when it began and ended, and what it came to."""

    began_s: float
    ended_s: float
    ttft_s: float = 0.0
    gaps_s: list[float] = []
    error: str = ""


class Traffic:
    """Streams without a pause, from a thread with a loop of its own."""

    def __init__(self, url: str, model: str) -> None:
        """Begin."""
        self.asked: list[Asked] = []
        self._url, self._model = url, model
        self._seeds = itertools.count(1)
        self._leave = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)
        self._thread.start()

    def wait(self, more: int) -> None:
        """Return when so many more requests have ended."""
        goal = len(self.asked) + more
        end_s = time.monotonic() + BACK_S_MAX
        while len(self.asked) < goal:
            if time.monotonic() > end_s:
                raise RuntimeError(f"no {more} answers within {BACK_S_MAX:g} s: {self.asked[-3:]}")
            time.sleep(0.05)

    def stop(self) -> None:
        """End, with what is in flight."""
        self._leave.set()
        self._thread.join(BACK_S_MAX)

    async def _run(self) -> None:
        await asyncio.gather(*(self._stream() for _ in range(STREAMS)))

    async def _stream(self) -> None:
        while not self._leave.is_set():
            self.asked.append(await self._ask())

    async def _ask(self) -> Asked:
        prompt = harness.prompt_tokens(PROMPT_TOKENS, next(self._seeds))
        began_s = time.monotonic()
        try:
            async with httpx.AsyncClient(timeout=harness.REQUEST_S_MAX) as client:
                got = await harness.stream(client, self._url, self._model, prompt, ANSWER_TOKENS)
        except (httpx.HTTPError, IndexError) as broken:  # no token at all
            return Asked(began_s, time.monotonic(), error=repr(broken))
        told = got["usage"].get("completion_tokens")
        error = "" if told == ANSWER_TOKENS else f"{told} of {ANSWER_TOKENS} tokens"
        return Asked(began_s, time.monotonic(), got["ttft_s"], got["gaps_s"], error)


@contextmanager
def traffic(url: str, model: str) -> Iterator[Traffic]:
    """Give clients that stream, and end them."""
    clients = Traffic(url, model)
    try:
        yield clients
    finally:
        clients.stop()


def processes(url: str) -> dict[str, int]:
    """Return name -> pid of every process that says that it is there."""
    view = httpx.get(f"{url}/mooncake/instances", timeout=ASK_S).raise_for_status().json()
    there = [("store", one) for one in view["stores"]]
    there += [(one["instance_id"], one) for one in view["instances"] if one["state"] == "alive"]
    there += [(one["name"], one) for one in [*view["gateways"], *view["cores"]]]
    return {name: one["pid"] for name, one in there}


def wait_for(what: str, condition: Callable[[], bool]) -> None:
    """Return when `condition` holds.

    Raises:
        RuntimeError: it did not within BACK_S_MAX.
    """
    end_s = time.monotonic() + BACK_S_MAX
    while True:
        try:
            if condition():
                return
        except httpx.HTTPError:  # asked of one that is on its way out
            pass
        if time.monotonic() > end_s:
            raise RuntimeError(f"not within {BACK_S_MAX:g} s: {what}")
        time.sleep(0.05)


def restart(url: str, name: str) -> tuple[float, float]:
    """SIGTERM; return the seconds until the old process had ended and until a new one serves."""
    pid, begun_s = processes(url)[name], time.monotonic()
    os.kill(pid, signal.SIGTERM)
    wait_for(f"the old {name} ends", lambda: not alive(pid))
    gone_s = time.monotonic() - begun_s
    wait_for(f"a new {name} serves", lambda: processes(url).get(name, pid) != pid)
    return gone_s, time.monotonic() - begun_s


def p99(values: list[float]) -> float:
    """Return the 99th percentile in ms, 0 of nothing."""
    if len(values) < 2:
        return 1000 * sum(values)
    return 1000 * statistics.quantiles(values, n=100, method="inclusive")[98]


def summary(phase: str, asked: list[Asked]) -> dict[str, Any]:
    """Return one row of the table."""
    good = [one for one in asked if not one.error]
    gaps = [gap for one in good for gap in one.gaps_s]
    return {
        "phase": phase,
        "requests": len(asked),
        "dropped": len(asked) - len(good),
        "TTFT p50 ms": 1000 * statistics.median([one.ttft_s for one in good] or [0.0]),
        "TTFT p99 ms": p99([one.ttft_s for one in good]),
        "TBT p50 ms": 1000 * statistics.median(gaps or [0.0]),
        "TBT p99 ms": p99(gaps),
    }


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Return what was measured."""
    if args.quick and not args.model:
        model = str(make_tiny_llama(tempfile.mkdtemp(prefix="bench-tiny-")))
    else:
        model = args.model or resolve_model(None).path_or_name
    steady = STEADY // 4 if args.quick else STEADY
    names = ["store", "prefill-0", "decode-0", "gateway-0", "gateway-1", "core"]
    restarts, marks = [], []
    with harness.progress(len(names) + 2) as begin:
        server = harness.mooncake_up(model, "--gateways", "2")
        with harness.running(begin, server):
            begin("steady")
            with traffic(server.url, server.model()) as clients:
                clients.wait(2 * STREAMS)  # the first ones pay for what is made once
                marks.append(time.monotonic())
                clients.wait(steady)
                rolled_s = time.monotonic()
                for name in names:
                    begin(f"restarting {name}")
                    marks.append(time.monotonic())
                    gone_s, back_s = restart(server.url, name)
                    clients.wait(BETWEEN)
                    restarts.append({"restarted": name, "ended after s": gone_s, "back after s": back_s})
                marks.append(time.monotonic())
            asked = clients.asked
    before = [one for one in asked if marks[0] <= one.began_s and one.ended_s <= rolled_s]
    during = [one for one in asked if one.ended_s > rolled_s]
    for row, start_s, end_s in zip(restarts, marks[1:], marks[2:], strict=False):
        touched = [one for one in during if one.began_s < end_s and one.ended_s > start_s]
        told = summary("", touched)
        row |= {key: told[key] for key in ("requests", "dropped", "TTFT p99 ms", "TBT p99 ms")}
    rows = [summary("before", before), summary("during the roll", during)]
    added = {key: rows[1][key] - rows[0][key] for key in ("TTFT p99 ms", "TBT p99 ms")}
    errors = sorted({one.error for one in asked if one.error})
    return {"phases": rows, "restarts": restarts, "added": added, "errors": errors}


def main() -> int:
    """Measure, print; exit status 1 if a request was dropped."""
    args = harness.arguments(__doc__ or "")
    result = measure(args)
    harness.show(BARS, result["phases"])
    harness.show("each restart, and the requests that it touched", result["restarts"])
    for error in result["errors"]:
        print("dropped:", error)
    harness.save(args.json, result)
    return int(any(row["dropped"] for row in result["phases"]))


if __name__ == "__main__":
    raise SystemExit(main())
