"""A tenant's quota of the pool, divided among its segments. Pure.

Each store holds a tenant to a share of its own, without asking anybody. Shares sum up to the quota, so the
pool is held to it as well: each segment has what the tenant uses there, and an equal part of the rest. Asked
for again when usage has changed, the room follows the writers.
"""

from collections.abc import Mapping


def divide(quota_bytes: int, used: Mapping[str, int], reserved_bytes: int = 0) -> dict[str, int]:
    """Return the share of each segment.

    Args:
        quota_bytes: of the tenant, in the whole pool.
        used: bytes of the tenant by segment, of all that take part.
        reserved_bytes: what segments may use that cannot be asked now; they keep what they were told.

    Returns:
        Shares that sum up to at most what is not reserved; less than is used where the quota is less: then
        the tenant's next writes there evict its oldest.
    """
    if not used:
        return {}
    room_bytes = max(0, quota_bytes - reserved_bytes)
    total_bytes = sum(used.values())
    if total_bytes > room_bytes:
        return {node: size * room_bytes // total_bytes for node, size in used.items()}
    each, odd = divmod(room_bytes - total_bytes, len(used))
    return {node: used[node] + each + (at < odd) for at, node in enumerate(sorted(used))}
