"""Limits: how much a server takes of one request and of all of them, each with a default."""

from dataclasses import dataclass, field, fields
from typing import Any

from llmrec.exceptions import RequestError
from llmrec.service.schema import MAX_BEAMS, MAX_K


def _limit(default: float, help: str, lowest: float = 1, highest: float = float("inf")) -> Any:
    return field(default=default, metadata={"help": help, "lowest": lowest, "highest": highest})


@dataclass(frozen=True)
class Limits:
    """What a server takes; `help` in a field's metadata says what it limits, `lowest` and `highest` what it may be.

    Raises:
        RequestError: for a number out of its range, or one that another makes useless.
    """

    max_body_bytes: int = _limit(1_000_000, "Bytes of a request's body; a longer one is a 413 before it is parsed.")
    max_depth: int = _limit(32, "Lists and objects within one another in a request's JSON.", highest=500)
    read_seconds: float = _limit(30.0, "Seconds that a client may take to send a request's body.", 0.01)
    max_requests: int = _limit(1024, "Requests held at once, whatever they cost; more are a 429.")
    max_k: int = _limit(MAX_K, "Items that a request may ask for.", highest=MAX_K)
    max_beams: int = _limit(MAX_BEAMS, "The widest search that a request may ask for.", highest=MAX_BEAMS)
    max_rows_running: int = _limit(4_096, "Beam rows in the engine at once; a request has the larger of k and beams.")
    max_rows_waiting: int = _limit(16_384, "Beam rows that wait for the engine; more are a 429 with Retry-After.", 0)
    deadline_ms: int = _limit(30_000, "Milliseconds for a request that names no deadline_ms; then 504.")
    max_deadline_ms: int = _limit(600_000, "The longest deadline_ms; a request that names a longer one gets this one.")
    canary_interval: float = _limit(30.0, "Seconds between the recommendations that /ready rests on.", 0.01)
    canary_timeout: float = _limit(30.0, "Seconds after which such a recommendation counts as failed.", 0.01)

    def __post_init__(self) -> None:
        for each in fields(self):
            value, lowest, highest = getattr(self, each.name), each.metadata["lowest"], each.metadata["highest"]
            if not lowest <= value <= highest:
                to = f" to {highest}" if highest < float("inf") else " on"
                raise RequestError(f"The limit {each.name} is {value}. Give a number from {lowest}{to}.")
        widest = max(self.max_k, self.max_beams)
        if self.max_rows_running < widest:
            raise RequestError(
                f"max_rows_running is {self.max_rows_running}, and one request may have {widest} rows, which would "
                f"wait for ever. Give at least {widest}, or lower max_k and max_beams."
            )

    def seconds(self, deadline_ms: int | None) -> float:
        """How long a request that names this deadline may take.

        >>> Limits().seconds(None), Limits().seconds(250), Limits(max_deadline_ms=100).seconds(250)
        (30.0, 0.25, 0.1)
        """
        return min(self.deadline_ms if deadline_ms is None else deadline_ms, self.max_deadline_ms) / 1000
