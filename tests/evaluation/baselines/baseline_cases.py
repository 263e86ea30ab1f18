"""Random training sequences and histories, and the tie rule, for the tests of all baselines."""

import random

import numpy as np


def arrays(sequences):
    return [np.array(sequence, dtype=np.int32) for sequence in sequences]


def random_case(seed):
    rng = random.Random(seed)
    num_items = rng.randrange(3, 25)
    length = rng.choice([6, 30])
    train = [[rng.randrange(num_items) for _ in range(rng.randrange(length))] for _ in range(rng.randrange(1, 20))]
    histories = [[rng.randrange(num_items) for _ in range(rng.randrange(length))] for _ in range(8)]
    return num_items, train, histories


def occurrences(num_items, train):
    return [sum(sequence.count(item) for sequence in train) for item in range(num_items)]


def ranked(score, count, history, k, exclude_seen):
    """The stated rule: by score, then by popularity, then by row."""
    candidates = [item for item in range(len(score)) if not (exclude_seen and item in history)]
    return sorted(candidates, key=lambda item: (-score[item], -count[item], item))[:k]


def check_lists_follow_scores(model, histories, count, k, exclude_seen):
    """`recommend` is the stated rule on `scores`, exactly, ties included."""
    scores = model.scores(arrays(histories))
    assert scores.shape == (len(histories), len(count))
    lists = model.recommend(arrays(histories), k, exclude_seen)
    for history, row, found in zip(histories, scores.tolist(), lists, strict=True):
        assert found.dtype == np.int64
        assert found.tolist() == ranked(row, count, history, k, exclude_seen)
