"""Small random catalogs and models for the tests."""

from pathlib import Path

import numpy as np
import torch

from llmrec.backbones.causal_lm import BackboneArguments, from_scratch
from llmrec.catalog import Catalog
from llmrec.prompt import Prompt
from llmrec.recommender import Recommender, Settings
from llmrec.vocabulary import add_catalog_tokens, train_tokenizer

PROMPTS = Path(__file__).parents[1] / "prompts"


def random_codes(seed: int, num_items: int, sizes: tuple[int, ...]) -> np.ndarray:
    """(num_items, L) unique codes in random order."""
    rng = np.random.default_rng(seed)
    flat = rng.choice(int(np.prod(sizes)), size=num_items, replace=False)
    return np.stack(np.unravel_index(flat, sizes), axis=1).astype(np.int32)


def random_catalog(seed: int = 0, num_items: int = 40, sizes: tuple[int, ...] = (5, 4, 6)) -> Catalog:
    items = [
        {"item_id": f"item-{row}", "title": f"Title {row}", "brand": f"Brand {row % 3}"} for row in range(num_items)
    ]
    return Catalog(items, random_codes(seed, num_items, sizes), sizes)


def random_recommender(
    seed: int = 0,
    model_type: str = "llama",
    num_items: int = 40,
    sizes: tuple[int, ...] = (5, 4, 6),
    prompt: Prompt | None = None,
    dtype: torch.dtype = torch.float64,
    max_history: int = 6,
    max_positions: int = 128,
    hidden_size: int = 64,
    num_beams: int = 10,
) -> Recommender:
    """An untrained recommender whose weights are drawn wide enough that scores differ."""
    catalog = random_catalog(seed, num_items, sizes)
    tokenizer = train_tokenizer(["a customer bought a title and a brand"], vocab_size=300)
    catalog = add_catalog_tokens(tokenizer, catalog)
    arguments = BackboneArguments(
        model_type=model_type,
        hidden_size=hidden_size,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=96,
    )
    torch.manual_seed(seed)
    model = from_scratch(arguments, tokenizer, max_positions)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.15)
    settings = Settings(max_history=max_history, num_beams=num_beams)
    return Recommender(
        model.to(dtype).eval(), tokenizer, catalog, prompt or Prompt.read(PROMPTS / "semantic_ids.jinja"), settings
    )


def random_histories(seed: int, num_items: int, count: int, longest: int) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, num_items, size=rng.integers(0, longest + 1)).tolist() for _ in range(count)]
