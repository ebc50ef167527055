"""The indexer's queries: microseconds and CPU by itself and over HTTP, at a million blocks of 64 instances.

    python -m benchmarks.indexer [--quick] [--json FILE] [--peer-venv DIR]

`first` is a query by tokens inside the process, of a prompt that was never seen: names of all blocks,
look-up, tiers, per instance; `again` the same with names remembered, as of a conversation's next turn. `json`
and `msgpack` are the latter through the HTTP server in a process of its own: its CPU per query is what a
router costs; queries/s are of CLIENTS connections at once. The peer is ai-dynamo-runtime's RadixTree (hash
and match in Rust, no HTTP), from an environment of its own: `python3 -m venv DIR && DIR/bin/pip install
ai-dynamo-runtime==1.6.1`; without it, it is skipped, and named.
"""

import argparse
import asyncio
import contextlib
import http.client
import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import msgspec
import psutil
from prometheus_client import CollectorRegistry

from benchmarks.indexer_peers.work import (
    ASKED,
    CHAIN_TOKENS,
    LENGTHS,
    NODES,
    chains_of,
    holdings,
    timed,
    tokens_of,
)
from conductor.indexer.api import Api
from conductor.indexer.http import IndexerServer
from conductor.indexer.service import Indexer, Options
from conductor.indexer.source import Service, Source
from mooncake.core.log import as_library
from mooncake.worker.gpu_blocks import Stored

BLOCKS, QUICK_BLOCKS = 1_000_000, 100_000
BLOCK_SIZES = (16, 128)
"""vLLM's default, and that of long contexts."""
CLIENTS = 8
FOR_S, QUICK_FOR_S = 1.0, 0.4
ROUNDS, QUICK_ROUNDS = 3, 1
PEER_S_MAX = 600.0
MODEL = "m"
PEER = Path(__file__).parent / "indexer_peers" / "dynamo.py"


def fill(indexer: Indexer, blocks: int, size: int) -> float:
    """Let 64 instances tell what they hold; return microseconds of CPU per block told."""
    sources = []
    for node in range(NODES):
        made = Service(
            endpoint="", replay_endpoint="", kind="vLLM", model=MODEL, lora="", tenant="default",
            instance=f"i{node}", block_size=size, rank=0, salt="", profile=None,
        )  # fmt: skip
        sources.append(Source(made, indexer.contexts))
    spent_s, held, at, tokens = 0.0, 0, -1, []
    for chain, node, count in holdings(chains_of(blocks, size), size):
        if chain != at:
            at, tokens = chain, tokens_of(chain).tolist()
        hashes = [(chain << 32) + one + 1 for one in range(count)]
        event = Stored(list(hashes), None, tokens[: count * size], size, medium="GPU")
        started_s = time.process_time()
        sources[node].apply([event])
        spent_s += time.process_time() - started_s
        held += count
    return 1e6 * spent_s / held


def alone(blocks: int, size: int, for_s: float) -> dict[str, Any]:
    """Return what queries take inside the process."""

    async def made() -> Indexer:
        return Indexer(Options())

    indexer = asyncio.run(made())
    found: dict[str, Any] = {"store_us_per_block": fill(indexer, blocks, size)}
    (context,) = indexer.contexts.all.values()
    prompts = [tokens_of(number) for number in range(ASKED)]
    for length in LENGTHS:
        packed = [one[:length].tobytes() for one in prompts]

        def ask(number: int, packed: list[bytes] = packed) -> Any:
            return context.by_tokens(packed[number], None, None)

        def first(number: int, packed: list[bytes] = packed) -> Any:
            context.forget_names()
            return context.by_tokens(packed[number], None, None)

        assert max(one.best.gpu for one in ask(0).values()) == length // size * size
        found[str(length)] = timed(ask, for_s)
        found[f"first {length}"] = timed(first, for_s)
    return found


# ---------------------------------------------------------------- over HTTP


def serve(pipe: Connection, blocks: int, size: int) -> None:
    """The server's process: fill, tell the port, end when the pipe does."""
    as_library()

    async def run() -> None:
        indexer = Indexer(Options())
        fill(indexer, blocks, size)
        server = IndexerServer(
            Api(indexer, asyncio.get_running_loop(), CollectorRegistry()), "127.0.0.1", 0, ""
        )
        pipe.send(server.start())
        with contextlib.suppress(EOFError):
            await asyncio.to_thread(pipe.recv)
        await server.close()
        await indexer.close()

    asyncio.run(run())


