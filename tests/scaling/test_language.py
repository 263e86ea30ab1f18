from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from training_steps import counted, kept
from transformers import AutoModelForCausalLM

from llmrec.backbones.causal_lm import BackboneArguments, build_config
from llmrec.exceptions import DataError
from llmrec.scaling.language import (
    LanguageShape,
    language_activation_bytes,
    language_parameters,
    row_flops,
    trained_parameters,
)
from llmrec.training.head import HeadLoss

ROWS = 4
VARIANTS = {
    "whole": {},
    "untied-one-target": {"tied": False, "targets": 1},
    "semantic-ids-alone": {"loss_vocabulary": 48},
    "dropout": {"dropout": True},
    "lora-and-new-rows": {"lora_rank": 4, "new_rows": 24},
    "lora-untied": {"lora_rank": 4, "new_rows": 24, "tied": False},
    "lora-alone": {"lora_rank": 4},
    "lora-without-dropout": {"lora_rank": 4, "lora_dropout": False},
}
CASES = {
    **{
        f"{kind}-{name}": LanguageShape(kind, 2, 32, 320, 3, 5, max_positions=64, **flags)
        for kind in ("llama", "gpt2", "qwen3")
        for name, flags in VARIANTS.items()
        if kind == "llama" or name in ("whole", "dropout", "lora-and-new-rows", "lora-alone")
    },
    "qwen3-shared-keys": LanguageShape("qwen3", 2, 32, 320, 3, 5, key_value_heads=2, head_dim=16, inner=56),
    "llama-shared-keys": LanguageShape("llama", 2, 32, 320, 3, 5, key_value_heads=1),
    "llama-long-prompt": LanguageShape("llama", 1, 32, 320, 2, 8, other_tokens=9, targets=1),
}
CHECKPOINTED = {
    "whole": LanguageShape("llama", 3, 32, 320, 3, 5, checkpointing=True),
    "lora": LanguageShape("gpt2", 3, 32, 320, 3, 5, max_positions=64, lora_rank=4, new_rows=24, checkpointing=True),
}


def model_of(shape):
    """What train/sft.py trains."""
    torch.manual_seed(0)
    arguments = BackboneArguments(
        model_type=shape.model_type,
        hidden_size=shape.width,
        num_hidden_layers=shape.depth,
        num_attention_heads=shape.heads,
        intermediate_size=shape.inner,
        tie_word_embeddings=shape.tied,
        dropout=0.1 if shape.dropout else 0.0,
    )
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    config = build_config(arguments, shape.vocabulary, shape.max_positions or 64, **ids)
    if shape.key_value_heads is not None:
        config.num_key_value_heads = shape.key_value_heads
    if shape.head_dim is not None:
        config.head_dim = shape.head_dim
    model = AutoModelForCausalLM.from_config(config)
    if shape.lora_rank is not None:
        tables = ["wte" if shape.model_type == "gpt2" else "embed_tokens", *([] if shape.tied else ["lm_head"])]
        rows = list(range(shape.vocabulary - shape.new_rows, shape.vocabulary))
        lora = LoraConfig(
            task_type="CAUSAL_LM",
            r=shape.lora_rank,
            lora_dropout=0.05 if shape.lora_dropout else 0.0,
            target_modules="all-linear",
            fan_in_fan_out=shape.model_type == "gpt2",
            trainable_token_indices=dict.fromkeys(tables, rows) if shape.new_rows else None,
        )
        model = get_peft_model(model, lora)
    if shape.checkpointing:
        model.gradient_checkpointing_enable()
    return model.train()


def step_of(shape, model):
    """A function that computes the loss of some rows; what the loss finds out first is found out here."""
    tokens = int(shape.tokens)
    ids = torch.randint(shape.loss_vocabulary or shape.vocabulary, (ROWS, tokens))
    labels = ids.clone()
    labels[:, : tokens - int(shape.labels)] = -100
    loss = HeadLoss(model, None if shape.loss_vocabulary is None else range(shape.loss_vocabulary))

    def step():
        return loss(model, {"input_ids": ids}, labels).total

    step()
    return step


