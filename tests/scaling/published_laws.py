"""Measured points that the Performance Law's paper printed (Table 2): facts, for fits to be held against."""

from llmrec.scaling.points import ScalingPoints

# ML-1M with histories of 200: 1,058,511 tokens of S' = 0.1854 (Table 3).
MOVIELENS = {
    "depth": [8, 12, 16, 32, 28, 28, 28, 28, 28],
    "width": [54, 54, 54, 54, 54, 25, 50, 75, 100],
    "NDCG@10": [0.1831, 0.1824, 0.1853, 0.1810, 0.1878, 0.1732, 0.1866, 0.1810, 0.1726],
    "HR@10": [0.3265, 0.3271, 0.3286, 0.3216, 0.3322, 0.3101, 0.3311, 0.3203, 0.3102],
}


def movielens(metric: str) -> ScalingPoints:
    return ScalingPoints(MOVIELENS["depth"], MOVIELENS["width"], [1_058_511] * 9, [0.1854] * 9, MOVIELENS[metric])
