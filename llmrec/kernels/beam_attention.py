"""Attention of beams over [the prompt they share] and [the few tokens of their own], put together exactly.

The prompt's part is computed by whoever can read the paged cache best, and comes as an output and the logarithm of the
sum that it was divided by (LSE). The beams' own part is small: at most L - 1 keys. They are stored in the order of the
beams that made them and never moved; which of them a beam of today descends from is an index per step. Two parts with
LSEs join to what one softmax over all keys would have given (arXiv 2501.01005, section 2.2).

`suffix_attention` and `merge` are the definition, in torch; `attend` takes the kernel of `attention_kernels`, which
does both in one launch, where tensors are on a GPU.
"""

import torch

from llmrec.kernels import attention_kernels


def suffix_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    ancestors: torch.Tensor,
    scale: float,
    softcap: float = 0.0,
    window: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The beams' newest tokens over their own tokens so far, the newest included.

    Args:
        query: (R, W, H, D).
        keys, values: (S, R, W', H_kv, D), what each step's beams appended; W' may exceed W.
        ancestors: (S, R, W) int64: the beam of step `s` that each of today's beams descends from; the last step's
            are 0, 1, …, W - 1.
        scale: of the products.
        softcap: c, for scores c tanh(x / c); 0 for none.
        window: how many positions a token sees, itself included; None for all.

    Returns:
        Output (R, W, H, D) and LSE (R, W, H), in float32, or in float64 for such queries.
    """
    requests, beams, heads, width = query.shape
    steps, kv_heads = keys.shape[0], keys.shape[3]
    exact = torch.promote_types(query.dtype, torch.float32)
    index = ancestors[..., None, None].expand(-1, -1, -1, kv_heads, width)
    own_keys, own_values = keys.gather(2, index).to(exact), values.gather(2, index).to(exact)
    grouped = query.to(exact).view(requests, beams, kv_heads, heads // kv_heads, width)
    score = torch.einsum("rwkgd,srwkd->rwkgs", grouped, own_keys) * scale
    if softcap:
        score = softcap * torch.tanh(score / softcap)
    if window is not None and window < steps:  # the oldest step is steps - 1 positions back
        score[..., : steps - window] = -torch.inf
    lse = score.logsumexp(-1)
    output = torch.einsum("rwkgs,srwkd->rwkgd", (score - lse.unsqueeze(-1)).exp(), own_values)
    return output.reshape(query.shape), lse.view(requests, beams, heads)


def merge(
    first: torch.Tensor, first_lse: torch.Tensor, second: torch.Tensor, second_lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """One softmax out of two over disjoint keys.

    Args:
        first, second: (…, D) outputs; those of an empty part may be anything, NaN included.
        first_lse, second_lse: (…) their LSEs; -inf, or +inf as some kernels say, for an empty part.

    Returns:
        (…, D) and (…), in the LSEs' type; zeros and -inf where both parts are empty.
    """
    first_lse = first_lse.masked_fill(first_lse == torch.inf, -torch.inf)
    second_lse = second_lse.masked_fill(second_lse == torch.inf, -torch.inf)
    lse = torch.logaddexp(first_lse, second_lse)
    output = torch.zeros_like(first, dtype=lse.dtype)
    for part, part_lse in ((first, first_lse), (second, second_lse)):
        present = part_lse > -torch.inf
        weight = (part_lse - lse).exp().where(present, 0.0)
        output = output + weight.unsqueeze(-1) * part.to(lse.dtype).where(present.unsqueeze(-1), 0.0)
    return output, lse


def attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    ancestors: torch.Tensor | None,
    prompt: tuple[torch.Tensor, torch.Tensor] | None,
    scale: float,
    softcap: float = 0.0,
    window: int | None = None,
) -> torch.Tensor:
    """`suffix_attention` joined with the prompt's part, (R, W, H, D) in the query's type.

    Args:
        query, keys, values, scale, softcap, window: as in `suffix_attention`.
        ancestors: likewise; None where keys and values already are in the order of today's beams.
        prompt: output (R, H_kv, W·G, D) and LSE (R, H_kv, W·G) of the queries folded by their key-value heads, beams
            outermost, in any strides; None where no token of the prompt is in sight.
    """
    if query.is_cuda and query.dtype != torch.float64 and attention_kernels.available():
        return attention_kernels.attend(query, keys, values, ancestors, prompt, scale, softcap, window)
    if ancestors is None:
        ancestors = torch.arange(query.shape[1], device=query.device).expand(*keys.shape[:2], -1)
    output, lse = suffix_attention(query, keys, values, ancestors, scale, softcap, window)
    if prompt is not None:
        beams = query.shape[1]
        # (R, H_kv, W·G, …) to (R, W, H, …)
        before, before_lse = (part.unflatten(2, (beams, -1)).transpose(1, 2).flatten(2, 3) for part in prompt)
        output, _ = merge(before, before_lse.to(lse.dtype), output, lse)
    return output.to(query.dtype)
