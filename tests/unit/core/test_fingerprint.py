"""Weights are named by what is in them: not by a path, a name, a date or a host."""

import json
import os
import shutil
from types import SimpleNamespace

import pytest

from mooncake.core import fingerprint
from mooncake.core.errors import ConfigError
from mooncake.core.fingerprint import AdapterNames, adapter_fingerprint, model_fingerprint

SAFETENSORS = json.dumps({"w": {"dtype": "BF16", "shape": [4], "data_offsets": [0, 8]}}).encode()


def safetensors(data: bytes) -> bytes:
    return len(SAFETENSORS).to_bytes(8, "little") + SAFETENSORS + data


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"hidden_size": 64, "layers": 2}))
    (folder / "model.safetensors").write_bytes(safetensors(bytes(range(256)) * 1_000))
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture
def sampled(monkeypatch):
    """Every model is too large to be read whole."""
    monkeypatch.setattr(fingerprint, "WHOLE_BYTES_MAX", 0)
    monkeypatch.setattr(fingerprint, "SAMPLE_STEP_BYTES", 64_000)


def flip(file, at: int) -> None:
    with file.open("r+b") as opened:
        opened.seek(at)
        byte = opened.read(1)[0]
        opened.seek(at)
        opened.write(bytes([byte ^ 1]))


def test_equal_files_have_one_name_wherever_and_whenever_they_were_written(model, tmp_path):
    before = model_fingerprint(model)
    copy = shutil.copytree(model, tmp_path / "elsewhere", copy_function=shutil.copyfile)
    for file in copy.iterdir():
        os.utime(file, (1.0, 1.0))
    assert model_fingerprint(copy) == before
    assert before.startswith("sha256:")


@pytest.mark.parametrize("at", [0, 8, 100, 50_000, 133_337, -1])
def test_one_changed_bit_of_the_weights_changes_the_name(model, at):
    before, size = model_fingerprint(model), (model / "model.safetensors").stat().st_size
    flip(model / "model.safetensors", at % size)
    assert model_fingerprint(model) != before


def test_a_change_is_seen_even_if_size_and_times_are_kept(model):
    weights = model / "model.safetensors"
    before, info = model_fingerprint(model), weights.stat()
    flip(weights, 70_000)
    os.utime(weights, ns=(info.st_atime_ns, info.st_mtime_ns))
    assert model_fingerprint(model) != before


@pytest.mark.usefixtures("sampled")
@pytest.mark.parametrize("at", [0, 8, 60, 64_000, 64_000 + 4095, 128_000 + 17, -1, -4096])
def test_of_a_large_model_the_header_and_samples_and_the_end_count(model, at):
    before, size = model_fingerprint(model), (model / "model.safetensors").stat().st_size
    flip(model / "model.safetensors", at % size)
    assert model_fingerprint(model) != before


@pytest.mark.usefixtures("sampled")
def test_of_a_large_model_that_is_retrained_some_sample_always_lies_in_a_changed_tensor(model):
    before = model_fingerprint(model)
    for start in range(0, 256_000 - 68_096, 17_000):
        changed = bytearray(bytes(range(256)) * 1_000)
        changed[start : start + 68_096] = bytes(68_096)
        (model / "model.safetensors").write_bytes(safetensors(bytes(changed)))
        assert model_fingerprint(model) != before


@pytest.mark.usefixtures("sampled")
def test_any_key_in_the_configuration_tells_hand_edited_large_models_apart(model):
    before = model_fingerprint(model)
    (model / "config.json").write_text(json.dumps({"hidden_size": 64, "layers": 2, "edition": 2}))
    assert model_fingerprint(model) != before


def test_a_whole_and_a_sampled_reading_are_never_taken_for_each_other(model, monkeypatch):
    before = model_fingerprint(model)
    monkeypatch.setattr(fingerprint, "WHOLE_BYTES_MAX", 0)
    assert model_fingerprint(model) != before


@pytest.mark.parametrize("file", ["model.safetensors", "model-2.safetensors", "pytorch_model.bin"])
def test_a_longer_or_another_weight_file_changes_the_name(model, file):
    before = model_fingerprint(model)
    with (model / file).open("ab") as weights:
        weights.write(b"\0")
    assert model_fingerprint(model) != before


def test_a_renamed_weight_file_changes_the_name(model):
    before = model_fingerprint(model)
    (model / "model.safetensors").rename(model / "other.safetensors")
    assert model_fingerprint(model) != before


def test_bytes_that_move_from_one_file_to_the_next_change_the_name(model):
    names = set()
    for cut in (0, 1, 5, 10):
        (model / "a.bin").write_bytes(b"0123456789"[:cut])
        (model / "b.bin").write_bytes(b"0123456789"[cut:])
        names.add(model_fingerprint(model))
    assert len(names) == 4


@pytest.mark.parametrize("file", ["model.safetensors.index.json", "hf_quant_config.json", "modeling_x.py"])
def test_what_says_how_weights_are_read_counts(model, file):
    before = model_fingerprint(model)
    (model / file).write_text('{"a": 1}')
    assert model_fingerprint(model) != before


def test_the_spelling_of_the_configuration_and_the_tokenizer_do_not_count(model):
    before = model_fingerprint(model)
    (model / "config.json").write_text('{\n  "layers": 2,\n  "hidden_size": 64\n}')
    (model / "tokenizer.json").write_text('{"other": 1}')
    assert model_fingerprint(model) == before


