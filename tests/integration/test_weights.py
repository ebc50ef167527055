"""KV belongs to the weights that made it: not to the path they lay at, nor to the name they had."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest

from tests.integration.client import GREEDY, Answer
from tests.integration.cluster import BLOCK, RESTART_S, Cluster, Clusters, Setup
from tests.integration.reference import random_prompt

pytestmark = pytest.mark.integration

PROMPT = random_prompt(20 * BLOCK + 7, 9100)
FULL = len(PROMPT) // BLOCK * BLOCK


def ask(cluster: Cluster) -> Answer:
    return cluster.client.complete(PROMPT, max_tokens=8, **GREEDY)


def restart_engines(cluster: Cluster) -> None:
    """Let every engine load its model again; the pool stays."""
    for instance_id, epoch in cluster.epochs().items():
        os.killpg(cluster.worker_pid(instance_id), signal.SIGKILL)
        cluster.wait_restarted(instance_id, epoch, 2 * RESTART_S)


def change_one_weight(folder: Path) -> None:
    """Double or halve one number of the embedding of the prompt's first token."""
    hidden = json.loads((folder / "config.json").read_text())["hidden_size"]
    data = bytearray((folder / "model.safetensors").read_bytes())
    first_tensor = 8 + int.from_bytes(data[:8], "little")
    data[first_tensor + 2 * hidden * PROMPT[0]] ^= 0x80  # the lowest bit of a bfloat16's exponent
    (folder / "model.safetensors").write_bytes(data)


def test_a_copy_of_the_model_finds_its_kv_and_one_changed_weight_does_not(
    model: Path, clusters: Clusters, tmp_path: Path
):
    clusters.close()
    setup = Setup("weights", flags=(f"--ssd={tmp_path / 'ssd'}", "--ssd-size=1GiB"))
    first = Cluster(setup, Path(shutil.copytree(model, tmp_path / "here" / "tiny")))
    try:
        first.wait_ready()
        answer = ask(first)
        root = first.record("prefill-0").context_root
        assert answer.cached == 0
    finally:
        first.stop()
    elsewhere = Path(shutil.copytree(model, tmp_path / "there" / "tiny"))
    shutil.rmtree(tmp_path / "here")
    second = Cluster(setup, elsewhere)
    try:
        second.wait_ready()
        assert second.record("prefill-0").context_root == root
        again = ask(second)
        assert again.cached == FULL
        assert again.outcome == answer.outcome

        change_one_weight(elsewhere)
        restart_engines(second)
        changed = ask(second)
        assert second.record("prefill-0").context_root != root
        assert changed.cached == 0
        assert second.counters("prefill-0")["hit_tokens"] == 0
        second.assert_nothing_leaked()
    finally:
        second.stop()
