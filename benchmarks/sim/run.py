"""Runs of the simulator as asked for on the command line: requests, one world per policy, files."""

import shlex
from collections.abc import Callable, Sequence
from math import inf

import msgspec

from benchmarks.sim.failures import Failure, draw, parse
from benchmarks.sim.nouns import EVENT_DELAY_S, Entry, Sample, WorldConfig
from benchmarks.sim.profile import DEFAULT, Profile, read_profile
from benchmarks.sim.report import TBT_SLO_S, TTFT_SLO_S, Summary, check_objectives, summarize
from benchmarks.sim.trace import BLOCK_TOKENS, TraceRequest, requests_of
from benchmarks.sim.world import World
from conductor.admission import AdmissionMode
from conductor.planner import PlannerConfig
from conductor.scheduler import Policy
from kvstore.node.eviction import POLICIES
from mooncake.core.errors import ConfigError

NONE = "none"
"""Admission that takes everything."""
INSTANCES_MAX = 4096
"""Of one kind: beyond it, one decision is a scan of seconds."""


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """See `mooncake simulate --help`. Policies by name, with commas, or all; tokens < 0 = the profile's."""

    trace: str = ""
    requests: int = 2000
    rate: float = 4.0
    policy: str = "kvcache"
    prefill: int = 8
    decode: int = 8
    both: int = 0
    chunk_tokens: int = 0
    profile: str
    speed: float = 1.0
    start_s: float = 0.0
    length_s: float = 0.0
    sample: float = 1.0
    spread_s: float = 0.0
    pool_tokens: int = -1
    decode_pool_tokens: int = 0
    eviction: str = "lru"
    ttft_slo_s: float
    tbt_slo_s: float
    admission: str = "none"
    decode_s: float = 0.0
    plan_roles: bool = False
    seed: int = 0
    kill: str = ""
    mtbf_s: float = 0.0
    repair_s: float = 30.0
    event_delay_s: float = EVENT_DELAY_S
    event_loss: float = 0.0


class Fate(msgspec.Struct, frozen=True, gc=False):
    """What became of one request. ttft_s, tbt_tail_s < 0: there is none; ending: why it was not served."""

    arrival_s: float
    ttft_s: float
    tbt_tail_s: float
    input_tokens: int
    hit_tokens: int
    ending: str


class Result(msgspec.Struct, frozen=True):
    """One run: what is told, and what is drawn. switches: when, who, to which role."""

    summary: Summary
    fates: list[Fate]
    samples: list[Sample]
    switches: list[tuple[float, str, str]]
    failures: list[Failure]

    @property
    def ttft_s(self) -> list[float]:
        """Of those that were served."""
        return [one.ttft_s for one in self.fates if one.ttft_s >= 0 and not one.ending]

    @property
    def tbt_tail_s(self) -> list[float]:
        """Of those that were served and have one."""
        return [one.tbt_tail_s for one in self.fates if one.tbt_tail_s >= 0 and not one.ending]


def policies_of(names: str) -> list[Policy]:
    """Return the policies by their names.

    Raises:
        ConfigError: an unknown one.
    """
    if names == "all":
        return list(Policy)
    try:
        return [Policy(name) for name in dict.fromkeys(names.split(","))]
    except ValueError:
        raise ConfigError(f"policy={names!r}: must be all, or some of {', '.join(Policy)}") from None


def failures_of(options: Options, length_s: float) -> tuple[Failure, ...]:
    """Return what breaks down within `length_s`, as written down and drawn.

    Raises:
        ConfigError: a number is out of range, or nobody is called so.
    """
    counts = (("prefill", options.prefill), ("decode", options.decode), ("both", options.both))
    names = [f"{role}-{number:03}" for role, count in counts for number in range(count)]
    found = parse(options.kill, names)
    if options.mtbf_s:
        found += draw(names, length_s, options.mtbf_s, options.repair_s, options.seed)
    return tuple(sorted(found, key=lambda failure: failure.at_s))


def _check_events(options: Options) -> None:
    if not 0 <= options.event_loss < 1:
        raise ConfigError(f"event_loss={options.event_loss}: must be a share below 1")
    if not 0 <= options.event_delay_s < inf:
        raise ConfigError(f"event_delay_s={options.event_delay_s}: must not be negative")


