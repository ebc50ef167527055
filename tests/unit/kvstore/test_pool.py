"""The pool of several stores: what was put is what is got, key by key, whatever becomes of a store."""

import functools
import itertools
import os
import signal
import threading

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvstore.client.model import Look, Outcome
from kvstore.client.object_names import object_key
from kvstore.client.pool import Pool
from mooncake.core.errors import ProtocolError, RequestError
from mooncake.core.messages import Findings, StoreRecord
from tests.unit.kvstore.conftest import StoreProcess
from transfer.config import EngineConfig

PATIENCE_S = 20.0
DONE, EXISTS, MISSING = Outcome.DONE, Outcome.EXISTS, Outcome.MISSING


def data(seed: int, size: int) -> bytes:
    return np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8).tobytes()


def distant(record: StoreRecord) -> StoreRecord:
    """The store as another host's pool sees it."""
    return msgspec.structs.replace(record, fd_path="", door="")


def pool_of(record: StoreRecord) -> Pool:
    return Pool(stores=[record])


def outcomes(results) -> list[Outcome]:
    return [one.outcome for one in results]


@pytest.fixture
def open_pool(tmp_path):
    pools = []

    def make(*records: StoreRecord, **options) -> Pool:
        engine = EngineConfig(run_dir=str(tmp_path / "e"), **options)
        pools.append(Pool(stores=records, engine=engine))
        return pools[-1]

    yield make
    for pool in pools:
        pool.close()


@pytest.fixture
def start_node(start_store, tmp_path):
    def start(node: str, **config):
        transfer = EngineConfig(run_dir=str(tmp_path / f"e-{node}"))
        return start_store(node=node, run_dir=str(tmp_path / node), transfer=transfer, **config)

    return start


@pytest.fixture(scope="module")
def long_lived(store_parent, tmp_path_factory):
    """One store for many tests, as pools of its own host and of others see it."""
    folder = tmp_path_factory.mktemp("pool")
    transfer = EngineConfig(run_dir=str(folder / "e"))
    config = {"capacity_bytes": 64 << 20, "run_dir": str(folder / "run"), "transfer": transfer}
    store = StoreProcess(store_parent, node="n1", **config)
    pools = {
        how: Pool(
            stores=[store.record if how == "here" else distant(store.record)],
            engine=EngineConfig(run_dir=str(folder / "f"), transports=(how.replace("here", "shm"),)),
        )
        for how in ("here", "shm", "tcp")
    }
    yield pools
    for pool in pools.values():
        pool.close()
    store.stop()


class Own:
    """A pool in which no other test has put anything."""

    numbers = itertools.count()

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._defaults = {"tenant": f"test-{next(self.numbers)}", "deadline_s": PATIENCE_S}

    def __getattr__(self, name: str):
        found = getattr(self._pool, name)
        return functools.partial(found, **self._defaults) if name in CALLS else found


CALLS = ("put", "get", "get_into", "view", "look", "exists", "sizes", "remove")


@pytest.fixture(params=["here", "shm", "tcp"])
def pool(request, long_lived):
    """A pool of one store: of this host, or of another one."""
    return Own(long_lived[request.param])


# ---------------------------------------------------------------- one store, near and far


SIZES = (1, 100, 4096, 16 << 10, (16 << 10) + 1, 300_000)


def test_objects_of_many_sizes_come_back_in_one_batch(pool):
    names = [f"o{size}" for size in SIZES]
    blobs = [data(size, size) for size in SIZES]
    done = pool.put(names, blobs)
    assert [(one.outcome, one.size_bytes, one.nodes) for one in done] == [
        (DONE, size, ("n1",)) for size in SIZES
    ]
    assert pool.get(names) == blobs
    targets = [bytearray(size) for size in SIZES]
    got = pool.get_into(names, targets)
    assert [(one.outcome, one.size_bytes) for one in got] == [(DONE, size) for size in SIZES]
    assert [bytes(target) for target in targets] == blobs
    assert pool.sizes([*names, "none"]) == [*SIZES, None]


