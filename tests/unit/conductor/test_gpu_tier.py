"""What an engine's own cache holds costs it nothing, and is no use to any other."""

from conductor.coming import Coming
from conductor.cost import CostModel
from conductor.index import PrefixIndex
from conductor.plan import Plan, Rejection
from conductor.pricing import Hits, Prefill, Pricing, Worker
from conductor.scheduler import Scheduler, SchedulerConfig
from mooncake.core.messages import InstanceRecord, gpu_node
from tests.unit.conductor.make import BLOCK, cluster, facts, keys, record

LONG = facts(prompt_len=64 * BLOCK + 1)
BLOB = b"".join(LONG.keys)


def blob(count: int) -> bytes:
    return BLOB[: 32 * count]


def priced(index: PrefixIndex, worker: str, *records: InstanceRecord) -> Prefill:
    """What the prompt would take on one of `records`, all of them idle."""
    view = cluster(*records)
    pricing = Pricing(index, CostModel(), view, Coming(), fetches=True)
    own = next(one for one in records if one.instance_id == worker)
    return pricing.prefill(0.0, LONG, Worker(own, view.load(worker)), pricing.hits(LONG))


def test_a_prefix_in_the_own_cache_is_priced_without_a_load_and_one_in_the_store_with_it():
    cost, size = CostModel(), record("p0").block_bytes
    computed_s = cost.prefill_s(1 + 4 * BLOCK, 60 * BLOCK)
    for holder, load_blocks in ((gpu_node("p0"), 0), ("n0", 60)):
        index = PrefixIndex()
        index.apply(holder, blob(60), b"")
        option = priced(index, "p0", record("p0", "prefill", node="n0"))
        assert option.hit_blocks == 60
        assert option.gpu_blocks == 60 - load_blocks
        assert option.work_s == cost.transfer_s(load_blocks * size, remote=False) + computed_s


def test_the_deeper_of_both_counts_and_only_what_the_own_cache_lacks_is_loaded():
    cost, size, own = CostModel(), record("p0").block_bytes, record("p0", "prefill", node="n0")
    for stored, cached in ((60, 40), (40, 60)):
        index = PrefixIndex()
        index.apply("n0", blob(stored), b"")
        index.apply(gpu_node("p0"), blob(cached), b"")
        option = priced(index, "p0", own)
        load_s = cost.transfer_s((60 - cached) * size, remote=False)
        assert (option.hit_blocks, option.gpu_blocks) == (60, cached)
        assert option.work_s == load_s + cost.prefill_s(1 + 4 * BLOCK, 60 * BLOCK)


def test_what_others_have_in_their_own_caches_is_never_fetched():
    index = PrefixIndex()
    index.apply(gpu_node("p1"), blob(64), b"")
    index.apply("n0", blob(2), b"")
    records = record("p0", "prefill", node="n0"), record("p1", "prefill", node="n1")
    option = priced(index, "p0", *records)
    assert (option.hit_blocks, option.fetch_blocks, option.fetch_node) == (2, 0, None)
    pricing = Pricing(index, CostModel(), cluster(*records), Coming(), fetches=True)
    assert pricing.hits(LONG).deepest == (2, "n0")
    index.reset("n0")
    assert pricing.hits(LONG).deepest == (0, "")


def test_an_instance_s_name_and_a_node_s_are_two_things():
    index = PrefixIndex()
    index.apply("p0", blob(8), b"")  # a store on a node of that name
    hits = Hits(index.longest_prefix(LONG.keys), (0, ""))
    assert (hits.on_gpu("p0"), hits.blocks) == (0, {"p0": 8})
    index.apply(gpu_node("p0"), blob(4), b"")
    hits = Hits(index.longest_prefix(LONG.keys), (0, ""))
    assert (hits.on_gpu("p0"), hits.blocks["p0"]) == (4, 8)


def test_a_store_fetches_what_it_lacks_itself_though_its_engine_has_some():
    index, cost = PrefixIndex(), CostModel(prefill_prior=(1e-3, 1.0, 1e-9))  # computing is dear
    index.apply("n1", blob(64), b"")
    index.apply("n0", blob(10), b"")
    index.apply(gpu_node("p0"), blob(30), b"")
    own = record("p0", "prefill", node="n0")
    view = cluster(own, record("p1", "prefill", node="n1"))
    pricing = Pricing(index, cost, view, Coming(), fetches=True)
    option = pricing.prefill(0.0, LONG, Worker(own, view.load("p0")), pricing.hits(LONG))
    assert (option.fetch_blocks, option.fetch_node, option.gpu_blocks) == (54, "n1", 30)
    fetch_s = cost.transfer_s(54 * own.block_bytes, remote=True)
    load_s = cost.transfer_s(34 * own.block_bytes, remote=False)
    assert option.ttft_s == fetch_s + (load_s + cost.prefill_s(1, 64 * BLOCK))


def planned(index: PrefixIndex, *records: InstanceRecord) -> Plan:
    answer = Scheduler(SchedulerConfig(), index, CostModel(), cluster(*records)).on_request(0.0, LONG)
    assert not isinstance(answer, Rejection)
    return answer


def test_a_prompt_goes_where_its_prefix_is_on_the_engine_though_every_store_has_it():
    index = PrefixIndex()
    records = [record(f"p{i}", "prefill", node=f"n{i}") for i in range(3)] + [
        record("d0", "decode", node="n9")
    ]
    for i in range(3):
        index.apply(f"n{i}", blob(64), b"")
    assert planned(index, *records).prefill == "p0"  # all alike
    index.apply(gpu_node("p2"), blob(64), b"")
    assert planned(index, *records).prefill == "p2"
    index.reset(gpu_node("p2"))  # it restarted
    assert planned(index, *records).prefill == "p0"


def test_an_answer_is_decoded_where_its_conversation_is_in_the_engine_s_own_cache():
    index = PrefixIndex()
    records = [record("p0", "prefill", node="n0")]
    records += [record(f"d{i}", "decode", node="n1") for i in range(3)]
    assert planned(index, *records).decode == "d0"
    index.apply(gpu_node("d1"), blob(50), b"")
    assert planned(index, *records).decode == "d1"


def test_the_prompt_of_another_tenant_or_text_hits_nothing():
    index = PrefixIndex()
    index.apply(gpu_node("p0"), b"".join(keys(64, "another")), b"")
    option = priced(index, "p0", record("p0", "prefill"))
    assert (option.hit_blocks, option.gpu_blocks) == (0, 0)
