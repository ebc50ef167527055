"""KV pool: how full is each tier, does it hit, and does it evict what is still wanted."""

from grafana_foundation_sdk.models.dashboard import Dashboard

from mooncake.dashboards.panels import GREEN, ORANGE, RED, Part, Query, Text, bars, board, lines, row, stat_of
from mooncake.dashboards.promql import TENANT, metric, most, quantile, rate, ratio, total

_TIER = "tier"
_AGE = "mooncake_store_eviction_age_seconds"


def _tier_hit_rate(*by: str) -> str:
    hits = total(rate("mooncake_store_tier_hits_total"), *by)
    return ratio(hits, f"({hits} + {total(rate('mooncake_store_tier_misses_total'), *by)})")


def _now() -> list[Part]:
    return [
        row("Does the pool do its work?"),
        stat_of(
            "Pool hit rate",
            Text(
                "Of the prompt tokens that engines looked up in the pool, the share it had.",
                "depends on the traffic; chats and agents 50 % and more.",
                "docs/runbooks/MooncakeLowPrefixHit.md.",
            ),
            "percentunit",
            ratio(
                total(rate("mooncake_kv_hit_tokens_total")), total(rate("mooncake_kv_lookup_tokens_total"))
            ),
        ),
        stat_of(
            "Memory used",
            Text(
                "Share of the stores' memory in use.",
                "close to 100 % is right: a cache wants to be full.",
                "far below after days: it is larger than the traffic needs.",
            ),
            "percentunit",
            ratio(total(metric("mooncake_store_used_bytes")), total(metric("mooncake_store_capacity_bytes"))),
            no_value="No store",
        ),
        stat_of(
            "Age of evicted blocks, median",
            Text(
                "How long half of the evicted blocks had lived: how far back the pool remembers.",
                "longer than your users' pauses (minutes; agents: longer than their tools).",
                "docs/runbooks/MooncakeYoungEvictions.md.",
            ),
            "s",
            quantile(0.5, _AGE),
            base=RED,
            steps=((60, ORANGE), (300, GREEN)),
            no_value="No evictions",
        ),
        stat_of(
            "Evictions",
            Text(
                "Blocks per second that memory gave up to make room.",
                "0 until it is full; then as many as come in.",
                "look at their age: old ones do no harm.",
            ),
            "ops",
            total(rate("mooncake_store_evictions_total")),
            no_value="No store",
        ),
        stat_of(
            "Damaged blocks",
            Text(
                "Blocks per second whose bytes were wrong, in memory, on SSD or on the way. They are "
                "recomputed, never "
                "served.",
                "0, always.",
                "docs/runbooks/MooncakeChecksumErrors.md.",
            ),
            "ops",
            f"{total(rate('mooncake_store_checksum_failures_total'))} + "
            f"{total(rate('mooncake_kv_checksum_failures_total'))}",
            steps=((1e-9, RED),),
            no_value="No store",
        ),
        stat_of(
            "Leases",
            Text(
                "Readers' leases: blocks that cannot be evicted just now.",
                "follows the load.",
                "it only rises: a reader does not give back; restart that engine, its leases end by "
                "themselves.",
            ),
            "short",
            total(metric("mooncake_store_leases")),
            no_value="No store",
        ),
    ]


def _tiers() -> list[Part]:
    used, capacity = metric("mooncake_store_tier_used_bytes"), metric("mooncake_store_tier_capacity_bytes")
    return [
        row("Tiers: memory and SSD"),
        lines(
            "Bytes by tier",
            Text(
                "Bytes in use, and the capacity, of each tier over all stores.",
                "memory full, SSD filling.",
                "SSD stays empty: is --ssd set? Are writes given up (below)?",
            ),
            "bytes",
            Query(total(used, _TIER), "{{tier}} used"),
            Query(total(capacity, _TIER), "{{tier}} capacity"),
        ),
        lines(
            "Hit rate by tier",
            Text(
                "Blocks found, of those asked for, in memory and on SSD.",
                "memory highest; SSD catches what it lost.",
                "both low: the traffic shares little, or the pool is too small (age of evicted blocks).",
            ),
            "percentunit",
            Query(_tier_hit_rate(_TIER), "{{tier}}"),
            high=1,
            no_value="Nobody asked",
        ),
        lines(
            "Evictions by tier",
            Text(
                "Blocks per second given up to make room.",
                "what leaves memory is on SSD already.",
                "SSD evicts, too: the whole pool is full; look at the blocks' age.",
            ),
            "ops",
            Query(total(rate("mooncake_store_tier_evictions_total"), _TIER), "{{tier}}"),
            width=8,
        ),
        lines(
            "Age of evicted blocks",
            Text(
                "How long evicted blocks had lived.",
                "p5 above a minute, median above your users' pauses.",
                "docs/runbooks/MooncakeYoungEvictions.md.",
            ),
            "s",
            *(Query(quantile(q, _AGE), f"p{q * 100:g}") for q in (0.05, 0.5, 0.95)),
            width=8,
            no_value="No evictions",
        ),
        lines(
            "Promoted and demoted",
            Text(
                "Bytes per second from SSD to memory (a hit) and from memory to SSD.",
                "promotions follow hits.",
                "demotions far above promotions for days: the SSD is rarely read; a smaller one will do.",
            ),
            "binBps",
            Query(total(rate("mooncake_store_promoted_bytes_total")), "promoted"),
            Query(total(rate("mooncake_store_demoted_bytes_total")), "demoted"),
            width=8,
        ),
        lines(
            "SSD queue",
            Text(
                "Bytes that only memory has yet, waiting to be copied to SSD.",
                "falls back to 0 between bursts.",
                "it stays: the disk is too slow; what is evicted meanwhile is lost.",
            ),
            "bytes",
            Query(metric("mooncake_store_ssd_waiting_bytes"), "{{node}}"),
            no_value="No SSD tier",
        ),
        lines(
            "SSD troubles",
            Text(
                "Writes that failed, blocks that could not be copied, blocks with wrong bytes, per second.",
                "0.",
                "the store's log names the file; check the disk (dmesg, smartctl) and its free space.",
            ),
            "ops",
            Query(total(rate("mooncake_store_ssd_write_errors_total")), "write errors"),
            Query(total(rate("mooncake_store_ssd_given_up_total")), "given up"),
            Query(total(rate("mooncake_store_ssd_corrupt_total")), "wrong bytes"),
            no_value="No SSD tier",
        ),
    ]


