"""SemanticIDs: a tokenizer's result to be looked at, wherever it comes from. Collisions are allowed here."""

import gzip
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError

from llmrec.artefact import MANIFEST, resolve
from llmrec.catalog import CATALOG_FOLDER, Catalog
from llmrec.catalog_files import CATALOG_FILE
from llmrec.catalog_versions import CatalogVersions
from llmrec.exceptions import ArtefactError, DataError, LLMRecError
from llmrec.item_tokenizer import RECORD_FILE as BUILD_FILE
from llmrec.item_tokenizer import TOKENIZER_FOLDER, read_quantizer
from llmrec.quantization.quantizer import Quantizer

Kind = Literal["artefact", "build", "catalog", "mapping"]

SETTINGS_FILE = "llmrec.json"
# Numbers that span more than this are no places in a codebook that anyone trains, but ids of some other kind.
MOST_CODES = 1 << 20

# Matched from the end, backwards: looked for from the start, it takes quadratic time on many digits.
_NUMBER = re.compile(r"[^0-9]*([0-9]+)")


@dataclass(frozen=True)
class SemanticIDs:
    """Items and their codes, and what is known of how they were made.

    Attributes:
        item_ids: N item ids, unique; the place in this list is the item's row.
        codes: (N, L) int32; two items may share a code.
        codebook_sizes: K_l of every level.
        titles: N titles; an item's id where there is none. Half characters, which are no text, become "?".
        kind: where they were read from: "artefact", "build", "catalog" or "mapping".
        source: the path or Hub id, as given.
        codebook_sizes_known: False if the sizes were inferred from the codes that occur.
        quantised_levels: the levels that a quantizer gave, without an appended digit; by default all.
        origin: "quantizer", "collisions", "split", "protocol", "embeddings", "arguments", as far as the build's record
            is there, and "collaborative", which is None where the record says that there is no such signal.
        folder: of the build, or of an artefact's copy of it, with `codebooks/` and perhaps `fusion/` and `whitening/`;
            None elsewhere.
    """

    item_ids: list[str] = field(repr=False)
    codes: npt.NDArray[np.int32] = field(repr=False)
    codebook_sizes: tuple[int, ...]
    titles: list[str] = field(repr=False)
    kind: Kind = "mapping"
    source: str = ""
    codebook_sizes_known: bool = True
    quantised_levels: int = -1
    origin: Mapping[str, Any] = field(default_factory=dict, repr=False)
    folder: Path | None = None

    def __post_init__(self) -> None:
        """Raises DataError if there are no items, an id is no text, or ids, codes, sizes and titles do not fit."""
        codes = np.ascontiguousarray(self.codes, dtype=np.int32)
        object.__setattr__(self, "codes", codes)
        count = len(self.item_ids)
        if not count or codes.ndim != 2 or codes.shape != (count, len(self.codebook_sizes)) or not codes.shape[1]:
            raise DataError(
                f"{count} item(s) and {len(self.codebook_sizes)} level(s) do not belong to codes of shape "
                f"{codes.shape}. Give at least one item, and one code for each of its levels."
            )
        if len(self.titles) != count or len(set(self.item_ids)) != count:
            raise DataError(
                f"{count} item ids, {len(set(self.item_ids))} of them different, do not belong to "
                f"{len(self.titles)} titles. Give every item once, with one title."
            )
        for item in self.item_ids:
            if not _is_text(item):
                raise DataError(
                    f"The item id {_short(item)} holds half of a character (a lone surrogate), which is no text. "
                    "Write the ids again as whole characters, in UTF-8."
                )
        titles = [title if _is_text(title) else title.encode("utf-8", "replace").decode() for title in self.titles]
        object.__setattr__(self, "titles", titles)
        if codes.min() < 0 or (codes.max(axis=0) >= self.codebook_sizes).any():
            raise DataError(
                f"Codes reach from {codes.min(axis=0).tolist()} to {codes.max(axis=0).tolist()}, the codebooks have "
                f"{list(self.codebook_sizes)} entries. Build the semantic IDs again."
            )
        if self.quantised_levels == -1:
            object.__setattr__(self, "quantised_levels", codes.shape[1])
        if not 1 <= self.quantised_levels <= codes.shape[1]:
            raise DataError(
                f"{self.quantised_levels} of {codes.shape[1]} levels cannot be a quantizer's. Give 1 to "
                f"{codes.shape[1]}."
            )

    def __len__(self) -> int:
        return len(self.item_ids)

    @property
    def num_levels(self) -> int:
        """L, an appended digit included."""
        return len(self.codebook_sizes)

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Reads semantic IDs from any place where they are kept.

        Args:
            path: an artefact's folder or Hub id; a folder that semantic_ids/build.py wrote; a catalog's folder; or a
                JSON file, gzipped or not, that maps every item to its list of tokens (see `from_mapping`).

        Raises:
            ArtefactError: there is no such folder, or it is not whole.
            DataError: the JSON file cannot be read or holds something else, or what was read does not fit together.
            CatalogError: a catalog's files do not belong to each other.
        """
        place = Path(path).expanduser()
        if place.is_file():
            return cls.from_mapping(_read_json(place), str(path))
        if not place.is_dir() and place.name.endswith((".json", ".json.gz")):
            raise DataError(f"There is no file {path}. Give the path of a JSON file that maps items to tokens.")
        if (place / BUILD_FILE).is_file():
            return cls._from_build(place, str(path))
        if (place / CATALOG_FILE).is_file():
            catalog = _whole(place, CatalogVersions(place).load)
            return cls._from_catalog(catalog, kind="catalog", source=str(path))
        if place.is_dir() and not (place / MANIFEST).is_file():
            raise ArtefactError(
                f"{path} holds neither {BUILD_FILE} nor {CATALOG_FILE} nor an artefact's {MANIFEST}. Give an "
                "artefact, a folder that semantic_ids/build.py wrote, a catalog's folder or a JSON file of tokens."
            )
        return cls._from_artefact(resolve(path), str(path))

    @classmethod
    def from_mapping(cls, tokens: Mapping[str, Sequence[str | int]], source: str = "the mapping") -> Self:
        """Codes from every item's list of tokens, strings such as "<a_12>" or integers; sizes are inferred.

        A level whose tokens all are numbers or hold one (the last in them), no two different tokens the same, has
        these numbers as codes and the largest + 1 as its size; numbers that begin far from 0 (beyond their own span)
        are counted from the smallest, and those that span 2^20 or more by their order. Tokens of other levels are
        numbered by first appearance.

        Raises:
            DataError: naming the item whose tokens are no list of strings or whole numbers, or of another length.

        >>> ids = SemanticIDs.from_mapping({"x": ["<a_2>", "red"], "y": ["<a_0>", "blue"], "z": ["<a_2>", "red"]})
        >>> ids.codes.tolist(), ids.codebook_sizes, ids.codebook_sizes_known
        ([[2, 0], [0, 1], [2, 0]], (3, 2), False)
        """
        if not isinstance(tokens, Mapping) or not tokens:
            what = "no items" if isinstance(tokens, Mapping) else f"a {type(tokens).__name__} in place of an object"
            raise DataError(f"{source} holds {what}. Give an object of item ids, each with its list of tokens.")
        first, levels = "", 0
        for item, sequence in tokens.items():
            if not isinstance(sequence, list | tuple) or not sequence:
                raise DataError(
                    f"Item {_short(item)} of {source} has {_short(sequence)} in place of a list of tokens. "
                    "Give every item its tokens, such as ['<a_12>', '<b_3>']."
                )
            for token in sequence:
                if not isinstance(token, str | int) or isinstance(token, bool):
                    raise DataError(
                        f"Item {_short(item)} of {source} has the token {_short(token)}. "
                        "Give strings or whole numbers as tokens."
                    )
            first, levels = (first, levels) if levels else (item, len(sequence))
            if len(sequence) != levels:
                raise DataError(
                    f"Item {_short(item)} of {source} has {len(sequence)} token(s), item {_short(first)} has "
                    f"{levels}. Give all items as many; pad shorter IDs with a token of their own."
                )
        columns = [_numbered([sequence[level] for sequence in tokens.values()]) for level in range(levels)]
        names = [str(item) for item in tokens]
        return cls(
            item_ids=names,
            codes=np.stack([codes for codes, _ in columns], axis=1),
            codebook_sizes=tuple(size for _, size in columns),
            titles=names,
            source=source,
            codebook_sizes_known=False,
        )

    def with_titles(self, titles: Mapping[str, str]) -> Self:
        """The same IDs with the titles that are known here; the other items keep theirs."""
        pairs = zip(self.item_ids, self.titles, strict=True)
        return replace(self, titles=[titles.get(item, title) for item, title in pairs])

    def rows_of(self, item_ids: Sequence[str]) -> npt.NDArray[np.int64]:
        """(len,) the row of each item, -1 for one that has no semantic ID here."""
        known = {item: row for row, item in enumerate(self.item_ids)}
        return np.array([known.get(item, -1) for item in item_ids], dtype=np.int64)

    def quantizer(self) -> Quantizer | None:
        """The fitted quantizer of a build's folder; None where there is none.

        Raises:
            ArtefactError: if its files are torn, or of a kind that decodes no vectors.
        """
        if self.folder is None or not (self.folder / "codebooks").is_dir():
            return None
        return read_quantizer(self.folder / "codebooks")

    @classmethod
    def _from_catalog(cls, catalog: Catalog, **facts: Any) -> Self:
        """The items that are not retired; raises DataError for a catalog in text mode."""
        if catalog.is_text:
            raise DataError(
                f"The {len(catalog)} items are spelt as their titles, and this report is about semantic IDs. "
                "Give an artefact, or a built folder, whose items have some."
            )
        live = np.flatnonzero(~catalog.retired).tolist()
        titles = [catalog.title(row) for row in live]
        return cls([catalog.ids[row] for row in live], catalog.codes[live], catalog.codebook_sizes, titles, **facts)

    @classmethod
    def _from_build(cls, folder: Path, source: str) -> Self:
        catalog = _whole(folder, CatalogVersions(folder).load)
        origin = _origin(_read_record(folder / BUILD_FILE))
        levels = _quantised_levels(catalog.num_levels, origin)
        return cls._from_catalog(
            catalog, kind="build", source=source, quantised_levels=levels, origin=origin, folder=folder
        )

    @classmethod
    def _from_artefact(cls, folder: Path, source: str) -> Self:
        catalog = _whole(folder, CatalogVersions(folder / CATALOG_FOLDER).load)
        settings = _read_record(folder / SETTINGS_FILE)
        training = settings.get("training")
        built = training.get("semantic_ids") if isinstance(training, dict) else None
        origin = dict(built) if isinstance(built, dict) else {}
        if settings.get("split"):
            origin["split"] = settings["split"]
        own = folder / TOKENIZER_FOLDER
        if (own / BUILD_FILE).is_file():
            origin |= _origin(_read_record(own / BUILD_FILE))
        levels = _quantised_levels(catalog.num_levels, origin)
        return cls._from_catalog(
            catalog,
            kind="artefact",
            source=source,
            quantised_levels=levels,
            origin=origin,
            folder=own if own.is_dir() else None,
        )


def _origin(record: Mapping[str, Any]) -> dict[str, Any]:
    kept = ("quantizer", "collisions", "split", "protocol", "embeddings", "arguments")
    found = {name: record[name] for name in kept if record.get(name) is not None}
    # Here null is told apart from nothing: it says that the codes come from the text alone.
    return found | {name: record[name] for name in ("collaborative",) if name in record}


def _quantised_levels(levels: int, origin: Mapping[str, Any]) -> int:
    """The levels without an appended digit: a build tells it, an artefact only the policy that was taken."""
    collisions = origin.get("collisions")
    if isinstance(collisions, Mapping):
        appended = "append" in (collisions.get("policy"), collisions.get("second_step"))
    elif collisions == "sinkhorn":
        arguments = origin.get("arguments")
        asked = arguments.get("num_levels") if isinstance(arguments, Mapping) else None
        appended = isinstance(asked, int) and asked == levels - 1
    else:
        appended = collisions == "append"
    return levels - 1 if appended and levels > 1 else levels


def _numbered(tokens: list[str | int]) -> tuple[npt.NDArray[np.int32], int]:
    """One level's codes (N,) and its codebook's size, as `SemanticIDs.from_mapping` says."""
    distinct = list(dict.fromkeys(tokens))
    numbers = [_number(token) for token in distinct]
    known = [number for number in numbers if number is not None]
    size = len(distinct)
    if len(set(known)) < size:
        codes = {token: place for place, token in enumerate(distinct)}
    elif max(known) - min(known) >= MOST_CODES:
        order = {number: place for place, number in enumerate(sorted(known))}
        codes = {token: order[number] for token, number in zip(distinct, known, strict=True)}
    else:
        low, high = min(known), max(known)
        start = low if low < 0 or low > high - low + 1 else 0
        codes = {token: number - start for token, number in zip(distinct, known, strict=True)}
        size = high - start + 1
    return np.array([codes[token] for token in tokens], dtype=np.int32), size


def _number(token: str | int) -> int | None:
    if isinstance(token, int):
        return token
    found = _NUMBER.match(token[::-1])
    # Python refuses to read numbers of thousands of digits, and none is a code.
    return int(found[1][::-1]) if found and len(found[1]) <= 18 else None


def _whole(folder: Path, load: Callable[[], Catalog]) -> Catalog:
    """What `load` returns; a torn or missing file becomes an ArtefactError."""
    try:
        return load()
    except LLMRecError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise ArtefactError(
            f"The semantic IDs in {folder} cannot be read ({type(error).__name__}: {error}). "
            "Restore the folder, or build them again."
        ) from error


def _read_record(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(record, dict):
            raise ValueError(f"it holds a {type(record).__name__} in place of an object")
    except (OSError, ValueError, RecursionError) as error:
        raise ArtefactError(f"{path} cannot be read ({error}). Restore the folder, or make it again.") from error
    return record


def _read_json(path: Path) -> Any:
    try:
        content = path.read_bytes()
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
        return json.loads(content.decode("utf-8"), object_pairs_hook=_object)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    except (OSError, EOFError, ValueError, RecursionError, zlib.error) as error:
        raise DataError(
            f"{path} is no whole JSON file ({type(error).__name__}: {error}). "
            "Copy or write it again; it maps items to lists of tokens."
        ) from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise DataError(f"Item {_short(twice)} stands there twice. Keep one list of tokens for every item.")
    return found


def _is_text(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:80] + "…"
