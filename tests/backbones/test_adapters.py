"""Adapters of every method on every family: what is trained, what it computes, and what merging gives."""

import importlib.util

import numpy as np
import pytest
import torch
from factories import random_catalog
from tiny_backbones import FAMILIES, arguments_for, fit, new_ids, write_checkpoint

from llmrec.backbones.adapters import adapt, attach, merge
from llmrec.backbones.bits import dequantise, load_quantised
from llmrec.backbones.causal_lm import METHODS, QUANTISED, WITH_LORA, from_checkpoint, load_tokenizer
from llmrec.exceptions import ArtefactError, BackboneError
from llmrec.vocabulary import add_catalog_tokens

ADAPTED = [method for method in METHODS if method != "full"]
TOKENS = torch.tensor([[1, 5, 9, 80, 33]])


def skip_without_bits(method):
    if method in QUANTISED and importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("no bitsandbytes")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Family -> a checkpoint's folder, written once."""
    folders = {}

    def of(family):
        if family not in folders:
            folders[family] = write_checkpoint(family, tmp_path_factory.mktemp(family))
        return folders[family]

    return of


def extended(folder, method, tmp_path, **others):
    """An extended base, in the number format of the method, its catalog and its new rows."""
    arguments = arguments_for(folder, method, **others)
    tokenizer = load_tokenizer(arguments)
    catalog = add_catalog_tokens(tokenizer, random_catalog())
    model, rows = from_checkpoint(arguments, tokenizer, new_ids(catalog), seed=0)
    if method in QUANTISED:
        model.save_pretrained(tmp_path / "base")
        model = load_quantised(tmp_path / "base", method)
    return arguments, model, catalog, rows


def logits(model, tokens=TOKENS):
    with torch.no_grad():
        return model.eval()(input_ids=tokens).logits


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ADAPTED)
def test_an_adapter_begins_as_its_base_and_trains_its_own_part(family, method, checkpoint, tmp_path):
    skip_without_bits(method)
    arguments, base, catalog, rows = extended(checkpoint(family), method, tmp_path)
    tied = base.get_output_embeddings().weight is base.get_input_embeddings().weight
    before = logits(base)
    frozen = {name: weight.detach().clone() for name, weight in base.named_parameters()}
    model = adapt(arguments, base, rows)
    assert torch.allclose(logits(model), before, atol=1e-5)

    trainable = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    tables = [name for name in trainable if "trainable_tokens" in name]
    assert len(tables) == (1 if tied else 2)
    assert all(trainable[name].shape == (len(rows), 64) for name in tables)
    kinds = {"dora": 3, "new_tokens": 0}.get(method, 2)  # matrices a layer: A, B and DoRA's magnitudes
    assert len(trainable) - len(tables) == kinds * sum("lora_A" in name for name in trainable)
    assert any("lora_A" in name for name in trainable) == (method in WITH_LORA)

    losses = fit(model, catalog, steps=4)
    assert losses[-1] < losses[0]
    compared = set()
    for name, weight in model.named_parameters():
        original = name.removeprefix("base_model.model.").replace("token_adapter.", "").replace("base_layer.", "")
        if original in frozen:
            compared.add(original)
            assert torch.equal(weight.data, frozen[original]), name  # bit for bit, quantised ones too
    assert compared == frozen.keys()
    assert not torch.allclose(logits(model), before, atol=1e-3)


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi"])
def test_new_tokens_alone_leave_every_other_weight_bit_equal(family, checkpoint, tmp_path):
    arguments, base, catalog, rows = extended(checkpoint(family), "new_tokens", tmp_path)
    before = {name: weight.detach().clone() for name, weight in base.named_parameters()}
    tables = {
        name
        for name, weight in base.named_parameters()
        if weight is base.get_input_embeddings().weight or weight is base.get_output_embeddings().weight
    }
    model = adapt(arguments, base, rows)
    fit(model, catalog, steps=3)
    merged = merge(model)
    old = [row for row in range(len(base.get_input_embeddings().weight)) if row not in rows]
    after = dict(merged.named_parameters())
    assert after.keys() == before.keys()
    for name, weight in before.items():
        if name in tables:
            assert torch.equal(after[name][old], weight[old])
            assert not torch.equal(after[name][rows], weight[rows])
        else:
            assert torch.equal(after[name], weight)


