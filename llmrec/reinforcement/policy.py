"""A policy's log-probabilities of the tokens that it proposed, with gradients, as decoding has them."""

from typing import Any

import torch
from torch import Tensor

from llmrec.reinforcement.item_logprobs import ItemLogProbs


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
    chosen, filling = tokens[:, -proposed:], mask[:, -proposed:] == 0
    logits = output.logits[:, -proposed - 1 : -1]
    found, entropy = _chosen(logits, chosen.unsqueeze(-1), vocabulary, entropy_gradient)
    return found.squeeze(-1).masked_fill(filling, 0.0), entropy.masked_fill(filling, 0.0), output


def shared_logprobs(
    items: ItemLogProbs,
    model: Any,
    tokens: Tensor,
    mask: Tensor,
    proposed: int,
    vocabulary: Tensor | None = None,
    entropy_gradient: bool = False,
) -> tuple[Tensor, Tensor]:
    """`token_logprobs`, but a prompt that stands in several lines is run once, with what was proposed behind it.

    Lines may stand in any order. A group of G items of A tokens behind a prompt of P costs P + G A tokens and not
    G (P + A).

    Args:
        items: of the policy, with the layout "branches".
        model: the policy or its reference, in whatever wraps it.
        tokens, mask, proposed, vocabulary, entropy_gradient: as for `token_logprobs`.

    Returns:
        Log-probabilities (B, C) and entropies (B, C), as there.
    """
    filling = mask[:, -proposed:] == 0
    own = tokens[:, -proposed:].masked_fill(filling, -1)
    prompts = torch.stack([tokens[:, :-proposed] * mask[:, :-proposed], mask[:, :-proposed]], dim=1)
    distinct, line = prompts.unique(dim=0, return_inverse=True)  # (U, 2, P), (B,)
    order = line.argsort(stable=True)
    counts = line.bincount()
    place = torch.empty_like(line)  # (B,) among those of its prompt
    place[order] = torch.arange(len(line), device=line.device) - (counts.cumsum(0) - counts)[line[order]]
    answers = own.new_full((len(distinct), int(counts.max()), proposed), -1)
    answers[line, place] = own
    first, others = items.logits(model, {"input_ids": distinct[:, 0], "mask": distinct[:, 1], "answers": answers})
    # One row of logits serves the first token of all of a prompt's items.
    begun, entropy_begun = _chosen(first[:, 0, 0], answers[:, :, 0], vocabulary, entropy_gradient)
    others_found, entropy_others = _chosen(others, answers[:, :, 1:, None], vocabulary, entropy_gradient)
    found = torch.cat([begun[:, :, None], others_found.squeeze(-1)], dim=2)[line, place]
    spread = entropy_begun[:, None, None].expand(-1, answers.shape[1], 1)
    entropy = torch.cat([spread, entropy_others], dim=2)[line, place]
    return found.masked_fill(filling, 0.0), entropy.masked_fill(filling, 0.0)


def _chosen(
    logits: Tensor, chosen: Tensor, vocabulary: Tensor | None, entropy_gradient: bool
) -> tuple[Tensor, Tensor]:
    """Log-probabilities (…, J) of tokens (…, J), all by the same logits (…, V); and the entropies (…,) of these."""
    if vocabulary is not None:
        logits = logits.index_select(-1, vocabulary)
        chosen = torch.searchsorted(vocabulary, chosen.contiguous()).clamp(max=len(vocabulary) - 1)
    logits = logits.to(torch.float64 if logits.dtype == torch.float64 else torch.float32)
    distribution = logits.log_softmax(-1)
    found = distribution.gather(-1, chosen.clamp(min=0))
    if not entropy_gradient:
        distribution = distribution.detach()
    # A token of probability 0 has the log-probability -inf, and no part in the entropy.
    entropy = -(distribution.exp() * distribution.clamp(min=torch.finfo(distribution.dtype).min)).sum(-1)
    return found, entropy
