"""Chooses where a request runs (paper 1.2, Algorithm 1)."""

from collections.abc import Sequence
from enum import StrEnum

import msgspec

from conductor.cluster import ClusterView
from conductor.cost import CostModel
from conductor.index import PrefixIndex
from conductor.plan import Need, Plan, Rejection, RequestFacts


class Mode(StrEnum):
    """Two legs, or each instance does both."""

    DISAGGREGATED = "disaggregated"
    AGGREGATED = "aggregated"


class Policy(StrEnum):
    """How instances are chosen."""

    KVCACHE = "kvcache"
    CACHE_AWARE = "cache_aware"
    LEAST_LOAD = "least_load"
    ROUND_ROBIN = "round_robin"
    RANDOM = "random"


class SchedulerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """`None` objectives are not enforced."""

    mode: Mode = Mode.DISAGGREGATED
    policy: Policy = Policy.KVCACHE
    ttft_slo_s: float | None = None
    tbt_slo_s: float | None = None
    waiting_max: int = 1024
    seed: int = 0


class Scheduler:
    """Pure: the same events give the same plans."""

    def __init__(
        self, config: SchedulerConfig, index: PrefixIndex, cost: CostModel, cluster: ClusterView
    ) -> None:
        """The three views are shared with the shell, which feeds them."""

    def on_request(self, now_s: float, facts: RequestFacts) -> Plan | Rejection:
        """Plan a new request and charge its load."""
        raise NotImplementedError

    def replan(
        self, now_s: float, facts: RequestFacts, emitted_n: int, exclude: Sequence[str], need: Need
    ) -> Plan | Rejection:
        """Place a leg again; `exclude` is avoided unless nobody else is alive."""
        raise NotImplementedError

    def release(self, now_s: float, ticket: int) -> None:
        """Give charged load back; releasing twice is harmless."""
