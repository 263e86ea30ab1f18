"""Builds semantic IDs: item embeddings -> a quantizer's codes -> one unique code per item.

With --interactions the co-occurrence of items in the training part of the split joins the text; validation and test
items have no part in it. --quantizer chooses how vectors become codes; residual k-means is the default.

Examples:
    python semantic_ids/build.py --embeddings run/embeddings --items items.jsonl.gz \\
        --interactions interactions.csv.gz --out run/semantic_ids
    python semantic_ids/build.py --embeddings run/embeddings --items items.jsonl.gz --out run/ids  # text alone
    python semantic_ids/build.py --config semantic_ids/recipes/rkmeans_3x256.yaml --embeddings run/embeddings \\
        --items items.jsonl.gz --interactions interactions.csv.gz --out run/semantic_ids --codebook-size 128
    python semantic_ids/build.py --config semantic_ids/recipes/rqvae_3x256.yaml --embeddings run/embeddings \\
        --items items.jsonl.gz --interactions interactions.csv.gz --out run/rqvae
"""

import shutil
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from llmrec.data.arguments import ColumnArguments, SplitArguments
from llmrec.script import parser, run

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from rich.console import Console
    from trl import TrlParser

    from llmrec.quantization import CollisionReport, Quantizer


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
    quantizer: Literal["rkmeans", "rqvae", "rvq", "pq", "opq", "fsq", "hash"] = field(
        default="rkmeans",
        metadata={
            "help": "rkmeans: residual k-means; rqvae: residual-quantised autoencoder; rvq: residual codebooks learnt "
            "together; pq, opq: (rotated) product quantisation; fsq: finite scalar; hash: the control"
        },
    )
    num_levels: int = field(default=3, metadata={"help": "codes per item"})
    codebook_size: int = field(default=256, metadata={"help": "codes to choose from per level"})
    niter: int = field(default=25, metadata={"help": "k-means iterations per level"})
    normalise_residuals: bool = field(
        default=False, metadata={"help": "rkmeans: layer-normalise what enters a level (GRID)"}
    )
    balanced: bool = field(default=False, metadata={"help": "rkmeans: every code of a level stands for as many items"})
    beam: int = field(default=5, metadata={"help": "rvq: partial sums that are kept when items are encoded"})
    fsq_levels: list[int] = field(
        default_factory=lambda: [8, 8, 8, 6, 5], metadata={"help": "fsq: steps of each dimension of a code"}
    )
    epochs: int | None = field(
        default=None, metadata={"help": "rqvae: passes over the items; default: by their number"}
    )
    estimator: Literal["straight-through", "rotation"] = field(
        default="straight-through", metadata={"help": "rqvae: how the gradient passes the quantiser"}
    )
    collaborative_weight: float = field(
        default=0.5, metadata={"help": "share of co-occurrence in the distances, 0 (text alone) to 1"}
    )
    collaborative_dim: int = field(default=64, metadata={"help": "width of the co-occurrence embedding"})
    window: int = field(default=5, metadata={"help": "largest distance of two items that count as co-occurring"})
    collisions: Literal["auto", "reassign", "append", "sinkhorn"] = field(
        default="auto",
        metadata={
            "help": "reassign: move items to free last codes; append: one more code; auto: reassign if it fits; "
            "sinkhorn: LC-Rec's uniform mapping of the last codes, then auto"
        },
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
    from llmrec.quantization import resolve_collisions
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

    console.print(f"{arguments.quantizer}, {arguments.num_levels} × {arguments.codebook_size}")
    quantizer, codes = quantised(arguments, vectors, items.ids)
    resolved = resolve_collisions(codes, vectors, quantizer, arguments.collisions)

    described = {
        "codebook_sizes": list(resolved.codebook_sizes),
        "collisions": resolved.report.to_dict(),
        "quantizer": arguments.quantizer,
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


def quantised(
    arguments: BuildArguments, vectors: "npt.NDArray[np.floating]", item_ids: list[str]
) -> tuple["Quantizer", "npt.NDArray[np.int32]"]:
    """The fitted quantizer and the items' codes (N, L), collisions and all."""
    from llmrec.quantization.hashed import HashedCodes
    from llmrec.quantization.product import ProductQuantizer
    from llmrec.quantization.residual_kmeans import ResidualKMeans
    from llmrec.quantization.residual_vq import ResidualVQ
    from llmrec.quantization.scalar import ScalarQuantizer

    levels, size, niter, seed = arguments.num_levels, arguments.codebook_size, arguments.niter, arguments.seed
    quantizer: Quantizer
    if arguments.quantizer == "hash":
        control = HashedCodes(levels, size, seed).fit(vectors)
        return control, control.encode_ids(item_ids)
    if arguments.quantizer == "rqvae":
        from llmrec.quantization.rqvae import RQVAE

        # Beside the result, which appears whole or not at all; a run that was killed goes on from here.
        checkpoints = Path(f"{arguments.out.rstrip('/')}.checkpoints")
        network = RQVAE(levels, size, estimator=arguments.estimator, epochs=arguments.epochs, seed=seed)
        network.fit(vectors, checkpoints=checkpoints, progress=True)
        shutil.rmtree(checkpoints, ignore_errors=True)
        return network, network.encode(vectors)
    if arguments.quantizer == "rvq":
        quantizer = ResidualVQ(levels, size, arguments.beam, niter=niter, seed=seed)
    elif arguments.quantizer in ("pq", "opq"):
        quantizer = ProductQuantizer(levels, size, arguments.quantizer == "opq", niter, seed=seed)
    elif arguments.quantizer == "fsq":
        quantizer = ScalarQuantizer(levels, tuple(arguments.fsq_levels), layout="components")
    else:
        quantizer = ResidualKMeans(
            levels, size, niter, seed, normalise_residuals=arguments.normalise_residuals, balanced=arguments.balanced
        )
    return quantizer, quantizer.fit(vectors).encode(vectors)


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
    if report.moved_items:
        console.print(
            f"{report.moved_items:,} items have other last codes now, which added "
            f"{report.added_distortion / max(report.distortion_before, 1e-12):.2%} to the mean squared error."
        )
    if report.policy == "append":
        console.print(f"Appended a level of {report.codebook_sizes[-1]:,} codes to every item.")
    console.print("Every item has a code of its own.")


def make_parser() -> "TrlParser":
    return parser((BuildArguments, ColumnArguments, SplitArguments), __doc__)


if __name__ == "__main__":
    run(main, make_parser())
