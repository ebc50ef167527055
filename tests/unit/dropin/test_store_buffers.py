"""`BufferPool` lends registered memory as upstream's does (0.3.13.post1, measured), within its bound."""

import gc
import threading

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from mooncake.core.errors import CapacityError, PeerTimeout, RequestError
from mooncake.dropin.store.buffers import LINE_BYTES, REGION_SHARE, BufferLease, BufferPool
from mooncake.store import MooncakeDistributedStore

KIB, MIB = 1 << 10, 1 << 20
PATIENCE_S = 30.0


class Registrar:
    """What a pool uses of a store."""

    def __init__(self) -> None:
        self.registered: dict[int, int] = {}
        self.answer = 0

    def register_buffer(self, buffer_ptr: int, size: int) -> int:
        assert buffer_ptr not in self.registered
        if not self.answer:
            self.registered[buffer_ptr] = size
        return self.answer

    def unregister_buffer(self, buffer_ptr: int) -> int:
        if not self.answer:
            del self.registered[buffer_ptr]
        return self.answer

    def covers(self, lease: BufferLease) -> bool:
        return any(
            at <= lease.ptr and lease.ptr + lease.size <= at + size for at, size in self.registered.items()
        )


@pytest.fixture
def registrar() -> Registrar:
    return Registrar()


# ------------------------------------------------------------ leases


@pytest.mark.parametrize("size", [0, 1, 100, 64 * KIB + 1, MIB])
def test_a_lease_is_registered_memory_of_the_size_asked_for(registrar: Registrar, size: int) -> None:
    lease = BufferPool(registrar, MIB).acquire(size)
    assert (lease.size, len(lease.buffer), lease.buffer.readonly) == (size, size, False)
    assert lease.ptr % LINE_BYTES == 0
    assert registrar.covers(lease)
    lease.buffer[:] = b"x" * size
    assert bytes(lease.buffer) == b"x" * size


def test_pointer_and_view_are_the_same_memory(registrar: Registrar) -> None:
    lease = BufferPool(registrar, MIB).acquire(1000)
    assert np.frombuffer(lease.buffer, np.uint8).ctypes.data == lease.ptr


def test_memory_is_reused_without_registering_it_again(registrar: Registrar) -> None:
    pool = BufferPool(registrar, MIB)
    with pool.buffer(1000) as lease:
        first = lease.ptr
    with pool.acquire(500) as lease:
        assert lease.ptr == first
    assert len(registrar.registered) == 1


def test_a_released_lease_has_no_memory_but_still_its_size(registrar: Registrar) -> None:
    lease = BufferPool(registrar, MIB).acquire(100)
    lease.release()
    lease.release()
    assert lease.size == 100
    for use in (lambda: lease.ptr, lambda: lease.buffer, lease.__enter__):
        with pytest.raises(RequestError, match="buffer lease is closed"):
            use()


def test_a_lease_stays_while_a_view_of_it_is_in_use(registrar: Registrar) -> None:
    lease = BufferPool(registrar, MIB).acquire(100)
    array = np.frombuffer(lease.buffer[10:20], np.uint8)
    with pytest.raises(RequestError, match="exported views"):
        lease.release()
    array[:] = 7
    assert bytes(lease.buffer[9:21]) == b"\0" + b"\7" * 10 + b"\0"
    del array
    lease.release()


def test_a_forgotten_lease_ends_with_its_last_view(registrar: Registrar) -> None:
    pool = BufferPool(registrar, MIB, block_on_exhaustion=False)
    view = pool.acquire(MIB).buffer
    gc.collect()
    with pytest.raises(CapacityError):
        pool.acquire(1)
    view[:1] = b"x"
    del view
    pool.acquire(MIB).release()


def test_an_error_in_the_context_is_not_hidden_by_views_it_holds(registrar: Registrar) -> None:
    pool = BufferPool(registrar, MIB)
    with pytest.raises(KeyError), pool.acquire(10) as lease:  # noqa: PT012 - the context is what is tested
        view = lease.buffer
        raise KeyError
    del view
    lease.release()
    pool.close()


# ------------------------------------------------------------ the bound


