"""TTFT and TBT of long prompts: one stock vLLM, Mooncake cold, Mooncake with a pool hit.

The engines' own prefix caches are off, so that a hit is the pool's and nothing else's. Prompts run
one at a time, the three kinds in turns. The hand-over is what the prefill engine spent on saving
plus what the decode engine spent on loading, from the engines' own counters.
"""

import statistics
import tempfile
from typing import Any

from benchmarks import harness
from mooncake.model import resolve_model
from tests.tiny_model import make_tiny_llama

OUTPUT_TOKENS = 32


def one(server: harness.Server, model: str, prompt: list[int]) -> dict[str, Any]:
    """Run one prompt alone."""
    return harness.run_streams(server.url, model, [prompt], OUTPUT_TOKENS, 1)[0]


def moved(server: harness.Server) -> dict[str, float]:
    """Return bytes and seconds of saves and loads over all engines so far."""
    engines = server.counters().values()
    return {
        key: sum(e[key] for e in engines)
        for key in ("save_bytes", "save_seconds", "load_bytes", "load_seconds")
    }


def hand_over(before: dict[str, float], after: dict[str, float]) -> tuple[float, float]:
    """Return (megabytes handed over, seconds spent saving and loading)."""
    delta = {key: after[key] - before[key] for key in after}
    return delta["save_bytes"] / 1e6, delta["save_seconds"] + delta["load_seconds"]


def summary(kind: str, answers: list[dict[str, Any]], base_ttft_s: float | None) -> dict[str, Any]:
    """Return one row of the table."""
    ttft_s = statistics.median(a["ttft_s"] for a in answers)
    gaps_s = [gap for a in answers for gap in a["gaps_s"]]
    details = [a["usage"].get("prompt_tokens_details") or {} for a in answers]
    return {
        "kind": kind,
        "TTFT p50 s": ttft_s,
        "TTFT / stock": ttft_s / base_ttft_s if base_ttft_s else 1.0,
        "TBT p50 ms": statistics.median(gaps_s) * 1e3,
        "cached tokens": statistics.median((d.get("cached_tokens") or 0) for d in details),
    }


def main() -> None:
    """See the module's text."""
    args = harness.arguments(__doc__)
    if args.model:
        model = args.model
    elif args.quick:
        model = str(make_tiny_llama(tempfile.mkdtemp(prefix="bench-tiny-")))
    else:
        model = resolve_model(None).path_or_name
    prompt_len, rounds = (1000, 3) if args.quick else (2000, 5)
    no_local_cache = "--no-enable-prefix-caching"
    ours = harness.mooncake_up(model, "--max-model-len", "8192", "--", no_local_cache)
    stock = harness.plain_vllm(model)
    answers: dict[str, list[dict[str, Any]]] = {"stock": [], "cold": [], "hit": []}
    shares: list[tuple[float, float, float]] = []
    with harness.progress(2 + 3 * (rounds + 1)) as begin, harness.running(begin, ours, stock):
        names = ours.model(), stock.model()
        for index in range(rounds + 1):  # the first warms both up
            prompt = harness.prompt_tokens(prompt_len, seed=index)
            begin("stock vLLM")
            plain = one(stock, names[1], prompt)
            begin("Mooncake, cold")
            before = moved(ours)
            cold = one(ours, names[0], prompt)
            megabytes, seconds = hand_over(before, moved(ours))
            begin("Mooncake, pool hit")
            hit = one(ours, names[0], prompt)
            if index:
                answers["stock"].append(plain)
                answers["cold"].append(cold)
                answers["hit"].append(hit)
                shares.append((megabytes, seconds, seconds / cold["ttft_s"]))
    base_s = statistics.median(a["ttft_s"] for a in answers["stock"])
    rows = [summary(kind, answers[kind], base_s) for kind in answers]
    harness.show(f"{prompt_len}-token prompts, medians of {rounds}", rows)
    moved_row = {
        "hand-over MB": statistics.median(s[0] for s in shares),
        "ms per MB": statistics.median(s[1] / s[0] for s in shares) * 1e3,
        "share of cold TTFT": statistics.median(s[2] for s in shares),
    }
    harness.show("Hand-over (save in prefill + load in decode)", [moved_row])
    harness.save(args.json, {"rows": rows, "hand_over": moved_row, "answers": answers})


if __name__ == "__main__":
    main()
