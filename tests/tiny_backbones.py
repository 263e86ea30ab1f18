"""Tiny random checkpoints of every family, with tokenizers of their kinds, and models trained on them for a moment."""

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from factories import PROMPTS, random_catalog
from hostile_tokenizers import hostile_tokenizer

from llmrec.backbones.adapters import adapt
from llmrec.backbones.bits import load_quantised
from llmrec.backbones.causal_lm import (
    WITH_LORA,
    BackboneArguments,
    from_checkpoint,
    from_scratch,
    load_tokenizer,
)
from llmrec.catalog import Catalog
from llmrec.export import save_adapter, save_extended_base
from llmrec.prompt import Prompt
from llmrec.recommender import Recommender, Settings
from llmrec.vocabulary import add_catalog_tokens

# Family -> model type, tokenizer of `hostile_tokenizers`, tied.
FAMILIES = {
    "llama": ("llama", "llama3", False),
    "llama-tied": ("llama", "llama2", True),
    "gpt2": ("gpt2", "gpt2", True),
    "gpt2-untied": ("gpt2", "gpt2", False),
    "qwen3": ("qwen3", "qwen", True),
    "gemma": ("gemma", "gemma", True),
    "mistral": ("mistral", "mistral", False),
    "phi": ("phi", "t5", False),  # its head has a bias
}


def write_checkpoint(family: str, folder: Path, seed: int = 0) -> Path:
    """A random checkpoint of a family with its tokenizer, as one downloads it; weights wide enough to differ."""
    model_type, tokenizer_family, tied = FAMILIES[family]
    tokenizer = copy.deepcopy(hostile_tokenizer(tokenizer_family))
    arguments = BackboneArguments(
        model_type=model_type,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(seed)
    model = from_scratch(arguments, tokenizer, 128)
    with torch.no_grad():
        for parameter in model.parameters():
            # Biases too: one that is lost must show.
            parameter.normal_(0.0, 0.15) if parameter.dim() > 1 else parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def arguments_for(checkpoint: Path, method: str, **others: object) -> BackboneArguments:
    """`method` on a checkpoint, with an adapter of rank 4 and no dropout."""
    lora = {"lora_rank": 4, "lora_alpha": 8, "lora_dropout": 0.0} if method in WITH_LORA else {}
    return BackboneArguments(backbone=str(checkpoint), method=method, **(lora | others))


def new_ids(catalog: Catalog) -> list[int]:
    return [int(id) for level in catalog.require_tokens() for id in level]


@dataclass
class Trained:
    """A trained recommender; of an adapter's method also the folders of its base and of itself."""

    recommender: Recommender
    base: Path
    adapter: Path
    new_rows: list[int]
    losses: list[float]


def train(checkpoint: Path, method: str, folder: Path, steps: int = 4, **others: object) -> Trained:
    """What train/sft.py does, in a few steps: extend, save the base, adapt, train, save the adapter."""
    arguments = arguments_for(checkpoint, method, **others)
    tokenizer = load_tokenizer(arguments)
    catalog = add_catalog_tokens(tokenizer, random_catalog())
    model, rows = from_checkpoint(arguments, tokenizer, new_ids(catalog), seed=0)
    base = ""
    if method != "full":
        base = save_extended_base(model, tokenizer, folder / "base")
        if arguments.quantised:
            model = load_quantised(folder / "base", method)
        torch.manual_seed(1)
        model = adapt(arguments, model, rows)
    losses = fit(model, catalog, steps)
    settings = Settings(max_history=6, num_beams=10)
    recommender = Recommender(model, tokenizer, catalog, Prompt.read(PROMPTS / "semantic_ids.jinja"), settings)
    if method != "full":
        save_adapter(recommender, folder / "adapter", base, method)
    return Trained(recommender, folder / "base", folder / "adapter", rows, losses)


def fit(model: torch.nn.Module, catalog: Catalog, steps: int, rate: float = 0.01) -> list[float]:
    """A few steps of Adam on two rows of items; ends in eval mode."""
    batch = torch.tensor(catalog.item_tokens[:12].reshape(2, -1))
    optimizer = torch.optim.Adam([weight for weight in model.parameters() if weight.requires_grad], lr=rate)
    model.train()
    losses = []
    for _ in range(steps):
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses
