"""How a sequence model learns from a teacher beside the labels: from its softmax over items, or its hidden states.

Of the labels of a batch, P of which have soft targets, with their hard loss:

    logits:  Σ over the P of (1 - α) hard + α T² KL(teacher, student) over all items, and hard of the others
    slmrec:  Σ hard + λ_cos / B Σ_k cosine_k + λ_norm / B Σ_k norm_k + λ_ms / (B - 1) Σ_{k < B} hard_k

as `lessons` says it of language models; `hard_k` is the hard loss of the queries that the encoder's own last norm
makes of the state behind the k-th block of layers.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor, nn

from llmrec.backbones.jagged import with_padding
from llmrec.distillation.alignment import align
from llmrec.distillation.layer_stack import LayerStack
from llmrec.distillation.lessons import caught_states, last_norm
from llmrec.distillation.soft_targets import Direction, LinearTeaching, Teaching, soft_target_loss
from llmrec.examples import IGNORED
from llmrec.exceptions import BackboneError
from llmrec.losses.loss import ItemLoss, ItemVectors

if TYPE_CHECKING:
    from llmrec.distillation.item_distributions import ItemDistributions
    from llmrec.sequence.model import SequenceModel

# queries (T, D), weights (T,) or None -> the hard losses' sum
Hard = Callable[[Tensor, Tensor | None], Tensor]
_OF_THE_LOSS = ("labels", "weights", "first_items", "asked")


class ItemLesson(Protocol):
    """One way to learn from a teacher."""

    def prepare(self, inputs: Mapping[str, Tensor]) -> None:
        """Looks at a batch of windows before the student reads it."""
        ...

    def watching(self) -> Any:
        """A context in which the student reads the batch."""
        ...

    def loss(
        self, queries: Tensor, items: ItemVectors, weights: Tensor | None, hard: Hard
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum to be minimised at the labelled places, and sums to be logged."""
        ...


class TaughtItemLoss(ItemLoss):
    """A hard loss with a lesson beside it, for batches that the lesson was prepared for."""

    def __init__(self, hard: ItemLoss, lesson: ItemLesson) -> None:
        super().__init__()
        self.hard, self.lesson = hard, lesson
        self.sums: dict[str, Tensor] = {}
        self.places = 0

    def forward(self, queries: Tensor, targets: Tensor, items: ItemVectors, weights: Tensor | None = None) -> Tensor:
        """See `ItemLoss.forward`."""

        def hard(some: Tensor, counts: Tensor | None) -> Tensor:
            found: Tensor = self.hard(some, targets, items, counts)
            return found

        total, parts = self.lesson.loss(queries, items, weights, hard)
        self.places += len(queries)
        for name, value in parts.items():
            self.sums[name] = self.sums.get(name, torch.zeros_like(value)) + value.detach()
        return total


