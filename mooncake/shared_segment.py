"""`mooncake.shared_segment`: tensors in host memory that all ranks of one host share, allocated once.

One rank owns the memory, all map it (mooncake.engine.SharedSegment); who writes what when is the callers'.
Every rank makes the same call:

    segment = create_shared_segment(
        "kv",
        blocks={"k": {"count": layers, "shape": (pages, 64), "dtype": torch.bfloat16}},
        world_size=2, rank_id=rank, comm_group=group,
    )
    caches = segment.tensors("k")

Needs torch. Memory of devices (`mmap=False`, `host_register=True`) is refused: it needs Ascend hardware.
"""

import ctypes
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import torch
import torch.distributed as dist

from mooncake.core.errors import MooncakeError, PeerGone, RequestError
from mooncake.engine import SharedSegment as Memory

__all__ = ["SharedSegment", "SharedSegmentError", "create_shared_segment", "shared_segment_supported"]

SharedSegmentError = MooncakeError
"""What every error here is one of; upstream's name for it."""
ALIGN_BYTES = 4096
DONE, FAILED = b"+", b"-"


class Block(msgspec.Struct, frozen=True):
    """`count` tensors of one kind, one behind the other, each at a page of its own."""

    count: int
    shape: tuple[int, ...]
    dtype: Any
    item_bytes: int
    offset: int = 0

    @property
    def stride_bytes(self) -> int:
        """From one tensor to the next."""
        return self.item_bytes + -self.item_bytes % ALIGN_BYTES


class SharedSegment:
    """One rank's view of the memory; it stays mapped as long as this or a tensor of it lives."""

    def __init__(self, memory: Memory, blocks: Mapping[str, Block]) -> None:
        """Made by create_shared_segment."""
        self._memory = memory
        self._blocks = blocks

    def tensors(self, block: str) -> list[Any]:
        """Return the tensors of a block, in order; they are the shared memory itself.

        Raises:
            RequestError: there is no such block.
        """
        kind = self._blocks.get(block)
        if kind is None:
            raise RequestError(f"no block {block!r}: there are {', '.join(self._blocks)}")
        at = self.base_addr() + kind.offset
        return [self._tensor(at + index * kind.stride_bytes, kind) for index in range(kind.count)]

    def _tensor(self, address: int, kind: Block) -> Any:
        memory: Any = (ctypes.c_ubyte * kind.item_bytes).from_address(address)
        memory.segment = self  # the tensor keeps its memory, and so the mapping
        return torch.frombuffer(memory, dtype=kind.dtype).reshape(kind.shape)

    def base_addr(self) -> int:
        """Return where the memory is in this process."""
        return self._memory.base_addr()

    def total_size(self) -> int:
        """Return its bytes."""
        return self._memory.size()


def shared_segment_supported(mmap: bool = True, host_register: bool = False) -> bool:
    """Return whether create_shared_segment takes these flags."""
    return Memory.supported(mmap, host_register)


