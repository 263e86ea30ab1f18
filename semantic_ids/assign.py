"""Gives new items semantic IDs: codes from the frozen codebooks, none of which another item has; no old item changes.

The items join the catalog of an artefact, or of a folder that semantic_ids/build.py wrote, as a new version beside
those before it; `llmrec ids log` shows them and `llmrec ids rollback` goes back. Their texts are embedded with the
model that embedded the catalog's, unless --embeddings holds them already. Where a catalog spells its items as titles,
the artefact's own tokenizer spells the new ones, and nothing is embedded. Items that the catalog has are left alone.

Examples:
    python semantic_ids/assign.py --catalog run/artefact --items new_items.jsonl
    python semantic_ids/assign.py --catalog run/semantic_ids --items new.parquet --embeddings run/new_embeddings
    python semantic_ids/assign.py --catalog run/artefact --items new.csv --title-column name --dry-run
"""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmrec.data.arguments import ColumnArguments
from llmrec.exceptions import ArtefactError, DataError, RecipeError
from llmrec.script import parser, run

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from rich.console import Console
    from trl import TrlParser

    from llmrec.catalog import Catalog
    from llmrec.catalog_versions import CatalogVersions
    from llmrec.data import Items
    from llmrec.item_tokenizer import ItemTokenizer
    from llmrec.quantization.assignment import AssignmentReport

# What of an embedding's origin says how texts are encoded.
ENCODING = ("max_tokens", "normalize", "prompt", "prompt_name", "dtype")


@dataclass
class AssignArguments:
    catalog: str = field(metadata={"help": "artefact folder, or folder that semantic_ids/build.py wrote"})
    items: str = field(metadata={"help": "table of the new items; those that the catalog has are left alone"})
    embeddings: str | None = field(
        default=None, metadata={"help": "folder that semantic_ids/embed.py wrote for them; default: embed them now"}
    )
    model: str | None = field(
        default=None,
        metadata={"help": "where the embedding model lies, if elsewhere than it did; its weights are compared"},
    )
    tokenizer: str | None = field(
        default=None, metadata={"help": "folder with the codebooks; default: the artefact's or the build's own"}
    )
    batch_size: int = field(default=32, metadata={"help": "texts per forward pass"})
    device: str | None = field(default=None, metadata={"help": "cpu, cuda, …; default: the best there is"})
    note: str = field(default="", metadata={"help": "for the log of versions"})
    dry_run: bool = field(default=False, metadata={"help": "say what would be done, and change nothing"})
    json: str | None = field(default=None, metadata={"help": "write the result here too"})


def main(arguments: AssignArguments, names: ColumnArguments) -> None:
    from rich.console import Console

    from llmrec.catalog_files import CATALOG_FILE
    from llmrec.catalog_versions import CatalogVersions
    from llmrec.storage import write_json

    console = Console(stderr=True)
    folder = Path(arguments.catalog)
    versions = CatalogVersions.inside(folder)
    titles = (versions.folder / CATALOG_FILE).is_file() and versions.base.is_text
    tokenizer = None if titles else _item_tokenizer(arguments, folder, versions)
    items = names.read_items(arguments.items)
    begun = time.monotonic()
    catalog = versions.load()
    loaded = time.monotonic() - begun
    there = set(catalog.ids)
    places = [place for place, item in enumerate(items.ids) if item not in there]
    known = len(items.ids) - len(places)
    if known:
        console.print(f"{known:,} items are in the catalog already and stay as they are.")
    # As build.py writes them: dates become text, and what is no number null. Texts may hold any separator but a line
    # feed, which JSON escapes.
    rows = [json.loads(line) for line in items.frame[places].write_ndjson().split("\n") if line] if places else []
    new_ids = [items.ids[place] for place in places]
    result: dict[str, Any] = {"parent": catalog.version, "version": catalog.version, "items": len(catalog)}
    result |= {"live": catalog.num_live, "known": known, "added": 0, "dry_run": arguments.dry_run}
    if new_ids:
        report = None
        if tokenizer is None:
            begun = time.monotonic()
            codes = _spelt(arguments, folder, rows, catalog)
        else:
            vectors = _embedded(arguments, tokenizer, items, new_ids, console)
            begun = time.monotonic()
            assignment = tokenizer.assign(new_ids, vectors, catalog)
            _show(console, assignment.report)
            codes, report = assignment.codes, assignment.report.to_dict()
        version = "nothing was changed"
        if not arguments.dry_run:
            version = versions.add(rows, codes, arguments.note, catalog.version)
            result |= {"version": version, "items": len(catalog) + len(rows), "live": catalog.num_live + len(rows)}
        seconds = loaded + time.monotonic() - begun
        result |= {"added": len(rows), "assignment": report, "seconds": round(seconds, 3)}
        result |= {"codes": dict(zip(new_ids, codes.tolist(), strict=True))}
        console.print(f"{result['items']:,} items, version {version}: {seconds:.1f} s beside embedding")
    else:
        console.print("There is no new item: nothing was changed.")
    if arguments.json:
        write_json(arguments.json, result)


