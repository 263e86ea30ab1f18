"""Bytes that a training step keeps between its forward and its backward pass, beside weights and optimizer.

Counted are the distinct tensors that autograd holds, in float32, of windows without padding. A number for each place
of a window and each of D channels is a "vector" below. Autocast keeps some of them in half the bytes. Scalars of a
place (norms' deviations, masks, rows of items) are counted as far as they add up.

A layer keeps, each line in vectors of D unless it says otherwise:

* a layer norm: its input; an RMS norm: its input and that divided by its size; either way the output, as the input of
  the linear layers behind;
* dropout: its mask, of four bytes a number on a CPU and of one on a GPU;
* softmax attention: queries, keys, values; what was read, if it is fused or a matrix follows; if it is not fused, the
  weights of all heads and pairs, H S numbers a place, and with dropout on them their mask and their product;
* HSTU's attention: the product U V Q K before and behind its SiLU; what was read, and that normalised; what enters the
  last matrix, with its dropout mask; no scores;
* a feed-forward network of I: one I for relu, whose output says what it did; two for gelu, five for gpt2's gelu of
  elementary functions; four for swiglu;
* a gate: the sigmoid and what it multiplies;
* a step of a gated recurrent unit: seven of the state, in torch's own CPU code.
"""

from llmrec.scaling.shape import Shape

NUMBER = 4  # bytes of a float32
ROW = 8  # bytes of an int64


def activation_bytes(shape: Shape, windows: float = 1) -> float:
    """Bytes kept for the backward pass of a batch of `windows` windows of `shape.length` items.

    The full softmax, whose gradients are made in the forward pass, keeps them: N D for the items, once a batch.
    """
    numbers = {"hstu": _hstu, "gru4rec": _gru}.get(shape.encoder, _transformer)(shape)
    # Item rows, the mask of histories, and where labels stand.
    every = windows * shape.places * (NUMBER * numbers + 2 * ROW + 2)
    if shape.encoder == "sasrec" and "time" in shape.bias:
        every += windows * shape.places**2 * ROW  # the buckets, alike in all layers
    if shape.encoder == "sasrec" and "rope" in shape.bias:
        # Cosines and sines of half a head, for queries and for keys, alike in all windows.
        every += shape.depth * shape.places * NUMBER * 2 * shape.width / shape.num_heads
    return every + _loss(shape, windows * shape.labels)


def dropped(shape: Shape, numbers: float) -> float:
    """What a dropout of so many numbers keeps, in numbers of four bytes."""
    return (numbers if shape.device == "cpu" else numbers / NUMBER) if shape.dropout else 0.0


def attention_numbers(
    heads: int, places: float, read: float, kept: float, fused: bool, drops: bool, mask: float
) -> float:
    """What softmax attention keeps a place.

    Args:
        heads: H.
        places: S.
        read: width of what was read.
        kept: widths of queries, keys and values together.
        fused: whether it is one kernel.
        drops: whether weights are dropped.
        mask: numbers of four bytes that a dropout mask takes for one.
    """
    if fused:
        return kept + read + heads
    return kept + heads * places * ((2 + mask) if drops else 1)


def network_numbers(network: str, inner: float, composed: bool) -> float:
    """What a feed-forward network keeps a place; `composed` where gelu is made of elementary functions."""
    if network == "swiglu":
        return 4 * inner
    return inner if network == "relu" else (5 if composed else 2) * inner


def _hstu(shape: Shape) -> float:
    width, values = shape.width, shape.v_width
    product = (values if shape.gated else 0) + values + 2 * shape.qk_width
    rms = shape.residual_style == "llama"
    read = 3 * values if shape.concat_ua else values
    layer: float = 2 * width + 2 + (width if rms else 0) + 2 * product + values + 2
    # What the gate multiplies, what enters the last matrix, and the mask in between.
    layer += (values if shape.gated else 0) + read + dropped(shape, read)
    if shape.score == "softmax":
        layer += shape.qk_width + shape.num_heads  # queries divided by √D_qk, and the sums of weights
    if "rope" in shape.bias:
        # Queries and keys turned, and their angles' cosines and sines; divided queries are turned instead.
        layer += (1 if shape.score == "softmax" else 2) * shape.qk_width + 2 * shape.qk_width / shape.num_heads
    last = {"llama": 2 * width, "sasrec": width}.get(shape.residual_style, 0)
    return shape.depth * layer + last + dropped(shape, width)


def _transformer(shape: Shape) -> float:
    width = shape.width
    rms = shape.encoder == "llama" or (shape.encoder == "sasrec" and shape.residual_style == "llama")
    norm = 3 * width + 1 if rms else 2 * width + 2
    mask = dropped(shape, 1)
    layer = 2 * norm + network_numbers(shape.network, shape.inner_width, shape.encoder == "gpt2")
    layer += attention_numbers(
        shape.num_heads, shape.places, width, 3 * width, shape.fused, shape.drops_attention, mask
    )
    if not shape.fused and shape.projects:
        layer += width  # what was read, which the matrix behind keeps
    if shape.encoder != "llama":
        layer += 2 * dropped(shape, width)
    if shape.encoder == "sasrec" and shape.gated:
        layer += 4 * width
    if shape.encoder == "bert4rec":
        layer += shape.places if shape.fused else 0  # who may look at whom, as numbers
        rest = 4 * width  # the norm of the history; the output layer's input, its gelu's, and its norm's
    else:
        rest = 0 if shape.norm == "post" else width * (2 if rms else 1)
    return shape.depth * layer + rest + dropped(shape, width)


def _gru(shape: Shape) -> float:
    state = shape.state
    behind = (state + dropped(shape, state)) * (shape.depth - 1)
    last = state if state != shape.width else 0
    return 7 * state * shape.depth + shape.width + behind + last + dropped(shape, shape.width) + shape.width


def _loss(shape: Shape, targets: float) -> float:
    """Bytes that the loss of so many targets keeps."""
    vectors = NUMBER * targets * shape.width  # queries, or their gradients
    if shape.negatives is None:
        return vectors + NUMBER * shape.items * shape.width
    own = 4 * ROW * targets  # rows of the targets, and where they stand
    if shape.shared_negatives:
        met = distinct_items(shape.items, targets + shape.negatives)
        return vectors + own + (met + shape.negatives) * (NUMBER * shape.width + ROW)
    scores = targets * (shape.negatives + 1)
    met = distinct_items(shape.items, scores)
    # Rows and scores of the candidates, once more with a function of them, and each item's vector once.
    return vectors + own + (ROW + 2 * NUMBER) * scores + met * (NUMBER * shape.width + ROW)


def distinct_items(items: int, draws: float) -> float:
    """How many of N items are expected among uniform draws: N (1 - (1 - 1/N)^draws)."""
    missed: float = (1.0 - 1.0 / items) ** draws
    return items * (1.0 - missed)
