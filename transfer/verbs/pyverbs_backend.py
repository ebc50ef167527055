"""Verbs by rdma-core's own pyverbs, as Debian 12 packages it (44): the second backend (docs/adr/0003).

Its traps (measured, see docs/adr/0003), and what is done about each:

- It never lets go of the interpreter lock, so its blocking wait deadlocks a process: only polling.
- SGE and SendWR leak 64 bytes each when they are dropped, and their `close` is a bare free: a queue pair
  makes its requests once, uses them again and again, and frees each exactly once.
- A key read from a closed MR is a segmentation fault: keys are copied when the MR is made.
- A dma-buf can only be registered at address = offset, so peers could not address it: refused.
"""

import errno
import importlib
import secrets
import threading
from collections.abc import Sequence
from typing import Any

from mooncake.core.errors import CapacityError, ConfigError, PeerGone, RequestError
from transfer.messages import NicInfo, QpInfo
from transfer.verbs import common
from transfer.verbs.api import (
    READS_OUTSTANDING_MAX,
    RETRIES,
    RNR_RETRIES,
    TIMEOUT_EXPONENT,
    Done,
    Nic,
    Verbs,
    Work,
)
from transfer.verbs.common import ACCESS, OPCODES, SIGNALED

NAME = "pyverbs"


class _Library:
    """The classes that are used, from the modules they are in."""

    def __init__(self) -> None:
        def module(name: str) -> Any:
            return importlib.import_module(f"pyverbs.{name}")

        self.error: type[Exception] = module("pyverbs_error").PyverbsError
        self.device, self.addr, self.qp, self.wr = (module(name) for name in ("device", "addr", "qp", "wr"))
        self.pd: Any = module("pd").PD
        self.mr: Any = module("mr").MR
        self.cq: Any = module("cq").CQ


def load() -> Verbs:
    """Import the library.

    Raises:
        ConfigError: pyverbs or a library of rdma-core is missing, or they do not fit each other.
    """
    try:
        return _Verbs(_Library())
    except (ImportError, OSError, AttributeError) as error:
        advice = "install Debian's python3-pyverbs and put it on the path (Python 3.11 only)"
        raise ConfigError(f"{NAME}: {error}; {advice}") from error


class _Verbs:
    name = NAME

    def __init__(self, lib: _Library) -> None:
        self._lib = lib

    def devices(self) -> list[str]:
        try:
            return [device.name.decode() for device in self._lib.device.get_device_list()]
        except self._lib.error:  # no InfiniBand in this kernel
            return []

    def open(self, device: str, port: int = 1, gid_index: int | None = None) -> Nic:
        if device not in self.devices():
            raise ConfigError(f"RDMA device {device!r}: there is none; there are {self.devices()}")
        try:
            context = self._lib.device.Context(name=device)
        except self._lib.error as error:
            raise ConfigError(f"RDMA device {device!r}: {error}") from error
        try:
            attributes = context.query_port(port)
            info = common.describe_port(
                device, port, gid_index, attributes, lambda index: _gid_bytes(context.query_gid(port, index))
            )
            return _Nic(self._lib, context, info)
        except self._lib.error as error:
            context.close()
            raise ConfigError(f"RDMA device {device!r} port {port}: {error}") from error
        except ConfigError:
            context.close()
            raise


class _Nic:
    def __init__(self, lib: _Library, context: Any, info: NicInfo) -> None:
        self.info = info
        self._lib = lib
        self._context = context
        limits = context.query_device()
        self.depth: int = min(common.DEPTH, limits.max_qp_wr, limits.max_cqe)
        self.reads: int = min(READS_OUTSTANDING_MAX, limits.max_qp_rd_atom)
        self._pd = lib.pd(context)
        self._closed = False

    def is_up(self) -> bool:
        try:
            return not self._closed and self._context.query_port(self.info.port).state == common.PORT_ACTIVE
        except self._lib.error:
            return False

    def register(self, address: int, size_bytes: int) -> "_Memory":
        what = f"{self.info.name}: registering {size_bytes} bytes"
        if size_bytes <= 0 or address <= 0:  # at address 0 pyverbs would allocate memory of its own
            raise RequestError(f"{what} at {address:#x}: empty")
        try:
            return _Memory(self._lib.mr(self._pd, size_bytes, ACCESS, address=address))
        except self._lib.error as error:
            code: int = getattr(error, "error_code", errno.EINVAL)
            raise common.registration_error(code, what) from error

    def register_dmabuf(self, fd: int, offset: int, address: int, size_bytes: int) -> "_Memory":
        raise CapacityError(
            f"{self.info.name}: pyverbs cannot register a dma-buf at its device address "
            f"(descriptor {fd}, {size_bytes} bytes at {address + offset:#x}); use the ibverbs wheel"
        )

    def queue_pair(self) -> "_QueuePair":
        try:
            queue = self._lib.cq(self._context, self.depth)
        except self._lib.error as error:
            raise CapacityError(f"{self.info.name}: completion queue: {error}") from error
        limits = self._lib.qp.QPCap(max_send_wr=self.depth, max_recv_wr=1)
        attributes = self._lib.qp.QPInitAttr(
            qp_type=common.RC, scq=queue, rcq=queue, cap=limits, sq_sig_all=0
        )
        try:
            return _QueuePair(self._lib, self, queue, self._lib.qp.QP(self._pd, attributes))
        except self._lib.error as error:
            queue.close()
            raise CapacityError(f"{self.info.name}: queue pair: {error}") from error

    def close(self) -> None:
        if not self._closed:
            self._context.close()  # closes what it has left open, too
            self._closed = True


