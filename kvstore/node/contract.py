"""What a store and its clients agree on besides messages: what numbers in answers mean, and whose ids are."""

from hashlib import sha256

CHECKSUM_BYTES = 16
PRESENT = -1
"""In Reserved.offsets: already complete, or being written by somebody."""
FULL = -2
"""In Reserved.offsets: no room."""
OVER_QUOTA = -3
"""In Reserved.offsets: beyond the tenant's strict quota."""
QUOTA_USED_UP = "the tenant's quota is used up"
"""In the reason of such a refusal, by which callers tell it from others."""
ID_BITS = 40
"""Ids (of leases and tickets) of one epoch: 2**40, a million a second for twelve days."""


def id_base(epoch: str) -> int:
    """Return the first id of `epoch`; its ids are those with the same value above ID_BITS."""
    return (int.from_bytes(sha256(epoch.encode()).digest()[:4], "little") >> 10) + 1 << ID_BITS
