"""Which nodes hold which blocks: the pool's directory, soft state fed by every node (DESIGN 2.2, 6). Pure.

One dict from the whole key to an int bitmask of nodes. The key is kept as a 256-bit int: 64 bytes of
memory, where a bytes object of 32 takes 80. Equality compares all 256 bits. Masks are shared objects.
Measured at 1 M blocks on 4 nodes: 104 bytes per block (64 key, 40 of dict table); right after the
table has doubled, at 1.4 M, it is 124.

A node is EXACT while its stream is in step, else DEGRADED: what was known of it stays as a hint
(it is the owner that decides at `acquire`, so a wrong hint costs a round trip, never a wrong read)
until a snapshot replaces it, or the node leaves or restarts. A replaced or gone node loses its bit
at once; the dict is swept only when several bits are dead, so a restart stops nobody for a scan.
"""

from collections.abc import Iterator, Sequence
from enum import StrEnum

import msgspec

from kvstore.directory.listing import Listing
from mooncake.core.errors import ProtocolError, RequestError
from mooncake.core.keys import KEY_BYTES

BLOCKS_MAX = 16_000_000
"""About 1.8 GB; 50 TB of 3 MB blocks, more than a cluster of this form holds in memory."""
DEAD_BITS_MAX = 8
"""Restarts and new snapshots before dead bits are swept: a scan of 1 M blocks takes 0.1 s."""
SHARED_MAX = 65_536
"""Distinct sets of holders remembered for sharing; beyond this, sharing starts afresh."""
LOADING = "loading its snapshot"
FULL = "directory full"
"""Reason of a node whose keys did not all fit; it stays DEGRADED until its next snapshot fits."""


class Mode(StrEnum):
    """How far answers may be trusted."""

    EXACT = "exact"
    DEGRADED = "degraded"


class NodeStatus(msgspec.Struct, frozen=True, array_like=True):
    """What the directory knows of one node; `lag_s` is 0 in step, else the time out of step."""

    node: str
    epoch: str
    mode: Mode
    lag_s: float
    reason: str


class Prefix(msgspec.Struct, frozen=True):
    """`covered` leading keys are each held by somebody; `by_node[n]` leading keys are held by n."""

    covered: int
    by_node: dict[str, int]


class _Member(msgspec.Struct):
    bit: int
    epoch: str
    mode: Mode
    since_s: float
    reason: str


def key_number(key: bytes) -> int:
    """Return the int that stands for a key.

    Raises:
        RequestError: not 32 bytes (shorter ones would read as another key).
    """
    if len(key) != KEY_BYTES:
        raise RequestError(f"a key has {KEY_BYTES} bytes, not {len(key)}")
    return int.from_bytes(key, "little")


def _numbers(blob: bytes) -> Iterator[int]:
    from_bytes = int.from_bytes
    for start in range(0, len(blob), KEY_BYTES):
        yield from_bytes(blob[start : start + KEY_BYTES], "little")


def _check_blob(blob: bytes) -> None:
    if len(blob) % KEY_BYTES:
        raise ProtocolError(f"blob of {len(blob)} bytes is not a whole number of {KEY_BYTES}-byte keys")


