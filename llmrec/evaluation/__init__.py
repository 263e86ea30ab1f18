"""What a recommender is worth: metrics over items, and the baselines that it has to beat."""

from llmrec.evaluation.baselines import ItemCF, Popularity
from llmrec.evaluation.metrics import (
    duplicate_rate,
    hit_rate,
    invalid_rate,
    ndcg,
    ranking_metrics,
    ranks_of,
)

__all__ = [
    "ItemCF",
    "Popularity",
    "duplicate_rate",
    "hit_rate",
    "invalid_rate",
    "ndcg",
    "ranking_metrics",
    "ranks_of",
]
