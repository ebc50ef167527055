"""A pool in memory, and requests and steps shaped like vLLM's, for both halves of the connector."""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from mooncake.core.errors import MooncakeError
from mooncake.core.keys import block_checksum, chain, context_root, prompt_keys, tail_key
from mooncake.core.messages import Acquired, Block

BLOCK_SIZE = 4
ROOT = context_root({"model": "test"})


class FakePulse:
    """Counters in a dict."""

    def __init__(self) -> None:
        self.counts: dict[str, float] = {}

    def add(self, name: str, amount: float) -> None:
        self.counts[name] = self.counts.get(name, 0) + amount

    def __getitem__(self, name: str) -> float:
        return self.counts.get(name, 0)


class FakePool:
    """Shaped like kvstore's PoolClient as both halves use it; keeps every call it gets."""

    def __init__(self, size_bytes: int = 1 << 16, block_bytes: int = 64) -> None:
        self.memory = bytearray(size_bytes)
        self.block_bytes = block_bytes
        self.held: dict[bytes, Block] = {}
        self.answering = True
        self.fetched = (0, 0.0)  # bytes, seconds: of the next answers
        self.errors: dict[str, Exception] = {}
        self.late = False  # reservations have ended before they are committed
        self.calls: dict[bytes, Any] = {}
        self.lookups: list[tuple[list[bytes], float, float]] = []
        self.sources: list[str] = []
        self.handed_over: list[tuple[list[bytes], str]] = []
        self.depths: list[int] = []  # of each reserve
        self.leases: set[int] = set()
        self.released: list[int] = []
        self.forgotten: list[bytes] = []
        self.bad: list[bytes] = []
        self.committed: list[bytes] = []
        self.abandoned: list[int] = []
        self.tickets: dict[int, tuple[bytes, int]] = {}
        self._next = 1

    def _number(self) -> int:
        self._next += 1
        return self._next

    def _maybe_fail(self, method: str) -> None:
        if error := self.errors.get(method):
            raise error

    def hold(self, keys: list[bytes]) -> None:
        """Put complete blocks under `keys` (bytes derived from the key)."""
        for key in keys:
            self.put(key, (key * (self.block_bytes // len(key) + 1))[: self.block_bytes])

    def put(self, key: bytes, data: bytes) -> None:
        offset = self._number() * self.block_bytes
        self.memory[offset : offset + len(data)] = data
        self.held[key] = Block(offset, len(data), block_checksum(key, data))

    # ------------------------------------------------------------ look-up

    def begin_acquire(self, keys: list[bytes], lease_s: float, wait_s: float, source: str = "") -> bytes:
        self._maybe_fail("begin_acquire")
        self.sources.append(source)
        self.lookups.append((list(keys), lease_s, wait_s))
        call = self._number().to_bytes(8, "little")
        self.calls[call] = list(keys)
        return call

    def hand_over(self, keys: list[bytes], target: str) -> None:
        self._maybe_fail("hand_over")
        self.handed_over.append((list(keys), target))

    def poll(self, call: bytes) -> bool:
        assert call in self.calls
        self._maybe_fail("poll")
        return self.answering

    def forget(self, call: bytes) -> None:
        self.forgotten.append(call)
        self.calls.pop(call)

    def finish_acquired(self, call: bytes, deadline_s: float) -> Acquired:
        keys = self.calls.pop(call)
        self._maybe_fail("finish_acquired")
        found = []
        for key in keys:
            if key not in self.held:
                break
            found.append(self.held[key])
        if not found:
            return Acquired(0, [])
        lease = self._number()
        self.leases.add(lease)
        return Acquired(lease, found, [], *self.fetched)

    def release(self, lease_id: int) -> None:
        self._maybe_fail("release")
        assert lease_id in self.leases, f"lease {lease_id} is not held"
        self.leases.remove(lease_id)
        self.released.append(lease_id)

    # ------------------------------------------------------------ bytes

    def view(self, offset: int, size_bytes: int) -> memoryview:
        self._maybe_fail("view")
        if offset + size_bytes > len(self.memory):
            raise MooncakeError("outside of the segment")
        return memoryview(self.memory)[offset : offset + size_bytes]

    def begin_reserve(self, keys: list[bytes], size_bytes: int, *, depth: int = -1) -> Any:
        self._maybe_fail("begin_reserve")
        assert size_bytes == self.block_bytes
        self.depths.append(depth)
        return list(keys)

    def finish_reserve(self, call: Any, deadline_s: float) -> list[Any]:
        self._maybe_fail("finish_reserve")
        slots: list[Any] = []
        for key in call:
            if key in self.held or any(key == other for other, _ in self.tickets.values()):
                slots.append(None)
                continue
            ticket = self._number()
            offset = ticket * self.block_bytes
            self.tickets[ticket] = (key, offset)
            slots.append(SimpleNamespace(ticket=ticket, view=self.view(offset, self.block_bytes)))
        return slots

    def commit(self, tickets: list[int], sums: list[bytes], deadline_s: float) -> list[bool]:
        self._maybe_fail("commit")
        if self.late:
            self.tickets.clear()
            return [False] * len(tickets)
        for ticket, checksum in zip(tickets, sums, strict=True):
            key, offset = self.tickets.pop(ticket)
            self.held[key] = Block(offset, self.block_bytes, checksum)
            self.committed.append(key)
        return [True] * len(tickets)

    def abandon(self, tickets: list[int]) -> None:
        self._maybe_fail("abandon")
        for ticket in tickets:
            del self.tickets[ticket]
            self.abandoned.append(ticket)

    def report_bad(self, keys: list[bytes]) -> None:
        self._maybe_fail("report_bad")
        self.bad += keys
        for key in keys:
            self.held.pop(key, None)


@dataclass
class FakeRequest:
    """The fields of vLLM's Request that the scheduler half reads."""

    prompt_token_ids: list[int] | None
    leg: str = "whole"
    request_id: str = "r"
    output: list[int] = field(default_factory=list)
    cache_salt: str | None = None
    lora_request: Any = None
    mm_features: list[Any] = field(default_factory=list)
    skip_reading_prefix_cache: bool | None = False
    sampling_params: Any = None

    def __post_init__(self) -> None:
        ours = {"leg": self.leg, "prompt_len": len(self.prompt_token_ids or ())}
        extra = {"kv_transfer_params": {"mooncake": ours}} if self.leg != "whole" else None
        self.sampling_params = SimpleNamespace(extra_args=extra)

    @property
    def all_token_ids(self) -> list[int]:
        return [*(self.prompt_token_ids or ()), *self.output]

    @property
    def num_tokens(self) -> int:
        return len(self.all_token_ids)

    @property
    def full(self) -> list[bytes]:
        return chain(ROOT, self.all_token_ids, BLOCK_SIZE)

    @property
    def tail(self) -> bytes:
        key = prompt_keys(ROOT, self.prompt_token_ids or [], BLOCK_SIZE)[1]
        assert key is not None
        return key


def step_output(
    new: dict[str, tuple[int, int]] | None = None, cached: dict[str, tuple[int, int]] | None = None
):
    """Return a SchedulerOutput of requests: id -> (computed before, scheduled now)."""
    new, cached = new or {}, cached or {}
    return SimpleNamespace(
        num_scheduled_tokens={name: pair[1] for name, pair in {**new, **cached}.items()},
        scheduled_new_reqs=[SimpleNamespace(req_id=n, num_computed_tokens=p[0]) for n, p in new.items()],
        scheduled_cached_reqs=SimpleNamespace(
            req_ids=list(cached), num_computed_tokens=[p[0] for p in cached.values()]
        ),
    )


__all__ = ["BLOCK_SIZE", "ROOT", "FakePool", "FakePulse", "FakeRequest", "step_output", "tail_key"]
