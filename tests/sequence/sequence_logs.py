"""Small random logs with times, actions and domains, and the models that read them."""

import numpy as np
import polars as pl

from llmrec.data.interactions import Interactions
from llmrec.data.items import Items
from llmrec.data.protocols import leave_one_out
from llmrec.sequence.arguments import EncoderArguments
from llmrec.sequence.events import EventConfig
from llmrec.sequence.model import SequenceModel, sequence_config

ACTIONS, DOMAINS = ("buy", "cart", "view"), ("books", "toys")
ENCODERS = ("hstu", "sasrec", "bert4rec", "gru4rec", "llama", "gpt2")


def random_split(seed=0, users=30, items=25, longest=14, unknown=0.1):
    """A leave-one-out split of users with 3 to `longest` interactions, a tenth of whose events nobody knows."""
    rng = np.random.default_rng(seed)
    rows = []
    for user in range(users):
        time = 1_500_000_000 + int(rng.integers(0, 10**7))
        for _ in range(int(rng.integers(3, longest + 1))):
            time += int(rng.integers(1, 10**5))
            action, domain = ACTIONS[rng.integers(3)], DOMAINS[rng.integers(2)]
            known = rng.random() >= unknown
            rows.append(
                (f"u{user}", f"i{rng.integers(items)}", time, action if known else None, domain if known else None)
            )
    frame = pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp", "action", "domain"], orient="row")
    table = Items.from_frame(pl.DataFrame({"item_id": [f"i{row}" for row in range(items)]}))
    return leave_one_out(Interactions.from_frame(frame), table)


def small_model(encoder="sasrec", items=25, max_history=10, seed=0, events=None, **flags):
    """A random model of width 16 in evaluation mode."""
    import torch

    events = events or EventConfig()
    heads = {} if encoder == "gru4rec" else {"num_attention_heads": 2}
    sizes = {"hidden_size": 16, "num_hidden_layers": 2} | heads
    own = {name: flags.pop(name) for name in list(flags) if name in EncoderArguments.__dataclass_fields__}
    positions = events.positions(max_history) + (1 if encoder == "bert4rec" else 0)
    config = EncoderArguments(encoder=encoder, **(sizes | own)).config(positions)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = SequenceModel(sequence_config(config, items, max_history, events=events, **flags))
        torch.nn.init.normal_(model.start)
        for parameter in model.parameters():
            parameter.data.mul_(3)  # else all states are nearly alike
    return model.eval()
