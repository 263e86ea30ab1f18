"""Scorers: the state after a candidate, and the candidate's own vector, to the logits of all labels.

The three scoring networks of "Scaling New Frontiers" (arXiv 2412.00714, RQ4): dot best on small data, FFN on large.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from llmrec.exceptions import BackboneError

ScorerKind = Literal["dot", "mlp", "ffn"]


class DotScorer(nn.Module):
    """logit_k = Σ_d a_kd h_d e_d + u_k · h + v_k · e + b_k: an inner product, and both by themselves.

    Each label has its own weights. They begin as the plain inner product divided by √D: a = 1 / √D, u = v = b = 0.
    """

    def __init__(self, hidden_size: int, num_labels: int) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.empty(num_labels, hidden_size))
        self.linear = nn.Parameter(torch.empty(num_labels, 2 * hidden_size))  # u and v
        self.bias = nn.Parameter(torch.empty(num_labels))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The plain inner product divided by √D."""
        init.constant_(self.weights, self.weights.shape[1] ** -0.5)
        init.zeros_(self.linear)
        init.zeros_(self.bias)

    def forward(self, states: Tensor, items: Tensor) -> Tensor:
        """(P, D) and (P, D) -> (P, K)."""
        product = F.linear(states * items, self.weights, self.bias)
        return product + F.linear(torch.cat([states, items], dim=-1), self.linear)


class MLPScorer(nn.Module):
    """[h, e, h ⊙ e] through a hidden layer of width D with SiLU, shared by all labels, to their logits."""

    def __init__(self, hidden_size: int, num_labels: int, dropout: float) -> None:
        super().__init__()
        self.inner = nn.Linear(3 * hidden_size, hidden_size)
        self.dropout = nn.Dropout(dropout)
        self.outer = nn.Linear(hidden_size, num_labels)

    def forward(self, states: Tensor, items: Tensor) -> Tensor:
        """(P, D) and (P, D) -> (P, K)."""
        both = torch.cat([states, items, states * items], dim=-1)
        logits: Tensor = self.outer(self.dropout(F.silu(self.inner(both))))
        return logits


class FFNScorer(nn.Module):
    """h + W₂ (SiLU(W₁ n) ⊙ W₃ n) for n = RMSNorm(h), a Transformer's feed-forward block of width 4 D; then its logits.

    The candidate enters by its state alone, which has read it.
    """

    def __init__(self, hidden_size: int, num_labels: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(hidden_size, eps=1e-6)
        self.inner = nn.Linear(hidden_size, 8 * hidden_size, bias=False)  # W₁ and W₃
        self.dropout = nn.Dropout(dropout)
        self.outer = nn.Linear(4 * hidden_size, hidden_size, bias=False)
        self.logits = nn.Linear(hidden_size, num_labels)

    def forward(self, states: Tensor, items: Tensor) -> Tensor:
        """(P, D) and (P, D), of which the second is not used -> (P, K)."""
        gate, value = self.inner(self.norm(states)).chunk(2, dim=-1)
        logits: Tensor = self.logits(states + self.dropout(self.outer(F.silu(gate) * value)))
        return logits


def build_scorer(kind: str, hidden_size: int, num_labels: int, dropout: float) -> nn.Module:
    """The scorer of a kind: a module of (P, D) states and (P, D) items -> (P, K) logits.

    Raises:
        BackboneError: if there is no such kind.
    """
    if kind == "dot":
        return DotScorer(hidden_size, num_labels)
    if kind == "mlp":
        return MLPScorer(hidden_size, num_labels, dropout)
    if kind == "ffn":
        return FFNScorer(hidden_size, num_labels, dropout)
    raise BackboneError(f"There is no scorer {kind!r}. Choose dot, mlp or ffn.")
