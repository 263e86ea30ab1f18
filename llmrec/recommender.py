"""Recommender: an artefact folder (model, tokenizer, catalog, prompt) that answers histories with items."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt
import torch

from llmrec import __version__, artefact
from llmrec.artefact_parts import PROMPT_FILE, SETTINGS_FILE, PromptEncoder, Settings, load_parts
from llmrec.beam import TrieTensors
from llmrec.catalog import CATALOG_FOLDER, Catalog
from llmrec.catalog_versions import refuse_to_replace
from llmrec.decoding import decode
from llmrec.exceptions import BackboneError, RequestError
from llmrec.item_tokenizer import TOKENIZER_FOLDER, copy_tokenizer
from llmrec.prompt import Event, Prompt
from llmrec.storage import atomic_folder, write_json
from llmrec.tasks.templates import load_templates, save_templates

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["PromptEncoder", "Recommendation", "Recommender", "Settings", "check_request", "load_parts"]

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


class Recommender:
    """Recommends the next items of a history with a causal language model in transformers.

    `serve` runs the same artefact in vLLM and gives the same items and scores.

    Attributes:
        model, tokenizer, catalog, prompt, settings: the artefact's parts.
        item_tokenizer: the folder of what gives new items their codes (`ItemTokenizer.load`), if it is known; it goes
            into a saved artefact.
        templates: the prompts of each task that the model was trained on, by task and name; `search` and requests with
            variables use them, and they go into a saved artefact.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        catalog: Catalog,
        prompt: Prompt,
        settings: Settings | None = None,
        item_tokenizer: Path | None = None,
        templates: Mapping[str, Mapping[str, Prompt]] | None = None,
    ) -> None:
        self.item_tokenizer = item_tokenizer
        self.model = model
        self.tokenizer = tokenizer
        self.catalog = catalog
        self.prompt = prompt
        self.settings = settings or Settings()
        self.encoder = PromptEncoder(tokenizer, catalog, prompt, self.settings, templates)
        self._trie = TrieTensors.of(catalog, self.settings.softmax, model.device)

    @property
    def templates(self) -> Mapping[str, Mapping[str, Prompt]]:
        """The tasks' prompts, which its encoder renders."""
        return self.encoder.templates

    @templates.setter
    def templates(self, templates: Mapping[str, Mapping[str, Prompt]]) -> None:
        self.encoder.templates = templates

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
        templates = load_templates(folder / artefact.TEMPLATES_FOLDER)
        return cls(model, tokenizer, catalog, prompt, settings, own if own.is_dir() else None, templates)

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
            save_templates(self.templates, temporary / artefact.TEMPLATES_FOLDER)
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
        events: Sequence[Event | Mapping[str, Any]] | None = None,
        **variables: Any,
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
            events: what is known of each place of the history: its action, domain and timestamp.
            variables: whatever else a prompt of the artefact uses, such as `preference`.

        Raises:
            UnknownItemError: if the history names unknown items.
            RequestError: if k is below 1, events do not fit the history, or no prompt has a place for the variables.
            PromptError: if the prompt uses what it was not given.
        """
        if isinstance(history, str):
            raise RequestError(f"The history is the string {history[:80]!r}. Give a list of item ids.")
        rows, events = self.encoder.known(history, events, ignore_unknown)
        given: dict[str, Any] = {name: [value] for name, value in variables.items()}
        found, scores = self.recommend_rows(
            [rows], k, exclude_seen, num_beams, events=None if events is None else [events], **given
        )
        return self._named(found[0], scores[0])

    def search(self, query: str, k: int = 10, num_beams: int | None = None) -> list[Recommendation]:
        """The k items that the model most probably means by a query, best first.

        The prompt is the artefact's own search template; of several, the first by name.

        Raises:
            RequestError: if the model was not trained to search, the query is empty, or k is below 1.
        """
        beams = check_request(k, self.settings.num_beams if num_beams is None else num_beams)
        tokens = self.encoder.encode_query(query)
        ((rows, scores),) = self._decoded([tokens], k, beams, [np.zeros(0, dtype=np.int64)])
        return self._named(rows, scores)

    def recommend_rows(
        self,
        histories: Sequence[Sequence[int]],
        k: int = 10,
        exclude_seen: bool = True,
        num_beams: int | None = None,
        progress: bool = False,
        events: Sequence[Sequence[Event | Mapping[str, Any]] | None] | None = None,
        **variables: Sequence[Any],
    ) -> tuple[list[list[int]], list[list[float]]]:
        """`recommend` for many histories of catalog rows: the rows found and their log-probabilities, in order.

        Events, and each of the variables, come as one entry per history.
        """
        beams = check_request(k, self.settings.num_beams if num_beams is None else num_beams)
        if outside := [row for rows in histories for row in rows if not 0 <= row < len(self.catalog)]:
            raise RequestError(f"Row {outside[0]} is not in the catalog of {len(self.catalog)}. Rows count from 0.")
        for name, values in {"events": events, **variables}.items():
            if values is not None and (isinstance(values, str) or len(values) != len(histories)):
                raise RequestError(
                    f"{name} is {str(values)[:80]!r}. Give one entry for each of {len(histories)} histories."
                )
        prompt = self.encoder.prompt_with(variables)
        prompts = [
            self.encoder.encode(
                rows,
                None if events is None else events[place],
                prompt,
                **{name: values[place] for name, values in variables.items()},
            )
            for place, rows in enumerate(histories)
        ]
        excluded = [np.array(rows if exclude_seen else (), dtype=np.int64) for rows in histories]
        found = self._decoded(prompts, k, beams, excluded, progress)
        return [rows for rows, _ in found], [scores for _, scores in found]

    def _named(self, rows: Sequence[int], scores: Sequence[float]) -> list[Recommendation]:
        return [
            Recommendation(self.catalog.ids[row], rank, score, self.catalog.title(row))
            for rank, (row, score) in enumerate(zip(rows, scores, strict=True), start=1)
        ]

    def _decoded(
        self,
        prompts: Sequence[Sequence[int]],
        k: int,
        beams: int,
        excluded: Sequence[npt.NDArray[np.int64]],
        progress: bool = False,
    ) -> list[tuple[list[int], list[float]]]:
        """The best rows after each prompt, and their scores."""
        answers: list[tuple[list[int], list[float]]] = [([], []) for _ in prompts]
        width = min(beams, len(self.catalog)) * self.catalog.num_levels
        for places in _batches([len(prompt) for prompt in prompts], width, progress):
            gone = [excluded[place] for place in places]
            found = decode(self.model, [prompts[place] for place in places], self._trie, beams, gone)
            for place, items, values in zip(places, found.items.tolist(), found.scores.tolist(), strict=True):
                rows = [row for row in items[:k] if row >= 0]
                answers[place] = rows, values[: len(rows)]
                remaining = self.catalog.candidates(excluded[place])
                if len(rows) != min(k, remaining):
                    raise BackboneError(
                        f"The model's scores are not numbers: a search for {min(k, remaining)} items found "
                        f"{len(rows)}. Its weights are broken or its dtype overflows; load it in float32."
                    )
        return answers


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
