"""The pure metadata machine against a model that is too simple to be wrong."""

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from mooncake.core import metadata_memory
from mooncake.core.errors import CapacityError, RequestError
from mooncake.core.metadata_memory import MetadataMachine
from mooncake.core.metadata_messages import MetaChange

KEYS = st.sampled_from(["/a/1", "/a/2", "/b/1", "/c"])
VALUES = st.binary(max_size=3)


class Against(RuleBasedStateMachine):
    """Model: a dict of keys, a dict of leases, and the whole, unbounded history."""

    leases = Bundle("leases")
    watchers = Bundle("watchers")

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0
        self.machine = MetadataMachine("e", history_max=5)
        self.keys: dict[str, tuple[bytes, int, int]] = {}
        self.alive: dict[int, tuple[float, float]] = {}
        self.history: list[MetaChange] = []

    def change(self, key: str, value: bytes | None, lease_id: int = 0) -> None:
        revision = len(self.history) + 1
        self.history.append(MetaChange(key, value, revision))
        if value is None:
            del self.keys[key]
        else:
            self.keys[key] = (value, revision, lease_id)

    def end_lease(self, lease_id: int) -> None:
        # the order in which keys of one lease vanish is not part of the contract: take the machine's
        del self.alive[lease_id]
        mine = {key for key, entry in self.keys.items() if entry[2] == lease_id}
        start = len(self.history)
        vanished = [c.key for c in self.machine.changes_after("", start).changes[: len(mine)]]
        for key in vanished or sorted(mine):
            self.change(key, None)

    @rule(key=KEYS, value=VALUES, compare=st.sampled_from([None, "right", 0, 1]))
    def put(self, key, value, compare):
        self.put_under(key, value, 0, compare)

    @rule(key=KEYS, value=VALUES, lease=leases, compare=st.sampled_from([None, "right", 0]))
    def put_leased(self, key, value, lease, compare):
        self.put_under(key, value, lease, compare)

    def put_under(self, key, value, lease, compare):
        current = self.keys.get(key, (b"", 0, 0))[1]
        if compare == "right":
            compare = current
        if lease and lease not in self.alive:
            with pytest.raises(RequestError):
                self.machine.put(key, value, lease, compare)
            return
        result = self.machine.put(key, value, lease, compare)
        assert result.done == (compare is None or compare == current)
        if result.done:
            self.change(key, value, lease)
            assert result.revision == len(self.history)
        else:
            assert result.revision == current

    @rule(key=KEYS)
    def delete(self, key):
        assert self.machine.delete(key) == (key in self.keys)
        if key in self.keys:
            self.change(key, None)

    @rule(target=leases, ttl_s=st.floats(0.1, 10))
    def grant(self, ttl_s):
        lease = self.machine.grant(self.now_s, ttl_s)
        assert lease not in self.alive
        self.alive[lease] = (ttl_s, self.now_s + ttl_s)
        return lease

    @rule(lease=leases)
    def keep_alive(self, lease):
        assert (self.machine.keep_alive(self.now_s, lease) > 0) == (lease in self.alive)
        if lease in self.alive:
            ttl_s = self.alive[lease][0]
            self.alive[lease] = (ttl_s, self.now_s + ttl_s)

    @rule(lease=consumes(leases))
    def revoke(self, lease):
        assert self.machine.revoke(lease) == (lease in self.alive)
        if lease in self.alive:
            self.end_lease(lease)

    @rule(by_s=st.floats(0, 5))
    def time_passes(self, by_s):
        self.now_s += by_s
        self.machine.tick(self.now_s)
        for lease in [lease for lease, (_, end_s) in self.alive.items() if end_s <= self.now_s]:
            self.end_lease(lease)

    @rule(by_s=st.floats(0, 5))
    def the_store_was_stalled(self, by_s):
        self.now_s += by_s
        self.machine.extend_leases(by_s)
        self.alive = {lease: (ttl_s, end_s + by_s) for lease, (ttl_s, end_s) in self.alive.items()}

    @rule(prefix=st.sampled_from(["", "/a/", "/c"]), back=st.integers(0, 9))
    def watch(self, prefix, back):
        """Either all changes since a revision, or compacted; compacted only beyond the bound."""
        start = max(0, len(self.history) - back)
        batch = self.machine.changes_after(prefix, start)
        assert batch.compacted == (back > 5 and start < len(self.history) - 5)
        if not batch.compacted:
            assert batch.changes == [c for c in self.history[start:] if c.key.startswith(prefix)]

    @invariant()
    def lists_what_the_model_holds(self):
        listing = self.machine.get("")
        found = {entry.key: (entry.value, entry.revision) for entry in listing.entries}
        assert found == {key: entry[:2] for key, entry in self.keys.items()}
        assert listing.revision == len(self.history)

    @invariant()
    def every_leased_key_has_a_live_lease(self):
        assert all(lease == 0 or lease in self.alive for _, _, lease in self.keys.values())


TestAgainstModel = Against.TestCase
TestAgainstModel.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_the_store_refuses_keys_beyond_its_limit_and_still_takes_updates(monkeypatch):
    monkeypatch.setattr(metadata_memory, "KEYS_MAX", 2)
    machine = MetadataMachine("e")
    machine.put("/1", b"")
    machine.put("/2", b"")
    with pytest.raises(CapacityError, match="full"):
        machine.put("/3", b"")
    assert machine.put("/2", b"x").done


def test_the_bytes_of_all_values_are_bounded_and_come_back_on_delete(monkeypatch):
    monkeypatch.setattr(metadata_memory, "STORED_BYTES_MAX", 100)
    machine = MetadataMachine("e")
    machine.put("/1", bytes(80))
    with pytest.raises(CapacityError):
        machine.put("/2", bytes(80))
    machine.delete("/1")
    assert machine.put("/2", bytes(80)).done


def test_history_is_bounded_in_bytes_too(monkeypatch):
    monkeypatch.setattr(metadata_memory, "HISTORY_BYTES_MAX", 1000)
    machine = MetadataMachine("e")
    for _ in range(5):
        machine.put("/1", bytes(400))
    assert machine.changes_after("", 0).compacted
    assert len(machine.changes_after("", 3).changes) == 2


def test_leases_are_bounded(monkeypatch):
    monkeypatch.setattr(metadata_memory, "LEASES_MAX", 1)
    machine = MetadataMachine("e")
    lease = machine.grant(0.0, 1.0)
    with pytest.raises(CapacityError):
        machine.grant(0.0, 1.0)
    machine.revoke(lease)
    assert machine.grant(0.0, 1.0) != lease