def test_what_is_lent_is_bounded_by_the_sizes_asked_for(registrar: Registrar) -> None:
    pool = BufferPool(registrar, MIB, block_on_exhaustion=False)
    leases = [pool.acquire(65 * KIB) for _ in range(15)]
    with pytest.raises(CapacityError, match="buffer pool is exhausted"):
        pool.acquire(65 * KIB)
    leases.pop().release()
    pool.acquire(65 * KIB)


def test_small_leases_do_not_use_up_the_bound(registrar: Registrar) -> None:
    pool = BufferPool(registrar, 4 * KIB, block_on_exhaustion=False)
    leases = [pool.acquire(100) for _ in range(40)]
    assert len({lease.ptr for lease in leases}) == 40


def test_more_than_the_bound_is_refused_at_once(registrar: Registrar) -> None:
    pool = BufferPool(registrar, MIB)
    for size in (MIB + 1, (1 << 64) - 1):
        with pytest.raises(RequestError, match="exceeds pool capacity"):
            pool.acquire(size)


def test_leases_can_be_bounded_by_number(registrar: Registrar) -> None:
    pool = BufferPool(registrar, MIB, max_regions=1, block_on_exhaustion=False)
    with pool.acquire(1), pytest.raises(CapacityError):
        pool.acquire(1)
    pool.acquire(1)


@pytest.mark.parametrize("where", ["pool", "call"])
def test_a_wait_ends_at_its_timeout(registrar: Registrar, where: str) -> None:
    pool = BufferPool(registrar, MIB, default_timeout=0.01 if where == "pool" else None)
    with pool.acquire(MIB), pytest.raises(CapacityError, match="timed out waiting for buffer"):
        pool.acquire(1, timeout=None if where == "pool" else 0.01)


def test_a_call_may_refuse_to_wait_where_the_pool_would(registrar: Registrar) -> None:
    pool = BufferPool(registrar, MIB)
    with pool.acquire(MIB), pytest.raises(CapacityError, match="exhausted"):
        pool.acquire(1, block=False)


@pytest.mark.parametrize("end", ["release", "forget"])
def test_who_waits_gets_what_another_thread_gives_back(registrar: Registrar, end: str) -> None:
    pool = BufferPool(registrar, MIB)
    held = [pool.acquire(MIB)]
    got: list[BufferLease] = []
    waiter = threading.Thread(target=lambda: got.append(pool.acquire(100, timeout=PATIENCE_S)))
    waiter.start()
    if end == "release":
        held[0].release()
    held.clear()
    waiter.join(PATIENCE_S)
    assert [lease.size for lease in got] == [100]


