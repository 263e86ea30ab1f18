"""Small random sequence models that think, in float64, and logs that they are asked about."""

from typing import Any

import numpy as np
import polars as pl
import torch

from llmrec.backbones.reasoning import ReasoningConfig
from llmrec.data.interactions import Interactions
from llmrec.data.items import Items
from llmrec.data.protocols import leave_one_out
from llmrec.data.split import Split
from llmrec.sequence.arguments import EncoderArguments
from llmrec.sequence.events import EventConfig
from llmrec.sequence.model import SequenceModel, sequence_config

ACTIONS = ["buy", "view"]
NUM_ITEMS = 25


def log(seed: int = 0, users: int = 24, longest: int = 12) -> Split:
    """A leave-one-out split of users with 3 to `longest` interactions under two actions."""
    rng = np.random.default_rng(seed)
    rows = []
    for user in range(users):
        time = 1_500_000_000
        for _ in range(int(rng.integers(3, longest + 1))):
            time += int(rng.integers(1, 10**5))
            rows.append((f"u{user}", f"i{rng.integers(NUM_ITEMS)}", time, ACTIONS[rng.integers(2)]))
    frame = pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp", "action"], orient="row")
    return leave_one_out(Interactions.from_frame(frame), items())


def items() -> Items:
    """The catalog of `log`."""
    return Items.from_frame(pl.DataFrame({"item_id": [f"i{row}" for row in range(NUM_ITEMS)]}))


def model(
    kind: str = "prl",
    steps: int = 2,
    block: int = 1,
    encoder: str = "sasrec",
    events: EventConfig | None = None,
    max_history: int = 10,
    **parts: Any,
) -> SequenceModel:
    """In evaluation mode, none of whose weights has an initial value of 0 or 1."""
    events = events or EventConfig()
    positions = events.positions(max_history) + steps * block
    heads = {} if encoder == "gru4rec" else {"num_attention_heads": 2}
    inner = EncoderArguments(encoder=encoder, hidden_size=16, **heads).config(positions)  # type: ignore[arg-type]
    config = ReasoningConfig.around(inner, steps, kind, block)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made: SequenceModel = SequenceModel(
            sequence_config(config, NUM_ITEMS, max_history, events=events, **parts)
        ).double()
        with torch.no_grad():
            for parameter in made.parameters():
                parameter += 0.3 * torch.randn_like(parameter)
    made.eval()
    return made
