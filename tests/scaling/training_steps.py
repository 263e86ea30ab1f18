"""Models of a `Shape`, a training step of theirs, and what torch counts and keeps in it."""

import numpy as np
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode, mm_flop, sdpa_backward_flop_count, sdpa_flop_count

from llmrec.losses.arguments import LossArguments
from llmrec.scaling.shape import Shape
from llmrec.sequence.arguments import EncoderArguments
from llmrec.sequence.model import SequenceModel, sequence_config

_FLAGS = ("relative_bias", "position_embeddings", "residual", "gate", "concat_ua", "score", "qk_dim", "v_dim")
_OTHERS = ("norm", "feed_forward", "gru_size")

# One of each encoder's ways to be built that costs something else.
SHAPES = {
    "hstu": Shape("hstu", 3, 24, 300, 16, heads=2),
    "hstu-llama-concat-rope": Shape(
        "hstu", 2, 24, 300, 16, heads=2, residual="llama", relative_bias="rope+time", concat_ua=True
    ),
    "hstu-sasrec-no-gate-softmax": Shape(
        "hstu", 2, 24, 300, 16, residual="sasrec", gate=False, score="softmax", relative_bias="position"
    ),
    "hstu-post": Shape("hstu", 2, 24, 300, 16, residual="post", dropout=False),
    "hstu-odd-heads": Shape(
        "hstu", 2, 24, 300, 16, heads=3, qk_dim=6, v_dim=11, score="softmax", relative_bias="rope"
    ),
    "hstu-no-places": Shape("hstu", 1, 24, 300, 16, relative_bias="none", position_embeddings=False),
    "hstu-long": Shape("hstu", 2, 16, 100, 300, heads=2),
    "sasrec": Shape("sasrec", 3, 24, 300, 16),
    "sasrec-llama-gate-bias": Shape(
        "sasrec", 2, 24, 300, 16, heads=2, residual="llama", gate=True, relative_bias="position+time"
    ),
    "sasrec-post-gelu": Shape("sasrec", 2, 24, 300, 16, heads=2, norm="post", feed_forward="gelu"),
    "sasrec-authors": Shape("sasrec", 2, 24, 300, 16, norm="authors", attention_dropout=True, inner=40),
    "sasrec-swiglu-rope": Shape("sasrec", 2, 24, 300, 16, feed_forward="swiglu", relative_bias="rope"),
    "bert4rec": Shape("bert4rec", 3, 24, 300, 16),
    "bert4rec-fused": Shape("bert4rec", 2, 24, 300, 16, heads=4, attention_dropout=False),
    "gru4rec": Shape("gru4rec", 3, 24, 300, 16),
    "gru4rec-wide": Shape("gru4rec", 2, 24, 300, 16, gru_size=40),
    "llama": Shape("llama", 3, 24, 300, 16),
    "llama-fused": Shape("llama", 2, 24, 300, 16, heads=3, dropout=False, inner=50),
    "gpt2": Shape("gpt2", 3, 24, 300, 16),
    "gpt2-fused": Shape("gpt2", 2, 24, 300, 16, heads=3, dropout=False),
    "more-positions": Shape("sasrec", 2, 24, 300, 16, max_history=40),
}


def model_of(shape: Shape) -> SequenceModel:
    """The model that train/seqrec.py makes with a shape's flags."""
    torch.manual_seed(0)
    flags = {name: getattr(shape, name) for name in (*_FLAGS, *_OTHERS) if getattr(shape, name) is not None}
    if shape.heads is not None:
        flags["num_attention_heads"] = shape.heads
    if shape.inner is not None:
        flags["intermediate_size"] = shape.inner
    if shape.attention_dropout is not None:
        flags["attention_dropout"] = 0.3 if shape.attention_dropout else 0.0
    if not shape.dropout:
        flags["dropout"] = 0.0
    if "time" in shape.bias:
        flags["num_time_buckets"] = shape.time_buckets
    arguments = EncoderArguments(
        encoder=shape.encoder, hidden_size=shape.width, num_hidden_layers=shape.depth, **flags
    )
    config = arguments.config(shape.positions)
    longest = shape.positions - (1 if shape.encoder == "bert4rec" else 0)
    return SequenceModel(sequence_config(config, shape.items, longest)).train()


def step_of(shape: Shape, model: SequenceModel, windows: int, hidden: int = 3):
    """A function that computes the loss of some full windows; `hidden` places of each, of a cloze model."""
    generator = torch.Generator().manual_seed(1)
    size = (windows, int(shape.places))
    items = torch.randint(shape.items, size, generator=generator)
    given = {
        "mask": torch.ones(size, dtype=torch.bool),
        "timestamps": (1000 * torch.arange(size[1])).expand(size).contiguous(),
        "labels": torch.randint(shape.items, size, generator=generator),
    }
    if shape.encoder == "bert4rec":
        given["hidden"] = torch.zeros(size, dtype=torch.bool)
        given["hidden"][:, -hidden:] = True
        given["labels"][~given["hidden"]] = -100
    flags = {} if shape.negatives is None else {"num_negatives": shape.negatives}
    kind = shape.loss or ("softmax" if shape.negatives is None else "sampled_softmax")
    loss = LossArguments(loss=kind, shared_negatives=shape.shared_negatives, **flags)
    built = loss.build(np.ones(shape.items, dtype=np.int64))
    return lambda: model(items, loss=built, **given)


def counted(step) -> int:
    """Operations of a step, forwards and backwards.

    Torch's counter knows neither attention's fused kernel for CPUs nor products that are added in place; it is told
    that these cost what their kin on GPUs and the products out of place cost. It sees no look-ups, no elementwise
    functions, and no bags of embeddings, of which losses over a target's own negatives are made.
    """
    aten = torch.ops.aten
    more = {
        aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda grad, q, k, v, *_, **__: (
            sdpa_backward_flop_count(grad, q, k, v)
        ),
        aten.addmm_: lambda total, left, right, **_: mm_flop(left, right),
    }
    with FlopCounterMode(display=False, custom_mapping=more) as counter:
        step().backward()
    return counter.get_total_flops()


def kept(step, parameters) -> int:
    """Bytes of the distinct tensors that a forward pass keeps, without the weights."""
    weights = {weight.untyped_storage().data_ptr() for weight in parameters}
    held, found = [], {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            held.append(tensor)  # so that no other gets its place
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(found.values())
