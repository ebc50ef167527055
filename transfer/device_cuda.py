"""GPU memory by NVIDIA's driver API (libcuda.so.1, by ctypes): no CUDA toolkit, no torch.

State: written and type-checked against the header of CUDA 13.0 and run against a stand-in library that
was compiled from that header. IT HAS NOT RUN ON A GPU YET.

Contexts are the devices' primary ones, which torch and vLLM use too, so their pointers are valid here;
they are pushed and popped around every call and never left current in the caller's thread. Our streams
do not synchronise with anybody's: see DeviceMemory.
"""

import contextlib
import ctypes
import mmap
import threading
import time
from collections.abc import Iterator
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_uint, c_uint64, c_void_p
from typing import Any, NamedTuple

import structlog

from mooncake.core.errors import CapacityError, IntegrityError, MooncakeError, RequestError
from transfer.device import DeviceCopy, DeviceMemory, HostMemory

LIBRARY = "libcuda.so.1"
POLL_S = (20e-6, 1e-3)
"""First and longest pause between two looks at an event: a 4 MiB copy takes about 80 us."""

_SUCCESS, _INVALID_VALUE, _OUT_OF_MEMORY, _NO_DEVICE, _INVALID_CONTEXT = 0, 1, 2, 100, 201
_ECC_UNCORRECTABLE, _NOT_READY, _NOT_SUPPORTED = 214, 600, 801
_ERRORS: dict[int, type[MooncakeError]] = {
    _INVALID_VALUE: RequestError,
    _OUT_OF_MEMORY: CapacityError,
    _ECC_UNCORRECTABLE: IntegrityError,
}
_MEMORY_TYPE, _DEVICE_ORDINAL = 2, 9  # CU_POINTER_ATTRIBUTE_*
_MEMORY_TYPE_DEVICE = 2
_HOST_ALLOC_PORTABLE = 1  # pinned for every context
_STREAM_NON_BLOCKING = 1
_EVENT_DISABLE_TIMING = 2
_RANGE_HANDLE_DMA_BUF_FD = 1

_PROTOTYPES: dict[str, tuple[Any, ...]] = {
    "cuInit": (c_uint,),
    "cuGetErrorString": (c_int, POINTER(c_char_p)),
    "cuDeviceGetCount": (POINTER(c_int),),
    "cuDeviceGet": (POINTER(c_int), c_int),
    "cuDevicePrimaryCtxRetain": (POINTER(c_void_p), c_int),
    "cuDevicePrimaryCtxRelease_v2": (c_int,),
    "cuCtxPushCurrent_v2": (c_void_p,),
    "cuCtxPopCurrent_v2": (POINTER(c_void_p),),
    "cuStreamCreate": (POINTER(c_void_p), c_uint),
    "cuStreamDestroy_v2": (c_void_p,),
    "cuStreamSynchronize": (c_void_p,),
    "cuEventCreate": (POINTER(c_void_p), c_uint),
    "cuEventDestroy_v2": (c_void_p,),
    "cuEventRecord": (c_void_p, c_void_p),
    "cuEventQuery": (c_void_p,),
    "cuMemHostAlloc": (POINTER(c_void_p), c_size_t, c_uint),
    "cuMemFreeHost": (c_void_p,),
    "cuMemcpyDtoHAsync_v2": (c_void_p, c_uint64, c_size_t, c_void_p),
    "cuMemcpyHtoDAsync_v2": (c_uint64, c_void_p, c_size_t, c_void_p),
    "cuPointerGetAttribute": (c_void_p, c_int, c_uint64),
}
_OPTIONAL_PROTOTYPES: dict[str, tuple[Any, ...]] = {
    "cuMemGetHandleForAddressRange": (c_void_p, c_uint64, c_size_t, c_int, c_uint64),  # CUDA 11.7
}

log = structlog.get_logger(__name__)


def load(library: str = LIBRARY) -> DeviceMemory | None:
    """Return the GPUs of this machine, None where there is no driver or no GPU (the reason is logged)."""
    try:
        return CudaDriver(ctypes.CDLL(library))
    except OSError as error:
        log.info("device.none", reason=str(error))
    except (AttributeError, MooncakeError) as error:  # a driver before our time, or one without a GPU
        log.warning("device.unusable", library=library, reason=str(error))
    return None


