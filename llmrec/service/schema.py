"""The HTTP API's bodies, as pydantic models: what may be asked, within which limits, and what is answered.

Limits stand in the models, so that the OpenAPI description has them and a request beyond them is a 422.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

MAX_HISTORY, MAX_K, MAX_BEAMS, MAX_ITEMS, MAX_BATCH = 10_000, 1_000, 512, 10_000, 256
MAX_FILTERS, MAX_VALUES, MAX_TEXT = 16, 256, 10_000

ItemId = Annotated[str, Field(min_length=1, max_length=1_000)]
UserId = Annotated[str, Field(min_length=1, max_length=1_000)]
Name = Annotated[str, Field(min_length=1, max_length=200)]
Value = Annotated[str, Field(max_length=1_000)] | bool | int | Annotated[float, Field(allow_inf_nan=False)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class HistoryEvent(_Body):
    """What is known of one place of a history, beside its item."""

    action: str | None = Field(default=None, max_length=1_000, description="What the user did there, as in the log.")
    domain: str | None = Field(default=None, max_length=1_000, description="The shop or category, as in the log.")
    timestamp: float | None = Field(default=None, strict=True, allow_inf_nan=False, description="Unix seconds.")


class Condition(_Body):
    """What a named attribute of an item must be. All that is given must hold; an item without the attribute fails."""

    any_of: list[Value] | None = Field(
        default=None, min_length=1, max_length=MAX_VALUES, description="One of these values; of a list, any entry."
    )
    none_of: list[Value] | None = Field(
        default=None, min_length=1, max_length=MAX_VALUES, description="None of these values."
    )
    min: float | None = Field(default=None, strict=True, allow_inf_nan=False, description="At least this number.")
    max: float | None = Field(default=None, strict=True, allow_inf_nan=False, description="At most this number.")

    @model_validator(mode="after")
    def _says_something(self) -> "Condition":
        if self.any_of is None and self.none_of is None and self.min is None and self.max is None:
            raise ValueError("A condition is empty. Give any_of, none_of, min or max.")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min is {self.min} and max {self.max}. Give a range that something can be in.")
        return self


class PrefixCap(_Body):
    """At most so many items of one branch of the semantic IDs."""

    levels: int = Field(ge=1, le=64, strict=True, description="Items that share their first `levels` codes count.")
    most: int = Field(ge=1, le=MAX_K, strict=True, description="So many of them are returned at most.")


class Sampling(_Body):
    """Items drawn without replacement (stochastic beam search) instead of the most probable ones."""

    temperature: float = Field(
        default=1.0, gt=0.0, le=100.0, strict=True, description="Above 1 is more even, below 1 is greedier."
    )
    seed: int = Field(default=0, ge=0, le=2**53, strict=True, description="The same seed draws the same items.")


class _Asked(_Body):
    """What a recommendation and a score have in common: for whom, by which model, of which catalog, until when."""

    history: list[ItemId] | None = Field(
        default=None,
        max_length=MAX_HISTORY,
        description="Item ids, oldest first. Empty: what the model expects of a new user.",
    )
    user_id: UserId | None = Field(
        default=None, description="In the place of a history: that of this user in the server's history store."
    )
    text: str | None = Field(
        default=None,
        min_length=1,
        max_length=MAX_TEXT,
        description="In the place of a history: the whole prompt in your own words, read as plain text.",
    )
    events: list[HistoryEvent] | None = Field(
        default=None,
        max_length=MAX_HISTORY,
        description="One per item of the history; for a prompt that shows actions, domains or gaps.",
    )
    preference: str | None = Field(
        default=None,
        max_length=MAX_TEXT,
        description="What the user likes, in words; for a model trained on preferences.",
    )
    target: HistoryEvent | None = Field(
        default=None,
        description="What is known of the event that is asked for: its action, domain and time; for a sequence model.",
    )
    ignore_unknown: bool = Field(
        default=False,
        strict=True,
        description="Skip ids that the catalog does not hold, instead of refusing the request.",
    )
    adapter: Name | None = Field(default=None, description="A LoRA adapter of the server; default: the model itself.")
    catalog: Name | None = Field(default=None, description="One of the server's catalogs; default: the first.")
    deadline_ms: int | None = Field(
        default=None, ge=1, le=600_000, strict=True, description="Milliseconds after which the work stops, with a 504."
    )

    @model_validator(mode="after")
    def _for_one(self) -> "_Asked":
        given = [name for name in ("history", "user_id", "text") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"The request has {' and '.join(given) or 'no history, user_id or text'}. Give exactly one of "
                "history, user_id and text."
            )
        if self.history is None and self.events is not None:
            raise ValueError("Events came without a history. Give one event per item of a history.")
        for name in ("preference", "target"):
            if self.text is not None and getattr(self, name) is not None:
                raise ValueError(f"A {name} came with a text, which is the whole prompt. Write it into the text.")
        return self


class RecommendRequest(_Asked):
    """What to recommend, and for whom."""

    k: int = Field(
        default=10,
        ge=1,
        le=MAX_K,
        strict=True,
        description="Items wanted. Fewer come back only where fewer remain, or a prefix cap holds them back.",
    )
    num_beams: int | None = Field(
        default=None,
        ge=1,
        le=MAX_BEAMS,
        strict=True,
        description="Beams of the search; at least k are used. More find better items, at more cost.",
    )
    exclude_seen: bool = Field(
        default=True, strict=True, description="Whether items of the history are no candidates."
    )
    filters: dict[Name, Condition] = Field(
        default_factory=dict, max_length=MAX_FILTERS, description="Conditions on the items' attributes, by name."
    )
    allow: list[ItemId] | None = Field(
        default=None, max_length=MAX_ITEMS, description="Only these items; ids that the catalog lacks are passed over."
    )
    deny: list[ItemId] = Field(
        default_factory=list,
        max_length=MAX_ITEMS,
        description="None of these items; ids that the catalog lacks are passed over.",
    )
    min_candidates: int = Field(
        default=0,
        ge=0,
        strict=True,
        description="Refuse the request (422) where fewer items than this may be returned.",
    )
    normalize: Literal["vocabulary", "legal"] = Field(
        default="vocabulary",
        description="Probabilities over the model's vocabulary, or over the continuations that are legal here.",
    )
    prefix_cap: PrefixCap | None = Field(default=None, description="For variety: a cap on items of one branch.")
    sampling: Sampling | None = Field(default=None, description="For variety: draw items instead of the best.")
    explain: bool = Field(
        default=False, strict=True, description="Add each item's semantic ID and the log-probability per level."
    )


class RecommendBatch(_Body):
    """Several requests, answered together by one version of each catalog, or refused together."""

    requests: list[RecommendRequest] = Field(min_length=1, max_length=MAX_BATCH)


class SearchRequest(_Body):
    """What to search for, in words."""

    query: str = Field(max_length=MAX_TEXT, description="Some words.")
    k: int = Field(default=10, ge=1, le=MAX_K, strict=True, description="Items wanted.")
    num_beams: int | None = Field(default=None, ge=1, le=MAX_BEAMS, strict=True, description="Beams, at least k.")
    filters: dict[Name, Condition] = Field(default_factory=dict, max_length=MAX_FILTERS)
    adapter: Name | None = None
    catalog: Name | None = None
    deadline_ms: int | None = Field(default=None, ge=1, le=600_000, strict=True)
    explain: bool = Field(default=False, strict=True)


class ScoreRequest(_Asked):
    """Items whose log-probability is asked for."""

    items: list[ItemId] = Field(
        min_length=1, max_length=MAX_K, description="Ids of live items; each is scored, seen or not. No repeats."
    )


class RecommendedItem(BaseModel):
    """One item of an answer."""

    id: str
    rank: int = Field(description="1 for the best.")
    log_probability: float = Field(description="Natural logarithm of the item's probability given the history.")
    title: str
    semantic_id: list[int] | None = Field(default=None, description="The item's codes; with `explain`.")
    level_log_probabilities: list[float] | None = Field(
        default=None, description="Per level; they add up to the log-probability. With `explain`."
    )


class RecommendResponse(BaseModel):
    """The answer, best item first."""

    items: list[RecommendedItem]
    model: str
    catalog: str
    catalog_version: str


class RecommendBatchResponse(BaseModel):
    """One answer per request, in their order."""

    responses: list[RecommendResponse]


class ItemScore(BaseModel):
    """An item's log-probability."""

    id: str
    log_probability: float
    level_log_probabilities: list[float]


