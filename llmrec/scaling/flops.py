"""Floating-point operations of a training step, counted as matrix products are: 2 m n k of (m, k) by (k, n).

What is counted is what the code computes, not what a formula could do with less:

* A linear layer of P weights costs 2 P a place forwards, and as much again for each of its two gradients: 6 P.
* Softmax attention looks at all S² pairs of a window, as kernels are counted everywhere, though a causal one may skip
  half. Scores and reading cost 2 D each a pair. Backwards that is doubled, and a fused kernel computes the scores once
  more: 4 + 8 D a pair in plain attention, 4 + 10 D in a fused one.
* HSTU's attention takes its queries in runs of 128, each with all keys up to the run's end, and computes the scores
  again for the backward pass: 8 D_qk + 6 D_v a pair.
* The loss over all N items costs 2 N D a target for the scores and as much for each of two gradients: 6 N D. With k
  negatives of its own, 6 (k + 1) D. Shared negatives are multiplied again in the backward pass: 8 k D, and 6 D for the
  target.

Left out: whatever is no matrix product (norms, activations, softmax, look-ups, the optimizer), and the places of
padding, so that what padding costs shows in the utilisation (`llmrec.scaling.throughput`).
"""

from dataclasses import dataclass

from llmrec.scaling.shape import TRANSFORMERS, Shape

HSTU_RUN = 128  # queries of one run of HSTU's attention
HSTU_SCORES = 1 << 20  # scores that a run holds at most


@dataclass(frozen=True)
class Flops:
    """Operations of one window, forwards and backwards.

    Attributes:
        layers: of linear layers, and of recurrences.
        attention: of scores and reading.
        loss: of queries with items.
    """

    layers: float
    attention: float
    loss: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.layers + self.attention + self.loss


def window_flops(shape: Shape) -> Flops:
    """The operations of training on one window of `shape.length` items."""
    return Flops(_layers(shape), _attention(shape), shape.labels * loss_flops(shape))


def loss_flops(shape: Shape) -> float:
    """Of one target's loss."""
    if shape.negatives is None:
        return 6.0 * shape.items * shape.width
    if shape.shared_negatives:
        return (8.0 * shape.negatives + 6.0) * shape.width
    return 6.0 * (shape.negatives + 1) * shape.width


def hstu_pairs(length: float, heads: int) -> float:
    """Pairs of a query and a key that HSTU's attention computes in a window.

    A run's queries meet all keys up to the run's end: with q queries a run, q² (1 + … + n) for the n whole runs, and
    what is left times S.

    >>> hstu_pairs(50, 1), hstu_pairs(300, 2)
    (2500, 62352)
    """
    step = max(1, min(HSTU_RUN, int(HSTU_SCORES // (heads * length))))
    whole = int(length // step)
    return step**2 * whole * (whole + 1) // 2 + (length - whole * step) * length


def _attention(shape: Shape) -> float:
    if shape.encoder == "hstu":
        pairs = shape.depth * hstu_pairs(shape.length, shape.num_heads)
        return pairs * (8.0 * shape.qk_width + 6.0 * shape.v_width)
    if shape.encoder not in TRANSFORMERS:
        return 0.0
    return shape.depth * shape.places**2 * (14.0 if shape.fused else 12.0) * shape.width


def _layers(shape: Shape) -> float:
    width = shape.width
    if shape.encoder == "gru4rec":
        return _recurrence(shape)
    if shape.encoder == "hstu":
        read = 3 * shape.v_width if shape.concat_ua else shape.v_width
        weights = width * ((shape.v_width if shape.gated else 0) + shape.v_width + 2 * shape.qk_width) + read * width
    else:
        weights = (4 if shape.projects else 3) * width**2
        weights += (3 if shape.network == "swiglu" else 2) * width * shape.inner_width
        weights += 2 * width**2 if shape.encoder == "sasrec" and shape.gated else 0
    every = shape.depth * weights + (width**2 if shape.encoder == "bert4rec" else 0)  # and its output layer
    return 6.0 * every * shape.places


def _recurrence(shape: Shape) -> float:
    """Three gates of the input and of the state before; the first state is no variable, so that S - 1 steps hand a
    gradient on."""
    state, length = shape.state, shape.length
    inputs = shape.width + (shape.depth - 1) * state
    layers = 6.0 * 3 * state * inputs * length + shape.depth * 2.0 * 3 * state**2 * (3 * length - 1)
    return layers + (6.0 * state * shape.width * length if state != shape.width else 0.0)
