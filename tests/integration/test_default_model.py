"""The default model, for real: downloaded, converted, loaded, asked."""

import pytest

from mooncake.model import resolve_model

pytestmark = pytest.mark.integration


def test_the_default_model_knows_the_capital_of_france():
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = resolve_model().path_or_name
    tokenizer = AutoTokenizer.from_pretrained(path)
    text = "  Hello, naïve 北京 🙂 12345"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.eos_token == "<|im_end|>"
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert "Paris" in tokenizer.decode(output[0])


def test_greedy_output_of_the_tiny_model_varies_with_the_prompt(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tests.tiny_model import make_tiny_llama

    path = make_tiny_llama(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path)
    outputs = set()
    for prompt in ("alpha", "beta", "gamma delta"):
        inputs = tokenizer(prompt, return_tensors="pt")
        new = model.generate(**inputs, max_new_tokens=24, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert len(set(new.tolist())) > 8, "one token repeated"
        outputs.add(tuple(new.tolist()))
    assert len(outputs) == 3