def test_what_is_not_there_is_missing_and_the_rest_is_read(pool):
    pool.put(["a", "c"], [b"A" * 50_000, b"C"])
    assert pool.get(["a", "b", "c"]) == [b"A" * 50_000, None, b"C"]
    assert outcomes(pool.look(["b", "a"])) == [MISSING, DONE]
    assert pool.exists(["a", "b"]) == [True, False]
    assert outcomes(pool.get_into(["b"], [bytearray(1)])) == [MISSING]


def test_a_second_put_changes_nothing(pool):
    assert outcomes(pool.put(["a"], [b"first"])) == [DONE]
    assert outcomes(pool.put(["a", "b", "b"], [b"other", b"1", b"1"])) == [
        EXISTS,
        DONE,
        EXISTS,
    ]
    assert pool.get(["a", "b"]) == [b"first", b"1"]


def test_pieces_are_put_and_filled_in_order(pool):
    whole = data(1, 90_000)
    view = memoryview(whole)
    done = pool.put(["a"], [[view[:10], view[10:70_000], view[70_000:]]])
    assert outcomes(done) == [DONE]
    parts = [bytearray(1), bytearray(50_000), bytearray(100_000)]
    assert outcomes(pool.get_into(["a"], [parts])) == [DONE]
    assert b"".join(parts)[:90_000] == whole


def test_registered_memory_is_read_into_and_written_from(pool):
    block = np.frombuffer(data(2, 400_000), np.uint8).copy()
    buffer = pool.register(block)
    halves = [block[:200_000], block[200_000:]]
    assert outcomes(pool.put(["a", "b"], halves)) == [DONE, DONE]
    expected = block.tobytes()
    block[:] = 0
    done = pool.get_into(["b", "a"], [block[200_000:], [block[:7], block[7:200_000]]])
    assert outcomes(done) == [DONE, DONE]
    assert block.tobytes() == expected
    pool.unregister(buffer)


def test_a_target_that_is_too_small_fails_alone(pool):
    pool.put(["a", "b"], [b"A" * 20_000, b"B" * 10])
    small, right = bytearray(19_999), bytearray(10)
    bad, good = pool.get_into(["a", "b"], [small, right])
    assert bad.outcome is Outcome.FAILED
    assert "20000 bytes, a target of 19999" in bad.reason
    assert good.ok
    assert right == b"B" * 10


@pytest.mark.parametrize("far", [False, True])
def test_a_full_store_says_so_and_keeps_what_it_took(start_node, open_pool, far):
    record = start_node("n1").record
    pool = open_pool(distant(record) if far else record)
    names, blobs = (
        ["1", "2", "large", "3"],
        [b"1" * (3 << 20), b"2" * (3 << 20), b"L" * (9 << 20), b"3" * (3 << 20)],
    )
    pool.put(names[:1], blobs[:1], deadline_s=PATIENCE_S)
    with pool_of(record) as here, here.view(["1"], deadline_s=PATIENCE_S):
        results = pool.put(names, blobs, deadline_s=PATIENCE_S)
    assert outcomes(results) == [EXISTS, DONE, Outcome.FAILED, Outcome.FULL]
    assert "too large" in results[2].reason
    assert results[3].reason == "n1: full"
    assert pool.get(names[:2], deadline_s=PATIENCE_S) == blobs[:2]


def test_removed_objects_are_gone_and_can_be_put_anew(pool):
    pool.put(["a", "b"], [b"1", b"2"])
    assert outcomes(pool.remove(["a", "c"])) == [DONE, MISSING]
    assert pool.get(["a", "b"]) == [None, b"2"]
    assert outcomes(pool.put(["a"], [b"3"])) == [DONE]
    assert pool.get(["a"]) == [b"3"]


