"""`python -m benchmarks.gateway`: what a request and a token cost before they reach an engine.

Four ways to the same engine, which computes nothing (benchmarks.gateway_peers.null_engine):

    ours                    our gateway, one prefill and one decode instance behind it (two legs per answer)
    plain vLLM              vLLM's API server over vLLM's own core client
    sglang-router + plain   sglang-router, cache_aware, in front of that API server
    vllm-router + plain     vllm-router, the same

vLLM is the same everywhere, so what differs is what stands before it and how it is bound to its engine. CPU
is that of all processes of a way except the engine, from /proc; clocks are given as information. Ratios are
ours by the other's within a round, medians over rounds. Routers are found in the environments given by
--sglang-router and --vllm-router (`pip install sglang-router==0.3.2`, `vllm-router==0.1.17`, in one each) and
left out without.
"""

import argparse
import itertools
import random
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from benchmarks import harness
from benchmarks.gateway_peers import load
from benchmarks.gateway_peers.paths import Way, Ways, serving
from benchmarks.processes import tree_cpu_s

STEP_S = 0.025
SYSTEM = "You answer briefly."
WORDS = (
    "the", "engine", "of", "a", "prompt", "block", "token", "cache", "that", "serves", "many",
    "requests", "when", "memory", "holds", "what", "was", "computed", "before", "and", "every", "later",
    "turn", "of", "one", "conversation", "begins", "with", "all", "earlier", "ones",
)  # fmt: skip
TURN_CHARS = 2000
"""Of one message of a conversation."""
Rounds = dict[str, list[dict[str, dict[str, float]]]]
"""Of each scenario, what each way took in each round."""
_fresh = itertools.count()


def text(chars: int, seed: int) -> str:
    """Return words that no other seed begins with."""
    rng = random.Random(seed)
    words = [f"{seed}"]
    size = len(words[0])
    while size < chars:
        words.append(rng.choice(WORDS))
        size += len(words[-1]) + 1
    return " ".join(words)[:chars]


def fresh(chars: int) -> Iterator[bytes]:
    """Prompts of one long message that was never sent before."""
    while True:
        messages = [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": text(chars, next(_fresh))},
        ]
        yield load.body(messages, 1, stream=False)