class _Soft:
    """Soft targets over all items; whose, the subclass says."""

    def __init__(self, alpha: float, temperature: float, direction: Direction = "forward") -> None:
        self.alpha, self.temperature, self.direction = alpha, temperature, direction
        self._teaching: Teaching | None = None
        self._taught: Tensor | None = None  # (T,) which labels have soft targets; None: all

    @contextmanager
    def watching(self) -> Iterator[None]:
        """See `ItemLesson.watching`."""
        yield

    def loss(
        self, queries: Tensor, items: ItemVectors, weights: Tensor | None, hard: Hard
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See `ItemLesson.loss`."""
        assert self._teaching is not None
        exact = torch.promote_types(queries.dtype, torch.float32)
        counts = queries.new_ones(len(queries), dtype=exact) if weights is None else weights.to(exact)
        taught = self._taught
        if taught is None:
            taught = torch.ones(len(queries), dtype=torch.bool, device=queries.device)
        soft = soft_target_loss(
            queries[taught],
            items.table(),
            self._teaching,
            self.temperature,
            weights=counts[taught],
            direction=self.direction,
        )
        rest = hard(queries, counts.where(~taught, (1 - self.alpha) * counts))
        parts = {"kl": soft}
        if self._taught is not None:
            parts["taught"] = taught.sum()  # logged as the share of the labels that the mean of kl is made of
        return rest + self.alpha * soft, parts


class TeacherLesson(_Soft):
    """A larger sequence model's exact softmax over all items."""

    def __init__(
        self, teacher: "SequenceModel", alpha: float, temperature: float, direction: Direction = "forward"
    ) -> None:
        """`teacher` is put into evaluation mode and gets no gradients; it reads the student's own windows."""
        super().__init__(alpha, temperature, direction)
        self.teacher = teacher.eval().requires_grad_(False)

    @torch.no_grad()
    def prepare(self, inputs: Mapping[str, Tensor]) -> None:
        """See `ItemLesson.prepare`."""
        queries = self.teacher(**_read(inputs))[inputs["labels"] != IGNORED]
        self._teaching = LinearTeaching(queries, self.teacher.table())


class TableLesson(_Soft):
    """Distributions over items that were computed beforehand (`ItemDistributions`)."""

    def __init__(self, distributions: "ItemDistributions", alpha: float, temperature: float) -> None:
        """Batches tell by `asked` (B, S) which interaction each label is (`AskedWindows`)."""
        super().__init__(alpha, temperature)
        self.distributions = distributions

    def prepare(self, inputs: Mapping[str, Tensor]) -> None:
        """See `ItemLesson.prepare`."""
        asked = inputs["asked"][inputs["labels"] != IGNORED]
        self._teaching, self._taught = self.distributions.at(asked)


class HiddenItemLesson:
    """A deeper sequence model's hidden states at several supervision points (SLMRec, arXiv 2405.17890)."""

    def __init__(
        self,
        teacher: "SequenceModel",
        student: "SequenceModel",
        points: Sequence[tuple[int, int]],
        cosine: float,
        norm: float,
        multi_signal: float,
    ) -> None:
        """
        Args:
            teacher, student: of one width, told the same of events.
            points: (teacher's, student's) numbers of layers (`supervision_points`), ascending; the last are all.
            cosine, norm, multi_signal: λ of each term.

        Raises:
            BackboneError: if the two are of different widths.
        """
        self.teacher, self.student = teacher.eval().requires_grad_(False), student
        self.points = list(points)
        self.weights = {"cosine": cosine, "norm": norm, "multi_signal": multi_signal}
        self._stacks = LayerStack(teacher), LayerStack(student)
        self._norm = last_norm(self._stacks[1].owner)
        self._outward = _outward(student, self._stacks[1].owner)
        widths = [int(cast("Any", stack.owner).config.hidden_size) for stack in self._stacks]
        if widths[0] != widths[1]:
            raise BackboneError(
                f"The teacher's states have a width of {widths[0]} and the student's of {widths[1]}, so they cannot "
                "be compared. Give the student the teacher's width, or say --method logits."
            )

    def prepare(self, inputs: Mapping[str, Tensor]) -> None:
        """See `ItemLesson.prepare`."""
        self._places = inputs["labels"] != IGNORED
        with torch.no_grad(), _caught_at(self.teacher, self._stacks[0], [one for one, _ in self.points]) as states:
            self.teacher(**_read(inputs))
            self._theirs = states(self._places)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """See `ItemLesson.watching`."""
        with _caught_at(self.student, self._stacks[1], [one for _, one in self.points]) as self._ours:
            yield

    def loss(
        self, queries: Tensor, items: ItemVectors, weights: Tensor | None, hard: Hard
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See `ItemLesson.loss`."""
        total = hard(queries, weights)
        own = self._ours(self._places)
        pairs = [align(mine, theirs) for mine, theirs in zip(own, self._theirs, strict=True)]
        parts = {
            "cosine": torch.stack([pair.cosine for pair in pairs]).mean(),
            "norm": torch.stack([pair.norm for pair in pairs]).mean(),
        }
        if len(own) > 1 and self.weights["multi_signal"]:
            early = [self.student.queries(self._outward(self._norm(mine))) for mine in own[:-1]]
            parts["multi_signal"] = torch.stack([hard(one, weights) for one in early]).mean()
        for name, part in parts.items():
            total = total + self.weights[name] * part
        return total, parts


def _read(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What of a batch a model reads, without what a loss is made of."""
    return {name: value for name, value in inputs.items() if name not in _OF_THE_LOSS}


def _outward(model: "SequenceModel", owner: nn.Module) -> nn.Module:
    """What an encoder makes of its normalised states; raises BackboneError where that is not known."""
    if owner is model.encoder:
        return nn.Identity()
    if owner is getattr(model.encoder, "body", None):
        outward: nn.Module = model.encoder.outward
        return outward
    raise BackboneError(
        f"{type(model.encoder).__name__} does more than its layers do, so what it would make of a layer's states is "
        "not known. Say --method logits."
    )


@contextmanager
def _caught_at(
    model: "SequenceModel", stack: LayerStack, counts: Sequence[int]
) -> Iterator[Callable[[Tensor], list[Tensor]]]:
    """While the model reads a batch once, what its first `counts` layers make of it, at given places of the items."""
    laid_out: list[Any] = []
    hook = model.layout.register_forward_hook(lambda module, inputs, output: laid_out.append(output))

    def at(places: Tensor) -> list[Tensor]:
        tokens, found = laid_out[-1], []
        for states in caught:
            if states.dim() == 2:  # without padding
                states = with_padding(states, tokens.mask.bool())
            if tokens.reads is not None:
                states = states.gather(1, tokens.reads[..., None].expand(-1, -1, states.shape[-1]))
            found.append(states[places])
        return found

    try:
        with caught_states(stack, counts) as caught:
            yield at
    finally:
        hook.remove()
