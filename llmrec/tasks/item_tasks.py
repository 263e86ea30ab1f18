"""Tasks about items alone, which tie semantic IDs to words. They know every item, also those held out of histories."""

from functools import cached_property
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from llmrec.tasks.item_text import cut_text, label
from llmrec.tasks.task import Case, Task


class ItemToId(Task):
    """An item's title, description or attributes -> its semantic ID, for every item that is not retired."""

    name: ClassVar[str] = "item_to_id"
    offers: ClassVar[frozenset[str]] = frozenset({"item", "title", "description", "attributes"})
    has_history: ClassVar[bool] = False

    @cached_property
    def rows(self) -> npt.NDArray[np.int64]:
        """The catalog rows that are asked for."""
        return np.flatnonzero(~self.data.catalog.retired)

    def size(self) -> int:
        return len(self.rows)

    def has(self, variable: str) -> npt.NDArray[np.bool_]:
        text = self.data.item_text
        if variable == "description":
            return np.array([text.description(row) != "" for row in self.rows.tolist()], dtype=bool)
        if variable == "attributes":
            return np.array([text.attributes(row) != "" for row in self.rows.tolist()], dtype=bool)
        return super().has(variable)

    def case(self, number: int, draw: int) -> Case:
        row, text = int(self.rows[number]), self.data.item_text
        said = {
            "title": text.value(row, "title"),
            "description": text.description(row),
            "attributes": text.attributes(row),
        }
        return Case(
            self.item_answer(row), variables={"item": row, **{name: value for name, value in said.items() if value}}
        )

    def lacking(self) -> str:
        return "no item has what its templates show"


class IdToItem(Task):
    """An item's semantic ID and the name of a text column -> what stands there, for all that an item has."""

    name: ClassVar[str] = "id_to_item"
    offers: ClassVar[frozenset[str]] = frozenset({"item", "column"})
    has_history: ClassVar[bool] = False

    @cached_property
    def cells(self) -> list[tuple[int, str]]:
        """Catalog rows and text columns, items in order."""
        text = self.data.item_text
        return [
            (row, column)
            for row in range(len(self.data.catalog))
            for column in text.columns
            if text.value(row, column)
        ]

    def size(self) -> int:
        return len(self.cells)

    def case(self, number: int, draw: int) -> Case:
        row, column = self.cells[number]
        answer = self.text_answer(self.data.item_text.value(row, column))
        return Case(answer, variables={"item": row, "column": label(column)})

    def lacking(self) -> str:
        return "no item has any text"


class Search(Task):
    """A query -> the semantic ID of the item that was meant: of a table, or made of every item's attributes."""

    name: ClassVar[str] = "search"
    offers: ClassVar[frozenset[str]] = frozenset({"query"})
    has_history: ClassVar[bool] = False

    @cached_property
    def asked(self) -> list[tuple[int, str | None]]:
        """Catalog rows and their queries; None where one is made."""
        live = ~self.data.catalog.retired
        if self.data.queries is not None:
            pairs = zip(self.data.queries.rows, self.data.queries.texts, strict=True)
            cut = (
                (row, cut_text(text, self.data.text, self.data.max_text_tokens)) for row, text in pairs if live[row]
            )
            return [(row, text) for row, text in cut if text]
        rows = np.flatnonzero(live).tolist()
        return [(row, None) for row in rows if self.data.item_text.query(row, 0)]

    def size(self) -> int:
        return len(self.asked)

    def case(self, number: int, draw: int) -> Case:
        row, query = self.asked[number]
        said = self.data.item_text.query(row, draw) if query is None else query
        return Case(self.item_answer(row), variables={"query": said})

    def lacking(self) -> str:
        return "there is no table of queries, and no item has attributes to make them of"