class _Gpu(NamedTuple):
    context: c_void_p
    to_host: c_void_p  # a stream each: GPUs have one copy engine per direction
    from_host: c_void_p


class CudaCopy:
    """See DeviceCopy."""

    def __init__(self, driver: "CudaDriver", gpu: _Gpu, event: c_void_p) -> None:
        """`event` was recorded behind the copy."""
        self._driver = driver
        self._gpu = gpu
        self._event: c_void_p | None = event
        self._lock = threading.Lock()

    def wait(self, timeout_s: float) -> bool:
        """See DeviceCopy."""
        end_s = time.monotonic() + timeout_s
        pause_s = POLL_S[0]
        while not self._ended():
            left_s = end_s - time.monotonic()
            if left_s <= 0:
                return False
            time.sleep(min(pause_s, left_s))
            pause_s = min(2 * pause_s, POLL_S[1])
        return True

    def _ended(self) -> bool:
        with self._lock:
            if self._event is None:
                return True
            with self._driver.current(self._gpu.context):
                code = self._driver.code("cuEventQuery", self._event)
                if code == _NOT_READY:
                    return False
                event, self._event = self._event, None
                self._driver.code("cuEventDestroy_v2", event)  # fails only as the query did
            if code:
                raise self._driver.error("cuEventQuery", code)
            return True


