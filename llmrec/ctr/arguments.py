"""What a ranking model is trained on and made of, as flags."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from llmrec.exceptions import RecipeError

if TYPE_CHECKING:
    from llmrec.ctr.rows import LabelledRows


@dataclass
class CTRDataArguments:
    """Labelled rows, and how they are read."""

    train_rows: str = field(
        metadata={"help": "Labelled rows to train on: parquet, jsonl, csv or tsv, gzipped or not."}
    )
    artefact: str = field(metadata={"help": "Folder for the model; metrics.json and rank.html stand beside it."})
    test_rows: str | None = field(
        default=None, metadata={"help": "Rows to report on, of the same columns; default: the latest of train_rows."}
    )
    test_share: float = field(
        default=0.1, metadata={"help": "Without test_rows: the share of rows, the latest, that is reported on."}
    )
    dev_share: float = field(
        default=0.0,
        metadata={
            "help": "Share of the training rows, the latest, that is kept from training to choose by: epochs, early "
            "stopping, hyperparameters. 0: none; then evaluations on the way are of no rows."
        },
    )
    user_column: str = field(default="user_id", metadata={"help": "Users; usual aliases are found."})
    item_column: str = field(default="item_id", metadata={"help": "Candidates; usual aliases are found."})
    timestamp_column: str = field(default="timestamp", metadata={"help": "Times; usual aliases are found."})
    label_columns: list[str] = field(
        default_factory=lambda: ["label"], metadata={"help": "Labels 0, 1 or nothing, one or several."}
    )
    label_threshold: float | None = field(
        default=None, metadata={"help": "From which value on a label is a 1, of ratings for example."}
    )
    history_column: str = field(default="his", metadata={"help": "Items before each row, where the file has them."})
    flag_columns: list[str] = field(
        default_factory=list, metadata={"help": "Columns of 0 and 1 by which results are told apart."}
    )
    history: Literal["labelled", "liked", "given"] = field(
        default="labelled",
        metadata={
            "help": "What a model reads of a user. labelled: all rows before, with their labels; liked: those with a "
            "label 1; given: the history column."
        },
    )
    simultaneous: Literal["known", "unknown"] = field(
        default="known",
        metadata={
            "help": "Whether rows of the same second that stand earlier in the file are part of a history, as in the "
            "published history columns."
        },
    )
    max_history: int = field(default=50, metadata={"help": "Most recent events that the model reads."})
    min_count: int = field(
        default=1, metadata={"help": "ids: items of fewer training rows share the row of unknown items."}
    )
    negative_share: float = field(
        default=1.0, metadata={"help": "Share of the training rows without a label 1 that is trained on."}
    )
    reweigh_negatives: bool = field(
        default=True,
        metadata={"help": "negative_share: those that are left count for all, so that probabilities stay true."},
    )
    drawn_negatives: int = field(
        default=0,
        metadata={
            "help": "Items drawn for each row with a label 1, as rows of label 0, in all parts; for click logs."
        },
    )
    passes: Literal["cases", "windows"] = field(
        default="cases",
        metadata={
            "help": "cases: a sequence for each row; windows: whole histories, every event of which is predicted in "
            "one pass (layout interleaved, history labelled)."
        },
    )
    fresh: bool = field(default=False, metadata={"help": "Ignore the checkpoints of an earlier run."})
    beside: list[str] = field(
        default_factory=list,
        metadata={"help": "metrics.json of the same run with other seeds: the page shows mean and deviation."},
    )

    def check(self, layout: str) -> None:
        """Raises RecipeError for flags that make no sense or do not go together."""
        if self.max_history < 1 or self.min_count < 0 or self.drawn_negatives < 0:
            raise RecipeError(
                f"max_history is {self.max_history}, min_count {self.min_count}, drawn_negatives "
                f"{self.drawn_negatives}. Give at least 1, 0 and 0."
            )
        if not 0 < self.negative_share <= 1:
            raise RecipeError(f"negative_share is {self.negative_share}. Give more than 0 and at most 1.")
        if not 0 <= self.dev_share < 1 or not 0 < self.test_share < 1:
            raise RecipeError(
                f"dev_share is {self.dev_share} and test_share {self.test_share}. Give shares below 1, of the test "
                "above 0."
            )
        if self.passes == "windows" and (
            layout != "interleaved" or self.history != "labelled" or self.drawn_negatives
            or self.simultaneous != "known"
        ):  # fmt: skip
            raise RecipeError(
                f"passes is 'windows' with layout {layout!r}, history {self.history!r}, simultaneous rows "
                f"{self.simultaneous!r} and {self.drawn_negatives} drawn negatives. One pass predicts the events of a "
                "labelled history in the order of the file: say layout interleaved, or train on cases."
            )

    def read(self) -> "LabelledRows":
        """The rows: part 0 is training, part 1 the test; raises as `LabelledRows.read` does."""
        from llmrec.ctr.rows import LabelledRows, RowColumns

        columns = RowColumns(
            user=self.user_column,
            item=self.item_column,
            timestamp=self.timestamp_column,
            labels=tuple(self.label_columns),
            threshold=self.label_threshold,
            history=self.history_column,
            flags=tuple(self.flag_columns),
        )
        paths = [Path(self.train_rows), *([] if self.test_rows is None else [Path(self.test_rows)])]
        rows = LabelledRows.read(paths, columns)
        return rows if self.test_rows is not None else rows.with_latest_as(1, self.test_share)


@dataclass
class CTRModelArguments:
    """How candidates are read and scored; the encoder's own flags are beside these."""

    layout: Literal["target", "interleaved"] = field(
        default="target",
        metadata={
            "help": "target: an event is a token, its item plus what was done, the candidate the last; interleaved: "
            "items and actions are tokens by turns, as in HSTU."
        },
    )
    scorer: Literal["dot", "mlp", "ffn"] = field(
        default="mlp", metadata={"help": "From the state behind a candidate and its vector to the logits."}
    )
    scorer_dropout: float = field(default=0.0, metadata={"help": "Dropout of the scorer."})
    unknown_rate: float = field(
        default=0.02, metadata={"help": "ids: share of items that are taken for unknown in training."}
    )
    label_weights: list[float] | None = field(
        default=None, metadata={"help": "What each label counts in the loss; default: 1 each."}
    )

    def check(self) -> None:
        """Raises RecipeError for numbers that make no sense."""
        if not 0 <= self.scorer_dropout < 1 or not 0 <= self.unknown_rate < 1:
            raise RecipeError(
                f"scorer_dropout is {self.scorer_dropout} and unknown_rate {self.unknown_rate}. Give shares below 1."
            )