@pytest.mark.parametrize("name", CASES)
def test_weights_operations_and_memory(name):
    shape = CASES[name]
    model = model_of(shape)
    plain = model.get_base_model() if shape.lora_rank is not None else model
    adapted = trained_parameters(shape) if shape.lora_rank is not None else 0
    weights = {id(weight): weight.numel() for weight in plain.parameters()}
    assert language_parameters(shape) == sum(weights.values()) - adapted
    trained = (weight for weight in model.parameters() if weight.requires_grad)
    assert trained_parameters(shape) == sum({id(weight): weight.numel() for weight in trained}.values())
    step = step_of(shape, model)
    assert counted(step) == pytest.approx(ROWS * row_flops(shape).total, rel=1e-9)
    # The loss keeps its gradients as attributes, where autograd's hooks do not look.
    words = shape.new_rows if shape.lora_rank is not None else shape.loss_vocabulary or shape.vocabulary
    hidden = 4 * shape.width * (words + ROWS * shape.labels)
    found = kept(step, model.parameters())
    assert language_activation_bytes(shape, ROWS) - hidden == pytest.approx(found, rel=0.02)


@pytest.mark.parametrize("name", CHECKPOINTED)
def test_checkpointing_computes_again_what_it_does_not_keep(name):
    shape = CHECKPOINTED[name]
    plain = replace(shape, checkpointing=False)
    model = model_of(shape)
    step = step_of(shape, model)
    assert counted(step) == pytest.approx(ROWS * row_flops(shape).total, rel=1e-9)
    assert row_flops(shape).total > 1.2 * row_flops(plain).total
    # The hooks see what stays: one layer's own tensors come and go while it is computed again.
    words = shape.new_rows if shape.lora_rank is not None else shape.vocabulary
    hidden = 4 * shape.width * (words + ROWS * shape.labels)
    deeper = replace(plain, depth=shape.depth + 1)
    layer = language_activation_bytes(deeper, ROWS) - language_activation_bytes(plain, ROWS)
    found = kept(step, model.parameters())
    assert language_activation_bytes(shape, ROWS) - hidden - layer == pytest.approx(found, rel=0.02)


def test_a_frozen_layer_costs_two_thirds():
    whole = LanguageShape("llama", 4, 64, 320, 3, 5)
    lora = replace(whole, lora_rank=1, new_rows=24)
    assert row_flops(lora).layers / row_flops(whole).layers == pytest.approx(2 / 3, abs=0.03)


def test_next_item_costs_a_whole_history_for_one_target():
    sequence = LanguageShape("llama", 4, 64, 320, 3, 21)
    one = replace(sequence, targets=1)
    assert row_flops(one).layers == row_flops(sequence).layers
    assert row_flops(one).loss == pytest.approx(row_flops(sequence).loss / 21)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "bloom"}, "no costs of a 'bloom'"),
        ({"device": "tpu"}, "on a 'tpu'"),
        ({"depth": 0}, "depth of a language model is 0"),
        ({"length": float("nan")}, "length of a language model is nan"),
        ({"heads": 3}, "3 heads do not share"),
        ({"key_value_heads": 3}, "3 heads of keys"),
        ({"targets": 6}, "holds 5 items, and learns 6"),
        ({"new_rows": 3}, "without LoRA"),
        ({"model_type": "gpt2", "head_dim": 16}, "heads that share its width"),
    ],
)
def test_sizes_that_no_model_has(changes, message):
    sizes = {"model_type": "llama", "depth": 2, "width": 32, "vocabulary": 320, "codes": 3, "length": 5} | changes
    with pytest.raises(DataError, match=message):
        LanguageShape(**sizes)
