"""Sixty items in a ring, users who walk along it: a model that learns anything beats chance by far."""

import json

import numpy as np
import polars as pl
from safetensors.numpy import save_file

NUM_ITEMS = 60


def write_ring(folder, users):
    """Interactions in `log.csv`, and the items with their semantic IDs in `ids`."""
    rng = np.random.default_rng(0)
    rows = [
        (f"user-{user}", f"item-{(start + step) % NUM_ITEMS}", step)
        for user, start in enumerate(rng.integers(0, NUM_ITEMS, users))
        for step in range(int(rng.integers(4, 9)))
    ]
    pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row").write_csv(folder / "log.csv")
    ids = folder / "ids"
    ids.mkdir()
    codes = np.stack(np.unravel_index(np.arange(NUM_ITEMS), (4, 4, 4)), axis=1).astype(np.int32)
    save_file({"codes": codes}, ids / "codes.safetensors")
    (ids / "semantic_ids.json").write_text(json.dumps({"codebook_sizes": [4, 4, 4]}))
    items = [json.dumps({"item_id": f"item-{row}", "title": f"Item number {row}"}) for row in range(NUM_ITEMS)]
    (ids / "items.jsonl").write_text("\n".join(items) + "\n")
    return folder
