"""A model's name commits to its weights; what an engine writes is there whole or not at all."""

import json
import subprocess
import sys
import threading

import msgspec
import pytest

from mooncake.core.errors import ConfigError
from mooncake.worker.spec import EngineFacts, EngineSpec, model_fingerprint, write_facts


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"hidden_size": 64, "layers": 2}))
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 12_000)  # 3 MB
    return folder


def name(folder) -> str:
    return model_fingerprint(str(folder), None)


def test_the_same_files_have_the_same_name_wherever_they_lie(model, tmp_path):
    before = name(model)
    moved = model.rename(tmp_path / "elsewhere")
    assert name(moved) == before
    assert before.startswith("sha256:")


@pytest.mark.parametrize("at", [0, 5000, (1 << 20) - 1, 3_072_000 * 63 // 64, 3_072_000 * 40 // 64 + 4095])
def test_a_changed_byte_in_a_sampled_region_changes_the_name(model, at):
    before = name(model)
    with (model / "model.safetensors").open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))
    assert name(model) != before


@pytest.mark.parametrize("file", ["model.safetensors", "model-2.safetensors", "pytorch_model.bin"])
def test_a_longer_or_another_weight_file_changes_the_name(model, file):
    before = name(model)
    with (model / file).open("ab") as weights:
        weights.write(b"\0")
    assert name(model) != before


def test_a_renamed_weight_file_changes_the_name(model):
    before = name(model)
    (model / "model.safetensors").rename(model / "other.safetensors")
    assert name(model) != before


def test_another_config_changes_the_name_and_its_spelling_does_not(model):
    before = name(model)
    (model / "config.json").write_text('{\n  "layers": 2,\n  "hidden_size": 64\n}')
    assert name(model) == before
    (model / "config.json").write_text(json.dumps({"hidden_size": 64, "layers": 3}))
    assert name(model) != before


def test_a_hub_model_is_named_by_name_and_revision():
    assert model_fingerprint("org/name", None) == "hub:org/name@main"
    assert model_fingerprint("org/name", "abc") == "hub:org/name@abc"


def test_a_folder_that_is_no_model_is_refused_by_name(tmp_path):
    with pytest.raises(ConfigError, match="no config"):
        model_fingerprint(str(tmp_path), None)


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


def test_what_every_process_imports_is_free_of_vllm_and_torch():
    """20 CPU-seconds and 500 MB per relay otherwise."""
    parts = [
        "connector_meta",
        "connector_scheduler",
        "connector_worker",
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
