"""Prefill and Decode pools: which side is full, which engine stands out, does the ratio fit the load."""

from grafana_foundation_sdk.models.dashboard import Dashboard

from mooncake.dashboards.panels import GREEN, ORANGE, RED, Part, Query, Text, bars, board, lines, row, stat_of
from mooncake.dashboards.promql import INSTANCE, mean, metric, most, quantile, rate, ratio, total

_EACH = ("instance_id", "role")
_NAME = "{{instance_id}} ({{role}})"
_DEFERRED = metric("mooncake_engine_requests_deferred", INSTANCE)
_WITHOUT = "No traffic, or vLLM's metrics are left out"


def _alive(role: str) -> str:
    return most(metric("mooncake_instances", f'role="{role}"', 'state="alive"'))


def _ratio() -> list[Part]:
    return [
        row("Instances, and their ratio"),
        stat_of(
            "Prefill alive",
            Text(
                "Prefill instances that answer.",
                "all that you have started.",
                "docs/runbooks/MooncakeNoHealthyPrefill.md.",
            ),
            "short",
            _alive("prefill"),
            base=RED,
            steps=((1, GREEN),),
            no_value="None",
        ),
        stat_of(
            "Decode alive",
            Text(
                "Decode instances that answer.",
                "all that you have started.",
                "docs/runbooks/MooncakeNoHealthyDecode.md.",
            ),
            "short",
            _alive("decode"),
            base=RED,
            steps=((1, GREEN),),
            no_value="None",
        ),
        stat_of(
            "P:D",
            Text(
                "Prefill instances for each decode instance.",
                "what the planner desires, beside it.",
                "start the other kind, or let roles change by themselves (--plan-roles).",
            ),
            "none",
            f"{_alive('prefill')} / ({_alive('decode')} > 0)",
            no_value="No pair",
            decimals=2,
        ),
        stat_of(
            "Desired prefill",
            Text(
                "Prefill instances that the expected load needs.",
                "not above those alive.",
                "add as many as are missing.",
            ),
            "short",
            most(metric("mooncake_planner_desired_instances", 'role="prefill"')),
            no_value="Not planned",
        ),
        stat_of(
            "Desired decode",
            Text(
                "Decode instances that the expected load needs.",
                "not above those alive.",
                "add as many as are missing.",
            ),
            "short",
            most(metric("mooncake_planner_desired_instances", 'role="decode"')),
            no_value="Not planned",
        ),
        stat_of(
            "Preemptions",
            Text(
                "Requests per second that engines put back for lack of KV memory: work done twice.",
                "0.",
                "docs/runbooks/MooncakePreemptions.md.",
            ),
            "ops",
            total(rate("mooncake_engine_preemptions_total", INSTANCE)),
            steps=((0.1, ORANGE), (1, RED)),
            no_value="No instance",
        ),
        lines(
            "Instances by role and state",
            Text(
                "Instances as the core sees them; draining ones change their role or leave.",
                "all alive.",
                "suspect: late pulses; dead: its log says why it ended.",
            ),
            "short",
            Query(most(metric("mooncake_instances"), "role", "state"), "{{role}} {{state}}"),
            stacked=True,
            width=8,
        ),
        lines(
            "Role flips",
            Text(
                "Changes of roles begun, per minute, by the new role.",
                "rare: each drains an instance.",
                "they alternate: the load changes quicker than a flip pays; add instances.",
            ),
            "short",
            Query(f"60 * {total(rate('mooncake_role_switches_total'), 'role')}", "to {{role}}"),
            width=8,
            no_value="No role has changed",
        ),
        lines(
            "Pressure",
            Text(
                "What the planner expects a pool to feel: above 1 it is too small.",
                "both below 1, and alike.",
                "one above 1: that pool; both: add instances.",
            ),
            "short",
            Query(most(metric("mooncake_planner_pressure_ratio"), "role"), "{{role}}"),
            steps=((1, RED),),
            width=8,
            no_value="Not planned",
        ),
    ]


