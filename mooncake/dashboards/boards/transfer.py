"""Transfer: how quickly bytes move, by which way, and what went wrong on it."""

from grafana_foundation_sdk.models.dashboard import Dashboard

from mooncake.dashboards.panels import ORANGE, RED, Part, Query, Text, bars, board, lines, row, stat_of
from mooncake.dashboards.promql import INSTANCE, metric, quantile, rate, ratio, total

_BYTES, _SECONDS = "mooncake_transfer_bytes_total", "mooncake_transfer_seconds_total"
_COPY_BYTES, _COPY_SECONDS = "mooncake_kv_copy_bytes_total", "mooncake_kv_copy_seconds_total"
_ALONE = "No transfers between hosts"


def _now() -> list[Part]:
    return [
        row("How quickly, and how well"),
        stat_of(
            "Between hosts",
            Text(
                "Bytes per second that stores move to and from each other.",
                "below what the links can do.",
                "near the links' limit: which link, below; place prefill and decode closer.",
            ),
            "binBps",
            total(rate(_BYTES)),
            no_value=_ALONE,
        ),
        stat_of(
            "Engine and pool",
            Text(
                "Bytes per second between engines and their host's store, through shared memory.",
                "follows the load.",
                "0 with traffic: the engines' connector is off; see their logs.",
            ),
            "binBps",
            total(rate(_COPY_BYTES, INSTANCE)),
            no_value="No instance",
        ),
        stat_of(
            "p99 of a part",
            Text(
                "Time of one part of a transfer between hosts, that 99 of 100 stay below.",
                "tens of milliseconds on tcp, a few on rdma.",
                "which transport, below; then that link's errors.",
            ),
            "s",
            quantile(0.99, "mooncake_transfer_part_seconds"),
            steps=((0.25, ORANGE), (1, RED)),
            no_value=_ALONE,
        ),
        stat_of(
            "Retries",
            Text("Parts per second tried again.", "0.", "the chart of failures names link and reason."),
            "ops",
            total(rate("mooncake_transfer_retries_total")),
            steps=((0.1, ORANGE), (10, RED)),
            no_value="No retries",
        ),
        stat_of(
            "Fail-overs",
            Text(
                "Parts per second given to another transport, as from rdma to tcp.",
                "0.",
                "docs/runbooks/MooncakeTransferFailover.md.",
            ),
            "ops",
            total(rate("mooncake_transfer_failovers_total")),
            steps=((1e-9, RED),),
            no_value="No fail-overs",
        ),
        stat_of(
            "Checksum errors",
            Text(
                "Blocks per second that arrived damaged: loaded by engines, or copied from another store."
                " They are "
                "recomputed, never served.",
                "0, always.",
                "docs/runbooks/MooncakeChecksumErrors.md.",
            ),
            "ops",
            total(rate("mooncake_kv_checksum_failures_total", INSTANCE)),
            steps=((1e-9, RED),),
            no_value="No instance",
        ),
    ]


def _between_hosts() -> list[Part]:
    link = ("transport", "link", "op")
    name = "{{transport}} {{link}} {{op}}"
    return [
        row("Between hosts"),
        lines(
            "Bytes per second by link",
            Text(
                "What moves over each link (peer), by transport.",
                "the quickest transport that the hosts have.",
                "tcp where rdma should be: mooncake doctor on both hosts.",
            ),
            "binBps",
            Query(total(rate(_BYTES), *link), name),
            stacked=True,
            no_value=_ALONE,
        ),
        lines(
            "Throughput while moving",
            Text(
                "Bytes by the time spent moving them: what a single stream gets.",
                "near the link's own speed.",
                "far below: small blocks, or a busy CPU on tcp.",
            ),
            "binBps",
            Query(ratio(total(rate(_BYTES), *link), total(rate(_SECONDS), *link)), name),
            no_value=_ALONE,
        ),
        lines(
            "Time of a part",
            Text(
                "One part of a transfer, by transport: p50 and p99.",
                "p99 within ten times p50.",
                "p99 far off: congestion, or a peer that pauses.",
            ),
            "s",
            Query(quantile(0.5, "mooncake_transfer_part_seconds", by=("transport",)), "{{transport}} p50"),
            Query(quantile(0.99, "mooncake_transfer_part_seconds", by=("transport",)), "{{transport}} p99"),
            no_value=_ALONE,
        ),
        lines(
            "Path chosen",
            Text(
                "Transports chosen per second, and why.",
                "one transport, for being the best.",
                "last resort: all better paths are in quarantine.",
            ),
            "ops",
            Query(
                total(rate("mooncake_transfer_choices_total"), "transport", "reason"),
                "{{transport}}: {{reason}}",
            ),
            no_value=_ALONE,
        ),
        lines(
            "Under way",
            Text(
                "Bytes in flight by link.",
                "rises and falls with the load.",
                "it stays: a peer hangs; see its log.",
            ),
            "bytes",
            Query(
                total(metric("mooncake_transfer_inflight_bytes"), "transport", "link"),
                "{{transport}} {{link}}",
            ),
            width=8,
            no_value=_ALONE,
        ),
        lines(
            "Copies between stores",
            Text(
                "Blocks per second copied from other stores and verified, and those handed over ahead of "
                "decode.",
                "follows prompts whose prefill and decode run on different hosts.",
                "handed over but not copied: the receiving store's log.",
            ),
            "ops",
            Query(total(rate("mooncake_store_pull_blocks_total"), "node"), "{{node}} copied"),
            Query(total(rate("mooncake_store_pull_handed_over_total"), "node"), "{{node}} handed over"),
            width=8,
            no_value="One store only",
        ),
        bars(
            "Copies under way",
            Text(
                "Copies that each store is making now.",
                "below its limit; refused ones show beside it.",
                "at the limit: links are too slow for the traffic.",
            ),
            "short",
            Query(metric("mooncake_store_pull_running"), "{{node}}"),
            no_value="One store only",
        ),
    ]


