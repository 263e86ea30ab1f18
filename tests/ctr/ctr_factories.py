"""Small labelled rows and models for the tests of ranking."""

import numpy as np
import torch
from transformers import AutoConfig

from llmrec.backbones.encoder import UNKNOWN_TIME
from llmrec.backbones.encoders import register_encoders
from llmrec.ctr.histories import Events
from llmrec.ctr.model import CTRModel, ctr_config, positions_of
from llmrec.ctr.rows import MISSING, LabelledRows

ENCODERS = {
    "hstu": ("hstu", {"num_attention_heads": 2, "qk_dim": 4, "v_dim": 4}),
    "hstu-length": ("hstu", {"qk_dim": 8, "v_dim": 8, "normalize_by": "length", "relative_bias": "rope+time"}),
    "sasrec": ("sasrec", {"relative_bias": "position+time"}),
    "gru4rec": ("gru4rec", {}),
    "bert4rec": ("bert4rec", {}),
    "llama": ("causal_body", {"body": "llama"}),
}


def tiny_ctr(encoder="hstu", layout="target", scorer="mlp", labels=("like",), num_items=12, max_history=6, seed=0):
    """A model in evaluation mode whose weights are large enough for everything to matter."""
    register_encoders()
    kind, sizes = ENCODERS[encoder]
    torch.manual_seed(seed)
    heads = {} if kind in ("gru4rec",) or "num_attention_heads" in sizes else {"num_attention_heads": 2}
    config = AutoConfig.for_model(
        kind,
        hidden_size=8,
        num_hidden_layers=2,
        max_position_embeddings=positions_of(max_history, layout),
        **heads,
        **sizes,
    )
    model = CTRModel(ctr_config(config, num_items, max_history, list(labels), layout=layout, scorer=scorer))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def some_events(count, num_items=12, num_actions=3, seed=0, known_times=True):
    rng = np.random.default_rng(seed)
    times = np.sort(rng.integers(10**9, 10**9 + 10**6, size=count))
    return Events(
        rng.integers(0, num_items, size=count),
        rng.integers(0, num_actions, size=count),
        times if known_times else np.full(count, UNKNOWN_TIME),
    )


def make_rows(users, items, labels, timestamps=None, part=None, given=None, flags=None):
    """Rows of numbers, whose ids are these numbers as text."""
    labels = np.asarray(labels, dtype=np.int64)
    labels = labels[:, None] if labels.ndim == 1 else labels
    users, items = np.asarray(users, dtype=np.int64), np.asarray(items, dtype=np.int64)
    return LabelledRows(
        user_ids=tuple(str(user) for user in range(users.max() + 1)),
        item_ids=tuple(str(item) for item in range(items.max() + 1)),
        users=users,
        items=items,
        labels=labels,
        timestamps=np.arange(len(users)) if timestamps is None else np.asarray(timestamps, dtype=np.int64),
        part=np.zeros(len(users), np.int64) if part is None else np.asarray(part, dtype=np.int64),
        label_names=tuple(f"label{column}" for column in range(labels.shape[1])),
        given=given,
        flags=flags or {},
        sources=(("rows", "0"),),
    )


def random_rows(seed=0, count=60, num_labels=1, missing=False, tied=False):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, size=(count, num_labels))
    if missing:
        labels[rng.random(labels.shape) < 0.2] = MISSING
    times = rng.integers(0, 8 if tied else 10**6, size=count)
    return make_rows(rng.integers(0, 7, size=count), rng.integers(0, 15, size=count), labels, times)
