"""Device memory over transports that know only host memory: through pinned chunks, if no NIC reaches it."""

import ctypes
import threading
from collections.abc import Sequence
from typing import Any

from mooncake.core.cpu import has_gpu
from mooncake.core.errors import MooncakeError, PeerGone
from transfer.device import DeviceMemory, Stager
from transfer.device_cuda import load
from transfer.messages import BufferInfo
from transfer.model import Buffer, Call, Failure, Opcode, Slice, Transport

STAND_IN = Buffer(0, 1, 1, "cpu:0", b"", memoryview(bytearray(1)))
"""Asks a transport whether it would reach the peer's buffer from host memory."""


class Devices:
    """The accelerators of this process, looked for when the first buffer may need them."""

    def __init__(self, device: DeviceMemory | None = None) -> None:
        """`device` is for tests; None = NVIDIA's driver where there is a GPU."""
        self._lock = threading.Lock()
        self._device = device
        self._stager = Stager(device) if device else None
        self._looked = device is not None

    def _look(self) -> None:
        with self._lock:
            if self._looked:
                return
            self._looked = True
            self._device = load() if has_gpu() else None
            self._stager = Stager(self._device) if self._device else None

    def location_of(self, address: int) -> str:
        """Return "cuda:N" for an address of device memory, else "*"."""
        self._look()
        return (self._device.device_of(address) if self._device else None) or "*"

    def stager(self) -> Stager | None:
        """Return what moves device memory; None without devices."""
        self._look()
        return self._stager

    def export_dmabuf(self, address: int, size_bytes: int) -> tuple[int, int] | None:
        """See DeviceMemory; None without devices."""
        self._look()
        return self._device.export_dmabuf(address, size_bytes) if self._device else None

    def close(self) -> None:
        """Unpin everything and let go of the driver.

        Raises:
            PeerTimeout: a copy does not end.
        """
        if self._stager:
            self._stager.close()
        if self._device:
            self._device.close()


class StagedTransport:
    """model.Transport: `inner` for host memory, staging for device memory of this process."""

    def __init__(self, inner: Transport, devices: Devices) -> None:
        """`inner` moves host memory."""
        self.name = inner.name
        self.judges_itself = inner.judges_itself
        self._inner = inner
        self._devices = devices

    def register(self, buffer: Buffer) -> None:
        """See model.Transport."""
        self._inner.register(buffer)

    def unregister(self, buffer: Buffer, deadline_s: float) -> None:
        """See model.Transport."""
        self._inner.unregister(buffer, deadline_s)

    def describe(self, info: dict[str, Any]) -> None:
        """See model.Transport."""
        self._inner.describe(info)

    def reaches(self, peer: Any, mine: Buffer, theirs: BufferInfo) -> bool:
        """See model.Transport."""
        if mine.view is not None:
            return self._inner.reaches(peer, mine, theirs)
        return self._devices.stager() is not None and self._inner.reaches(peer, STAND_IN, theirs)

    def lanes(self, peer: Any) -> int:
        """See model.Transport."""
        return self._inner.lanes(peer)

    def run(self, peer: Any, op: Opcode, slices: Sequence[Slice], call: Call) -> list[Failure]:
        """See model.Transport."""
        if len(slices) == 1 and slices[0].mine.view is not None:
            return self._inner.run(peer, op, slices, call)
        if all(piece.mine.view is not None for piece in slices):
            return self._inner.run(peer, op, slices, call)
        host = [piece for piece in slices if piece.mine.view is not None]
        failures = self._inner.run(peer, op, host, call) if host else []
        for piece in slices:
            if piece.mine.view is None:
                failures += self._run_staged(peer, op, piece, call)
        return failures

    def _run_staged(self, peer: Any, op: Opcode, piece: Slice, call: Call) -> list[Failure]:
        stager = self._devices.stager()
        if stager is None:
            return [Failure(piece, PeerGone(f"{piece.mine.location}: no driver here"))]

        def move(chunk: memoryview, offset: int) -> None:
            address = ctypes.addressof(ctypes.c_ubyte.from_buffer(chunk))
            pinned = Buffer(0, address, len(chunk), "cpu:0", b"", chunk)
            part = Slice(piece.index, address, piece.remote + offset, len(chunk), pinned, piece.theirs)
            for failure in self._inner.run(peer, op, [part], call):
                raise failure.error

        stage = stager.stage_out if op is Opcode.WRITE else stager.stage_in
        try:
            stage(piece.local, piece.size_bytes, move, call)
        except MooncakeError as error:
            return [Failure(piece, error)]
        return []

    def forget(self, peer: Any) -> None:
        """See model.Transport."""
        self._inner.forget(peer)

    def close(self) -> None:
        """See model.Transport."""
        self._inner.close()
