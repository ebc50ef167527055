"""The boards, one file each. Needs grafana-foundation-sdk."""

from collections.abc import Callable

from grafana_foundation_sdk.models.dashboard import Dashboard

from mooncake.dashboards.boards import conductor, kv_pool, overview, pools, runtime, transfer

BOARDS: tuple[Callable[[], Dashboard], ...] = (
    overview.build,
    conductor.build,
    pools.build,
    kv_pool.build,
    transfer.build,
    runtime.build,
)
