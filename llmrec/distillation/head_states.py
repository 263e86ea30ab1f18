"""HeadStates: what a language model brings to its output head at the labelled places of a batch."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from llmrec.examples import IGNORED
from llmrec.exceptions import BackboneError
from llmrec.training.head import HeadLoss
from llmrec.training.loss import Shape

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class HeadInput(NamedTuple):
    """M labelled places.

    Attributes:
        states: (M, D), the state that predicts each label.
        targets: (M,) the labels.
        weight: (V, D), the head's.
        bias: (V,), the head's, or None.
        shape: what makes logits of the head's products.
    """

    states: Tensor
    targets: Tensor
    weight: Tensor
    bias: Tensor | None
    shape: Shape


class HeadStates(HeadLoss):
    """Reads a batch with a model that is not trained, and stops in front of its head."""

    def __init__(self, model: "PreTrainedModel") -> None:
        """`model` is put into evaluation mode and gets no gradients."""
        super().__init__(model)
        self.model = model.eval().requires_grad_(False)
        self._held: HeadInput | None = None

    @torch.no_grad()
    def read(self, inputs: Mapping[str, Tensor], labels: Tensor) -> HeadInput:
        """What the head of the model is given.

        Args:
            inputs: the model's arguments.
            labels: (B, T), as for `HeadLoss`.

        Raises:
            BackboneError: if the model makes its logits otherwise than by one linear layer, a factor and a cap.
        """
        self(self.model, inputs, labels)
        held, self._held = self._held, None
        if held is None:
            raise BackboneError(unplain(self.model))
        return held

    def _from_head(self, head: Any, states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        self._held = HeadInput(states, targets, head.weight, head.bias, self._shape or Shape())
        return states.new_zeros(()), states.new_zeros(len(states))

    def _from_logits(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        raise BackboneError(unplain(self.model))


def unplain(model: Any) -> str:
    """Why a model can neither teach nor be taught here."""
    return (
        f"{type(model).__name__} makes its logits otherwise than by one linear layer, so they cannot be computed a "
        "piece at a time. Merge its adapters first, or distil another kind of model."
    )


def predicting_places(labels: Tensor) -> Tensor:
    """(M,) where the states that predict the labels lie in the flattened (B * T), in the order of the labels.

    >>> predicting_places(torch.tensor([[-100, 7, -100], [5, -100, 6]])).tolist()
    [0, 4]
    """
    wanted = torch.zeros_like(labels, dtype=torch.bool)
    wanted[:, :-1] = labels[:, 1:].ne(IGNORED)
    return wanted.reshape(-1).nonzero()[:, 0]