def test_tenants_do_not_see_each_other_and_keys_are_what_they_are(pool):
    key = object_key("k")
    pool.put(["x"], [b"t1"], tenant="t1")
    pool.put([key], [b"by key"])
    assert pool.get(["x"]) == [None]
    assert pool.get(["x"], tenant="t1") == [b"t1"]
    assert pool.get([key, "k"], tenant="") == [b"by key", b"by key"]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda pool: pool.put(["a"], []), "1 keys, 0 buffers"),
        (lambda pool: pool.put(["a"], [1]), "no buffer"),
        (lambda pool: pool.put(["a"], [b"1"], replicas=0), "replicas=0"),
        (lambda pool: pool.get_into(["a"], [b"read-only"]), "read-only"),
        (lambda pool: pool.get_into(["a"], []), "1 keys, 0 targets"),
        (lambda pool: pool.put(["a"], [np.zeros((4, 4), np.uint8)[:, 1]]), "in one piece"),
    ],
)
def test_calls_that_make_no_sense_are_refused_before_anything_is_done(shared_store, open_pool, call, words):
    with pytest.raises(RequestError, match=words):
        call(open_pool(shared_store.record))


def test_an_object_of_no_bytes_fails_alone(pool):
    results = pool.put(["a", "b"], [b"", b"1"])
    assert outcomes(results) == [Outcome.FAILED, DONE]
    assert "0 bytes" in results[0].reason


# ---------------------------------------------------------------- properties

sizes = st.sampled_from([1, 7, 4096, 16_384, 16_385, 70_000])
batches = st.lists(st.tuples(st.integers(0, 30), sizes), min_size=1, max_size=12)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rounds=st.lists(batches, min_size=1, max_size=4), how=st.sampled_from(["here", "shm", "tcp"]))
def test_any_batches_of_any_sizes_read_as_the_first_put_of_each_name(long_lived, rounds, how):
    pool = Own(long_lived[how])
    first: dict[str, bytes] = {}
    for turn, batch in enumerate(rounds):
        names = [f"{n}" for n, _ in batch]
        blobs = [data(turn * 100 + n, size) for n, size in batch]
        expected = []
        for name, blob in zip(names, blobs, strict=True):
            expected.append(EXISTS if name in first else DONE)
            first.setdefault(name, blob)
        assert outcomes(pool.put(names, blobs)) == expected
        assert pool.get([*names, "none"]) == [*map(first.get, names), None]
    if how == "here":
        with pool.view(list(first)) as held:
            assert [bytes(view) for view in held.views] == list(first.values())


def test_threads_share_a_pool(long_lived):
    pools = list(long_lived.values())
    wrong = []

    def work(n: int) -> None:
        for turn in range(10):
            name, blob = f"thread-{n}-{turn}", data(n, 3000 + n)
            put = pools[n % 3].put([name], [blob], deadline_s=PATIENCE_S)
            if not put[0].ok or pools[turn % 3].get([name], deadline_s=PATIENCE_S) != [blob]:
                wrong.append(name)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# ---------------------------------------------------------------- views and damage


def test_a_view_is_the_memory_itself_read_only_and_leased_until_released(start_node, open_pool):
    store = start_node("n1")
    pool = open_pool(store.record)
    blob = data(3, 200_000)
    pool.put(["a"], [blob], deadline_s=PATIENCE_S)
    held = pool.view(["a", "none"], deadline_s=PATIENCE_S)
    assert bytes(held.views[0]) == blob
    assert held.views[1] is None
    with pytest.raises(TypeError):
        held.views[0][0] = 1
    assert leases(pool) == 1
    assert held.left_s > 0
    held.release()
    held.release()
    assert leases(pool) == 0
    assert held.left_s == 0


def leases(pool: Pool) -> int:
    (access,) = pool._members.stores.values()
    return access.stats(PATIENCE_S).leases


def test_no_lease_is_left_behind(pool):
    pool.put(["a", "b"], [b"1" * 50_000, b"2"])
    pool.get(["a", "b", "c"])
    pool.get_into(["a"], [bytearray(1)])
    pool.exists(["a"])
    assert leases(pool) == 0


def damage(pool: Pool, name: str, tenant: str = "") -> None:
    """Flip a byte in the store's own memory."""
    (access,) = (one for one in pool._members.stores.values() if one.near)
    look = access.find([object_key(name, tenant)], float("inf"))
    link = access._client.link
    link.segment.view(look.offsets[0], 1)[0] ^= 1


