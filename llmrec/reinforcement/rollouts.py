"""Rollouts: groups of items that a policy proposes after a prompt, all of them in the catalog, none of them twice.

Two kinds. **Beams** (`temperature` None) are the G items that beam search finds best. They are no samples: a group is
a function of the policy, and its rewards' gradient, as MiniOneRec takes it (arXiv 2510.24431), is a biased policy
gradient: each item counts 1 / G where the policy gradient would count it by its probability, and items that no beam
reaches do not count. Probability moves among the items at the top of the list, which is what a ranking is judged by.
**Draws** (a temperature) are a sample without replacement, by stochastic beam search (Kool, van Hoof and Welling 2019,
arXiv 1903.06059), from the policy renormalised over the continuations that the catalog allows, at that temperature.
Every item is met with some probability. If they count alike, too, items of small probability weigh too much against
the policy gradient.

`weighted` gives every item what it counts by the policy: draws then estimate the gradient of the expected reward, and
beams that of the expected reward among the items they found; `llmrec.reinforcement.group_weights` says by which loss.

In both kinds log-probabilities are those of the policy's own softmax (`Settings.softmax`) at temperature 1, and not
those of the renormalised distribution that the items were found by.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from llmrec.catalog import Catalog, Softmax
from llmrec.decoding import decode
from llmrec.exceptions import BackboneError, RecipeError
from llmrec.reinforcement.group_weights import group_weights
from llmrec.selection import Draw
from llmrec.trie_tensors import TrieTensors

if TYPE_CHECKING:
    from llmrec.reinforcement.cases import RolloutCases

# So many tokens, of prompts and beams, are held by one search's cache: bounds its memory.
_CACHED_TOKENS = 32_000


@dataclass(frozen=True)
class Groups:
    """What a policy proposed for B cases, G items each.

    Attributes:
        items: (B, G) int64 catalog rows, all live, no row twice in a group; the best (or first drawn) first.
        tokens: B * G lists, group by group: the token ids that spell each item, and nothing behind its end.
        logprobs: B * G lists: the log-probability of each of these tokens under the policy's own softmax.
        weights: (B, G) what each item counts, adding up to 1 in a group; None: all alike.
    """

    items: npt.NDArray[np.int64]
    tokens: list[list[int]] = field(repr=False)
    logprobs: list[list[float]] = field(repr=False)
    weights: npt.NDArray[np.float64] | None = field(default=None, repr=False)

    @classmethod
    def of(cls, items: npt.NDArray[np.int64], levels: npt.NDArray[np.float64], catalog: Catalog) -> "Groups":
        """Of the rows that a search found and the log-probabilities (B, G, L) of their levels.

        Raises:
            BackboneError: if a row is missing (-1), retired, or twice in its group: the search was no search of this
                catalog, or its scores are no numbers.
        """
        ascending = np.sort(items, axis=1)
        twice = (ascending[:, 1:] == ascending[:, :-1]).any()
        if items.size and (ascending[:, 0].min() < 0 or ascending.max() >= len(catalog)):
            raise BackboneError(
                "A group lacks an item that it should have. The model's scores are not numbers, because its weights "
                "are broken or its dtype overflows: lower the learning rate, or train in float32."
            )
        if twice or catalog.retired[items].any():
            raise BackboneError(
                f"A group names {'an item twice' if twice else 'a retired item'}. The search ran on another catalog; "
                "give rollouts the catalog that the policy was trained with."
            )
        spelt = catalog.item_tokens[items.reshape(-1)].tolist()
        found = levels.reshape(len(spelt), -1).tolist()
        tokens = [[token for token in one if token >= 0] for one in spelt]
        return cls(items, tokens, [scores[: len(one)] for scores, one in zip(found, tokens, strict=True)])


class Rollouts(Protocol):
    """Proposes items for cases, with the policy's weights as they are now.

    Attributes:
        model: the policy.
        cases: the questions.
        catalog: of the items.
        group_size: G, items per case.
        softmax: what the policy's probabilities are over (`Settings.softmax`).
        weighted: whether groups say what each item counts.
    """

    model: Any
    cases: "RolloutCases"
    catalog: Catalog
    group_size: int
    softmax: Softmax
    weighted: bool

    def generate(self, chosen: Sequence[int], step: int = 0) -> Groups:
        """Groups for the cases at these places, in this order; `step` makes draws differ from one to the next."""
        ...


class TransformersRollouts:
    """Rollouts by `llmrec.decoding.decode`, in the process that trains.

    The model is put into eval mode for it (no dropout, no gradient checkpointing, which would forbid the cache) and
    back into what each of its modules was in. Each prompt is run once, whatever G is.
    """

    def __init__(
        self,
        model: Any,
        catalog: Catalog,
        cases: "RolloutCases",
        group_size: int,
        *,
        softmax: Softmax = "vocabulary",
        temperature: float | None = None,
        exclude_seen: bool = True,
        seed: int = 0,
        weighted: bool = False,
        cached_tokens: int = _CACHED_TOKENS,
    ) -> None:
        """
        Args:
            model: the policy, a causal LM, maybe in PEFT's wrapper, but not in DDP's.
            catalog: with token ids.
            cases: the questions.
            group_size: G, at least 2.
            softmax: the artefact's `Settings.softmax`.
            temperature: of draws; None for beams.
            exclude_seen: whether items of a case's history are no candidates, as serving has it.
            seed: of draws, see `draw_seed`.
            weighted: whether each item counts by the policy, and not all alike.
            cached_tokens: tokens, of prompts and beams, that one search may hold at once.

        Raises:
            RecipeError: if a case has fewer than G items that may be proposed.
        """
        self.model, self.catalog, self.cases, self.group_size = model, catalog, cases, group_size
        self.temperature, self.exclude_seen, self.seed = temperature, exclude_seen, seed
        self.softmax, self.weighted, self._cached_tokens = softmax, weighted, cached_tokens
        self._trie = TrieTensors.of(catalog, softmax, model.device)
        check_group_size(group_size, temperature, cases, self._trie, exclude_seen)

    def generate(self, chosen: Sequence[int], step: int = 0) -> Groups:
        """See `Rollouts`.

        Raises:
            RequestError: if a prompt does not fit the model's positions.
            BackboneError: if the model's scores are not numbers.
        """
        model = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        if self._trie.device != model.device:  # the Trainer moves it after this was made
            self._trie = TrieTensors.of(self.catalog, self.softmax, model.device)
        items = np.full((len(chosen), self.group_size), -1, dtype=np.int64)
        levels = np.zeros((*items.shape, self._trie.num_levels))
        drawn, threshold = np.zeros(items.shape), np.full(len(chosen), -np.inf)
        lengths = [len(self.cases.prompts[case]) for case in chosen]
        # Of a weighted draw also the first item that is not in the group: it says how likely the others were.
        width = self.group_size + int(self.weighted and self.temperature is not None)
        with evaluating(self.model):
            for places in batches(lengths, width * self._trie.num_levels, self._cached_tokens):
                asked = [chosen[place] for place in places]
                found = decode(
                    model,
                    [self.cases.prompts[case] for case in asked],
                    self._trie,
                    width,
                    excluded_rows(self.cases, asked, self.exclude_seen),
                    draws=draws_of(self.temperature, self.seed, step, asked),
                )
                own = slice(0, self.group_size)
                items[places] = found.items[:, own].cpu().numpy()
                levels[places] = found.levels[:, own].double().cpu().numpy()
                if width > self.group_size and found.drawn is not None and found.perturbed is not None:
                    drawn[places] = found.drawn[:, own].cpu().numpy()
                    if found.items.shape[1] == width:
                        threshold[places] = found.perturbed[:, -1].cpu().numpy()
        groups = Groups.of(items, levels, self.catalog)
        if not self.weighted:
            return groups
        draw = () if self.temperature is None else (drawn, threshold)
        return replace(groups, weights=group_weights(levels.sum(axis=2), *draw))


def check_group_size(
    group_size: int, temperature: float | None, cases: "RolloutCases", trie: TrieTensors, exclude_seen: bool
) -> None:
    """Raises RecipeError if groups of this size cannot be made for each of the cases, or drawn at this temperature."""
    if group_size < 2:
        raise RecipeError(f"A group has {group_size} item(s), and items are compared within it. Ask for 2 or more.")
    if temperature is not None and not 0.0 < temperature < float("inf"):
        raise RecipeError(f"The temperature of draws is {temperature}. Give a finite number above 0.")
    if trie.num_items < group_size:
        raise RecipeError(
            f"The catalog has {trie.num_items} items to propose, and a group has {group_size}. Ask for smaller groups."
        )
    if not exclude_seen:
        return
    for case, history in enumerate(cases.histories):
        # Repeats and retired items exclude nothing, but only a long history is worth a closer look.
        if trie.num_items - len(history) < group_size and (left := trie.candidates(history)) < group_size:
            raise RecipeError(
                f"Behind the {len(history)} items of case {case} are {left} items to propose, and a group has "
                f"{group_size}. Ask for smaller groups, or let seen items be proposed."
            )


def excluded_rows(cases: "RolloutCases", chosen: Sequence[int], exclude_seen: bool) -> list[npt.NDArray[np.int64]]:
    """Per case the catalog rows that may not be proposed."""
    nothing = np.zeros(0, dtype=np.int64)
    return [np.asarray(cases.histories[case], dtype=np.int64) if exclude_seen else nothing for case in chosen]


def draw_seed(seed: int, step: int, case: int) -> int:
    """The seed of one case's draw: from 0 to 2^64 - 1, a hash of the three, whatever else is in the batch.

    >>> draw_seed(0, 3, 5) == draw_seed(0, 3, 5) != draw_seed(0, 5, 3)
    True
    """
    words = [seed % 2**64, step, case]
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0])


def draws_of(temperature: float | None, seed: int, step: int, chosen: Sequence[int]) -> list[Draw] | None:
    """The cases' draws; None for beams."""
    if temperature is None:
        return None
    return [Draw(temperature, draw_seed(seed, step, case)) for case in chosen]


def batches(lengths: Sequence[int], width: int, most: int) -> list[list[int]]:
    """Places of prompts in batches of similar length; prompts, padded, and `width` tokens behind each stay in `most`.

    A batch has one prompt at least. Equally long prompts stay in their order.

    >>> batches([3, 9, 4, 3], width=2, most=12)
    [[0, 3], [2], [1]]
    """
    found: list[list[int]] = []
    for place in sorted(range(len(lengths)), key=lambda place: lengths[place]):
        # The newest prompt is the longest, and the batch is padded to it.
        if found and (len(found[-1]) + 1) * (lengths[place] + width) <= most:
            found[-1].append(place)
        else:
            found.append([place])
    return found


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """A model in eval mode; on the way out each of its modules is in the mode that it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
