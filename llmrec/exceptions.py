"""Every error that llmrec raises on purpose: one tree, so that `except LLMRecError` catches all of it.

A message has two sentences: what is wrong (with the value), and what to do.
"""


class LLMRecError(Exception):
    """Root of the tree."""


class DataError(LLMRecError, ValueError):
    """Interactions or items cannot be read, or do not fit together."""


class TokenizerError(LLMRecError, ValueError):
    """A semantic ID tokenizer cannot be fitted, or its codes cannot be made unique."""


class CatalogError(LLMRecError, ValueError):
    """A catalog's items, codes and token ids do not agree."""


class PromptError(LLMRecError, ValueError):
    """A prompt template cannot be rendered, or its text would turn into control tokens."""


class BackboneError(LLMRecError, ValueError):
    """A language model cannot be built, extended or trained as asked."""


class ArtefactError(LLMRecError, ValueError):
    """An artefact folder is missing, incomplete or altered."""


class RequestError(LLMRecError, ValueError):
    """A recommendation cannot be answered as it was asked."""


class UnknownItemError(RequestError):
    """A history names items that the catalog does not hold."""

    def __init__(self, item_ids: list[str]) -> None:
        short = (repr(item if len(item) <= 100 else item[:100] + "…") for item in item_ids[:5])
        shown = ", ".join(short) + (", …" if len(item_ids) > 5 else "")
        super().__init__(
            f"{len(item_ids)} item(s) of the history are not in the catalog: {shown}. "
            "Send ids of the catalog, or ask for unknown items to be ignored."
        )
        self.item_ids = item_ids


class FilterError(RequestError):
    """A filter names an attribute that items do not have, or leaves fewer items than were asked for."""


class UnknownCatalogError(RequestError):
    """A server has no catalog of that name, or the catalog no such version."""


class BusyError(LLMRecError, RuntimeError):
    """A server has as much work as it takes, or is being stopped; `retry_after` says when to ask again, in seconds."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class DeadlineError(LLMRecError, TimeoutError):
    """A request's deadline passed before its answer was there."""


class ServerError(LLMRecError, RuntimeError):
    """A server answered a client of llmrec's with an error; `status` is its HTTP status, 0 where it did not answer."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class EngineError(LLMRecError, RuntimeError):
    """vLLM cannot run this model's beam search, or its internals are not the ones llmrec was built for."""


class RecipeError(LLMRecError, ValueError):
    """A recipe or a command line of a stage cannot be read, or names what the stage does not know."""


class StageError(LLMRecError, RuntimeError):
    """A stage's script is missing, or ended with an error."""


class DependencyError(LLMRecError, ImportError):
    """A package that this function needs is not installed."""
