"""Looks a tokenizer over before a model is trained on it: is it healthy, and if not, what is to be done?

--ids takes whatever holds semantic IDs: an artefact's folder or Hub id, a folder that build.py wrote, a catalog's
folder, or a JSON file of items and their tokens. Without --interactions it says what codes and titles alone tell.

Examples:
    python semantic_ids/report.py --ids run/semantic_ids
    python semantic_ids/report.py --ids run/semantic_ids --interactions interactions.csv.gz \\
        --embeddings run/embeddings --json report.json --html report.html
    python semantic_ids/report.py --ids user/recommender --interactions interactions.csv.gz
    python semantic_ids/report.py --ids tokens.json.gz --items items.jsonl.gz --interactions interactions.csv.gz \\
        --against run/semantic_ids other_tokens.json.gz --html report.html
"""

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmrec.data.arguments import ColumnArguments, SplitArguments
from llmrec.script import parser, run

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from rich.console import Console
    from rich.table import Table
    from trl import TrlParser

    from llmrec.data import Items, Split
    from llmrec.diagnostics.identifiers import SemanticIDs


@dataclass
class ReportArguments:
    ids: str = field(
        metadata={"help": "artefact (folder or Hub id), folder of build.py, catalog, or JSON of items and tokens"}
    )
    json: str | None = field(default=None, metadata={"help": "file for the whole report as JSON"})
    html: str | None = field(default=None, metadata={"help": "file for the report as a page"})
    interactions: str | None = field(
        default=None, metadata={"help": "log of interactions: what sells together, what is asked for in the test"}
    )
    items: str | None = field(
        default=None, metadata={"help": "table of items, for titles; default: those that come with the IDs"}
    )
    embeddings: str | None = field(
        default=None, metadata={"help": "folder that semantic_ids/embed.py wrote: like texts, and reconstruction"}
    )
    against: list[str] | None = field(
        default=None, metadata={"help": "other semantic IDs to compare with, each as --ids takes them"}
    )
    seed: int = field(default=0, metadata={"help": "seed of samples"})


def main(arguments: ReportArguments, names: ColumnArguments, splits: SplitArguments) -> None:
    from rich.console import Console

    from llmrec.diagnostics.identifiers import SemanticIDs
    from llmrec.diagnostics.report import report
    from llmrec.diagnostics.report_page import page
    from llmrec.embedding import EmbeddingStore
    from llmrec.exceptions import DataError
    from llmrec.storage import write_json

    if arguments.seed < 0:
        raise DataError(f"--seed is {arguments.seed}, but a seed is not negative. Give 0 or more.")
    for flag, file in (("--json", arguments.json), ("--html", arguments.html)):
        if file:
            check_writable(flag, file)
    console = Console(stderr=True)
    ids = SemanticIDs.read(arguments.ids)
    others = [(name, SemanticIDs.read(name)) for name in arguments.against or ()]
    items = table_of(ids, arguments.items, names)
    ids = ids.with_titles(dict(zip(items.ids, items.titles, strict=True)))
    split = None
    if arguments.interactions:
        interactions = names.read_interactions(arguments.interactions)
        split = splits.make(interactions, items.with_missing(interactions))

    texts, vectors, quantizer = None, None, None
    skipped: dict[str, str] = {}
    if arguments.embeddings:
        store = EmbeddingStore.load(arguments.embeddings)
        texts = store.rows(ids.item_ids)
        if ids.folder is not None:
            reason = why_not_restored(ids, arguments.embeddings, split)
            if reason is None:
                quantizer, vectors = ids.quantizer(), restored(ids, texts, split)
            else:
                skipped["reconstruction"] = reason

    with console.status("reading", spinner="dots") as status:
        found = report(
            ids,
            split=split,
            texts=texts,
            vectors=vectors,
            quantizer=quantizer,
            others=others,
            skipped=skipped,
            seed=arguments.seed,
            progress=status.update,
        )
    if arguments.json:
        write_json(arguments.json, found)
    if arguments.html:
        page(found, f"Semantic IDs of {Path(arguments.ids).name}").write(arguments.html)
    show(console, found)
    for file in (arguments.json, arguments.html):
        if file:
            console.print(file, markup=False, highlight=False, soft_wrap=True)


def check_writable(flag: str, file: str) -> None:
    """Raises DataError if no file can be written there: before the work, not after it. Makes no folder."""
    from llmrec.exceptions import DataError

    try:
        if Path(file).is_dir():
            raise DataError(f"{flag} {file} is a folder. Give the path of a file, such as {Path(file) / 'report'}.")
        folder = next(folder for folder in Path(file).absolute().parents if folder.exists())
        # Tried, because permissions alone do not say it of a file system that is read only.
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise DataError(f"{flag} {file} cannot be written ({error.strerror}). Give a place that can.") from error


def table_of(ids: "SemanticIDs", path: str | None, names: ColumnArguments) -> "Items":
    """The table of items that was asked for; else what came with the IDs, in their order, as a build split it."""
    import polars as pl

    from llmrec.data import ITEM, Items
    from llmrec.data.columns import TITLE

    if path is not None:
        return names.read_items(path)
    return Items.from_frame(pl.DataFrame({ITEM: ids.item_ids, TITLE: ids.titles}))


