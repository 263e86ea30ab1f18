"""Models from configs and checkpoints, new rows, LoRA and its merging."""

import pytest
import torch
from factories import random_catalog
from transformers import AutoConfig, AutoModelForCausalLM

from llmrec.backbones.causal_lm import (
    BackboneArguments,
    build_config,
    extend_embeddings,
    from_checkpoint,
    from_scratch,
    with_lora,
)
from llmrec.exceptions import BackboneError
from llmrec.vocabulary import add_catalog_tokens, train_tokenizer

FAMILIES = ["llama", "gpt2", "qwen3", "mistral", "gemma"]


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def checkpoint(request, tmp_path_factory):
    """A small pretrained model on disk, untied for Llama and tied for GPT-2, and its tokenizer."""
    folder = tmp_path_factory.mktemp(request.param)
    tokenizer = train_tokenizer(["some text to learn from"], 300)
    torch.manual_seed(0)
    arguments = BackboneArguments(
        model_type=request.param,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=request.param == "gpt2",
    )
    from_scratch(arguments, tokenizer, 64).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_reach_every_family(family):
    arguments = BackboneArguments(
        model_type=family, hidden_size=64, num_hidden_layers=3, num_attention_heads=2, intermediate_size=96
    )
    config = build_config(arguments, vocab_size=320, max_positions=77, bos_token_id=1)
    model = AutoModelForCausalLM.from_config(config)
    assert model.get_input_embeddings().weight.shape == (320, 64)
    assert config.num_hidden_layers == 3
    assert config.max_position_embeddings == 77
    assert any(96 in parameter.shape for parameter in model.parameters())
    assert model(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 320)


def test_sizes_that_no_model_has():
    with pytest.raises(BackboneError, match="not a multiple"):
        build_config(BackboneArguments(hidden_size=100, num_attention_heads=3), 300, 64)
    with pytest.raises(BackboneError, match="'lama'"):
        build_config(BackboneArguments(model_type="lama"), 300, 64)


@pytest.mark.parametrize("tied", [True, False])
def test_new_rows_are_near_the_mean_distinct_and_seeded(tied):
    def model():
        torch.manual_seed(0)
        config = AutoConfig.for_model(
            "llama", vocab_size=100, hidden_size=64, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, intermediate_size=64, tie_word_embeddings=tied,
        )  # fmt: skip
        return AutoModelForCausalLM.from_config(config)

    first, second, other = model(), model(), model()
    before = [first.get_input_embeddings().weight.clone(), first.get_output_embeddings().weight.clone()]
    new = list(range(100, 140))
    assert extend_embeddings(first, 140, new, seed=1) == list(range(100, 192))
    extend_embeddings(second, 140, new, seed=1)
    extend_embeddings(other, 140, new, seed=2)
    tables = [first.get_input_embeddings().weight, first.get_output_embeddings().weight]
    assert (tables[0] is tables[1]) == tied
    for old, table in zip(before, tables, strict=True):
        assert table.shape[0] == 192
        assert torch.equal(table[:100], old)
        distance = (table[100:140] - old.mean(0)) / old.std(0, correction=0)
        assert 0.05 < distance.std() < 0.2
        assert len({tuple(row.tolist()) for row in table[100:140]}) == 40
    assert torch.equal(tables[0], second.get_input_embeddings().weight)
    assert not torch.equal(tables[0][100:140], other.get_input_embeddings().weight[100:140])


def test_tables_wider_than_the_tokenizer_are_not_shrunk():
    config = AutoConfig.for_model(
        "llama", vocab_size=200, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    model = AutoModelForCausalLM.from_config(config)
    extend_embeddings(model, 140, list(range(100, 140)), seed=0)
    assert model.get_input_embeddings().weight.shape[0] == 200


def test_lora_trains_adapters_and_new_rows_and_merges_without_loss(checkpoint, tmp_path):
    arguments = BackboneArguments(backbone=str(checkpoint), lora_rank=4, lora_alpha=8, lora_dropout=0.0)
    tokenizer = train_tokenizer(["some text to learn from"], 300)
    catalog = add_catalog_tokens(tokenizer, random_catalog())
    new = [int(id) for level in catalog.require_tokens() for id in level]
    base, new_rows = from_checkpoint(arguments, tokenizer, new, seed=0)
    assert set(new) <= set(new_rows)
    untouched = base.get_input_embeddings().weight.detach().clone()
    model = with_lora(arguments, base, new_rows)
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert any("lora_" in name for name in trainable)
    assert all("lora_" in name or "trainable_tokens" in name for name in trainable)
    batch = torch.tensor([[1, *new[:6]], [1, *new[6:12]]])
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(8):
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
    model.eval()
    with torch.no_grad():
        before = model(input_ids=batch).logits
        merged = model.merge_and_unload()
        assert torch.allclose(merged(input_ids=batch).logits, before, atol=1e-4)
        merged.save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert torch.allclose(again(input_ids=batch).logits, before, atol=1e-4)
    table = again.get_input_embeddings().weight
    old = [row for row in range(len(untouched)) if row not in new_rows]
    assert torch.equal(table[old], untouched[old])
    assert not torch.allclose(table[new[:12]], untouched[new[:12]])


def test_checkpoints_that_do_not_load(tmp_path):
    with pytest.raises(BackboneError, match="cannot be loaded"):
        from_checkpoint(BackboneArguments(backbone=str(tmp_path)), train_tokenizer(["x"], 300), [], 0)
