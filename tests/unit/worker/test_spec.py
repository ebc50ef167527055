"""What an engine is told survives the journey; what it writes is there whole or not at all."""

import subprocess
import sys
import threading

import msgspec
import pytest

from mooncake.worker.spec import EngineFacts, EngineSpec, write_facts


def test_a_reader_of_facts_sees_all_or_nothing(tmp_path):
    path = tmp_path / "facts.json"
    facts = [EngineFacts(f"{n:02x}" * 32, n, {"k": "v" * 5000 * n}) for n in (1, 2)]
    write_facts(path, facts[0])
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            write_facts(path, facts[1])
            write_facts(path, facts[0])

    writer = threading.Thread(target=write)
    writer.start()
    try:
        assert all(msgspec.json.decode(path.read_bytes(), type=EngineFacts) in facts for _ in range(300))
    finally:
        stop.set()
        writer.join()
    assert [p.name for p in tmp_path.iterdir()] == ["facts.json"]


def test_a_spec_survives_its_journey_as_json():
    spec = EngineSpec(instance_id="i", role="both", epoch="e", run_dir="/run/i", model="m", cores=[1])
    assert msgspec.json.decode(msgspec.json.encode(spec), type=EngineSpec) == spec
    assert spec.engine_in == "ipc:///run/i/in"


@pytest.mark.parametrize(
    ("cores", "threads", "shares"),
    [
        ([4, 5, 6, 7], 0, [([4, 5], 2), ([6, 7], 2)]),
        ([4, 5, 6], 0, [([4], 1), ([5], 1)]),
        ([4], 0, [([4], 1), ([4], 1)]),
        ([], 6, [([], 3), ([], 3)]),
        ([], 0, [([], 1), ([], 1)]),
    ],
)
def test_ranks_share_the_cores_and_threads_of_their_engine_and_each_has_one(cores, threads, shares):
    spec = EngineSpec(
        instance_id="i", role="both", epoch="e", run_dir="/run/i", model="m", cores=cores, threads=threads
    )
    assert [spec.share_of_cores(rank, 2) for rank in range(2)] == shares


def test_what_every_process_imports_is_free_of_vllm_and_torch():
    """20 CPU-seconds and 500 MB per relay otherwise."""
    parts = [
        "connector_meta",
        "connector_scheduler",
        "connector_worker",
        "context",
        "engine",
        "launch",
        "layout",
        "outputs",
    ]
    parts += ["params", "preload", "pulse", "relay", "spec"]
    modules = [f"mooncake.worker.{part}" for part in parts]
    code = f"import sys, {', '.join(modules)}; print([m for m in ('vllm', 'torch') if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True
    )
    assert done.stdout.strip() == "[]"
