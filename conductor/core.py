"""The decision core: what is known of the cluster and who decides by it, wired together.

In the gateway's process when there is one gateway; in a process of its own (conductor.core_service) when
several share it.
"""

from typing import Any

from conductor.metrics import GatewayMetrics
from mooncake.core.config import GatewayOptions
from mooncake.core.metadata import MetadataStore


class Core:
    """View, index, cost model, scheduler, gate, quotas, roles and hot copies of one cluster."""

    def __init__(self, options: GatewayOptions, metadata: MetadataStore, metrics: GatewayMetrics) -> None:
        """Nothing runs before `start`.

        Raises:
            ConfigError: the file of tenants is wrong.
        """
        raise NotImplementedError

    def start(self) -> None:
        """Follow the cluster, on the running loop."""
        raise NotImplementedError

    async def close(self) -> None:
        """End what `start` began."""
        raise NotImplementedError

    async def instances(self) -> list[dict[str, Any]]:
        """Return the instances as JSON-ready dictionaries."""
        raise NotImplementedError

    async def decisions(self, request_id: str) -> list[dict[str, Any]]:
        """Return the last decisions, newest first; only those of `request_id`, if given."""
        raise NotImplementedError

    async def change_role(self, instance_id: str, role: str) -> None:
        """Begin a change of roles.

        Raises:
            RequestError: it cannot be followed.
        """
        raise NotImplementedError