def create_shared_segment(
    name: str,
    blocks: Mapping[str, Mapping[str, Any]],
    world_size: int,
    rank_id: int,
    owner_rank: int = 0,
    device_id: int | None = None,
    comm_group: Any = None,
    mmap: bool = True,
    host_register: bool = False,
    *,
    tp_group: Any = None,
) -> SharedSegment:
    """Return the segment, mapped, when all ranks have it.

    Args:
        name: the same in all ranks, as all that follows.
        blocks: for each name "count", "shape" and "dtype" (torch's) of its tensors.
        world_size: number of ranks, all on this host.
        rank_id: which one this is.
        owner_rank: which one allocates.
        device_id: ignored: no device maps the memory.
        comm_group: torch process group of the ranks that works on CPU tensors, or vLLM's GroupCoordinator;
            not needed by one rank alone. Its timeout is the deadline of this call.
        mmap: must be True.
        host_register: must be False.
        tp_group: older name of comm_group.

    Raises:
        RequestError: ranks disagree, or one has failed; every rank is told then.
        PeerGone: a rank did not come.
    """
    if comm_group is not None and tp_group is not None and comm_group is not tp_group:
        raise RequestError("give comm_group only: tp_group is its older name")
    group = comm_group if comm_group is not None else tp_group
    group = getattr(group, "cpu_group", group)
    if world_size > 1 and group is None:
        raise RequestError(f"shared segment {name}: {world_size} ranks need a comm_group")
    if not shared_segment_supported(mmap, host_register):
        raise RequestError(f"shared segment {name}: only mmap=True, host_register=False without Ascend NPUs")
    laid: dict[str, Block] = {}
    memory = None
    try:
        laid, size_bytes = _layout(blocks)
        memory, blob = Memory.create(
            _tagged(name, laid), size_bytes, world_size, rank_id, owner_rank, device_id or 0
        )
        mine = DONE + blob
    except MooncakeError as error:
        mine = FAILED + str(error).encode()
    blobs = _agree(name, mine, world_size, group)
    assert memory is not None, "or this rank has told so, and raised"
    try:
        memory.complete(blobs)
        mine = DONE
    except MooncakeError as error:
        mine = FAILED + str(error).encode()
    _agree(name, mine, world_size, group)  # the owner may go on only when all have mapped it
    return SharedSegment(memory, laid)


def _layout(blocks: Mapping[str, Mapping[str, Any]]) -> tuple[dict[str, Block], int]:
    laid: dict[str, Block] = {}
    end = 0
    for name in sorted(blocks):
        block = _block(name, blocks[name])
        laid[name] = msgspec.structs.replace(block, offset=end)
        end += block.count * block.stride_bytes
    if not laid:
        raise RequestError("a shared segment needs a block")
    return laid, end


def _block(name: str, spec: Mapping[str, Any]) -> Block:
    try:
        count, shape, dtype = int(spec["count"]), tuple(int(one) for one in spec["shape"]), spec["dtype"]
        item = torch.empty(0, dtype=dtype).element_size()
    except (KeyError, TypeError, ValueError) as error:
        raise RequestError(f"block {name!r} needs count, shape and dtype: {error}") from error
    if count <= 0 or not shape or min(shape) <= 0:
        raise RequestError(f"block {name!r}: count {count} and shape {shape} must be positive")
    for length in shape:
        item *= length
    return Block(count, shape, dtype, item)


def _tagged(name: str, laid: Mapping[str, Block]) -> str:
    """Return a name that ranks with another layout do not have; it must be short."""
    text = ";".join(f"{key}:{one.count}:{one.shape}:{one.dtype}" for key, one in laid.items())
    return f"{name[:64]}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def _agree(name: str, mine: bytes, world_size: int, group: Any) -> list[bytes]:
    """Return what all ranks say, without the mark; raises when one has failed."""
    told = _gather(mine, group) if world_size > 1 else [mine]
    failed = [f"rank {rank}: {one[1:].decode()}" for rank, one in enumerate(told) if one[:1] == FAILED]
    if failed or len(told) != world_size:
        raise RequestError(f"shared segment {name}: {'; '.join(failed) or f'{len(told)} ranks in the group'}")
    return [one[1:] for one in told]


def _gather(mine: bytes, group: Any) -> list[bytes]:
    """Give bytes to all ranks and get theirs; all_gather_object would pickle them."""
    try:
        ranks = dist.get_world_size(group)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(ranks)]
        dist.all_gather(sizes, torch.tensor([len(mine)]), group=group)
        lengths: Sequence[int] = [int(size) for size in sizes]
        rows = [torch.zeros(max(lengths), dtype=torch.uint8) for _ in lengths]
        row = torch.zeros(max(lengths), dtype=torch.uint8)
        row[: len(mine)] = torch.frombuffer(bytearray(mine), dtype=torch.uint8)
        dist.all_gather(rows, row, group=group)
    except (RuntimeError, ValueError) as error:
        raise PeerGone(f"the ranks of a shared segment did not meet: {error}") from error
    return [bytes(one[:length].numpy()) for one, length in zip(rows, lengths, strict=True)]