class CudaDriver:
    """See DeviceMemory."""

    def __init__(self, library: Any) -> None:
        """Initialise the driver in this process; no context is made before a device's memory is seen.

        Raises:
            AttributeError: the library lacks a function.
            MooncakeError: no GPU, or the driver does not start.
        """
        self._functions: dict[str, Any] = {}
        for name, types in (_PROTOTYPES | _OPTIONAL_PROTOTYPES).items():
            try:
                function = getattr(library, name)
            except AttributeError:
                if name in _PROTOTYPES:
                    raise
                continue
            function.argtypes, function.restype = types, c_int
            self._functions[name] = function
        self._lock = threading.Lock()
        self._gpus: dict[int, _Gpu] = {}
        self._call("cuInit", 0)
        count = c_int()
        self._call("cuDeviceGetCount", byref(count))
        if not count.value:
            raise self.error("cuDeviceGetCount", _NO_DEVICE)

    def code(self, name: str, *arguments: Any) -> int:
        """Call the driver; return its result code. Releases the interpreter lock."""
        return int(self._functions[name](*arguments))

    def error(self, name: str, code: int) -> MooncakeError:
        """Return what `code`, which `name` returned, means."""
        text = c_char_p()
        known = self.code("cuGetErrorString", code, byref(text)) == _SUCCESS
        words = (text.value or b"").decode(errors="replace") if known else "unknown error"
        return _ERRORS.get(code, MooncakeError)(f"{name}: CUDA error {code}: {words}")

    def _call(self, name: str, *arguments: Any) -> None:
        code = self.code(name, *arguments)
        if code:
            raise self.error(name, code)

    @contextlib.contextmanager
    def current(self, context: c_void_p) -> Iterator[None]:
        """Have `context` current in this thread, and what was current before again afterwards."""
        self._call("cuCtxPushCurrent_v2", context)
        try:
            yield
        finally:
            self._call("cuCtxPopCurrent_v2", byref(c_void_p()))

    def _ordinal(self, address: int) -> int | None:
        kind, ordinal = c_uint(), c_int()
        code = self.code("cuPointerGetAttribute", byref(kind), _MEMORY_TYPE, address)
        if code in {_INVALID_VALUE, _INVALID_CONTEXT}:  # memory that CUDA has not heard of
            return None
        if code:
            raise self.error("cuPointerGetAttribute", code)
        if kind.value != _MEMORY_TYPE_DEVICE:
            return None
        self._call("cuPointerGetAttribute", byref(ordinal), _DEVICE_ORDINAL, address)
        return ordinal.value

    def _gpu(self, ordinal: int) -> _Gpu:
        with self._lock:
            gpu = self._gpus.get(ordinal)
            if gpu is None:
                device, context = c_int(), c_void_p()
                self._call("cuDeviceGet", byref(device), ordinal)
                self._call("cuDevicePrimaryCtxRetain", byref(context), device)
                streams = c_void_p(), c_void_p()
                try:
                    with self.current(context):
                        for stream in streams:
                            self._call("cuStreamCreate", byref(stream), _STREAM_NON_BLOCKING)
                except MooncakeError:
                    self.code("cuDevicePrimaryCtxRelease_v2", device)
                    raise
                gpu = self._gpus[ordinal] = _Gpu(context, *streams)
            return gpu

    def _gpu_of(self, address: int) -> _Gpu:
        ordinal = self._ordinal(address)
        if ordinal is None:
            raise RequestError(f"{address:#x} is not the address of device memory")
        return self._gpu(ordinal)

    def device_of(self, address: int) -> str | None:
        """See DeviceMemory."""
        ordinal = self._ordinal(address)
        return None if ordinal is None else f"cuda:{ordinal}"

    def allocate_host(self, size_bytes: int, near: int) -> HostMemory:
        """See DeviceMemory."""
        address = c_void_p()
        with self.current(self._gpu_of(near).context):
            self._call("cuMemHostAlloc", byref(address), size_bytes, _HOST_ALLOC_PORTABLE)
        assert address.value is not None
        array = (ctypes.c_ubyte * size_bytes).from_address(address.value)
        return HostMemory(address.value, memoryview(array).cast("B"))

    def free_host(self, memory: HostMemory) -> None:
        """See DeviceMemory."""
        with self._lock:
            gpu = next(iter(self._gpus.values()))  # any: the memory is portable
        with self.current(gpu.context):
            self._call("cuMemFreeHost", memory.address)

    def copy_to_host(self, host: int, device: int, size_bytes: int) -> DeviceCopy:
        """See DeviceMemory."""
        gpu = self._gpu_of(device)
        return self._copy(gpu, gpu.to_host, "cuMemcpyDtoHAsync_v2", host, device, size_bytes)

    def copy_from_host(self, device: int, host: int, size_bytes: int) -> DeviceCopy:
        """See DeviceMemory."""
        gpu = self._gpu_of(device)
        return self._copy(gpu, gpu.from_host, "cuMemcpyHtoDAsync_v2", device, host, size_bytes)

    def _copy(self, gpu: _Gpu, stream: c_void_p, name: str, target: int, source: int, size: int) -> CudaCopy:
        event = c_void_p()
        with self.current(gpu.context):
            self._call("cuEventCreate", byref(event), _EVENT_DISABLE_TIMING)
            try:
                self._call(name, target, source, size, stream)
                try:
                    self._call("cuEventRecord", event, stream)
                except MooncakeError:
                    self.code("cuStreamSynchronize", stream)  # nothing may be under way when we raise
                    raise
            except MooncakeError:
                self.code("cuEventDestroy_v2", event)
                raise
        return CudaCopy(self, gpu, event)

    def export_dmabuf(self, address: int, size_bytes: int) -> tuple[int, int] | None:
        """See DeviceMemory. Needs CUDA 11.7 and the open kernel modules."""
        if "cuMemGetHandleForAddressRange" not in self._functions:
            return None
        gpu = self._gpu_of(address)
        page = mmap.PAGESIZE
        start = address // page * page
        size = -(-(address + size_bytes - start) // page) * page
        fd = c_int(-1)
        with self.current(gpu.context):
            code = self.code(
                "cuMemGetHandleForAddressRange", byref(fd), start, size, _RANGE_HANDLE_DMA_BUF_FD, 0
            )
        if code in {_INVALID_VALUE, _NOT_SUPPORTED}:
            return None
        if code:
            raise self.error("cuMemGetHandleForAddressRange", code)
        return fd.value, address - start

    def close(self) -> None:
        """See DeviceMemory. No copy is under way and all pinned memory is freed."""
        with self._lock:
            gpus, self._gpus = self._gpus, {}
            for ordinal, gpu in gpus.items():
                device = c_int()
                with contextlib.suppress(MooncakeError):  # a driver that is going down with the process
                    with self.current(gpu.context):
                        self._call("cuStreamDestroy_v2", gpu.to_host)
                        self._call("cuStreamDestroy_v2", gpu.from_host)
                    self._call("cuDeviceGet", byref(device), ordinal)
                    self._call("cuDevicePrimaryCtxRelease_v2", device)
