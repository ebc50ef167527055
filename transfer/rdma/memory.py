"""Registered memory of this engine: one registration per NIC, and who is using it."""

import os
import threading
import time
from collections.abc import Callable, Sequence

import structlog

from mooncake.core.errors import CapacityError, MooncakeError, PeerTimeout
from transfer.model import Buffer, Slice
from transfer.registry import is_host
from transfer.verbs.api import Memory, Nic

log = structlog.get_logger(__name__)

HANDLE = "rdma"
"""Of Buffer.handles."""

GPU_ADVICE = "load nvidia-peermem, or a driver that exports dma-bufs; until then copies pass host memory"

ExportDmabuf = Callable[[int, int], tuple[int, int] | None]
"""(address, size_bytes) -> (fd, offset) of device memory, None = not possible. The fd is ours to close."""


class Registration:
    """What Buffer.handles["rdma"] holds."""

    def __init__(self, memories: dict[str, Memory]) -> None:
        """`memories`: by rail name."""
        self.memories = memories
        self.lkeys = {rail: memory.lkey for rail, memory in memories.items()}
        self.rkeys = {rail: memory.rkey for rail, memory in memories.items()}
        self.uses = 0
        self.closing = False


class Memories:
    """Registers buffers on every NIC. Thread-safe."""

    def __init__(self, nics: dict[str, Nic], export_dmabuf: ExportDmabuf | None) -> None:
        """`nics`: by rail name."""
        self._nics = nics
        self._export = export_dmabuf
        self._changed = threading.Condition()
        self._all: set[Registration] = set()

    def register(self, buffer: Buffer) -> None:
        """Register `buffer` where that succeeds; nowhere = not reachable by rdma, which is logged."""
        memories: dict[str, Memory] = {}
        on_device = not is_host(buffer.location)
        exported = self._export(buffer.address, buffer.size_bytes) if on_device and self._export else None
        try:
            for rail, nic in self._nics.items():
                try:
                    memories[rail] = _register(nic, buffer, exported)
                except MooncakeError as error:
                    advice = GPU_ADVICE if on_device else _advice(error)
                    log.warning("rdma.not_registered", nic=rail, error=str(error), advice=advice)
        finally:
            if exported:
                os.close(exported[0])
        if memories:
            made = buffer.handles[HANDLE] = Registration(memories)
            with self._changed:
                self._all.add(made)

    def take(self, slices: Sequence[Slice]) -> dict[int, Registration]:
        """Begin to use the local buffers of `slices`; return those that are registered, by number.

        The caller ends it by `give`.
        """
        taken: dict[int, Registration] = {}
        with self._changed:
            for item in slices:
                found = item.mine.handles.get(HANDLE)
                if item.mine.buffer_id not in taken and found and not found.closing:
                    found.uses += 1
                    taken[item.mine.buffer_id] = found
        return taken

    def give(self, taken: dict[int, Registration]) -> None:
        """End a use."""
        with self._changed:
            for registration in taken.values():
                registration.uses -= 1
            self._changed.notify_all()

    def unregister(self, buffer: Buffer, deadline_s: float) -> None:
        """Refuse new uses, wait for the running ones, deregister; see Transport.unregister.

        Raises:
            PeerTimeout: still in use after `deadline_s`; it stays registered, but takes no new use.
        """
        end_s = time.monotonic() + deadline_s
        with self._changed:
            found = buffer.handles.get(HANDLE)
            if found is None:
                return
            found.closing = True
            while found.uses:
                if not self._changed.wait(max(0.0, end_s - time.monotonic())):
                    raise PeerTimeout(f"buffer {buffer.address:#x}: {found.uses} rdma runs still use it")
            buffer.handles.pop(HANDLE, None)
        self._close(found)

    def close(self) -> None:
        """Deregister everything; no run is under way."""
        for registration in list(self._all):
            self._close(registration)

    def _close(self, registration: Registration) -> None:
        registration.closing = True
        for memory in registration.memories.values():
            memory.close()
        with self._changed:
            self._all.discard(registration)


def _register(nic: Nic, buffer: Buffer, exported: tuple[int, int] | None) -> Memory:
    """Device memory is registered as a dma-buf, else by its address, which nvidia-peermem makes possible."""
    if exported:
        fd, offset = exported
        try:
            return nic.register_dmabuf(fd, offset, buffer.address, buffer.size_bytes)
        except CapacityError as error:
            log.info("rdma.no_dmabuf", nic=nic.info.name, error=str(error))
    return nic.register(buffer.address, buffer.size_bytes)


def _advice(error: MooncakeError) -> str:
    if isinstance(error, CapacityError):
        return "raise the locked-memory limit (ulimit -l unlimited), or register less"
    return "register writable memory of this process"
