"""What an encoder learns to think by: ReaRec's ensemble (ERL) and progressive (PRL) learning, OnePiece's tasks.

Sources: ReaRec (arXiv 2503.22675) and OnePiece (arXiv 2509.18091). Each wraps an `ItemLoss`, which says what a query
and its target cost; here is what is asked of which step. Knows neither encoders nor histories.

Shapes: T labelled places, K steps behind r_0, D width.
"""

import itertools
from abc import abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from llmrec.examples import IGNORED
from llmrec.exceptions import BackboneError
from llmrec.losses.full_softmax import CHUNK_SCORES, FullSoftmax, full_softmax_loss
from llmrec.losses.loss import ItemLoss, ItemVectors
from llmrec.losses.products import distinct
from llmrec.losses.sampled_softmax import OwnNegativesSoftmax, SharedNegativesSoftmax
from llmrec.reasoning.divergence import step_divergence
from llmrec.reasoning.tasks import StepTask


class StepQueries(NamedTuple):
    """What a model has to say at T places, ready to be compared with items.

    Attributes:
        served: (T, D) what it will answer with.
        steps: (T, K + 1, D) of each step by itself.
        noised: (T, K, D) of the line of thought that was fed with noise; None: there is none.
        keys: (T, K, D) the clean states 1…K as items are: normalised as they are, not divided by a temperature.
        labels: (T, K) what each step's task asks for, `IGNORED` where nothing; None: the target.
    """

    served: Tensor
    steps: Tensor
    noised: Tensor | None
    keys: Tensor
    labels: Tensor | None


class MadeOnce:
    """The items of one batch, whose table is made once for all steps: of texts it costs as much as a softmax over it.

    Gradients of all that was made of it meet in the one table.
    """

    def __init__(self, items: ItemVectors) -> None:
        self._items = items
        self._table: Tensor | None = None

    @property
    def num_items(self) -> int:
        """N."""
        return self._items.num_items

    def table(self) -> Tensor:
        """See `ItemVectors.table`."""
        if self._table is None:
            self._table = self._items.table()
        return self._table

    def vectors(self, rows: Tensor) -> Tensor:
        """See `ItemVectors.vectors`."""
        return self._items.vectors(rows)


class ReasoningLoss(ItemLoss):
    """An item loss for all steps of thought; of queries without steps it is the wrapped loss.

    Attributes:
        loss: the wrapped one.
        noise: γ, the variance of the noise that a second line of thought is to be fed with; 0 for none.
        tasks: what each step is to find; empty: all of them the target.
    """

    noise: float = 0.0
    tasks: Sequence[StepTask] = ()

    def __init__(self, loss: ItemLoss) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, queries: Tensor, targets: Tensor, items: ItemVectors, weights: Tensor | None = None) -> Tensor:
        """See `ItemLoss.forward`."""
        found: Tensor = self.loss(queries, targets, items, weights)
        return found

    @abstractmethod
    def of_steps(
        self, queries: StepQueries, targets: Tensor, items: ItemVectors, weights: Tensor | None = None
    ) -> Tensor:
        """The weighted sum of the tokens' losses; arguments as of `ItemLoss.forward`, but for the queries."""


class EnsembleLoss(ReasoningLoss):
    """ERL: loss(mean-pooled state) - λ Σ_{i<j} KL(ŷ⁽ⁱ⁾ ‖ ŷ⁽ʲ⁾), i and j from 0 to K: steps shall not all say the same.

    ŷ⁽ᵏ⁾ is the softmax of step k's logits over all items; where the loss samples, over the targets of the batch and as
    many items as the loss draws for one target, drawn anew and each there once.

    Args:
        loss: the wrapped one.
        diversity: λ.

    Raises:
        BackboneError: if λ is negative, or the loss trains no distribution over items (BCE).
    """

    def __init__(self, loss: ItemLoss, diversity: float, chunk_scores: int = CHUNK_SCORES) -> None:
        super().__init__(loss)
        if diversity < 0:
            raise BackboneError(f"The weight of diversity is {diversity}. Give 0 or more.")
        if diversity and not isinstance(loss, FullSoftmax | OwnNegativesSoftmax | SharedNegativesSoftmax):
            raise BackboneError(
                "ERL's diversity compares distributions over items, and the loss judges each item for itself. Take "
                "softmax or sampled_softmax, or the weight 0."
            )
        self.diversity, self.chunk_scores = diversity, chunk_scores

    def of_steps(
        self, queries: StepQueries, targets: Tensor, items: ItemVectors, weights: Tensor | None = None
    ) -> Tensor:
        """See `ReasoningLoss.of_steps`."""
        items = MadeOnce(items)
        found: Tensor = self.loss(queries.served, targets, items, weights)
        if not self.diversity:
            return found
        table = self._candidates(targets, items)
        return found - self.diversity * step_divergence(queries.steps, table, weights, self.chunk_scores)

    def _candidates(self, targets: Tensor, items: ItemVectors) -> Tensor:
        """(C, D) the items that distributions are compared over."""
        if not isinstance(self.loss, OwnNegativesSoftmax | SharedNegativesSoftmax):
            return items.table()
        sampler = self.loss.sampler
        drawn = targets[:0] if sampler is None else sampler.draw(self.loss.num_negatives)
        return items.vectors(distinct(torch.cat((drawn, targets)), items.num_items)[0])


