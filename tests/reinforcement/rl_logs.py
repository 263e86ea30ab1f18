"""Small random logs with times, actions and domains, and what rollouts are made of."""

import numpy as np
import polars as pl

from llmrec.catalog import Catalog
from llmrec.data.interactions import Interactions
from llmrec.data.items import Items
from llmrec.data.protocols import global_temporal, leave_one_out
from llmrec.prompt import Prompt
from llmrec.reinforcement.cases import RolloutCases
from llmrec.tasks.task_data import TaskData
from llmrec.vocabulary import add_catalog_tokens, train_tokenizer

BEGIN, DAY = 1_600_000_000, 86_400
SIZES = (4, 5, 3)
BARE = Prompt("{% for item in history %}{{ item.semantic_id }}{% endfor %}")


def log_of(seed=0, users=8, items=12, longest=8, events=True):
    """A random log of users with 1 to `longest` interactions, days apart and some at the same time."""
    rng = np.random.default_rng(seed)
    found = []
    for user in range(users):
        time = BEGIN + int(rng.integers(0, 4)) * DAY
        for _ in range(longest if user == 0 else int(rng.integers(1, longest + 1))):
            time += int(rng.integers(0, 4)) * DAY
            found.append((f"u{user}", f"i{rng.integers(items)}", time, ["view", "buy"][rng.integers(2)], "books"))
    names = ["user_id", "item_id", "timestamp", "action", "domain"]
    frame = pl.DataFrame(found, schema=names, orient="row")
    return frame if events else frame.select("user_id", "item_id")


def items_of(number=12):
    return pl.DataFrame(
        {"item_id": [f"i{row}" for row in range(number)], "title": [f"Title number {row}" for row in range(number)]}
    )


def data_of(log=None, items=None, seed=0, prompt=BARE, protocol="leave-one-out", **changes):
    """TaskData with a tokenizer of its own, split by leave-one-out or in time."""
    table = Items.from_frame(items_of() if items is None else items)
    interactions = Interactions.from_frame(log_of() if log is None else log)
    make = {
        "leave-one-out": leave_one_out,
        "global-temporal": lambda log, items: global_temporal(log, items, valid_share=0.2, test_share=0.2),
    }
    rng = np.random.default_rng(seed)
    flat = rng.choice(int(np.prod(SIZES)), size=len(table), replace=False)
    codes = np.stack(np.unravel_index(flat, SIZES), axis=1)
    tokenizer = train_tokenizer(["a customer took this title number, 3 days later"], 300)
    catalog = add_catalog_tokens(tokenizer, Catalog(table.frame.to_dicts(), codes, SIZES))
    values = {"templates": {}, "max_history": 3, "max_text_tokens": 40} | changes
    return TaskData(make[protocol](interactions, table), catalog, tokenizer, prompt, **values)


def cases_of(targets, histories=None, later=None, prompts=None):
    """Cases by their targets, for what looks at little else."""
    count = len(targets)
    return RolloutCases(
        prompts if prompts is not None else [[1]] * count,
        [np.array(one, dtype=np.int64) for one in histories or [[]] * count],
        np.array(targets, dtype=np.int64),
        [np.array(one, dtype=np.int64) for one in later or [[target] for target in targets]],
        np.arange(count),
    )