class Directory:
    """Block key -> nodes. `join` and `leave` come from the metadata store, the rest from streams.

    What is said of a node that has not joined is ignored: its stream is older than its end.
    """

    def __init__(self, blocks_max: int = BLOCKS_MAX) -> None:
        """Keep at most `blocks_max` keys; a node whose keys do not fit is DEGRADED."""
        assert blocks_max >= 1
        self._blocks_max = blocks_max
        self._holders: dict[int, int] = {}
        self._masks: dict[int, int] = {}
        self._names: dict[int, tuple[str, ...]] = {}  # mask -> nodes, exact ones first
        self._members: dict[str, _Member] = {}
        self._live = 0
        self._dead = 0
        self.members_known = False
        """Set by the shell once the metadata store has been listed: before that nothing is exact."""
        self.sweeps = 0
        self.overflows = 0

    # ------------------------------------------------------------ who is there

    def join(self, now_s: float, node: str, epoch: str) -> None:
        """Expect a node; another epoch than the known one means that it restarted empty."""
        member = self._members.get(node)
        if member is not None and member.epoch == epoch:
            return
        if member is not None:
            self._retire(member.bit)
        self._members[node] = _Member(self._new_bit(), epoch, Mode.DEGRADED, now_s, "no snapshot yet")
        self._names.clear()

    def leave(self, node: str) -> bool:
        """Drop every replica of a node whose lease ended; False: it was not there."""
        member = self._members.pop(node, None)
        if member is None:
            return False
        self._retire(member.bit)
        return True

    # ------------------------------------------------------------ what nodes say

    def on_snapshot(self, now_s: float, node: str, epoch: str, pages: Sequence[bytes]) -> None:
        """Replace all that is known of `node`: it is in step from here on.

        Raises:
            ProtocolError: a page is not whole keys; nothing was changed.
        """
        for page in pages:
            _check_blob(page)
        self.begin_snapshot(now_s, node, epoch)
        for page in pages:
            self.add_page(node, page)
        self.end_snapshot(node)

    def begin_snapshot(self, now_s: float, node: str, epoch: str) -> None:
        """As `on_snapshot`, in pieces: 1 M keys at once would stop a loop for a second.

        Until `end_snapshot` the node is DEGRADED; its events have to wait as long.
        """
        member = self._members.get(node)
        if member is None:
            return
        self._retire(member.bit)
        member.bit, member.epoch = self._new_bit(), epoch
        self.on_stale(now_s, node, LOADING)

    def add_page(self, node: str, page: bytes) -> None:
        """Add the next page of a snapshot that was begun.

        Raises:
            ProtocolError: it is not whole keys.
        """
        _check_blob(page)
        member = self._members.get(node)
        if member is not None and not self._add(member.bit, page):
            member.reason = FULL

    def end_snapshot(self, node: str) -> None:
        """Trust a node whose snapshot was added, unless it did not fit or was distrusted meanwhile."""
        member = self._members.get(node)
        if member is not None and member.reason == LOADING:
            member.mode, member.reason = Mode.EXACT, ""
            self._names.clear()

    def on_events(self, now_s: float, node: str, stored: bytes, removed: bytes) -> None:
        """Apply the next change of a node that is in step; no key is in both blobs.

        Raises:
            ProtocolError: a blob is not whole keys; nothing was changed.
        """
        _check_blob(stored)
        _check_blob(removed)
        member = self._members.get(node)
        if member is None:
            return
        if not self._add(member.bit, stored):
            self.on_stale(now_s, node, FULL)
        self._remove(member.bit, removed)

    def on_stale(self, now_s: float, node: str, reason: str) -> None:
        """Distrust what is known of `node`; it stays as a hint."""
        member = self._members.get(node)
        if member is None:
            return
        member.reason = reason
        if member.mode is Mode.EXACT:
            member.mode, member.since_s = Mode.DEGRADED, now_s
            self._names.clear()

    # ------------------------------------------------------------ look-ups

    def replicas(self, keys: Sequence[bytes], *, exact_only: bool = False) -> list[tuple[str, ...]]:
        """Return the nodes that hold each key, EXACT ones first.

        Args:
            keys: whole keys.
            exact_only: leave hints out.

        Raises:
            RequestError: malformed keys.
        """
        get, names = self._holders.get, self._names
        live = sum(m.bit for m in self._members.values() if m.mode is Mode.EXACT or not exact_only)
        found = []
        for key in keys:
            mask = get(key_number(key), 0) & live
            nodes = names.get(mask)
            found.append(self._name(mask) if nodes is None else nodes)
        return found

    def longest_prefix(self, keys: Sequence[bytes]) -> Prefix:
        """Return how many leading `keys` the pool covers, and how many each node holds alone.

        Raises:
            RequestError: malformed keys.
        """
        get, live = self._holders.get, self._live
        current, covered = live, 0
        by_node: dict[str, int] = {}
        for key in keys:
            here = get(key_number(key), 0) & live
            if not here:
                break
            if left := current & ~here:
                self._end(by_node, left, covered)
                current &= here
            covered += 1
        self._end(by_node, current, covered)
        return Prefix(covered, by_node)

    def keys_of(self, node: str) -> list[bytes]:
        """Return the keys that `node` is known to hold; one scan of everything, for a drain."""
        member = self._members.get(node)
        if member is None:
            return []
        bit = member.bit
        return [number.to_bytes(KEY_BYTES, "little") for number, mask in self._holders.items() if mask & bit]

    def listing(self, node: str = "") -> Listing:
        """Return a copy of everything, or of what counts for one node: 10 ms for 1 M blocks."""
        member = self._members.get(node)
        wanted = self._live if not node else member.bit if member else 0
        return Listing(list(self._holders), list(self._holders.values()), wanted)

    # ------------------------------------------------------------ trust

    def is_exact(self, node: str) -> bool:
        """Return whether what is known of `node` is all there is: it is in step, or no member."""
        member = self._members.get(node)
        return self.members_known if member is None else member.mode is Mode.EXACT

    def mode(self) -> Mode:
        """Return EXACT if the members are known and every one is in step."""
        exact = self.members_known and all(m.mode is Mode.EXACT for m in self._members.values())
        return Mode.EXACT if exact else Mode.DEGRADED

    def lag_s(self, now_s: float) -> float:
        """Return the longest time that a member has been out of step; 0 if none is."""
        return max((status.lag_s for status in self.status(now_s)), default=0.0)

    def status(self, now_s: float) -> list[NodeStatus]:
        """Return every member, in the order of joining."""
        return [
            NodeStatus(node, m.epoch, m.mode, 0.0 if m.mode is Mode.EXACT else now_s - m.since_s, m.reason)
            for node, m in self._members.items()
        ]

    def __len__(self) -> int:
        """Keys held, with those of dead bits that are not swept yet."""
        return len(self._holders)

    # ------------------------------------------------------------ inside

    def _add(self, bit: int, stored: bytes) -> bool:
        """Return whether all of it found room."""
        if len(self._holders) + len(stored) // KEY_BYTES > self._blocks_max:
            return self._add_bounded(bit, stored)
        live, masks, holders = self._live, self._masks, self._holders
        if len(masks) > SHARED_MAX:
            masks.clear()
        get, share = holders.get, masks.setdefault
        for number in _numbers(stored):
            mask = (get(number, 0) & live) | bit
            holders[number] = share(mask, mask)
        return True

    def _add_bounded(self, bit: int, stored: bytes) -> bool:
        self._sweep()
        missed = 0
        for number in _numbers(stored):
            if number in self._holders or len(self._holders) < self._blocks_max:
                self._holders[number] = self._holders.get(number, 0) | bit
            else:
                missed += 1
        self.overflows += missed
        return not missed

    def _remove(self, bit: int, removed: bytes) -> None:
        holders, masks, live = self._holders, self._masks, self._live
        for number in _numbers(removed):
            mask = holders.get(number, 0) & live & ~bit
            if mask:
                holders[number] = masks.setdefault(mask, mask)
            else:
                holders.pop(number, None)

    def _end(self, by_node: dict[str, int], mask: int, depth: int) -> None:
        if depth and mask:
            for node in self._name(mask):
                by_node[node] = depth

    def _name(self, mask: int) -> tuple[str, ...]:
        names = self._names.get(mask)
        if names is None:
            there = [(m.mode is not Mode.EXACT, node) for node, m in self._members.items() if m.bit & mask]
            names = tuple(node for _, node in sorted(there, key=lambda pair: pair[0]))
            if len(self._names) >= SHARED_MAX:
                self._names.clear()
            self._names[mask] = names
        return names

    def _new_bit(self) -> int:
        used = self._live | self._dead
        bit = ~used & (used + 1)  # lowest bit that is neither live nor waiting for a sweep
        self._live |= bit
        return bit

    def _retire(self, bit: int) -> None:
        self._live &= ~bit
        self._dead |= bit
        self._names.clear()
        if self._dead.bit_count() >= DEAD_BITS_MAX:
            self._sweep()

    def _sweep(self) -> None:
        """Take dead bits out of every mask, in place: a second dict would double the memory."""
        if not self._dead:
            return
        live, masks, holders = self._live, self._masks, self._holders
        masks.clear()
        gone = []
        for number, mask in holders.items():
            rest = mask & live
            if not rest:
                gone.append(number)
            elif rest != mask:
                holders[number] = masks.setdefault(rest, rest)  # an existing key: no resize
        for number in gone:
            del holders[number]
        self._dead = 0
        self.sweeps += 1
