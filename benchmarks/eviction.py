"""Hit rates of the eviction policies over the size of the pool: the shipped classes on recorded prompts.

Per request: the longest held prefix is the hit; then its blocks are used, the last one first. The
rate is tokens hit by tokens asked for. Rows "in a node" ask a whole store node, which is told the depths
of blocks as an engine tells them, instead of a bare policy.
Beside each rate stands the reference: an independent replay of the same traces, by the rules that
reproduce the orders of Table 1 in arXiv 2407.00079.

Traces are those published with Mooncake (FAST'25), `conversation_trace.jsonl` and
`synthetic_trace.jsonl`: {input_length, hash_ids of 512 tokens each}. They are not part of this
project: --traces DIR, or MOONCAKE_TRACES, or ../shared/traces. Absent ones are skipped by name.
"""

import argparse
import functools
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec
from rich.console import Console

from benchmarks import harness
from kvstore.limits import LEASE_S_MAX
from kvstore.node.allocator import ALIGN_BYTES
from kvstore.node.contract import CHECKSUM_BYTES
from kvstore.node.eviction import EvictionPolicy, LengthAware, Lfu, Lru, TailLru
from kvstore.node.node import Node
from kvstore.node.pins import Guarded
from kvstore.node.tags import Tags
from mooncake.core.keys import KEY_BYTES

BLOCK_TOKENS = 512
"""Of the traces."""
UNLIMITED = 1 << 40
CAPACITIES = (UNLIMITED, 100_000, 50_000, 30_000, 10_000, 1_000)
"""Blocks, as in Table 1 of arXiv 2407.00079."""
CURVE = (200, 500, 2_000, 5_000, 20_000, 70_000)
"""More points for the plot."""
QUICK_CAPACITIES = (30_000, 10_000)
TOLERANCE = 0.002
TAIL_BUDGET_BLOCKS = 16
"""8,192 tokens: about a second of prefill for a 70B model on eight A800 (FAST'25, Figure 14)."""
TAIL_NEXT_BLOCKS = 12
"""What a request of these traces adds to all earlier ones: 5,300 and 7,500 tokens in the mean."""

POLICIES: dict[str, Callable[[], EvictionPolicy]] = {
    "LRU": Lru,
    "LFU": Lfu,
    "length-aware": LengthAware,
    "tail LRU": lambda: TailLru(TAIL_BUDGET_BLOCKS, TAIL_NEXT_BLOCKS),
}
IN_NODE = " in a node"
NAMES = (*POLICIES, *(name + IN_NODE for name in POLICIES))
REFERENCE: dict[tuple[str, str], tuple[float, ...]] = {
    ("conversation", "LRU"): (0.374, 0.371, 0.362, 0.332, 0.216, 0.045),
    ("conversation", "LFU"): (0.374, 0.370, 0.351, 0.282, 0.135, 0.049),
    ("conversation", "length-aware"): (0.374, 0.341, 0.265, 0.207, 0.114, 0.051),
    ("synthetic", "LRU"): (0.651, 0.651, 0.651, 0.636, 0.432, 0.086),
    ("synthetic", "LFU"): (0.651, 0.651, 0.651, 0.637, 0.368, 0.042),
    ("synthetic", "length-aware"): (0.651, 0.651, 0.651, 0.516, 0.190, 0.019),
}
REFERENCE |= {
    (trace, name + IN_NODE): rates
    for (trace, name), rates in REFERENCE.items()
    if name != "length-aware"  # a node spares the request at hand, whose end this policy would give up first
}
"""At CAPACITIES. Nobody has published the tail-optimised one on these traces."""


class Prompt(msgspec.Struct, frozen=True):
    """One request of a trace; the blocks' names commit to all before them."""

    input_length: int
    hash_ids: list[int]


class Replay(msgspec.Struct, frozen=True):
    """What one policy made of one trace."""

    trace: str
    policy: str
    capacity_blocks: int
    hit_rate: float
    computed_tokens_p95: int
    over_budget: float
    """Requests with more than the tail budget to compute."""
    reference: float | None = None

    @property
    def difference(self) -> float | None:
        """Signed, from the reference."""
        return None if self.reference is None else self.hit_rate - self.reference

    @property
    def agrees(self) -> bool:
        """Whether it is within the tolerance of the reference, if there is one."""
        return self.difference is None or abs(self.difference) <= TOLERANCE


def load(path: Path) -> list[Prompt]:
    """Return the requests of a trace in order."""
    decode = msgspec.json.Decoder(Prompt).decode
    return [decode(line) for line in path.read_bytes().splitlines()]


def use(policy: EvictionPolicy, keys: list[bytes], capacity_blocks: int) -> int:
    """Count the held prefix of `keys`, then use them all; a block's size is 1. Returns the count."""
    found = 0
    while found < len(keys) and keys[found] in policy:
        found += 1
    for depth in reversed(range(len(keys))):
        key, below = keys[depth], len(keys) - 1 - depth
        if key in policy:
            policy.touch(key, below)
            continue
        for victim in policy.victims(policy.held_bytes + 1 - capacity_blocks):
            policy.remove(victim)
            policy.forget(victim)
        policy.insert(key, 1, depth, below)
    return found


def use_node(node: Node, keys: list[bytes]) -> int:
    """As `use`, by the requests of an engine: acquire, reserve and commit the rest, release."""
    got = node.acquire(0.0, keys, LEASE_S_MAX)
    found = len(got.blocks)
    reserved = node.reserve(0.0, "bench", keys[found:], ALIGN_BYTES, Tags(depth=found))
    tickets = [ticket for ticket in reserved.tickets if ticket]
    node.commit(0.0, tickets, [bytes(CHECKSUM_BYTES)] * len(tickets))
    node.release(0.0, got.lease_id)
    node.drain_events()
    return found


