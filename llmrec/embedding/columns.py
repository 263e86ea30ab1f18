"""Vector columns: embeddings that the table of items brings along, such as its images', and blocks of one vector."""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import polars as pl
from safetensors.numpy import load_file, save_file

from llmrec.exceptions import ArtefactError, DataError
from llmrec.storage import atomic_path, write_json

logger = logging.getLogger(__name__)

FOLDER = "blocks"  # in a folder of embeddings
TENSORS_FILE, MANIFEST_FILE = "blocks.safetensors", "blocks.json"


@dataclass(frozen=True)
class Block:
    """One fitted block: y = (x - mean) * scale.

    Attributes:
        weight: its share of the squared distances, 0..1; the shares of all blocks add up to 1.
        mean: (D_b,) float64 of the items that have a vector.
        scale: brings the mean norm of those items' centred vectors to the square root of the weight.
    """

    weight: float
    mean: npt.NDArray[np.float64]
    scale: float


@dataclass(frozen=True)
class VectorBlocks:
    """Blocks beside each other, each centred and scaled to its share; an item that lacks one has the block's mean.

    Attributes:
        blocks: by the column's name, in the order in which they stand.
    """

    blocks: Mapping[str, Block]

    @property
    def weights(self) -> list[float]:
        """The blocks' shares, in their order."""
        return [block.weight for block in self.blocks.values()]

    @property
    def sha256(self) -> str:
        """A hash of all that `transform` depends on."""
        digest = hashlib.sha256()
        for name, block in self.blocks.items():
            digest.update(json.dumps([name, len(block.mean), block.weight, block.scale]).encode())
            digest.update(np.ascontiguousarray(block.mean).data)
        return digest.hexdigest()

    @classmethod
    def fit(cls, vectors: Mapping[str, npt.NDArray[np.floating]], weights: Sequence[float] | None = None) -> Self:
        """Fits every block on a catalog.

        Args:
            vectors: (N, D_b) by name; a row of NaN says that the item has none.
            weights: one per block, not negative; they are divided by their sum. None weighs all alike.

        Raises:
            DataError: if there is no block, a block has no item with a vector, the blocks differ in N, or the weights
                are not one positive or zero number per block, with one above 0.
        """
        if not vectors:
            raise DataError("There are no vectors to join. Name at least one column of vectors.")
        shares = [1.0] * len(vectors) if weights is None else [float(weight) for weight in weights]
        if len(shares) != len(vectors):
            raise DataError(
                f"{len(shares)} weight(s) do not belong to {len(vectors)} block(s) ({', '.join(vectors)}). "
                "Give one weight per block, in their order."
            )
        if not all(0 <= share < np.inf for share in shares) or not sum(shares):
            raise DataError(f"The weights {shares} are no shares. Give finite numbers from 0 up, one of them above 0.")
        counts = {name: len(block) for name, block in vectors.items()}
        if len(set(counts.values())) > 1:
            raise DataError(f"Blocks of different numbers of items cannot be joined: {counts}. Give one row per item.")
        fitted = {}
        for (name, block), share in zip(vectors.items(), shares, strict=True):
            present = np.asarray(block[_has_vector(block)], dtype=np.float64)
            if not len(present):
                raise DataError(f"No item has a vector in {name!r}. Fill the column in, or leave it out.")
            mean = present.mean(axis=0)
            # A block whose items are all alike has norm 0 and nothing to scale.
            norm = float(np.linalg.norm(present - mean, axis=1).mean()) or 1.0
            fitted[name] = Block(share / sum(shares), mean, float(np.sqrt(share / sum(shares)) / norm))
        return cls(fitted)

    def transform(self, vectors: Mapping[str, npt.NDArray[np.floating]]) -> npt.NDArray[np.float32]:
        """(N, sum of D_b) float32 of the items that it was fitted on or of new ones; a block without a vector is 0.

        Raises:
            DataError: if the blocks are not those that were fitted, or of other widths.
        """
        if list(vectors) != list(self.blocks):
            raise DataError(
                f"Blocks {', '.join(vectors)} are not the fitted {', '.join(self.blocks)}. Name the same columns, in "
                "the same order."
            )
        parts = []
        for name, block in self.blocks.items():
            given = vectors[name]
            if given.shape[1] != len(block.mean):
                raise DataError(
                    f"Vectors in {name!r} have {given.shape[1]} numbers, those it was fitted on {len(block.mean)}. "
                    "Use vectors of the same model."
                )
            centred = (np.asarray(given, dtype=np.float64) - block.mean) * block.scale
            parts.append(np.where(_has_vector(given)[:, None], centred, 0).astype(np.float32))
        return np.concatenate(parts, axis=1)

    def save(self, folder: str | Path) -> None:
        """Writes blocks.safetensors and blocks.json into `folder`."""
        folder = Path(folder)
        with atomic_path(folder / TENSORS_FILE) as temporary:
            # By place, because a column may bear any name.
            save_file({str(place): block.mean for place, block in enumerate(self.blocks.values())}, temporary)
        described = [
            {"name": name, "weight": block.weight, "scale": block.scale} for name, block in self.blocks.items()
        ]
        write_json(folder / MANIFEST_FILE, {"blocks": described})

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Reads what `save` wrote; raises ArtefactError if a file is missing or unreadable."""
        folder = Path(folder)
        try:
            described = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))["blocks"]
            means = load_file(folder / TENSORS_FILE)
            return cls(
                {
                    str(block["name"]): Block(float(block["weight"]), means[str(place)], float(block["scale"]))
                    for place, block in enumerate(described)
                }
            )
        except Exception as error:
            raise ArtefactError(
                f"{folder} holds no fitted blocks of vectors ({error!r}). Embed the items with --vector_columns again."
            ) from error


def column_vectors(
    frame: pl.DataFrame, name: str, item_ids: Sequence[str], width: int | None = None
) -> npt.NDArray[np.float32]:
    """A column of lists or arrays of numbers as (N, D) float32; rows whose list is null or empty are NaN.

    Args:
        frame: the items' table (`Items.frame`).
        name: the column.
        item_ids: N, for messages.
        width: D, for a few new items of which none may have a vector; by default one must.

    Raises:
        DataError: if there is no such column, it holds no lists of numbers, no item has one and no width is given,
            lists differ in length, or a number is null, NaN, infinite or too large for float32; the item is named.
    """
    if name not in frame.columns:
        raise DataError(
            f"The items have no column {name!r}; their columns are {', '.join(map(repr, frame.columns))}. "
            "Name columns of lists of numbers with --vector_columns."
        )
    values = frame[name]
    if isinstance(values.dtype, pl.Array):
        values = values.arr.to_list()
    elif values.dtype == pl.String:
        values = _parsed(values)
    inner: Any = values.dtype.inner if isinstance(values.dtype, pl.List) else None
    is_empty = values.null_count() == len(values) or inner == pl.Null
    if not is_empty and (inner is None or not inner.is_numeric()):
        first = _first_no_vector(values)
        raise DataError(
            f"Item {item_ids[first]!r} has {str(values[first])[:60]!r} in the column {name!r}, which is no list of "
            f"numbers ({frame[name].dtype}). Name columns of vectors, or give null where an item has none."
        )
    lengths = np.zeros(len(values), np.int64) if is_empty else values.list.len().fill_null(0).to_numpy()
    has = np.flatnonzero(lengths)
    if missing := len(values) - len(has):
        first_missing = item_ids[int((lengths == 0).argmax())]
        if missing == len(values) and width is None:
            raise DataError(f"No item has a vector in the column {name!r}. Fill the column in, or leave it out.")
        logger.warning(
            "%d of %d item(s) have no vector in the column %r, such as %r; they get the mean of the others",
            *(missing, len(values), name, first_missing),
        )
    if not len(has):
        return np.full((len(values), width or 0), np.nan, dtype=np.float32)
    width = int(lengths[has[0]]) if width is None else width
    ragged = has[lengths[has] != width]
    if len(ragged):
        raise DataError(
            f"Item {item_ids[ragged[0]]!r} has {lengths[ragged[0]]} numbers in the column {name!r}, not {width} as "
            "the others before it. Give all items vectors of one length, or null."
        )
    numbers = values.gather(has).explode().cast(pl.Float64).fill_null(np.nan).to_numpy()
    with np.errstate(over="ignore"):
        present = numbers.reshape(len(has), width).astype(np.float32)
    finite = np.isfinite(present).all(axis=1)
    if not finite.all():
        bad = has[int(finite.argmin())]
        raise DataError(
            f"The vector of item {item_ids[bad]!r} in the column {name!r} holds null, NaN, infinity or a number "
            "beyond float32. Repair it, or give null for the whole vector."
        )
    result = np.full((len(values), width), np.nan, dtype=np.float32)
    result[has] = present
    return result


def _has_vector(vectors: npt.NDArray[np.floating]) -> npt.NDArray[np.bool_]:
    return np.asarray(~np.isnan(vectors).all(axis=1))


def _parsed(values: pl.Series) -> pl.Series:
    """Text as lists of numbers, if all of it is the JSON of such or empty; else as it is."""
    lists = []
    for text in values.to_list():
        found = _list_of(text) if text else []
        if found is None:
            return values
        lists.append(found)
    return pl.Series(values.name, lists, dtype=pl.List(pl.Float64))


def _list_of(text: str) -> list[float] | None:
    try:
        return _numbers(json.loads(text))
    except (ValueError, RecursionError):
        return None


def _numbers(value: Any) -> list[float] | None:
    """A list of numbers as floats; None for anything else."""
    if not isinstance(value, list) or not all(type(number) in (int, float) for number in value):
        return None
    try:
        return [float(number) for number in value]
    except OverflowError:
        return None


def _first_no_vector(values: pl.Series) -> int:
    """The row of the first value that is no list of numbers, or of text that is not the JSON of one."""
    for row, value in enumerate(values.to_list()):
        if value and (_list_of(value) if isinstance(value, str) else _numbers(value)) is None:
            return row
    return int(values.is_not_null().arg_max() or 0)
