"""Overview: is the service well, who suffers, how quickly is the month's budget used up."""

from grafana_foundation_sdk.models.dashboard import Dashboard

from mooncake.dashboards.objectives import AVAILABILITY, BURNS, GOODPUT
from mooncake.dashboards.panels import GREEN, ORANGE, RED, Part, Query, Text, board, lines, row, stat_of
from mooncake.dashboards.promql import TENANT, metric, most, quantile, rate, ratio, total

_TTFT = "mooncake_ttft_seconds"
_ITL = "mooncake_tbt_seconds"
_TPOT = "gen_ai_server_time_per_output_token_seconds"
_E2E = "gen_ai_server_request_duration_seconds"
_ACCEPTED = 'result!="rejected"'
_ENDED = 'outcome=~"finished|failed"'
_QUANTILES = (0.5, 0.95, 0.99)
TOKENS_PER_S = "si:tok/s"
"""Grafana's way to write a unit that it does not have."""
_LOOK = (
    "the Conductor board says why requests wait or are refused, "
    "the Prefill and Decode board which side is full"
)


def _goodput(window: str = "$__rate_interval", *by: str) -> str:
    met = total(rate("mooncake_slo_requests_total", 'result="met"', window=window), *by)
    return ratio(met, total(rate("mooncake_slo_requests_total", _ACCEPTED, window=window), *by))


def _outcome(outcome: str, of: str = "", window: str = "$__rate_interval") -> str:
    matchers = (of,) if of else ()
    part = total(rate("mooncake_requests_total", f'outcome="{outcome}"', window=window))
    return ratio(part, total(rate("mooncake_requests_total", *matchers, window=window)))


def _percentiles(name: str) -> list[Query]:
    return [Query(quantile(q, name), f"p{q * 100:g}") for q in _QUANTILES]


def _burns(error: str, budget: float) -> str:
    return f"{error} / {budget:g}"


def _first() -> list[Part]:
    return [
        row("Is the service well?"),
        stat_of(
            "Goodput",
            Text(
                "Of the requests that were accepted and ended, the share that kept the objectives of "
                "their class "
                "(TTFT and time between tokens; without objectives: that did not fail).",
                f"at least {GOODPUT:.0%}, green.",
                f"look which latency is red beside it; {_LOOK}.",
            ),
            "percentunit",
            _goodput(),
            base=RED,
            steps=((0.95, ORANGE), (GOODPUT, GREEN)),
            width=6,
            height=6,
            decimals=1,
        ),
        stat_of(
            "TTFT p95",
            Text(
                "Time to first token that 95 of 100 requests stay below, waiting included.",
                "below your TTFT objective; 2 s feels quick, 10 s does not.",
                "Conductor board: is it waiting (too few prefill instances) or prefill (hit rate fell)?",
            ),
            "s",
            quantile(0.95, _TTFT),
            steps=((2, ORANGE), (10, RED)),
            width=5,
            height=6,
        ),
        stat_of(
            "ITL p95",
            Text(
                "Inter-token latency: the gap between two tokens of a stream that 95 of 100 gaps stay below.",
                "below your TBT objective; people read at 50 to 100 ms a token.",
                "decode instances carry too large batches or are preempted: Prefill and Decode board.",
            ),
            "s",
            quantile(0.95, _ITL),
            steps=((0.1, ORANGE), (0.5, RED)),
            width=5,
            height=6,
        ),
        stat_of(
            "Errors",
            Text(
                "Of all requests, the share that was accepted and then failed.",
                f"0; the objective allows {1 - AVAILABILITY:.1%}.",
                "docs/runbooks/MooncakeHighErrorRate.md; failures by cause are on the Conductor board.",
            ),
            "percentunit",
            _outcome("failed"),
            steps=((0.001, ORANGE), (0.05, RED)),
            width=4,
            height=6,
            decimals=2,
        ),
        stat_of(
            "Rejections",
            Text(
                "Of all requests, the share refused at once with 429 or 503 and Retry-After.",
                "0 while there is room; under overload refusing early keeps the others quick.",
                "rejections by reason are on the Conductor board; add instances, or raise a tenant's quota.",
            ),
            "percentunit",
            _outcome("rejected"),
            steps=((0.01, ORANGE), (0.1, RED)),
            width=4,
            height=6,
            decimals=1,
        ),
    ]


def _second() -> list[Part]:
    return [
        stat_of(
            "Requests",
            Text(
                "Requests that ended, per second, however they ended.",
                "what you expect at this hour.",
                "nothing at all: is the balancer healthy? Then the Runtime board, targets up.",
            ),
            "reqps",
            total(rate("mooncake_requests_total")),
        ),
        stat_of(
            "Output tokens",
            Text(
                "Tokens sent to clients per second, all gateways.",
                "follows the requests.",
                "requests but no tokens: decode instances stand still, Prefill and Decode board.",
            ),
            TOKENS_PER_S,
            total(rate("mooncake_tokens_total")),
        ),
        stat_of(
            "In flight",
            Text(
                "Requests that have begun and not ended.",
                "steady; a line that only rises is a jam.",
                "compare with waiting: what waits has no engine yet.",
            ),
            "short",
            total(metric("mooncake_requests_in_flight")),
            no_value="No gateway",
        ),
        stat_of(
            "Waiting",
            Text(
                "Requests that no engine has yet.",
                "close to 0.",
                "more prefill instances, or objectives that refuse earlier (docs/overload.md).",
            ),
            "short",
            total(metric("mooncake_requests_waiting")),
            steps=((10, ORANGE), (50, RED)),
            no_value="No gateway",
        ),
        stat_of(
            "Instances alive",
            Text(
                "Prefill and decode instances that answer.",
                "all that you have started.",
                "docs/runbooks/MooncakeNoHealthyPrefill.md and MooncakeNoHealthyDecode.md.",
            ),
            "short",
            total(most(metric("mooncake_instances", 'state="alive"'), "role")),
            base=RED,
            steps=((1, GREEN),),
            no_value="No core",
        ),
        stat_of(
            "Prefix hit rate",
            Text(
                "Prompt tokens that nobody had to compute: cached by the engine or loaded from the pool.",
                "depends on the traffic: chats and agents 50 % and more, unrelated prompts 0.",
                "if it fell: KV pool board (evictions, age), Conductor board (index mode).",
            ),
            "percentunit",
            ratio(total(rate("mooncake_cached_tokens_total")), total(rate("mooncake_prompt_tokens_total"))),
        ),
    ]