def test_a_hub_snapshot_of_links_is_named_as_the_files_it_links_to(model, tmp_path):
    snapshot = tmp_path / "snapshots"
    snapshot.mkdir()
    for file in model.iterdir():
        (snapshot / file.name).symlink_to(file)
    assert model_fingerprint(snapshot) == model_fingerprint(model)


def test_a_single_file_can_be_a_model(model):
    gguf = model / "m.gguf"
    gguf.write_bytes(b"GGUF" + bytes(100))
    before = model_fingerprint(gguf)
    flip(gguf, 50)
    assert model_fingerprint(gguf) != before


def test_a_folder_without_weights_is_refused_by_name(tmp_path):
    with pytest.raises(ConfigError, match="no weights"):
        model_fingerprint(tmp_path)


# ---------------------------------------------------------------- adapters


def lora(folder, weights: bytes = b"w" * 100, number: int = 1, **more):
    """What vLLM sends with a request; the adapter's files are written if there are none."""
    folder.mkdir(exist_ok=True)
    if not (folder / "adapter_model.safetensors").exists():
        (folder / "adapter_config.json").write_text(json.dumps({"r": 8}))
        (folder / "adapter_model.safetensors").write_bytes(weights)
    fields = {"lora_name": "a", "load_inplace": False, "is_3d_lora_weight": False}
    return SimpleNamespace(lora_path=str(folder), lora_int_id=number, **{**fields, **more})


def test_adapters_of_one_name_and_other_weights_have_other_names(tmp_path):
    one, two = lora(tmp_path / "1", b"x" * 100), lora(tmp_path / "2", b"y" * 100)
    assert AdapterNames().name_of(one) != AdapterNames().name_of(two)


def test_gateway_and_engines_give_one_adapter_one_name(tmp_path):
    one, two = lora(tmp_path / "1", number=1), lora(tmp_path / "2", number=7, lora_name="b")
    name = AdapterNames().name_of(one)
    assert name is not None
    assert name == AdapterNames().name_of(two)


@pytest.mark.parametrize("setting", ["r", "lora_alpha", "use_rslora"])
def test_an_adapter_with_other_settings_has_another_name(tmp_path, setting):
    lora(tmp_path / "a")
    before = adapter_fingerprint(tmp_path / "a")
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps({"r": 8, setting: 3}))
    assert adapter_fingerprint(tmp_path / "a") != before


def test_a_reading_of_experts_the_other_way_is_another_adapter(tmp_path):
    plain, other = lora(tmp_path / "a"), lora(tmp_path / "a", is_3d_lora_weight=True)
    assert AdapterNames().name_of(plain) != AdapterNames().name_of(other)


def test_an_adapter_that_changes_on_disk_has_no_name_any_more(tmp_path):
    """The engine may still compute with what it loaded before, or may have loaded it anew."""
    names, request = AdapterNames(), lora(tmp_path / "a")
    before = names.name_of(request)
    assert before is not None
    flip(tmp_path / "a" / "adapter_model.safetensors", 50)
    assert names.name_of(request) is None
    flip(tmp_path / "a" / "adapter_model.safetensors", 50)
    assert names.name_of(request) is None, "what was loaded between the two is not known"
    assert AdapterNames().name_of(request) == before, "a new process loads what is there"


def test_an_adapter_that_is_written_again_as_it_was_keeps_its_name(tmp_path):
    names, request = AdapterNames(), lora(tmp_path / "a")
    before = names.name_of(request)
    weights = tmp_path / "a" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes())
    assert names.name_of(request) == before


def test_an_id_that_means_another_adapter_names_neither_from_then_on(tmp_path):
    """Two gateways count their adapters for themselves; vLLM keeps whichever it loaded first."""
    names, one, two = AdapterNames(), lora(tmp_path / "1"), lora(tmp_path / "2", b"other")
    assert names.name_of(one) is not None
    assert names.name_of(two) is None
    assert names.name_of(one) is None


def test_an_adapter_that_is_loaded_in_place_has_no_name(tmp_path):
    assert AdapterNames().name_of(lora(tmp_path / "a", load_inplace=True)) is None


@pytest.mark.parametrize("missing", ["adapter_config.json", "adapter_model.safetensors"])
def test_what_is_no_adapter_has_no_name(tmp_path, missing):
    request = lora(tmp_path / "a")
    (tmp_path / "a" / missing).unlink()
    assert AdapterNames().name_of(request) is None


def test_an_adapter_on_a_hub_or_too_large_to_be_read_whole_has_no_name(tmp_path, monkeypatch):
    request = lora(tmp_path / "a")
    assert AdapterNames().name_of(SimpleNamespace(**{**vars(request), "lora_path": "org/name"})) is None
    monkeypatch.setattr(fingerprint, "ADAPTER_BYTES_MAX", 99)
    assert AdapterNames().name_of(request) is None


def test_what_is_remembered_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(fingerprint, "ADAPTERS_MAX", 2)
    names = AdapterNames()
    found = [names.name_of(lora(tmp_path / "a", number=number)) for number in (1, 2, 3, 1)]
    assert found[2] is None
    assert found[0] == found[1] == found[3] is not None