class ScoreResponse(BaseModel):
    """The scores, in the order asked."""

    scores: list[ItemScore]
    model: str
    catalog: str
    catalog_version: str


class CatalogState(BaseModel):
    """One of the server's catalogs."""

    name: str
    version: str
    items: int = Field(description="Rows of the catalog, retired ones among them.")
    live: int = Field(description="Items that may be recommended.")
    levels: int
    attributes: dict[str, str] = Field(
        description="Names that filters may use, and their kind: text, number, flag or list."
    )
    versions: list[str] = Field(description="All that the server could be sent to, the base first.")


class CatalogsResponse(BaseModel):
    """The server's catalogs, the default one first."""

    catalogs: list[CatalogState]


class SwapRequest(_Body):
    """Which version of a catalog to serve from now on."""

    catalog: Name | None = Field(default=None, description="Default: the first.")
    version: str = Field(
        default="current", max_length=64, description="A version's name, or current: the one that its folder says."
    )


class SwapResponse(BaseModel):
    """The version in use, and the one before."""

    catalog: str
    version: str
    previous: str


class CatalogItem(BaseModel):
    """One item of a catalog, for people who look through it."""

    id: str
    title: str
    semantic_id: list[int]
    retired: bool
    attributes: dict[str, str | float | bool | list[str]]


class CatalogItems(BaseModel):
    """A page of a catalog's items, by row."""

    items: list[CatalogItem]
    total: int = Field(description="How many match.")


class StoredEvent(HistoryEvent):
    """One event of a user's history."""

    item: ItemId


class AppendRequest(_Body):
    """Events to put at the end of a user's history, oldest first."""

    events: list[StoredEvent] = Field(min_length=1, max_length=MAX_HISTORY)


class UserHistory(BaseModel):
    """A user's history, oldest first."""

    user_id: str
    events: list[StoredEvent]