def test_a_lease_may_end_in_a_finalizer_that_interrupts_the_pool_itself(registrar: Registrar) -> None:
    pool = BufferPool(registrar, MIB, block_on_exhaustion=False)
    inside: list[BufferLease] = [pool.acquire(MIB // 2), pool.acquire(MIB // 4)]
    register = registrar.register_buffer

    def interrupted(buffer_ptr: int, size: int) -> int:
        inside.pop().release()
        inside.pop()
        return register(buffer_ptr, size)

    registrar.register_buffer = interrupted
    pool._regions[0]._room.allocate = lambda size: None  # so that the next lease needs a region of its own
    pool.acquire(1000).release()
    assert not inside
    pool.close()


def test_threads_that_share_a_pool_never_share_memory(registrar: Registrar) -> None:
    pool = BufferPool(registrar, 64 * KIB, max_regions=3)
    wrong = []

    def work(mark: int) -> None:
        for turn in range(100):
            with pool.acquire(1 + 97 * (mark + turn) % 9000, timeout=PATIENCE_S) as lease:
                array = np.frombuffer(lease.buffer, np.uint8)
                array[:] = mark
                if not (array == mark).all():
                    wrong.append(mark)
                del array

    threads = [threading.Thread(target=work, args=(mark,)) for mark in range(1, 7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
    assert not wrong
    pool.close()


def test_a_lease_that_many_release_at_once_is_given_back_once(registrar: Registrar) -> None:
    pool = BufferPool(registrar, MIB, block_on_exhaustion=False)
    start = threading.Barrier(4)
    for _ in range(50):
        lease = pool.acquire(MIB // 2)

        def release(lease: BufferLease = lease) -> None:
            start.wait(PATIENCE_S)
            lease.release()

        threads = [threading.Thread(target=release) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE_S)
    both = [pool.acquire(MIB // 2) for _ in range(2)]
    with pytest.raises(CapacityError):
        pool.acquire(1)
    assert len({lease.ptr for lease in both}) == 2


# ------------------------------------------------------------ regions


def test_prewarming_registers_before_the_first_lease(registrar: Registrar) -> None:
    pool = BufferPool(registrar, 8 * MIB, prewarm_size=MIB, prewarm_count=3)
    before = dict(registrar.registered)
    assert sum(before.values()) >= 3 * MIB
    leases = [pool.acquire(MIB) for _ in range(3)]
    pool.prewarm(MIB, 1)
    assert registrar.registered == before
    assert all(registrar.covers(lease) for lease in leases)


def test_prewarming_stops_at_the_bound(registrar: Registrar) -> None:
    pool = BufferPool(registrar, MIB)
    pool.prewarm(MIB, 1000)
    assert sum(registrar.registered.values()) == MIB


def test_idle_regions_make_room_for_a_lease_that_fits_none(registrar: Registrar) -> None:
    pool = BufferPool(registrar, 64 * MIB)
    small = [pool.acquire(9 * MIB) for _ in range(7)]
    for lease in small:
        lease.release()
    pool.acquire(64 * MIB).release()
    assert sum(registrar.registered.values()) <= REGION_SHARE * 64 * MIB


def test_close_gives_everything_back(registrar: Registrar) -> None:
    pool = BufferPool(registrar, MIB)
    pool.acquire(100).release()
    pool.close()
    pool.close()
    assert not registrar.registered
    pool.prewarm(10, 1)
    assert not registrar.registered
    with pytest.raises(RequestError, match="buffer pool is closed"):
        pool.acquire(0)


def test_a_pool_with_leases_does_not_close(registrar: Registrar) -> None:
    pool = BufferPool(registrar, MIB)
    lease = pool.acquire(100)
    with pytest.raises(RequestError, match="active leases"):
        pool.close()
    pool.acquire(100).release()
    lease.release()
    pool.close()


def test_memory_that_a_peer_still_uses_stays_until_close_is_called_again(registrar: Registrar) -> None:
    pool = BufferPool(registrar, MIB)
    pool.acquire(100).release()
    registrar.answer = -900
    with pytest.raises(PeerTimeout):
        pool.close()
    assert registrar.registered
    registrar.answer = 0
    pool.close()
    assert not registrar.registered


def test_a_forgotten_pool_unregisters_its_memory(registrar: Registrar) -> None:
    done = threading.Event()
    real = registrar.unregister_buffer
    registrar.unregister_buffer = lambda address: (real(address), done.set())[0]
    pool = BufferPool(registrar, MIB)
    pool.acquire(100).release()
    del pool
    gc.collect()
    assert done.wait(PATIENCE_S)
    assert not registrar.registered


# ------------------------------------------------------------ arguments


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        ({"max_bytes": -1}, "max_bytes"),
        ({"min_size_class": 0}, "min_size_class and alignment must be positive"),
        ({"alignment": 0}, "must be positive"),
        ({"alignment": 12345}, "alignment 12345 must be a power of two"),
        ({"default_timeout": -1}, "default_timeout"),
        ({"max_regions": -1}, "max_regions"),
    ],
)
def test_a_bad_argument_is_named(registrar: Registrar, bad: dict, match: str) -> None:
    with pytest.raises(RequestError, match=match):
        BufferPool(registrar, **{"max_bytes": MIB} | bad)


def test_bad_sizes_and_timeouts_are_refused(registrar: Registrar) -> None:
    pool = BufferPool(registrar, MIB)
    with pytest.raises(RequestError, match="size -1"):
        pool.acquire(-1)
    with pytest.raises(RequestError, match="timeout -1"):
        pool.acquire(1, timeout=-1)
    with pytest.raises(TypeError):
        pool.acquire("1")
    with pytest.raises(RequestError, match="no store"):
        BufferPool(object())


# ------------------------------------------------------------ any order of calls


@settings(max_examples=60, stateful_step_count=40, deadline=None)
class AnyUse(RuleBasedStateMachine):
    """Whatever is taken and given back: the bound holds, no two leases overlap, close releases all."""

    def __init__(self) -> None:
        super().__init__()
        self.registrar = Registrar()
        self.pool = BufferPool(self.registrar, 100_000, max_regions=9, block_on_exhaustion=False)
        self.leases: list[tuple[BufferLease, int]] = []
        self.marks = 0

    @rule(size=st.one_of(st.integers(0, 300), st.integers(0, 110_000)))
    def take(self, size: int) -> None:
        lent = sum(lease.size for lease, _ in self.leases)
        try:
            lease = self.pool.acquire(size)
        except RequestError:
            assert size > 100_000
            return
        except CapacityError:
            # refused only for a reason: the bytes, the number, or no piece of that size in one region
            assert lent + size > 100_000 or len(self.leases) == 9 or lent
            return
        assert lent + size <= 100_000
        assert len(self.leases) < 9
        self.marks = self.marks % 255 + 1
        lease.buffer[:] = bytes([self.marks]) * size
        self.leases.append((lease, self.marks))

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        lease, _ = self.leases.pop(data.draw(st.integers(0, len(self.leases) - 1)))
        lease.release()

    @precondition(lambda self: self.leases)
    @rule()
    def forget(self) -> None:
        self.leases.pop()

    @rule(size=st.integers(1, 50_000), count=st.integers(0, 3))
    def prewarm(self, size: int, count: int) -> None:
        self.pool.prewarm(size, count)

    @invariant()
    def leases_keep_their_bytes_in_registered_memory(self) -> None:
        for lease, mark in self.leases:
            assert bytes(lease.buffer) == bytes([mark]) * lease.size
            assert self.registrar.covers(lease)

    @invariant()
    def memory_is_bounded(self) -> None:
        assert sum(self.registrar.registered.values()) <= REGION_SHARE * 100_000 + 2 * 4096

    def teardown(self) -> None:
        if self.leases:
            with pytest.raises(RequestError, match="active leases"):
                self.pool.close()
        self.leases.clear()
        self.pool.close()
        assert not self.registrar.registered


TestAnyUse = AnyUse.TestCase


# ------------------------------------------------------------ with a store


def test_leases_carry_objects_to_the_store_and_back(store: MooncakeDistributedStore) -> None:
    pool = BufferPool(store)
    with pool.acquire(MIB) as source, pool.acquire(MIB) as target:
        source.buffer[:5] = b"hello"
        assert store.put_from("k", source.ptr, source.size) == 0
        assert store.get_into("k", target.ptr, target.size) == MIB
        assert bytes(target.buffer[:5]) == b"hello"
    pool.close()


def test_the_default_bound_is_twice_the_local_buffer(join) -> None:
    store = join(0, local_buffer_size="1MB")
    pool = BufferPool(store, block_on_exhaustion=False)
    pool.acquire(2 * MIB).release()
    with pytest.raises(RequestError, match="exceeds pool capacity"):
        pool.acquire(2 * MIB + 1)
    pool.close()


def test_without_a_local_buffer_a_bound_must_be_given(join) -> None:
    store = join(0, local_buffer_size=0)
    with pytest.raises(RequestError, match="give max_bytes"):
        BufferPool(store)
    BufferPool(store, MIB).close()


def test_a_pool_outlives_its_closed_store_without_a_crash(join) -> None:
    store = join(0)
    pool = BufferPool(store)
    lease = pool.acquire(100)
    lease.buffer[:5] = b"hello"
    store.close()
    assert bytes(lease.buffer[:5]) == b"hello"
    lease.release()
    pool.close()
    with pytest.raises(RequestError, match="call setup first"):
        BufferPool(store)
    with pytest.raises(RequestError, match="is it set up"):
        BufferPool(store, MIB).acquire(1)