def config_of(options: Options, policy: Policy, length_s: float) -> WorldConfig:
    """Return the world that is wanted; `length_s`: of the trace.

    Raises:
        ConfigError: a number is out of range.
    """
    counts = {"prefill": options.prefill, "decode": options.decode, "both": options.both}
    for name, count in counts.items():
        if not 0 <= count <= INSTANCES_MAX:
            raise ConfigError(f"{name}={count}: must be 0 to {INSTANCES_MAX}")
    if not any(counts.values()):
        raise ConfigError("prefill, decode, both are 0: who is to serve?")
    if options.eviction not in POLICIES:
        raise ConfigError(f"eviction={options.eviction!r}: must be one of {', '.join(POLICIES)}")
    if options.admission != NONE and options.admission not in list(AdmissionMode):
        raise ConfigError(f"admission={options.admission!r}: must be {NONE}, {', '.join(AdmissionMode)}")
    if options.decode_s < 0:
        raise ConfigError(f"decode_s={options.decode_s}: must not be negative; 0 = learned")
    if options.chunk_tokens < 0 or options.decode_pool_tokens < 0:
        raise ConfigError("chunk_tokens and decode_pool_tokens must not be negative")
    if options.plan_roles and options.both:
        raise ConfigError("plan_roles: instances that do both have no role to change")
    check_objectives(options.ttft_slo_s, options.tbt_slo_s)
    _check_events(options)
    return WorldConfig(
        prefill=options.prefill,
        decode=options.decode,
        both=options.both,
        policy=policy,
        seed=options.seed,
        host_blocks=None if options.pool_tokens < 0 else options.pool_tokens // BLOCK_TOKENS,
        decode_host_blocks=options.decode_pool_tokens // BLOCK_TOKENS,
        eviction=options.eviction,
        chunk_tokens=options.chunk_tokens,
        mixed=bool(options.both and options.chunk_tokens),
        admission=AdmissionMode.OBJECTIVES if options.admission == NONE else AdmissionMode(options.admission),
        decode_s=options.decode_s or None,
        planner=PlannerConfig(tbt_slo_s=options.tbt_slo_s) if options.plan_roles else None,
        event_delay_s=options.event_delay_s,
        event_loss=options.event_loss,
        failures=failures_of(options, length_s),
        reject_ttft_s=None if options.admission == NONE else options.ttft_slo_s,
        reject_tbt_s=None if options.admission == NONE else options.tbt_slo_s,
    )


def run_one(
    requests: Sequence[TraceRequest],
    profile: Profile,
    config: WorldConfig,
    ttft_slo_s: float,
    tbt_slo_s: float,
    progress: Callable[[int], None] | None = None,
) -> Result:
    """Run one world to its end."""
    world = World(requests, profile, config)
    world.run(progress)
    return Result(
        summarize(world, ttft_slo_s, tbt_slo_s),
        [_fate(entry) for entry in world.entries],
        world.samples,
        world.switches,
        world.faults.happened,
    )


def _fate(entry: Entry) -> Fate:
    return Fate(
        arrival_s=entry.trace.arrival_s,
        ttft_s=entry.ttft_s,
        tbt_tail_s=-1.0 if entry.tbt is None else entry.tbt.tail_s,
        input_tokens=entry.trace.input_tokens,
        hit_tokens=entry.hit_tokens,
        ending=entry.rejected or entry.failed,
    )


def simulate(options: Options, progress: Callable[[str, int, int], None]) -> dict[str, Result]:
    """Run all policies; `progress` hears the policy, requests arrived, requests in all.

    Raises:
        ConfigError: before anything runs.
    """
    profile = read_profile(options.profile)
    chosen = policies_of(options.policy)
    requests = requests_of(
        options.trace, count=options.requests, rate=options.rate, seed=options.seed, speed=options.speed,
        start_s=options.start_s, length_s=options.length_s, sample=options.sample, spread_s=options.spread_s,
    )  # fmt: skip
    configs = {str(policy): config_of(options, policy, requests[-1].arrival_s) for policy in chosen}
    longest = max(one.input_tokens + one.output_tokens for one in requests)
    if longest >= profile.context_tokens_max:
        raise ConfigError(
            f"the trace has a context of {longest} tokens, the profile allows {profile.context_tokens_max}"
        )
    results = {}
    for name, config in configs.items():
        progress(name, 0, len(requests))

        def tell(arrived: int, name: str = name) -> None:
            progress(name, arrived, len(requests))

        results[name] = run_one(requests, profile, config, options.ttft_slo_s, options.tbt_slo_s, tell)
        progress(name, len(requests), len(requests))
    return results


def command_of(options: Options) -> str:
    """Return the command line that gives the same again."""
    usual = Options(profile=DEFAULT, ttft_slo_s=TTFT_SLO_S, tbt_slo_s=TBT_SLO_S)
    words = ["mooncake", "simulate"]
    for name in options.__struct_fields__:
        value = getattr(options, name)
        if value == getattr(usual, name) or (options.both and name in {"prefill", "decode"}):
            continue
        words.append("--" + name.replace("_", "-"))
        words += [] if value is True else [f"{value:g}" if isinstance(value, float) else str(value)]
    return shlex.join(words)


def as_json(options: Options, results: dict[str, Result]) -> bytes:
    """Return everything but the single requests."""
    content = {
        "options": msgspec.to_builtins(options),
        "runs": {name: msgspec.to_builtins(result.summary) for name, result in results.items()},
    }
    return msgspec.json.format(msgspec.json.encode(content), indent=2) + b"\n"