def why_not_restored(ids: "SemanticIDs", embeddings: str, split: "Split | None") -> str | None:
    """Why what was quantised cannot be made again from these embeddings and this split; None if it can."""
    from llmrec.embedding.store import EMBEDDINGS_FILE
    from llmrec.storage import sha256_of

    assert ids.folder is not None
    if ids.origin.get("quantizer") == "titles":
        return "These codes are n-grams of titles: they stand for no vectors. Nothing is missing."
    described = ids.origin.get("embeddings")
    wanted = described.get("sha256") if isinstance(described, dict) else None
    if wanted is not None and wanted != sha256_of(Path(embeddings) / EMBEDDINGS_FILE):
        return (
            f"The embeddings in {embeddings} are not those that these codes were made from, so how well the codes "
            "keep them is not said. Give the folder that build.py was given."
        )
    if not (ids.folder / "fusion").is_dir():
        return None  # from the text alone; so are LETTER's codes, which the log only draws together
    if _signal(ids) != "cooccurrence":
        return (
            "What these codes know of the log did not come from its co-occurrence (but from a SASRec, or vectors of "
            "the user's own), and is not made again here. Read the error that build.py measured: "
            "collisions.distortion_before in semantic_ids.json."
        )
    if split is None:
        return (
            "These codes were made from text and co-occurrence, so how well they keep them is not said from text "
            "alone. Give the --interactions that build.py was given."
        )
    if split.content_hash != ids.origin.get("split"):
        return (
            f"These codes were built on the split {str(ids.origin.get('split'))[:12]}, and this is "
            f"{split.content_hash[:12]}, so how well they keep its co-occurrence is not said. Give the interactions, "
            "items and split flags that build.py was given."
        )
    return None


def _signal(ids: "SemanticIDs") -> str | None:
    """Where the collaborative block came from, as the record says; of a record before it did, as the arguments say."""
    if "collaborative" in ids.origin:
        signal: str | None = ids.origin["collaborative"]
        return signal
    built = ids.origin.get("arguments", {})
    return "own" if built.get("collaborative_embeddings") else built.get("collaborative", "cooccurrence")


def restored(
    ids: "SemanticIDs", texts: "npt.NDArray[np.floating]", split: "Split | None"
) -> "npt.NDArray[np.floating]":
    """What build.py quantised: the texts, whitened if it did so, and joined with co-occurrence as it joined them."""
    from llmrec.embedding import Fusion, cooccurrence_embeddings
    from llmrec.embedding.whitening import Whitening

    assert ids.folder is not None
    if (ids.folder / "whitening").is_dir():
        texts = Whitening.from_pretrained(ids.folder / "whitening").transform(texts)
    if not (ids.folder / "fusion").is_dir():
        return texts
    assert split is not None
    built = ids.origin["arguments"]
    collaborative = cooccurrence_embeddings(
        split.train, split.num_items, built["collaborative_dim"], built["window"], built["seed"]
    )
    return Fusion.from_pretrained(ids.folder / "fusion").transform(texts, collaborative)


def show(console: "Console", found: dict[str, Any]) -> None:
    """The headline figures and the verdict; texts of items and paths are printed as they are."""
    from rich.table import Table
    from rich.text import Text

    sharing = f"{found['sharing_rate']:.1%} share an ID"
    table = Table("level", "codes", "used", "perplexity", "bits told", "items alone", title_justify="left")
    table.title = f"{found['items']:,} items, {found['levels']} codes each, {sharing}"
    for usage, tree in zip(found["usage"], found["branching"], strict=True):
        table.add_row(
            str(usage["level"]),
            f"{usage['codebook_size']:,}",
            f"{usage['used']:,} ({usage['used_share']:.0%})",
            f"{usage['perplexity']:,.1f}",
            f"{tree['conditional_entropy_bits']:.2f}",
            f"{tree['alone_share']:.1%}",
        )
    console.print(table)
    styles = {"warning": "bold yellow", "note": "blue", "ok": "green"}
    for finding in found["verdict"]:
        console.print(Text.assemble((f"{finding['level']} ", styles[finding["level"]]), finding["sentence"]))
    if found["others"]:
        console.print(beside(found["others"]))


def beside(others: list[dict[str, Any]]) -> "Table":
    """Other tokenizers and, under each, these IDs on the items that both have."""
    from rich.table import Table
    from rich.text import Text

    table = Table(caption="alike: neighbours with the same first code", caption_justify="left")
    table.add_column("tokenizer", no_wrap=True)
    for name in ("items", "share an ID", "dead codes", "alike", "by chance"):
        table.add_column(name)
    for other in others:
        for name, figures in ((other["name"], other["other"]), ("these", other["these"])):
            if figures is None:
                table.add_row(Text(name), "none in common")
                break
            purity, lift = figures["neighbour_purity"], figures["neighbour_lift"]
            table.add_row(
                Text(Path(name).name or name),
                f"{figures['items']:,}",
                f"{figures['sharing_rate']:.1%}",
                f"{sum(figures['dead_codes']):,}",
                "" if purity is None else f"{purity:.1%}",
                f"{purity / lift:.1%}" if purity and lift else "",
            )
    return table


def make_parser() -> "TrlParser":
    return parser((ReportArguments, ColumnArguments, SplitArguments), __doc__)


if __name__ == "__main__":
    run(main, make_parser())