def _latency() -> list[Part]:
    chart = (
        (
            "TTFT",
            _TTFT,
            "Time to first token: waiting, prefill, hand-over.",
            "p99 within a few times p50",
            "p99 far away: long prompts or a queue",
            ((2, ORANGE), (10, RED)),
        ),
        (
            "ITL",
            _ITL,
            "Gap between two tokens of a stream.",
            "flat, also when the load rises",
            "batches are too large or prefill disturbs decode",
            ((0.1, ORANGE), (0.5, RED)),
        ),
        (
            "TPOT",
            _TPOT,
            "Mean time per output token of a whole answer.",
            "close to the ITL's p50",
            "far above it: streams pause (moved, preempted)",
            ((0.1, ORANGE), (0.5, RED)),
        ),
        (
            "E2E",
            _E2E,
            "From the request to its last token; grows with the answer's length.",
            "moves with the answers' lengths only",
            "TTFT or TPOT beside it says which half",
            (),
        ),
    )
    panels: list[Part] = [row("Latency")]
    for title, name, shows, good, otherwise, steps in chart:
        text = Text(shows, f"{good}.", f"{otherwise}; {_LOOK}.")
        panels.append(lines(title, text, "s", *_percentiles(name), steps=steps, no_value="No traffic"))
    return panels


def _outcomes() -> list[Part]:
    return [
        row("Outcomes"),
        lines(
            "Requests by outcome",
            Text(
                "How requests ended: finished, refused, aborted by the client, failed.",
                "finished only, few others.",
                "failed: errors in the gateway's log name the request; rejected: see the reasons.",
            ),
            "reqps",
            Query(total(rate("mooncake_requests_total"), "outcome"), "{{outcome}}"),
            stacked=True,
        ),
        lines(
            "Goodput by class",
            Text(
                "Share of accepted requests that kept their objectives, by class of service.",
                f"at least {GOODPUT:.0%} in every class.",
                "one class only: its objective or share is too tight (docs/scheduling.md); all: capacity.",
            ),
            "percentunit",
            Query(_goodput("$__rate_interval", "slo_class"), "{{slo_class}}"),
            high=1,
            no_value="No traffic",
        ),
        lines(
            "Missed objectives",
            Text(
                "Requests per second that missed: the first token, the gap between tokens, failed, refused.",
                "0 everywhere.",
                "ttft: prefill side; tbt: decode side; failed and refused: Conductor board.",
            ),
            "reqps",
            Query(total(rate("mooncake_slo_requests_total", 'result!="met"'), "result"), "{{result}}"),
            stacked=True,
        ),
        lines(
            "Tenants: tokens",
            Text(
                "Tokens of prompts and answers per second, by tenant.",
                "each within its share.",
                "one takes all: give it a quota in the file of --tenants (docs/scheduling.md).",
            ),
            TOKENS_PER_S,
            Query(total(rate("mooncake_tenant_tokens_total", TENANT), "tenant"), "{{tenant}}"),
            stacked=True,
            no_value="No tenant has sent anything",
        ),
    ]


def _budget() -> list[Part]:
    failed = {w: _outcome("failed", _ENDED, w) for w in ("5m", "1h", "6h")}
    missed = {w: f"(1 - {_goodput(w)})" for w in ("5m", "1h", "6h")}
    steps = tuple((burn.times, RED if burn.severity == "page" else ORANGE) for burn in reversed(BURNS[:3]))
    text = "1 uses up the month's budget exactly in a month; 14.4 in two days: somebody is paged (5m and 1h)."
    return [
        row("Error budget: how many times too fast"),
        lines(
            "Burn rate of availability",
            Text(
                f"Failed requests against the {AVAILABILITY:.1%} objective. {text}",
                "below 1.",
                "docs/runbooks/MooncakeAvailabilityBurn.md.",
            ),
            "short",
            *(Query(_burns(error, 1 - AVAILABILITY), window) for window, error in failed.items()),
            steps=steps,
            no_value="No traffic",
        ),
        lines(
            "Burn rate of goodput",
            Text(
                f"Accepted requests that missed their objectives, against the {GOODPUT:.0%} objective. "
                f"{text}",
                "below 1.",
                "docs/runbooks/MooncakeGoodputBurn.md.",
            ),
            "short",
            *(Query(_burns(error, 1 - GOODPUT), window) for window, error in missed.items()),
            steps=steps,
            no_value="No traffic",
        ),
    ]


def build() -> Dashboard:
    """Return the board."""
    parts = [*_first(), *_second(), *_latency(), *_outcomes(), *_budget()]
    about = "Is the service well? Top line first: goodput, TTFT, ITL, errors, rejections."
    return board("mooncake-overview", "Overview", about, parts)
