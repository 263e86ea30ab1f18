"""ColumnArguments: a script's flags for the files' own column names."""

from dataclasses import dataclass, field

from llmrec.data.columns import ITEM, POSITION, TIMESTAMP, TITLE, USER, ColumnNames


@dataclass
class ColumnArguments:
    """What the files call their columns."""

    user_column: str = field(default=USER, metadata={"help": "The interactions' column of user ids."})
    item_column: str = field(default=ITEM, metadata={"help": "The column of item ids, in both files."})
    timestamp_column: str = field(default=TIMESTAMP, metadata={"help": "The interactions' column of times, if any."})
    position_column: str = field(default=POSITION, metadata={"help": "The interactions' column of places, if any."})
    title_column: str = field(default=TITLE, metadata={"help": "The items' column of titles."})
    text_columns: list[str] | None = field(
        default=None, metadata={"help": "The items' columns that join the title; default: all that read like text."}
    )

    def names(self) -> ColumnNames:
        """As the readers take them."""
        return ColumnNames(
            user=self.user_column,
            item=self.item_column,
            timestamp=self.timestamp_column,
            position=self.position_column,
            title=self.title_column,
            text=None if self.text_columns is None else tuple(self.text_columns),
        )
