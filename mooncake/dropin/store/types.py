"""Classes of `mooncake.store` that hold values: names, fields and numbers are upstream's (0.3.13.post1)."""

import enum
from collections.abc import Sequence

import numpy as np

from kvstore.client.model import Place
from mooncake.core.errors import RequestError

OK = 0
INTERNAL = -1
NO_AVAILABLE_HANDLE = -200
INVALID_PARAMS = -600
OBJECT_NOT_FOUND = -704
OBJECT_ALREADY_EXISTS = -705
OBJECT_HAS_LEASE = -706
TRANSFER_FAIL = -800
RPC_FAIL = -900
TASK_NOT_FOUND = -1400
TENANT_QUOTA_EXCEEDED = -1700
TENANT_NOT_REGISTERED = -1701
TENANT_NOT_EMPTY = -1702
"""Upstream's ErrorCode, those that occur here."""


class ObjectDataType(enum.IntEnum):
    """What an object is, for statistics."""

    UNKNOWN = 0
    KVCACHE = 1
    TENSOR = 2
    WEIGHT = 3
    SAMPLE = 4
    ACTIVATION = 5
    GRADIENT = 6
    OPTIMIZER_STATE = 7
    METADATA = 8
    GENERAL = 9


class SoftPinAction(enum.IntEnum):
    """What a put does about the soft pin of its object."""

    PRESERVE = 0
    ENABLE = 1
    DISABLE = 2


class ReplicaStatus(enum.IntEnum):
    """State of one copy; whatever is found here is COMPLETE."""

    UNDEFINED = 0
    INITIALIZED = 1
    PROCESSING = 2
    COMPLETE = 3
    REMOVED = 4
    FAILED = 5


class TaskStatus(enum.IntEnum):
    """State of a copy or move task."""

    PENDING = 0
    PROCESSING = 1
    FAILED = 2
    SUCCESS = 3


class TaskType(enum.IntEnum):
    """What a task does."""

    REPLICA_COPY = 0
    REPLICA_MOVE = 1


ACTIVATION, GENERAL, GRADIENT = ObjectDataType.ACTIVATION, ObjectDataType.GENERAL, ObjectDataType.GRADIENT
KVCACHE, METADATA, SAMPLE = ObjectDataType.KVCACHE, ObjectDataType.METADATA, ObjectDataType.SAMPLE
OPTIMIZER_STATE, TENSOR = ObjectDataType.OPTIMIZER_STATE, ObjectDataType.TENSOR
UNKNOWN, WEIGHT = ObjectDataType.UNKNOWN, ObjectDataType.WEIGHT
UNDEFINED, INITIALIZED = ReplicaStatus.UNDEFINED, ReplicaStatus.INITIALIZED
COMPLETE, REMOVED = ReplicaStatus.COMPLETE, ReplicaStatus.REMOVED
PENDING, PROCESSING = TaskStatus.PENDING, TaskStatus.PROCESSING
SUCCESS, FAILED = TaskStatus.SUCCESS, TaskStatus.FAILED
REPLICA_COPY, REPLICA_MOVE = TaskType.REPLICA_COPY, TaskType.REPLICA_MOVE
"""As pybind exports them into upstream's module; of two enums with one name, the later one."""


TaskId = tuple[int, int]
"""Two numbers of 64 bits."""


class QueryTaskResponse:
    """How far a task is."""

    def __init__(self) -> None:
        """Nothing is known yet."""
        self.id: TaskId = (0, 0)
        self.type = TaskType.REPLICA_COPY
        self.status = TaskStatus.PENDING
        self.created_at_ms_epoch = 0
        self.last_updated_at_ms_epoch = 0
        self.assigned_client: TaskId = (0, 0)
        self.message = ""

    def __repr__(self) -> str:
        return (
            f"QueryTaskResponse(id={self.id[0]}-{self.id[1]}, type={self.type:d}, status={self.status:d}, "
            f"created_at={self.created_at_ms_epoch}, last_updated_at={self.last_updated_at_ms_epoch}, "
            f'assigned_client={self.assigned_client[0]}-{self.assigned_client[1]}, message="{self.message}")'
        )


