"""What each tenant has on a node, and may have. Pure.

A quota is a share under pressure, not a wall: room that nobody needs is everybody's. Of tenants over
quota the one furthest over gives first, its blocks in the policy's order, until it is within. What a
tenant pins must fit into its quota, so it can always be brought back to it. A quota may also be set as a
wall (`strict`): the owner asks for `excess_bytes` before each write, and takes it from the tenant or refuses.
"""

import msgspec

from kvstore.node.eviction import EvictionPolicy
from mooncake.core.errors import CapacityError, RequestError

QUOTAS_MAX = 1_024
"""Tenants with a quota of their own on one node; each eviction looks at those that are over."""
NOT_REGISTERED = "has no quota in this pool: give it one"
"""In the text of an error, by which callers tell it from others."""


class TenantUse(msgspec.Struct, frozen=True):
    """What a tenant has; leased blocks count as well."""

    used_bytes: int
    pinned_bytes: int
    quota_bytes: int | None


class Tenant(msgspec.Struct):
    """One who has a block or a quota."""

    name: str
    used_bytes: int = 0
    pinned_bytes: int = 0
    quota_bytes: int | None = None
    strict: bool = False
    plain: EvictionPolicy | None = None
    """The plain blocks once more, if there is a quota."""

    @property
    def over_bytes(self) -> int:
        """How much it has beyond its quota."""
        return 0 if self.quota_bytes is None else max(0, self.used_bytes - self.quota_bytes)

    def check_pin(self, size_bytes: int) -> None:
        """Pass if it can pin one more block; raises CapacityError."""
        if self.quota_bytes is not None and self.pinned_bytes + size_bytes > self.quota_bytes:
            raise CapacityError(f"{self.name!r} has pinned {self.pinned_bytes} of {self.quota_bytes} bytes")


class Tenants:
    """By name. Who has neither a block nor a quota leaves no trace."""

    def __init__(self, *, quota_needed: bool) -> None:
        """Start without any. `quota_needed`: whether a tenant without a quota is nobody."""
        self._quota_needed = quota_needed
        self._tenants: dict[str, Tenant] = {}
        self._over: dict[str, Tenant] = {}

    def find(self, name: str) -> Tenant | None:
        """Return who has a block or a quota."""
        return self._tenants.get(name)

    def get(self, name: str) -> Tenant:
        """Return a tenant that is to be charged, or to have a quota, now."""
        return self._tenants.setdefault(name, Tenant(name))

    def charge(self, tenant: Tenant, size_bytes: int) -> None:
        """Note that a tenant has so much more (or less) now."""
        tenant.used_bytes += size_bytes
        if tenant.over_bytes:
            self._over[tenant.name] = tenant
        else:
            self._over.pop(tenant.name, None)
        if not tenant.used_bytes and tenant.quota_bytes is None:
            del self._tenants[tenant.name]

    def check_quota(self, name: str, quota_bytes: int | None) -> None:
        """Pass if a tenant can be given this quota.

        Raises:
            RequestError: it is negative.
            CapacityError: too many quotas.
        """
        if quota_bytes is None:
            return
        if quota_bytes < 0:
            raise RequestError(f"quota_bytes={quota_bytes} of {name!r}: must be at least 0")
        quotas = sum(each.quota_bytes is not None for each in self._tenants.values())
        known = self._tenants.get(name)
        if quotas >= QUOTAS_MAX and (known is None or known.quota_bytes is None):
            raise CapacityError(f"{quotas} tenants have quotas: no more here")

    def over(self) -> list[Tenant]:
        """Return those beyond their quota, the one furthest over first."""
        return sorted(self._over.values(), key=lambda t: (-t.over_bytes, t.name))

    def excess_bytes(self, name: str, more_bytes: int) -> int:
        """Return by how much `more_bytes` would take a tenant beyond its strict quota; 0: it has none.

        Raises:
            RequestError: every tenant needs a quota here, and this one has none.
        """
        known = self._tenants.get(name)
        if known is None or known.quota_bytes is None:
            if self._quota_needed and name:
                raise RequestError(f"tenant {name!r} {NOT_REGISTERED}")
            return 0
        return max(0, known.used_bytes + more_bytes - known.quota_bytes) if known.strict else 0

    # ------------------------------------------------------------ numbers

    def use(self, name: str) -> TenantUse:
        """Return what a tenant has."""
        known = self._tenants.get(name, Tenant(name))
        return TenantUse(known.used_bytes, known.pinned_bytes, known.quota_bytes)

    def used(self) -> dict[str, int]:
        """Return the bytes of each tenant that has a block or a quota. Safe from another thread."""
        return {name: known.used_bytes for name, known in list(self._tenants.items())}

    def shown(self) -> list[tuple[str, int, bool]]:
        """Return the bytes of each, and whether it has a quota: the operator's word. Safe as `used`."""
        known = list(self._tenants.items())
        return [(name, one.used_bytes, one.quota_bytes is not None) for name, one in known]

    def strict_use(self) -> dict[str, int]:
        """Return the bytes of each tenant with a strict quota."""
        return {name: known.used_bytes for name, known in self._tenants.items() if known.strict}
