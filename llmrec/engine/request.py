"""What a search carries from the HTTP side to an engine, and back; knows neither side."""

from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch

# Status, the first number of a result: found; the engine failed (its log says why); the request fits no search.
OK, FAILED, REFUSED = 0.0, 1.0, 2.0


@dataclass(frozen=True)
class SearchParameters:
    """A search, as it travels in vLLM's `PoolingParams.extra_kwargs`: plain numbers, strings and lists.

    Attributes:
        k: items to return, at most.
        num_beams: W; 0 asks for the log-probability of `token` after the prompt instead of a search.
        index: the file of the catalog version's trie (`TrieTensors.save`), a name within the server's index folder; ""
            for the one that the server started with.
        subset: the file of a part of that trie, made once for a filter that many requests share; "" for all of it.
        allowed: catalog rows that alone may be returned; None for all. Within `subset`, if there is one.
        excluded: catalog rows not to return.
        renormalize: scores over the legal continuations instead of the vocabulary.
        cap_levels, cap: at most `cap` items share their first `cap_levels` codes; 0 for no cap.
        temperature: above 0, items are drawn without replacement at this temperature instead of the best being found.
        seed: of the draw.
        token: see num_beams.
    """

    k: int = 1
    num_beams: int = 1
    index: str = ""
    subset: str = ""
    allowed: list[int] | None = None
    excluded: list[int] = field(default_factory=list)
    renormalize: bool = False
    cap_levels: int = 0
    cap: int = 0
    temperature: float = 0.0
    seed: int = 0
    token: int = 0

    def pack(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def unpack(cls, values: dict[str, Any] | None) -> "SearchParameters":
        """Raises TypeError for unknown or missing names, ValueError for sizes that no search has."""
        parameters = cls(**(values or {}))
        if parameters.k < 1 or parameters.num_beams < 0:
            raise ValueError(f"k is {parameters.k} and num_beams {parameters.num_beams}. Both count from 1.")
        if parameters.cap_levels < 0 or parameters.cap < 0 or bool(parameters.cap) != bool(parameters.cap_levels):
            raise ValueError(f"cap is {parameters.cap} and cap_levels {parameters.cap_levels}. Give both, from 1 on.")
        if not 0.0 <= parameters.temperature < float("inf"):
            raise ValueError(f"temperature is {parameters.temperature}. Give a finite number, 0 for no draw.")
        return parameters


@dataclass(frozen=True)
class Found:
    """What a search found, best first.

    Attributes:
        rows: catalog rows; for `num_beams` 0, the one row 0.
        scores: log-probabilities.
        levels: per item the log-probabilities of its levels, which add up to its score; 0 behind a title's end.
        seconds: spent on the search itself, after the prompt's prefill.
    """

    rows: list[int]
    scores: list[float]
    levels: list[list[float]]
    seconds: float

    def pack(self, num_levels: int) -> torch.Tensor:
        """(n + 1, 2 + L) float64, which keeps rows exact: first status and seconds, then row, score and levels."""
        packed = torch.zeros((len(self.rows) + 1, 2 + num_levels), dtype=torch.float64)
        packed[0, 0], packed[0, 1] = OK, self.seconds
        if self.rows:
            packed[1:, 0] = torch.tensor(self.rows, dtype=torch.float64)
            packed[1:, 1] = torch.tensor(self.scores, dtype=torch.float64)
            packed[1:, 2:] = torch.tensor(self.levels, dtype=torch.float64)
        return packed

    @classmethod
    def unpack(cls, packed: torch.Tensor) -> "Found":
        """What `pack` packed; the status is the caller's to look at."""
        rows = packed[1:, 0].long().tolist()
        return cls(rows, packed[1:, 1].tolist(), packed[1:, 2:].tolist(), float(packed[0, 1]))


class SearchEngine(Protocol):
    """Runs prompts and searches the catalog behind them.

    Attributes:
        max_tokens: positions of the model as it was started: a prompt and all but the last token of an item fit in.
        dtype: "float32", "bfloat16" or "float16": how exact scores are.
        adapters: names of the LoRA adapters that a search may be run with.
    """

    max_tokens: int
    dtype: str
    adapters: list[str]

    @property
    def errored(self) -> bool:
        """Whether it has ended for good."""
        ...

    async def search(self, prompt: list[int], parameters: SearchParameters, adapter: str | None = None) -> Found:
        """One search; cancelling it frees what it holds.

        Raises:
            EngineError: if the engine failed, for this search or for good.
            RequestError: if there is no such adapter.
        """
        ...
