"""Verbs by the `ibverbs` wheel: the default backend (docs/adr/0003).

It loads libibverbs.so.1 at import, registers any address, and lets go of the interpreter lock in its
calls; so `post`, `poll` and `close` of one queue pair take a lock of ours: a `close` from another thread
must not free what a call is using.
"""

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

NAME = "ibverbs"


def load() -> Verbs:
    """Import the library.

    Raises:
        ConfigError: the wheel or libibverbs is missing.
    """
    try:
        return _Verbs(importlib.import_module("ibverbs"))
    except (ImportError, OSError) as error:
        raise ConfigError(f"{NAME}: {error}; pip install ibverbs, and rdma-core's libibverbs") from error


class _Verbs:
    name = NAME

    def __init__(self, lib: Any) -> None:
        self._lib = lib

    def devices(self) -> list[str]:
        try:
            return [device.name for device in self._lib.get_device_list()]
        except OSError:  # no InfiniBand in this kernel
            return []

    def open(self, device: str, port: int = 1, gid_index: int | None = None) -> Nic:
        try:
            found = [each for each in self._lib.get_device_list() if each.name == device]
            if not found:
                raise ConfigError(f"RDMA device {device!r}: there is none; there are {self.devices()}")
            context = found[0].open()
        except OSError as error:
            raise ConfigError(f"RDMA device {device!r}: {error}") from error
        try:
            attributes = context.query_port(port)
            info = common.describe_port(
                device, port, gid_index, attributes, lambda index: bytes(context.query_gid(port, index).raw)
            )
            return _Nic(self._lib, context, info)
        except OSError as error:
            context.close()
            raise ConfigError(f"RDMA device {device!r} port {port}: {error}") from error
        except ConfigError:
            context.close()
            raise


class _Nic:
    def __init__(self, lib: Any, context: Any, info: NicInfo) -> None:
        self.info = info
        self._lib = lib
        self._context = context
        limits = context.query_device()
        self.depth: int = min(common.DEPTH, limits.max_qp_wr, limits.max_cqe)
        self.reads: int = min(READS_OUTSTANDING_MAX, limits.max_qp_rd_atom)
        self._pd = context.alloc_pd()
        self._closed = False

    def is_up(self) -> bool:
        try:
            return not self._closed and self._context.query_port(self.info.port).state == common.PORT_ACTIVE
        except OSError:
            return False

    def register(self, address: int, size_bytes: int) -> "_Memory":
        what = f"{self.info.name}: registering {size_bytes} bytes"
        if size_bytes <= 0 or address <= 0:
            raise RequestError(f"{what} at {address:#x}: empty")
        try:
            return _Memory(self._pd.reg_mr(address, size_bytes, ACCESS))
        except OSError as error:
            raise common.registration_error(error.errno or 0, what) from error

    def register_dmabuf(self, fd: int, offset: int, address: int, size_bytes: int) -> "_Memory":
        try:
            return _Memory(self._pd.reg_dmabuf_mr(offset, size_bytes, address, fd, ACCESS))
        except OSError as error:
            raise CapacityError(f"{self.info.name}: dma-buf of {size_bytes} bytes: {error}") from error

    def queue_pair(self) -> "_QueuePair":
        try:
            queue = self._context.create_cq(self.depth)
        except OSError as error:
            raise CapacityError(f"{self.info.name}: completion queue: {error}") from error
        attributes = self._lib.QPInitAttr(
            send_cq=queue, recv_cq=queue, qp_type=common.RC, max_send_wr=self.depth, max_recv_wr=1
        )
        try:
            return _QueuePair(self._lib, self, queue, self._pd.create_qp(attributes))
        except OSError as error:
            queue.close()
            raise CapacityError(f"{self.info.name}: queue pair: {error}") from error

    def close(self) -> None:
        if self._closed:
            return
        try:
            self._pd.close()
            self._context.close()
        except OSError as error:
            raise RequestError(
                f"{self.info.name}: {error}; close its memories and queue pairs first"
            ) from error
        self._closed = True


class _Memory:
    def __init__(self, region: Any) -> None:
        self._region = region
        self.lkey: int = region.lkey
        self.rkey: int = region.rkey

    def close(self) -> None:
        self._region.close()  # idempotent; returns when the NIC has let go


class _QueuePair:
    def __init__(self, lib: Any, nic: _Nic, queue: Any, pair: Any) -> None:
        self._lib = lib
        self._nic = nic
        self._queue = queue
        self._pair = pair
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
        mtu = common.mtu_code(min(remote.mtu, info.mtu))
        path = self._lib.QPInfo(remote.qpn, remote.psn, remote.lid, remote.gid, remote.port, mtu)
        with self._lock:
            self._check()
            try:
                self._pair.to_init(info.port, ACCESS)
                self._pair.to_rtr(
                    path,
                    sgid_index=info.gid_index,
                    mtu=mtu,
                    hop_limit=common.HOPS_MAX,
                    min_rnr_timer=common.RNR_TIMER,
                    max_dest_rd_atomic=self._nic.reads,
                )
                self._pair.to_rts(
                    self._local.psn,
                    timeout=TIMEOUT_EXPONENT,
                    retry_cnt=RETRIES,
                    rnr_retry=RNR_RETRIES,
                    max_rd_atomic=self._nic.reads,
                )
            except OSError as error:
                raise PeerGone(f"{info.name}: connecting to {remote.nic}: {error}") from error

    def post(self, works: Sequence[Work]) -> None:
        make, entry = self._lib.SendWR, self._lib.SGE
        chain = [  # read-only objects: made anew for each piece of work
            make(
                work.work_id,
                [entry(work.local, work.size_bytes, work.lkey)],
                OPCODES[work.op],
                SIGNALED,
                work.remote,
                work.rkey,
            )
            for work in works
        ]
        with self._lock:
            self._check()
            try:
                self._pair.post_send(chain)
            except OSError as error:
                raise PeerGone(f"{self._nic.info.name}: post: {error}") from error

    def poll(self, count_max: int) -> list[Done]:
        with self._lock:
            if self._closed or count_max < 1:
                return []
            try:
                completions = self._queue.poll(count_max)
            except OSError as error:
                raise PeerGone(f"{self._nic.info.name}: poll: {error}") from error
        return [_done(completion) for completion in completions]

    def close(self) -> None:
        with self._lock:
            if not self._closed:
                self._pair.close()
                self._queue.close()
                self._closed = True

    def _check(self) -> None:
        if self._closed:
            raise PeerGone(f"{self._nic.info.name}: this queue pair is closed")


def _done(completion: Any) -> Done:
    code = int(completion.status)
    if code == 0:
        return Done(completion.wr_id, common.status_of(0))
    return Done(completion.wr_id, common.status_of(code), common.status_words(code, completion.vendor_err))
