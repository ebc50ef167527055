"""Which contexts are kept: bounded, worth most, and told to stores so that nobody else's are let go."""

from functools import cache

from hypothesis import given, settings
from hypothesis import strategies as st

from conductor.keeps import GRACE_S, TURN_S_MAX, Context, Keeps
from tests.unit.conductor.make import keys

ROOM = 100
"""Blocks of a store, half of which may be kept."""


@cache
def chain(name: str, length: int) -> tuple[bytes, ...]:
    return tuple(keys(length, name))


def context(name: str, length: int, value_s: float = 1.0, ttl_s: float = 10.0, node: str = "n0") -> Context:
    return Context(name, node, chain(name, length), value_s, ttl_s)


class Stores:
    """What is pinned where, and until when, if orders are followed."""

    def __init__(self) -> None:
        self.pinned: dict[tuple[str, bytes], float] = {}

    def follow(self, now_s: float, orders: list) -> None:
        for order in orders:
            for key in order.keys:
                if order.ttl_s:
                    self.pinned[order.node, key] = now_s + order.ttl_s
                else:
                    del self.pinned[order.node, key]  # what is let go was pinned

    def held(self, node: str = "n0") -> set[bytes]:
        return {key for where, key in self.pinned if where == node}


class Site:
    def __init__(self, **bounds: int) -> None:
        self.keeps, self.stores = Keeps(**bounds), Stores()

    def over(self, now_s: float, left: Context, keys: tuple[bytes, ...] = (), *, final: bool = False) -> None:
        kept = None if final else left
        orders = self.keeps.turn_over(now_s, left.run, keys or left.keys, kept, ROOM)
        self.stores.follow(now_s, orders)


def test_a_context_is_kept_until_its_time_is_over_and_then_let_go():
    site = Site()
    site.over(0.0, context("a", 10))
    assert site.stores.held() == set(chain("a", 10))
    site.stores.follow(9.9, site.keeps.tick(9.9))
    assert len(site.keeps) == 1
    site.stores.follow(10.0, site.keeps.tick(10.0))
    assert site.stores.held() == set()
    assert len(site.keeps) == 0


def test_stores_hold_on_longer_than_they_are_told_to_let_go():
    (order,) = Keeps().turn_over(0.0, "a", chain("a", 3), context("a", 3, ttl_s=10.0), ROOM)
    assert order.ttl_s == 10.0 + GRACE_S


def test_the_next_turn_s_context_takes_the_place_of_the_one_it_goes_on_with():
    site = Site()
    site.over(0.0, context("a", 10))
    site.stores.follow(5.0, site.keeps.turn_came(5.0, "a", chain("a", 14)))
    site.stores.follow(30.0, site.keeps.tick(30.0))  # longer than its time, but its turn runs
    assert site.stores.held() == set(chain("a", 10))
    site.over(40.0, context("a", 14))
    assert site.stores.held() == set(chain("a", 14))
    assert len(site.keeps) == 1
    moved = context("a", 18, node="n1")
    site.over(45.0, moved)
    assert site.stores.held("n0") == set()
    assert site.stores.held("n1") == set(chain("a", 18))


def test_a_last_turn_leaves_nothing_and_a_lost_one_ends():
    site = Site()
    site.over(0.0, context("a", 10))
    site.over(5.0, context("a", 14), final=True)
    assert site.stores.held() == set()
    site.over(10.0, context("b", 10))
    site.stores.follow(11.0, site.keeps.turn_came(11.0, "b", chain("b", 12)))
    site.stores.follow(11.0 + TURN_S_MAX, site.keeps.tick(11.0 + TURN_S_MAX))
    assert site.stores.held() == set()


def test_branches_of_one_program_keep_their_own():
    site = Site()
    site.over(0.0, context("a", 10))
    other = Context("a", "n0", chain("other", 10), 1.0, 10.0)
    site.over(1.0, other)
    assert len(site.keeps) == 2
    site.over(2.0, context("a", 12))
    assert site.stores.held() == {*chain("a", 12), *chain("other", 10)}


def test_blocks_of_several_contexts_count_once_and_stay_until_the_last_lets_go():
    site = Site()
    system = chain("system", 30)
    for number in range(3):
        one = Context(str(number), "n0", system + chain(str(number), 5), 1.0, 10.0 + number)
        site.over(0.0, one, one.keys)
    assert site.keeps.blocks("n0") == 45
    site.stores.follow(11.5, site.keeps.tick(11.5))
    assert site.stores.held() == {*system, *chain("2", 5)}


def test_what_is_worth_least_per_block_goes_first_and_no_newcomer_pushes_out_its_betters():
    site = Site()
    site.over(0.0, context("poor", 25, value_s=1.0))
    site.over(0.0, context("rich", 25, value_s=5.0))
    site.over(1.0, context("middle", 20, value_s=2.0))
    assert site.stores.held() == {*chain("rich", 25), *chain("middle", 20)}
    site.over(2.0, context("poorer", 20, value_s=0.5))
    assert site.stores.held() == {*chain("rich", 25), *chain("middle", 20)}
    site.over(3.0, context("huge", 51, value_s=99.0))  # more than its store may keep
    assert site.stores.held() == {*chain("rich", 25), *chain("middle", 20)}


def test_a_store_that_is_gone_is_forgotten():
    site = Site()
    site.over(0.0, context("a", 10))
    site.over(0.0, context("b", 10, node="n1"))
    site.keeps.node_gone("n0")
    assert (site.keeps.blocks("n0"), site.keeps.blocks("n1")) == (0, 10)


STEPS = st.lists(
    st.tuples(
        st.integers(0, 5),  # program
        st.integers(1, 40),  # length of its context
        st.floats(0.1, 10.0),  # worth
        st.floats(0.5, 20.0),  # time to live
        st.sampled_from(["n0", "n1"]),
        st.sampled_from(["over", "final", "came"]),
        st.floats(0.0, 8.0),  # since the last step
    ),
    max_size=40,
)


@settings(max_examples=50, deadline=None)
@given(STEPS)
def test_bounds_hold_and_stores_have_pinned_what_is_kept(steps):
    site, now_s = Site(blocks_max=90), 0.0
    for program, length, value_s, ttl_s, node, what, later_s in steps:
        now_s += later_s
        # all begin with the same blocks
        own = (*chain("system", min(length, 5)), *chain(str(program), max(0, length - 5)))
        one = Context(str(program), node, own, value_s, ttl_s)
        if what == "came":
            site.stores.follow(now_s, site.keeps.turn_came(now_s, one.run, own))
        else:
            site.over(now_s, one, own, final=what == "final")
        assert site.keeps.total <= 90
        for where in ("n0", "n1"):
            assert site.keeps.blocks(where) == len(site.stores.held(where)) <= ROOM // 2
    site.stores.follow(now_s + TURN_S_MAX, site.keeps.tick(now_s + TURN_S_MAX))
    assert not site.stores.pinned
    assert site.keeps.total == 0
