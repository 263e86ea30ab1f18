"""Recommender: an artefact folder (model, tokenizer, catalog, prompt) that answers histories with items."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, cast

import numpy as np
import torch

from llmrec import __version__, artefact
from llmrec.artefact_parts import (
    PROMPT_FILE,
    SETTINGS_FILE,
    PromptEncoder,
    RequestEncoder,
    Settings,
    is_sequence,
    load_parts,
)
from llmrec.catalog import CATALOG_FOLDER, Catalog
from llmrec.catalog_versions import refuse_to_replace
from llmrec.decoding import decode
from llmrec.exceptions import BackboneError, RequestError
from llmrec.item_tokenizer import TOKENIZER_FOLDER, copy_tokenizer
from llmrec.prompt import Event, Prompt
from llmrec.recommendation import (
    Recommendation,
    Selection,
    check_asker,
    check_request,
    read_selection,
    rows_to_score,
)
from llmrec.service.attributes import Attributes
from llmrec.service.filters import Filters, Rows, candidates, matching, require
from llmrec.service.schema import PrefixCap, Sampling
from llmrec.storage import atomic_folder, write_json
from llmrec.tasks.templates import load_templates, save_templates
from llmrec.trie_tensors import TrieTensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["PromptEncoder", "Recommendation", "Recommender", "Settings", "check_request", "load_parts"]

# So many tokens, of prompts and beams, are held by one search's cache: bounds its memory.
_CACHED_TOKENS = 32_000
_SCORED_AT_ONCE = 1_000


Events = Sequence[Event | Mapping[str, Any]]
# Per prompt: row, log-probability, and log-probability per level, best first.
_Found = list[tuple[int, float, list[float]]]


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
        self.encoder: RequestEncoder = PromptEncoder(tokenizer, catalog, prompt, self.settings, templates)
        self._trie = TrieTensors.of(catalog, self.settings.softmax, model.device)

    @property
    def templates(self) -> Mapping[str, Mapping[str, Prompt]]:
        """The tasks' prompts, which its encoder renders."""
        return self.encoder.templates

    @templates.setter
    def templates(self, templates: Mapping[str, Mapping[str, Prompt]]) -> None:
        self.encoder.templates = templates

    @cached_property
    def attributes(self) -> Attributes:
        """What filters know of its catalog's items; looked through when asked."""
        return Attributes(self.catalog.items)

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

        Of a sequence model's artefact a `SequenceRecommender` is made, which has the same methods.

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
        if is_sequence(folder):
            from llmrec.sequence.recommender import SequenceRecommender

            made: Any = SequenceRecommender.from_pretrained(folder, None, device, dtype, catalog_version)
            return cast(Self, made)
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
        history: Sequence[str] | None = None,
        k: int = 10,
        exclude_seen: bool = True,
        num_beams: int | None = None,
        ignore_unknown: bool = False,
        events: Events | None = None,
        filters: Filters | None = None,
        allow: Sequence[str] | None = None,
        deny: Sequence[str] = (),
        min_candidates: int = 0,
        normalize: Literal["vocabulary", "legal"] = "vocabulary",
        prefix_cap: PrefixCap | Mapping[str, Any] | None = None,
        sampling: Sampling | Mapping[str, Any] | None = None,
        text: str | None = None,
        **variables: Any,
    ) -> list[Recommendation]:
        """The k most probable next items of one history, best first; what a server must answer too.

        Fewer come back only where fewer may be recommended: a catalog of N items with s seen ones gives at most N - s;
        or where a prefix cap holds them back. An empty history is answered too: with what the model expects of a new
        user.

        Args:
            history: item ids, oldest first. Repeats are allowed.
            k: at least 1.
            exclude_seen: whether items of the history are no candidates.
            num_beams: beams; at least k are used. More find better items, and N finds the very best.
            ignore_unknown: skip ids that the catalog does not hold, instead of refusing.
            events: what is known of each place of the history: its action, domain and timestamp.
            filters: by attribute what items must be: `{"price": {"max": 20}, "brand": {"any_of": ["Norvik"]}}`; see
                `llmrec.service.filters`. The search never enters a branch without such an item.
            allow: item ids that alone may come back. Unknown ones are passed over, here and in `deny`.
            deny: item ids that may not.
            min_candidates: the items that must be left to choose from.
            normalize: "vocabulary": probabilities over the model's vocabulary. "legal": over the continuations that
                lead to an item that may come back.
            prefix_cap: at most so many items that begin alike: `{"levels": 1, "most": 3}`.
            sampling: items are drawn without replacement: `{"temperature": 1.0, "seed": 0}`. They come in the order of
                the draw.
            text: in the place of a history the whole prompt in plain words.
            variables: whatever else a prompt of the artefact uses, such as `preference`; of a sequence model `target`.

        Raises:
            UnknownItemError: if the history names unknown items.
            FilterError: if a filter cannot be read, names no attribute of the items, or leaves too few candidates.
            RequestError: if k is below 1, events do not fit the history, no prompt has a place for the variables, or
                an option is none.
            PromptError: if the prompt uses what it was not given.
        """
        selection = read_selection(normalize, prefix_cap, sampling)
        beams = check_request(k, self.settings.num_beams if num_beams is None else num_beams)
        rows, prompt = self._prompt(history, ignore_unknown, events, text, variables)
        left = matching(filters, self.catalog, self.attributes) if filters else None
        chosen = candidates(self.catalog, left, allow, deny, rows if exclude_seen else ())
        require(chosen.count, min_candidates)
        searched = chosen.searched
        trie = self._trie if searched is None else self._trie.subset(searched)
        (found,) = self._decoded([prompt], k, beams, [chosen.excluded], trie=trie, selection=selection)
        return self._named(found)

    def score(
        self,
        history: Sequence[str] | None,
        items: Sequence[str],
        ignore_unknown: bool = False,
        events: Events | None = None,
        text: str | None = None,
        **variables: Any,
    ) -> list[tuple[str, float, list[float]]]:
        """The log-probabilities of given items after one history, seen or not, in the order given.

        Returns:
            Per item its id, its log-probability, and the log-probability of each level of its semantic ID.

        Raises:
            RequestError: if an item is unknown, retired or named twice; else as `recommend`.
        """
        rows = rows_to_score(self.catalog, items)
        _, prompt = self._prompt(history, ignore_unknown, events, text, variables)
        scored: dict[int, tuple[float, list[float]]] = {}
        for begin in range(0, len(rows), _SCORED_AT_ONCE):
            some = rows[begin : begin + _SCORED_AT_ONCE]
            trie = self._trie.subset(some)
            # As many beams as items: the search leaves none out.
            (found,) = self._decoded([prompt], len(some), len(some), [np.zeros(0, dtype=np.int64)], trie=trie)
            scored |= {row: (score, levels) for row, score, levels in found}
        return [(item, *scored[row]) for item, row in zip(items, rows, strict=True)]

    def search(self, query: str, k: int = 10, num_beams: int | None = None) -> list[Recommendation]:
        """The k items that the model most probably means by a query, best first.

        The prompt is the artefact's own search template; of several, the first by name.

        Raises:
            RequestError: if the model was not trained to search, the query is empty, or k is below 1.
        """
        beams = check_request(k, self.settings.num_beams if num_beams is None else num_beams)
        tokens = self.encoder.encode_query(query)
        (found,) = self._decoded([tokens], k, beams, [np.zeros(0, dtype=np.int64)])
        return self._named(found)

    def recommend_rows(
        self,
        histories: Sequence[Sequence[int]],
        k: int = 10,
        exclude_seen: bool = True,
        num_beams: int | None = None,
        progress: bool = False,
        events: Sequence[Events | None] | None = None,
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
        return [[row for row, _, _ in one] for one in found], [[score for _, score, _ in one] for one in found]

    def _prompt(
        self,
        history: Sequence[str] | None,
        ignore_unknown: bool,
        events: Events | None,
        text: str | None,
        variables: Mapping[str, Any],
    ) -> tuple[list[int], list[int]]:
        """The rows of the history, and the prompt's token ids."""
        check_asker(history, text, {"events": events, **variables})
        if text is not None:
            return [], self.encoder.encode_text(text)
        rows, known = self.encoder.known(history or (), events, ignore_unknown)
        return rows, self.encoder.encode(rows, known, self.encoder.prompt_with(variables), **variables)

    def _named(self, found: _Found) -> list[Recommendation]:
        codes, ids, title = self.catalog.codes, self.catalog.ids, self.catalog.title
        return [
            Recommendation(ids[row], rank, score, title(row), tuple(codes[row].tolist()), tuple(levels))
            for rank, (row, score, levels) in enumerate(found, start=1)
        ]

    def _decoded(
        self,
        prompts: Sequence[Sequence[int]],
        k: int,
        beams: int,
        excluded: Sequence[Rows],
        progress: bool = False,
        trie: TrieTensors | None = None,
        selection: Selection | None = None,
    ) -> list[_Found]:
        """The best items after each prompt; `excluded` are catalog rows, of whatever items."""
        trie, selection = trie or self._trie, selection or Selection()
        answers: list[_Found] = [[] for _ in prompts]
        width = min(beams, trie.num_leaves) * trie.num_levels
        for places in _batches([len(prompt) for prompt in prompts], width, progress):
            found = decode(
                self.model,
                [prompts[place] for place in places],
                trie,
                beams,
                [excluded[place] for place in places],
                selection.renormalize,
                None if selection.cap is None else [selection.cap] * len(places),
                None if selection.draw is None else [selection.draw] * len(places),
            )
            results = zip(places, found.items.tolist(), found.scores.tolist(), found.levels.tolist(), strict=True)
            for place, items, scores, levels in results:
                one = zip(items[:k], scores, levels, strict=False)
                answers[place] = [(row, score, parts) for row, score, parts in one if row >= 0]
                wanted = min(k, trie.candidates(excluded[place]))
                held = selection.cap is not None and 0 < len(answers[place]) <= wanted
                if len(answers[place]) != wanted and not held:
                    raise BackboneError(
                        f"The model's scores are not numbers: a search for {wanted} items found "
                        f"{len(answers[place])}. Its weights are broken or its dtype overflows; load it in float32."
                    )
        return answers


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
