"""Engines of two ranks (tensor parallel) share blocks through the pool, as those of one rank do.

Prefill and decode have two ranks each, so every block is two objects, and every engine three processes.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mooncake.core.cpu import compiler_env
from mooncake.core.keys import block_checksum, share_key, share_keys
from mooncake.core.process import alive
from tests.integration.client import GREEDY
from tests.integration.cluster import BLOCK, Cluster, wait_until
from tests.integration.reference import TOKENS, _arguments, random_prompt
from tests.integration.setups import TWO_RANKS
from transfer.fdpass import fetch_segment

pytestmark = [
    pytest.mark.integration,
    pytest.mark.parametrize("cluster", [TWO_RANKS], ids=lambda setup: setup.name, indirect=True),
]

RANKS = 2
LENGTHS = (63, 64, 65, 300, 1024, 1600)
"""Around block and chunk boundaries."""
REFERENCE_S = 300.0
GONE_S = 10.0
STRUCK_AFTER = 5


@pytest.fixture(scope="module")
def undisturbed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[list[int]]:
    """What one stock vLLM engine of two ranks answers to a prompt of each length, each alone and cold."""
    arguments = {
        **_arguments(model, "float32"), "tensor_parallel_size": RANKS, "distributed_executor_backend": "mp",
    }  # fmt: skip
    params = {**GREEDY, "max_tokens": TOKENS}
    groups = [[{"prompt": random_prompt(length, 7000 + length), "params": params}] for length in LENGTHS]
    work = {"core": max(os.sched_getaffinity(0)), "engines": [{"arguments": arguments, "groups": groups}]}
    env = {
        **os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "WARNING", "HF_HUB_OFFLINE": "1",
        "GLOO_SOCKET_IFNAME": "lo", "VLLM_NO_USAGE_STATS": "1",
        "TMPDIR": str(tmp_path_factory.mktemp("stock")), **compiler_env(),
    }  # fmt: skip
    before = set(Path("/dev/shm").glob("vllm_dist_*"))
    script = Path(__file__).with_name("reference_engine.py")
    done = subprocess.run(
        [sys.executable, str(script)], input=json.dumps(work), env=env, capture_output=True, text=True,
        timeout=REFERENCE_S, check=False,
    )  # fmt: skip
    for left in set(Path("/dev/shm").glob("vllm_dist_*")) - before:  # stock vLLM removes nothing
        left.unlink()
    assert done.returncode == 0, done.stderr
    (answers,) = json.loads(done.stdout)
    return [group[0]["tokens"] for group in answers]


def ranks_of(engine: int) -> list[int]:
    """Return the processes of the ranks of an engine, rank 0 first; what tracks shared memory is none."""
    children = map(int, Path(f"/proc/{engine}/task/{engine}/children").read_text().split())
    return [pid for pid in children if b"resource_tracker" not in Path(f"/proc/{pid}/cmdline").read_bytes()]


def test_greedy_tokens_equal_one_stock_engine_of_as_many_ranks(cluster: Cluster, undisturbed):
    before = {name: cluster.counters(name) for name in ("prefill-0", "decode-0")}
    stored = cluster.store_stats()
    answers = [
        cluster.client.complete(random_prompt(length, 7000 + length), max_tokens=TOKENS, **GREEDY).tokens
        for length in LENGTHS
    ]
    assert answers == undisturbed
    # every block, tails included, came over the pool, each once, with the bytes of both ranks
    counted = cluster.counters("decode-0")
    blocks = sum(-(-length // BLOCK) for length in LENGTHS)
    assert counted["load_blocks"] - before["decode-0"]["load_blocks"] == blocks
    assert counted["hit_tokens"] - before["decode-0"]["hit_tokens"] == sum(LENGTHS)
    size_bytes = cluster.record("decode-0").block_bytes
    assert counted["load_bytes"] - before["decode-0"]["load_bytes"] == blocks * size_bytes
    saved = cluster.counters("prefill-0")["save_blocks"] - before["prefill-0"]["save_blocks"]
    assert saved >= blocks
    assert cluster.store_stats().blocks - stored.blocks >= RANKS * blocks
    cluster.assert_nothing_leaked()


def test_a_known_prompt_is_loaded_from_the_pool_and_counted_as_cached(cluster: Cluster):
    prompt = random_prompt(700, 7100)
    first = cluster.client.complete(prompt, max_tokens=24, **GREEDY)
    cluster.forget_locally()
    hits = cluster.counters("prefill-0")["hit_tokens"]
    again = cluster.client.complete(prompt, max_tokens=24, **GREEDY)
    assert again.outcome == first.outcome
    assert again.cached >= len(prompt) // BLOCK * BLOCK - BLOCK
    assert cluster.counters("prefill-0")["hit_tokens"] > hits


def test_the_conductor_counts_a_block_once(cluster: Cluster):
    prompt = random_prompt(600, 7200)
    keys, _ = cluster.keys(prompt)
    indexed, held = cluster.metric("mooncake_index_blocks"), cluster.store_stats().blocks
    cluster.client.complete(prompt, max_tokens=1, **GREEDY)
    new = cluster.store_stats().blocks - held
    assert new >= RANKS * len(keys)
    wait_until(
        "the index follows", lambda: cluster.metric("mooncake_index_blocks") - indexed == new // RANKS, 5.0
    )


@pytest.mark.parametrize("rank", range(RANKS))
def test_a_damaged_share_is_recomputed_counted_and_dropped(cluster: Cluster, rank: int):
    prompt = random_prompt(BLOCK * 9 + 17, 7300 + rank)
    wanted = cluster.client.complete(prompt, max_tokens=24, **GREEDY)
    keys, _ = cluster.keys(prompt)
    shares = share_keys(keys, RANKS)
    blocks = cluster.blocks(shares).blocks
    assert len(blocks) == len(shares)
    cluster.forget_locally()
    seen = sum(cluster.counters(name)["bad_blocks"] for name in cluster.states())
    dropped = cluster.store_stats().checksum_failures
    bad = 4 * RANKS + rank
    segment = fetch_segment(cluster.store_record().fd_path, 5.0)
    try:
        segment.view(blocks[bad].offset, blocks[bad].size_bytes)[777] ^= 0x10
        answer = cluster.client.complete(prompt, max_tokens=24, **GREEDY)
        assert answer.outcome == wanted.outcome
        assert answer.cached < wanted.usage["prompt_tokens"]
        assert sum(cluster.counters(name)["bad_blocks"] for name in cluster.states()) - seen >= 1
        wait_until("dropped", lambda: cluster.store_stats().checksum_failures == dropped + 1, 3.0)
        # what is in the pool now is right again
        (now,) = cluster.blocks([share_key(keys[4], rank)]).blocks
        data = segment.view(now.offset, now.size_bytes)
        assert block_checksum(share_key(keys[4], rank), data) == now.checksum
        assert len(cluster.blocks(shares).blocks) == len(shares)
    finally:
        segment.close()
    cluster.assert_nothing_leaked()


@pytest.mark.parametrize(
    ("instance", "victim"),
    [
        ("decode-0", "rank 1"),
        ("prefill-0", "rank 0"),
        ("decode-0", "engine"),
        ("prefill-0", "group"),
        ("decode-0", "relay"),  # `up` gives up an instance that ends once more within two minutes
    ],
)
def test_streams_survive_the_death_of_any_process_and_all_others_of_the_instance_go_too(
    cluster: Cluster, instance: str, victim: str
):
    prompt = random_prompt(200, 7400)
    wanted = cluster.client.complete(prompt, max_tokens=120, **GREEDY)
    relay, engine, epoch = cluster.worker_pid(instance), cluster.engine_pid(instance), cluster.epochs()
    ranks = ranks_of(engine)
    assert len(ranks) == RANKS
    stream = cluster.client.stream(prompt, max_tokens=120, **GREEDY)
    stream.wait_tokens(STRUCK_AFTER)
    if victim == "group":
        os.killpg(relay, signal.SIGKILL)
    else:
        os.kill({"engine": engine, "relay": relay}.get(victim) or ranks[int(victim[-1])], signal.SIGKILL)
    wait_until("all gone", lambda: not any(map(alive, [relay, engine, *ranks])), GONE_S, 0.01)
    assert stream.result().outcome == wanted.outcome
    cluster.wait_restarted(instance, epoch[instance])
    counted = "load_blocks" if instance == "decode-0" else "save_blocks"

    def works() -> bool:
        cluster.client.complete(random_prompt(90, time.monotonic_ns()), max_tokens=4, **GREEDY)
        return cluster.counters(instance)[counted] > 0

    wait_until("the restarted engine gets work", works, 10.0)
    assert shared_names() == set(), "of shared memory that somebody would have to remove"
    cluster.assert_nothing_leaked()


def shared_names() -> set[str]:
    """Return what the ranks of this test's engines have left in sight."""
    return {path.name for path in Path("/dev/shm").iterdir() if path.name.startswith(("ranks-", "psm_"))}
