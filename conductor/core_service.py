"""Serves a decision core to gateways while it leads (DESIGN 4): election, connections, fencing.

A standby's Core follows instances and blocks all the time, so that what it knows is there when it takes over;
what gateways have in flight they hand in when they join.
"""

from conductor.core import Core
from mooncake.core.metadata import MetadataStore


class CoreService:
    """One candidate: `start`, `close`."""

    def __init__(self, core: Core, metadata: MetadataStore, bind: str, name: str) -> None:
        """Bind at once; nothing else happens before `start`.

        Args:
            core: not started; it is started and closed here.
            metadata: for the election; not closed here.
            bind: where gateways reach it, tcp://HOST:PORT (port 0 = any) or ipc://PATH.
            name: differs between all candidates, also between two starts of one.

        Raises:
            ConfigError: `bind` cannot be used.
        """
        raise NotImplementedError

    @property
    def endpoint(self) -> str:
        """Where gateways reach it."""
        raise NotImplementedError

    @property
    def leads(self) -> bool:
        """Whether it may decide at this moment."""
        raise NotImplementedError

    async def start(self) -> None:
        """Follow the cluster, stand for election, serve."""
        raise NotImplementedError

    async def close(self) -> None:
        """Resign first, so that another one leads at once; then end everything (idempotent)."""
        raise NotImplementedError
