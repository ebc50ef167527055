"""A Llama in GGUF becomes a Hugging Face folder: weights, config, tokenizer. Once, in seconds.

Straight from quantised blocks to bf16 safetensors with numpy: no torch, no transformers, one
tensor in memory at a time. llama.cpp stores Q and K with rotary pairs interleaved; Hugging Face
wants halves, so those rows are permuted back (its convert_hf_to_gguf.py, `permute`).
"""

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from mooncake.core.errors import IntegrityError, UserError

Report = Callable[[str, int, int], None]
"""Called with (stage, done, total)."""

_TENSORS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
CONTROL_TOKEN, USER_TOKEN = 3, 4
"""tokenizer.ggml.token_type: never split, and control tokens are not shown."""


def convert(
    gguf_path: Path,
    folder: Path,
    report: Report = lambda *_: None,
    sampling: Mapping[str, float | bool] = MappingProxyType({}),
) -> None:
    """Write the Llama in `gguf_path` to the existing, empty `folder`.

    `sampling` are defaults for requests that set none; GGUF holds no such thing.

    Raises:
        UserError: not a Llama with a byte-level BPE tokenizer, or the gguf package is missing.
        IntegrityError: the file is damaged.
    """
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise UserError("reading GGUF needs the package gguf: pip install 'mooncake-serving[cpu]'") from error
    report("read", 0, 1)
    try:
        reader = GGUFReader(gguf_path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, KeyError, IndexError) as error:
        raise IntegrityError(f"{gguf_path} is not a readable GGUF file: {error}") from error
    report("read", 1, 1)
    if fields.get("general.architecture") != "llama" or fields.get("tokenizer.ggml.model") != "gpt2":
        raise UserError(f"{gguf_path}: only Llama models with a byte-level BPE tokenizer can be converted")
    config = make_config(fields, tied=all(tensor.name != "output.weight" for tensor in reader.tensors))
    write_safetensors(folder / "model.safetensors", reader.tensors, config, report)
    _write_json(folder / "config.json", config)
    _write_json(
        folder / "generation_config.json",
        {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")} | dict(sampling),
    )
    report("tokenizer", 0, 1)
    write_tokenizer(folder, fields)
    report("tokenizer", 1, 1)


def make_config(fields: dict[str, Any], tied: bool) -> dict[str, Any]:
    """Return config.json of the model that `fields` describe."""

    def of(name: str) -> Any:
        return fields[f"llama.{name}"]

    heads, hidden = of("attention.head_count"), of("embedding_length")
    theta = float(of("rope.freq_base"))
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": of("vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": of("feed_forward_length"),
        "num_hidden_layers": of("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": of("attention.head_count_kv"),
        "head_dim": hidden // heads,
        "max_position_embeddings": of("context_length"),
        # stored as float32: 9.99999975e-06 was written as 1e-05
        "rms_norm_eps": float(f"{of('attention.layer_norm_rms_epsilon'):.6g}"),
        "rope_theta": theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
    }


def hf_name(gguf_name: str) -> str:
    """Return the Hugging Face name of a tensor: blk.3.attn_q.weight -> model.layers.3...

    Raises:
        UserError: a Llama has no such tensor.
    """
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.weight", gguf_name)
    if match is None or match[2] not in _TENSORS:
        raise UserError(f"GGUF tensor {gguf_name!r} is not part of a plain Llama")
    layer = f"model.layers.{match[1]}." if match[1] else ""
    return f"{layer}{_TENSORS[match[2]]}.weight"


def unpermute(weights: npt.NDArray[np.float32], heads: int) -> npt.NDArray[np.float32]:
    """Return Q or K rows in Hugging Face's order: per head both halves of the rotary pairs."""
    pairs = weights.shape[0] // heads // 2
    return weights.reshape(heads, pairs, 2, -1).swapaxes(1, 2).reshape(weights.shape)


def to_bfloat16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Return the bits of `values` as bfloat16, rounded to nearest even (all must be finite)."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return (rounded >> np.uint32(16)).astype(np.uint16)


def write_safetensors(path: Path, tensors: list[Any], config: dict[str, Any], report: Report) -> None:
    """Write GGUF tensors as one bf16 safetensors file, in their order, on disk when this returns."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        # GGUF lists the fastest dimension first
        shape = [int(length) for length in reversed(tensor.shape)]
        start, end = end, end + 2 * int(np.prod(shape))
        header[hf_name(tensor.name)] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the format wants the data aligned to 8 bytes
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for done, values in enumerate(_values(tensors, config), 1):
            file.write(to_bfloat16(values).data)
            report("weights", done, len(tensors))
        file.flush()
        os.fsync(file.fileno())


def _values(tensors: list[Any], config: dict[str, Any]) -> Iterator[npt.NDArray[np.float32]]:
    from gguf import dequantize

    for tensor in tensors:
        values: npt.NDArray[np.float32] = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if not np.isfinite(values).all():
            raise IntegrityError(f"GGUF tensor {tensor.name} holds values that are not finite")
        if ".attn_q." in tensor.name:
            values = unpermute(values, config["num_attention_heads"])
        elif ".attn_k." in tensor.name:
            values = unpermute(values, config["num_key_value_heads"])
        yield values


def write_tokenizer(folder: Path, fields: dict[str, Any]) -> None:
    """Write tokenizer.json and tokenizer_config.json.

    Raises:
        UserError: the pre-tokenizer is none we know how to rebuild.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    if fields.get("tokenizer.ggml.pre") != "smollm":
        raise UserError(f"GGUF pre-tokenizer {fields.get('tokenizer.ggml.pre')!r} is not supported")
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    kinds: list[int] = fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    # digits one by one, then GPT-2's pattern: what llama.cpp calls "smollm"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [
            AddedToken(t, normalized=False, special=True)
            for t, k in zip(tokens, kinds, strict=True)
            if k == CONTROL_TOKEN
        ]
    )
    tokenizer.add_tokens(
        [AddedToken(t, normalized=False) for t, k in zip(tokens, kinds, strict=True) if k == USER_TOKEN]
    )
    tokenizer.save(str(folder / "tokenizer.json"))

    def token(name: str) -> str:
        return tokens[int(fields[f"tokenizer.ggml.{name}_token_id"])]

    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_prefix_space": False,
            "bos_token": token("bos"),
            "eos_token": token("eos"),
            "unk_token": token("unknown"),
            "pad_token": token("padding"),
            "clean_up_tokenization_spaces": False,
            "model_max_length": fields["llama.context_length"],
            "chat_template": fields["tokenizer.chat_template"],
        },
    )


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
