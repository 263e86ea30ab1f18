"""Cost: what training a model costs, whatever machine does it: weights, operations, and memory for the backward pass.

Seconds are `llmrec.scaling.throughput`'s, which measures them.
"""

import math
from dataclasses import dataclass

from llmrec.exceptions import DataError
from llmrec.scaling.flops import Flops, window_flops
from llmrec.scaling.language import (
    LanguageShape,
    language_activation_bytes,
    language_parameters,
    row_flops,
    trained_parameters,
)
from llmrec.scaling.memory import activation_bytes
from llmrec.scaling.parameters import encoder_parameters, parameters
from llmrec.scaling.shape import Shape


@dataclass(frozen=True)
class Cost:
    """What a shape costs; made by `cost_of`.

    Attributes:
        shape: whose cost it is.
        parameters: weights in all.
        trained: weights that are trained.
        table: weights of items or words alone, of `parameters`.
        window: operations of one window or row, forwards and backwards.
        flops_per_token: of one event that is learnt.
    """

    shape: Shape | LanguageShape
    parameters: int
    trained: int
    table: int
    window: Flops
    flops_per_token: float

    def flops(self, tokens: float, epochs: float = 1.0) -> float:
        """Operations of a training.

        Args:
            tokens: events that are learnt in an epoch.
            epochs: how often.

        Raises:
            DataError: if there is nothing to train on.
        """
        if not (0 < tokens < math.inf and 0 < epochs < math.inf):
            raise DataError(
                f"{tokens:g} events for {epochs:g} epochs are no training. Give more than 0 of both, and an end."
            )
        return self.flops_per_token * tokens * epochs

    def activation_bytes(self, windows: float) -> float:
        """Bytes that a batch of so many windows or rows keeps for the backward pass."""
        if isinstance(self.shape, LanguageShape):
            return language_activation_bytes(self.shape, windows)
        return activation_bytes(self.shape, windows)

    def state_bytes(self) -> float:
        """Bytes of weights, gradients and Adam's two moments, in float32: 16 a trained weight, 4 a frozen one."""
        return 16.0 * self.trained + 4.0 * (self.held - self.trained)

    @property
    def held(self) -> int:
        """Weights that are in memory: the model's, and an adapter's beside them."""
        adapted = isinstance(self.shape, LanguageShape) and self.shape.lora_rank is not None
        return self.parameters + (self.trained if adapted else 0)


def cost_of(shape: Shape | LanguageShape) -> Cost:
    """The cost of a model of this shape."""
    if isinstance(shape, LanguageShape):
        whole, window = language_parameters(shape), row_flops(shape)
        table = shape.vocabulary * shape.width * (1 if shape.tied else 2)
        return Cost(shape, whole, trained_parameters(shape), table, window, window.total / shape.window_tokens)
    whole, window = parameters(shape), window_flops(shape)
    table = whole - encoder_parameters(shape)
    return Cost(shape, whole, whole, table, window, window.total / shape.window_tokens)
