"""Conductor: does it decide quickly, does it predict well, whom does it refuse and why."""

from grafana_foundation_sdk.models.dashboard import Dashboard

from mooncake.dashboards.panels import GREEN, ORANGE, RED, Part, Query, Text, bars, board, lines, row, stat_of
from mooncake.dashboards.promql import INSTANCE, TENANT, metric, most, quantile, rate, ratio, total


def _now() -> list[Part]:
    return [
        row("Who decides, and how well informed"),
        stat_of(
            "Index",
            Text(
                "1: the prefix index is in step with every store and engine (EXACT); 0: with some or "
                "none, so "
                "decisions look past blocks that are there.",
                "1.",
                "docs/runbooks/MooncakeIndexNotExact.md.",
            ),
            "short",
            most(metric("mooncake_index_mode", 'mode="exact"')),
            base=RED,
            steps=((1, GREEN),),
            no_value="No core",
        ),
        stat_of(
            "Decision p99",
            Text(
                "Time to compute one plan, that 99 of 100 stay below.",
                "a few milliseconds.",
                "the index or the number of instances grew, or the core has no CPU: Runtime board.",
            ),
            "s",
            quantile(0.99, "mooncake_decision_seconds"),
            steps=((0.02, ORANGE), (0.1, RED)),
        ),
        stat_of(
            "Deciding without core",
            Text(
                "1: some gateway decides by itself, by its own load, as no core leads or answers.",
                "0.",
                "docs/runbooks/MooncakeNoCoreLeads.md.",
            ),
            "short",
            most(metric("mooncake_fallback_active", 'kind="core_away"')),
            steps=((1, RED),),
            no_value="Never happened",
        ),
        stat_of(
            "Predictions of prefill are off by",
            Text(
                "Moving mean of |predicted - measured| / measured of prefill times.",
                "below 0.5.",
                "the profile of the machine is wrong, or something else uses its cores; it learns within "
                "minutes.",
            ),
            "percentunit",
            most(metric("mooncake_prediction_error_ratio", 'kind="prefill"')),
            steps=((0.5, ORANGE), (1, RED)),
            no_value="Nothing measured yet",
        ),
        stat_of(
            "Index size",
            Text(
                "Blocks that the prefix index knows.",
                "below its limit: nothing is dropped beside it.",
                "it drops the oldest when it is full: fewer, larger stores per core.",
            ),
            "short",
            most(metric("mooncake_index_blocks")),
            no_value="No core",
        ),
        stat_of(
            "Fall-backs active",
            Text(
                "Kinds of poorer decisions that are on: no prefill or decode instance alive, index stale "
                "or empty, "
                "core away.",
                "0.",
                "the chart of fall-backs names the kind; its runbook has that name.",
            ),
            "short",
            total(most(metric("mooncake_fallback_active"), "kind")),
            steps=((1, ORANGE),),
            no_value="Never happened",
        ),
    ]


def _decisions() -> list[Part]:
    return [
        row("Decisions"),
        lines(
            "Time to decide",
            Text(
                "Computing one plan.",
                "p99 of a few milliseconds, flat.",
                "it grows with instances and prompt length; is the core's event loop late (Runtime board)?",
            ),
            "s",
            *(Query(quantile(q, "mooncake_decision_seconds"), f"p{q * 100:g}") for q in (0.5, 0.95, 0.99)),
            no_value="No traffic",
        ),
        lines(
            "Decisions by kind",
            Text(
                "How plans came about: by the configured policy, or by a fall-back (no_prefill_alive, ...).",
                "the configured policy, inlined and migrated now and then.",
                "no_prefill_alive or no_decode_alive: that pool is empty.",
            ),
            "ops",
            Query(total(rate("mooncake_decisions_total"), "kind"), "{{kind}}"),
            stacked=True,
        ),
        lines(
            "Wait before a plan, p95",
            Text(
                "Time in the gateways' queue until a plan was made, by class of service.",
                "milliseconds; batch may wait.",
                "too little capacity for that class, or --hold-s too small.",
            ),
            "s",
            Query(quantile(0.95, "mooncake_wait_seconds", by=("slo_class",)), "{{slo_class}}"),
            no_value="No traffic",
        ),
        lines(
            "Waiting",
            Text(
                "Requests that no engine has yet, by class of service.",
                "close to 0; batch may wait.",
                "premium or interactive: MooncakeLongQueue; only batch: it gets what the others leave idle.",
            ),
            "short",
            Query(total(metric("mooncake_requests_waiting"), "slo_class"), "{{slo_class}}"),
            stacked=True,
        ),
        lines(
            "Fall-backs",
            Text(
                "Requests planned by a poorer policy than configured, by what was missing.",
                "0.",
                "core_away: MooncakeNoCoreLeads; index_*: MooncakeIndexNotExact; no_*_alive: that pool; "
                "keys_unknown: see the core's log for the reason.",
            ),
            "ops",
            Query(total(rate("mooncake_fallbacks_total"), "kind"), "{{kind}}"),
            stacked=True,
        ),
    ]


