"""The decision core as a gateway sees it: over rpc while one leads, by a local policy while none does."""

from typing import Any

from conductor.cluster import ClusterView
from conductor.decider import Decider
from conductor.members import Members, Sink
from conductor.tenants import Quotas


class RemoteCore:
    """A Decider. What people ask is answered by the core, or from what is known here."""

    view: ClusterView
    members: Members
    quotas: Quotas
    decider: Decider

    def start(self, sink: Sink) -> None:
        """Look for the leader and join it, on the running loop."""
        raise NotImplementedError

    def status(self) -> dict[str, Any]:
        """Return who decides, JSON-ready."""
        raise NotImplementedError

    async def close(self) -> None:
        """Leave (idempotent)."""
        raise NotImplementedError

    @property
    def away(self) -> str:
        """Why decisions are made here at the moment; "" = the core makes them."""
        raise NotImplementedError

    async def instances(self) -> list[dict[str, Any]]:
        """Return the instances as the core sees them, or as this gateway does while it is away."""
        raise NotImplementedError

    async def decisions(self, request_id: str) -> list[dict[str, Any]]:
        """Return the last decisions, newest first; only those of `request_id`, if given."""
        raise NotImplementedError

    async def change_role(self, instance_id: str, role: str) -> None:
        """Begin a change of roles.

        Raises:
            RequestError: it cannot be followed.
            MooncakeError: no core leads.
        """
        raise NotImplementedError
