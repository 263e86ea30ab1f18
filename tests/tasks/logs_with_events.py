"""Small logs with everything that a task may use, and what the tasks are tested with."""

import numpy as np
import polars as pl

from llmrec.catalog import Catalog
from llmrec.data.interactions import Interactions
from llmrec.data.items import Items
from llmrec.data.protocols import leave_one_out
from llmrec.prompt import Prompt
from llmrec.tasks.task_data import TaskData
from llmrec.tasks.templates import shipped_templates
from llmrec.vocabulary import add_catalog_tokens, train_tokenizer

BEGIN = 1_600_000_000
DAY = 86_400
SIZES = (4, 5, 3)
SERVED = Prompt("{% for item in history %}{{ item.semantic_id }}{% endfor %}")


def log_of(seed=0, users=6, items=12, longest=8, events=True):
    """A random log: (user, item, time, action, domain, rating), with gaps in every column."""
    rng = np.random.default_rng(seed)
    found = []
    for user in range(users):
        time = BEGIN
        for _ in range(int(rng.integers(1, longest + 1))):
            time += int(rng.integers(0, 4)) * DAY
            action = [None, "view", "buy"][rng.integers(3)]
            domain = [None, "books"][rng.integers(2)]
            rating = [None, 1.0, 3.0, 4.0, 5.0][rng.integers(5)]
            found.append((f"u{user}", f"i{rng.integers(items)}", time, action, domain, rating))
    # Someone long enough to be asked, and every column known somewhere in training.
    found += [("u-last", f"i{k}", BEGIN + k * DAY, "view", "books", 5.0 - k) for k in range(5)]
    names = ["user_id", "item_id", "timestamp", "action", "domain", "rating"]
    frame = pl.DataFrame(found, schema=names, orient="row")
    return frame if events else frame.select("user_id", "item_id")


def items_of(number=12):
    """Items of which some have no description, some no attributes."""
    return pl.DataFrame(
        {
            "item_id": [f"i{k}" for k in range(number)],
            "title": [f"Title number {k}" for k in range(number)],
            "description": [None if k % 3 == 0 else f"It is good for {k} things" for k in range(number)],
            "brand": [None if k % 4 == 0 else f"Brand {'xyz'[k % 3]}" for k in range(number)],
            "categories": [None if k % 4 == 0 else f"Home, Tools{k % 2}, Very Long Words" for k in range(number)],
        }
    )


def data_of(log=None, items=None, seed=0, prompt=SERVED, **changes):
    """TaskData with a tokenizer of its own."""
    table = Items.from_frame(items_of() if items is None else items)
    split = leave_one_out(Interactions.from_frame(log_of() if log is None else log), table)
    rng = np.random.default_rng(seed)
    flat = rng.choice(int(np.prod(SIZES)), size=len(table), replace=False)
    codes = np.stack(np.unravel_index(flat, SIZES), axis=1)
    tokenizer = train_tokenizer(["a customer took this item, 3 days later"], 300)
    catalog = add_catalog_tokens(tokenizer, Catalog(table.frame.to_dicts(), codes, SIZES))
    values = {"templates": shipped_templates(), "max_history": 3, "max_text_tokens": 40} | changes
    return TaskData(split=split, catalog=catalog, tokenizer=tokenizer, prompt=prompt, **values)


def answer_of(row):
    """The tokens that carry a label."""
    return [label for label in row["labels"] if label != -100]


def question_of(row):
    """The tokens before the answer."""
    return row["input_ids"][: len(row["input_ids"]) - len(answer_of(row))]
