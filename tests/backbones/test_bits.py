"""Bases of 4 and 8 bits against the definition of what they compute."""

import importlib.util

import numpy as np
import pytest
import torch
from tiny_backbones import write_checkpoint
from transformers import AutoConfig, AutoModelForCausalLM

from llmrec.backbones import bits
from llmrec.backbones.bits import dequantise, is_quantised, load_quantised, quantisation_config
from llmrec.exceptions import BackboneError, DependencyError

# The 16 quantiles of a normal distribution that the NormalFloat format rounds to (QLoRA, appendix E).
NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip

needs_bits = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="no bitsandbytes")
TOKENS = torch.tensor([[1, 5, 9, 80, 33]])


@pytest.fixture(scope="module", params=["llama", "gpt2", "phi"])
def base(request, tmp_path_factory):
    return write_checkpoint(request.param, tmp_path_factory.mktemp(request.param))


@needs_bits
@pytest.mark.parametrize("method", ["qlora", "int8"])
def test_only_the_blocks_linear_layers_are_quantised(base, method):
    plain = AutoModelForCausalLM.from_pretrained(base)
    model = load_quantised(base, method)
    assert is_quantised(model)
    assert not is_quantised(plain)
    for table, original in (
        (model.get_input_embeddings(), plain.get_input_embeddings()),
        (model.get_output_embeddings(), plain.get_output_embeddings()),
    ):
        assert torch.equal(table.weight, original.weight)
    quantised = {
        name for name, module in model.named_modules() if is_quantised(module) and not list(module.children())
    }
    linear = {
        name
        for name, module in plain.named_modules()
        if type(module).__name__ in ("Linear", "Conv1D") and module is not plain.get_output_embeddings()
    }
    assert quantised == linear


@needs_bits
def test_four_bits_are_normal_floats_of_blocks(base):
    plain = AutoModelForCausalLM.from_pretrained(base)
    back = dequantise(load_quantised(base, "qlora"))
    for name, weight in plain.named_parameters():
        got = back.get_parameter(name)
        assert got.shape == weight.shape
        if torch.equal(got, weight):
            assert weight.dim() == 1 or "emb" in name or "wte" in name or "wpe" in name or "head" in name
            continue
        # bitsandbytes quantises (out, in) row by row in blocks of 64; GPT-2 keeps its weights the other way round.
        rows = "h." in name and "gpt2" in base.name
        exact = (weight.T if rows else weight).detach().double().numpy().reshape(-1, 64)
        found = (got.T if rows else got).detach().double().numpy().reshape(-1, 64)
        largest = np.abs(exact).max(axis=1, keepdims=True)
        nearest = np.abs(exact[:, :, None] / largest[:, :, None] - np.array(NF4)).argmin(-1)
        # The blocks' largest values are quantised themselves, to 8 bits.
        assert np.abs(found - np.array(NF4)[nearest] * largest).max() < 0.02 * largest.max()


@needs_bits
def test_eight_bits_are_rows_over_127(base):
    plain = AutoModelForCausalLM.from_pretrained(base)
    back = dequantise(load_quantised(base, "int8"))
    changed = 0
    for name, weight in plain.named_parameters():
        got = back.get_parameter(name)
        if torch.equal(got, weight):
            continue
        changed += 1
        rows = "h." in name and "gpt2" in base.name
        exact = (weight.T if rows else weight).detach().half().double().numpy()
        found = (got.T if rows else got).detach().double().numpy()
        step = np.abs(exact).max(axis=1, keepdims=True) / 127
        np.testing.assert_allclose(found, np.round(exact / step) * step, atol=1.01 * step.max())
        assert np.abs(found - exact).max() < 0.51 * step.max() + 1e-4
    assert changed >= 8


@needs_bits
def test_dequantised_weights_are_what_four_bits_compute_with(base):
    model = load_quantised(base, "qlora").eval()
    with torch.no_grad():
        before = model(input_ids=TOKENS).logits
        back = dequantise(model)
        assert not is_quantised(back)
        assert (back(input_ids=TOKENS).logits - before).abs().max() < 1e-4


@needs_bits
def test_eight_bits_also_round_their_inputs(base):
    model = load_quantised(base, "int8").eval()
    with torch.no_grad():
        before = model(input_ids=TOKENS).logits
        after = dequantise(model)(input_ids=TOKENS).logits
    scale = before.std()
    assert 0 < (after - before).abs().max() < 0.2 * scale


@needs_bits
@pytest.mark.parametrize("method", ["qlora", "int8"])
def test_a_dequantised_model_is_a_plain_one(base, method, tmp_path):
    back = dequantise(load_quantised(base, method))
    back.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert not hasattr(again.config, "quantization_config")
    with torch.no_grad():
        assert torch.equal(again(input_ids=TOKENS).logits, back.eval()(input_ids=TOKENS).logits)


@needs_bits
def test_an_evaluation_does_not_end_the_training(base):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        load_quantised(base, "qlora"), LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    )

    def gradients():
        model.zero_grad()
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}

    model.train()
    before = gradients()
    model.eval()
    with torch.no_grad():
        model(input_ids=TOKENS)
    model.train()
    after = gradients()
    assert before.keys() == after.keys()
    assert any("layers.0" in name or "h.0" in name for name in before)
    for name, gradient in before.items():
        assert torch.equal(gradient, after[name])


@needs_bits
def test_rows_that_bitsandbytes_would_misread(tmp_path):
    config = AutoConfig.for_model(
        "llama", vocab_size=64, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=96
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(BackboneError, match="96 inputs, no multiple of 64"):
        load_quantised(tmp_path, "qlora")
    assert is_quantised(load_quantised(tmp_path, "int8"))


def test_without_bitsandbytes(monkeypatch):
    monkeypatch.setattr(bits.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DependencyError, match="bitsandbytes is not installed, and the method 'qlora'"):
        quantisation_config("qlora", torch.float32)


@needs_bits
def test_what_cannot_be_quantised(tmp_path):
    with pytest.raises(BackboneError, match="'lora' quantises nothing"):
        quantisation_config("lora", torch.float32)
    with pytest.raises(BackboneError, match="cannot be loaded for 'qlora'"):
        load_quantised(tmp_path, "qlora")
