"""Small random models with several layers, logs over their items, and rows for them."""

import numpy as np
import polars as pl
import torch
from factories import PROMPTS, random_catalog
from transformers import AutoConfig, AutoModelForCausalLM

from llmrec.artefact_parts import Settings
from llmrec.catalog import Catalog
from llmrec.data.interactions import Interactions
from llmrec.data.items import Items
from llmrec.data.protocols import leave_one_out
from llmrec.prompt import Prompt
from llmrec.recommender import Recommender
from llmrec.sequence.arguments import EncoderArguments
from llmrec.sequence.events import EventConfig
from llmrec.sequence.model import SequenceModel, sequence_config
from llmrec.sequence.recommender import SequenceRecommender
from llmrec.vocabulary import add_catalog_tokens, train_tokenizer

FAMILIES = ("llama", "gpt2", "qwen3")


def language_model(family="llama", layers=4, words=61, width=32, seed=0, dtype=torch.float64, tied=True, **sizes):
    """A causal language model whose weights are drawn wide enough that every layer matters."""
    common = {
        "vocab_size": words, "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": 2,
        "max_position_embeddings": 128, "tie_word_embeddings": tied, "bos_token_id": 0, "eos_token_id": 0,
        "pad_token_id": 0,
    }  # fmt: skip
    if family == "gpt2":
        common |= {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
    else:
        common |= {"num_key_value_heads": 1, "head_dim": width // 2, "intermediate_size": 48}
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **(common | sizes))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.2)
            elif parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def sequence_model(encoder="sasrec", layers=4, items=25, max_history=10, width=16, seed=0, dtype=torch.float64, **own):
    """A sequence model, likewise; `own` are flags of its encoder, or `events`."""
    events = own.pop("events", None) or EventConfig()
    heads = {} if encoder == "gru4rec" else {"num_attention_heads": 2}
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "dropout": 0.0} | heads
    config = EncoderArguments(encoder=encoder, **(sizes | own)).config(events.positions(max_history) + 1)
    torch.manual_seed(seed)
    model = SequenceModel(sequence_config(config, items, max_history, events=events))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.to(dtype).eval()


def language_recommender(layers=4, seed=0, num_items=40, sizes=(5, 4, 6), dtype=torch.float64, **options):
    """An untrained recommender over a random catalog."""
    catalog = random_catalog(0, num_items, sizes)
    tokenizer = train_tokenizer(["a customer bought a title and a brand"], vocab_size=options.pop("text_words", 300))
    catalog = add_catalog_tokens(tokenizer, catalog)
    model = language_model(
        options.pop("family", "llama"), layers, len(tokenizer) + 5, seed=seed, dtype=dtype, **options
    )
    prompt = Prompt.read(PROMPTS / "semantic_ids.jinja")
    return Recommender(model, tokenizer, catalog, prompt, Settings(max_history=6, num_beams=10))


def sequence_recommender(layers=4, seed=0, num_items=40, encoder="sasrec", dtype=torch.float64):
    """The same of a sequence model."""
    items = [{"item_id": f"item-{row}", "title": f"Title {row}"} for row in range(num_items)]
    model = sequence_model(encoder, layers, num_items, seed=seed, dtype=dtype)
    return SequenceRecommender(model, Catalog.of_rows(items), Settings(max_history=10, num_beams=1))


def log_frame(num_items=40, users=60, seed=0):
    """Interactions with the items of such a recommender: walks with steps of one or two."""
    rng = np.random.default_rng(seed)
    rows = []
    for user in range(users):
        place = int(rng.integers(num_items))
        for step in range(int(rng.integers(4, 10))):
            rows.append((f"u{user}", f"item-{place}", 1_500_000_000 + 60 * step))
            place = (place + int(rng.integers(1, 3))) % num_items
    return pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row")


def split_of(num_items=40, users=60, seed=0):
    """Their leave-one-out split over all items, in the catalog's order."""
    table = Items.from_frame(pl.DataFrame({"item_id": [f"item-{row}" for row in range(num_items)]}))
    return leave_one_out(Interactions.from_frame(log_frame(num_items, users, seed)), table)


def token_rows(seed, count, words=61, longest=12, least=0):
    """Rows of tokens, of which some are labelled."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        tokens = rng.integers(least, words, rng.integers(2, longest + 1)).tolist()
        labels = [token if rng.random() < 0.6 else -100 for token in tokens]
        labels[-1] = tokens[-1]
        rows.append({"input_ids": tokens, "labels": labels})
    return rows
