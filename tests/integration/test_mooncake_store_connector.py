"""vLLM's in-tree MooncakeStoreConnector runs on `mooncake.store` as on upstream's, unchanged.

Twice: with a segment in the engine's own process ("embedded"), and with none there but a `mooncake_client`
that owns the pool's memory and its SSD tier ("standalone-store"); there is memory for half of the blocks.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.integration.client import GREEDY
from tests.integration.engine_script import ROOT, RUN_S, engine_arguments, run_script
from tests.integration.pool_processes import until
from tests.integration.ports import lasting_port
from tests.integration.reference import random_prompt
from tests.unit.dropin.conftest import MasterThread

pytestmark = pytest.mark.integration

BLOCK = 32
BLOCK_BYTES = BLOCK * 4 * 2 * 2 * 64 * 4
"""4 layers, K and V, 2 heads of 64 numbers, float32: tests.tiny_model."""
PROMPTS = [random_prompt(length, 4000 + length) for length in (70, 200, 333, 500, 600)]
BLOCKS = sum(len(prompt) // BLOCK for prompt in PROMPTS)
"""The connector saves whole blocks of prompts."""
SMALL_BYTES = BLOCKS * BLOCK_BYTES // 2
POOLS = ("embedded", "standalone-store")


def config(master: MasterThread, mode: str) -> dict[str, Any]:
    return {
        "metadata_server": "P2PHANDSHAKE", "master_server_address": master.address, "protocol": "tcp",
        "device_name": "", "local_buffer_size": "16MB", "mode": mode,
        "global_segment_size": "64MB" if mode == "embedded" else 0,
        "enable_offload": mode == "standalone-store",
    }  # fmt: skip


def start_client(stack: ExitStack, master: MasterThread, folder: Path) -> None:
    """Run a `mooncake_client` with little memory and an SSD tier until the stack is closed."""
    disk, log = folder / "disk", stack.enter_context(folder.joinpath("client").open("wb"))
    disk.mkdir()
    flags = {
        "host": "127.0.0.1", "port": lasting_port(), "global_segment_size": SMALL_BYTES,
        "master_server_address": master.address, "enable_offload": "true",
    }  # fmt: skip
    program = [sys.executable, "-m", "mooncake.dropin.client.command"]
    client = subprocess.Popen(
        program + [f"--{name}={value}" for name, value in flags.items()], stdout=log, stderr=log, cwd=ROOT,
        env={
            **os.environ, "MOONCAKE_OFFLOAD_FILE_STORAGE_PATH": str(disk),
            "MOONCAKE_OFFLOAD_TOTAL_SIZE_LIMIT_BYTES": str(64 << 20),
        },
    )  # fmt: skip

    def end() -> None:
        client.kill()
        client.wait()

    stack.callback(end)
    until(lambda: b"serving" in folder.joinpath("client").read_bytes() or not alive(client, folder))


def alive(client: "subprocess.Popen[bytes]", folder: Path) -> bool:
    assert client.poll() is None, folder.joinpath("client").read_text()[-2000:]
    return True


@pytest.fixture(scope="module")
def runs(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """What the engines of store_connector_engine.py say, by the mode of their pool."""
    folder = tmp_path_factory.mktemp("connector")
    with ExitStack() as stack:
        pools = []
        for mode in POOLS:
            master = MasterThread()
            stack.callback(master.stop)
            if mode == "standalone-store":
                start_client(stack, master, folder)
            pools.append({"config": config(master, mode), "metrics": master.url})
        work = {
            "arguments": engine_arguments(model, BLOCK), "prompts": PROMPTS,
            "params": {**GREEDY, "max_tokens": 16}, "pools": pools,
        }  # fmt: skip
        out = run_script("store_connector_engine", [], json.dumps(work), folder, 2 * RUN_S)
        answers = json.loads(out)
        yield dict(zip(POOLS, answers, strict=True))


@pytest.fixture(params=POOLS)
def answers(request: pytest.FixtureRequest, runs: dict[str, Any]) -> dict[str, Any]:
    return runs[request.param]


def tokens(answers: dict[str, Any], turn: str) -> list[list[int]]:
    return [answer["tokens"] for answer in answers[turn]]


def more(answers: dict[str, Any], metric: str) -> float:
    """How much the master's metric has grown by the second time."""
    return answers["after"][metric] - answers["before"][metric]


def test_the_second_time_the_whole_blocks_come_from_the_pool_and_the_answers_are_equal(
    answers: dict[str, Any],
) -> None:
    assert [answer["cached"] for answer in answers["first"]] == [0] * len(PROMPTS)
    assert [answer["cached"] for answer in answers["second"]] == [
        len(prompt) // BLOCK * BLOCK for prompt in PROMPTS
    ]
    assert tokens(answers, "second") == tokens(answers, "first")
    assert all(
        len(set(each)) > 6 for each in tokens(answers, "first")
    )  # wrong KV could not hide in repetition


def test_every_block_is_one_named_object(answers: dict[str, Any]) -> None:
    assert len(answers["names"]) == len(set(answers["names"])) >= BLOCKS


def test_embedded_every_hit_is_of_memory_and_vllm_and_the_master_say_so(runs: dict[str, Any]) -> None:
    answers = runs["embedded"]
    assert answers["in_memory"] == [True] * len(answers["names"])
    assert answers["loaded"] == {"memory": BLOCKS, "disk": 0, "unknown": 0, "failed": 0}
    assert more(answers, "mem_cache_hit_nums_") == BLOCKS
    assert more(answers, "file_cache_hit_nums_") == answers["after"]["file_cache_nums_"] == 0


def test_standalone_what_memory_has_no_room_for_is_a_hit_of_the_ssd_and_vllm_and_the_master_say_so(
    runs: dict[str, Any],
) -> None:
    answers = runs["standalone-store"]
    cold = answers["in_memory"].count(False)
    assert cold >= BLOCKS // 3  # memory has half of the room that they need
    assert answers["loaded"]["disk"] >= cold // 2
    assert answers["loaded"]["disk"] + answers["loaded"]["memory"] == BLOCKS
    assert answers["loaded"]["unknown"] == answers["loaded"]["failed"] == 0
    assert more(answers, "file_cache_hit_nums_") >= cold // 2
    assert more(answers, "file_cache_hit_nums_") + more(answers, "mem_cache_hit_nums_") >= BLOCKS


def test_what_was_removed_is_computed_again(answers: dict[str, Any]) -> None:
    assert answers["removed"] >= BLOCKS
    assert [answer["cached"] for answer in answers["third"]] == [0] * len(PROMPTS)
    assert tokens(answers, "third") == tokens(answers, "first")
