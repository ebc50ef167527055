"""The role that an instance has now: its own, one it was ordered to take, or one for a while. Pure."""

import msgspec

from mooncake.core.messages import DRAINING, RoleOrder


class _Turn(msgspec.Struct, frozen=True):
    role: str
    back: str  # what it is again after until_s, and if no further order comes
    until_s: float  # inf = for good: `back` is the same role


class HeldRole:
    """Orders come from the relay's thread, questions from others: what they share is one reference."""

    def __init__(self, role: str) -> None:
        """`role`: as the instance was started."""
        self._turn = _Turn(role, role, float("inf"))
        self._leaves = False

    def leave(self) -> None:
        """Drain for good: whatever is ordered from now on, the process is going to end."""
        self._leaves = True

    def order(self, now_s: float, order: RoleOrder) -> None:
        """Take a role; with hold_s, for so long unless another order comes."""
        if order.hold_s:
            self._turn = _Turn(order.role, self._turn.back, now_s + order.hold_s)
        else:
            self._turn = _Turn(order.role, order.role, float("inf"))

    def now(self, now_s: float) -> str:
        """Return the role to register with."""
        if self._leaves:
            return DRAINING
        turn = self._turn
        return turn.role if now_s < turn.until_s else turn.back
