"""Builds semantic IDs: item embeddings -> residual k-means -> one unique code per item.

With --interactions the co-occurrence of items in the training part of a leave-one-out split joins the text; validation
and test items have no part in it.

Examples:
    python semantic_ids/build.py --embeddings run/embeddings --items items.jsonl.gz \\
        --interactions interactions.csv.gz --out run/semantic_ids
    python semantic_ids/build.py --embeddings run/embeddings --items items.jsonl.gz --out run/ids  # text alone
    python semantic_ids/build.py --config semantic_ids/recipes/rkmeans_3x256.yaml --embeddings run/embeddings \\
        --items items.jsonl.gz --interactions interactions.csv.gz --out run/semantic_ids --codebook-size 128
"""

import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from llmrec.data.arguments import ColumnArguments, SplitArguments
from llmrec.script import parser, run

if TYPE_CHECKING:
    from rich.console import Console
    from trl import TrlParser

    from llmrec.quantization import CollisionReport


@dataclass
class BuildArguments:
    embeddings: str = field(metadata={"help": "folder that semantic_ids/embed.py wrote"})
    out: str = field(metadata={"help": "folder to write"})
    items: str | None = field(
        default=None, metadata={"help": "table of items, whose columns go into the catalog; default: ids alone"}
    )
    interactions: str | None = field(
        default=None, metadata={"help": "log of interactions, for the collaborative part; default: text alone"}
    )
    num_levels: int = field(default=3, metadata={"help": "codes per item"})
    codebook_size: int = field(default=256, metadata={"help": "codes to choose from per level"})
    niter: int = field(default=25, metadata={"help": "k-means iterations per level"})
    collaborative_weight: float = field(
        default=0.5, metadata={"help": "share of co-occurrence in the distances, 0 (text alone) to 1"}
    )
    collaborative_dim: int = field(default=64, metadata={"help": "width of the co-occurrence embedding"})
    window: int = field(default=5, metadata={"help": "largest distance of two items that count as co-occurring"})
    collisions: Literal["auto", "reassign", "append"] = field(
        default="auto",
        metadata={"help": "reassign: move items to free last codes; append: one more code; auto: reassign if it fits"},
    )
    seed: int = field(default=0, metadata={"help": "seed of k-means and of the decomposition"})


def main(arguments: BuildArguments, names: ColumnArguments, splits: SplitArguments) -> None:
    import faiss
    import numpy as np
    import polars as pl
    from rich.console import Console
    from safetensors.numpy import save_file

    from llmrec import __version__
    from llmrec.data import ITEM, Items
    from llmrec.embedding import EmbeddingStore, Fusion, cooccurrence_embeddings
    from llmrec.embedding.store import EMBEDDINGS_FILE
    from llmrec.quantization import ResidualKMeans, resolve_collisions
    from llmrec.storage import atomic_folder, sha256_of, write_json

    console = Console(stderr=True)
    begun = time.monotonic()
    store = EmbeddingStore.load(arguments.embeddings)
    if arguments.items:
        items = names.read_items(arguments.items)
    else:
        items = Items.from_frame(pl.DataFrame({ITEM: store.item_ids}))
    interactions = names.read_interactions(arguments.interactions) if arguments.interactions else None
    if interactions is not None:
        items = items.with_missing(interactions)
    vectors = store.rows(items.ids)

    fusion, split = None, None
    if interactions is not None and arguments.collaborative_weight > 0:
        split = splits.make(interactions, items)
        console.print(f"Co-occurrence in the training histories of {len(split.train):,} users")
        collaborative = cooccurrence_embeddings(
            split.train, len(items), arguments.collaborative_dim, arguments.window, arguments.seed
        )
        unseen = int((~collaborative.any(axis=1)).sum())
        if unseen == len(items):
            console.print("No two items co-occur in the training histories: all are placed by their text alone")
        else:
            if unseen:
                console.print(f"{unseen:,} items co-occur with no other and are placed by their text alone")
            fusion = Fusion.fit(vectors, collaborative, arguments.collaborative_weight)
            vectors = fusion.transform(vectors, collaborative)

    console.print(f"Residual k-means, {arguments.num_levels} × {arguments.codebook_size}")
    quantizer = ResidualKMeans(arguments.num_levels, arguments.codebook_size, arguments.niter, arguments.seed)
    codes = quantizer.fit(vectors).encode(vectors)
    resolved = resolve_collisions(codes, vectors, quantizer, arguments.collisions)

    described = {
        "codebook_sizes": list(resolved.codebook_sizes),
        "collisions": resolved.report.to_dict(),
        "quantizer": "residual_kmeans",
        "split": split.content_hash if split else None,
        "protocol": dict(split.protocol) if split else None,
        "embeddings": {**store.origin, "sha256": sha256_of(Path(arguments.embeddings) / EMBEDDINGS_FILE)},
        "arguments": asdict(arguments),
        "versions": {"llmrec": __version__, "faiss": faiss.__version__, "numpy": np.__version__},
    }
    with atomic_folder(arguments.out) as folder:
        save_file({"codes": resolved.codes}, folder / "codes.safetensors")
        items.frame.write_ndjson(folder / "items.jsonl")
        quantizer.save(folder / "codebooks")
        if fusion:
            fusion.save(folder / "fusion")
        write_json(folder / "semantic_ids.json", described)
    print_summary(console, resolved.report)
    console.print(f"{arguments.out}: {time.monotonic() - begun:.0f} s", markup=False)


def print_summary(console: "Console", report: "CollisionReport") -> None:
    from rich.table import Table

    table = Table("level", "codes", "used", title=f"{report.items:,} items, {report.tokens_per_item} codes each")
    for level, (size, used) in enumerate(zip(report.codebook_sizes, report.used_codes, strict=True)):
        table.add_row(str(level), f"{size:,}", f"{used:,}")
    console.print(table)
    console.print(
        f"{report.sharing_items:,} items ({report.sharing_rate:.1%}) shared a code as quantised, "
        f"{report.collision_rate:.1%} beyond unique codes; the largest group had {report.largest_group:,}."
    )
    if report.policy == "reassign":
        console.print(
            f"Reassigned {report.moved_items:,} items to free last codes, which added "
            f"{report.added_distortion / max(report.distortion_before, 1e-12):.2%} to the mean squared error."
        )
    elif report.policy == "append":
        console.print(f"Appended a level of {report.codebook_sizes[-1]:,} codes to every item.")
    console.print("Every item has a code of its own.")


def make_parser() -> "TrlParser":
    return parser((BuildArguments, ColumnArguments, SplitArguments), __doc__)


if __name__ == "__main__":
    run(main, make_parser())
