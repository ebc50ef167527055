"""Which prefixes are worth copying ahead: demand decides, with a dead band, in bounds, alike everywhere."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conductor import heat as heat_module
from conductor.cost import CostModel
from conductor.heat import MEMORY_S, USES_MIN, Heat, Wish, placed
from conductor.index import PrefixIndex

BLOCK_BYTES, BLOCK_TOKENS = 1 << 20, 32
MANY = 8


def chain(name: str, length: int, begin: int = 0) -> list[bytes]:
    return [f"{name}:{number}".encode().ljust(32, b".") for number in range(begin, begin + length)]


def heat(copies_max: int = MANY, remote_bytes_s: float = 1e12) -> Heat:
    """By default a fetch is so quick that only uses count: a copy is worth one per USES_MIN."""
    return Heat(CostModel(remote_bytes_s=remote_bytes_s), copies_max)


def use(heat: Heat, keys: list[bytes], times: float, now_s: float = 0.0, hit: int | None = None) -> None:
    for _ in range(int(times)):
        heat.planned(now_s, keys, len(keys) if hit is None else hit, BLOCK_BYTES, BLOCK_TOKENS)


def copies(heat: Heat, now_s: float = 0.0, nodes: int = MANY) -> int:
    """Of the one prefix that is used."""
    wishes = heat.step(now_s, nodes)
    assert len(wishes) <= 1
    return wishes[0].copies if wishes else 0


# ---------------------------------------------------------------- how many


@pytest.mark.parametrize(("uses", "wanted"), [(1, 0), (2 * USES_MIN - 1, 0), (2 * USES_MIN, 2), (15, 5)])
def test_a_prefix_gets_a_copy_per_uses_that_make_one_worth_it_and_at_least_two(uses, wanted):
    found = heat()
    use(found, chain("a", 5), uses)
    assert copies(found) == wanted


def test_no_more_copies_than_nodes_or_than_are_allowed():
    found = heat(copies_max=4)
    use(found, chain("a", 5), 100)
    assert copies(found, nodes=3) == 3
    assert copies(found, nodes=9) == 4
    assert copies(found, nodes=1) == 0


@pytest.mark.parametrize("copies_max", [0, 1])
def test_it_can_be_switched_off_and_then_counts_nothing(copies_max):
    found = heat(copies_max)
    use(found, chain("a", 5), 100)
    assert (found.step(0.0, MANY), found.counted) == ([], 0)


def test_only_what_was_found_in_the_pool_counts():
    found = heat()
    keys = chain("a", 20)
    use(found, keys, 50, hit=0)
    assert found.counted == 0
    use(found, keys, 50, hit=7)
    (wish,) = found.step(0.0, MANY)
    assert list(wish.keys) == keys[:7]


def test_where_computing_takes_less_than_fetching_a_copy_is_worth_less():
    keys = chain("a", 8)
    seconds = CostModel().prefill_s(8 * BLOCK_TOKENS, 0) - CostModel().prefill_s(0, 0)
    slow = heat(remote_bytes_s=8 * BLOCK_BYTES / (4 * seconds))  # a fetch takes four times as long
    use(slow, keys, 8 * USES_MIN - 1)
    assert copies(slow) == 0
    use(slow, keys, 2)
    assert copies(slow) == 2


# ---------------------------------------------------------------- the dead band


def test_copies_rise_at_once_and_stay_until_demand_has_fallen_by_half():
    found, keys = heat(), chain("a", 5)
    use(found, keys, 6 * USES_MIN)
    assert copies(found) == 6
    just_before, after = 0.6 * MEMORY_S, 0.75 * MEMORY_S  # exp(-0.6) = .55, exp(-0.75) = .47
    assert copies(found, just_before) == 6
    assert copies(found, after) == 5
    use(found, keys, 9 * USES_MIN, after)
    assert copies(found, after) == MANY


def test_demand_at_an_edge_changes_nothing():
    found, keys = heat(), chain("a", 5)
    use(found, keys, 3 * USES_MIN)
    seen = [copies(found)]
    for turn in range(1, 40):
        now_s = turn * 0.05 * MEMORY_S
        seen.append(copies(found, now_s))
        if turn % 2:
            use(found, keys, 1, now_s)  # settles a little above and below 3 times USES_MIN
    assert set(seen) == {3}


def test_what_has_cooled_down_is_forgotten_with_its_keys():
    found = heat()
    use(found, chain("a", 51), 30)
    assert found.kept == 51
    assert found.step(10 * MEMORY_S, MANY) == []
    assert found.kept == 0


def test_while_nodes_are_away_a_wish_is_small_and_then_whole_again():
    found = heat()
    use(found, chain("a", 5), 30)
    assert [copies(found, nodes=nodes) for nodes in (8, 2, 1, 8)] == [8, 2, 0, 8]


# ---------------------------------------------------------------- what belongs together


def test_a_shared_beginning_gets_more_copies_than_what_follows_it_in_some_prompts():
    found = heat()
    shared = chain("s", 64)
    for name, times in (("a", 2), ("b", 9), ("c", 9)):
        use(found, shared + chain(name, 20), times)
    wishes = found.step(0.0, 16)
    first, *rest = wishes
    assert list(first.keys) == shared[: len(first.keys)]
    assert first.copies == int(20 / USES_MIN)
    assert first.parent == b""
    for wish in rest:
        assert wish.copies == int(9 / USES_MIN)
        assert wish.parent == first.keys[-1]
    assert {wish.keys[-1][:1] for wish in rest} == {b"b", b"c"}


def test_the_cut_of_what_is_shared_is_at_most_a_fifth_too_short():
    for length in range(1, 600):
        rungs = heat_module._rungs(length)
        assert rungs == sorted(set(rungs))
        assert length >= rungs[-1] >= 0.8 * length


def test_the_most_used_are_wished_for_when_there_is_no_room_for_all():
    found = heat()
    for name, times in (("a", 10), ("b", 30), ("c", 20)):
        use(found, chain(name, 10), times)
    wishes = found.step(0.0, MANY, keys_max=20)
    assert sorted(wish.keys[0][:1] for wish in wishes) == [b"b", b"c"]


# ---------------------------------------------------------------- where


def indexed(**held: list[bytes]) -> PrefixIndex:
    index = PrefixIndex()
    for node, keys in held.items():
        index.apply(node, b"".join(keys), b"")
    return index


def test_who_has_most_of_a_prefix_keeps_it_and_the_others_follow_in_an_order_of_its_own():
    keys = chain("a", 10)
    index = indexed(n2=keys, n5=keys[:4])
    nodes = [f"n{number}" for number in range(8)]
    ((_, order),) = placed([Wish(tuple(keys), 3, 1, b"")], nodes, index)
    assert order[:2] == ["n2", "n5"]
    assert sorted(order) == nodes
    assert placed([Wish(tuple(keys), 3, 1, b"")], nodes[::-1], index)[0][1] == order
    firsts = {
        placed([Wish(tuple(chain(str(n), 3)), 2, 1, b"")], nodes, PrefixIndex())[0][1][0] for n in range(40)
    }
    assert len(firsts) == len(nodes)


def test_what_follows_a_prefix_goes_where_the_prefix_goes():
    shared, deep = chain("s", 10), chain("d", 5)
    wishes = [Wish(tuple(shared), 4, 1, b""), Wish(tuple(deep), 2, 1, shared[-1])]
    (_, first), (_, second) = placed(wishes, [f"n{number}" for number in range(8)], indexed(n3=shared))
    assert set(second[:2]) <= set(first[:4])


# ---------------------------------------------------------------- bounds and determinism

requests = st.lists(
    st.tuples(
        st.floats(0, 100),
        st.integers(0, 3),  # which shared beginning
        st.integers(0, 5),  # which end
        st.integers(1, 40),
        st.integers(0, 60),
    ),
    max_size=60,
)


def replayed(asked, copies_max: int = 5, nodes: int = 7) -> list[list[Wish]]:
    found, now_s, told = heat(copies_max, remote_bytes_s=1e9), 0.0, []
    for wait_s, shared, end, length, hit in asked:
        now_s += wait_s
        keys = chain(f"s{shared}", 12) + chain(f"s{shared}e{end}", length)
        use(found, keys, 4, now_s, hit)
        told.append(found.step(now_s, nodes, keys_max=40))
    return told


@settings(max_examples=60)
@given(requests)
def test_wishes_keep_their_bounds_and_never_name_a_block_without_those_before_it(asked):
    for wishes in replayed(asked):
        assert sum(len(wish.keys) for wish in wishes) <= 40
        named = [key for wish in wishes for key in wish.keys]
        assert len(named) == len(set(named))
        by_last = {}
        for wish in wishes:
            assert 2 <= wish.copies <= 5
            if wish.parent:
                assert wish.copies <= by_last[wish.parent]
            else:
                assert wish.keys[0].endswith(b":0".ljust(len(wish.keys[0]) - 2, b"."))
            by_last[wish.keys[-1]] = wish.copies


@settings(max_examples=30)
@given(requests)
def test_the_same_requests_give_the_same_wishes(asked):
    assert replayed(asked) == replayed(asked)


def test_memory_is_bounded_whatever_is_asked_for(monkeypatch):
    monkeypatch.setattr(heat_module, "HEADS_MAX", 100)
    monkeypatch.setattr(heat_module, "KEYS_MAX", 200)
    found = heat()
    for number in range(300):
        use(found, chain(str(number), 40), 4)
        assert found.counted <= 100
        assert found.kept <= 400
    assert sum(len(wish.keys) for wish in found.step(0.0, MANY)) <= 200


SCRIPT = """
from conductor.cost import CostModel
from conductor.heat import Heat
heat, told = Heat(CostModel(remote_bytes_s=1e12), 8), []
for n in range(200):
    keys = [b"%d" % i for i in range(9)] + [b"%d.%d" % (n % 7, i) for i in range(n % 13)]
    heat.planned(n * 0.5, keys, len(keys), 1 << 20, 32)
    told += heat.step(n * 0.5, 8)
print(told)
"""


def test_wishes_do_not_depend_on_the_hash_seed():
    told = [
        subprocess.run(
            [sys.executable, "-c", SCRIPT],
            cwd=Path(__file__).parents[3],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
            timeout=120,
        ).stdout
        for seed in ("1", "2")
    ]
    assert told[0] == told[1]
    assert told[0].count(b"Wish") > 100
