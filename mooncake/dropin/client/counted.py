"""The calls of a client that shows what it does, see mooncake.dropin.client.http: each is counted once."""

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvstore.client.model import Place
from mooncake.dropin.client.counters import BATCH_GET, BATCH_PUT, GET, PUT, Counters
from mooncake.dropin.store.calls import Calls, Parts
from mooncake.dropin.store.settings import Settings
from mooncake.dropin.store.start import Started
from mooncake.dropin.store.types import OK, ReplicateConfig

if TYPE_CHECKING:
    from mooncake.dropin.client.http import ClientHttp


class CountedCalls(Calls):
    """Calls, counted."""

    def __init__(self, started: Started, http: "ClientHttp") -> None:
        """Count for `http`, which is not closed here."""
        super().__init__(started)
        self.http = http

    def put(
        self,
        names: Sequence[str],
        sources: Sequence[Parts],
        config: ReplicateConfig | None,
        *,
        replace: bool = False,
    ) -> list[int]:
        """See Calls."""
        begun_s = time.perf_counter()
        codes = super().put(names, sources, config, replace=replace)
        moved = sum(
            part.nbytes for parts, code in zip(sources, codes, strict=True) if code == OK for part in parts
        )
        one = len(names) == 1
        self._note("PutStart", one, begun_s, PUT if one else BATCH_PUT, moved)
        return codes

    def get(self, names: Sequence[str]) -> list[bytes | None]:
        """See Calls."""
        begun_s, moved, one = time.perf_counter(), 0, len(names) == 1
        try:
            values = super().get(names)
            moved = sum(len(value) for value in values if value)
        finally:
            self._note("GetReplicaList", one, begun_s, GET if one else BATCH_GET, moved)
        return values

    def get_into(self, names: Sequence[str], targets: Sequence[Parts]) -> list[int]:
        """See Calls."""
        begun_s, one = time.perf_counter(), len(names) == 1
        codes = super().get_into(names, targets)
        moved = sum(code for code in codes if code > 0)
        self._note("GetReplicaList", one, begun_s, GET if one else BATCH_GET, moved)
        return codes

    def get_straight(
        self,
        names: Sequence[str],  # noqa: ARG002 - see below
        addresses: Sequence[int],  # noqa: ARG002
        sizes: Sequence[int],  # noqa: ARG002
    ) -> list[int] | None:
        """Have `get_into` do it, which counts."""
        return None

    def put_straight(
        self,
        names: Sequence[str],  # noqa: ARG002 - see below
        addresses: Sequence[int],  # noqa: ARG002
        sizes: Sequence[int],  # noqa: ARG002
    ) -> list[int] | None:
        """Have `put` do it, which counts."""
        return None

    def sizes(self, names: Sequence[str]) -> list[int]:
        """See Calls."""
        begun_s = time.perf_counter()
        codes = super().sizes(names)
        self._note("ExistKey", len(names) == 1, begun_s)
        return codes

    def places(self, names: Sequence[str]) -> list[list[Place]]:
        """See Calls."""
        begun_s = time.perf_counter()
        try:
            return super().places(names)
        finally:
            self._note("GetReplicaList", len(names) == 1, begun_s)

    def remove(self, names: Sequence[str], force: bool) -> list[int]:
        """See Calls."""
        begun_s = time.perf_counter()
        codes = super().remove(names, force)
        self._note("Remove", len(names) == 1, begun_s)
        return codes

    def _note(self, rpc: str, one: bool, begun_s: float, transfer: str = "", moved: int = 0) -> None:
        past_s = time.perf_counter() - begun_s
        self.http.counters.note(rpc if one else f"Batch{rpc}", past_s, transfer=transfer, size_bytes=moved)


def calls_of(started: Started, settings: Settings) -> Calls:
    """Return the calls of `started`; counted, and shown until it is closed, where `settings` ask for it."""
    if not settings.enable_client_http_server:
        return Calls(started)
    from mooncake.dropin.client.http import ClientHttp  # most clients serve none, and load no server

    http = ClientHttp(Counters(), started.background.has_master, settings.client_http_port)
    http.start()
    started.on_close(http.close)
    return CountedCalls(started, http)