def user(name: str, capacity_blocks: int) -> Callable[[list[bytes]], int]:
    """Return what uses the keys of one request in a cache that is empty at first."""
    if name.endswith(IN_NODE):
        policy = Guarded(0, POLICIES[name.removesuffix(IN_NODE)])
        return functools.partial(use_node, Node(capacity_blocks * ALIGN_BYTES, policy=policy))
    return functools.partial(use, POLICIES[name](), capacity_blocks=capacity_blocks)


def replay(trace: str, prompts: Iterable[Prompt], name: str, capacity_blocks: int) -> Replay:
    """Run one trace through one policy that may hold `capacity_blocks`."""
    found = user(name, capacity_blocks)
    computed: list[int] = []
    asked = 0
    for prompt in prompts:
        keys = [block.to_bytes(KEY_BYTES, "little") for block in prompt.hash_ids]
        hit = min(found(keys) * BLOCK_TOKENS, prompt.input_length)
        computed.append(prompt.input_length - hit)
        asked += prompt.input_length
    budget = TAIL_BUDGET_BLOCKS * BLOCK_TOKENS
    rates = REFERENCE.get((trace, name))
    known = rates is not None and capacity_blocks in CAPACITIES
    return Replay(
        trace,
        name,
        capacity_blocks,
        1 - sum(computed) / asked,
        sorted(computed)[int(0.95 * len(computed))],
        sum(tokens > budget for tokens in computed) / len(computed),
        rates[CAPACITIES.index(capacity_blocks)] if rates is not None and known else None,
    )


def title(capacity_blocks: int) -> str:
    """Return a capacity for people."""
    return "unlimited" if capacity_blocks >= UNLIMITED else f"{capacity_blocks:,}"


def show(trace: str, replays: list[Replay]) -> None:
    """Print one trace's table."""
    rows = [
        {
            "policy": run.policy,
            "blocks": title(run.capacity_blocks),
            "hit": f"{run.hit_rate:.4f}",
            "ref": "-" if run.reference is None else f"{run.reference:.3f}",
            "off by": "-" if run.difference is None else f"{run.difference:+.4f}",
            "P95 left": f"{run.computed_tokens_p95:,}",
            f"> {TAIL_BUDGET_BLOCKS * BLOCK_TOKENS:,}": f"{run.over_budget:.2%}",
        }
        for run in replays
    ]
    harness.show(f"{trace} trace: tokens hit / tokens asked for; tokens left to compute", rows)


def plot(path: str, replays: list[Replay]) -> None:
    """Draw hit rate over capacity, one panel per trace."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    traces = list(dict.fromkeys(run.trace for run in replays))
    figure, panels = plt.subplots(1, len(traces), figsize=(6 * len(traces), 4.5), squeeze=False)
    for axes, trace in zip(panels[0], traces, strict=True):
        for name in POLICIES:  # a node's curve is that of its policy
            runs = [r for r in replays if (r.trace, r.policy) == (trace, name)]
            points = sorted((r.capacity_blocks, r.hit_rate) for r in runs if r.capacity_blocks < UNLIMITED)
            (line,) = axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
            for run in runs:
                if run.reference is not None and run.capacity_blocks < UNLIMITED:
                    axes.plot(run.capacity_blocks, run.reference, "x", color=line.get_color())
        axes.set(title=trace, xscale="log", xlabel="capacity (blocks of 512 tokens)", ylabel="hit rate")
        axes.grid(alpha=0.3)
    panels[0][0].plot([], [], "kx", label="reference")
    panels[0][0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def arguments() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="two capacities: within 60 s")
    parser.add_argument("--json", metavar="FILE", help="write the results as JSON")
    parser.add_argument("--plot", metavar="FILE", help="draw hit rate over capacity (.png or .svg)")
    default = os.environ.get("MOONCAKE_TRACES", "../shared/traces")
    parser.add_argument("--traces", metavar="DIR", type=Path, default=Path(default))
    return parser.parse_args()


def main() -> int:
    """See the module's text. Returns 1 if a rate is off its reference."""
    args = arguments()
    if args.quick:
        capacities: tuple[int, ...] = QUICK_CAPACITIES
    else:
        capacities = tuple(sorted(CAPACITIES + (CURVE if args.plot else ()), reverse=True))
    console = Console(stderr=True)
    replays: list[Replay] = []
    files = [args.traces / f"{trace}_trace.jsonl" for trace in ("conversation", "synthetic")]
    there = [path for path in files if path.is_file()]
    with harness.progress(len(there) * len(NAMES) * len(capacities)) as begin:
        for path in there:
            trace, prompts = path.name.removesuffix("_trace.jsonl"), load(path)
            for name in NAMES:
                for capacity in capacities:
                    begin(f"{trace}, {name}, {title(capacity)}")
                    replays.append(replay(trace, prompts, name, capacity))
    for path in files:
        if path not in there:
            console.print(f"skipped: no {path.name} in {args.traces} (--traces DIR)", highlight=False)
    for trace in dict.fromkeys(run.trace for run in replays):
        show(trace, [run for run in replays if run.trace == trace])
    compared = [abs(run.difference) for run in replays if run.difference is not None]
    if compared:
        off = sum(not run.agrees for run in replays)
        console.print(
            f"{len(compared)} rates compared, {off} off by more than {TOLERANCE}; most: {max(compared):.4f}"
        )
    if args.plot and replays:
        plot(args.plot, replays)
    rows = [msgspec.to_builtins(run) | {"difference": run.difference} for run in replays]
    harness.save(args.json, {"tolerance": TOLERANCE, "replays": rows})
    return int(not all(run.agrees for run in replays))


if __name__ == "__main__":
    raise SystemExit(main())
