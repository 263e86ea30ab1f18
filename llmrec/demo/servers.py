"""The servers behind the page: asked through `llmrec.client`, timed, and their errors put into words."""

import ipaddress
import logging
import time
from dataclasses import dataclass
from urllib.parse import urlsplit

from llmrec.exceptions import BusyError, DeadlineError, LLMRecError, ServerError
from llmrec.service.schema import CatalogItems, CatalogState, RecommendRequest, RecommendResponse

TIMEOUT = 30.0
MAX_STORED = 50  # events of a stored history that the page shows
_LONGEST = 1_000  # characters of an error's text

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Answer:
    """What one server said to one request.

    Attributes:
        label: which server and adapter, for people.
        response: None if there was an error.
        seconds: from the request's start to the answer's end, as the page waited for it.
        error: in words; "" if there was none.
    """

    label: str
    response: RecommendResponse | None
    seconds: float
    error: str = ""


class Target:
    """A server that the page asks.

    Attributes:
        name: its address.
    """

    def __init__(self, url: str, api_key: str | None = None, timeout: float = TIMEOUT) -> None:
        """Opens nothing yet.

        Args:
            url: of the server.
            api_key: None or "": none is sent, whatever the environment holds.
            timeout: seconds that a request may take.

        Raises:
            RequestError: if the URL or the key is none.
        """
        import httpx

        from llmrec.client import Client

        # A proxy has no part in what stays on this machine. No retries: to wait is the visitor's choice.
        transport = httpx.HTTPTransport() if is_loopback(urlsplit(url).hostname or "") else None
        self.client = Client(url, api_key or "", timeout=timeout, retries=0, transport=transport)
        self.name = url.rstrip("/")  # the client takes no URL with a password in it

    def catalogs(self) -> list[CatalogState]:
        """Raises LLMRecError as the client does."""
        return self.client.catalogs()

    def keeps_histories(self) -> bool:
        """Whether the server has a history store; an error of any kind counts as none."""
        try:
            self.client.history("llmrec demo", last=1)
        except LLMRecError:
            return False
        return True

    def items(self, search: str, catalog: str, offset: int, limit: int) -> CatalogItems:
        """Raises LLMRecError as the client does."""
        return self.client.items(search, catalog or None, offset=offset, limit=limit)

    def stored(self, user_id: str, catalog: str) -> list[tuple[str, str]]:
        """Ids and titles of a user's last stored events, oldest first; an id alone where no title is found.

        Raises LLMRecError as the client does.
        """
        ids = [event.item for event in self.client.history(user_id, last=MAX_STORED).events]
        titles: dict[str, str] = {}
        for item_id in dict.fromkeys(ids):
            found = self.items(item_id, catalog, 0, 20).items
            titles[item_id] = next((item.title for item in found if item.id == item_id), "") or item_id
        return [(item_id, titles[item_id]) for item_id in ids]

    def recommend(self, request: RecommendRequest) -> Answer:
        """The answer, timed; errors are in it."""
        label = self.name if request.adapter is None else f"{self.name} with {request.adapter}"
        begin = time.perf_counter()
        try:
            response = self.client.recommend(**request.model_dump(exclude_unset=True))
        except Exception as error:
            return Answer(label, None, time.perf_counter() - begin, in_words(error))
        return Answer(label, response, time.perf_counter() - begin)


def in_words(error: Exception) -> str:
    """What a visitor is told of an error; one that llmrec did not raise on purpose goes to the log with its trace."""
    if isinstance(error, ServerError) and error.status == 0:
        return "The server does not answer. Look whether it runs (llmrec serve), then press Try again."
    if isinstance(error, ServerError) and error.status in (401, 403):
        return (
            "The server wants an API key, or another one. Start the page again with it in LLMREC_API_KEY "
            "(LLMREC_COMPARE_API_KEY for the second server)."
        )
    if isinstance(error, BusyError):
        return f"{error} It asks for a pause of {error.retry_after:.0f} s."[:_LONGEST]
    if isinstance(error, LLMRecError):
        return str(error)[:_LONGEST]
    logger.error("The page failed.", exc_info=error)
    return f"The page failed with {type(error).__name__}. The log of llmrec demo has the reason; reload to go on."


def is_loopback(host: str) -> bool:
    """Whether a host's name is this machine's own.

    >>> is_loopback("localhost"), is_loopback("127.0.0.2"), is_loopback("::1"), is_loopback("10.0.0.1")
    (True, True, True, False)
    """
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def is_silence(error: Exception) -> bool:
    """Whether an error says that a server is away or busy, so that asking again may help."""
    return isinstance(error, BusyError | DeadlineError) or (
        isinstance(error, ServerError) and error.status in (0, 502, 503)
    )
