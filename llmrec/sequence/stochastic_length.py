"""Stochastic length: long histories are thinned at random in training, so that attention costs O(N^α).

Source: Zhai et al., "Actions Speak Louder than Words" (2024), arXiv 2402.17152, equation 4 and table 8.
"""

from typing import Literal

import numpy as np
import numpy.typing as npt

from llmrec.exceptions import DataError

Choice = Literal["recent", "random", "latest"]


def thinned_length(longest: int, alpha: float) -> int:
    """N_c^(α / 2), rounded up: the length that a long history is thinned to.

    Args:
        longest: N_c, the longest history.
        alpha: α in (1, 2]; 2 thins nothing.

    Raises:
        DataError: if α is outside (1, 2].

    >>> thinned_length(4096, 1.6)
    777
    """
    if not 1 < alpha <= 2:
        raise DataError(f"alpha is {alpha}. Give more than 1 and at most 2, which thins nothing.")
    return min(longest, int(np.ceil(longest ** (alpha / 2) - 1e-9)))


def keeps_all(length: int, longest: int, alpha: float) -> float:
    """The probability that a history of n items stays whole: 1 up to N_c^(α/2), and N_c^α / n² beyond (equation 4).

    >>> keeps_all(100, 4096, 1.6), round(keeps_all(4096, 4096, 1.6), 4)
    (1.0, 0.0359)
    """
    short = thinned_length(longest, alpha)
    return 1.0 if length <= short else min(1.0, float(longest) ** alpha / float(length) ** 2)


def kept_places(
    length: int, longest: int, alpha: float, generator: np.random.Generator, choice: Choice = "recent"
) -> npt.NDArray[np.int64]:
    """The places, ascending, that are kept of a history of `length` items.

    Args:
        length: n, at most `longest`.
        longest: N_c.
        alpha: α.
        generator: of the draws.
        choice: of a thinned history: "recent": places drawn without replacement by weights that grow with recency
            (i + 1 for place i, the paper's feature-weighted choice with the place for the feature); "random": all
            alike; "latest": the last ones (greedy). The last item is always kept: it is what comes next that is asked.

    Raises:
        DataError: if α is outside (1, 2] or the history is longer than `longest`.
    """
    short = thinned_length(longest, alpha)
    if length > longest:
        raise DataError(f"A history has {length} items and the longest {longest}. Cut it first.")
    if length <= short or generator.random() < keeps_all(length, longest, alpha):
        return np.arange(length)
    if choice == "latest":
        return np.arange(length - short, length)
    weights = np.arange(1, length) if choice == "recent" else np.ones(length - 1)
    drawn = generator.choice(length - 1, size=short - 1, replace=False, p=weights / weights.sum())
    return np.append(np.sort(drawn), length - 1).astype(np.int64)
