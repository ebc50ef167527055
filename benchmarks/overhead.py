"""CPU microseconds per streamed token: gateway, relay and decode engine against stock vLLM.

Both servers run in turns on the same prompts; CPU time is the kernel's, per process, so a noisy
neighbour shifts it little. Stock vLLM has three processes (API, EngineCore, Worker); ours are the
gateway (= API), the relay and the engine (= EngineCore + Worker in one process).
"""

import statistics
import tempfile
import time
from typing import Any

from benchmarks import harness
from tests.tiny_model import make_tiny_llama

STREAMS = 8
PROMPT_TOKENS = 64


def round_of(server: harness.Server, pids: dict[str, int], tokens: int, seed: int) -> dict[str, float]:
    """Run STREAMS streams of `tokens` tokens; return CPU us per token by process, and the gap."""
    prompts = [harness.prompt_tokens(PROMPT_TOKENS, seed * 100 + i) for i in range(STREAMS)]
    before = {name: harness.cpu_s(pid) for name, pid in pids.items()}
    started_s = time.perf_counter()
    answers = harness.run_streams(server.url, server.model(), prompts, tokens, STREAMS)
    wall_s = time.perf_counter() - started_s
    count = STREAMS * tokens
    row = {f"{name}_us": (harness.cpu_s(pid) - before[name]) * 1e6 / count for name, pid in pids.items()}
    gaps_s = [gap for answer in answers for gap in answer["gaps_s"]]
    return {**row, "gap_p50_ms": statistics.median(gaps_s) * 1e3, "wall_s": wall_s}


def median_of(rounds: list[dict[str, float]]) -> dict[str, float]:
    """Return the median of each figure."""
    return {key: statistics.median(r[key] for r in rounds) for key in rounds[0]}


def main() -> None:
    """See the module's text."""
    args = harness.arguments(__doc__)
    model = args.model or make_tiny_llama(tempfile.mkdtemp(prefix="bench-tiny-"))
    tokens, rounds = (100, 2) if args.quick else (300, 5)
    ours, stock = harness.mooncake_up(str(model)), harness.plain_vllm(str(model))
    with harness.progress(2 + 2 * (rounds + 1)) as begin, harness.running(begin, ours, stock):
        facts = ours.instances()
        decode = next(i["pid"] for i in facts["instances"] if i["role"] == "decode")
        our_pids = {"gateway": facts["pid"], "relay": decode, "engine": harness.child_of(decode)}
        core = harness.child_of(stock.process.pid)
        stock_pids = {"api": stock.process.pid, "core": core, "worker": harness.child_of(core)}
        found: dict[str, list[dict[str, float]]] = {"ours": [], "stock": []}
        for index in range(rounds + 1):  # the first warms both up
            for name, server, pids in (("ours", ours, our_pids), ("stock", stock, stock_pids)):
                begin(server.name)
                row = round_of(server, pids, tokens, index)
                if index:
                    found[name].append(row)
    mine, theirs = median_of(found["ours"]), median_of(found["stock"])
    engine_ratio = mine["engine_us"] / (theirs["core_us"] + theirs["worker_us"])
    rows: list[dict[str, Any]] = [
        {"CPU us per token": "front end", "mooncake": mine["gateway_us"], "stock vLLM": theirs["api_us"]},
        {"CPU us per token": "relay", "mooncake": mine["relay_us"], "stock vLLM": 0.0},
        {
            "CPU us per token": "decode engine",
            "mooncake": mine["engine_us"],
            "stock vLLM": theirs["core_us"] + theirs["worker_us"],
        },
        {
            "CPU us per token": "gap p50, ms",
            "mooncake": mine["gap_p50_ms"],
            "stock vLLM": theirs["gap_p50_ms"],
        },
    ]
    harness.show(f"{STREAMS} streams x {tokens} tokens, medians of {rounds} rounds", rows)
    harness.save(args.json, {"ours": found["ours"], "stock": found["stock"], "engine_ratio": engine_ratio})


if __name__ == "__main__":
    main()
