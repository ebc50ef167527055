"""A libcuda in Python behind the C calling convention: host memory that says it is a GPU's."""

import ctypes
import mmap
from ctypes import CFUNCTYPE, POINTER, c_char_p, c_int, c_void_p, cast
from typing import Any

from transfer.device_cuda import _OPTIONAL_PROTOTYPES, _PROTOTYPES

NOT_READY = 600


class FakeCuda:
    """Every function counts its calls; `codes[name]` is what it returns instead of working."""

    def __init__(self, gpus: int = 2, without: tuple[str, ...] = ()) -> None:
        self.gpus = gpus
        self.codes: dict[str, int] = {}
        self.calls: list[str] = []
        self.current: list[int] = []
        self.retained: dict[int, int] = {}
        self.device_memory: dict[int, tuple[memoryview, int]] = {}  # address -> bytes, GPU
        self.pinned: dict[int, Any] = {}
        self.handles: set[int] = set()  # streams and events
        self.not_ready = 0  # how many more queries say so
        self._next_handle = 0x1000
        for name, types in (_PROTOTYPES | _OPTIONAL_PROTOTYPES).items():
            if name not in without:
                kind = CFUNCTYPE(
                    c_int, *(c_void_p if "P" in str(t) and t is not c_char_p else t for t in types)
                )
                setattr(self, name, kind(self._wrap(name)))

    def _wrap(self, name: str) -> Any:
        def function(*arguments: Any) -> int:
            self.calls.append(name)
            if name in self.codes:
                return self.codes[name]
            return getattr(self, f"_{name}", lambda *_: 0)(*arguments) or 0

        return function

    def device_allocate(self, size_bytes: int, gpu: int) -> int:
        view = memoryview(mmap.mmap(-1, size_bytes))
        address = ctypes.addressof(ctypes.c_char.from_buffer(view))
        self.device_memory[address] = (view, gpu)
        return address

    def _handle(self, target: int) -> None:
        self._next_handle += 1
        self.handles.add(self._next_handle)
        cast(target, POINTER(c_void_p))[0] = self._next_handle

    def _cuGetErrorString(self, code: int, target: int) -> int:
        if code == 999:
            return 1
        cast(target, POINTER(c_char_p))[0] = b"words for %d" % code
        return 0

    def _cuDeviceGetCount(self, target: int) -> None:
        cast(target, POINTER(c_int))[0] = self.gpus

    def _cuDeviceGet(self, target: int, ordinal: int) -> None:
        cast(target, POINTER(c_int))[0] = 40 + ordinal

    def _cuDevicePrimaryCtxRetain(self, target: int, device: int) -> None:
        self.retained[device] = self.retained.get(device, 0) + 1
        cast(target, POINTER(c_void_p))[0] = 0xC000 + device

    def _cuDevicePrimaryCtxRelease_v2(self, device: int) -> None:
        self.retained[device] -= 1

    def _cuCtxPushCurrent_v2(self, context: int) -> None:
        self.current.append(context)

    def _cuCtxPopCurrent_v2(self, target: int) -> None:
        cast(target, POINTER(c_void_p))[0] = self.current.pop()

    def _cuStreamCreate(self, target: int, flags: int) -> None:
        assert flags == 1
        self._handle(target)

    def _cuEventCreate(self, target: int, flags: int) -> None:
        assert flags == 2
        self._handle(target)

    def _cuStreamDestroy_v2(self, handle: int) -> None:
        self.handles.remove(handle)

    def _cuEventDestroy_v2(self, handle: int) -> None:
        self.handles.remove(handle)

    def _cuEventRecord(self, event: int, stream: int) -> None:
        assert {event, stream} <= self.handles

    def _cuEventQuery(self, event: int) -> int:
        assert event in self.handles
        self.not_ready -= 1
        return NOT_READY if self.not_ready >= 0 else 0

    def _cuMemHostAlloc(self, target: int, size: int, flags: int) -> None:
        assert flags == 1
        array = (ctypes.c_ubyte * size)()
        self.pinned[ctypes.addressof(array)] = array
        cast(target, POINTER(c_void_p))[0] = ctypes.addressof(array)

    def _cuMemFreeHost(self, address: int) -> None:
        del self.pinned[address]

    def _cuMemcpyDtoHAsync_v2(self, host: int, device: int, size: int, stream: int) -> None:
        assert stream in self.handles
        assert self.current
        ctypes.memmove(host, device, size)

    def _cuMemcpyHtoDAsync_v2(self, device: int, host: int, size: int, stream: int) -> None:
        assert stream in self.handles
        assert self.current
        ctypes.memmove(device, host, size)

    def _gpu_of(self, address: int) -> int | None:
        for base, (view, gpu) in self.device_memory.items():
            if base <= address < base + view.nbytes:
                return gpu
        return None

    def _cuPointerGetAttribute(self, target: int, attribute: int, address: int) -> int:
        gpu = self._gpu_of(address)
        if gpu is None and address not in self.pinned:
            return 1
        answer = {2: 1 if gpu is None else 2, 9: gpu}[attribute]
        assert answer is not None
        cast(target, POINTER(c_int))[0] = answer
        return 0

    def _cuMemGetHandleForAddressRange(
        self, target: int, start: int, size: int, kind: int, flags: int
    ) -> int:
        assert (kind, flags) == (1, 0)
        self.exported = (start, size)
        if start % mmap.PAGESIZE or size % mmap.PAGESIZE:
            return 1
        cast(target, POINTER(c_int))[0] = 77
        return 0
