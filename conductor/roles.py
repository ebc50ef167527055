"""Changes of roles: who is on the way from prefill to decode or back, and what each is told next. Pure.

    serves --begin--> draining: gets nothing new --nothing left, or drain_s passed--> serves in its new role

Engines differ in nothing but what they are given, so a change moves no process, no memory and no block: what
an instance still computes when it takes its new role ends where it began, beside the new work.
An order to drain is a lease: an instance that hears nothing more for `hold_s` takes its old role again, so
that whoever ordered it may die. Instances and roles are those of InstanceRecord.
"""

from collections.abc import Callable, Mapping

import msgspec

from conductor.planner import Member
from mooncake.core.errors import RequestError
from mooncake.core.messages import DRAINING

DRAIN_S = 30.0
"""An answer that is longer goes on beside the other role's work; waiting for it would idle an instance."""
HOLD_SPARE_S = 15.0
"""Of an order's time beyond the drain: ours may come late."""
ROLES = ("prefill", "decode")


class Order(msgspec.Struct, frozen=True):
    """Take this role; after hold_s take the one before again. hold_s 0 = for good."""

    instance_id: str
    role: str
    hold_s: float = 0.0


class _Way(msgspec.Struct, frozen=True):
    role: str
    until_s: float


class Changes:
    """Carries changes out, one order after the other. Whoever calls it delivers the orders."""

    def __init__(self, drain_s: float = DRAIN_S) -> None:
        """`drain_s`: how long an instance may take to finish what it has."""
        self._drain_s = drain_s
        self._ways: dict[str, _Way] = {}

    def __len__(self) -> int:
        return len(self._ways)

    def __contains__(self, instance_id: object) -> bool:
        return instance_id in self._ways

    def begin(self, now_s: float, instance_id: str, role: str) -> Order:
        """Return the first order of a change to `role`; one under way is turned round."""
        self._ways[instance_id] = _Way(role, now_s + self._drain_s)
        return Order(instance_id, DRAINING, self._drain_s + HOLD_SPARE_S)

    def step(self, now_s: float, is_busy: Callable[[str], bool | None]) -> list[Order]:
        """Return the orders of those that are done with the old role.

        Args:
            now_s: the time.
            is_busy: whether an instance has work; None = it is gone, and so is its change.
        """
        orders = []
        for instance_id, way in list(self._ways.items()):
            busy = is_busy(instance_id)
            if busy and now_s < way.until_s:
                continue
            del self._ways[instance_id]
            if busy is not None:
                orders.append(Order(instance_id, way.role))
        return orders


def check_change(members: Mapping[str, Member], instance_id: str, role: str) -> None:
    """Raises RequestError: somebody's wish cannot be followed; says why."""
    member = members.get(instance_id)
    if role not in ROLES:
        raise RequestError(f"role {role!r}: must be {' or '.join(ROLES)}")
    if member is None:
        raise RequestError(f"no instance {instance_id!r} is alive; there are {', '.join(members) or 'none'}")
    if member.role not in ROLES:
        raise RequestError(
            f"{instance_id} is {member.role}: only {' and '.join(ROLES)} instances change roles"
        )
    if member.role == role:
        raise RequestError(f"{instance_id} is {role} already")
    if sum(one.role == member.role for one in members.values()) == 1:
        raise RequestError(f"{instance_id} is the last {member.role} instance")
