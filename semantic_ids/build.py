"""Builds semantic IDs: item embeddings -> a quantizer's codes -> one unique code per item.

With --interactions a collaborative embedding of the training part of the split joins the text: the items'
co-occurrence, or a SASRec's item table; validation and test items have no part in it. --fusion chooses how: both
beside each other, or LETTER's contrastive alignment, for which the codes come from the text alone and an RQ-VAE is
taught to put items together that users put together. --quantizer chooses how vectors become codes; residual k-means
is the default.

Examples:
    python semantic_ids/build.py --embeddings run/embeddings --items items.jsonl.gz \\
        --interactions interactions.csv.gz --out run/semantic_ids
    python semantic_ids/build.py --embeddings run/embeddings --items items.jsonl.gz --out run/ids  # text alone
    python semantic_ids/build.py --config semantic_ids/recipes/rkmeans_3x256.yaml --embeddings run/embeddings \\
        --items items.jsonl.gz --interactions interactions.csv.gz --out run/semantic_ids --codebook-size 128
    python semantic_ids/build.py --config semantic_ids/recipes/rqvae_3x256.yaml --embeddings run/embeddings \\
        --items items.jsonl.gz --interactions interactions.csv.gz --out run/rqvae
    accelerate launch --num_processes 4 semantic_ids/build.py --quantizer rqvae --embeddings run/embeddings \\
        --items items.parquet --out run/rqvae
    python semantic_ids/build.py --config semantic_ids/recipes/letter_4x256.yaml --embeddings run/embeddings \\
        --items items.jsonl.gz --interactions interactions.csv.gz --out run/letter
"""

