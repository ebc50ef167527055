"""What both real backends share: numbers of the verbs ABI and what we make of them.

Both libraries hand out the C names and numbers of libibverbs, which never change.
"""

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mooncake.core.errors import CapacityError, ConfigError, MooncakeError, PeerGone, RequestError
from transfer.messages import NicInfo, QpInfo
from transfer.model import Opcode
from transfer.verbs.api import WorkStatus

SYSFS = Path("/sys/class/infiniband")

ACCESS = 1 | 2 | 4
"""LOCAL_WRITE, REMOTE_WRITE, REMOTE_READ."""
SIGNALED = 2
RC = 2
PORT_ACTIVE = 4
LINK_ETHERNET = 2

GID_BYTES = 16

DEPTH = 128
"""Work requests outstanding on a queue pair: 32 MiB in blocks of 256 KiB."""
HOPS_MAX = 64
"""Routers on the way. The libraries' default, 1, ends at the first one."""
RNR_TIMER = 12
"""0.64 ms. One-sided work needs no receiver, so this is never waited for."""

OPCODES = {Opcode.WRITE: 0, Opcode.READ: 4}

_STATUSES = {
    0: WorkStatus.DONE,
    5: WorkStatus.FLUSHED,  # WR_FLUSH_ERR
    9: WorkStatus.REFUSED,  # REM_INV_REQ_ERR: longer than the target's limits
    10: WorkStatus.REFUSED,  # REM_ACCESS_ERR
    12: WorkStatus.UNREACHABLE,  # RETRY_EXC_ERR
    13: WorkStatus.UNREACHABLE,  # RNR_RETRY_EXC_ERR
}
_STATUS_NAMES = (
    *("success", "local length", "local QP operation", "local EEC operation", "local protection", "flushed"),
    *("window bind", "bad response", "local access", "remote invalid request", "remote access"),
    *("remote operation", "retries exhausted", "receiver not ready", "local RDD", "remote invalid read"),
    *("remote abort", "invalid EECN", "invalid EEC", "fatal", "response timeout", "general"),
)

_NOT_MEMORY = (errno.EFAULT, errno.EINVAL)
_V4_MAPPED = bytes(10) + b"\xff\xff"


def status_of(code: int) -> WorkStatus:
    """Map ibv_wc_status."""
    return _STATUSES.get(code, WorkStatus.FAILED)


def status_words(code: int, vendor: int) -> str:
    """Say what ibv_wc_status `code` means; `vendor` is the device's own code."""
    name = _STATUS_NAMES[code] if code < len(_STATUS_NAMES) else "unknown"
    return f"{name} (status {code}, vendor {vendor:#x})"


def mtu_bytes(code: int) -> int:
    """Map ibv_mtu, 1 to 5."""
    return 128 << code


def mtu_code(size_bytes: int) -> int:
    """Return the largest ibv_mtu that is not above `size_bytes`."""
    return max(1, min(5, size_bytes.bit_length() - 8))


def registration_error(code: int, what: str) -> MooncakeError:
    """Return the exception for a registration that failed with errno `code`."""
    if code in _NOT_MEMORY:
        return RequestError(f"{what}: not writable memory of this process (or not memory this NIC can use)")
    hint = "; raise the memlock limit (ulimit -l)" if code in (errno.ENOMEM, errno.EPERM) else ""
    return CapacityError(f"{what}: {errno.errorcode.get(code, code)}{hint}")


def check_remote(remote: QpInfo) -> None:
    """Refuse what a peer says of its queue pair if a library would stumble over it.

    Raises:
        PeerGone: it is no queue pair.
    """
    numbers = ((remote.qpn, 24), (remote.psn, 24), (remote.lid, 16), (remote.port - 1, 7))
    if len(remote.gid) != GID_BYTES or not all(0 <= number < 1 << bits for number, bits in numbers):
        raise PeerGone(f"peer's RDMA NIC {remote.nic!r}: {remote} is no queue pair")


def describe_port(
    device: str, port: int, gid_index: int | None, attributes: Any, gid_at: Callable[[int], bytes]
) -> NicInfo:
    """Describe a port that a library has just queried.

    Args:
        device: its name.
        port: counted from 1.
        gid_index: None = choose.
        attributes: ibv_port_attr, as both libraries show it.
        gid_at: returns the 16 bytes at an index of the GID table.

    Raises:
        ConfigError: there is no such GID.
    """
    ethernet = attributes.link_layer == LINK_ETHERNET
    gids = [gid_at(index) for index in range(attributes.gid_tbl_len)]
    if gid_index is None:
        gid_index = choose_gid(gids, lambda index: _gid_type(device, port, index))
    if gid_index is None or not 0 <= gid_index < len(gids) or not any(gids[gid_index]):
        there = [index for index, gid in enumerate(gids) if any(gid)]
        raise ConfigError(f"RDMA device {device} port {port}: no GID at index {gid_index}; there are {there}")
    return NicInfo(
        name=device,
        port=port,
        gid=gids[gid_index],
        gid_index=gid_index,
        lid=attributes.lid,
        mtu=mtu_bytes(attributes.active_mtu),
        link_layer="ethernet" if ethernet else "infiniband",
    )


def choose_gid(gids: list[bytes], type_of: Callable[[int], str]) -> int | None:
    """Choose an index: IPv4-mapped and RoCE v2, else IPv4-mapped, else not zero; the first of each.

    An Ethernet port lists every address twice, once as RoCE v1, which no router passes and which a
    peer with v2 does not understand.
    """
    mapped = [index for index, gid in enumerate(gids) if gid.startswith(_V4_MAPPED)]
    second = [index for index in mapped if type_of(index) == "RoCE v2"]
    return next(iter(second + mapped + [index for index, gid in enumerate(gids) if any(gid)]), None)


def _gid_type(device: str, port: int, index: int) -> str:
    """Read the kernel's word for it, "" if there is none."""
    try:
        return (SYSFS / device / "ports" / str(port) / "gid_attrs/types" / str(index)).read_text().strip()
    except OSError:
        return ""
