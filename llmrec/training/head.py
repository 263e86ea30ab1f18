"""The loss of a causal language model at its labelled tokens, computed where its output head stands.

The head is the widest layer, and most of what it makes no loss looks at. Here only hidden states whose next token is
labelled meet it, and, where that is asked for, only the rows of it that spell semantic IDs.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from llmrec.examples import IGNORED
from llmrec.exceptions import BackboneError
from llmrec.training.loss import PIECE, Shape, columns_of, id_range_loss, token_loss

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LossVocabulary = Literal["all", "semantic_ids"]


@dataclass(frozen=True)
class LabelledLoss:
    """The losses of a batch's labelled tokens.

    Attributes:
        total: their sum, which can be differentiated (once); float32, or float64 for a model of that.
        each: (M,) each one's, detached, row by row from left to right.
        places: (M,) where each label lies in the flattened labels (B * T).
    """

    total: Tensor
    each: Tensor
    places: Tensor


class HeadLoss:
    """The loss of a causal language model at the labelled tokens of a batch, wherever its head is.

    For the time of one forward pass, the loss takes the place of the model's output head, inside whatever wraps the
    model (PEFT, DDP, FSDP, DeepSpeed, autocast). The logits' scale and cap are found once, by giving the model a
    ramp in the head's place and looking at what it makes of it. A head that is no plain linear layer (LoRA on it,
    quantised), and logits that are made in any other manner, are computed by the model itself, still at the labelled
    tokens only.
    """

    def __init__(self, model: "PreTrainedModel", token_ids: Sequence[int] | None = None, piece: int = PIECE) -> None:
        """
        Args:
            model: a causal LM, maybe in PEFT's wrapper, but not in DDP's.
            token_ids: the tokens that the softmax is over, in any order; None for the whole vocabulary.
            piece: logits that are held at once.

        Raises:
            BackboneError: if the model has no output head, or `token_ids` is empty or beyond its vocabulary.
        """
        self._model = model
        self._piece = piece
        self._shape: Shape | None = None
        self._probed = False
        head = model.get_output_embeddings()
        if head is None:
            raise BackboneError(
                f"{type(model).__name__} has no output head, so it predicts no tokens. Load it as a causal LM."
            )
        self._token_ids: Tensor | None = None
        if token_ids is not None:
            ids = torch.tensor(sorted(set(token_ids)), dtype=torch.long)
            size = _vocabulary(model)
            if not len(ids) or int(ids[0]) < 0 or int(ids[-1]) >= size:
                raise BackboneError(
                    f"The {len(ids)} tokens of the loss are not all between 0 and {size - 1}, the model's last. "
                    "Extend its embeddings by the catalog's tokens first."
                )
            self._token_ids = ids

    def __call__(self, wrapped: Any, inputs: Mapping[str, Tensor], labels: Tensor) -> LabelledLoss:
        """One forward pass.

        Args:
            wrapped: the model as it is called: itself, or what it was prepared to.
            inputs: its arguments besides the labels.
            labels: (B, T), those of the tokens themselves: the state at t - 1 predicts label t. -100 is none, and the
                first column never counts, because nothing stands before it.
        """
        if not self._probed:
            self._shape, self._probed = self._probe(wrapped, labels.device), True
        # flattened: the label at a place is predicted from the place before it
        places = labels[:, 1:].ne(IGNORED).reshape(-1).nonzero()[:, 0]
        places = places + places.div(max(1, labels.shape[1] - 1), rounding_mode="floor") + 1
        targets = labels.reshape(-1).index_select(0, places)
        plain = self._shape is not None and _plain_head(self._model.get_output_embeddings())
        found: list[Tensor] = []

        def loss(head: Any, original: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
            states = hidden.reshape(-1, hidden.shape[-1]).index_select(0, places - 1)
            if not plain:
                logits: Tensor = original(states[None])
                return logits
            total, each = self._from_head(head, states, targets)
            found.append(each)
            # What the model goes on with, so that wrappers that look at outputs see every weight in use.
            return total.reshape(1, 1, 1)

        with _in_place_of_head(self._model, loss) as answered:
            output = wrapped(**inputs, use_cache=False)
        if found:
            return LabelledLoss(answered[-1].reshape(()), found[0], places)
        total, each = self._from_logits(output.logits[0], targets)
        return LabelledLoss(total, each, places)

    def _from_head(self, head: Any, states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        ids = None if self._token_ids is None else self._token_ids.to(states.device)
        adapter = getattr(head, "token_adapter", None)
        if adapter is None:
            if ids is None:
                return token_loss(states, head.weight, targets, head.bias, self._shape, piece=self._piece)
            return id_range_loss(states, head.weight, targets, ids, head.bias, self._shape, self._piece)
        weight = adapter.base_layer.weight
        (name,) = adapter.active_adapters
        rows = adapter.trainable_tokens_delta[name].to(weight)
        places = torch.tensor(adapter.token_indices[name], device=weight.device)
        if ids is not None:
            columns = torch.searchsorted(ids, places).clamp_(max=len(ids) - 1)
            held = (ids[columns] == places).nonzero()[:, 0]
            weight = weight.index_select(0, ids)
            rows, places, targets = rows.index_select(0, held), columns.index_select(0, held), columns_of(targets, ids)
        if weight.requires_grad:
            weight = weight.index_copy(0, places, rows)
            return token_loss(states, weight, targets, None, self._shape, piece=self._piece)
        weight = weight.index_copy(0, places, rows.detach())
        return token_loss(states, weight, targets, None, self._shape, (rows, places), self._piece)

    def _from_logits(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        if self._token_ids is not None:
            ids = self._token_ids.to(logits.device)
            logits, targets = logits.index_select(1, ids), columns_of(targets, ids)
        exact = torch.float64 if logits.dtype == torch.float64 else torch.float32
        each = torch.nn.functional.cross_entropy(logits.to(exact), targets, reduction="none")
        return each.sum(), each.detach()

    @torch.no_grad()
    def _probe(self, wrapped: Any, device: torch.device) -> Shape | None:
        """What the model does to its head's products; None if that is neither a factor nor a cap."""
        size = _vocabulary(self._model)
        ramp = torch.linspace(-50.0, 50.0, size, device=device, dtype=torch.float64)

        def products(head: Any, original: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
            return ramp.expand(*hidden.shape[:-1], size)

        training = wrapped.training
        wrapped.eval()  # dropout would use up random numbers
        try:
            with _in_place_of_head(self._model, products):
                output = wrapped(input_ids=torch.zeros((1, 1), dtype=torch.long, device=device), use_cache=False)
        finally:
            wrapped.train(training)
        made = output.logits.reshape(-1)
        if made.shape != ramp.shape:
            return None
        cap = getattr(self._model.config.get_text_config(), "final_logit_softcapping", None)
        for shape in (Shape(float(made[-1] / ramp[-1])), Shape(softcap=cap)):
            if torch.allclose(made.double(), shape.apply(ramp.clone()), rtol=1e-5, atol=1e-6):
                # A factor of a ramp in float32 is known to seven places, and 1 is meant to be 1.
                return Shape() if shape.softcap is None and abs(shape.scale - 1) < 1e-6 else shape
        return None


def _vocabulary(model: "PreTrainedModel") -> int:
    """How many rows the model's embeddings have; of a weight that is not gathered yet, DeepSpeed says it."""
    weight = model.get_input_embeddings().weight
    return int(getattr(weight, "ds_shape", weight.shape)[0])


def _plain_head(head: Any) -> bool:
    """Whether the head is a linear layer with weights of its own, or one with some rows trained beside (PEFT)."""
    adapter = getattr(head, "token_adapter", None)
    if adapter is not None:
        if adapter.disable_adapters or adapter.merged or len(adapter.active_adapters) != 1:
            return False
        head = adapter.base_layer
        if getattr(head, "bias", None) is not None:
            return False  # PEFT leaves the bias out there: that is for the model itself to say
        if hasattr(head.weight, "ds_id"):
            return False  # gathered for the layer within, whose forward is not called here
    return (
        isinstance(head, torch.nn.Linear)
        and type(head).forward is torch.nn.Linear.forward
        and head.weight.is_floating_point()
    )


@contextmanager
def _in_place_of_head(
    model: Any, call: Callable[[Any, Callable[[Tensor], Tensor], Tensor], Tensor]
) -> Iterator[list[Tensor]]:
    """Has `call(head, original forward, hidden)` answer for the model's head.

    Yields a list of the head's answers as the model gets them. Hooks may have put nodes of autograd behind an answer
    that gather the head's weight for the backward pass (DeepSpeed's): a loss is to be differentiated through these.
    """
    head = model.get_output_embeddings()
    own = head.__dict__.get("forward")  # accelerate's hooks put one there
    original = head.forward
    head.forward = lambda hidden: call(head, original, hidden)
    answered: list[Tensor] = []
    last = head.register_forward_hook(lambda module, inputs, answer: answered.append(answer))
    try:
        yield answered
    finally:
        last.remove()
        if own is None:
            del head.forward
        else:
            head.forward = own
