"""Session: what one visitor of the page has chosen and been shown.

Buttons in the page carry numbers that this class gave out, never ids or titles: an item can have any text for an id,
and what a browser sends is not to be believed.
"""

from dataclasses import dataclass, field

from llmrec.demo.servers import Answer
from llmrec.demo.settings import Settings
from llmrec.exceptions import RequestError
from llmrec.service.schema import MAX_FILTERS, MAX_HISTORY, MAX_ITEMS, CatalogItems, CatalogState, Condition

PAGE_ITEMS = 8


@dataclass(frozen=True)
class Item:
    """An item as the page names it."""

    id: str
    title: str


@dataclass(frozen=True)
class Entry:
    """A place of the history; `key` is its own for as long as it stands there, wherever it moves."""

    key: int
    item: Item


@dataclass
class Session:
    """One visitor's state; its methods keep it whole, whatever numbers come in.

    Attributes:
        catalogs: what the server said of its catalogs; empty until it answered.
        catalog: the name of the one in use; "" for the server's default.
        search: what the catalog is searched for.
        offset: the first match that is shown.
        found: the page of matches.
        history: oldest first; items may repeat.
        denied: what "not this" was clicked on, in that order, by id.
        filters: conditions by attribute.
        problem: the last thing that went wrong, in words; "" for nothing.
        lost: whether that was the server's silence, so that trying again may help.
        answers: the last ones, none to two.
        settings: that they were asked with.
        chosen: the id of the item whose path through the levels is marked; "" for none.
        changes: counts what would change an answer.
        answered: what `changes` was when the answers were asked for.

    >>> session = Session()
    >>> number = session.number(Item("a", "Lip balm"))
    >>> session.add(number)
    >>> session.add(number)
    >>> [entry.key for entry in session.history]
    [0, 1]
    >>> session.move_up(1)
    >>> [entry.key for entry in session.history]
    [1, 0]
    """

    catalogs: list[CatalogState] = field(default_factory=list)
    catalog: str = ""
    search: str = ""
    offset: int = 0
    found: CatalogItems = field(default_factory=lambda: CatalogItems(items=[], total=0))
    history: list[Entry] = field(default_factory=list)
    denied: dict[str, Item] = field(default_factory=dict)
    filters: dict[str, Condition] = field(default_factory=dict)
    problem: str = ""
    lost: bool = False
    answers: list[Answer] = field(default_factory=list)
    settings: Settings = field(default_factory=Settings)
    chosen: str = ""
    changes: int = 0
    answered: int = 0
    _items: list[Item] = field(default_factory=list)
    _numbers: dict[str, int] = field(default_factory=dict)
    _next_key: int = 0

    @property
    def state(self) -> CatalogState | None:
        """The catalog in use, or None before the server answered."""
        named = [state for state in self.catalogs if state.name == self.catalog]
        return (named or self.catalogs or [None])[0]  # type: ignore[list-item]

    @property
    def stale(self) -> bool:
        """Whether the answers are to another question than the one that would be asked now."""
        return self.answered != self.changes

    @property
    def attributes(self) -> dict[str, str]:
        """The names that filters may use, and their kind."""
        return {} if self.state is None else dict(self.state.attributes)

    def number(self, item: Item) -> int:
        """The number that stands for an item in this session's page; a new title replaces the old one."""
        place = self._numbers.setdefault(item.id, len(self._items))
        if place == len(self._items):
            self._items.append(item)
        else:
            self._items[place] = item
        return place

    def item(self, number: int) -> Item | None:
        """The item that a number stands for, or None."""
        return self._items[number] if 0 <= number < len(self._items) else None

    def add(self, number: int) -> None:
        """Puts an item at the end of the history.

        Raises:
            RequestError: if the history is as long as a request may hold.
        """
        item = self.item(number)
        if item is None:
            return
        if len(self.history) >= MAX_HISTORY:
            raise RequestError(f"The history has {MAX_HISTORY} items, the most that a request holds. Remove some.")
        self.history.append(Entry(self._next_key, item))
        self._next_key += 1
        self.changes += 1

    def remove(self, key: int) -> None:
        """Takes a place out of the history."""
        self.history = [entry for entry in self.history if entry.key != key]
        self.changes += 1

    def move_up(self, key: int) -> None:
        """Moves a place towards the oldest, by one."""
        places = [place for place, entry in enumerate(self.history) if entry.key == key]
        if places and places[0] > 0:
            place = places[0]
            self.history[place - 1], self.history[place] = self.history[place], self.history[place - 1]
            self.changes += 1

    def replace_history(self, items: list[Item]) -> None:
        """Puts these items in the place of the history."""
        self.history = []
        self.changes += 1
        for item in items:
            self.add(self.number(item))

    def deny(self, number: int) -> None:
        """Says that an item is not wanted.

        Raises:
            RequestError: if as many are denied as a request may hold.
        """
        item = self.item(number)
        if item is None:
            return
        if len(self.denied) >= MAX_ITEMS and item.id not in self.denied:
            raise RequestError(f"{MAX_ITEMS} items are denied, the most that a request holds. Allow some again.")
        self.denied[item.id] = item
        self.changes += 1

    def allow(self, number: int) -> None:
        """Takes `deny` back."""
        item = self.item(number)
        if item is not None and self.denied.pop(item.id, None) is not None:
            self.changes += 1

    def filter(self, name: str, condition: Condition) -> None:
        """Sets the condition on an attribute, in the place of the one that it had.

        Raises:
            RequestError: if there are as many as a request may hold.
        """
        if len(self.filters) >= MAX_FILTERS and name not in self.filters:
            raise RequestError(f"There are {MAX_FILTERS} filters, the most that a request holds. Remove one.")
        self.filters[name] = condition
        self.changes += 1

    def unfilter(self, place: int) -> None:
        """Drops the filter at a place of the list."""
        names = list(self.filters)
        if 0 <= place < len(names):
            del self.filters[names[place]]
            self.changes += 1

    def use_catalog(self, name: str) -> None:
        """Changes to another catalog: what was chosen of the last one goes, for ids and attributes are a catalog's."""
        if name == self.catalog:
            return
        self.catalog = name
        self.search, self.offset = "", 0
        self.history, self.denied, self.filters = [], {}, {}
        self.answers, self.chosen = [], ""
        self.changes += 1

    def turn(self, pages: int) -> None:
        """Turns the catalog's pages, within what there is."""
        last = max(0, (self.found.total - 1) // PAGE_ITEMS * PAGE_ITEMS)
        self.offset = min(max(0, self.offset + pages * PAGE_ITEMS), last)