class ReplicateConfig:
    """How an object is kept; the fields are plain attributes, as upstream's."""

    def __init__(self) -> None:
        """One copy, no pin."""
        self.replica_num = 1
        self.nof_replica_num = 0
        self.dfs_replica_num = 0
        self.soft_pin_action = SoftPinAction.PRESERVE
        self.soft_pin_ttl_ms: int | None = None
        self.with_hard_pin = False
        self.preferred_segment = ""
        self.preferred_segments: list[str] = []
        self.preferred_nof_segments: list[str] = []
        self.prefer_alloc_in_same_node = False
        self.group_ids: list[str] | None = None
        self.data_type = ObjectDataType.UNKNOWN

    @property
    def with_soft_pin(self) -> bool:
        """What older integrations set instead of soft_pin_action."""
        return self.soft_pin_action is SoftPinAction.ENABLE

    @with_soft_pin.setter
    def with_soft_pin(self, on: bool) -> None:
        self.soft_pin_action = SoftPinAction.ENABLE if on else SoftPinAction.PRESERVE

    def __str__(self) -> str:
        ttl = "default" if self.soft_pin_ttl_ms is None else str(self.soft_pin_ttl_ms)
        return (
            f"ReplicateConfig: {{ replica_num: {self.replica_num}, nof_replica_num: {self.nof_replica_num}, "
            f"dfs_replica_num: {self.dfs_replica_num}, soft_pin_action: {self.soft_pin_action.name}, "
            f"soft_pin_ttl_ms: {ttl}, with_hard_pin: {int(self.with_hard_pin)}, "
            f"preferred_segments: [{', '.join(segments_of(self))}], "
            f"preferred_nof_segments: [{', '.join(self.preferred_nof_segments)}], "
            f"prefer_alloc_in_same_node: {int(self.prefer_alloc_in_same_node)}, "
            f"data_type: {self.data_type.name} }}"
        )


def segments_of(config: ReplicateConfig) -> list[str]:
    """Return the preferred segments, the one that was named alone first."""
    return [*([config.preferred_segment] if config.preferred_segment else []), *config.preferred_segments]


class BufferHandle(bytearray):
    """An object in memory of this process: a buffer (memoryview, bytes, numpy) with upstream's two calls."""

    def size(self) -> int:
        """Return how many bytes it has."""
        return len(self)

    def ptr(self) -> int:
        """Return its address; it stays there as long as the handle lives."""
        return int(np.frombuffer(self, np.uint8).__array_interface__["data"][0])


class Descriptor:
    """Where a copy in memory lies."""

    def __init__(self, size: int = 0, buffer_address: int = 0, transport_endpoint: str = "") -> None:
        """Made by get_replica_desc."""
        self.size = size
        self.buffer_address = buffer_address
        self.transport_endpoint = transport_endpoint


class MemoryDescriptor:
    """A copy in memory."""

    def __init__(self, buffer_descriptor: Descriptor) -> None:
        """Made by ReplicaDescriptor."""
        self.buffer_descriptor = buffer_descriptor


class DiskDescriptor:
    """A copy on the SSD of a store; `file_path` is empty, for no other process could open it."""

    def __init__(self, object_size: int, file_path: str = "") -> None:
        """Made by ReplicaDescriptor."""
        self.object_size = object_size
        self.file_path = file_path


class ReplicaDescriptor:
    """One copy of an object."""

    def __init__(self, place: Place) -> None:
        """Made by get_replica_desc."""
        self._place = place
        self.status = ReplicaStatus.COMPLETE

    def is_memory_replica(self) -> bool:
        """Whether it is in a store's memory."""
        return self._place.in_memory

    def is_local_disk_replica(self) -> bool:
        """Whether it is on a store's SSD."""
        return not self._place.in_memory

    def is_disk_replica(self) -> bool:
        """Whether it is in a shared file system: never."""
        return False

    def get_memory_descriptor(self) -> MemoryDescriptor:
        """Return where it lies.

        Raises:
            RequestError: it is not in memory.
        """
        place = self._place
        if not place.in_memory:
            raise RequestError("Expected MemoryDescriptor")
        return MemoryDescriptor(Descriptor(place.size_bytes, place.address, place.transfer))

    def get_disk_descriptor(self) -> DiskDescriptor:
        """Return what is known of a copy on SSD.

        Raises:
            RequestError: it is in memory.
        """
        if self._place.in_memory:
            raise RequestError("Expected DiskDescriptor")
        return DiskDescriptor(self._place.size_bytes)


def descriptors(places: Sequence[Place]) -> list[ReplicaDescriptor]:
    """Return the descriptors of an object's copies, those in memory first."""
    return [ReplicaDescriptor(place) for place in sorted(places, key=lambda place: not place.in_memory)]
