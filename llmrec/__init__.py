"""llmrec: generative recommendation with language models, from interactions to a served catalog."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Recommender", "__version__"]

if TYPE_CHECKING:
    from llmrec.recommender import Recommender


def __getattr__(name: str) -> Any:
    # torch takes seconds to import; `llmrec --help` must not pay for it.
    if name == "Recommender":
        from llmrec.recommender import Recommender

        return Recommender
    raise AttributeError(f"module 'llmrec' has no attribute {name!r}")
