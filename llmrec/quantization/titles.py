"""No quantizer at all: a title's own words or character n-grams as the item's code."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Self, get_args

import numpy as np
import numpy.typing as npt
import polars as pl

from llmrec import __version__
from llmrec.exceptions import ArtefactError, TokenizerError
from llmrec.quantization.codebooks import MANIFEST_FILE, check_codes, check_positive
from llmrec.quantization.collisions import CollisionReport, ResolvedCodes
from llmrec.storage import write_json

logger = logging.getLogger(__name__)

Unit = Literal["word", "character"]
Keep = Literal["rarest", "first"]

# Between the parts of an n-gram of words, which hold no spaces themselves.
SPACE = " "


class TitleCodes:
    """Titles <-> codes (N, L) of n-gram ids, so that catalogs, tries and models take titles like semantic IDs.

    A title is normalised (Unicode NFKC, lower case), then cut into words (runs of letters, digits and underscores) or
    characters (runs of anything else between words become one space). Its n-grams are all runs of `ngram` neighbours;
    a title with fewer is one n-gram itself. Of those in the vocabulary, each counted once, L are kept in the title's
    order: the rarest in the catalog, which tell most, or the first. Code 0 stands in the places left over.

    This is not a `Quantizer`: it reads titles where those read embeddings, and `decode` gives text. The rest of the
    protocol is the same, `codebook_sizes` included.

    Titles of one code are told apart by `unique`, as TIGER tells apart items of one semantic ID: one more level, the
    item's rank in row order among those of its code. Items that come later change no digit.

    The vocabulary are the n-grams of most titles, of equals the first in code point order. It has at most N - 1
    n-grams, so that no level has more codes than the catalog has items; a warning says so.

    Plain titles, spelt with the language model's own tokens, do not fit (N, L): their lengths differ, and a level's
    codebook would be the whole vocabulary, given to the model a second time. `llmrec.title_spelling` spells them.

    Attributes:
        num_levels: L.
        codebook_size: codes asked for per level, with code 0.
        unit, ngram: what an n-gram is made of, and how many of them.
        keep: "rarest" or "first".
        vocabulary: the n-grams of codes 1, 2, …; None before `fit`.
    """

    def __init__(
        self,
        num_levels: int = 4,
        codebook_size: int = 4096,
        unit: Unit = "word",
        ngram: int = 1,
        keep: Keep = "rarest",
    ) -> None:
        check_positive(num_levels=num_levels, codebook_size=codebook_size, ngram=ngram)
        for name, value, allowed in (("unit", unit, get_args(Unit)), ("keep", keep, get_args(Keep))):
            if value not in allowed:
                raise TokenizerError(f"There is no {name} {value!r}. Use one of {', '.join(allowed)}.")
        self.num_levels = num_levels
        self.codebook_size = codebook_size
        self.unit: Unit = unit
        self.ngram = ngram
        self.keep: Keep = keep
        self.vocabulary: pl.DataFrame | None = None

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """The n-grams and code 0, for every level; raises TokenizerError before `fit`."""
        return (len(self._fitted()) + 1,) * self.num_levels

    def fit(self, titles: Sequence[str | None]) -> Self:
        """Takes the vocabulary from N titles; raises TokenizerError if there are none."""
        if not len(titles):
            raise TokenizerError("There are no titles to take n-grams from. Give one per item.")
        size = min(self.codebook_size, len(titles))
        if size < self.codebook_size:
            logger.warning("%d items: codebooks have at most %d codes, not %d.", len(titles), size, self.codebook_size)
        self.vocabulary = (
            self._ngrams(titles)
            .group_by("ngram")
            .agg(pl.len().alias("titles"))
            .sort(["titles", "ngram"], descending=[True, False])
            .head(size - 1)
            .with_row_index("code", offset=1)
        )
        return self

    def encode(self, titles: Sequence[str | None]) -> npt.NDArray[np.int32]:
        """Titles (N,) -> (N, L); a missing title, or one without an n-gram of the vocabulary, is all 0.

        Raises:
            TokenizerError: before `fit`.
        """
        vocabulary = self._fitted()
        known = self._ngrams(titles).join(vocabulary, on="ngram", how="inner")
        known = known.sort(["row", "titles", "place"] if self.keep == "rarest" else ["row", "place"])
        known = known.group_by("row", maintain_order=True).head(self.num_levels).sort(["row", "place"])
        known = known.with_columns(pl.int_range(pl.len()).over("row").alias("level"))
        codes = np.zeros((len(titles), self.num_levels), dtype=np.int32)
        codes[known["row"].to_numpy(), known["level"].to_numpy()] = known["code"].to_numpy()
        if empty := int((~codes.any(axis=1)).sum()):
            row = int((~codes.any(axis=1)).argmax())
            logger.warning("%d title(s) have no n-gram of the vocabulary, such as row %d.", empty, row)
        return codes

    def decode(self, codes: npt.NDArray[np.integer]) -> list[str]:
        """(N, L) -> the n-grams of each code, joined by " | "; raises TokenizerError for codes out of range."""
        codes = check_codes(codes, self.codebook_sizes)
        names = np.array(["", *self._fitted()["ngram"].to_list()], dtype=object)
        return [" | ".join(names[row[row > 0]]) for row in codes]

    def save(self, folder: str | Path) -> None:
        """Writes settings and vocabulary to quantizer.json; raises TokenizerError before `fit`."""
        vocabulary = self._fitted()
        settings = ("num_levels", "codebook_size", "unit", "ngram", "keep")
        write_json(
            Path(folder) / MANIFEST_FILE,
            {
                "quantizer": "titles",
                **{name: getattr(self, name) for name in settings},
                "vocabulary": vocabulary["ngram"].to_list(),
                "titles": vocabulary["titles"].to_list(),
                "llmrec_version": __version__,
            },
        )

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Reads what `save` wrote; raises ArtefactError if the file is missing, unreadable or of a quantizer."""
        folder = Path(folder)
        try:
            manifest = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
            if manifest["quantizer"] != "titles":
                raise ValueError(f"its quantizer is {manifest['quantizer']!r}")
            settings = ("num_levels", "codebook_size", "unit", "ngram", "keep")
            codes = cls(**{name: manifest[name] for name in settings})
            columns = {"ngram": manifest["vocabulary"], "titles": manifest["titles"]}
            codes.vocabulary = pl.DataFrame(
                columns, schema={"ngram": pl.String, "titles": pl.UInt32}, strict=True
            ).with_row_index("code", offset=1)
            if codes.vocabulary["ngram"].n_unique() != len(codes.vocabulary):
                raise ValueError("its vocabulary repeats an n-gram")
        except Exception as error:
            raise ArtefactError(
                f"{folder} holds no title n-grams ({error!r}). Point to the codebooks folder of a build."
            ) from error
        return codes

    def _fitted(self) -> pl.DataFrame:
        if self.vocabulary is None:
            raise TokenizerError("There is no vocabulary yet. Call fit, or load one with from_pretrained.")
        return self.vocabulary

    def _ngrams(self, titles: Sequence[str | None]) -> pl.DataFrame:
        """row, place and ngram of every title's n-grams, each at its first place in the title."""
        text = pl.Series("text", titles, dtype=pl.String, strict=False).str.normalize("NFKC").str.to_lowercase()
        if self.unit == "word":
            units, joint = text.str.extract_all(r"\w+"), SPACE
        else:
            units, joint = text.str.replace_all(r"\W+", SPACE).str.strip_chars(SPACE).str.extract_all(r"(?s)."), ""
        frame = pl.DataFrame({"unit": units}).with_row_index("row").explode("unit").drop_nulls()
        frame = frame.with_columns(pl.int_range(pl.len()).over("row").alias("place"), pl.len().over("row").alias("of"))
        # The n-th neighbours are null beyond the title's end; a title shorter than n has one n-gram, all that it is.
        following = [pl.col("unit").shift(-step).over("row").fill_null("") for step in range(self.ngram)]
        spelt = (
            pl.concat_str(following, separator=joint).str.strip_chars_end(joint) if joint else pl.concat_str(following)
        )
        whole = (pl.col("place") + self.ngram <= pl.col("of")) | (pl.col("place") == 0)
        return (
            frame.with_columns(spelt.alias("ngram"))
            .filter(whole)
            .unique(["row", "ngram"], keep="first", maintain_order=True)
            .select("row", "place", "ngram")
        )


