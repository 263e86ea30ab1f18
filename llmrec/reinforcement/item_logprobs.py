"""The log-probabilities of several items after one prompt, with gradients.

Two layouts give the same numbers:

* repeated: (B * J, P + A), each item behind a prompt of its own.
* branches: (B, P + J * A), each prompt once and the items behind it side by side, of which each sees the prompt and
  itself alone. What long prompts cost, they cost once.

B cases, J items of each, P tokens of the longest prompt, A of the longest item.
"""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from llmrec.catalog import Catalog, Softmax
from llmrec.decoding import pad_left
from llmrec.exceptions import BackboneError

Layout = Literal["auto", "repeated", "branches"]


class ItemLogProbs:
    """Log-probabilities of items as the recommender scores them: the sum over an item's tokens.

    Attributes:
        layout: "repeated" or "branches".
        reason: why.
    """

    def __init__(self, model: Any, catalog: Catalog, softmax: Softmax = "vocabulary", layout: Layout = "auto") -> None:
        """
        Args:
            model: a causal LM, maybe in PEFT's wrapper, but not in DDP's.
            catalog: with token ids.
            softmax: what probabilities are over, the artefact's `Settings.softmax`.
            layout: "auto" takes branches if the model's attention takes their mask, which is tried out.

        Raises:
            BackboneError: if there is no such layout, or branches are asked for of an attention that takes no mask.
            CatalogError: if there is no such softmax for these items.
        """
        if layout not in get_args(Layout):
            raise BackboneError(f"The layout {layout!r} is not known. Choose {', '.join(get_args(Layout))}.")
        ids = catalog.softmax_tokens(softmax)
        self._range = None if ids is None else torch.from_numpy(ids)
        self._tokens = catalog.item_tokens
        self._config = model.config
        self.layout: str = layout
        self.reason = "it was asked for"
        if layout == "auto":
            self.layout, self.reason = self._chosen(model)
        elif layout == "branches" and not self._takes_masks():
            raise BackboneError(
                f"{self._config._attn_implementation} takes no mask of branches. Choose the layout 'repeated', or "
                "attn_implementation 'sdpa'."
            )

    def batch(self, prompts: Sequence[Sequence[int]], items: npt.NDArray[np.integer]) -> dict[str, Tensor]:
        """The tensors of B prompts and their items (B, J), for `__call__`.

        Returns:
            `input_ids` and `mask` (B, P), padded on the left; `answers` (B, J, A), -1 behind an item's end.
        """
        tokens, mask, _ = pad_left(prompts, torch.device("cpu"))
        answers = torch.from_numpy(self._tokens[items])
        width = int((answers >= 0).sum(dim=2).max())
        return {"input_ids": tokens, "mask": mask, "answers": answers[:, :, :width].contiguous()}

    def __call__(self, wrapped: Any, batch: dict[str, Tensor]) -> Tensor:
        """(B, J) log-probabilities, float32, or float64 of a model of that.

        Args:
            wrapped: the model as it is called: itself, or what it was prepared to.
            batch: of `batch`, on the model's device.
        """
        return _gathered(self.logits(wrapped, batch), batch["answers"], self._range)

    def logits(self, wrapped: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """What each token is chosen by: the logits of the first tokens, and (B, J, A - 1, V) those of the others.

        The former are (B, J, 1, V), or (B, 1, 1, V) of branches, whose items all begin behind one prompt. Arguments as
        `__call__`'s.
        """
        return self._branches(wrapped, batch) if self.layout == "branches" else self._repeated(wrapped, batch)

    def _repeated(self, wrapped: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The logits (B, J, 1, V) of each item's first token, and (B, J, A - 1, V) of the others."""
        mask, answers = batch["mask"], batch["answers"]
        (cases, items, width), length = answers.shape, mask.shape[1]
        repeated = {name: batch[name].repeat_interleave(items, dim=0) for name in ("input_ids", "mask")}
        own = answers.reshape(cases * items, width)
        mask = torch.cat([repeated["mask"], (own >= 0).long()], dim=1)
        logits = wrapped(
            input_ids=torch.cat([repeated["input_ids"], own.clamp(min=0)], dim=1),
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            logits_to_keep=torch.arange(length - 1, length + width - 1, device=mask.device),
            use_cache=False,
        ).logits
        found = logits.reshape(cases, items, width, -1)
        return found[:, :, :1], found[:, :, 1:]

    def _branches(self, wrapped: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The logits (B, 1, 1, V) of all items' first tokens, and (B, J, A - 1, V) of the others."""
        mask, answers = batch["mask"], batch["answers"]
        (cases, items, width), length, device = answers.shape, mask.shape[1], mask.device
        steps = torch.arange(width, device=device)
        lengths = mask.sum(1, keepdim=True)  # (B, 1)
        positions = torch.cat([(mask.cumsum(1) - 1).clamp(min=0), lengths + steps.repeat(items)], dim=1)
        # Each item's last token predicts nothing.
        places = length + width * torch.arange(items, device=device)[:, None] + steps[:-1]  # (J, A - 1)
        logits = wrapped(
            input_ids=torch.cat([batch["input_ids"], answers.clamp(min=0).reshape(cases, -1)], dim=1),
            attention_mask=self._attention(wrapped, _sight(mask.bool(), items, width)),
            position_ids=positions,
            logits_to_keep=torch.cat([places.new_tensor([length - 1]), places.reshape(-1)]),
            use_cache=False,
        ).logits
        first, others = logits[:, :1, None], logits[:, 1:]
        return first, others.reshape(cases, items, width - 1, logits.shape[-1])

    def _attention(self, wrapped: Any, sight: Tensor) -> Tensor:
        """(B, T, T) of what sees what as the model's attention takes it: (B, 1, T, T)."""
        if self._config._attn_implementation == "sdpa":
            return sight[:, None]
        dtype = next(wrapped.parameters()).dtype
        dtype = dtype if dtype.is_floating_point else torch.float32
        added = torch.zeros(sight.shape, dtype=dtype, device=sight.device)
        return added.masked_fill_(~sight, torch.finfo(dtype).min)[:, None]

    def _takes_masks(self) -> bool:
        return self._config._attn_implementation in ("sdpa", "eager")

    @torch.no_grad()
    def _chosen(self, model: Any) -> tuple[str, str]:
        """A layout, and the reason for it; both are tried on a few tokens."""
        if not self._takes_masks():
            return "repeated", f"{self._config._attn_implementation} takes no mask of branches"
        if _has_window(self._config.get_text_config()):
            return "repeated", "its attention has a window, which branches would stretch"
        if any(one.is_meta or hasattr(one, "ds_id") for one in model.parameters()):
            return "repeated", "its parameters are not here yet, so that branches cannot be tried"
        first = [int(token) for token in self._tokens[0] if token >= 0]
        prompts = [first * 2, first[:1]]
        rows = np.arange(2 * 3).reshape(2, 3) % len(self._tokens)
        batch = {name: one.to(model.device) for name, one in self.batch(prompts, rows).items()}
        training = model.training
        model.eval()
        try:
            one = _gathered(self._branches(model, batch), batch["answers"], self._range)
            other = _gathered(self._repeated(model, batch), batch["answers"], self._range)
        finally:
            model.train(training)
        rounding = 1e-4 if next(model.parameters()).dtype in (torch.float32, torch.float64) else 3e-2
        if (one - other).abs().max() > rounding * other.abs().max():
            return "repeated", f"{type(model).__name__} lets branches look at one another"
        return "branches", "each prompt is run once"


def _sight(mask: Tensor, items: int, width: int) -> Tensor:
    """(B, T, T) which places see which others: prompts causally, branches the prompt and their own beginning."""
    length, device = mask.shape[1], mask.device
    causal = torch.ones((length, length), dtype=torch.bool, device=device).tril()
    own = torch.ones((width, width), dtype=torch.bool, device=device).tril()
    total = length + items * width
    sight = torch.zeros((len(mask), total, total), dtype=torch.bool, device=device)
    sight[:, :length, :length] = causal & mask[:, None]
    sight[:, length:, :length] = mask[:, None]
    sight[:, length:, length:] = torch.block_diag(*[own.float()] * items).bool()
    # Padding sees itself: a softmax over nothing is no number.
    return sight | torch.eye(total, dtype=torch.bool, device=device)


def _gathered(logits: tuple[Tensor, Tensor], answers: Tensor, ids: Tensor | None) -> Tensor:
    """(B, J) sums of the answers' log-probabilities, of logits of their first and of their other tokens."""
    kept = answers >= 0
    targets = answers.clamp(min=0)
    if ids is not None:
        ids = ids.to(answers.device)
        targets = torch.searchsorted(ids, targets).clamp_(max=len(ids) - 1)
    found = []
    for part, wanted in zip(logits, (targets[:, :, :1], targets[:, :, 1:]), strict=True):
        own = part if ids is None else part.index_select(-1, ids)
        own = own if own.dtype == torch.float64 else own.float()
        if own.shape[1] == 1:  # one row of logits serves all items: the sum over its words is made once
            at_target = own[:, 0].gather(2, wanted.transpose(1, 2)).transpose(1, 2)
        else:
            at_target = own.gather(3, wanted[..., None])[..., 0]
        found.append(at_target - own.logsumexp(dim=3))
    return torch.cat(found, dim=2).masked_fill(~kept, 0.0).sum(dim=2)


def _has_window(config: Any) -> bool:
    """Whether some layer looks back but a stretch of the tokens."""
    kinds = set(getattr(config, "layer_types", None) or ())
    if kinds:
        return kinds != {"full_attention"}
    return getattr(config, "sliding_window", None) is not None
