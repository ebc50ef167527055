"""What requests and settings say of which blocks are kept: eviction by name, hints, pins, quotas. Pure."""

from kvstore.node.eviction import POLICIES
from kvstore.node.node import HARD_PIN_RATIO, Node
from kvstore.node.pins import Guarded
from kvstore.node.tags import PLAIN, Tags
from mooncake.core.errors import ConfigError
from mooncake.core.messages import Pin, Pinned, Reserve, SetQuota, TenantUsage

NO_QUOTA = -1
"""In SetQuota and TenantUsage (wire contract)."""


def make_policy(
    capacity_bytes: int,
    eviction: str,
    hard_pin_ratio: float = HARD_PIN_RATIO,
    *,
    evict_soft: bool = True,
    quota_needed: bool = False,
) -> Guarded:
    """Return the policy of a node.

    Args:
        capacity_bytes: of its segment.
        eviction: a name of kvstore.node.eviction.POLICIES.
        hard_pin_ratio: of the segment that hard pins may hold.
        evict_soft: see Guarded.
        quota_needed: see Guarded.

    Raises:
        ConfigError: no such policy, or not a ratio.
    """
    if eviction not in POLICIES:
        raise ConfigError(f"eviction={eviction!r}: one of {', '.join(POLICIES)}")
    if not 0 <= hard_pin_ratio <= 1:
        raise ConfigError(f"hard_pin_ratio={hard_pin_ratio}: 0 to 1")
    hard_bytes = int(capacity_bytes * hard_pin_ratio)
    return Guarded(hard_bytes, POLICIES[eviction], evict_soft=evict_soft, quota_needed=quota_needed)


def tags_of(request: Reserve) -> Tags:
    """Return the hints of a request; PLAIN itself if there are none."""
    tags = Tags(request.tenant, request.group, request.depth, request.soft_pin_s, request.hard_pin)
    return PLAIN if tags == PLAIN else tags


def pin(node: Node, now_s: float, request: Pin) -> Pinned:
    """Answer `request`; raises as Node.pin."""
    return Pinned(node.pin(now_s, request.keys, request.ttl_s))


def set_quota(node: Node, now_s: float, request: SetQuota) -> TenantUsage:
    """Answer `request`; raises as Node.set_quota."""
    quota_bytes = None if request.quota_bytes == NO_QUOTA else request.quota_bytes
    use = node.set_quota(now_s, request.tenant, quota_bytes, strict=request.strict)
    left = NO_QUOTA if use.quota_bytes is None else use.quota_bytes
    return TenantUsage(use.used_bytes, use.pinned_bytes, left)
