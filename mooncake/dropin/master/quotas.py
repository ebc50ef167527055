"""Tenants and their quotas (--enable_multi_tenants): kept in a file, given to stores as strict shares.

The file is upstream's: {"version": 1, "tenants": [{"name": "a", "quota": "10GB"}]}, as JSON or YAML. A change
by HTTP is in the file before it holds. Stores that join take what QUOTAS_KEY says until they are told their
shares, ROUND_S later at most; for so long they may together take more than the quota.
"""

import asyncio
import contextlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import structlog

from kvstore.leader.store_clients import StoreClients
from kvstore.node.keeping import NO_QUOTA
from kvstore.node.tags import NAME_CHARS_MAX
from mooncake.core.config import fail
from mooncake.core.errors import CapacityError, MooncakeError, RequestError
from mooncake.core.messages import SetQuota, Stats, StoreStats, TenantUsage
from mooncake.core.metadata import MetadataStore
from mooncake.dropin.master.options import read_document
from mooncake.dropin.master.shares import divide
from mooncake.dropin.store.settings import QUOTAS_KEY, size_bytes

ROUND_S = 1.0
"""How soon the room of a tenant follows it to another segment."""
ASK_S = 2.0
QUOTA_BYTES_MAX = (1 << 63) - 1
TENANTS_MAX = 400
"""All of them are one value of the metadata store, 64 KiB at most."""
VERSION = 1
FLAG = "tenant_quota_connector_uri"

log = structlog.get_logger(__name__)


class Usage(msgspec.Struct, frozen=True):
    """Of one tenant in the whole pool. `effective_bytes`: no more than the pool has."""

    tenant: str
    quota_bytes: int
    effective_bytes: int
    used_bytes: int


def read_quotas(path: str) -> dict[str, int]:
    """Return the quotas in a file, in bytes by tenant.

    Raises:
        ConfigError: it cannot be read, or does not say what it has to; names the tenant.
    """
    document = read_document(FLAG, path)
    if not isinstance(document, Mapping) or document.get("version") != VERSION:
        raise fail(FLAG, path, f"must be a map with `version: {VERSION}` and `tenants`")
    entries = document.get("tenants")
    if not isinstance(entries, list):
        raise fail(FLAG, path, "`tenants` must be a list of `name` and `quota`")
    quotas: dict[str, int] = {}
    for entry in entries:
        name = entry.get("name") if isinstance(entry, Mapping) else None
        if not isinstance(name, str) or not is_tenant(name) or name in quotas:
            raise fail(FLAG, path, f"tenant {name!r}: a name of 1 to {NAME_CHARS_MAX} bytes, each once")
        quotas[name] = size_bytes(f"quota of {name}", entry.get("quota"))
        if not 1 <= quotas[name] <= QUOTA_BYTES_MAX:
            raise fail(f"quota of {name}", entry.get("quota"), "must be positive")
    if len(quotas) > TENANTS_MAX:
        raise fail(FLAG, path, f"at most {TENANTS_MAX} tenants")
    return quotas


def write_quotas(path: str, quotas: Mapping[str, int]) -> None:
    """Put `quotas` into the file, whole or not at all.

    Raises:
        ConfigError: it cannot be written.
    """
    entries = [{"name": name, "quota": quota} for name, quota in sorted(quotas.items())]
    raw = msgspec.json.format(msgspec.json.encode({"version": VERSION, "tenants": entries}), indent=2)
    try:
        descriptor, draft = tempfile.mkstemp(dir=Path(path).parent, prefix=f".{Path(path).name}.")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(raw + b"\n")
                file.flush()
                os.fsync(file.fileno())
            Path(draft).replace(path)
        except BaseException:
            Path(draft).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise fail(FLAG, path, f"cannot be written: {error.strerror}") from error


def is_tenant(name: str) -> bool:
    """Return whether a tenant may be called so."""
    return 0 < len(name.encode()) <= NAME_CHARS_MAX and name.isprintable()