def conversation(chars: int) -> Iterator[bytes]:
    """Prompts that share all messages but the last."""
    count = max(1, chars // TURN_CHARS)
    old = [
        {"role": ("user", "assistant")[i % 2], "content": text(chars // count, next(_fresh))}
        for i in range(count)
    ]
    if count % 2:
        old.append({"role": "assistant", "content": "Yes."})
    while True:
        yield load.body(
            [*old, {"role": "user", "content": f"Question {next(_fresh)}: and then?"}], 1, stream=False
        )


def streaming(way: Way, count: int, tokens: int) -> dict[str, float]:
    """Stream `count` answers at once; return CPU per token."""
    payloads = [
        load.body([{"role": "user", "content": text(200, next(_fresh))}], tokens, stream=True)
        for _ in range(count)
    ]
    connections = [load.Connection(way.port) for _ in range(count)]
    before_s, began_s = way.cpu_s(), time.perf_counter()
    made, events = load.streams(connections, payloads)
    wall_s = time.perf_counter() - began_s
    cpu_s = way.cpu_s() - before_s
    for connection in connections:
        connection.close()
    return {"cpu": cpu_s / made * 1e6, "wall": made / wall_s, "tokens_per_event": made / events}


def spread(ways: Ways, fronts: int, count: int, tokens: int) -> dict[str, float]:
    """Stream `count` answers over each of some gateways; return CPU per token of the busiest, of the core."""
    payloads = [
        load.body([{"role": "user", "content": text(200, next(_fresh))}], tokens, stream=True)
        for _ in range(count * fronts)
    ]
    used = ways.fronts[:fronts]
    connections = [load.Connection(used[i % fronts].port) for i in range(count * fronts)]
    before_s, core_s, began_s = [way.cpu_s() for way in used], tree_cpu_s(ways.core_pid), time.perf_counter()
    made, events = load.streams(connections, payloads)
    wall_s = time.perf_counter() - began_s
    spent_s = [way.cpu_s() - before for way, before in zip(used, before_s, strict=True)]
    core_s = tree_cpu_s(ways.core_pid) - core_s
    for connection in connections:
        connection.close()
    return {
        "busiest": max(spent_s) / made * 1e6,
        "all": sum(spent_s) / made * 1e6,
        "core": core_s / made * 1e6,
        "wall": made / wall_s,
        "events": events / wall_s,
    }


def gateways(ways: Ways, rounds: int, begin: Callable[[str], None], *, quick: bool) -> list[dict[str, Any]]:
    """Compare two gateways with one, both under a decision core of their own.

    Each gateway gets as many streams, as where one was not enough and there are two. Capacity: tokens a
    second that the busiest process allows, were each on a core of its own. `flooded` asks for more than one
    gateway can send one by one; it counts events by the clock, and needs a machine where nothing else runs.
    """
    rows = []
    loads = (("light", 32, 40),) if quick else (("light", 32, 200), ("flooded", 384, 100))
    for name, count, tokens in loads:
        found: list[dict[str, dict[str, float]]] = []
        for index in range(rounds + 1):  # the first warms up
            begin(f"{name}, 1 and 2 gateways")
            row = {str(n): spread(ways, n, count, tokens) for n in ((1, 2) if index % 2 else (2, 1))}
            if index:
                found.append(row)
        one, two = ({key: statistics.median(r[n][key] for r in found) for key in found[0][n]} for n in "12")
        rows.append({
            "what": f"{name}, {count} streams each",
            "CPU us/token: one": one["all"],
            "two": two["all"],
            "core": two["core"],
            "capacity two / one": statistics.median(
                r["1"]["busiest"] / max(r["2"]["busiest"], r["2"]["core"]) for r in found
            ),
            "events/s: one": one["events"],
            "two ": two["events"],
        })  # fmt: skip
    return rows


def answering(way: Way, make: Callable[[int], Iterator[bytes]], chars: int, count: int) -> dict[str, float]:
    """Send `count` prompts after one, four at a time; return CPU per request."""
    connections = [load.Connection(way.port) for _ in range(4)]
    payloads = iter(list(itertools.islice(make(chars), count + 1)))
    load.requests(connections, payloads, 1)  # the first turn of a conversation is nobody's repetition
    before_s, began_s = way.cpu_s(), time.perf_counter()
    load.requests(connections, payloads, count)
    wall_s = time.perf_counter() - began_s
    cpu_s = way.cpu_s() - before_s
    for connection in connections:
        connection.close()
    return {"cpu": cpu_s / count * 1e6, "wall": count / wall_s}


def first_token(way: Way, count: int) -> dict[str, float]:
    """Stream one short answer at a time; return the median time to first token."""
    connection = load.Connection(way.port)
    found = load.first_tokens(
        connection,
        lambda: load.body([{"role": "user", "content": text(200, next(_fresh))}], 2, stream=True),
        count,
    )
    connection.close()
    return {"ttft": statistics.median(found) * 1e3}


def scenarios(*, quick: bool) -> dict[str, Callable[[Way], dict[str, float]]]:
    """Return what is measured in each round, by name."""
    if quick:
        return {
            "stream, 32": lambda way: streaming(way, 32, 40),
            "TTFT, 1 at a time": lambda way: first_token(way, 20),
            "4 KB fresh": lambda way: answering(way, fresh, 4 << 10, 40),
            "32 KB repeated": lambda way: answering(way, conversation, 32 << 10, 10),
        }
    found: dict[str, Callable[[Way], dict[str, float]]] = {
        "stream, 32": lambda way: streaming(way, 32, 200),
        "stream, 96": lambda way: streaming(way, 96, 200),
        "TTFT, 1 at a time": lambda way: first_token(way, 60),
    }
    for name, make in (("fresh", fresh), ("repeated", conversation)):
        for size, chars, count in (("4 KB", 4 << 10, 100), ("32 KB", 32 << 10, 40), ("512 KB", 512 << 10, 4)):
            found[f"{size} {name}"] = partial(answering, make=make, chars=chars, count=count)
    return found


def ratio(rows: list[dict[str, dict[str, float]]], one: str, other: str, key: str) -> float:
    """Return the median over rounds of one's figure by the other's in the same round."""
    return statistics.median(row[one][key] / row[other][key] for row in rows)


def table(found: Rounds, names: list[str]) -> list[dict[str, Any]]:
    """Return one row per scenario."""
    rows = []
    for scenario, rounds in found.items():
        key = "ttft" if scenario.startswith("TTFT") else "cpu"
        unit = "ms" if key == "ttft" else "CPU us/token" if "stream" in scenario else "CPU us/request"
        row: dict[str, Any] = {"what": scenario, "unit": unit}
        for name in names:
            row[name] = statistics.median(r[name][key] for r in rounds)
        for name in names[1:]:
            if key == "ttft":
                row[f"ours - {name}"] = statistics.median(r["ours"][key] - r[name][key] for r in rounds)
            else:
                row[f"ours / {name}"] = ratio(rounds, "ours", name, key)
        rows.append(row)
    return rows


def show(rows: list[dict[str, Any]], names: list[str]) -> None:
    """Print the figures, then the ratios."""
    harness.show("medians", [{key: row[key] for key in ("what", "unit", *names)} for row in rows])
    for row in rows:
        compared = [f"{key}: {row[key]:.3g}" for key in row if key not in ("what", "unit", *names)]
        print(f"{row['what']:>20}  {'   '.join(compared)}")


def parsed() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="tiny tokenizer, 1 round: within 60 s")
    parser.add_argument("--json", metavar="FILE", help="write all rounds as JSON")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="scenarios whose names have this in them")
    parser.add_argument("--sglang-router", metavar="DIR", help="environment with sglang-router 0.3.2")
    parser.add_argument("--vllm-router", metavar="DIR", help="environment with vllm-router 0.1.17")
    # `timeout` and Ctrl-C alike end through `finally`, which stops the servers
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    return parser.parse_args()


def compare(
    ways: list[Way], todo: dict[str, Callable[[Way], dict[str, float]]], rounds: int,
    begin: Callable[[str], None], keep: Callable[[Rounds], None],
) -> Rounds:  # fmt: skip
    """Run `todo` on all ways in turns; `keep` what is there after each round."""
    found: Rounds = {name: [] for name in todo}
    for index in range(rounds + 1):  # the first warms up
        for name, run in todo.items():
            row = {}
            for way in ways if index % 2 else reversed(ways):
                begin(f"{name}, {way.name}")
                row[way.name] = run(way)
            if index:
                found[name].append(row)
        if index:
            keep(found)
    return found


def main() -> None:
    """See the module's text."""
    args = parsed()
    venvs = {"sglang-router": args.sglang_router, "vllm-router": args.vllm_router}
    for name, venv in venvs.items():
        if venv is None:
            print(f"without {name}: no --{name} DIR given")
    rounds = 1 if args.quick else args.rounds
    todo = {name: run for name, run in scenarios(quick=args.quick).items() if args.only in name}
    several = args.only in "gateways"
    with serving(tiny=args.quick, fronts=2 if several else 0, step_s=STEP_S, venvs=venvs) as ways:
        names = [way.name for way in ways.compared]
        scaling: list[dict[str, Any]] = []
        steps = len(todo) * len(names) + (0 if not several else 1 if args.quick else 2)

        def keep(found: Rounds) -> None:
            harness.save(args.json, {"rows": table(found, names), "gateways": scaling, "rounds": found})

        with harness.progress((rounds + 1) * steps) as begin:
            found = compare(ways.compared, todo, rounds, begin, keep)
            if several:
                scaling += gateways(ways, rounds, begin, quick=args.quick)
    if todo:
        show(table(found, names), names)
    if scaling:
        harness.show("one gateway and two, a decision core beside them", scaling)
    keep(found)


if __name__ == "__main__":
    main()
