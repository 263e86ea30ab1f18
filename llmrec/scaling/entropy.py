"""How predictable a log is: real (Lempel-Ziv), approximate and Shannon entropy, and what compression makes of it.

All entropies are in nats, of the users' sequences in one row unless said otherwise. The Performance Law (arXiv
2412.00430) takes them as the quality of data: its effective data are D' = tokens * S' with S' = 1 / S and S the real
entropy. Items are categories: their numbers do not matter.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.integer[Any]]
Places = npt.NDArray[np.int64]

MAX_TOKENS = 20_000_000  # beyond these, whole users are drawn: all figures of so many take some 2.5 GB
ZSTD_LEVEL = 9
LENGTH_ONLY = 0.9  # share of users from which on their approximate entropy says no more than how long they are


def shannon_entropy(tokens: Integers) -> float:
    """-sum p ln p over the items' shares p of the tokens (n,), in nats; 0 without tokens.

    >>> round(shannon_entropy(np.array([1, 1, 2, 2])), 4)
    0.6931
    """
    counts = np.bincount(_dense(tokens))
    return -_mean_log_share(counts) if len(counts) else 0.0


def approximate_entropy(tokens: Integers, m: int = 2) -> float:
    """Approximate entropy (Pincus 1991) with the categorical distance, 0 or 1, and r = 0, in nats.

    |Phi_m - Phi_(m+1)|; Phi_m is the mean over the n - m + 1 windows of m tokens of the log share of windows that
    are equal to it. A distance between item numbers, which published code takes, would depend on how items are
    numbered. For one user who never repeats an item it measures only the length; give it a whole corpus.

    Args:
        tokens: (n,) item numbers.
        m: the length of the windows, at least 0.

    Returns:
        The entropy, or 0 if there is no window of m + 1 tokens.
    """
    if len(tokens) < m + 1:
        return 0.0
    windows = np.zeros(len(tokens) + 1, dtype=np.int64)  # the number of every window of m tokens
    numbers = _dense(tokens)
    before = 0.0
    for length in range(m + 2):
        if length:
            windows = _dense(windows[:-1] * (numbers.max() + 1) + numbers[length - 1 :])
        if length == m:
            # A window of no tokens stands at each of the n + 1 places between them, and all are equal: ln 1.
            before = _mean_log_share(np.bincount(windows))
    return abs(before - _mean_log_share(np.bincount(windows)))


def users_approximate_entropy(rows: Integers, starts: Places, ends: Places, m: int = 2) -> dict[str, Any]:
    """The mean over users of the `approximate_entropy` of each user's own sequence, and whether it says anything.

    A user in whose sequence no m items stand twice in the same order has ln((n - m + 1) / (n - m)), whatever was
    taken: the figure measures the length n alone. Where at least 90 % of the users are such, as in all logs in which
    nobody takes an item twice, there is a warning.

    Args:
        rows: (M,) item numbers, a user's one after another.
        starts: (U,) where users begin.
        ends: (U,) where they end.
        m: the length of the windows, at least 1.

    Returns:
        JSON-ready: m; users, who have m + 1 items or more; mean, None without such; length_only_share, of these users;
        length_only_mean, the mean of ln((n - m + 1) / (n - m)) over all of them; warning, a sentence or None.
    """
    lengths = ends - starts
    asked = np.flatnonzero(lengths > m)
    if not len(asked):
        return {"m": m, "users": 0, "mean": None, "length_only_share": None, "length_only_mean": None, "warning": None}
    kept = lengths[asked]
    owner = np.repeat(np.arange(len(asked)), kept)
    within = np.arange(len(owner)) - np.repeat(np.cumsum(kept) - kept, kept)
    numbers = _dense(rows[starts[asked][owner] + within])
    windows = owner  # a window is also its user's, so that none is equal to another user's
    phi: list[npt.NDArray[np.float64]] = []
    alone = np.zeros(len(asked), dtype=bool)
    for length in range(1, m + 2):
        places = len(owner) - length + 1
        windows = _dense(windows[:places] * (numbers.max() + 1) + numbers[length - 1 :])
        if length < m:
            continue
        whole = within[:places] + length <= kept[owner[:places]]  # not into the next user
        counts = np.bincount(windows[whole])[windows[whole]]
        of = owner[:places][whole]
        number = kept - length + 1
        phi.append(np.bincount(of, np.log(counts / number[of])) / number)
        if length == m:
            alone = np.bincount(of, counts > 1) == 0
    mean, share = float(np.abs(phi[0] - phi[1]).mean()), float(alone.mean())
    expected = float(np.log((kept - m + 1) / (kept - m)).mean())
    warning = None
    if share >= LENGTH_ONLY:
        runs = "item" if m == 1 else f"run of {m} items"
        warning = (
            f"{share:.1%} of the users have no {runs} twice, so the mean of their approximate entropies, {mean:.4f}, "
            f"only says how long they are (length alone gives {expected:.4f}). Use the whole log's, or real entropy."
        )
    return {
        "m": m,
        "users": len(asked),
        "mean": mean,
        "length_only_share": share,
        "length_only_mean": expected,
        "warning": warning,
    }


def real_entropy(tokens: Integers) -> float:
    """The Lempel-Ziv estimate of the entropy rate (Kontoyiannis et al. 1998), S = n ln n / sum of Lambda_j, in nats.

    Lambda_j is the length of the shortest run of tokens from place j on that does not occur in the tokens before j
    (wholly before: it may not reach over j). Where the rest of the tokens occurs before, it counts as the rest and one
    more. Exact, in O(n) time and some hundred bytes per token, whatever the tokens, up to 2^30 of them.

    >>> round(real_entropy(np.array([1, 2, 1, 2, 3])), 4)
    1.0059
    """
    if len(tokens) < 2:
        return 0.0
    return len(tokens) * math.log(len(tokens)) / float((longest_earlier_matches(tokens) + 1).sum())


def dictionary_entropy(tokens: Integers) -> float:
    """The figure that the Performance Law's published code prints instead of `real_entropy`, in nats.

    There the shortest new run from a place on is looked up among the runs that were new at earlier places (a
    dictionary like LZ78's), not among all that occurs before. Matches come out shorter, so the figure comes out
    larger. A rest that is in the dictionary counts as the rest and one more. O(n log n) time, whatever the tokens.

    >>> round(dictionary_entropy(np.array([1, 2, 1, 2, 3])), 4)
    1.1496
    """
    if len(tokens) < 2:
        return 0.0
    from llmrec.scaling.run_dictionary import new_run_lengths

    total = new_run_lengths(_dense(tokens).astype(np.int32)).sum()
    return len(tokens) * math.log(len(tokens)) / float(total)


def longest_earlier_matches(tokens: Integers) -> Places:
    """(n,) for every place j the largest l such that tokens[j:j + l] occurs within tokens[:j]."""
    from llmrec.scaling.suffix_automaton import earlier_matches

    return earlier_matches(_dense(tokens).astype(np.int32)).astype(np.int64)


def compression(tokens: Integers, level: int = ZSTD_LEVEL) -> dict[str, Any]:
    """How small zstd makes the tokens: little-endian 32-bit numbers, in which items are 0, 1, ... as they first occur.

    So the figures do not depend on how items are numbered. They do on the format: zstd knows bytes, not numbers, and
    N items in no order at all stay well below the ratio of 32 / log2 N that would be theirs. To compare logs with.

    Returns:
        JSON-ready: codec; level; ratio, bytes before over after; nats, of the compressed bytes per token. The last two
        are None without tokens.
    """
    import pyarrow  # type: ignore[import-untyped]

    raw = _by_first_occurrence(tokens).astype("<u4").tobytes()
    packed = len(pyarrow.Codec("zstd", compression_level=level).compress(raw, asbytes=True))
    return {
        "codec": "zstd",
        "level": level,
        "ratio": len(raw) / packed if raw else None,
        "nats": 8 * packed * math.log(2) / len(tokens) if raw else None,
    }


def entropies(
    rows: Integers,
    starts: Places,
    ends: Places,
    seed: int = 0,
    max_tokens: int = MAX_TOKENS,
    announce: Callable[[str], None] = lambda name: None,
) -> dict[str, Any]:
    """The figures of a log: users' sequences rows[starts[u]:ends[u]], one after another in the order given.

    Where there are more than `max_tokens` tokens, whole users are drawn without replacement by `seed` until the next
    one would go beyond; `tokens` and `users` say how many were taken, `tokens_in_all` how many there are, and the
    effective data are for all of them.

    Args:
        rows: (M,) item numbers.
        starts: (U,) where users begin.
        ends: (U,) where they end.
        seed: of the draw.
        max_tokens: how many are looked at.
        announce: is told what is computed next.

    Returns:
        JSON-ready: users, tokens, tokens_in_all, shannon, approximate_m1, approximate_m2, approximate_users (see
        `users_approximate_entropy`, m = 2), real, quality (S' = 1 / real), effective_data (tokens_in_all * S'),
        dictionary, dictionary_quality, dictionary_effective_data, compression (see there); None for what divides by 0.
    """
    lengths = ends - starts
    users = np.flatnonzero(lengths > 0)
    total = int(lengths[users].sum())
    if total > max_tokens:
        drawn = np.random.default_rng(seed).permutation(users)
        users = np.sort(drawn[: max(1, int(np.searchsorted(np.cumsum(lengths[drawn]), max_tokens, side="right")))])
    kept = lengths[users]
    within = np.arange(int(kept.sum())) - np.repeat(np.cumsum(kept) - kept, kept)
    tokens = rows[np.repeat(starts[users], kept) + within]
    announce("real entropy")
    real = real_entropy(tokens)
    announce("dictionary entropy")
    dictionary = dictionary_entropy(tokens)
    announce("approximate entropy")
    approximate = {m: approximate_entropy(tokens, m) for m in (1, 2)}
    of_users = users_approximate_entropy(rows, starts[users], ends[users])
    announce("compression")
    return {
        "users": len(users),
        "tokens": len(tokens),
        "tokens_in_all": total,
        "shannon": shannon_entropy(tokens),
        "approximate_m1": approximate[1],
        "approximate_m2": approximate[2],
        "approximate_users": of_users,
        "real": real,
        "quality": 1 / real if real else None,
        "effective_data": total / real if real else None,
        "dictionary": dictionary,
        "dictionary_quality": 1 / dictionary if dictionary else None,
        "dictionary_effective_data": total / dictionary if dictionary else None,
        "compression": compression(tokens),
    }


def _mean_log_share(counts: Integers) -> float:
    """Sum of p ln p over the shares p of positive counts."""
    shares = counts / counts.sum()
    return float((shares * np.log(shares)).sum())


def _dense(values: Integers) -> Places:
    """The values as 0, 1, ... in their order."""
    if len(values) == 0:
        return np.zeros(0, dtype=np.int64)
    least, most = int(values.min()), int(values.max())
    if most - least > 4 * len(values):
        return np.unique(values, return_inverse=True)[1].astype(np.int64)
    # Numbers as close as item rows are need no sorting.
    offsets = values.astype(np.int64) - least
    present = np.zeros(most - least + 1, dtype=np.int64)
    present[offsets] = 1
    return (np.cumsum(present) - 1)[offsets]


def _by_first_occurrence(values: Integers) -> Places:
    """The values as 0, 1, ... in the order in which they first occur."""
    numbers = _dense(values)
    first = np.full(int(numbers.max(initial=-1)) + 1, len(numbers))
    np.minimum.at(first, numbers, np.arange(len(numbers)))
    order = np.empty(len(first), dtype=np.int64)
    order[np.argsort(first, kind="stable")] = np.arange(len(first))
    return order[numbers]