def _blocks() -> list[Part]:
    return [
        row("Blocks: who holds them, who may not lose them"),
        bars(
            "Memory by store",
            Text(
                "Bytes in use of each store.",
                "alike.",
                "one is empty: it has just started, or nobody reaches it.",
            ),
            "bytes",
            Query(metric("mooncake_store_used_bytes"), "{{node}}"),
        ),
        lines(
            "Pinned",
            Text(
                "Bytes that are evicted last (soft) or not at all (hard).",
                "far below the capacity.",
                "hard pins fill it: whoever made them has to unpin (docs/client.md); they end with the "
                "store, too.",
            ),
            "bytes",
            Query(total(metric("mooncake_store_pinned_bytes"), "kind"), "{{kind}}"),
            width=8,
            stacked=True,
        ),
        lines(
            "Blocks by number of replicas",
            Text(
                "Distinct blocks by how many stores hold them.",
                "most 1, hot prefixes more.",
                "no data: no directory runs (mooncake directory); it counts them.",
            ),
            "short",
            Query(most(metric("mooncake_directory_replicas"), "copies"), "{{copies}}"),
            width=8,
            stacked=True,
            no_value="No directory runs",
        ),
        lines(
            "Blocks that left memory",
            Text(
                "By reason: evicted (pressure), dropped on request, found to be damaged (bad).",
                "pressure only.",
                "bad: docs/runbooks/MooncakeChecksumErrors.md.",
            ),
            "ops",
            Query(total(rate("mooncake_store_removed_blocks_total"), "reason"), "{{reason}}"),
            width=8,
        ),
        lines(
            "Saved and loaded by engines",
            Text(
                "Blocks per second between engines and pool.",
                "loads rise with the hit rate.",
                "saves but no loads: is the traffic shared? Are look-ups given up (Transfer board)?",
            ),
            "ops",
            Query(total(rate("mooncake_kv_save_blocks_total")), "saved"),
            Query(total(rate("mooncake_kv_load_blocks_total")), "loaded"),
            width=8,
        ),
        lines(
            "In writing and in quarantine",
            Text(
                "Blocks reserved and not committed, and bytes that a lost writer may still hit.",
                "writing follows the load, quarantine 0.",
                "quarantine stays: an engine died; it ends by itself.",
            ),
            "short",
            Query(total(metric("mooncake_store_writing")), "blocks in writing"),
            Query(total(metric("mooncake_store_quarantined_bytes")), "bytes in quarantine"),
            width=8,
        ),
        lines(
            "Tenants in the pool",
            Text(
                "Bytes of each tenant that has a quota.",
                "each within its quota.",
                "docs/pool.md says how quotas of the pool are set.",
            ),
            "bytes",
            Query(total(metric("mooncake_store_tenant_bytes", TENANT), "tenant"), "{{tenant}}"),
            width=12,
            stacked=True,
            no_value="No tenant stores anything",
        ),
        lines(
            "Directory",
            Text(
                "1: every node is in step; and for how many seconds one has not been.",
                "1 and 0.",
                "the store named in the directory's log is away or overloaded.",
            ),
            "short",
            Query(most(metric("mooncake_directory_exact")), "exact"),
            Query(most(metric("mooncake_directory_lag_seconds")), "lag in seconds"),
            width=12,
            no_value="No directory runs",
        ),
    ]


def build() -> Dashboard:
    """Return the board."""
    about = "The KV pool: bytes, hits, evictions and their age, replicas, pins; memory and SSD."
    return board("mooncake-kv-pool", "KV pool", about, [*_now(), *_tiers(), *_blocks()])