@pytest.mark.parametrize("method", ["lora", "rslora", "dora", "qlora", "int8"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_merged_weights_are_the_papers_formulas(method, family, checkpoint, tmp_path):
    skip_without_bits(method)
    arguments, base, catalog, rows = extended(checkpoint(family), method, tmp_path, lora_rank=3, lora_alpha=5)
    model = adapt(arguments, base, rows)
    fit(model, catalog, steps=3)
    name = {"llama": "model.layers.1.mlp.down_proj", "gpt2": "transformer.h.1.mlp.c_proj"}[family]
    layer = model.get_submodule(f"base_model.model.{name}")
    a, b = layer.lora_A["default"].weight.detach().double(), layer.lora_B["default"].weight.detach().double()
    magnitude = layer.lora_magnitude_vector["default"].weight.detach().double() if method == "dora" else None
    if method in QUANTISED:
        plain = dequantise(load_quantised(tmp_path / "base", method))
        weight = plain.get_submodule(name).weight.detach().double()
    else:
        weight = layer.base_layer.weight.detach().double()
    weight = weight.T if family == "gpt2" else weight  # GPT-2 keeps (in, out)
    assert b.abs().max() > 0
    expected = weight + (5 / (np.sqrt(3) if method == "rslora" else 3)) * b @ a
    if method == "dora":
        expected = magnitude[:, None] * expected / expected.norm(dim=1, keepdim=True)
    found = merge(model).get_submodule(name).weight.detach().double()
    found = found.T if family == "gpt2" else found
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_merging_loses_nothing(family, method, checkpoint, tmp_path):
    skip_without_bits(method)
    arguments, model, catalog, rows = extended(checkpoint(family), method, tmp_path)
    if method != "full":
        model = adapt(arguments, model, rows)
    fit(model, catalog, steps=3)
    before = logits(model).log_softmax(-1)
    merged = merge(model)
    assert all(weight.requires_grad and weight.dtype == torch.float32 for weight in merged.parameters())
    difference = (logits(merged).log_softmax(-1) - before).abs().max()
    # 8-bit layers round their inputs too, and no plain weights can.
    assert difference < (0.2 if method == "int8" else 5e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(method, reentrant, checkpoint, tmp_path):
    skip_without_bits(method)
    arguments, model, _, rows = extended(checkpoint("llama"), method, tmp_path)
    if method != "full":
        torch.manual_seed(0)
        model = adapt(arguments, model, rows)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "lora_B" in name:
                    weight.normal_(0.0, 0.1)

    def gradients():
        model.train()
        model.zero_grad()
        tokens = torch.tensor([[1, 5, rows[0], rows[3], 80]])
        model(input_ids=tokens, labels=tokens).loss.backward()
        return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.requires_grad}

    plain = gradients()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    again = gradients()
    assert plain.keys() == again.keys()
    for name, gradient in plain.items():
        assert torch.allclose(again[name], gradient, atol=1e-6), name
    assert all(gradient.abs().max() > 0 for name, gradient in plain.items() if "layers" in name)


@pytest.mark.parametrize("reentrant", [True, False])
def test_items_spelt_as_text_need_no_new_rows(reentrant, checkpoint, tmp_path):
    arguments, model, _, _ = extended(checkpoint("llama"), "lora", tmp_path)
    model = adapt(arguments, model, [])
    assert not any("trainable_tokens" in name for name, _ in model.named_parameters())
    model.train().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    first = [weight for name, weight in model.named_parameters() if "layers.0" in name and "lora_B" in name]
    assert first
    assert all(weight.grad is not None and weight.grad.abs().max() > 0 for weight in first)
    model.gradient_checkpointing_disable()
    before = logits(model)
    assert torch.allclose(logits(merge(model)), before, atol=1e-5)


@pytest.mark.parametrize("then", ["full", "lora", "dora"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_new_tokens_then_all(family, then, checkpoint, tmp_path):
    arguments, model, catalog, rows = extended(checkpoint(family), "new_tokens", tmp_path)
    model = adapt(arguments, model, rows)
    first = fit(model, catalog, steps=4)
    before = logits(model)
    model = merge(model)
    assert torch.allclose(logits(model), before, atol=1e-5)
    if then != "full":
        model = adapt(arguments_for(checkpoint(family), then), model, rows)
        assert torch.allclose(logits(model), before, atol=1e-5)
    second = fit(model, catalog, steps=4)
    assert second[0] < first[-1]
    assert second[-1] < second[0]
    after = logits(model)
    assert torch.allclose(logits(merge(model)), after, atol=5e-5)


def test_a_half_precision_base(checkpoint, tmp_path):
    arguments, model, catalog, rows = extended(checkpoint("llama"), "lora", tmp_path, dtype="bfloat16")
    model = adapt(arguments, model, rows)
    # What is trained is kept in float32: steps of bfloat16 are too coarse for small updates.
    assert {weight.dtype for weight in model.parameters() if weight.requires_grad} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        losses = fit(model, catalog, steps=4)
    assert losses[-1] < losses[0]
    assert {weight.dtype for weight in merge(model).parameters()} == {torch.float32}


def test_the_adapted_head_tells_its_bias(checkpoint, tmp_path):
    for family, has_bias in (("phi", True), ("llama", False), ("gpt2", False)):
        for method in ("lora", "new_tokens"):
            arguments, model, _, rows = extended(checkpoint(family), method, tmp_path)
            head = adapt(arguments, model, rows).get_output_embeddings()
            assert (head.bias is not None) == has_bias
            names = [name for name, _ in head.named_parameters()]
            assert sum("bias" in name for name in names) == has_bias  # no second one in the state dict


def test_what_cannot_be_adapted(checkpoint, tmp_path):
    _, model, _, rows = extended(checkpoint("llama"), "lora", tmp_path)
    with pytest.raises(BackboneError, match="'full' trains the model itself"):
        adapt(arguments_for(checkpoint("llama"), "full"), model, rows)
    with pytest.raises(BackboneError, match="'qlora' was given a base that is not quantised"):
        adapt(arguments_for(checkpoint("llama"), "qlora"), model, rows)
    with pytest.raises(BackboneError, match="'new_tokens' has none to train"):
        adapt(arguments_for(checkpoint("llama"), "new_tokens"), model, [])
    with pytest.raises(ArtefactError, match="does not fit its base"):
        attach(model, tmp_path)
