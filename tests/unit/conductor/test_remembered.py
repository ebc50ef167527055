"""What the hot path remembers is what it would work out again."""

from hypothesis import given
from hypothesis import strategies as st

from conductor.cluster import ClusterView, Health, Load
from conductor.coming import Coming
from conductor.cost import CostModel
from conductor.index import PrefixIndex
from conductor.pricing import Pricing, Worker
from mooncake.core.messages import gpu_node
from tests.unit.conductor.make import BLOCK, cluster, facts, keys, record

NAMES = st.sampled_from(["p0", "p1", "d0"])
EVENTS = st.lists(
    st.tuples(st.sampled_from(["up", "again", "gone", "link", "cut", "pulse", "old", "tick"]), NAMES),
    max_size=40,
)


@given(EVENTS)
def test_who_is_alive_is_told_afresh_after_every_event(events):
    view = ClusterView()
    for now_s, (kind, name) in enumerate(events):
        match kind:
            case "up":
                view.instance_up(now_s, record(name))
            case "again":
                view.instance_up(now_s, record(name, "decode", epoch=f"e{now_s % 2}"))
            case "gone":
                view.instance_removed(now_s, name)
            case "link":
                view.link_up(now_s, name)
            case "cut":
                view.link_down(now_s, name)
            case "pulse":
                view.pulse(now_s, name, 0.0)
            case "old":
                view.pulse(now_s, name, 1e3)
            case _:
                view.tick(now_s)
        known = [(one, load) for one, health, load in view.instances() if health is Health.ALIVE]
        assert view.alive() == sorted(known, key=lambda pair: pair[0].instance_id)


@given(st.lists(st.tuples(st.booleans(), st.floats(0, 9), st.integers(0, 3)), max_size=30))
def test_a_queue_is_the_sum_of_what_is_in_it(steps):
    load, queue, head_s = Load(), {}, 0.0
    for now_s, (adds, seconds, which) in enumerate(steps):
        if adds or not queue:
            head_s = head_s if queue else float(now_s)
            queue[now_s] = seconds
            load.add_prefill(now_s, now_s, seconds, 1)
        else:
            ticket = list(queue)[which % len(queue)]
            head_s = float(now_s) if ticket == next(iter(queue)) else head_s
            del queue[ticket]
            load.remove_prefill(now_s, ticket, 1)
        for at_s in (now_s, now_s + 0.5):
            first = next(iter(queue.values()), 0.0)
            assert load.queue_s(at_s) == sum(queue.values()) - min(first, at_s - head_s)


@given(
    st.lists(
        st.one_of(
            st.tuples(st.integers(0, 500), st.sampled_from("ab"), st.sampled_from(["", "default"])),
            st.tuples(st.integers(1, 500), st.just(""), st.just("ask")),
        ),
        max_size=60,
    )
)
def test_lengths_of_answers_are_those_of_a_model_that_was_never_asked(steps):
    asked, learned = CostModel(), []
    for tokens, tenant, slo_class in steps:
        if slo_class != "ask":
            asked.observe_output(tokens, tenant, slo_class)
            learned.append((tokens, tenant, slo_class))
            continue
        fresh = CostModel()
        for one in learned:
            fresh.observe_output(*one)
        for who in ("a", "b"):
            question = tokens, who, "default", tokens // 2
            assert asked.output_tokens(*question) == fresh.output_tokens(*question)
            assert asked.output_tokens_high(*question) == fresh.output_tokens_high(*question)


HELD = st.dictionaries(st.sampled_from(["n0", "n1", gpu_node("p0"), gpu_node("p1")]), st.integers(0, 30))


@given(HELD, st.integers(1, 40 * BLOCK), st.booleans(), st.integers(0, 3 * BLOCK))
def test_an_option_costs_the_same_whoever_was_priced_before_it(held, prompt_len, fetches, emitted_n):
    names, index = keys(30), PrefixIndex()
    for holder, depth in held.items():
        index.apply(holder, b"".join(names[:depth]), b"")
    view = cluster(*(record(f"p{n}", "prefill", node=f"n{n}", block_size=BLOCK << n // 3) for n in range(5)))
    pricing = Pricing(index, CostModel(), view, Coming(), fetches=fetches)
    asked = facts(prompt_len=prompt_len, keys=names[: prompt_len // BLOCK])
    workers = [Worker(one, load) for one, load in view.alive()]
    together = pricing.hits(asked)
    for worker in [*workers, *reversed(workers)]:
        alone = pricing.prefill(1.0, asked, worker, pricing.hits(asked), emitted_n)
        assert pricing.prefill(1.0, asked, worker, together, emitted_n) == alone
