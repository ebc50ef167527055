"""What the Conductor knows is one word, and a change of it is news once."""

from conductor.modes import NAMES_MAX, Fallback, Fallbacks, IndexMode, index_mode
from mooncake.core.messages import gpu_node


def test_in_step_with_every_store_is_exact_and_nothing_is_missing():
    assert index_mode({"a": True, "b": True}, ["b", "a", "a"]) == (IndexMode.EXACT, "")


def test_one_store_out_of_step_is_degraded_and_named():
    assert index_mode({"a": True, "b": False}, []) == (
        IndexMode.DEGRADED,
        "not in step with the blocks of b",
    )


def test_an_engine_whose_own_cache_is_not_known_is_degraded_and_named():
    mode, detail = index_mode({"a": True, gpu_node("p0"): False}, ["a"])
    assert (mode, detail) == (IndexMode.DEGRADED, "not in step with the blocks of gpu:p0")


def test_an_instance_beside_no_store_that_is_followed_is_degraded():
    mode, detail = index_mode({"a": True}, ["a", "c"])
    assert (mode, "of c" in detail) == (IndexMode.DEGRADED, True)


def test_nothing_known_is_fallback_whether_no_store_is_there_or_none_is_in_step():
    assert index_mode({}, ["a"])[0] is IndexMode.FALLBACK
    assert index_mode({}, [])[0] is IndexMode.FALLBACK
    assert index_mode({"a": False, "b": False}, ["a"])[0] is IndexMode.FALLBACK


def test_a_message_names_a_handful_of_nodes_and_counts_the_rest():
    _, detail = index_mode({f"n{i}": False for i in range(NAMES_MAX + 5)}, [])
    assert detail.endswith("and 5 more")


def test_a_state_is_news_when_it_changes_and_only_then():
    fallbacks = Fallbacks()
    news = [fallbacks.set(Fallback.INDEX_STALE, detail) for detail in ("", "b", "b", "b, c", "", "")]
    assert news == [False, True, False, True, True, False]


def test_states_of_two_kinds_do_not_mix():
    fallbacks = Fallbacks()
    fallbacks.set(Fallback.NO_PREFILL_ALIVE, "x")
    assert fallbacks.detail(Fallback.NO_DECODE_ALIVE) == ""
    assert fallbacks.detail(Fallback.NO_PREFILL_ALIVE) == "x"
