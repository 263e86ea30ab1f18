"""Catalog: items, their semantic IDs, and the token ids that spell them."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

from llmrec.catalog_files import (
    CATALOG_FILE,
    CODES_FILE,
    ITEMS_FILE,
    TOKEN_IDS,
    codes_in,
    item_lines,
    read_items,
    read_object,
    read_tensors,
    spelling_in,
    token_ids_in,
)
from llmrec.exceptions import CatalogError, UnknownItemError
from llmrec.storage import atomic_path, write_json
from llmrec.title_spelling import TitleSpelling, packed, stacked
from llmrec.trie import CatalogTrie

Softmax = Literal["vocabulary", "semantic_ids"]
CATALOG_FOLDER = "catalog"  # of an artefact


class Catalog:
    """Item <-> semantic ID <-> token ids.

    In text mode an item's "semantic ID" is its title in the backbone's own tokens, see `llmrec.title_spelling`: the
    rows of `codes` are ragged, and filled up with 0, "nothing", whose token id is -1.

    A sequence model knows items by their rows alone (`of_rows`): there is one level, an item's code is its row, and so
    is its "token".

    Attributes:
        items: N mappings with at least "item_id" and "title"; the place in this list is the item's *row*.
        codes: (N, L) int32, unique rows; in text mode L is the length of the longest item.
        codebook_sizes: K_l of every level; codes of level l are below it.
        token_ids: per level a (K_l,) int64 array of the tokenizer's id for each code, or None before a tokenizer is
            known. Ids are kept rather than strings, so that nothing depends on a token's place in a string.
        retired: (N,) bool, items that are not recommended any more. They keep their rows and codes: histories may name
            them, and no other item takes their code.
        base_items: how many items its base had (`CatalogVersions`), which have the first rows; without versions, N.
        version: its name among the versions of a living catalog (`CatalogVersions`); without one, its content hash.
        spelling: how titles are spelt in text mode, which gives the codebook sizes and the token ids; else None.
        features: of the m items behind the base's what a sequence model makes their vectors of: "vectors" (m, E) or
            "codes" (m, L), or nothing.
        is_rows: whether items are known by their rows alone, which give codes, codebook sizes and token ids.
    """

    def __init__(
        self,
        items: Sequence[Mapping[str, Any]],
        codes: npt.NDArray[np.integer] | None,
        codebook_sizes: Sequence[int] = (),
        token_ids: Sequence[npt.NDArray[np.integer]] | None = None,
        retired: npt.NDArray[np.bool_] | None = None,
        version: str | None = None,
        spelling: TitleSpelling | None = None,
    ) -> None:
        self.items = list(items)
        self.spelling = spelling
        self.is_rows = codes is None
        if codes is None:
            token_ids = [np.arange(len(self.items))]
            codebook_sizes, codes = [len(self.items)], token_ids[0][:, None]
        self.codes: npt.NDArray[np.int32] = np.ascontiguousarray(codes, dtype=np.int32)
        if spelling is not None:
            spelling.check(self.codes)
            longest = int((self.codes > 0).sum(axis=1).max(initial=0))
            self.codes = np.ascontiguousarray(self.codes[:, :longest])
            codebook_sizes = [spelling.vocabulary_size + 1] * longest
            token_ids = [spelling.token_ids] * longest
        self.codebook_sizes = tuple(int(size) for size in codebook_sizes)
        if self.codes.ndim != 2 or self.codes.shape != (len(self.items), len(self.codebook_sizes)):
            raise CatalogError(
                f"{len(self.items)} items with {len(self.codebook_sizes)} levels need codes of that shape, not "
                f"{self.codes.shape}. Build the semantic IDs from the same item table."
            )
        if len(self.items) and (self.codes.min() < 0 or (self.codes.max(axis=0) >= self.codebook_sizes).any()):
            raise CatalogError(
                f"Codes reach {self.codes.max(axis=0).tolist()}, codebooks have {list(self.codebook_sizes)} entries. "
                "Build the semantic IDs again."
            )
        self._version = version
        self.base_items = len(self.items)
        self.features: Mapping[str, npt.NDArray[Any]] = {}
        try:
            self._rows = {str(item["item_id"]): row for row, item in enumerate(self.items)}
        except KeyError as error:
            row = next(row for row, item in enumerate(self.items) if "item_id" not in item)
            raise CatalogError(f"The item of row {row} has no item_id. Give every item one.") from error
        if len(self._rows) != len(self.items):
            raise CatalogError(f"{len(self.items) - len(self._rows)} item id(s) repeat. Keep one row per item.")
        self.token_ids: tuple[npt.NDArray[np.int64], ...] | None = None
        if token_ids is not None:
            self.token_ids = tuple(np.asarray(level, dtype=np.int64) for level in token_ids)
            if [len(level) for level in self.token_ids] != list(self.codebook_sizes):
                raise CatalogError(
                    f"Token ids come in levels of {[len(level) for level in self.token_ids]}, codebooks have "
                    f"{list(self.codebook_sizes)} entries. Add the catalog's tokens to the tokenizer again."
                )

        self.retired: npt.NDArray[np.bool_] = np.zeros(len(self.items), dtype=bool)
        if retired is not None:
            if np.shape(retired) != (len(self.items),):
                raise CatalogError(
                    f"{len(self.items)} items have retirement marks of shape {np.shape(retired)}. Give one per item."
                )
            self.retired |= np.asarray(retired, dtype=bool)

    @classmethod
    def of_rows(cls, items: Sequence[Mapping[str, Any]], retired: npt.NDArray[np.bool_] | None = None) -> Self:
        """A catalog whose items are known by their rows alone, as a sequence model's are.

        >>> Catalog.of_rows([{"item_id": "a"}, {"item_id": "b"}]).codes.tolist()
        [[0], [1]]
        """
        return cls(items, None, retired=retired)

    def __len__(self) -> int:
        return len(self.items)

    @property
    def num_levels(self) -> int:
        """The tokens of an item; in text mode, of the longest."""
        return len(self.codebook_sizes)

    @property
    def is_text(self) -> bool:
        """Whether items are spelt as their titles."""
        return self.spelling is not None

    @cached_property
    def ids(self) -> list[str]:
        """Item ids by row."""
        return [str(item["item_id"]) for item in self.items]

    @cached_property
    def trie(self) -> CatalogTrie:
        """The trie of the live items' codes; raises CatalogError if two items share one, or none is live."""
        return CatalogTrie(self.codes, ~self.retired)

    @cached_property
    def content_hash(self) -> str:
        """A hash of what can be recommended and how it is spelt: item ids, codes, codebook sizes, who is retired."""
        digest = hashlib.sha256(json.dumps([self.ids, list(self.codebook_sizes)]).encode())
        digest.update(np.ascontiguousarray(self.codes, dtype="<i4").tobytes())
        if self.retired.any():  # else as it was before there was retirement
            digest.update(np.packbits(self.retired).tobytes())
        return digest.hexdigest()[:16]

    @property
    def version(self) -> str:
        """The name that it has among versions; without one, its content hash."""
        return self._version or self.content_hash

    @version.setter
    def version(self, name: str) -> None:
        self._version = name

    def candidates(self, excluded: Sequence[int] | npt.NDArray[np.integer] = ()) -> int:
        """How many items can be recommended when some rows (repeats allowed) are excluded.

        >>> two = Catalog([{"item_id": "a"}, {"item_id": "b"}], np.array([[0], [1]]), [2])
        >>> two.candidates(), two.candidates([1, 1]), two.with_retired([1], True).candidates([1])
        (2, 1, 1)
        """
        rows = np.unique(np.asarray(excluded, dtype=np.int64))
        return self.num_live - int((~self.retired[rows]).sum())

    @cached_property
    def num_live(self) -> int:
        """How many items are not retired."""
        return len(self) - int(self.retired.sum())

    @cached_property
    def item_tokens(self) -> npt.NDArray[np.int64]:
        """(N, L) the token ids of every item's semantic ID; -1 behind the end of a shorter title in text mode."""
        levels = self.require_tokens()
        return np.stack([ids[self.codes[:, level]] for level, ids in enumerate(levels)], axis=1)

    def tokens_of(self, row: int) -> list[int]:
        """The token ids that spell one item; raises CatalogError if there are none yet."""
        return self.tokens_of_rows([row])

    def tokens_of_rows(self, rows: Sequence[int] | npt.NDArray[np.integer]) -> list[int]:
        """The token ids that spell several items, one behind the other, in the order of `rows`.

        >>> two = Catalog([{"item_id": "a"}, {"item_id": "b"}], np.array([[0, 1], [1, 0]]), [2, 2])
        >>> two.with_tokens([np.array([7, 8]), np.array([3, 4])]).tokens_of_rows([1, 0, 1])
        [8, 3, 7, 4, 8, 3]
        """
        tokens = self.item_tokens[np.asarray(rows, dtype=np.int64)].reshape(-1)
        spelt: list[int] = tokens[tokens >= 0].tolist() if self.is_text else tokens.tolist()
        return spelt

    def softmax_tokens(self, kind: Softmax) -> npt.NDArray[np.int64] | None:
        """The ascending token ids over which a model's probabilities are normalised; None for the whole vocabulary.

        Raises:
            CatalogError: for an unknown kind, or "semantic_ids" in text mode, where items have no tokens of their own.
        """
        if kind == "vocabulary":
            return None
        if kind != "semantic_ids" or self.is_text:
            spelt = "titles" if self.is_text else "semantic IDs"
            raise CatalogError(
                f"There is no softmax range {kind!r} for items spelt as {spelt}. "
                "Use 'vocabulary', or 'semantic_ids' with items that have semantic IDs."
            )
        return np.unique(np.concatenate(self.require_tokens()))

    def require_tokens(self) -> tuple[npt.NDArray[np.int64], ...]:
        """The token ids per level; raises CatalogError if no tokenizer has been extended for this catalog yet."""
        if self.token_ids is None:
            raise CatalogError("The catalog has no token ids yet. Extend a tokenizer with its tokens first.")
        return self.token_ids

    def title(self, row: int) -> str:
        return str(self.items[row].get("title") or self.ids[row])

    def row(self, item_id: str) -> int:
        """The row of one item; raises UnknownItemError."""
        return self.rows([item_id])[0]

    def rows(self, item_ids: Sequence[str], ignore_unknown: bool = False) -> list[int]:
        """The rows of items, in the order given; raises UnknownItemError that names all unknown ones."""
        if not ignore_unknown and (unknown := [str(i) for i in item_ids if str(i) not in self._rows]):
            raise UnknownItemError(unknown)
        return [self._rows[str(i)] for i in item_ids if str(i) in self._rows]

    def with_tokens(self, token_ids: Sequence[npt.NDArray[np.integer]]) -> "Catalog":
        """The same catalog, spelt with a tokenizer's ids: per level a (K_l,) array.

        Raises:
            CatalogError: in text mode, where the titles' tokens are given already.
        """
        self._require_semantic_ids("be given token ids")
        return Catalog(self.items, self.codes, self.codebook_sizes, token_ids, self.retired)

    def with_items(self, items: Sequence[Mapping[str, Any]], codes: npt.NDArray[np.integer]) -> "Catalog":
        """New items (M) with their codes (M, L) in rows after all others, which stay as they are.

        In text mode codes may have any number of levels (`title_spelling.spell_new_items`).

        Raises:
            CatalogError: if an id is in the catalog already, a code is given to another item, or is outside its
                codebook.
        """
        if known := [str(item["item_id"]) for item in items if str(item.get("item_id")) in self._rows]:
            raise CatalogError(
                f"{len(known)} item(s) are in the catalog already, {known[0]!r} first. Add only new ones; "
                "bring retired ones back with restore."
            )
        found = np.asarray(codes)
        levels = found.shape[1] if self.is_text and found.ndim == 2 else self.num_levels
        if found.dtype.kind not in "iu" or found.shape != (len(items), levels):
            raise CatalogError(
                f"{len(items)} new items were given codes of {found.dtype} in the shape {found.shape}. "
                f"Give whole numbers, ({len(items)}, {self.num_levels})."
            )
        if self.is_rows and not np.array_equal(found[:, 0], len(self) + np.arange(len(items))):
            raise CatalogError(
                f"New items of rows from {len(self)} on were given the codes {found[:3, 0].tolist()}, …. "
                "Give each its row."
            )
        bounded = found.size and not (self.is_text or self.is_rows)
        if bounded and (found.min() < 0 or (found.max(axis=0) >= self.codebook_sizes).any()):
            raise CatalogError(
                f"New codes reach from {found.min()} to {found.max(axis=0).tolist()}, codebooks have "
                f"{list(self.codebook_sizes)} entries. Assign codes from this catalog's codebooks."
            )
        retired = np.concatenate([self.retired, np.zeros(len(items), dtype=bool)])
        grown = self.respelt([*self.items, *items], [self.codes, found], retired)
        CatalogTrie(grown.codes)  # refuses a code that two items share, retired ones among them
        return grown

    def with_retired(self, rows: Sequence[int], retired: bool) -> "Catalog":
        """The same items, those of `rows` retired or live again; raises CatalogError if none would be live."""
        marks = self.retired.copy()
        marks[list(rows)] = retired
        if marks.all():
            raise CatalogError(f"All {len(self)} items would be retired. Keep at least one to recommend.")
        return self.respelt(self.items, [self.codes], marks)

    def respelt(
        self,
        items: Sequence[Mapping[str, Any]],
        codes: Sequence[npt.NDArray[np.integer]],
        retired: npt.NDArray[np.bool_],
        version: str | None = None,
    ) -> "Catalog":
        """Other items, with codes in tables below one another, in the same codebooks and tokens as this catalog."""
        if self.is_rows:
            made = Catalog(items, None, retired=retired, version=version)
        else:
            whole = stacked(codes) if self.is_text else np.concatenate(codes)
            made = Catalog(items, whole, self.codebook_sizes, self.token_ids, retired, version, self.spelling)
        if len(made) == len(self):
            made.base_items, made.features = self.base_items, self.features
        return made

    def token_strings(self) -> list[list[str]]:
        """Per level, the K_l strings that spell its codes, such as `<s0_17>`.

        Raises:
            CatalogError: in text mode, where items have no tokens of their own.
        """
        self._require_semantic_ids("name tokens of its own")
        return [[f"<s{level}_{code}>" for code in range(size)] for level, size in enumerate(self.codebook_sizes)]

    def _require_semantic_ids(self, what: str) -> None:
        if self.is_text or self.is_rows:
            spelt = "known by their rows" if self.is_rows else "spelt as their titles"
            raise CatalogError(
                f"Items are {spelt}, so the catalog cannot {what}. Train on it as it is: the tokenizer needs no new "
                "tokens."
            )

    @classmethod
    def from_build(cls, folder: str | Path) -> Self:
        """Reads what `semantic_ids/build.py` wrote: codes, items and codebook sizes, without token ids."""
        folder = Path(folder)
        if not (folder / "semantic_ids.json").is_file():
            raise CatalogError(f"{folder} holds no semantic_ids.json. Run semantic_ids/build.py with --out {folder}.")
        described = read_object(folder / "semantic_ids.json", "codebook_sizes")
        tensors = read_tensors(folder / CODES_FILE)
        return cls(read_items(folder / ITEMS_FILE), codes_in(tensors), described["codebook_sizes"])

    def save(self, folder: str | Path) -> None:
        """Writes items.jsonl, codes.safetensors and catalog.json; each file whole or not at all."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_path(folder / ITEMS_FILE) as temporary:
            temporary.write_bytes(item_lines(self.items))
        tensors = self.code_tensors()
        if not (self.is_text or self.is_rows):
            tensors |= {f"{TOKEN_IDS}{level}": ids for level, ids in enumerate(self.token_ids or ())}
        if self.retired.any():
            tensors["retired"] = self.retired
        with atomic_path(folder / CODES_FILE) as temporary:
            save_file(tensors, temporary)
        described: dict[str, Any] = {"version": self.content_hash, "items": len(self)}
        if self.spelling is not None:
            described["titles"] = asdict(self.spelling)
        else:
            described["codebook_sizes"] = list(self.codebook_sizes)
        if self.is_rows:
            described["rows"] = True
        write_json(folder / CATALOG_FILE, described)

    def code_tensors(self, first: int = 0) -> dict[str, npt.NDArray[Any]]:
        """The codes from row `first` on as `codes_in` reads them; those of text mode without what fills them up."""
        if not self.is_text:
            return {"codes": np.ascontiguousarray(self.codes[first:])}
        codes, lengths = packed(self.codes[first:])
        return {"codes": codes, "lengths": lengths}

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Reads what `save` wrote; raises CatalogError if files are missing or belong to different catalogs."""
        folder = Path(folder)
        missing = [name for name in (ITEMS_FILE, CODES_FILE, CATALOG_FILE) if not (folder / name).is_file()]
        if missing:
            raise CatalogError(f"{folder} lacks {', '.join(missing)}. Point to the catalog folder of an artefact.")
        described = read_object(folder / CATALOG_FILE, "version")
        spelling = spelling_in(described, folder / CATALOG_FILE)
        tensors = read_tensors(folder / CODES_FILE)
        items, sizes = read_items(folder / ITEMS_FILE), described.get("codebook_sizes", ())
        levels = token_ids_in(tensors) or None
        if described.get("rows"):
            catalog = cls.of_rows(items, tensors.get("retired"))
        else:
            catalog = cls(items, codes_in(tensors), sizes, levels, tensors.get("retired"), spelling=spelling)
        if catalog.content_hash != described["version"]:
            raise CatalogError(
                f"The catalog in {folder} has version {catalog.content_hash}, its catalog.json says "
                f"{described['version']}. Its files come from different catalogs: restore the folder."
            )
        return catalog