import logging
import math
import os
import shutil
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from llmrec.data.arguments import ColumnArguments, SplitArguments
from llmrec.exceptions import DataError
from llmrec.flags import check_ranges, check_read
from llmrec.script import parser, run

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from rich.console import Console
    from trl import TrlParser

    from llmrec.embedding.sources import Source
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
    quantizer: Literal["rkmeans", "rqvae", "rvq", "pq", "opq", "fsq", "hash", "titles"] = field(
        default="rkmeans",
        metadata={
            "help": "rkmeans: residual k-means; rqvae: residual-quantised autoencoder; rvq: residual codebooks learnt "
            "together; pq, opq: (rotated) product quantisation; fsq: finite scalar; hash: the control; titles: the "
            "rarest n-grams of the titles, no vectors and no interactions"
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
    ngram: int = field(default=1, metadata={"help": "titles: words of an n-gram"})
    epochs: int | None = field(
        default=None, metadata={"help": "rqvae: passes over the items; default: by their number"}
    )
    estimator: Literal["straight-through", "rotation"] = field(
        default="straight-through", metadata={"help": "rqvae: how the gradient passes the quantiser"}
    )
    pca_dim: int | None = field(
        default=None, metadata={"help": "principal components of the text embedding that are kept; default: all"}
    )
    whitening: float | None = field(
        default=None,
        metadata={"help": "evens out the text's components: 0 not, 1 fully; default: 0 with --pca_dim, 0.5 if fused"},
    )
    collaborative: Literal["cooccurrence", "sasrec"] = field(
        default="cooccurrence",
        metadata={"help": "what training histories say of items: SVD of co-occurrences, or a SASRec's item table"},
    )
    collaborative_embeddings: str | None = field(
        default=None, metadata={"help": "own collaborative vectors instead, in a folder as embed.py writes it"}
    )
    fusion: Literal["concat", "letter"] = field(
        default="concat",
        metadata={
            "help": "concat: text and collaborative block side by side; letter: rqvae learns from text alone, "
            "drawn to the collaborative embedding by a contrastive loss"
        },
    )
    alignment: float = field(default=0.02, metadata={"help": "letter: weight of the contrastive loss"})
    diversity: float = field(default=0.0001, metadata={"help": "letter: weight of the codes' diversity loss"})
    collaborative_weight: float = field(
        default=0.5, metadata={"help": "concat: the collaborative share of the distances, 0 (text alone) to 1"}
    )
    collaborative_dim: int = field(default=64, metadata={"help": "width of the collaborative embedding"})
    window: int = field(
        default=5, metadata={"help": "cooccurrence: largest distance of two items that count as co-occurring"}
    )
    sasrec_epochs: int = field(default=30, metadata={"help": "sasrec: passes over the training histories"})
    collisions: Literal["auto", "reassign", "append", "sinkhorn"] = field(
        default="auto",
        metadata={
            "help": "reassign: move items to free last codes; append: one more code; auto: reassign if it fits; "
            "sinkhorn: LC-Rec's uniform mapping of the last codes, then auto"
        },
    )
    seed: int = field(default=0, metadata={"help": "seed of k-means and of the decomposition"})


# Who reads a flag; given where nobody does, it is refused.
QUANTIZER, FUSION, SOURCE = "--quantizer", "--fusion", "--interactions with --collaborative"
VECTORS = ("rkmeans", "rqvae", "rvq", "pq", "opq", "fsq", "hash")
READERS = {
    **dict.fromkeys(("pca_dim", "whitening", "collaborative_embeddings", "collisions"), (QUANTIZER, VECTORS)),
    "codebook_size": (QUANTIZER, ("rkmeans", "rqvae", "rvq", "pq", "opq", "hash", "titles")),
    "niter": (QUANTIZER, ("rkmeans", "rvq", "pq", "opq")),
    **dict.fromkeys(("normalise_residuals", "balanced"), (QUANTIZER, ("rkmeans",))),
    **dict.fromkeys(("epochs", "estimator"), (QUANTIZER, ("rqvae",))),
    **{name: (QUANTIZER, (reader,)) for name, reader in (("beam", "rvq"), ("fsq_levels", "fsq"), ("ngram", "titles"))},
    **dict.fromkeys(("alignment", "diversity"), (FUSION, ("letter",))),
    "collaborative_weight": (FUSION, ("concat",)),
    **dict.fromkeys(("collaborative", "collaborative_dim"), (SOURCE, ("cooccurrence", "sasrec"))),
    **{"window": (SOURCE, ("cooccurrence",)), "sasrec_epochs": (SOURCE, ("sasrec",))},
}
COUNTS = ("num_levels", "codebook_size", "niter", "beam", "ngram", "epochs", "pca_dim", "collaborative_dim", "window")
RANGES = {
    **dict.fromkeys((*COUNTS, "sasrec_epochs", "fsq_levels"), (1, math.inf)),
    **dict.fromkeys(("alignment", "diversity", "seed"), (0, math.inf)),
    **dict.fromkeys(("whitening", "collaborative_weight"), (0, 1)),
}


def source_of(arguments: BuildArguments) -> "Source | None":
    """Where the flags would take collaborative vectors from, whatever their weight."""
    if arguments.quantizer == "titles":
        return None
    return "own" if arguments.collaborative_embeddings else arguments.collaborative if arguments.interactions else None


def check(arguments: BuildArguments) -> None:
    """Raises DataError for numbers out of range, and for flags that this build would not read."""
    flags, defaults, source = asdict(arguments), asdict(BuildArguments("", "")), source_of(arguments)
    check_ranges(flags, RANGES)
    if arguments.fusion == "letter" and (arguments.quantizer != "rqvae" or source is None):
        raise DataError(
            f"--fusion letter came with --quantizer {arguments.quantizer} and collaborative vectors: {bool(source)}. "
            "It aligns an RQ-VAE with what users do: give --quantizer rqvae and a log, or use concat."
        )
    check_read(flags, defaults, READERS, {QUANTIZER: arguments.quantizer, FUSION: arguments.fusion, SOURCE: source})
    if source is None and arguments.collaborative_weight not in (0, defaults["collaborative_weight"]):
        raise DataError(
            f"--collaborative-weight {arguments.collaborative_weight} has nothing to weigh. Give --interactions or "
            "--collaborative-embeddings and a quantizer of vectors, or leave it out."
        )


def main(arguments: BuildArguments, names: ColumnArguments, splits: SplitArguments) -> None:
    import faiss
    import numpy as np
    import polars as pl
    from rich.console import Console
    from safetensors.numpy import save_file

    from llmrec import __version__
    from llmrec.catalog import Catalog
    from llmrec.catalog_versions import refuse_to_replace
    from llmrec.data import ITEM, Items
    from llmrec.embedding import EmbeddingStore, Fusion, VectorBlocks, Whitening
    from llmrec.embedding.columns import FOLDER as BLOCKS_FOLDER
    from llmrec.embedding.sources import collaborative_vectors
    from llmrec.embedding.store import EMBEDDINGS_FILE
    from llmrec.item_tokenizer import CODEBOOKS_FOLDER, FUSION_FOLDER, RECORD_FILE, WHITENING_FOLDER
    from llmrec.quantization import resolve_collisions
    from llmrec.quantization.titles import TitleCodes, resolve_titles
    from llmrec.storage import atomic_folder, sha256_of, write_json

    # Under `accelerate launch` an RQ-VAE is fitted by all processes; the rest, and all words, are the first one's.
    first = os.environ.get("RANK", "0") == "0"
    console = Console(stderr=True, quiet=not first)
    begun = time.monotonic()
    logging.getLogger("llmrec").setLevel(logging.INFO if first else logging.WARNING)
    check(arguments)
    refuse_to_replace(arguments.out)
    store = EmbeddingStore.load(arguments.embeddings)
    if arguments.items:
        items = names.read_items(arguments.items)
    else:
        items = Items.from_frame(pl.DataFrame({ITEM: store.item_ids}))
    interactions = names.read_interactions(arguments.interactions) if arguments.interactions else None
    if interactions is not None:
        items = items.with_missing(interactions)
    vectors: npt.NDArray[np.floating] = store.rows(items.ids)
    whitening, fusion, split, signals = None, None, None, None
    if arguments.pca_dim is not None or arguments.whitening is not None:
        whitening = Whitening.fit(vectors, arguments.pca_dim, arguments.whitening or 0.0)
        vectors = whitening.transform(vectors)
        console.print(f"{vectors.shape[1]} principal components, {whitening.explained:.1%} of the text's variance")
    source = source_of(arguments) if arguments.collaborative_weight > 0 or arguments.fusion == "letter" else None
    if source:
        split = splits.make(interactions, items) if interactions is not None else None
        signals = collaborative_vectors(
            source,
            items.ids,
            split.train if split else None,
            folder=arguments.collaborative_embeddings,
            dim=arguments.collaborative_dim,
            window=arguments.window,
            epochs=arguments.sasrec_epochs,
            seed=arguments.seed,
            progress=first,
        )
    source = None if signals is None else source
    if signals is not None and arguments.fusion == "concat":
        # What was whitened as asked is not evened out once more.
        fusion = Fusion.fit(vectors, signals, arguments.collaborative_weight, whitened=whitening is not None)
        vectors, signals = fusion.transform(vectors, signals), None

    size = arguments.fsq_levels if arguments.quantizer == "fsq" else arguments.codebook_size
    console.print(f"{arguments.quantizer}, {arguments.num_levels} × {size}", markup=False)
    if not first and arguments.quantizer != "rqvae":
        return
    quantizer: Quantizer | TitleCodes
    if arguments.quantizer == "titles":
        quantizer = TitleCodes(arguments.num_levels, arguments.codebook_size, ngram=arguments.ngram).fit(items.titles)
        resolved = resolve_titles(quantizer.encode(items.titles), quantizer.codebook_sizes)
    else:
        quantizer, codes = quantised(arguments, vectors, items.ids, signals)
        if not first:
            return
        resolved = resolve_collisions(codes, vectors, quantizer, arguments.collisions)

    origin = {**store.origin, "sha256": sha256_of(Path(arguments.embeddings) / EMBEDDINGS_FILE)}
    if (Path(arguments.embeddings) / BLOCKS_FOLDER).is_dir():
        origin["blocks_sha256"] = VectorBlocks.from_pretrained(Path(arguments.embeddings) / BLOCKS_FOLDER).sha256
    described = {
        "codebook_sizes": list(resolved.codebook_sizes),
        "collisions": resolved.report.to_dict(),
        "quantizer": arguments.quantizer,
        "collaborative": source,
        "fusion": arguments.fusion if source else None,
        "split": split.content_hash if split else None,
        "protocol": dict(split.protocol) if split else None,
        "embeddings": origin,
        "arguments": asdict(arguments),
        # Which catalog the tokenizer belongs to, for assign.py.
        "catalog": Catalog([{ITEM: item} for item in items.ids], resolved.codes, resolved.codebook_sizes).content_hash,
        "versions": {"llmrec": __version__, "faiss": faiss.__version__, "numpy": np.__version__},
    }
    with atomic_folder(arguments.out) as folder:
        save_file({"codes": resolved.codes}, folder / "codes.safetensors")
        items.frame.write_ndjson(folder / "items.jsonl")
        quantizer.save(folder / CODEBOOKS_FOLDER)
        if whitening:
            whitening.save(folder / WHITENING_FOLDER)
        if fusion:
            fusion.save(folder / FUSION_FOLDER)
        write_json(folder / RECORD_FILE, described)
    print_summary(console, resolved.report)
    console.print(f"{arguments.out}: {time.monotonic() - begun:.0f} s", markup=False)


def quantised(
    arguments: BuildArguments,
    vectors: "npt.NDArray[np.floating]",
    item_ids: list[str],
    signals: "npt.NDArray[np.floating] | None" = None,
) -> tuple["Quantizer", "npt.NDArray[np.int32]"]:
    """The fitted quantizer and the items' codes (N, L), collisions and all; `signals` are what LETTER aligns with."""
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
        learnt: dict[str, Any] = {"estimator": arguments.estimator, "epochs": arguments.epochs, "seed": seed}
        if signals is not None:
            learnt |= {"alignment": arguments.alignment, "diversity": arguments.diversity}
            # The diversity loss moves codes by its gradient.
            learnt |= {"update": "gradient"} if arguments.diversity else {}
        network = RQVAE(levels, size, **learnt)
        network.fit(vectors, collaborative=signals, checkpoints=checkpoints, progress=True)
        if os.environ.get("RANK", "0") == "0":
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