class Quotas:
    """`start`, then `set` and `remove` at any time, `close`. All methods run on one loop."""

    def __init__(self, path: str, metadata: MetadataStore, clients: StoreClients) -> None:
        """Read the file; raises as read_quotas. The others are not closed here."""
        self._path = path
        self._metadata = metadata
        self._clients = clients
        self._quotas = read_quotas(path)
        self._told: dict[str, tuple[str, dict[str, int]]] = {}  # by node: its epoch, shares
        self._used: dict[str, dict[str, int]] = {}
        self._capacity: dict[str, int] = {}
        self._turn = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begin to tell stores; raises as MetadataStore.put."""
        await self._publish()
        self._task = asyncio.create_task(self._run(), name="tenant quotas")

    async def close(self) -> None:
        """Stop (idempotent); stores keep what they were told."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    # ------------------------------------------------------------ what operators ask

    async def usage(self) -> list[Usage]:
        """Return every tenant with a quota, by name, as it is now."""
        async with self._turn:
            await self._round()
        return [self._usage(tenant) for tenant in sorted(self._quotas)]

    async def set(self, tenant: str, quota_bytes: int) -> Usage:
        """Give a tenant a quota; it holds when this returns, where stores answer.

        Raises:
            RequestError: a name or a number that makes no sense.
            CapacityError: too many tenants.
            ConfigError: the file cannot be written; nothing is changed then.
        """
        if not is_tenant(tenant):
            raise RequestError("Invalid tenant_id")
        if not 1 <= quota_bytes <= QUOTA_BYTES_MAX:
            raise RequestError("Tenant quota must be in [1, 2^63 - 1] bytes")
        async with self._turn:
            if tenant not in self._quotas and len(self._quotas) >= TENANTS_MAX:
                raise CapacityError(f"{TENANTS_MAX} tenants have quotas: no more here")
            await self._keep({**self._quotas, tenant: quota_bytes})
            await self._round()
        return self._usage(tenant)

    async def remove(self, tenant: str) -> Usage | None:
        """End a tenant that has nothing in the pool; return what it had, None: it is no tenant.

        It is ended only if `used_bytes` of the answer is 0. Raises ConfigError as `set`.
        """
        async with self._turn:
            if tenant not in self._quotas:
                return None
            await self._look()
            usage = self._usage(tenant)
            if not usage.used_bytes:
                await self._keep({name: quota for name, quota in self._quotas.items() if name != tenant})
                over = SetQuota(tenant, NO_QUOTA)
                await asyncio.gather(*(self._ask(node, over, TenantUsage) for node in self._clients.records))
                await self._round()
        return usage

    # ------------------------------------------------------------ inside

    def _usage(self, tenant: str) -> Usage:
        quota_bytes = self._quotas[tenant]
        used_bytes = sum(used.get(tenant, 0) for used in self._used.values())
        return Usage(tenant, quota_bytes, min(quota_bytes, sum(self._capacity.values())), used_bytes)

    async def _keep(self, quotas: dict[str, int]) -> None:
        await asyncio.to_thread(write_quotas, self._path, quotas)
        self._quotas = quotas
        await self._publish()

    async def _publish(self) -> None:
        await self._metadata.put(QUOTAS_KEY, msgspec.json.encode(self._quotas))

    async def _run(self) -> None:
        while True:
            async with self._turn:
                await self._round()
            await asyncio.sleep(ROUND_S)

    async def _look(self) -> list[str]:
        """Ask every store what tenants use; return those that answer. The others count as they did."""
        records = dict(self._clients.records)
        for known in (self._used, self._capacity, self._told):
            for node in [node for node in known if node not in records]:
                del known[node]
        answers = await asyncio.gather(*(self._ask(node, Stats(), StoreStats) for node in records))
        for node, stats in zip(records, answers, strict=True):
            if stats is not None:
                self._used[node] = stats.tenants
                self._capacity[node] = stats.capacity_bytes
        return [node for node, stats in zip(records, answers, strict=True) if stats is not None]

    async def _round(self) -> None:
        """Tell every store its shares, where they have changed."""
        answering = await self._look()
        silent = [shares for node, (_, shares) in self._told.items() if node not in answering]
        wanted: dict[str, dict[str, int]] = {node: {} for node in answering}
        for tenant, quota_bytes in self._quotas.items():
            used = {node: self._used[node].get(tenant, 0) for node in answering}
            reserved_bytes = sum(shares.get(tenant, 0) for shares in silent)
            for node, share in divide(quota_bytes, used, reserved_bytes).items():
                wanted[node][tenant] = share
        # what gets less first: together they never have more than the quota
        for less in (True, False):
            await asyncio.gather(*(self._tell(node, shares, less=less) for node, shares in wanted.items()))

    async def _tell(self, node: str, wanted: Mapping[str, int], *, less: bool) -> None:
        record = self._clients.records.get(node)
        if record is None:
            return
        epoch, told = self._told.get(node, ("", {}))
        if epoch != record.epoch:
            self._told[node] = (record.epoch, told := {})
        for tenant in [tenant for tenant in told if tenant not in wanted] if less else []:
            if await self._ask(node, SetQuota(tenant, NO_QUOTA), TenantUsage) is None:
                return
            del told[tenant]
        for tenant, share in wanted.items():
            known = told.get(tenant)  # None: as much as QUOTAS_KEY says
            if share == known or less != (known is None or share < known):
                continue
            if await self._ask(node, SetQuota(tenant, share, strict=True), TenantUsage) is None:
                return  # it is away: the next round tries again
            told[tenant] = share

    async def _ask(self, node: str, request: Any, kind: type[Any]) -> Any:
        try:
            return await self._clients.ask(node, request, kind, ASK_S)
        except MooncakeError as error:
            log.info("quotas.not_asked", node=node, reason=str(error))
            return None
