"""How many weights a sequence model has, exactly.

With D the width, N the items, S the positions and I the inner width. A layer norm has 2 D weights, an RMS norm D.
"""

from llmrec.scaling.shape import Shape


def parameters(shape: Shape) -> int:
    """Weights of `SequenceModel`: the item table N D, the start vector D, and the encoder's."""
    return shape.items * shape.width + shape.width + encoder_parameters(shape)


def encoder_parameters(shape: Shape) -> int:
    """Weights of the encoder alone; absolute positions are S D where there are any."""
    own = {"hstu": _hstu, "sasrec": _sasrec, "bert4rec": _bert4rec, "gru4rec": _gru, "llama": _llama, "gpt2": _gpt2}
    return own[shape.encoder](shape) + (shape.positions * shape.width if shape.has_positions else 0)


def _bias(shape: Shape) -> int:
    """A number per distance, and one per bucket of time, 0 and the unknown beside the others."""
    by_place = shape.positions if "position" in shape.bias else 0
    return by_place + (shape.time_buckets + 2 if "time" in shape.bias else 0)


def _hstu(shape: Shape) -> int:
    """A layer: U, V, Q, K from D; D from what attention read, with a bias; the relative bias; a norm where it has
    weights (RMS: D, else 2 D; HSTU's own has none). One more norm at the end, unless layers end with theirs.

    With heads that share D, a gate and none of the rest: 4 D² + D² = 5 D² a layer.
    """
    width, values, queries = shape.width, shape.v_width, shape.qk_width
    norm = {"hstu": 0, "llama": width}.get(shape.residual_style, 2 * width)
    read = 3 * values if shape.concat_ua else values
    layer = width * ((values if shape.gated else 0) + values + 2 * queries) + read * width + width
    last = norm if shape.residual_style in ("llama", "sasrec") else 0
    return shape.depth * (layer + _bias(shape) + norm) + last


def _sasrec(shape: Shape) -> int:
    """A block: Q, K, V (3 D²), maybe a matrix behind the heads (D²); the feed-forward network of 2 D I, or 3 D I with
    swiglu, and its biases, which residual "llama" has not; two gates of D² + D; two norms; the relative bias."""
    width, inner, llama = shape.width, shape.inner_width, shape.residual_style == "llama"
    norm = width if llama else 2 * width
    inward = 2 if shape.network == "swiglu" else 1
    network = (inward + 1) * width * inner + (0 if llama else inward * inner + width)
    attention = (4 if shape.projects else 3) * width**2
    gates = 2 * (width**2 + width) if shape.gated else 0
    last = 0 if shape.norm == "post" else norm
    return shape.depth * (attention + network + gates + 2 * norm + _bias(shape)) + last


def _bert4rec(shape: Shape) -> int:
    """A block: 4 (D² + D) of attention, 2 D I + I + D, two norms. Beside them the vector of a hidden item (D), the
    norm of the embedded history, and an output layer of D² + D with its norm."""
    width, inner = shape.width, shape.inner_width
    block = 4 * (width**2 + width) + 2 * width * inner + inner + width + 4 * width
    return shape.depth * block + width + 2 * width + width**2 + width + 2 * width


def _gru(shape: Shape) -> int:
    """A layer of state W: three gates, each of W × (input + W) and two biases. A matrix to D where W is not D."""
    width, state = shape.width, shape.state
    layers = sum(3 * state * ((state if layer else width) + state) + 6 * state for layer in range(shape.depth))
    return layers + (state * width + width if state != width else 0)


def _llama(shape: Shape) -> int:
    """A layer: 4 D² + 3 D I and two RMS norms; one more norm at the end. No biases."""
    width = shape.width
    return shape.depth * (4 * width**2 + 3 * width * shape.inner_width + 2 * width) + width


def _gpt2(shape: Shape) -> int:
    """A layer: 4 (D² + D), 2 D I + I + D, two norms; one more norm at the end."""
    width, inner = shape.width, shape.inner_width
    layer = 4 * (width**2 + width) + 2 * width * inner + inner + width + 4 * width
    return shape.depth * layer + 2 * width
