"""Actions: what a click or an input of the page does to a session, with the servers' help; knows no gradio.

Every action leaves the session whole and never raises: what went wrong is in `session.problem`, in words.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from llmrec.demo.servers import Target, in_words, is_silence
from llmrec.demo.session import PAGE_ITEMS, Item, Session
from llmrec.demo.settings import asked, condition, settings_of
from llmrec.exceptions import RequestError
from llmrec.service.schema import CatalogItems

logger = logging.getLogger(__name__)


class Actions:
    """The page's actions.

    Attributes:
        first: the server that the catalog is shown of.
        second: the one to compare with, or None: then a comparison asks the first for another adapter.
    """

    def __init__(self, first: Target, second: Target | None = None) -> None:
        self.first = first
        self.second = second
        self._clicks: dict[str, Callable[[Session, int], None]] = {
            "add": Session.add,
            "remove": Session.remove,
            "up": Session.move_up,
            "deny": Session.deny,
            "allow": Session.allow,
            "unfilter": Session.unfilter,
            "clear": lambda session, _: session.replace_history([]),
            "choose": self._choose,
            "turn": self._turn,
            "retry": lambda session, _: self._open(session),
            "again": lambda session, _: self._ask(session),
        }

    def open(self, session: Session) -> bool:
        """Asks the server for its catalogs, and for the first page; returns whether it keeps histories."""
        keeps = False
        with _told(session):
            self._open(session)
            keeps = self.first.keeps_histories()
        return keeps

    def search(self, session: Session, search: str) -> None:
        """Shows the items that have `search` in them."""
        with _told(session):
            session.search, session.offset = str(search)[:200].strip(), 0
            self._find(session)

    def use_catalog(self, session: Session, name: str) -> None:
        """Changes to another of the server's catalogs."""
        with _told(session):
            if name in {state.name for state in session.catalogs}:
                session.use_catalog(name)
                self._find(session)

    def click(self, session: Session, sent: Mapping[str, Any]) -> None:
        """Does what a button says; `sent` came from a browser, and what is no button's is passed over."""
        action, number = str(sent.get("action")), str(sent.get("number"))
        # Twelve digits are more than any number that was given out, and few enough to be read.
        if action in self._clicks and len(number) <= 12 and number.removeprefix("-").isdecimal():
            with _told(session):
                self._clicks[action](session, int(number))

    def filter(
        self,
        session: Session,
        name: str | None,
        values: str,
        negated: bool,
        least: str,
        most: str,
        flag: str | None,
    ) -> None:
        """Sets a filter as its inputs say, see `condition`."""
        with _told(session):
            if name not in session.attributes:
                raise RequestError("No attribute is chosen. Choose one that the catalog's items have.")
            kind = session.attributes[name]
            session.filter(name, condition(kind, values, negated, least, most, flag or ""))

    def recommend(self, session: Session, values: Mapping[str, Any]) -> None:
        """Asks for recommendations with what the inputs hold."""
        with _told(session):
            session.settings = settings_of(values)
            self._ask(session)

    def take_stored(self, session: Session, user_id: str) -> None:
        """Puts a stored user's last items in the place of the clicked history."""
        with _told(session):
            if not user_id.strip():
                raise RequestError("The user id is empty. Type one that the server knows.")
            stored = self.first.stored(user_id.strip(), session.catalog)
            if not stored:
                raise RequestError(f"The server has no history of {user_id.strip()[:80]!r}. Type another user id.")
            session.replace_history([Item(item_id, title) for item_id, title in stored])

    def _open(self, session: Session) -> None:
        session.catalogs = self.first.catalogs()
        if session.state is not None:
            session.catalog = session.state.name
        self._find(session)

    def _find(self, session: Session) -> None:
        found = self.first.items(session.search, session.catalog, session.offset, PAGE_ITEMS)
        session.found = CatalogItems(items=found.items, total=found.total)

    def _turn(self, session: Session, pages: int) -> None:
        session.turn(pages)
        self._find(session)

    def _choose(self, session: Session, number: int) -> None:
        item = session.item(number)
        session.chosen = "" if item is None or item.id == session.chosen else item.id

    def _ask(self, session: Session) -> None:
        settings = session.settings
        clicked = ([entry.item.id for entry in session.history], list(session.denied), session.filters)
        targets = [self.first]
        if settings.compare:
            targets.append(self.second or self.first)
        requests = [asked(settings, *clicked, session.catalog, second=place > 0) for place in range(len(targets))]
        if len(requests) == 2 and self.second is not None and session.catalog == session.catalogs[0].name:
            # The other server's first catalog is the one to compare with, whatever its name there.
            requests[1] = requests[1].model_copy(update={"catalog": None})
        # One after the other, so that two servers on one machine do not slow each other down.
        session.answered = session.changes
        session.answers = [target.recommend(request) for target, request in zip(targets, requests, strict=True)]
        ids = {item.id for answer in session.answers if answer.response for item in answer.response.items}
        session.chosen = session.chosen if session.chosen in ids else ""


@contextmanager
def _told(session: Session) -> Iterator[None]:
    """Errors raised within become the session's problem; without one, it has none."""
    session.problem, session.lost = "", False
    try:
        yield
    except Exception as error:
        session.problem, session.lost = in_words(error), is_silence(error)