def _item_tokenizer(arguments: AssignArguments, folder: Path, versions: "CatalogVersions") -> "ItemTokenizer":
    """What gives new items of this catalog their codes."""
    from llmrec.item_tokenizer import RECORD_FILE, TOKENIZER_FOLDER, ItemTokenizer

    # An artefact keeps its tokenizer in a folder of its own; a built folder is one.
    own = folder / TOKENIZER_FOLDER if (folder / TOKENIZER_FOLDER).is_dir() else folder
    if arguments.tokenizer is None and not (own / RECORD_FILE).is_file():
        raise ArtefactError(
            f"{folder} does not carry the codebooks that its codes come from. "
            "Name the folder that semantic_ids/build.py wrote with --tokenizer."
        )
    tokenizer = ItemTokenizer.load(arguments.tokenizer or own)
    made_for = tokenizer.record.get("catalog")
    if made_for is not None and made_for != versions.base.content_hash:
        raise ArtefactError(
            f"The tokenizer's codes are of the catalog {made_for}, and {folder} began as "
            f"{versions.base.content_hash}. Name the build that this catalog comes from with --tokenizer."
        )
    return tokenizer


def _spelt(
    arguments: AssignArguments, folder: Path, rows: list[dict[str, Any]], catalog: "Catalog"
) -> "npt.NDArray[np.int32]":
    """The new items' codes (M, L) where the catalog's are their titles."""
    from transformers import AutoTokenizer

    from llmrec.title_spelling import spell_new_items

    if arguments.tokenizer or arguments.embeddings:
        raise RecipeError(
            f"The items of {folder} are spelt as their titles, by the artefact's own tokenizer. "
            "Leave --tokenizer and --embeddings out."
        )
    if not (folder / "tokenizer_config.json").is_file():
        raise ArtefactError(
            f"{folder} has no tokenizer to spell titles with. Name the artefact's folder, not its catalog's."
        )
    return spell_new_items(rows, AutoTokenizer.from_pretrained(folder), catalog)


def _embedded(
    arguments: AssignArguments,
    tokenizer: "ItemTokenizer",
    items: "Items",
    new_ids: list[str],
    console: "Console",
) -> "npt.NDArray[np.float32]":
    """The new items' text embeddings (M, D), made as the catalog's were."""
    from llmrec.embedding import EmbeddingStore, encode_texts, resolve_model

    origin = tokenizer.record.get("embeddings", {})
    if arguments.embeddings:
        store = EmbeddingStore.load(arguments.embeddings)
        for name in _alike(origin):
            if store.origin.get(name) != origin.get(name):
                raise DataError(
                    f"The embeddings' {name} is {store.origin.get(name)!r}, the catalog's {origin.get(name)!r}. "
                    "Embed the new items as the catalog was embedded."
                )
        if origin.get("model") == "vector columns" and store.origin.get("like_sha256") != origin.get("blocks_sha256"):
            raise DataError(
                f"The vector columns in {arguments.embeddings} were not scaled like the catalog's. "
                "Embed the new items with --like and the folder that the catalog was built from."
            )
        return store.rows(new_ids)
    name = origin.get("model")
    if name is None or name == "static":
        raise DataError(
            f"The catalog's texts were embedded with {name or 'an unknown model'!r}, which cannot embed new ones: it "
            "is fitted on the catalog itself. Build with a sentence-transformers model, or give --embeddings."
        )
    if name == "vector columns" or "weights_sha256" not in origin:
        raise DataError(
            f"The catalog was built from vectors of the user's own ({name}), which no model gives new items. "
            "Give theirs with --embeddings."
        )
    model = resolve_model(arguments.model or name)
    if model.weights_sha256 != origin.get("weights_sha256"):
        raise ArtefactError(
            f"The weights of {model.name} have sha256 {model.weights_sha256}, the catalog was embedded with "
            f"{origin.get('weights_sha256')}. Use the same revision of the model."
        )
    if items.text_columns is None and origin.get("text_columns") is not None:
        items.text_columns = tuple(origin["text_columns"])
    texts = dict(zip(items.ids, items.texts(), strict=True))
    console.print(f"Embedding {len(new_ids):,} items with {model.name}", markup=False)
    settings = {key: origin[key] for key in ENCODING if key in origin}
    return encode_texts(
        [texts[item] for item in new_ids],
        model,
        batch_size=arguments.batch_size,
        device=arguments.device,
        progress=True,
        **settings,
    )


def _alike(origin: dict[str, Any]) -> list[str]:
    """What of two embeddings' origins has to be the same for vectors to be of one space."""
    if origin.get("model") == "vector columns":
        return ["model", "text"] if origin.get("text") is None else ["model"]
    names = ["model", "weights_sha256", *ENCODING, "text_columns"]
    # A static embedding is fitted on its texts: the same fit has embedded them all.
    return [*names, "text_sha256", "seed"] if origin.get("model") == "static" else names


def _show(console: "Console", report: "AssignmentReport") -> None:
    console.print(
        f"{report.items:,} new items beside {report.taken:,} codes: {report.contested:,} found their code contested, "
        f"{report.moved:,} have another one, {report.spilled:,} of them under another prefix."
    )
    if report.distortion:
        console.print(f"That added {report.added_distortion / report.distortion:.2%} to their mean squared error.")
    if report.full_prefixes:
        console.print(f"{report.full_prefixes:,} prefixes have no free code left: think of building anew.")


def make_parser() -> "TrlParser":
    return parser((AssignArguments, ColumnArguments), __doc__)


if __name__ == "__main__":
    run(main, make_parser())