def _engines() -> list[Part]:
    by = ("instance_id", "direction")
    name = "{{instance_id}} {{direction}}"
    return [
        row("Between engines and their store"),
        lines(
            "Bytes per second by instance",
            Text(
                "What each engine loads from and saves to its host's pool.",
                "prefill saves, decode loads.",
                "decode saves much: it recomputes what should have been handed over.",
            ),
            "binBps",
            Query(total(rate(_COPY_BYTES, INSTANCE), *by), name),
            stacked=True,
            width=8,
        ),
        lines(
            "Throughput while copying",
            Text(
                "Bytes by the time spent copying them.",
                "a good part of the machine's memcpy: GB/s.",
                "low: pages not on the engine's NUMA node, or no cores of its own.",
            ),
            "binBps",
            Query(
                ratio(total(rate(_COPY_BYTES, INSTANCE), *by), total(rate(_COPY_SECONDS, INSTANCE), *by)),
                name,
            ),
            width=8,
            no_value="Nothing copied",
        ),
        lines(
            "Waiting for other stores",
            Text(
                "Seconds per second that look-ups waited for blocks of other stores, by instance.",
                "far below 1.",
                "near 1: fetching is slower than computing; the core learns it and fetches less.",
            ),
            "short",
            Query(rate("mooncake_kv_fetch_seconds_total", INSTANCE), "{{instance_id}}"),
            width=8,
        ),
    ]


def _troubles() -> list[Part]:
    return [
        row("Troubles"),
        lines(
            "Failures by reason",
            Text(
                "Failed parts per second, by transport, link and reason.",
                "none.",
                "one link: its cable, NIC or host; all links of a host: that host.",
            ),
            "ops",
            Query(
                total(rate("mooncake_transfer_failures_total"), "transport", "link", "reason"),
                "{{transport}} {{link}}: {{reason}}",
            ),
            no_value="No failures",
        ),
        lines(
            "Path state",
            Text(
                "0 usable, 1 on trial, 2 in quarantine; only paths that ever failed.",
                "no data, or 0.",
                "2: it is tried again by itself; stays at 2: the failures beside it say why.",
            ),
            "short",
            Query(metric("mooncake_transfer_path_state"), "{{transport}} {{link}}"),
            steps=((1, ORANGE), (2, RED)),
            no_value="No path has failed",
        ),
        lines(
            "Loads that failed",
            Text(
                "Per second: requests that recomputed as a load failed, look-ups given up, pool calls "
                "that failed, "
                "blocks lost as a step outlasted its reservation.",
                "0.",
                "look-ups given up: the store has no CPU; pool errors: the engine's log.",
            ),
            "ops",
            Query(total(rate("mooncake_kv_failed_loads_total", INSTANCE)), "failed loads"),
            Query(total(rate("mooncake_kv_lookup_timeouts_total", INSTANCE)), "look-ups given up"),
            Query(total(rate("mooncake_kv_pool_errors_total", INSTANCE)), "pool errors"),
            Query(total(rate("mooncake_kv_late_saves_total", INSTANCE)), "late saves"),
        ),
        lines(
            "Copies that failed",
            Text(
                "Per second: copies cut short as the other store was away or sent wrong bytes, refused, "
                "or missing.",
                "0, but for missing ones.",
                "failures: that store; refused: raise its limit or slow down.",
            ),
            "ops",
            Query(total(rate("mooncake_store_pull_failures_total")), "other store away"),
            Query(total(rate("mooncake_store_pull_bad_total")), "wrong bytes"),
            Query(total(rate("mooncake_store_pull_refused_total")), "refused"),
            Query(total(rate("mooncake_store_pull_missing_total")), "missing"),
            no_value="One store only",
        ),
        lines(
            "Pairs of NICs",
            Text(
                "RDMA: bytes per second between each pair of NICs.",
                "spread over all NICs of a host.",
                "one NIC idle: its port may be down (transfer_engine_topology_dump on that host).",
            ),
            "binBps",
            Query(total(rate("mooncake_transfer_nic_bytes_total"), "link"), "{{link}}"),
            no_value="No RDMA",
        ),
        lines(
            "Events of pairs of NICs",
            Text(
                "RDMA: connections, retries, evictions and quarantines per second.",
                "connections at the start only.",
                "retries: a lossy fabric (PFC, ECN); quarantine: that port.",
            ),
            "ops",
            Query(total(rate("mooncake_transfer_nic_events_total"), "link", "event"), "{{link}} {{event}}"),
            no_value="No RDMA",
        ),
    ]


def build() -> Dashboard:
    """Return the board."""
    about = "The data plane: bytes per second by link and path, how long parts take, retries, damaged blocks."
    return board(
        "mooncake-transfer", "Transfer", about, [*_now(), *_between_hosts(), *_engines(), *_troubles()]
    )
