"""One call's way through tries and pauses to an answer or an error, without a socket: both clients drive it alike."""

import random
import time
import uuid
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, TypeAlias

import httpx

from llmrec.client.calls import Answer, Call, explained
from llmrec.exceptions import BusyError, DeadlineError, LLMRecError, RequestError, ServerError

BUSY = (429, 503)
REQUEST_ID = "X-Request-ID"
LONGEST_PAUSE = 30.0  # seconds; a server that asks for more is not waited for
_FIRST_PAUSE = 0.25  # seconds, doubled with each try, where the server names none
_LONGEST_TEXT = 1_000  # characters of a server's answer that a message shows


@dataclass(frozen=True)
class Try:
    """To be sent now; what comes of it, a response or httpx's error, goes back into the exchange."""

    request: Mapping[str, Any]  # what `httpx.Client.request` takes


@dataclass(frozen=True)
class Pause:
    """To be waited before the next try."""

    seconds: float


Outcome: TypeAlias = httpx.Response | httpx.HTTPError | None


def exchange(
    call: Call[Answer], headers: Mapping[str, str], timeout: float, retries: int
) -> Generator[Try | Pause, Outcome, Answer]:
    """Yields what to do next and is sent what came of it; returns what the method returns.

    A server that is busy (429, 503) or was not reached is asked again, `retries` times at most and while the time
    lasts: after as long as its Retry-After says and a little more, by chance, so that those who were turned away
    together do not come back together. Without a Retry-After the pause doubles, and is drawn from its second half. No
    other answer is asked for again, and a call that changes something only where it cannot have been carried out.

    Raises:
        RequestError: if the server could not answer what was asked (422), or `timeout` is no time.
        BusyError: if it stayed busy, or asked for a longer pause than there is time for.
        DeadlineError: if the deadline passed (504), or `timeout` seconds.
        ServerError: if it answered with another error, or could not be reached (status 0).
    """
    if not 0.0 < timeout < float("inf"):
        raise RequestError(f"The timeout is {timeout}. Give a finite number of seconds above 0.")
    name = uuid.uuid4().hex
    end = time.monotonic() + timeout
    for attempt in range(retries + 1):
        left = max(end - time.monotonic(), 0.001)
        outcome = yield Try(_request(call, {**headers, REQUEST_ID: name}, left))
        if isinstance(outcome, httpx.Response) and outcome.is_success:
            return call.read(outcome)
        assert outcome is not None
        error = _error_of(outcome, name, timeout)
        if call.unavailable is not None and (isinstance(error, BusyError) or getattr(error, "status", None) == 0):
            return call.unavailable
        pause = _pause(call, outcome, error, attempt)
        if attempt == retries or pause is None or time.monotonic() + pause >= end:
            raise error
        yield Pause(pause)
    raise AssertionError("the last try returns or raises")


def _request(call: Call[Any], headers: Mapping[str, str], seconds: float) -> dict[str, Any]:
    content = call.content(seconds)
    if content is not None:
        headers = {**headers, "Content-Type": "application/json"}
    return {
        "method": call.method,
        "url": call.path,
        "params": call.params or None,
        "content": content,
        "headers": headers,
        "timeout": seconds,
    }


def _pause(
    call: Call[Any], outcome: httpx.Response | httpx.HTTPError, error: LLMRecError, attempt: int
) -> float | None:
    """Seconds until the next try; none where there is to be none."""
    if isinstance(error, BusyError):
        if isinstance(outcome, httpx.Response) and "Retry-After" in outcome.headers:
            return None if error.retry_after > LONGEST_PAUSE else error.retry_after + random.uniform(0.0, _FIRST_PAUSE)
    elif isinstance(outcome, httpx.ConnectError | httpx.ConnectTimeout):
        pass
    elif not (call.repeatable and isinstance(outcome, httpx.NetworkError | httpx.RemoteProtocolError)):
        return None
    return _FIRST_PAUSE * 2.0**attempt * random.uniform(0.5, 1.0)


def _error_of(outcome: httpx.Response | httpx.HTTPError, name: str, timeout: float) -> LLMRecError:
    if isinstance(outcome, httpx.Response):
        return _error_in(outcome, outcome.headers.get(REQUEST_ID, name))
    if isinstance(outcome, httpx.TimeoutException) and not isinstance(outcome, httpx.ConnectTimeout):
        return DeadlineError(
            f"The server did not answer within {timeout:g} s (request {name}). Give it more time, or ask for less."
        )
    reason = str(outcome) or type(outcome).__name__
    return ServerError(
        f"The server gave no answer: {reason} (request {name}). Look at the URL, and whether the server runs.", 0
    )


def _error_in(response: httpx.Response, name: str) -> LLMRecError:
    """The error that a response stands for: of the class that the library itself would raise, where there is one."""
    status = response.status_code
    message = f"{_said(response)} (HTTP {status}, request {name[:100]})"
    if status == 422:
        return RequestError(message)
    if status in BUSY:
        return BusyError(message, _retry_after(response.headers.get("Retry-After", "")))
    if status == 504:
        return DeadlineError(message)
    return ServerError(message, status)


def _said(response: httpx.Response) -> str:
    """What the server says is wrong; a proxy before it may say it otherwise, or not at all."""
    try:
        answer = response.json()
    except (ValueError, RecursionError):
        answer = response.text
    if isinstance(answer, dict):
        answer = answer.get("detail", answer.get("error", answer))
    if isinstance(answer, dict):  # vLLM's own errors
        answer = answer.get("message", answer)
    if isinstance(answer, list) and answer and all(isinstance(part, dict) for part in answer):
        answer = explained(answer)
    text = " ".join(str(answer).split())
    if len(text) > _LONGEST_TEXT:
        text = text[:_LONGEST_TEXT] + "…"
    return text or f"The server answered {response.reason_phrase or 'with an error'}."


def _retry_after(value: str) -> float:
    """Seconds, from a number or a date (RFC 9110, 10.2.3); 1 where it is neither."""
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            return 1.0
    return max(seconds, 0.0) if seconds < float("inf") else 1.0