def _predictions() -> list[Part]:
    hits, lookups = "mooncake_prefix_hit_blocks_total", "mooncake_prefix_lookup_blocks_total"
    real = "mooncake_prefix_real_hit_blocks_total"
    return [
        row("Predicted against real"),
        lines(
            "TTFT: predicted and real",
            Text(
                "Time to first token as planned and as measured.",
                "the lines lie together.",
                "real above predicted: something queues that the core does not know; admission refuses "
                "too little.",
            ),
            "s",
            Query(quantile(0.5, "mooncake_predicted_ttft_seconds"), "predicted p50"),
            Query(quantile(0.5, "mooncake_ttft_seconds"), "real p50"),
            Query(quantile(0.95, "mooncake_predicted_ttft_seconds"), "predicted p95"),
            Query(quantile(0.95, "mooncake_ttft_seconds"), "real p95"),
            no_value="No traffic",
        ),
        lines(
            "TTFT: real minus predicted",
            Text(
                "Error of the prediction: above 0 it came later than planned.",
                "around 0, narrow.",
                "wide: prompts of very different kinds; shifted: the cost model lags behind a change.",
            ),
            "s",
            *(
                Query(quantile(q, "mooncake_ttft_prediction_error_seconds"), f"p{q * 100:g}")
                for q in (0.05, 0.5, 0.95)
            ),
            low=None,
            no_value="No traffic",
        ),
        lines(
            "Hit rate: predicted and real",
            Text(
                "Share of prompts' blocks expected in the pool or cached, and what engines say they found.",
                "the lines lie together.",
                "real below predicted: blocks are evicted between plan and load (KV pool board), or loads"
                " fail.",
            ),
            "percentunit",
            Query(ratio(total(rate(hits)), total(rate(lookups))), "predicted"),
            Query(ratio(total(rate(real)), total(rate(lookups))), "real"),
            high=1,
            no_value="No traffic",
        ),
        lines(
            "Prediction errors",
            Text(
                "Moving mean of |predicted - measured| / measured, of each thing that is predicted.",
                "below 0.5.",
                "only what was measured is shown; it learns within minutes after a change.",
            ),
            "percentunit",
            Query(most(metric("mooncake_prediction_error_ratio"), "kind"), "{{kind}}"),
            no_value="Nothing measured yet",
        ),
    ]


def _refused() -> list[Part]:
    return [
        row("Refused, failed, moved"),
        lines(
            "Rejections by reason",
            Text(
                "Requests turned away at once, by reason.",
                "none while there is room.",
                "ttft/tbt: capacity or objectives; quota: that tenant; no instance alive: at once.",
            ),
            "reqps",
            Query(total(rate("mooncake_rejections_total"), "reason"), "{{reason}}"),
            stacked=True,
            no_value="No rejections",
        ),
        lines(
            "Rejections by tenant",
            Text(
                "Requests turned away, by tenant.",
                "none, or the one over its quota.",
                "raise its quota in the file of --tenants, or tell the tenant.",
            ),
            "reqps",
            Query(total(rate("mooncake_tenant_rejections_total", TENANT), "tenant"), "{{tenant}}"),
            stacked=True,
            no_value="No rejections",
        ),
        lines(
            "Failures by cause",
            Text(
                "Requests that were accepted and failed.", "none.", "docs/runbooks/MooncakeHighErrorRate.md."
            ),
            "reqps",
            Query(total(rate("mooncake_failures_total"), "reason"), "{{reason}}"),
            stacked=True,
        ),
        lines(
            "Moved and retried",
            Text(
                "Streams moved to another engine, and legs placed again before the first token.",
                "0, except when an instance restarts.",
                "an engine dies again and again: its log.",
            ),
            "ops",
            Query(total(rate("mooncake_migrations_total"), "reason"), "moved: {{reason}}"),
            Query(total(rate("mooncake_retries_total")), "retried"),
        ),
        lines(
            "Hand-over, prefill to decode",
            Text(
                "From the end of leg 1 to the first output of leg 2: the KV blocks' way.",
                "a small part of the TTFT.",
                "Transfer board: which link is slow.",
            ),
            "s",
            *(Query(quantile(q, "mooncake_handover_seconds"), f"p{q * 100:g}") for q in (0.5, 0.95, 0.99)),
            no_value="No traffic",
        ),
        lines(
            "Answers that came too late",
            Text(
                "Outputs of legs that were over, and answers of a core that leads no more: both are dropped.",
                "0 or nearly.",
                "many: links are slow, or two cores believed to lead (docs/ha.md).",
            ),
            "ops",
            Query(total(rate("mooncake_stale_outputs_total")), "late outputs"),
            Query(total(rate("mooncake_core_refused_total")), "a former core's answers"),
        ),
    ]