def _queues() -> list[Part]:
    return [
        row("Queues and KV memory"),
        lines(
            "Running",
            Text(
                "Requests in each engine's batch.",
                "decode: many; prefill: one or a few.",
                "prefill grows: its queue too; decode grows: ITL does, too.",
            ),
            "short",
            Query(metric("mooncake_engine_requests_running", INSTANCE), _NAME),
            width=8,
        ),
        lines(
            "Waiting",
            Text(
                "Requests that an engine has and does not compute yet.",
                "close to 0.",
                "prefill: more prefill instances; decode: its KV memory is full.",
            ),
            "short",
            Query(metric("mooncake_engine_requests_waiting", INSTANCE), _NAME),
            steps=((10, ORANGE), (50, RED)),
            width=8,
        ),
        lines(
            "KV use",
            Text(
                "Share of each engine's KV memory that running requests hold.",
                "below 90 %.",
                "docs/runbooks/MooncakeKVSaturated.md.",
            ),
            "percentunit",
            Query(metric("mooncake_engine_kv_use_ratio", INSTANCE), _NAME),
            steps=((0.9, ORANGE), (0.95, RED)),
            width=8,
            high=1,
        ),
        lines(
            "Preemptions by instance",
            Text(
                "Requests per second put back for lack of KV memory.",
                "0.",
                "docs/runbooks/MooncakePreemptions.md.",
            ),
            "ops",
            Query(rate("mooncake_engine_preemptions_total", INSTANCE), _NAME),
            width=8,
        ),
        lines(
            "Waiting by reason",
            Text(
                "What engines let wait: for capacity, or deferred (blocks still on their way).",
                "deferred only, and briefly.",
                "capacity: KV memory or batch size is the limit.",
            ),
            "short",
            Query(
                f"{total(metric('mooncake_engine_requests_waiting', INSTANCE))} - {total(_DEFERRED)}",
                "capacity",
            ),
            Query(total(_DEFERRED), "deferred"),
            stacked=True,
            width=8,
        ),
        bars(
            "Pulse",
            Text(
                "Seconds since each engine last showed that it lives.",
                "below 1.",
                "it grows: that engine hangs; the core drops it after a few seconds.",
            ),
            "s",
            Query(metric("mooncake_engine_pulse_age_seconds", INSTANCE), _NAME),
            steps=((2, ORANGE), (5, RED)),
        ),
    ]


def _work() -> list[Part]:
    return [
        row("Work"),
        lines(
            "Prompt tokens by source",
            Text(
                "Where prompts' tokens came from: computed, the engine's own cache, the pool.",
                "as little computed as the traffic allows.",
                "the pool's part fell: KV pool board.",
            ),
            "short",
            Query(total(rate("vllm:prompt_tokens_by_source_total"), "source"), "{{source}}"),
            stacked=True,
            no_value=_WITHOUT,
        ),
        lines(
            "Steps",
            Text(
                "Engine steps per second.",
                "decode: 1 / ITL; prefill: fewer, longer.",
                "0 with requests running: the engine hangs.",
            ),
            "ops",
            Query(rate("mooncake_engine_steps_total", INSTANCE), _NAME),
        ),
        lines(
            "Queue time in engines",
            Text(
                "Time that requests waited in an engine before they were computed.",
                "milliseconds.",
                "Waiting above says which instance.",
            ),
            "s",
            *(Query(quantile(q, "vllm:request_queue_time_seconds"), f"p{q * 100:g}") for q in (0.5, 0.95)),
            width=8,
            no_value=_WITHOUT,
        ),
        lines(
            "Prefill and decode time",
            Text(
                "Mean time that a request was being prefilled, and that it was being decoded.",
                "steady for equal prompts and answers.",
                "prefill: hit rate fell; decode: larger batches.",
            ),
            "s",
            Query(mean("vllm:request_prefill_time_seconds"), "prefill"),
            Query(mean("vllm:request_decode_time_seconds"), "decode"),
            width=8,
            no_value=_WITHOUT,
        ),
        lines(
            "Continued from another engine",
            Text(
                "Requests per second that were taken over in mid-stream.",
                "0, except when an instance goes.",
                "the Conductor board says why they moved.",
            ),
            "ops",
            Query(rate("mooncake_resumed_requests_total", INSTANCE), _NAME),
            width=8,
        ),
        lines(
            "Hit rate of the engine's own cache",
            Text(
                "Prompt tokens found in the engine's own prefix cache.",
                "high for chats that return to one engine.",
                "low, and the pool's is high: nothing is wrong, loads are cheap.",
            ),
            "percentunit",
            Query(
                ratio(
                    total(rate("mooncake_engine_prefix_hit_tokens_total", INSTANCE), *_EACH),
                    total(rate("mooncake_engine_prefix_lookup_tokens_total", INSTANCE), *_EACH),
                ),
                _NAME,
            ),
            high=1,
            no_value="No traffic",
        ),
        lines(
            "Hit rate of the pool",
            Text(
                "Prompt tokens that each engine took from the pool, of those it looked up there.",
                "prefill: follows the traffic; decode: close to 1, as its prompts come that way.",
                "decode below 1: hand-overs come late or fail (Transfer board).",
            ),
            "percentunit",
            Query(
                ratio(
                    total(rate("mooncake_kv_hit_tokens_total", INSTANCE), *_EACH),
                    total(rate("mooncake_kv_lookup_tokens_total", INSTANCE), *_EACH),
                ),
                _NAME,
            ),
            high=1,
            no_value="No traffic",
        ),
    ]


def build() -> Dashboard:
    """Return the board."""
    about = "Prefill and decode instances: how many, how full, how well they use their caches."
    return board("mooncake-pools", "Prefill and Decode", about, [*_ratio(), *_queues(), *_work()])