class ProgressiveLoss(ReasoningLoss):
    """PRL: Σ_{k=0…K} loss of r_k at the temperature τ α^(K-k), and a contrast between clean and noised thoughts.

    τ is the model's own temperature. The contrast is Σ_{k=1…K} of InfoNCE: the noised state r̃_k of a place is to find
    the clean r_k of the same place among those of all labelled places of the batch, whatever their targets are,
    compared as queries are with items (the model's similarity and τ). It depends on the batch: smaller batches have
    fewer others. A batch of more than `among` labelled places is cut into equal groups of at most so many, lest the
    contrast, whose cost is the square of their number, takes longer than the softmax over the items.

    Args:
        loss: the wrapped one; of BCE, logits are divided by α^(K-k) too.
        sharpening: α; above 1, early steps are asked to be less sure.
        noise: γ.
        contrast: what the contrast counts; 0: there is none, and nothing is noised.
        among: the most places that are contrasted with each other; by default ReaRec's batch, of one place each.

    Raises:
        BackboneError: for numbers that make no sense.
    """

    def __init__(
        self,
        loss: ItemLoss,
        sharpening: float = 1.0,
        noise: float = 0.01,
        contrast: float = 0.1,
        chunk_scores: int = CHUNK_SCORES,
        among: int = 2048,
    ) -> None:
        super().__init__(loss)
        if not 0 < sharpening < float("inf") or not 0 <= noise < float("inf") or contrast < 0:
            raise BackboneError(
                f"PRL has alpha {sharpening}, noise {noise} and contrast {contrast}. Give a positive alpha, and 0 or "
                "more of the others."
            )
        if contrast and not noise:
            raise BackboneError("PRL contrasts noised thoughts, and the noise is 0. Give some, or the contrast 0.")
        if among < 1:
            raise BackboneError(f"PRL contrasts groups of {among} places. Give 1 or more.")
        self.sharpening, self.contrast, self.chunk_scores = sharpening, contrast, chunk_scores
        self.among = among
        self.noise = noise if contrast else 0.0

    def of_steps(
        self, queries: StepQueries, targets: Tensor, items: ItemVectors, weights: Tensor | None = None
    ) -> Tensor:
        """See `ReasoningLoss.of_steps`."""
        items = MadeOnce(items)
        last = queries.steps.shape[1] - 1
        found: Tensor = queries.steps.new_zeros(())
        for step in range(last + 1):
            softened = queries.steps[:, step] / self.sharpening ** (last - step)
            found = found + self.loss(softened, targets, items, weights)
        if queries.noised is None:
            return found
        if not len(targets):
            return found + 0 * queries.noised.sum()
        for group in self._groups(len(targets)):
            own = torch.arange(group.stop - group.start, device=targets.device)
            some = None if weights is None else weights[group]
            for step in range(last):
                found = found + self.contrast * full_softmax_loss(
                    queries.noised[group, step], own, queries.keys[group, step], some, self.chunk_scores
                )
        return found

    def _groups(self, count: int) -> list[slice]:
        """The places, in as few groups of neighbours as there can be, all of a size or one apart."""
        groups = -(-count // self.among)
        bounds = [group * count // groups for group in range(groups + 1)]
        return [slice(*pair) for pair in itertools.pairwise(bounds)]


class TaskLoss(ReasoningLoss):
    """OnePiece: Σ_{k=1…K} w_k loss(r_k, the item of task k); r_0 is not asked. Without tasks, all ask for the target.

    A task that has no item at a place costs nothing there. All are divided by the number of labelled places, so a
    rare action counts little: its weight can make up for that.

    Args:
        loss: the wrapped one.
        tasks: one for each step; or none.

    Raises:
        BackboneError: if a weight is negative, or none is positive.
    """

    def __init__(self, loss: ItemLoss, tasks: Sequence[StepTask] = ()) -> None:
        super().__init__(loss)
        weights = [task.weight for task in tasks]
        if tasks and (min(weights) < 0 or not max(weights) > 0):
            raise BackboneError(f"The tasks weigh {weights}. Give 0 or more each, and one of them something.")
        self.tasks = tuple(tasks)

    def of_steps(
        self, queries: StepQueries, targets: Tensor, items: ItemVectors, weights: Tensor | None = None
    ) -> Tensor:
        """See `ReasoningLoss.of_steps`."""
        steps = queries.steps.shape[1] - 1
        if self.tasks and len(self.tasks) != steps:
            raise BackboneError(f"There are {len(self.tasks)} tasks for {steps} steps. Give one for each.")
        items = MadeOnce(items)
        found: Tensor = 0 * queries.steps[:, 0].sum()
        for step in range(steps):
            labels = targets if queries.labels is None else queries.labels[:, step]
            asked = labels != IGNORED
            weight = self.tasks[step].weight if self.tasks else 1.0
            some = None if weights is None else weights[asked]
            found = found + weight * self.loss(queries.steps[asked, step + 1], labels[asked], items, some)
        return found
