"""Lessons: how a language model learns from a larger one beside the labels, at the labelled places of a batch.

Of M labelled tokens, P of which spell items, with the cross-entropy CE of the labels:

    logits:  Σ over the P tokens of (1 - α) CE + α T² KL(teacher, student), and CE of the others
    slmrec:  Σ CE + λ_cos / B Σ_k cosine_k + λ_norm / B Σ_k norm_k + λ_ms / (B - 1) Σ_{k < B} CE_k

KL is over the tokens of the catalog, or over the whole vocabulary. cosine_k and norm_k compare the states behind the
k-th of B blocks of layers (`alignment`), and CE_k is the cross-entropy of what the student's own last norm and head
make of its state there. SLMRec (arXiv 2405.17890) has a trained adapter at each of these points; here nothing is
trained that is not served. The sums are divided by M by whoever trains.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from llmrec.distillation.alignment import align
from llmrec.distillation.catalog_tokens import Numbers, translation
from llmrec.distillation.head_states import HeadStates, predicting_places, unplain
from llmrec.distillation.layer_stack import LayerStack
from llmrec.distillation.soft_targets import Direction, LinearTeaching, soft_target_loss
from llmrec.exceptions import BackboneError, DataError
from llmrec.training.head import HeadLoss, LabelledLoss
from llmrec.training.loss import Shape

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# states (m, D), their places (m,) among the labelled ones -> the sum of their cross-entropies, and each of them
Hard = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

_NORMS = ("norm", "ln_f", "final_layer_norm", "norm_f")  # what stands between the last layer and the head


class Lesson(Protocol):
    """One way to learn from a teacher."""

    def prepare(self, inputs: Mapping[str, Tensor], labels: Tensor) -> Any:
        """Reads the batch with the teacher, before the student does."""
        ...

    def watching(self) -> Any:
        """A context in which the student reads the batch."""
        ...

    def loss(
        self, head: Any, shape: Shape, states: Tensor, targets: Tensor, hard: Hard
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The sum to be minimised, the cross-entropies (M,) of all places, and sums to be logged."""
        ...


