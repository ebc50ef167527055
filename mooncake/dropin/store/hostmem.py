"""Host memory by address, as SGLang's and LMCache's allocators take it from `mooncake.store`."""

import ctypes
import mmap
import operator
import os
import threading
from pathlib import Path

import numpy as np
import structlog

from mooncake.core.errors import CapacityError, RequestError

NODES = Path("/sys/devices/system/node")
MPOL_PREFERRED = 1
SYS_SET_MEMPOLICY = {"x86_64": 238, "aarch64": 237}
"""glibc has no function for it, and libnuma is not everywhere."""

log = structlog.get_logger(__name__)
_lock = threading.Lock()
_live: dict[int, "np.ndarray[tuple[int], np.dtype[np.uint8]]"] = {}
"""By address, of the process as upstream's: memory outlives the allocator that gave it."""


class MooncakeHostMemAllocator:
    """Whole pages, zeroed, from the system; any store of this process can register and use them."""

    def alloc(self, arg0: int, /) -> int:
        """Return the address of so many bytes.

        Raises:
            RequestError: not a positive number; CapacityError: the machine has not that much.
        """
        size = operator.index(arg0)
        if size <= 0:
            raise RequestError(f"alloc({size}): a positive number of bytes")
        try:
            array = np.frombuffer(mmap.mmap(-1, size), np.uint8)
        except (OSError, OverflowError, ValueError) as error:
            raise CapacityError(f"alloc({size}): {error}") from error
        address = int(array.__array_interface__["data"][0])
        with _lock:
            _live[address] = array
        return address

    def free(self, arg0: int, /) -> int:
        """Give back what `alloc` returned, registered nowhere any more; -1: that was not the address."""
        with _lock:
            return -1 if _live.pop(arg0, None) is None else 0


def get_alloc_func_addr() -> int:
    """Return the address of a C function `void *(size_t)` that gives page-aligned memory."""
    return _address("valloc")


def get_free_func_addr() -> int:
    """Return the address of the C function `void (void *)` that takes it back."""
    return _address("free")


def _address(name: str) -> int:
    return ctypes.cast(getattr(ctypes.CDLL(None), name), ctypes.c_void_p).value or 0


def bind_to_numa_node(node: int) -> None:
    """Let this thread run on the cores of a NUMA node, and prefer its memory.

    As upstream: a node that is not there, or a system that refuses, is one line of log and no error.
    """
    try:
        cores = _cores((NODES / f"node{operator.index(node)}" / "cpulist").read_text())
        usable = cores & os.sched_getaffinity(0)
        if not usable:
            log.warning("mooncake.store: no core of this NUMA node may be used", node=node)
            return
        os.sched_setaffinity(0, usable)
    except (OSError, ValueError) as error:
        log.warning("mooncake.store: not bound to a NUMA node", node=node, reason=str(error))
        return
    try:
        _prefer_memory_of(node)
    except OSError as error:  # containers often may not
        log.warning("mooncake.store: memory of any NUMA node", node=node, reason=str(error))


def _cores(text: str) -> set[int]:
    """Return the cores of a list like "0-3,8"."""
    cores: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        cores.update(range(int(first), int(last or first) + 1))
    return cores


def _prefer_memory_of(node: int) -> None:
    number = SYS_SET_MEMPOLICY.get(os.uname().machine)
    if number is None:
        raise OSError(f"memory policy: unknown on {os.uname().machine}")
    bits = 64 * (node // 64 + 1)
    words = [0] * (bits // 64)
    words[node // 64] = 1 << node % 64
    mask = (ctypes.c_ulong * len(words))(*words)
    libc = ctypes.CDLL(None, use_errno=True)
    # the kernel reads one bit less than it is told
    if libc.syscall(number, MPOL_PREFERRED, ctypes.byref(mask), ctypes.c_ulong(bits + 1)):
        raise OSError(ctypes.get_errno(), f"memory policy: {os.strerror(ctypes.get_errno())}")
