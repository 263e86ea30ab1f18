"""A policy's log-probabilities of the tokens that it proposed, with gradients, as decoding has them."""

from typing import Any

import torch
from torch import Tensor


def token_logprobs(
    model: Any,
    tokens: Tensor,
    mask: Tensor,
    proposed: int,
    vocabulary: Tensor | None = None,
    entropy_gradient: bool = False,
    **inputs: Any,
) -> tuple[Tensor, Tensor, Any]:
    """The log-probability of each proposed token, given what stands before it, and the entropies of these choices.

    Positions count each line's own tokens, as `decode` counts them; a model that was left to count would count the
    filling on the left, too, and one with learnt positions would answer otherwise.

    Args:
        model: a causal LM, in whatever wraps it.
        tokens: (B, T), prompts filled on the left, and behind them `proposed` columns, filled on the right.
        mask: (B, T), 1 for tokens, 0 for filling.
        proposed: C, how many of the last columns are the policy's.
        vocabulary: (n,) ascending token ids that the softmax is over; None for all. It holds the proposed ones.
        entropy_gradient: whether the entropies are to be differentiated, which holds their distributions in memory.
        inputs: further arguments of the model.

    Returns:
        Log-probabilities (B, C) and entropies (B, C) in nats, both 0 at filling, float32 (float64 of such a model);
        and the model's whole output.
    """
    output = model(
        input_ids=tokens,
        attention_mask=mask,
        position_ids=(mask.cumsum(1) - 1).clamp(min=0),
        logits_to_keep=proposed + 1,
        use_cache=False,
        **inputs,
    )
    logits = output.logits[:, -proposed - 1 : -1]
    chosen, filling = tokens[:, -proposed:], mask[:, -proposed:] == 0
    if vocabulary is not None:
        logits = logits.index_select(-1, vocabulary)
        chosen = torch.searchsorted(vocabulary, chosen.contiguous()).clamp(max=len(vocabulary) - 1)
    logits = logits.to(torch.float64 if logits.dtype == torch.float64 else torch.float32)
    distribution = logits.log_softmax(-1)
    found = distribution.gather(-1, chosen.unsqueeze(-1)).squeeze(-1)
    if not entropy_gradient:
        distribution = distribution.detach()
    # A token of probability 0 has the log-probability -inf, and no part in the entropy.
    entropy = -(distribution.exp() * distribution.clamp(min=torch.finfo(distribution.dtype).min)).sum(-1)
    return found.masked_fill(filling, 0.0), entropy.masked_fill(filling, 0.0), output
