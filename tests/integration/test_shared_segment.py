"""Ranks that are processes of one torch process group share tensors in host memory."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration
PATIENCE_S = 120.0
RANK = """
import sys
import torch, torch.distributed as dist
from datetime import timedelta
from mooncake.shared_segment import SharedSegmentError, create_shared_segment

rank, meet = int(sys.argv[1]), sys.argv[2]
dist.init_process_group(
    "gloo", init_method=f"file://{meet}", rank=rank, world_size=2, timeout=timedelta(seconds=90)
)
blocks = {"kv": {"count": 2, "shape": (64, 3), "dtype": torch.bfloat16}}
kv = create_shared_segment("kv", blocks, 2, rank, comm_group=dist.group.WORLD).tensors("kv")
if rank == 0:
    kv[1].fill_(2)
dist.barrier()
print(float(kv[1].sum()), float(kv[0].sum()))
try:
    blocks["kv"]["count"] += rank
    create_shared_segment("kv", blocks, 2, rank, comm_group=dist.group.WORLD)
except SharedSegmentError as error:
    print("disagrees" in str(error))
dist.barrier()
"""


def test_two_processes_see_one_memory_and_both_hear_of_a_disagreement(tmp_path: Path) -> None:
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(tmp_path / "meet")],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        told = [rank.communicate(timeout=PATIENCE_S) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [out for out, _ in told] == ["384.0 0.0\nTrue\n"] * 2, told
