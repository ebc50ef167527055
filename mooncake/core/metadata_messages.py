"""Messages to the metadata service, in the form of mooncake.core.messages."""

import msgspec

from mooncake.core.messages import Failure, Ok


class MetaGet(msgspec.Struct, frozen=True, array_like=True, tag="get"):
    """All entries under a prefix. Answer: MetaEntries."""

    prefix: str


class MetaEntry(msgspec.Struct, frozen=True, array_like=True):
    """One key with its value; `revision` of its last change."""

    key: str
    value: bytes
    revision: int


class MetaEntries(msgspec.Struct, frozen=True, array_like=True, tag="ents"):
    """Entries at `revision` of the whole store. `epoch` names the life of the store."""

    revision: int
    entries: list[MetaEntry]
    epoch: str = ""


class MetaPut(msgspec.Struct, frozen=True, array_like=True, tag="put"):
    """Write; lease_id 0 = permanent; if_revision >= 0 = only if the key's revision is that (0 = absent)."""

    key: str
    value: bytes
    lease_id: int = 0
    if_revision: int = -1


class MetaDelete(msgspec.Struct, frozen=True, array_like=True, tag="del"):
    """Delete one key (idempotent)."""

    key: str


class MetaPutResult(msgspec.Struct, frozen=True, array_like=True, tag="putd"):
    """`done` False: the compare failed; `revision` is the key's current one."""

    done: bool
    revision: int


class MetaGrant(msgspec.Struct, frozen=True, array_like=True, tag="grant"):
    """A lease of ttl_s. Answer: MetaLease."""

    ttl_s: float


class MetaKeepAlive(msgspec.Struct, frozen=True, array_like=True, tag="keep"):
    """Refresh a lease. Answer: MetaLease with lease_id 0 when it is already gone."""

    lease_id: int


class MetaRevoke(msgspec.Struct, frozen=True, array_like=True, tag="rvk"):
    """End a lease now: its keys vanish (idempotent)."""

    lease_id: int


class MetaLease(msgspec.Struct, frozen=True, array_like=True, tag="lease"):
    """A live lease, or lease_id 0."""

    lease_id: int
    ttl_s: float


class MetaWatch(msgspec.Struct, frozen=True, array_like=True, tag="watch"):
    """Long poll: changes under `prefix` after `revision`, at most wait_s. Answer: MetaChanges.

    `epoch` of another life of the store is answered by compacted; "" = any.
    """

    prefix: str
    revision: int
    wait_s: float
    epoch: str = ""


class MetaChange(msgspec.Struct, frozen=True, array_like=True):
    """`value` None = deleted."""

    key: str
    value: bytes | None
    revision: int


class MetaChanges(msgspec.Struct, frozen=True, array_like=True, tag="chg"):
    """Changes up to `revision`; `compacted`: history is gone, list again."""

    revision: int
    changes: list[MetaChange]
    compacted: bool = False
    epoch: str = ""


MetaRequest = MetaGet | MetaPut | MetaDelete | MetaGrant | MetaKeepAlive | MetaRevoke | MetaWatch
MetaReply = MetaEntries | MetaPutResult | MetaLease | MetaChanges | Ok | Failure
