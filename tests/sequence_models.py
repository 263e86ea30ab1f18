"""Small untrained sequence models and their catalogs, for tests of what recommends and serves."""

import numpy as np
import torch

from llmrec.artefact_parts import Settings
from llmrec.backbones.hstu import HSTUConfig
from llmrec.backbones.sasrec import SASRecConfig
from llmrec.catalog import Catalog
from llmrec.representations.item_features import ItemFeatures
from llmrec.sequence.events import EventConfig
from llmrec.sequence.model import SequenceModel, sequence_config
from llmrec.sequence.recommender import SequenceRecommender

EVENTS = EventConfig(
    actions=["buy", "view"],
    domains=["books", "games"],
    action_tokens="before",
    domain_tokens="before",
    target_action="buy",
    time_features=True,
    request_time=True,
)
KINDS = {
    "ids": {"kind": "ids"},
    "text": {"kind": "text", "width": 6, "adapter": "mlp"},
    "tuned": {"kind": "text", "width": 6, "tuned": True},
    "ids+text": {"kind": "ids+text", "width": 6},
    "semantic_ids": {"kind": "semantic_ids", "codebook_sizes": [4, 5], "pieces": "prefix"},
    "hashed": {"kind": "hashed", "table_size": 50},
}


def items_of(count, first=0):
    """Items with a price, a brand and, of most, a stock."""
    return [
        {"item_id": f"item-{row}", "title": f"Title {row}", "price": float(row % 20), "brand": f"Brand {row % 3}"}
        | ({"in_stock": row % 2 == 0} if row % 5 else {})
        for row in range(first, first + count)
    ]


def features_of(count, seed=0):
    """What texts and semantic IDs are made of."""
    rng = np.random.default_rng(seed)
    codes = np.stack([rng.integers(0, 4, count), rng.integers(0, 5, count)], axis=1)
    return {"vectors": rng.normal(size=(count, 6)).astype(np.float32), "codes": codes}


def random_model(seed=0, num_items=40, max_history=8, kind="ids", events=None, encoder="hstu", **changes):
    """A model whose weights are drawn wide enough that scores differ, in float64."""
    torch.manual_seed(seed)
    events = events or EventConfig()
    positions = events.positions(max_history) + 1
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": positions}
    made = HSTUConfig(qk_dim=8, v_dim=8, **sizes) if encoder == "hstu" else SASRecConfig(**sizes)
    model = SequenceModel(sequence_config(made, num_items, max_history, KINDS[kind], events, **changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.4)
    model.representation.set_items(ItemFeatures([f"item-{row}" for row in range(num_items)], **features_of(num_items)))
    return model.double().eval()


def random_sequence_recommender(seed=0, num_items=40, retired=(), retrieval="exact", **options):
    """A recommender of such a model."""
    marks = np.zeros(num_items, dtype=bool)
    marks[list(retired)] = True
    model = random_model(seed, num_items, **options)
    settings = Settings(max_history=model.config.max_history, num_beams=1)
    return SequenceRecommender(model, Catalog.of_rows(items_of(num_items), marks), settings, retrieval)
