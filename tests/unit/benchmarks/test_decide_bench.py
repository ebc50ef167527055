"""The decision benchmark asks for what it put in; blocks that came and went leave nothing."""

from pathlib import Path

from benchmarks.decide_peers import base, memory, ours


def test_depths_are_those_that_were_put_in_and_every_question_can_be_asked(monkeypatch):
    small = {"PROMPT_TOKENS": 1280, "PROMPT_BLOCKS": 10, "SHARED_BLOCKS": 2, "GROUP_BLOCKS": 82}
    for module in (base, ours):
        for name, value in small.items():
            if hasattr(module, name):
                monkeypatch.setattr(module, name, value)
    asked = ours.Ours(1_000, Path())
    asked.check()
    for op in ("HASH 50", "MATCH 100", "DECIDE 0", "FIRST 100", "PACKED 50", "CHURN 100", "SCORE 0"):
        told = asked.run(op, 1, 1, 1e-4)
        assert told["count"] >= 1
        assert told["seconds"] > 0
    assert asked.view.charged == 2 * ours.QUEUED  # every decision gave back what it had charged


def test_a_block_is_held_by_some_2_7_nodes():
    held = [(node, number) for node, path in base.holdings(base.ASKED) for number in path]
    blocks = len({number for _, number in held})
    assert blocks == base.ASKED * base.GROUP_BLOCKS
    assert 2.4 < len(set(held)) / blocks < 3.2


def test_what_came_and_went_leaves_nothing():
    held: set[tuple[int, int, bytes]] = set()

    def store(chunk, node, draw):
        held.add((chunk, node, draw.randbytes(8)))

    def remove(chunk, node, draw):
        held.remove((chunk, node, draw.randbytes(8)))

    told = memory.measure(store, remove, 3_000, 10_000)
    assert {chunk for chunk, _, _ in held} == {10, 11, 12}
    assert set(told) == {"filled", "most", "end"}
