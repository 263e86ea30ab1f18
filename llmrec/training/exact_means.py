"""ExactMeans: what is measured on the way, summed where it arises, so that means are exact over sets and processes."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmrec.training.ranking import RankingCallback

if TYPE_CHECKING:
    from transformers import Trainer
    from transformers.trainer_utils import EvalLoopOutput
else:
    Trainer = object


class ExactMeans(Trainer):
    """A mixin over `transformers.Trainer`: `compute_loss` adds to sums, and evaluations are told by their means.

    The Trainer's own evaluation averages the means of batches, and gathers predictions that nobody wants here.
    `RankingCallback`s are part of an evaluation: their metrics are logged with it, so that early stopping and the
    choice of the best checkpoint can go by them in any order of the callbacks.

    A trainer says what its sums are (`_zeros`), adds to `_sums[whether it trains]`, and says their means (`_means`).
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._sums = {True: self._zeros(), False: self._zeros()}  # of training, of evaluation

    def _zeros(self) -> Tensor:
        """Sums of nothing, in float64 on the device."""
        raise NotImplementedError

    def _means(self, training: bool) -> dict[str, float]:
        """The means since the last call, over all processes, by name; the sums begin anew."""
        raise NotImplementedError

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> "EvalLoopOutput":
        """The means over the set, and the ranking metrics of an evaluation."""
        self._sums[False] = self._zeros()
        output = super().evaluation_loop(dataloader, description, True, ignore_keys, metric_key_prefix)
        output.metrics.update(
            {f"{metric_key_prefix}_{name}": mean for name, mean in self._means(training=False).items()}
        )
        if metric_key_prefix == "eval":
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, RankingCallback):
                    output.metrics.update(callback.measure(self.model, progress=not self.args.disable_tqdm))
        return output

    def prediction_step(
        self,
        model: Any,
        inputs: dict[str, Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, None, None]:
        """Adds a batch to the sums of the evaluation; there are no predictions."""
        with torch.no_grad(), self.compute_loss_context_manager():
            self.compute_loss(model, self._prepare_inputs(inputs))
        return None, None, None
