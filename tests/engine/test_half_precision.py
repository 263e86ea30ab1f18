"""Beams in bfloat16: what is put together of prompt and beams is rounded once, and not at every addition."""

import torch

from llmrec.engine.attention import BeamAttention, GatheredPrompts, Progress, Sight


def searched(parts, prompt, dtype):
    """The last of three steps; `parts` are query, key and value (5 beams, 2 heads, 16) of each."""
    key, value = (part.to(dtype, copy=True) for part in prompt)
    progress = Progress(0, 0, 5)
    attention = BeamAttention(GatheredPrompts(key, value, Sight([8], 8, None, "cpu")), progress, 3)
    for query, own_key, own_value in parts:
        attention.descend(torch.arange(5).unsqueeze(0))
        found = attention.forward(query.to(dtype), own_key.to(dtype), own_value.to(dtype), 0.25)
        progress.step += 1
    return found.float()


def test_additions_are_not_rounded():
    torch.manual_seed(0)
    ours, once = [], []
    for _ in range(50):
        # Numbers that bfloat16 holds: what differs is the arithmetic.
        parts = torch.randn(3, 3, 5, 2, 16).bfloat16().float()
        prompt = torch.randn(2, 1, 2, 8, 16).bfloat16().float()
        exact = searched(parts, prompt, torch.float32)
        ours.append((searched(parts, prompt, torch.bfloat16) - exact).abs().mean())
        once.append((exact.bfloat16().float() - exact).abs().mean())
    # One rounding of the result, and those within torch's own kernel over the prompt.
    assert float(torch.stack(ours).mean() / torch.stack(once).mean()) < 1.7
