"""Runtime: are all processes there, have they memory and CPU, is the metadata store well."""

from grafana_foundation_sdk.models.dashboard import Dashboard

from mooncake.dashboards.panels import GREEN, ORANGE, RED, Part, Query, Text, bars, board, lines, row, stat_of
from mooncake.dashboards.promql import PROCESS, metric, most, quantile, rate, total

_LAG = "mooncake_process_event_loop_lag_seconds"
_NAME = "{{process}} {{kind}}"


def _now() -> list[Part]:
    up = metric("up", 'process!=""')
    return [
        row("Are all there?"),
        stat_of(
            "Targets up",
            Text(
                "Processes that Prometheus can scrape.",
                "all of them.",
                "docs/runbooks/MooncakeTargetDown.md.",
            ),
            "short",
            total(up),
            base=RED,
            steps=((1, GREEN),),
            no_value="Nothing is scraped",
        ),
        stat_of(
            "Targets down",
            Text(
                "Processes that Prometheus knows and cannot scrape.",
                "0.",
                "docs/runbooks/MooncakeTargetDown.md.",
            ),
            "short",
            f"count({up}) - {total(up)}",
            steps=((1, RED),),
            no_value="Nothing is scraped",
        ),
        stat_of(
            "Event loop p99",
            Text(
                "How late an event loop turned, at worst of all processes, 99 of 100 times.",
                "below 50 ms.",
                "docs/runbooks/MooncakeEventLoopLag.md.",
            ),
            "s",
            f"max({quantile(0.99, _LAG, by=('process',))})",
            steps=((0.05, ORANGE), (0.5, RED)),
            no_value="No process",
        ),
        stat_of(
            "Metadata errors",
            Text(
                "Requests to etcd (or to our own metadata store) that failed, per second.",
                "0.",
                "docs/runbooks/MooncakeMetadataErrors.md.",
            ),
            "ops",
            total(rate("mooncake_metadata_requests_total", 'result="error"')),
            steps=((0.1, ORANGE), (1, RED)),
            no_value="No process",
        ),
        stat_of(
            "Oldest lease",
            Text(
                "Seconds since the registration of some process was last confirmed.",
                "a few seconds.",
                "docs/runbooks/MooncakeLeaseAge.md.",
            ),
            "s",
            most(metric("mooncake_metadata_lease_age_seconds")),
            steps=((5, ORANGE), (15, RED)),
            no_value="No registration",
        ),
        stat_of(
            "Memory of all",
            Text(
                "Memory in RAM of all processes; shared pages count in each.",
                "steady.",
                "which process grows: below.",
            ),
            "bytes",
            total(metric("mooncake_process_resident_bytes")),
            no_value="No process",
        ),
    ]


def _processes() -> list[Part]:
    return [
        row("Processes"),
        lines(
            "Event-loop lag, p99",
            Text(
                "How late each process's loop turned.",
                "below 50 ms.",
                "docs/runbooks/MooncakeEventLoopLag.md.",
            ),
            "s",
            Query(quantile(0.99, _LAG, PROCESS, by=("process", "kind")), _NAME),
            steps=((0.05, ORANGE), (0.5, RED)),
        ),
        lines(
            "CPU",
            Text(
                "Cores used.",
                "gateways and cores below 1 each: one loop cannot use more.",
                "a gateway at 1: start more of them; engines use all they are given.",
            ),
            "short",
            Query(rate("mooncake_process_cpu_seconds_total", PROCESS), _NAME),
        ),
        lines(
            "Memory",
            Text(
                "Memory in RAM, shared pages (the pool) included.",
                "flat after the first minutes.",
                "it only rises: a leak; please report it with the process's log.",
            ),
            "bytes",
            Query(metric("mooncake_process_resident_bytes", PROCESS), _NAME),
            width=8,
        ),
        lines(
            "Open files",
            Text(
                "Open descriptors, sockets included.",
                "follows the number of connections.",
                "near the limit (ulimit -n): raise it; it only rises: a leak.",
            ),
            "short",
            Query(metric("mooncake_process_open_fds", PROCESS), _NAME),
            width=8,
        ),
        lines(
            "Threads",
            Text("Threads of each process.", "flat.", "it only rises: a leak; please report it."),
            "short",
            Query(metric("mooncake_process_threads", PROCESS), _NAME),
            width=8,
        ),
    ]


def _metadata() -> list[Part]:
    requests = "mooncake_metadata_requests_total"
    return [
        row("Metadata store and scrapes"),
        lines(
            "Metadata requests",
            Text(
                "Requests to the metadata store per second, by operation.",
                "a few; renewals of leases mostly.",
                "many: processes restart all the time.",
            ),
            "ops",
            Query(total(rate(requests, PROCESS), "op"), "{{op}}"),
            width=8,
            stacked=True,
        ),
        lines(
            "Metadata errors by process",
            Text(
                "Requests to the metadata store that failed, per second and process.",
                "0.",
                "docs/runbooks/MooncakeMetadataErrors.md.",
            ),
            "ops",
            Query(total(rate(requests, 'result="error"', PROCESS), "process", "op"), "{{process}} {{op}}"),
            width=8,
        ),
        lines(
            "Metadata latency, p99",
            Text(
                "Time of a request to the metadata store.",
                "below 50 ms.",
                "etcd: its disk (fsync) is slow; ours: the core's loop is late.",
            ),
            "s",
            Query(quantile(0.99, "mooncake_metadata_request_seconds", PROCESS, by=("op",)), "{{op}}"),
            width=8,
            no_value="No requests",
        ),
        bars(
            "Lease age",
            Text(
                "Seconds since each process's registration was last confirmed.",
                "a few.",
                "docs/runbooks/MooncakeLeaseAge.md.",
            ),
            "s",
            Query(metric("mooncake_metadata_lease_age_seconds", PROCESS), "{{process}}"),
            steps=((5, ORANGE), (15, RED)),
        ),
        lines(
            "Connected to metadata",
            Text(
                "1 while the process reaches its metadata store.",
                "1 everywhere.",
                "docs/runbooks/MooncakeMetadataErrors.md; serving goes on meanwhile.",
            ),
            "short",
            Query(metric("mooncake_metadata_connected", PROCESS), "{{process}}"),
            width=8,
            high=1,
        ),
        lines(
            "Time of a scrape",
            Text(
                "Seconds that Prometheus waited for each process's metrics.",
                "below 1.",
                "near the scrape time-out: that process has no CPU.",
            ),
            "s",
            Query(metric("scrape_duration_seconds", PROCESS), "{{process}}"),
            width=8,
        ),
    ]


def build() -> Dashboard:
    """Return the board."""
    about = "Processes and what they live on: CPU, memory, event loops, leases, the metadata store."
    return board("mooncake-runtime", "Runtime", about, [*_now(), *_processes(), *_metadata()])
