"""Random histories one behind the other, with everything that HSTU's attention takes, for its tests."""

from dataclasses import dataclass

import torch

from llmrec.backbones.encoder import UNKNOWN_TIME
from llmrec.backbones.relative_bias import bucket_starts
from llmrec.kernels.hstu_attention import hstu_attention_reference


@dataclass
class Sequences:
    """Arguments of `hstu_attention`, and a gradient of its output."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    offsets: torch.Tensor
    max_length: int
    position_bias: torch.Tensor | None
    time_bias: torch.Tensor | None
    timestamps: torch.Tensor | None
    query_timestamps: torch.Tensor | None
    normalize_by: str
    score: str
    grad: torch.Tensor

    def arguments(self):
        values = vars(self)
        return [value for name, value in values.items() if name != "grad"]

    def learnt(self):
        parts = (self.q, self.k, self.v, self.position_bias, self.time_bias)
        return [part for part in parts if part is not None]

    def to(self, device):
        for name, value in vars(self).items():
            if isinstance(value, torch.Tensor):
                setattr(self, name, value.detach().to(device).requires_grad_(value.requires_grad))
        return self

    def by(self, attention, **options):
        """The output and the gradients of what is learnt."""
        out = attention(*self.arguments(), **options)
        return [out, *torch.autograd.grad(out, self.learnt(), self.grad.to(out.dtype), allow_unused=True)]

    def exact(self):
        return self.by(hstu_attention_reference)


def random_sequences(
    seed,
    lengths=None,
    widths=(5, 3),
    heads=2,
    dtype=torch.float64,
    position=True,
    time=True,
    known=True,
    asked=True,
    normalize_by="max_length",
    score="silu",
    spare=2,
):
    """Times are drawn over all sizes of differences, some of them the first of their bucket; some are unknown."""
    generator = torch.Generator().manual_seed(seed)
    if lengths is None:
        lengths = torch.randint(0, 20, (int(torch.randint(1, 8, (), generator=generator)),), generator=generator)
    lengths = torch.as_tensor(lengths, dtype=torch.int64)
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    total, max_length = int(offsets[-1]), int(lengths.max()) + spare if len(lengths) else 1

    def normal(*shape, of=dtype):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(of).requires_grad_()

    def times():
        starts = bucket_starts(60, torch.device("cpu"))
        drawn = starts[torch.randint(0, len(starts), (total,), generator=generator)]
        drawn = drawn - torch.randint(0, 2, (total,), generator=generator)
        drawn = torch.where(torch.rand(total, generator=generator) < 0.3, 0, drawn)
        return torch.where(torch.rand(total, generator=generator) < 0.1, UNKNOWN_TIME, drawn)

    table = torch.float64 if dtype == torch.float64 else torch.float32
    return Sequences(
        normal(total, heads, widths[0]),
        normal(total, heads, widths[0]),
        normal(total, heads, widths[1]),
        offsets,
        max_length,
        normal(max_length, of=table) if position else None,
        normal(50, of=table) if time else None,
        times() if known else None,
        times() if asked else None,
        normalize_by,
        score,
        normal(total, heads, widths[1]).detach(),
    )