def resolve_titles(codes: npt.NDArray[np.integer], codebook_sizes: Sequence[int]) -> ResolvedCodes:
    """Titles' codes (N, L) with `unique`'s digit, and the report that `resolve_collisions` gives of others.

    The digit is there even if no two titles have the same code. Distortions are 0: the codes stand for no vectors.
    """
    original: npt.NDArray[np.int32] = np.asarray(codes, dtype=np.int32)
    resolved = unique(original)
    _, group, sizes = np.unique(original, axis=0, return_inverse=True, return_counts=True)
    _, prefixes = np.unique(original[:, :-1], axis=0, return_counts=True)
    sharing = int((sizes[group.reshape(-1)] > 1).sum())
    levels = (*map(int, codebook_sizes), int(sizes.max()))
    report = CollisionReport(
        policy="append",
        items=len(original),
        unique_codes_before=len(sizes),
        sharing_items=sharing,
        sharing_rate=sharing / len(original),
        collision_rate=1 - len(sizes) / len(original),
        largest_group=int(sizes.max()),
        largest_prefix_group=int(prefixes.max()),
        moved_items=0,
        distortion_before=0.0,
        added_distortion=0.0,
        tokens_per_item=resolved.shape[1],
        codebook_sizes=list(levels),
        used_codes=[len(np.unique(level)) for level in resolved.T],
    )
    return ResolvedCodes(resolved, levels, report)


def unique(codes: npt.NDArray[np.integer]) -> npt.NDArray[np.int32]:
    """(N, L) -> (N, L + 1) unique codes: the last level is a row's rank among the equal rows before it.

    The last codebook size is the largest of these ranks and 1. Added whether or not any code is shared, so that
    a catalog keeps one length when items join it.

    >>> unique(np.array([[1, 2], [3, 0], [1, 2]])).tolist()
    [[1, 2, 0], [3, 0, 0], [1, 2, 1]]
    """
    codes = np.asarray(codes, dtype=np.int32)
    _, group = np.unique(codes, axis=0, return_inverse=True)
    group = group.reshape(-1)
    order = np.argsort(group, kind="stable")
    ranks = np.empty(len(codes), dtype=np.int32)
    ranks[order] = np.arange(len(codes)) - np.searchsorted(group[order], group[order])
    return np.column_stack([codes, ranks])