@contextlib.contextmanager
def served(blocks: int, size: int) -> Iterator[tuple[str, psutil.Process]]:
    """Yield host:port and the process of a server that is full."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs, blocks, size), daemon=True)
    process.start()
    theirs.close()
    try:
        assert ours.poll(PEER_S_MAX), "the server does not start"
        yield str(ours.recv()).removeprefix("http://"), psutil.Process(process.pid)
    finally:
        ours.close()
        process.join(10.0)
        process.kill()


def ask_all(address: str, bodies: list[bytes], kind: str, for_s: float) -> int:
    """Send queries one after the other on one connection; return how many."""
    connection = http.client.HTTPConnection(address, timeout=60.0)
    end_s, count = time.perf_counter() + for_s, 0
    while time.perf_counter() < end_s or not count:
        connection.request("POST", "/query", bodies[count % len(bodies)], {"Content-Type": kind})
        response = connection.getresponse()
        body = response.read()
        assert response.status == 200, body
        count += 1
    connection.close()
    return count


def over_http(blocks: int, size: int, for_s: float) -> dict[str, Any]:
    """Return queries/s of CLIENTS and of one, and the server's CPU per query."""
    prompts = [tokens_of(number) for number in range(ASKED)]
    found: dict[str, Any] = {}
    with served(blocks, size) as (address, process), ThreadPoolExecutor(CLIENTS) as pool:
        for form in ("json", "msgpack"):
            for length in LENGTHS:
                wish: dict[str, Any] = {"model": MODEL, "block_size": size}
                if form == "json":
                    bodies = [
                        json.dumps({**wish, "token_ids": one[:length].tolist()}).encode() for one in prompts
                    ]
                else:
                    packed = [{**wish, "token_ids": one[:length].tobytes()} for one in prompts]
                    bodies = list(map(msgspec.msgpack.encode, packed))
                kind = f"application/{form}"
                ask_all(address, bodies, kind, 0.1)
                before, started_s = sum(process.cpu_times()[:2]), time.perf_counter()
                clients = [pool.submit(ask_all, address, bodies, kind, for_s) for _ in range(CLIENTS)]
                count = sum(one.result() for one in clients)
                took_s, spent_s = time.perf_counter() - started_s, sum(process.cpu_times()[:2]) - before
                started_s = time.perf_counter()
                single = ask_all(address, bodies, kind, for_s)
                found[f"{form} {length}"] = {
                    "per_s": count / took_s,
                    "cpu_us": 1e6 * spent_s / count,
                    "one_us": 1e6 * (time.perf_counter() - started_s) / single,
                }
    return found


def peer(venv: str, blocks: int, size: int, for_s: float) -> dict[str, Any]:
    """Return what the peer tells; raises SubprocessError or OSError where it cannot run."""
    argv = [f"{venv}/bin/python", "-P", str(PEER), str(blocks), str(size), str(for_s)]
    out = subprocess.run(argv, capture_output=True, check=True, text=True, timeout=PEER_S_MAX)
    found: dict[str, Any] = json.loads(out.stdout)
    return found


# ---------------------------------------------------------------- the run


def best(runs: list[dict[str, Any]], *path: str) -> float:
    """Return the median of a number over rounds."""
    values = []
    for run in runs:
        value: Any = run
        for name in path:
            value = value[name]
        values.append(value)
    return float(sorted(values)[len(values) // 2])


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a tenth of the blocks, one round: a minute")
    parser.add_argument("--json", metavar="FILE", help="write the results as JSON")
    parser.add_argument("--peer-venv", default=os.environ.get("INDEXER_PEERS", ""), help="see above")
    args = parser.parse_args()
    as_library()
    blocks, for_s = (QUICK_BLOCKS, QUICK_FOR_S) if args.quick else (BLOCKS, FOR_S)
    rounds = QUICK_ROUNDS if args.quick else ROUNDS
    results: dict[str, Any] = {"blocks": blocks, "nodes": NODES, "tokens": CHAIN_TOKENS, "skipped": {}}
    for size in BLOCK_SIZES:
        mine, theirs = [], []
        for _ in range(rounds):  # interleaved
            print(f"block {size}: index", file=sys.stderr)
            mine.append(alone(blocks, size, for_s))
            if args.peer_venv:
                try:
                    print(f"block {size}: dynamo", file=sys.stderr)
                    theirs.append(peer(args.peer_venv, blocks, size, for_s))
                except (subprocess.SubprocessError, OSError) as error:
                    results["skipped"]["dynamo"] = str(getattr(error, "stderr", "") or error)[-300:]
            else:
                results["skipped"]["dynamo"] = "no --peer-venv"
        print(f"block {size}: HTTP", file=sys.stderr)
        web = over_http(blocks, size, for_s)
        results[str(size)] = {"index": mine, "dynamo": theirs, "http": web}
        show(size, mine, theirs, web)
    for name, why in results["skipped"].items():
        print(f"skipped: {name}: {why}")
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=1))


def show(size: int, mine: list[Any], theirs: list[Any], web: dict[str, Any]) -> None:
    """Print one table."""
    print(f"\nblock of {size} tokens: microseconds of CPU per query; queries/s of {CLIENTS} connections")
    print("| tokens | again | first | dynamo | ratio | json | msgpack | json/s | msgpack/s | one, us |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for length in LENGTHS:
        ours, first = best(mine, str(length), "cpu_us"), best(mine, f"first {length}", "cpu_us")
        other = best(theirs, str(length), "cpu_us") if theirs else 0.0
        shown = f"{other:.0f} | {first / other:.2f}" if other else "- | -"
        as_json, packed = web[f"json {length}"], web[f"msgpack {length}"]
        web_us = f"{as_json['cpu_us']:.0f} | {packed['cpu_us']:.0f}"
        rates = f"{as_json['per_s']:.0f} | {packed['per_s']:.0f} | {packed['one_us']:.0f}"
        print(f"| {length} | {ours:.0f} | {first:.0f} | {shown} | {web_us} | {rates} |")
    told = f"{best(theirs, 'store_us_per_block'):.2f}" if theirs else "-"
    print(f"stored: {best(mine, 'store_us_per_block'):.2f} us of CPU a block told; dynamo {told}")


if __name__ == "__main__":
    main()
