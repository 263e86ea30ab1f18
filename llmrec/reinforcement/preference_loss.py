"""The loss of DPO and S-DPO: the item that was taken shall gain more probability than those that were not."""

import torch
from torch import Tensor
from torch.nn.functional import softplus


def preference_loss(policy: Tensor, reference: Tensor, beta: float) -> Tensor:
    """S-DPO's loss of each case; with one negative it is DPO's.

    With Δ_j the gain log π(j) - log π_ref(j) of an item, + for the one that was taken, - for the n negatives:

        -log σ(-log Σ_j exp(β (Δ_j - Δ_+))) = log(1 + Σ_j exp(β (Δ_j - Δ_+)))

    It is log(1 + n) while the policy is the reference, and cross-entropy over the 1 + n items whose logits are β Δ.

    Source: Chen et al., "On Softmax Direct Preference Optimization for Recommendation" (NeurIPS 2024, arXiv
    2406.09215), the loss for several negatives; Rafailov et al., "Direct Preference Optimization" (NeurIPS 2023, arXiv
    2305.18290), eq. 7.

    Args:
        policy: (B, 1 + n) log-probabilities, the taken item's first.
        reference: (B, 1 + n) those of the reference.
        beta: how far the policy may go from the reference for it; above 0, less goes farther.

    Returns:
        (B,).

    >>> preference_loss(torch.zeros(1, 4), torch.zeros(1, 4), 0.1).exp().tolist()
    [4.0]
    """
    rewards = beta * (policy - reference)
    return softplus((rewards[:, 1:] - rewards[:, :1]).logsumexp(dim=1))


@torch.no_grad()
def preference_measures(policy: Tensor, reference: Tensor, beta: float) -> dict[str, Tensor]:
    """What a course of training is read by, (B,) each, without gradients; arguments as `preference_loss`.

    Returns:
        "rewards/chosen": β Δ_+; if it falls, the taken item itself loses probability.
        "rewards/rejected": the mean of β Δ_j over the negatives.
        "rewards/margins": the former minus the latter.
        "rewards/accuracies": the share of negatives that have gained less than the taken item.
        "kl": the divergence KL(policy ‖ reference) in nats per item, as far as these items show it: of 1 + n + 1
            outcomes, the last of which is any other item. It is never above the divergence over all items.
    """
    policy, reference = policy.double(), reference.double()
    rewards = beta * (policy - reference)
    chosen, rejected = rewards[:, 0], rewards[:, 1:].mean(dim=1)
    now, before = (_outcomes(one) for one in (policy, reference))
    return {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": (rewards[:, 1:] < rewards[:, :1]).double().mean(dim=1),
        "kl": (now * (now / before).log()).sum(dim=1),
    }


def _outcomes(logprobs: Tensor) -> Tensor:
    """(B, 1 + n + 1) the probabilities of the items and of anything else; none is 0, however it was rounded."""
    chances = logprobs.exp()
    rest = 1 - chances.sum(dim=1, keepdim=True)
    return torch.cat([chances, rest], dim=1).clamp(min=torch.finfo(torch.float64).tiny)
