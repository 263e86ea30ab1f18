"""Recommender: an artefact folder (model, tokenizer, catalog, prompt) that answers histories with items."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch

from llmrec import __version__, artefact
from llmrec.beam import TrieTensors
from llmrec.catalog import CATALOG_FOLDER, Catalog
from llmrec.catalog_versions import CatalogVersions, refuse_to_replace
from llmrec.decoding import decode
from llmrec.exceptions import ArtefactError, BackboneError, RequestError
from llmrec.item_tokenizer import TOKENIZER_FOLDER, copy_tokenizer
from llmrec.prompt import Prompt
from llmrec.storage import atomic_folder, write_json
from llmrec.vocabulary import PlainText, start_token

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SETTINGS_FILE, PROMPT_FILE = "llmrec.json", "prompt.jinja"
# So many tokens, of prompts and beams, are held by one search's cache: bounds its memory.
_CACHED_TOKENS = 32_000


@dataclass(frozen=True)
class Recommendation:
    """One recommended item.

    Attributes:
        item_id: as in the catalog.
        rank: 1 for the best.
        log_probability: natural logarithm of the item's probability given the history.
        title: for reading.
    """

    item_id: str
    rank: int
    log_probability: float
    title: str


@dataclass
class Settings:
    """How an artefact is used; `llmrec.json` in its folder.

    Attributes:
        max_history: the most recent items that the prompt shows; older ones only count as seen.
        num_beams: beams of a search, unless a request wants more items than that.
        split: content hash of the split it was trained on, "" if unknown.
        protocol: how that split was made (`Split.protocol`), empty if unknown.
        training: what it was trained with (arguments, seed, versions), for the record.
    """

    max_history: int = 20
    num_beams: int = 50
    split: str = ""
    protocol: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.max_history < 1 or self.num_beams < 1:
            raise RequestError(f"max_history is {self.max_history} and num_beams {self.num_beams}. Both count from 1.")


class Recommender:
    """Recommends the next items of a history with a causal language model in transformers.

    `serve` runs the same artefact in vLLM and gives the same items and scores.

    Attributes:
        model, tokenizer, catalog, prompt, settings: the artefact's parts.
        item_tokenizer: the folder of what gives new items their codes (`ItemTokenizer.load`), if it is known; it goes
            into a saved artefact.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        catalog: Catalog,
        prompt: Prompt,
        settings: Settings | None = None,
        item_tokenizer: Path | None = None,
    ) -> None:
        self.item_tokenizer = item_tokenizer
        self.model = model
        self.tokenizer = tokenizer
        self.catalog = catalog
        self.prompt = prompt
        self.settings = settings or Settings()
        self.encoder = PromptEncoder(tokenizer, catalog, prompt, self.settings)
        self._trie = TrieTensors(catalog.trie, catalog.require_tokens(), model.device)

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo_id: str | Path,
        revision: str | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype = "auto",
        catalog_version: str | None = None,
    ) -> Self:
        """Loads an artefact from a folder or from the Hub, and checks its files against its manifest first.

        Args:
            path_or_repo_id: a folder, or a Hub id.
            revision: branch, tag or commit on the Hub.
            device: default: a GPU if there is one.
            dtype: of the weights; "auto" is the saved one.
            catalog_version: of the catalog's versions (`CatalogVersions`); default: the current one.

        Raises:
            ArtefactError: if a file is missing, truncated or altered, or is not an artefact's.
            CatalogError: if the catalog has no such version.
        """
        from transformers import AutoModelForCausalLM, AutoTokenizer

        folder = artefact.resolve(str(path_or_repo_id), revision)
        loaded = AutoTokenizer.from_pretrained(folder)
        tokenizer, catalog, prompt, settings = load_parts(folder, loaded, catalog_version)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        model.eval().to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        own = folder / TOKENIZER_FOLDER
        return cls(model, tokenizer, catalog, prompt, settings, own if own.is_dir() else None)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes the artefact folder, whole or not at all; its model also loads with plain transformers and vLLM.

        The catalog becomes the base there, as it is, without the versions before it.

        Raises:
            CatalogError: if an artefact lies there whose catalog has versions, which would be lost.
        """
        refuse_to_replace(Path(folder) / CATALOG_FOLDER)
        with atomic_folder(folder) as temporary:
            self.model.save_pretrained(temporary, safe_serialization=True)
            self.tokenizer.save_pretrained(temporary)
            self.catalog.save(temporary / CATALOG_FOLDER)
            (temporary / PROMPT_FILE).write_text(self.prompt.source + "\n", encoding="utf-8")
            if self.item_tokenizer is not None:
                copy_tokenizer(self.item_tokenizer, temporary / TOKENIZER_FOLDER, self.catalog.content_hash)
            write_json(temporary / SETTINGS_FILE, {"llmrec": __version__, **asdict(self.settings)})
            artefact.write_manifest(temporary)

    def push_to_hub(self, repo_id: str, private: bool | None = None, revision: str | None = None) -> str:
        """Saves to a temporary folder and uploads it with huggingface_hub; returns the address of the commit."""
        import tempfile

        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(Path(folder) / "artefact")
            return artefact.push_to_hub(Path(folder) / "artefact", repo_id, private=private, revision=revision)

    def recommend(
        self,
        history: Sequence[str],
        k: int = 10,
        exclude_seen: bool = True,
        num_beams: int | None = None,
        ignore_unknown: bool = False,
    ) -> list[Recommendation]:
        """The k most probable next items of one history, best first.

        Fewer come back only where fewer remain: a catalog of N items with s seen ones gives at most N - s. An empty
        history is answered too: with what the model expects of a new user.

        Args:
            history: item ids, oldest first. Repeats are allowed.
            k: at least 1.
            exclude_seen: whether items of the history are no candidates.
            num_beams: beams; at least k are used. More find better items, and N finds the very best.
            ignore_unknown: skip ids that the catalog does not hold, instead of refusing.

        Raises:
            UnknownItemError: if the history names unknown items.
            RequestError: if k is below 1.
        """
        if isinstance(history, str):
            raise RequestError(f"The history is the string {history[:80]!r}. Give a list of item ids.")
        rows = self.catalog.rows(history, ignore_unknown)
        found, scores = self.recommend_rows([rows], k, exclude_seen, num_beams)
        return [
            Recommendation(self.catalog.ids[row], rank, score, self.catalog.title(row))
            for rank, (row, score) in enumerate(zip(found[0], scores[0], strict=True), start=1)
        ]

    def recommend_rows(
        self,
        histories: Sequence[Sequence[int]],
        k: int = 10,
        exclude_seen: bool = True,
        num_beams: int | None = None,
        progress: bool = False,
    ) -> tuple[list[list[int]], list[list[float]]]:
        """`recommend` for many histories of catalog rows: the rows found and their log-probabilities, in order."""
        beams = check_request(k, self.settings.num_beams if num_beams is None else num_beams)
        if outside := [row for rows in histories for row in rows if not 0 <= row < len(self.catalog)]:
            raise RequestError(f"Row {outside[0]} is not in the catalog of {len(self.catalog)}. Rows count from 0.")
        prompts = [self.encoder.encode(rows) for rows in histories]
        items: list[list[int]] = [[] for _ in histories]
        scores: list[list[float]] = [[] for _ in histories]
        width = min(beams, len(self.catalog)) * self.catalog.num_levels
        for places in _batches([len(prompt) for prompt in prompts], width, progress):
            seen = [np.array(histories[place], dtype=np.int64) for place in places]
            found = decode(
                self.model, [prompts[place] for place in places], self._trie, beams, seen if exclude_seen else None
            )
            for place, rows, values, gone in zip(
                places, found.items.tolist(), found.scores.tolist(), seen, strict=True
            ):
                items[place] = [row for row in rows[:k] if row >= 0]
                scores[place] = values[: len(items[place])]
                remaining = self.catalog.candidates(gone if exclude_seen else ())
                if len(items[place]) != min(k, remaining):
                    raise BackboneError(
                        f"The model's scores are not numbers: a search for {min(k, remaining)} items found "
                        f"{len(items[place])}. Its weights are broken or its dtype overflows; load it in float32."
                    )
        return items, scores


class PromptEncoder:
    """Histories of catalog rows to prompts of token ids; shared by transformers, the server and training."""

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", catalog: Catalog, prompt: Prompt, settings: Settings
    ) -> None:
        self.catalog = catalog
        self.settings = settings
        self._prompt = prompt
        self._text = PlainText(tokenizer)
        self._start = start_token(tokenizer)

    def encode(self, rows: Sequence[int]) -> list[int]:
        """Token ids of the prompt for the last `max_history` of `rows`, oldest first."""
        recent = list(rows)[-self.settings.max_history :]
        return self._prompt.encode(self.catalog, recent, self._text, self._start)


def load_parts(
    folder: Path, tokenizer: "PreTrainedTokenizerBase", catalog_version: str | None = None
) -> tuple["PreTrainedTokenizerBase", Catalog, Prompt, Settings]:
    """Everything of an artefact but the model, with a version of the catalog, by default the current one.

    Raises:
        ArtefactError: if the tokenizer is not the catalog's.
        CatalogError: if there is no such version.
    """
    if not (folder / SETTINGS_FILE).is_file():
        raise ArtefactError(
            f"{folder} holds no {SETTINGS_FILE}: it is a model, but not an llmrec artefact. "
            "Train one with train/sft.py, or point to its artefact folder."
        )
    stored = json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8"))
    settings = Settings(**{name: value for name, value in stored.items() if name in Settings.__dataclass_fields__})
    catalog = CatalogVersions(folder / CATALOG_FOLDER).load(catalog_version)
    for strings, ids in zip(catalog.token_strings(), catalog.require_tokens(), strict=True):
        if tokenizer.convert_tokens_to_ids(strings) != ids.tolist():
            raise ArtefactError(
                f"The tokenizer in {folder} spells {strings[0]!r} otherwise than its catalog. "
                "The files come from different artefacts: restore the folder."
            )
    return tokenizer, catalog, Prompt.read(folder / PROMPT_FILE), settings


def check_request(k: int, num_beams: int) -> int:
    """The beams of a search for `k` items; raises RequestError if k or the beams are below 1."""
    if k < 1 or k != int(k):
        raise RequestError(f"k is {k}, and a recommendation has a whole number of items, from 1 on. Ask for k >= 1.")
    if num_beams < 1:
        raise RequestError(f"num_beams is {num_beams}. Search with at least one beam.")
    return max(k, num_beams)


def _batches(lengths: Sequence[int], width: int, progress: bool) -> "list[list[int]] | Any":
    """Places of prompts in batches of similar length, each within the budget of cached tokens."""
    order = sorted(range(len(lengths)), key=lambda place: (lengths[place], place))
    batches: list[list[int]] = []
    for place in order:
        # The newest prompt is the longest, and the batch is padded to it.
        if batches and (len(batches[-1]) + 1) * (lengths[place] + width) <= _CACHED_TOKENS:
            batches[-1].append(place)
        else:
            batches.append([place])
    if not progress:
        return batches
    from tqdm.auto import tqdm

    return tqdm(batches, desc="recommending", unit="batch")
