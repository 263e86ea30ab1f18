"""What a recommendation request carries from the HTTP side to the engine, and back; knows neither side."""

from dataclasses import asdict, dataclass, field
from typing import Any

# In the place of a catalog row: the engine could not answer this request.
FAILED = -2.0


@dataclass(frozen=True)
class SearchParameters:
    """A search, as it travels in vLLM's `PoolingParams.extra_kwargs`.

    Attributes:
        k: items to return.
        num_beams: W; 0 asks for the log-probability of `token` after the prompt instead of a search.
        excluded: catalog rows not to return.
        token: see num_beams.
    """

    k: int = 1
    num_beams: int = 1
    excluded: list[int] = field(default_factory=list)
    token: int = 0

    def pack(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def unpack(cls, values: dict[str, Any] | None) -> "SearchParameters":
        """Raises TypeError for unknown or missing names, ValueError for sizes that no search has."""
        parameters = cls(**(values or {}))
        if parameters.k < 1 or parameters.num_beams < 0:
            raise ValueError(f"k is {parameters.k} and num_beams {parameters.num_beams}. Both count from 1.")
        return parameters