fates = st.sampled_from(["sound", "damaged", "removed", "never put", "narrow", "wide"])


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    objects=st.lists(st.tuples(fates, sizes), min_size=1, max_size=8),
    how=st.sampled_from(["here", "shm", "tcp"]),
    one_by_one=st.booleans(),
)
def test_each_key_has_its_own_fate_whatever_becomes_of_the_others(long_lived, objects, how, one_by_one):
    pool, here = Own(long_lived[how]), long_lived["here"]
    tenant = pool._defaults["tenant"]
    names = [str(at) for at in range(len(objects))]
    blobs = {name: data(at, size) for at, (name, (_, size)) in enumerate(zip(names, objects, strict=True))}
    fate_of = {name: fate for name, (fate, _) in zip(names, objects, strict=True)}
    written = [name for name in names if fate_of[name] != "never put"]
    assert all(one.ok for one in pool.put(written, [blobs[name] for name in written]))
    for name in written:
        if fate_of[name] == "damaged":
            damage(here, name, tenant)
        elif fate_of[name] == "removed":
            assert pool.remove([name])[0].ok
    targets = {name: bytearray(len(blobs[name]) + EXTRA.get(fate_of[name], 0)) for name in names}
    if one_by_one:
        results = [pool.get_into([name], [targets[name]])[0] for name in names]
    else:
        results = pool.get_into(names, list(targets.values()))
    for name, result in zip(names, results, strict=True):
        assert result.outcome is EXPECTED[fate_of[name]], result
        if result.ok:
            assert result.size_bytes == len(blobs[name])
            assert targets[name][: result.size_bytes] == blobs[name]
    assert leases(here) == 0


EXTRA = {"narrow": -1, "wide": 3}
EXPECTED = {
    "sound": DONE,
    "wide": DONE,
    "damaged": Outcome.FAILED,
    "narrow": Outcome.FAILED,
    "removed": MISSING,
    "never put": MISSING,
}


@pytest.mark.parametrize("far", [False, True])
def test_damaged_bytes_are_never_given_out_and_the_store_drops_them(start_node, open_pool, far):
    store = start_node("n1")
    near = open_pool(store.record)
    pool = open_pool(distant(store.record)) if far else near
    near.put(["a", "b"], [b"1" * 50_000, b"2" * 50_000], deadline_s=PATIENCE_S)
    damage(near, "a")
    bad, good = pool.get_into(["a", "b"], [bytearray(50_000), bytearray(50_000)], deadline_s=PATIENCE_S)
    assert bad.outcome is Outcome.FAILED
    assert "not what was committed" in bad.reason
    assert good.ok
    assert near.view(["a"], deadline_s=PATIENCE_S).views == [None]
    for _ in range(200):  # the store looks for itself, in its own time
        if pool.look(["a"], deadline_s=PATIENCE_S)[0].outcome is MISSING:
            break
    else:
        pytest.fail("the damaged block is still there")


def test_who_skips_checksums_is_told_nothing(start_node, open_pool):
    pool = open_pool(start_node("n1").record)
    pool.put(["a"], [b"1" * 50_000], deadline_s=PATIENCE_S)
    damage(pool, "a")
    (got,) = pool.get_into(["a"], [bytearray(50_000)], deadline_s=PATIENCE_S, skip_checksums=True)
    assert got.ok


# ---------------------------------------------------------------- several stores


def test_replicas_are_on_distinct_nodes_preferred_ones_first(start_node, open_pool):
    stores = [start_node(f"n{i}") for i in range(3)]
    pool = open_pool(stores[0].record, distant(stores[1].record), distant(stores[2].record))
    (here,) = pool.put(["here"], [b"x"], deadline_s=PATIENCE_S)
    assert here.nodes == ("n0",), "near the writer while it has room"
    (two,) = pool.put(["two"], [b"x" * 70_000], replicas=2, preferred=["n2"], deadline_s=PATIENCE_S)
    assert two.outcome is DONE
    assert two.nodes[0] == "n2"
    assert len(set(two.nodes)) == 2
    (all_,) = pool.put(["all"], [b"x"], replicas=5, deadline_s=PATIENCE_S)
    assert all_.outcome is DONE
    assert set(all_.nodes) == {"n0", "n1", "n2"}
    assert all_.reason
    assert outcomes(pool.put(["two"], [b"y"], deadline_s=PATIENCE_S)) == [EXISTS]
    assert set(pool.look(["two"], deadline_s=PATIENCE_S)[0].nodes) <= set(two.nodes)
    assert outcomes(pool.remove(["all"], deadline_s=PATIENCE_S)) == [DONE]
    assert pool.exists(["all"], deadline_s=PATIENCE_S) == [False]