class TaughtHeadLoss(HeadLoss):
    """The loss of a student at its labelled places: while it is trained its lesson's, else cross-entropy alone."""

    def __init__(
        self,
        model: "PreTrainedModel",
        token_ids: Sequence[int] | None,
        lesson: Lesson,
        precision: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        """
        Args:
            model: the student.
            token_ids: what the softmax of the cross-entropy is over; None: the whole vocabulary.
            lesson: of the teacher.
            precision: makes a context in which the teacher reads as the student does, such as autocast's.
        """
        super().__init__(model, token_ids)
        self._lesson, self._precision = lesson, precision
        self._teaching = False
        self._sums: dict[str, Tensor] = {}
        self._places = 0

    def __call__(self, wrapped: Any, inputs: Mapping[str, Tensor], labels: Tensor) -> LabelledLoss:
        """As `HeadLoss`; what is named `teacher_…` among the inputs is the same batch in the teacher's tokens."""
        own = {name: value for name, value in inputs.items() if not name.startswith("teacher_")}
        if not wrapped.training:
            return super().__call__(wrapped, own, labels)
        other = {name.removeprefix("teacher_"): value for name, value in inputs.items() if name not in own}
        its_labels = other.pop("labels", labels)
        with self._precision():
            self._lesson.prepare(other or own, its_labels)
        self._teaching = True
        try:
            with self._lesson.watching():
                return super().__call__(wrapped, own, labels)
        finally:
            self._teaching = False

    def means(self) -> dict[str, tuple[float, int]]:
        """The sums of the lesson's parts since the last call, and the number of places that they are of."""
        found = {name: (float(value), self._places) for name, value in self._sums.items()}
        self._sums, self._places = {}, 0
        return found

    def _from_head(self, head: Any, states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        if not self._teaching:
            return super()._from_head(head, states, targets)

        def hard(some: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
            return HeadLoss._from_head(self, head, some, targets.index_select(0, places))

        total, each, parts = self._lesson.loss(head, self._shape or Shape(), states, targets, hard)
        self._places += len(states)
        for name, value in parts.items():
            self._sums[name] = self._sums.get(name, torch.zeros_like(value)) + value.detach()
        return total, each

    def _from_logits(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        if self._teaching:
            raise BackboneError(unplain(self._model))
        return super()._from_logits(logits, targets)


@dataclass
class LogitsLesson:
    """The teacher's softmax as soft targets.

    Attributes:
        teacher: reads with the larger model.
        teacher_ids, student_ids: (C,) the tokens of the softmax in either's vocabulary, in one order; None: the whole
            vocabulary, which both share.
        alpha: the share of the soft targets, from 0 to 1.
        temperature: T.
        direction: of the divergence.
    """

    teacher: HeadStates
    teacher_ids: Numbers | None
    student_ids: Numbers | None
    alpha: float = 0.5
    temperature: float = 1.0
    direction: Direction = "forward"

    def prepare(self, inputs: Mapping[str, Tensor], labels: Tensor) -> None:
        """See `Lesson.prepare`."""
        self._read = self.teacher.read(inputs, labels)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """See `Lesson.watching`."""
        yield

    def loss(
        self, head: Any, shape: Shape, states: Tensor, targets: Tensor, hard: Hard
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """See `Lesson.loss`."""
        read, device = self._read, states.device
        everywhere = torch.arange(len(targets), device=device)
        weight, bias = head.weight, head.bias
        its_weight, its_bias, its_states = read.weight, read.bias, read.states
        taught, others = everywhere, everywhere[:0]
        if self.student_ids is not None and self.teacher_ids is not None:
            known = torch.from_numpy(translation(self.teacher_ids, self.student_ids, len(weight))).to(device)[targets]
            taught, others = (known >= 0).nonzero()[:, 0], (known < 0).nonzero()[:, 0]
            places = torch.isin(read.targets, torch.from_numpy(self.teacher_ids).to(device)).nonzero()[:, 0]
            if not torch.equal(read.targets[places], known[taught]):
                raise DataError(
                    f"The teacher's rows of this batch spell {len(places)} codes and the student's {len(taught)}, or "
                    "others. Build both from one split, one mixture and one seed."
                )
            its_states = its_states.index_select(0, places)
            mine, its = (torch.from_numpy(ids).to(device) for ids in (self.student_ids, self.teacher_ids))
            weight, its_weight = weight.index_select(0, mine), its_weight.index_select(0, its)
            bias = None if bias is None else bias.index_select(0, mine)
            its_bias = None if its_bias is None else its_bias.index_select(0, its)
        elif its_weight.shape[0] != weight.shape[0]:
            raise DataError(
                f"The teacher's vocabulary has {its_weight.shape[0]} tokens and the student's {weight.shape[0]}, so a "
                "softmax over all of them cannot be compared. Say --softmax_range semantic_ids."
            )
        soft = soft_target_loss(
            states.index_select(0, taught),
            weight,
            LinearTeaching(its_states, its_weight, its_bias, read.shape),
            self.temperature,
            bias,
            shape,
            direction=self.direction,
        )
        total = self.alpha * soft
        each = torch.empty(len(targets), dtype=soft.dtype, device=device)
        for places, share in ((taught, 1 - self.alpha), (others, 1.0)):
            if len(places) or not len(targets):  # wrappers wait for a gradient of each weight, be it zero
                part, losses = hard(states.index_select(0, places), places)
                total = total + share * part
                each[places] = losses.to(each.dtype)
        return total, each, {"kl": soft}


class HiddenLesson:
    """The teacher's hidden states at several supervision points, and cross-entropy at the student's own (SLMRec)."""

    def __init__(
        self,
        teacher: "PreTrainedModel",
        student: "PreTrainedModel",
        points: Sequence[tuple[int, int]],
        cosine: float,
        norm: float,
        multi_signal: float,
    ) -> None:
        """
        Args:
            teacher, student: of one width and one tokenizer.
            points: (teacher's, student's) numbers of layers (`supervision_points`), ascending; the last are all.
            cosine, norm, multi_signal: λ of each term.

        Raises:
            BackboneError: if the two are of different widths.
        """
        widths = [model.config.get_text_config().hidden_size for model in (teacher, student)]
        if widths[0] != widths[1]:
            raise BackboneError(
                f"The teacher's states have a width of {widths[0]} and the student's of {widths[1]}, so they cannot "
                "be compared. Give the student the teacher's width, or say --method logits."
            )
        self.teacher, self.points = HeadStates(teacher), list(points)
        self.weights = {"cosine": cosine, "norm": norm, "multi_signal": multi_signal}
        self._stacks = LayerStack(teacher), LayerStack(student)
        self._norm = last_norm(self._stacks[1].owner)
        self._checked = False
        self._states: tuple[list[Tensor], list[Tensor]] = ([], [])

    def prepare(self, inputs: Mapping[str, Tensor], labels: Tensor) -> None:
        """See `Lesson.prepare`."""
        self._places = predicting_places(labels)
        with caught_states(self._stacks[0], [own for own, _ in self.points]) as caught:
            self.teacher.read(inputs, labels)
        self._theirs = [_at(one, self._places) for one in caught]

    @contextmanager
    def watching(self) -> Iterator[None]:
        """See `Lesson.watching`."""
        with caught_states(self._stacks[1], [own for _, own in self.points]) as caught:
            self._ours = caught
            yield

    def loss(
        self, head: Any, shape: Shape, states: Tensor, targets: Tensor, hard: Hard
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """See `Lesson.loss`."""
        everywhere = torch.arange(len(targets), device=states.device)
        own = [_at(one, self._places) for one in self._ours]
        if not self._checked:
            self._check(own[-1], states)
        total, each = hard(states, everywhere)
        pairs = [align(mine, theirs) for mine, theirs in zip(own, self._theirs, strict=True)]
        parts = {
            "cosine": torch.stack([pair.cosine for pair in pairs]).mean(),
            "norm": torch.stack([pair.norm for pair in pairs]).mean(),
        }
        if len(own) > 1 and self.weights["multi_signal"]:
            signals = [hard(self._norm(mine), everywhere)[0] for mine in own[:-1]]
            parts["multi_signal"] = torch.stack(signals).mean()
        for name, part in parts.items():
            total = total + self.weights[name] * part
        return total, each, parts

    def _check(self, last: Tensor, states: Tensor) -> None:
        """Whether the norm is what stands between layers and head."""
        with torch.no_grad():
            same = torch.allclose(self._norm(last).float(), states.float(), rtol=1e-3, atol=1e-4)
        if not same:
            raise BackboneError(
                f"Between the layers of {type(self._stacks[1].model).__name__} and its head stands more than its last "
                "norm, so its hidden states cannot be read as the head reads them. Say --method logits."
            )
        self._checked = True


def last_norm(owner: nn.Module) -> nn.Module:
    for name in _NORMS:
        held = getattr(owner, name, None)
        if isinstance(held, nn.Module):
            return held
    raise BackboneError(
        f"{type(owner).__name__} has no last norm by any of the names {', '.join(_NORMS)}, so what the head would "
        "make of a layer's states is not known. Say --method logits."
    )


@contextmanager
def caught_states(stack: LayerStack, counts: Sequence[int]) -> Iterator[list[Tensor]]:
    """What the first `counts` layers made when the model ran last: a list in their order, empty before it ran."""
    caught: list[Tensor] = []

    def keep(place: int) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if place == 0:
                caught.clear()
            caught.append(output[0] if isinstance(output, tuple) else output)

        return hook

    hooks = [stack.layers[count - 1].register_forward_hook(keep(place)) for place, count in enumerate(counts)]
    try:
        yield caught
    finally:
        for hook in hooks:
            hook.remove()


def _at(states: Tensor, places: Tensor) -> Tensor:
    """(B, T, D) -> (M, D)."""
    return states.reshape(-1, states.shape[-1]).index_select(0, places)
