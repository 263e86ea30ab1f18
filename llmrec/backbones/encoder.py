"""SequenceEncoder: the one interface of all models that read a history of items as vectors.

An encoder knows neither items nor losses: it turns item representations into hidden states. Item tables, events and
scores are `llmrec.sequence.model`'s.
"""

from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from llmrec.exceptions import BackboneError

if TYPE_CHECKING:
    from llmrec.backbones.reasoning_branches import Branches

# Unix seconds are int64, exact on every device; this one stands for a time that nobody knows.
UNKNOWN_TIME = torch.iinfo(torch.int64).min


class SequenceEncoder(PreTrainedModel):
    """Item representations -> hidden states.

    Every encoder keeps these promises, which `tests/backbones/test_encoders.py` holds each to:

    * What stands at padded places (mask false) is never used, not even a NaN; hidden states there are zeros.
    * Padding may stand on the left or on the right, and changes no hidden state.
    * A causal encoder's state at a place depends on that place and those before it alone.
    * A row without any item gives zeros and no NaN, forwards and backwards.
    * `save_pretrained` and `from_pretrained` give the same states, and `AutoModel` knows the model after `register()`
      of its module.

    Attributes:
        causal: whether a state knows only its own place and those before. If not, the model is trained by hiding items
            (cloze) and `hide` is there.
    """

    causal: ClassVar[bool] = True
    main_input_name = "representations"

    @abstractmethod
    def forward(
        self,
        representations: Tensor,
        mask: Tensor | None = None,
        timestamps: Tensor | None = None,
        actions: Tensor | None = None,
        domains: Tensor | None = None,
        next_timestamps: Tensor | None = None,
    ) -> Tensor:
        """The state after every item of a history.

        Args:
            representations: (B, S, D), oldest first.
            mask: (B, S), true where there is an item; None: no padding.
            timestamps: (B, S) int64 unix seconds, `UNKNOWN_TIME` where unknown; None: all unknown. Encoders that do
                not look at times ignore them.
            actions: (B, S) int64 numbers of what was done; most encoders ignore them, because events are part of the
                representations already.
            domains: (B, S) int64 numbers of domains, likewise.
            next_timestamps: (B, S) when the item after each place was taken, or is asked for: what a relative time
                bias may count from instead of the place's own time. None: it counts from the place's own.

        Returns:
            (B, S, D), zeros at padded places.

        Raises:
            BackboneError: if a history has more items than the encoder has positions for.
        """

    def hide(self, representations: Tensor, hidden: Tensor) -> Tensor:
        """Puts the mask's own vector where `hidden` (B, S) is true; for encoders that are not causal.

        Raises:
            BackboneError: if the encoder is causal.
        """
        raise BackboneError(
            f"{type(self).__name__} is causal and hides no items. Train it to predict each next item instead."
        )

    def states_at(
        self,
        places: Tensor,
        representations: Tensor,
        mask: Tensor | None = None,
        timestamps: Tensor | None = None,
        actions: Tensor | None = None,
        domains: Tensor | None = None,
        next_timestamps: Tensor | None = None,
    ) -> Tensor:
        """(B, P, D) the states of `forward` at some places (B, P) int64 alone; further arguments are `forward`'s."""
        states: Tensor = self(representations, mask, timestamps, actions, domains, next_timestamps)
        return states.gather(1, places[..., None].expand(-1, -1, states.shape[-1]))

    def branches(
        self,
        places: Tensor,
        representations: Tensor,
        mask: Tensor,
        timestamps: Tensor | None = None,
        next_timestamps: Tensor | None = None,
    ) -> "tuple[Tensor, Branches]":
        """The states (B, S, D) of `forward`, and a branch of thought behind each of some places.

        Args:
            places: (B, P) int64 columns 0..S - 1; a branch at padding thinks of nothing.
            representations, mask, timestamps, next_timestamps: as in `forward`.

        Raises:
            BackboneError: if this encoder cannot go on from what it has read.
        """
        raise BackboneError(
            f"{type(self).__name__} reads a history to both sides, so nothing can be thought behind it unless it is "
            "all read again. Reason with an encoder that is causal."
        )


def check_length(config: PreTrainedConfig, length: int, mask: Tensor | None) -> None:
    """Raises BackboneError if a history has more items than `config.max_position_embeddings`.

    Args:
        config: of an encoder.
        length: S, padding included.
        mask: (B, S) or None for no padding.
    """
    limit = config.max_position_embeddings
    if length > limit and (longest := length if mask is None else int(mask.sum(dim=1).max())) > limit:
        raise BackboneError(
            f"A history holds {longest} items, and this {config.model_type} has positions for {limit}. "
            f"Keep its last {limit}."
        )


def places_of(mask: Tensor) -> Tensor:
    """(B, S) each item's place in its own history, counted from 0 without padding; 0 at leading padding.

    >>> places_of(torch.tensor([[False, True, True], [True, True, False]]))
    tensor([[0, 0, 1],
            [0, 1, 1]])
    """
    places: Tensor = (mask.cumsum(dim=1) - 1).clamp_min(0)
    return places