def test_a_dead_store_s_keys_fail_with_a_reason_and_the_others_are_read(start_node, open_pool):
    near, far, gone = (start_node(node) for node in ("n0", "n1", "n2"))
    pool = open_pool(near.record, distant(far.record), distant(gone.record))
    blobs = {node: data(at, 40_000) for at, node in enumerate(("n0", "n1", "n2"))}
    for node, blob in blobs.items():
        (put,) = pool.put([node], [blob], preferred=[node], deadline_s=PATIENCE_S)
        assert put.nodes == (node,)
    (both,) = pool.put(["both"], [b"b" * 40_000], replicas=2, preferred=["n2", "n1"], deadline_s=PATIENCE_S)
    assert both.nodes == ("n2", "n1")
    gone.kill()
    names = [*blobs, "both", "none"]
    got = pool.get_into(names, [bytearray(40_000) for _ in names], deadline_s=PATIENCE_S)
    assert [one.ok for one in got] == [True, True, False, True, False]
    assert all(one.outcome is Outcome.FAILED and "n2" in one.reason for one in (got[2], got[4]))
    assert pool.get(["n1", "both"], deadline_s=PATIENCE_S) == [blobs["n1"], b"b" * 40_000]
    (put,) = pool.put(["later"], [b"x"], replicas=3, deadline_s=PATIENCE_S)
    assert put.outcome is DONE
    assert set(put.nodes) == {"n0", "n1"}
    assert "no other node" in put.reason or "n2" in put.reason


def test_a_dead_store_of_this_host_fails_at_once_and_is_found_again(start_store, open_pool):
    store = start_store()
    pool = open_pool(store.record)
    pool.put(["a"], [b"1"], deadline_s=PATIENCE_S)
    held = pool.view(["a"], deadline_s=PATIENCE_S)
    store.kill()
    (got,) = pool.get_into(["a"], [bytearray(1)], deadline_s=PATIENCE_S)
    assert got.outcome is Outcome.FAILED
    assert "n1" in got.reason
    assert pool.get(["a"]) == [None]
    assert outcomes(pool.put(["b"], [b"2"])) == [Outcome.FAILED]
    assert bytes(held.views[0]) == b"1", "mapped memory outlives its store"
    held.release()
    start_store()
    for _ in range(1000):
        if pool.put(["b"], [b"2"])[0].ok:
            break
        threading.Event().wait(0.01)
    assert pool.get(["b"], deadline_s=PATIENCE_S) == [b"2"]


def test_a_stopped_store_costs_the_deadline_once(start_node, open_pool):
    near, slow = start_node("n0"), start_node("n1")
    pool = open_pool(near.record, distant(slow.record))
    pool.put(["a"], [b"1"], preferred=["n0"], deadline_s=PATIENCE_S)
    os.kill(slow.record.pid, signal.SIGSTOP)
    try:
        assert pool.get(["a"], deadline_s=PATIENCE_S) == [b"1"], "who has it is asked first"
        (got,) = pool.look(["b"], deadline_s=0.3)
        assert got.outcome is Outcome.FAILED
        assert "n1" in got.reason
    finally:
        os.kill(slow.record.pid, signal.SIGCONT)


def test_a_pool_of_nobody_answers_too(open_pool):
    pool = open_pool()
    assert pool.nodes == []
    for results in (pool.put(["a"], [b"1"]), pool.get_into(["a"], [bytearray(1)]), pool.look(["a"])):
        assert outcomes(results) == [Outcome.FAILED]
        assert "no store" in results[0].reason


@pytest.mark.parametrize("sizes", [b"", bytes(8), bytes(24)])
def test_an_answer_that_is_not_one_row_per_key_is_the_stores_fault(sizes):
    with pytest.raises(ProtocolError):
        Look.of([b"k" * 32, b"l" * 32], Findings(0, bytes(16), sizes, bytes(32)))
