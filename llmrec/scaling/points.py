"""The points that laws are fitted to: one training each, with its size, its data and the metric that it reached."""

from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl

from llmrec.exceptions import DataError

Table = npt.NDArray[np.float64]

REQUIRED = ("depth", "width", "tokens", "quality", "metric")
_POSITIVE = ("depth", "width", "tokens", "quality", "negatives")
_WHOLE = {"depth": "Layers are", "width": "Hidden sizes are"}
_MOST_SEED = 2**53  # beyond it, seeds that differ are one floating-point number
_TRUTH = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False, "": False}


@dataclass(frozen=True)
class ScalingPoints:
    """n trainings, (n,) each.

    Attributes:
        depth: number of layers.
        width: hidden size.
        tokens: events trained on: the sum of the training sequences' lengths.
        quality: S' = 1 / real entropy of these sequences, in nats.
        metric: on test, in [0, 1].
        seed: of the training, or None; equal sizes and data with other seeds are replicates of one cell.
        negatives: per target, or None where no row has any (full softmax).
        loss: on validation, NaN where a row has none, or None.
        encoder: whose they are, if it is known.
        rows: their numbers in the table that they are from, for what is said of them; None: counted from 1.

    Raises:
        DataError: on creation, if a value cannot be, or a training is there twice.
    """

    depth: Table
    width: Table
    tokens: Table
    quality: Table
    metric: Table
    seed: npt.NDArray[np.int64] | None = None
    negatives: Table | None = None
    loss: Table | None = None
    encoder: str | None = None
    rows: npt.NDArray[np.int64] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        for name, values in self._columns().items():
            dtype = np.int64 if name == "seed" else np.float64
            object.__setattr__(self, name, np.asarray(values, dtype=dtype).reshape(-1))
        if len(lengths := {len(values) for values in self._columns().values()}) != 1:
            raise DataError(
                f"Columns have {sorted(lengths)} values, so they do not make points. Give one of each per training."
            )
        if not len(self):
            raise DataError(
                "There are no points. Add one row per training, with the columns " + ", ".join(REQUIRED) + "."
            )
        for name, values in self._columns().items():
            if name == "loss":
                continue
            if len(wrong := np.flatnonzero(~np.isfinite(values))):
                raise DataError(
                    f"Row {self._row(wrong[0])} has the {name} {values[wrong[0]]}. Run this training again, or leave "
                    "its row out; where all rows lack it, drop the column."
                )
            if name in _POSITIVE and len(wrong := np.flatnonzero(values <= 0)):
                raise DataError(
                    f"Row {self._row(wrong[0])} has the {name} {values[wrong[0]]:g}, which must be above 0. Correct "
                    "it, or leave the row out."
                )
            if name in _WHOLE and len(wrong := np.flatnonzero(values != np.round(values))):
                raise DataError(
                    f"Row {self._row(wrong[0])} has the {name} {values[wrong[0]]:g}. {_WHOLE[name]} whole numbers: "
                    "correct it, or leave the row out."
                )
        if len(wrong := np.flatnonzero((self.metric < 0) | (self.metric > 1))):
            raise DataError(
                f"Row {self._row(wrong[0])} has the metric {self.metric[wrong[0]]:g}, outside [0, 1]. Give a ranking "
                "metric such as NDCG@10 as a share, not in per cent, and no loss."
            )
        self._refuse_copies()

    def __len__(self) -> int:
        return len(self.depth)

    @property
    def effective(self) -> Table:
        """(n,) effective data D' = tokens * quality."""
        return self.tokens * self.quality

    @classmethod
    def read(cls, path: str | Path, encoder: str | None = None, held_out: bool = False) -> "ScalingPoints":
        """Reads a table of trainings: CSV, or parquet or JSON lines by the file's ending. See `from_frame`.

        Raises:
            DataError: also if there is no such file, or it cannot be read.
        """
        return cls.from_frame(read_trainings(path), encoder, held_out)

    @classmethod
    def from_frame(cls, frame: pl.DataFrame, encoder: str | None = None, held_out: bool = False) -> "ScalingPoints":
        """The points of a table with one row per training.

        Args:
            frame: columns depth, width, tokens, quality, metric; optional seed, negatives, loss, encoder, held_out
                (true: measured only to be predicted). Others are passed over.
            encoder: whose rows to take; needed where the column names several.
            held_out: False takes the rows that are not marked held_out, True those that are.

        Raises:
            DataError: if columns are missing, a value is none or cannot be, or no row is left.
        """
        if missing := [name for name in REQUIRED if name not in frame.columns]:
            raise DataError(
                f"The points lack the column(s) {', '.join(missing)}; they have {', '.join(frame.columns) or 'none'}. "
                "Add them: layers, hidden size, events trained on, 1 / real entropy (`llmrec data entropy` prints "
                "it), and the metric on test."
            )
        frame = frame.drop("row of the file", strict=False).with_row_index("row of the file", offset=1)
        frame, encoder = _of_encoder(frame, encoder)
        frame = _of_part(frame, held_out)
        columns = {name: _numbers(frame, name) for name in REQUIRED}
        optional: dict[str, Table | None] = {}
        for name in ("seed", "negatives", "loss"):
            given = name in frame.columns and frame[name].null_count() < len(frame)
            optional[name] = _numbers(frame, name, gaps=name == "loss") if given else None
        seed = optional["seed"]
        if seed is not None and len(wrong := seed[~((seed == np.round(seed)) & (np.abs(seed) <= _MOST_SEED))]):
            raise DataError(f"A seed is {wrong[0]:g}. Give whole numbers, 2^53 at most.")
        return cls(
            **columns,
            seed=None if seed is None else seed.astype(np.int64),
            negatives=optional["negatives"],
            loss=optional["loss"],
            encoder=encoder,
            rows=frame["row of the file"].to_numpy().astype(np.int64),
        )

    def cells(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Which rows are replicates: the first row of each cell (c,), and every row's cell (n,).

        A cell is a depth, width, tokens, quality and number of negatives; cells stand in the order of their rows.
        """
        keys = [self.depth, self.width, self.tokens, self.quality]
        keys += [] if self.negatives is None else [self.negatives]
        _, first, cell = np.unique(np.stack(keys, axis=1), axis=0, return_index=True, return_inverse=True)
        order = np.argsort(first, kind="stable")
        place = np.empty_like(order)
        place[order] = np.arange(len(order))
        return first[order].astype(np.int64), place[cell.reshape(-1)].astype(np.int64)

    def records(self) -> list[dict[str, float | int | None]]:
        """One JSON-ready dict per point; a loss that is not known is None."""
        return [
            {
                name: int(values[row]) if name == "seed" else _finite(float(values[row]))
                for name, values in self._columns().items()
            }
            for row in range(len(self))
        ]

    def _columns(self) -> dict[str, npt.NDArray[np.float64] | npt.NDArray[np.int64]]:
        names = [entry.name for entry in fields(self) if entry.name not in ("encoder", "rows")]
        named = {name: getattr(self, name) for name in names}
        return {name: values for name, values in named.items() if values is not None}

    def _row(self, place: int) -> int:
        """The number of a point's row in its table."""
        return int(place + 1 if self.rows is None else self.rows[place])

    def _refuse_copies(self) -> None:
        if self.seed is None:
            return
        seen: dict[tuple[int, int], int] = {}
        for row, key in enumerate(zip(self.cells()[1].tolist(), self.seed.tolist(), strict=True)):
            if key in seen:
                raise DataError(
                    f"Rows {self._row(seen[key])} and {self._row(row)} are one training: depth {self.depth[row]:g}, "
                    f"width {self.width[row]:g}, {self.tokens[row]:g} tokens and seed {key[1]}. Remove one of them; "
                    "replicates have other seeds."
                )
            seen[key] = row


def read_trainings(path: str | Path) -> pl.DataFrame:
    """A table of trainings as it is: CSV, or parquet or JSON lines by the file's ending.

    Raises:
        DataError: if there is no such file, or it cannot be read.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"There is no file {path}. Give a table of trainings, such as a pilot's points.csv.")
    try:
        if path.suffix == ".parquet":
            frame = pl.read_parquet(path, glob=False)
        elif path.suffix in (".jsonl", ".ndjson"):
            frame = pl.read_ndjson(path, infer_schema_length=None)
        else:
            frame = pl.read_csv(path, infer_schema_length=None, glob=False)
    except (pl.exceptions.PolarsError, UnicodeDecodeError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"{path} cannot be read as a table: {first}. Give CSV with a header, parquet or JSON lines."
        ) from error
    return frame


def encoders_of(frame: pl.DataFrame) -> list[str]:
    """The encoders that a table of trainings names, sorted; none where it has no such column, or an empty one.

    Raises:
        DataError: if some rows name one and others do not.
    """
    if "encoder" not in frame.columns or frame["encoder"].null_count() == len(frame):
        return []
    if frame["encoder"].null_count():
        raise DataError(
            f"Row {frame['encoder'].is_null().arg_true()[0] + 1} names no encoder, and others do. Fill the column in, "
            "or leave the row out."
        )
    return sorted(str(name) for name in frame["encoder"].unique().to_list())


def _of_encoder(frame: pl.DataFrame, encoder: str | None) -> tuple[pl.DataFrame, str | None]:
    """The rows of an encoder, or of the only one, and its name."""
    names = encoders_of(frame)
    if not names:
        if encoder is not None:
            raise DataError(
                f"The points name no encoder, so {encoder!r} cannot be chosen. Leave the encoder out, or add the "
                "column encoder."
            )
        return frame, None
    if encoder is None and len(names) > 1:
        raise DataError(
            f"The points are of {len(names)} encoders, {', '.join(names)}, and each has a law of its own. Choose one "
            "with --encoder."
        )
    if encoder is not None and encoder not in names:
        raise DataError(f"No point is of the encoder {encoder!r}. The points are of {', '.join(names)}.")
    if encoder is None:
        return frame, names[0]
    return frame.filter(pl.col("encoder").cast(pl.String) == encoder), encoder


def _of_part(frame: pl.DataFrame, held_out: bool) -> pl.DataFrame:
    if "held_out" not in frame.columns:
        marks = [False] * len(frame)
    else:
        spelt = [("" if value is None else str(value)).strip().lower() for value in frame["held_out"].to_list()]
        if wrong := [value for value in spelt if value not in _TRUTH]:
            raise DataError(f"The column held_out says {wrong[0]!r}. Write true or false.")
        marks = [_TRUTH[value] for value in spelt]
    chosen = frame.filter(pl.Series([mark == held_out for mark in marks], dtype=pl.Boolean))
    if held_out and not len(chosen):
        raise DataError("No point is held out. Add trainings whose column held_out is true.")
    if len(frame) and not len(chosen):
        names = " and ".join(encoders_of(frame))
        raise DataError(
            f"All points{' of ' + names if names else ''} are held out, so no law can be fitted to them. Add "
            "trainings that are not, or leave their rows out."
        )
    return chosen


def _numbers(frame: pl.DataFrame, name: str, gaps: bool = False) -> Table:
    """(n,) the column as numbers; with `gaps`, NaN where it has none."""
    column = frame[name]
    readable = column.dtype.is_numeric() or column.dtype in (pl.String, pl.Null)
    numbers = column.cast(pl.Float64, strict=False) if readable else pl.Series([None] * len(frame), dtype=pl.Float64)
    rows = frame["row of the file"].to_list()
    for place, (value, number) in enumerate(zip(column.to_list(), numbers.to_list(), strict=True)):
        if number is None and not (gaps and value is None):
            raise DataError(
                f"Row {rows[place]} has the {name} {value!r}, which is no number. Run this training again, or leave "
                "its row out."
            )
    return numbers.cast(pl.Float64).fill_null(float("nan")).to_numpy().astype(np.float64)


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None