def _index_and_heat() -> list[Part]:
    load = ("instance_id", "role")
    return [
        row("Index, heat, plans"),
        lines(
            "Index mode",
            Text(
                "1 for the mode that the prefix index is in.",
                "exact.",
                "docs/runbooks/MooncakeIndexNotExact.md.",
            ),
            "short",
            Query(most(metric("mooncake_index_mode"), "mode"), "{{mode}}"),
            width=8,
            high=1,
        ),
        lines(
            "Index content",
            Text(
                "Blocks in the index, and those it dropped because it was full.",
                "nothing is dropped.",
                "dropped: the oldest blocks are forgotten and recomputed; give the core more room.",
            ),
            "short",
            Query(most(metric("mooncake_index_blocks")), "blocks"),
            Query(total(rate("mooncake_index_dropped_total")), "dropped per second"),
            width=8,
        ),
        lines(
            "Index sources",
            Text(
                "Stores and engines whose blocks the index follows.",
                "all of them.",
                "one is missing: its store is away, or restarts; see its log.",
            ),
            "short",
            Query(most(metric("mooncake_index_holders")), "followed"),
            width=8,
        ),
        bars(
            "Heat: booked prefill work",
            Text(
                "Seconds of prefill that each instance has been given and not finished.",
                "even, or following prefix hits.",
                "one stands out: a hot prefix has one home only.",
            ),
            "s",
            Query(most(metric("mooncake_instance_queue_seconds", INSTANCE), *load), "{{instance_id}}"),
            steps=((5, ORANGE), (30, RED)),
        ),
        bars(
            "Heat: booked KV",
            Text(
                "Tokens of context that each instance has been given.",
                "even over the decode instances.",
                "one is full while others are not: is it the only one that the hand-over reaches?",
            ),
            "short",
            Query(most(metric("mooncake_instance_kv_tokens", INSTANCE), *load), "{{instance_id}}"),
        ),
        lines(
            "Hot prefixes",
            Text(
                "Prefixes wished for on many nodes, and copies wished for of all of them.",
                "few, steady.",
                "wishes fail: no directory leads (docs/pool.md).",
            ),
            "short",
            Query(most(metric("mooncake_hot_prefixes")), "prefixes"),
            Query(most(metric("mooncake_hot_copies_wanted")), "copies"),
            width=8,
        ),
        lines(
            "Contexts kept for agents",
            Text(
                "Contexts of agents kept for their next turn (docs/agents.md).",
                "as many as agents run.",
                "0 with agents running: do they send x-program-id?",
            ),
            "short",
            Query(most(metric("mooncake_kept_contexts")), "contexts"),
            Query(most(metric("mooncake_kept_blocks")), "blocks"),
        ),
        lines(
            "Planner's forecast",
            Text(
                "Arrivals per second that the planner expects, beside those that came.",
                "the lines lie together.",
                "it lags behind by its window when the load jumps.",
            ),
            "reqps",
            Query(most(metric("mooncake_planner_forecast_requests_per_second")), "expected"),
            Query(total(rate("mooncake_requests_total")), "came"),
        ),
    ]


def build() -> Dashboard:
    """Return the board."""
    parts = [*_now(), *_decisions(), *_predictions(), *_refused(), *_index_and_heat()]
    about = "The decision core: how quickly it decides, what it predicts, whom it refuses, what it knows."
    return board("mooncake-conductor", "Conductor", about, parts)