class _Memory:
    def __init__(self, region: Any) -> None:
        self._region = region
        self.lkey: int = region.lkey
        self.rkey: int = region.rkey

    def close(self) -> None:
        self._region.close()  # idempotent; returns when the NIC has let go


class _Requests:
    """`depth` work requests, linked once for all; `fill` uses the last ones, so that the chain ends there.

    pyverbs can set the link to the next request but never remove it.
    """

    def __init__(self, lib: _Library, depth: int) -> None:
        self._entries = [lib.wr.SGE(0, 0, 0) for _ in range(depth)]
        self._requests = [
            lib.wr.SendWR(num_sge=1, sg=[entry], send_flags=SIGNALED) for entry in self._entries
        ]
        for request, entry in zip(self._requests, self._entries, strict=True):
            request.close()  # frees its own copy of the list ...
            request.sg_list = entry  # ... and points to ours, which is freed in `close`
        for request, following in zip(self._requests, self._requests[1:], strict=False):
            request.next_wr = following

    def fill(self, works: Sequence[Work]) -> Any:
        """Write `works` into the last requests and return the first of them."""
        first = len(self._requests) - len(works)
        for at, work in enumerate(works, first):
            entry, request = self._entries[at], self._requests[at]
            entry.addr, entry.length, entry.lkey = work.local, work.size_bytes, work.lkey
            request.wr_id = work.work_id
            request.opcode = OPCODES[work.op]
            request.set_wr_rdma(work.rkey, work.remote)
        return self._requests[first]

    def close(self) -> None:
        """Free them. Not idempotent: call it once."""
        for entry in self._entries:
            entry.close()


class _QueuePair:
    def __init__(self, lib: _Library, nic: _Nic, queue: Any, pair: Any) -> None:
        self._lib = lib
        self._nic = nic
        self._queue = queue
        self._pair = pair
        self._requests = _Requests(lib, nic.depth)
        self._lock = threading.Lock()
        self._closed = False
        info = nic.info
        self._local = QpInfo(
            info.name, info.port, pair.qp_num, secrets.randbits(24), info.gid, info.lid, info.mtu
        )

    def local(self) -> QpInfo:
        return self._local

    def connect(self, remote: QpInfo) -> None:
        common.check_remote(remote)
        info = self._nic.info
        addr = self._lib.addr
        route = addr.GlobalRoute(
            dgid=addr.GID(remote.gid.hex(":", 2)), sgid_index=info.gid_index, hop_limit=common.HOPS_MAX
        )
        attributes = self._lib.qp.QPAttr()
        attributes.port_num = info.port
        attributes.qp_access_flags = ACCESS
        attributes.ah_attr = addr.AHAttr(dlid=remote.lid, is_global=1, port_num=info.port, gr=route)
        attributes.path_mtu = common.mtu_code(min(remote.mtu, info.mtu))
        attributes.dest_qp_num, attributes.rq_psn = remote.qpn, remote.psn
        attributes.min_rnr_timer = common.RNR_TIMER
        attributes.max_dest_rd_atomic = attributes.max_rd_atomic = self._nic.reads
        attributes.sq_psn = self._local.psn
        attributes.timeout = TIMEOUT_EXPONENT
        attributes.retry_cnt, attributes.rnr_retry = RETRIES, RNR_RETRIES
        with self._lock:
            self._check()
            try:
                self._pair.to_rts(attributes)  # by way of INIT and RTR
            except self._lib.error as error:
                raise PeerGone(f"{info.name}: connecting to {remote.nic}: {error}") from error

    def post(self, works: Sequence[Work]) -> None:
        if not works:
            return
        with self._lock:
            self._check()
            try:
                self._pair.post_send(self._requests.fill(works))
            except self._lib.error as error:
                raise PeerGone(f"{self._nic.info.name}: post: {error}") from error

    def poll(self, count_max: int) -> list[Done]:
        with self._lock:
            if self._closed:
                return []
            try:
                completions = self._queue.poll(count_max)[1]
            except self._lib.error as error:
                raise PeerGone(f"{self._nic.info.name}: poll: {error}") from error
        return [_done(completion) for completion in completions]

    def close(self) -> None:
        with self._lock:
            if not self._closed:
                self._pair.close()
                self._queue.close()
                self._requests.close()
                self._closed = True

    def _check(self) -> None:
        if self._closed:
            raise PeerGone(f"{self._nic.info.name}: this queue pair is closed")


def _gid_bytes(gid: Any) -> bytes:
    return bytes.fromhex(gid.gid.replace(":", ""))


def _done(completion: Any) -> Done:
    code = int(completion.status)
    if code == 0:
        return Done(completion.wr_id, common.status_of(0))
    return Done(completion.wr_id, common.status_of(code), common.status_words(code, completion.vendor_err))
