"""How predictable a log is: real (Lempel-Ziv), approximate and Shannon entropy of the users' sequences in one row.

All figures are in nats. The Performance Law (arXiv 2412.00430) takes them as the quality of data: its effective data
are D' = tokens * S' with S' = 1 / S and S the real entropy. Items are categories: their numbers do not matter.
"""

import math
from typing import Any

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.integer[Any]]
Places = npt.NDArray[np.int64]

MAX_TOKENS = 1_100_000  # beyond these, whole users are drawn
_STEPS = 16  # down the tree of a dictionary, per token, on average


def shannon_entropy(tokens: Integers) -> float:
    """-sum p ln p over the items' shares p of the tokens (n,), in nats; 0 without tokens.

    >>> round(shannon_entropy(np.array([1, 1, 2, 2])), 4)
    0.6931
    """
    counts = np.unique(tokens, return_counts=True)[1]
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


def real_entropy(tokens: Integers) -> float:
    """The Lempel-Ziv estimate of the entropy rate (Kontoyiannis et al. 1998), S = n ln n / sum of Lambda_j, in nats.

    Lambda_j is the length of the shortest run of tokens from place j on that does not occur in the tokens before j
    (wholly before: it may not reach over j). Where the rest of the tokens occurs before, it counts as the rest and one
    more. O(n log n) time and memory of a few dozen numbers per token, whatever the tokens.

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
    larger. A rest that is in the dictionary counts as the rest and one more.

    Runs are followed in a tree, token by token, which takes as many steps as they are long. Where that is more than 16
    steps a token, in logs that repeat themselves for long, runs are looked up whole, in O(n log^2 n): the result is
    the same.

    >>> round(dictionary_entropy(np.array([1, 2, 1, 2, 3])), 4)
    1.1496
    """
    n = len(tokens)
    if n < 2:
        return 0.0
    numbers = _dense(tokens)
    total = _walked(numbers, _STEPS * n)
    return n * math.log(n) / (_looked_up(numbers) if total is None else total)


def longest_earlier_matches(tokens: Integers) -> Places:
    """(n,) for every place j the largest l such that tokens[j:j + l] occurs within tokens[:j].

    From the suffix array: the suffixes that share l tokens with suffix j are neighbours in it, and nested intervals
    for growing l form a tree. Going up it, l falls and the earliest start m of the interval falls; the match is
    min(l, j - m) at its best, which lies where l first is at most j - m (found by binary lifting).
    """
    n = len(tokens)
    if n == 0:
        return np.zeros(0, dtype=np.int64)
    suffixes, common = _suffix_array(_dense(tokens))
    # `common[r]` is what the suffixes of rank r - 1 and r share; -1 at both ends closes every interval.
    left, right = _nearest_smaller(common), _nearest_smaller(common[::-1])
    right = len(common) - 1 - right[::-1]
    # Places of equal value in one interval are one node of the tree.
    inner = np.arange(1, n)
    keys, node_of_inner = np.unique(left[inner] * (int(common.max()) + 2) + common[inner], return_inverse=True)
    root = len(keys)  # shares nothing; stands for all suffixes
    node_at = np.full(n + 1, root)
    node_at[inner] = node_of_inner
    place_of = np.zeros(root, dtype=np.int64)
    place_of[node_of_inner] = inner
    depth = np.append(common[place_of], 0)
    earliest = np.append(_range_minima(suffixes, left[place_of], right[place_of]), 0)
    borders = np.stack([left[place_of], right[place_of]])
    larger = np.where(common[borders[0]] >= common[borders[1]], borders[0], borders[1])
    ups = [np.append(np.where(common[larger] < 0, root, node_at[larger]), root).astype(np.int32)]
    while not (ups[-1] == root).all():
        ups.append(ups[-1][ups[-1]])
    ranks = np.arange(n)
    lowest = node_at[np.where(common[ranks] >= common[ranks + 1], ranks, ranks + 1)]
    # Node where the interval's earliest start is too near, the highest such: one step above it, all is well.
    near = depth[lowest] > suffixes - earliest[lowest]
    node, starts = lowest[near], suffixes[near]
    for up in reversed(ups):
        above = up[node]
        node = np.where(depth[above] > starts - earliest[above], above, node)
    best = depth[lowest]
    best[near] = np.maximum(depth[ups[0][node]], starts - earliest[node])
    matches = np.empty(n, dtype=np.int64)
    matches[suffixes] = best
    return matches


def entropies(
    rows: Integers, starts: Places, ends: Places, seed: int = 0, max_tokens: int = MAX_TOKENS
) -> dict[str, Any]:
    """The figures of a log: users' sequences rows[starts[u]:ends[u]], one after another in the order given.

    Where there are more than `max_tokens` tokens, whole users are drawn without replacement by `seed` until the next
    one would go beyond; `tokens` and `users` say how many were taken, `tokens_in_all` how many there are, and the
    effective data are for all of them.

    Returns:
        JSON-ready: users, tokens, tokens_in_all, shannon, approximate_m1, approximate_m2, real, quality (S' =
        1 / real), effective_data (tokens_in_all * S'), dictionary, dictionary_quality; None for what divides by 0.
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
    real, dictionary = real_entropy(tokens), dictionary_entropy(tokens)
    return {
        "users": len(users),
        "tokens": len(tokens),
        "tokens_in_all": total,
        "shannon": shannon_entropy(tokens),
        "approximate_m1": approximate_entropy(tokens, 1),
        "approximate_m2": approximate_entropy(tokens, 2),
        "real": real,
        "quality": 1 / real if real else None,
        "effective_data": total / real if real else None,
        "dictionary": dictionary,
        "dictionary_quality": 1 / dictionary if dictionary else None,
    }


def _mean_log_share(counts: Integers) -> float:
    """Sum of p ln p over the shares p of positive counts."""
    shares = counts / counts.sum()
    return float((shares * np.log(shares)).sum())


def _walked(numbers: Places, steps: int) -> int | None:
    """The sum of the lengths of runs that are new to the dictionary; None if it takes more steps than these."""
    n, base = len(numbers), int(numbers.max()) + 1
    sequence = numbers.tolist()
    children: dict[int, int] = {}  # node of the trie * base + token -> node; the dictionary holds every prefix
    total = 0
    for start in range(n):
        node, place = 0, start
        while place < n:
            child = children.get(key := node * base + sequence[place])
            if child is None:
                children[key] = len(children) + 1
                break
            node, place = child, place + 1
        total += place - start + 1
        if total > steps:
            return None
    return total


def _looked_up(numbers: Places) -> int:
    """What `_walked` returns, without a limit: with a run the dictionary holds its beginnings, so bisection finds it.

    Runs of one length are equal if the ranks of their first and of their last 2^k tokens are, 2^k being the largest
    power of two that fits; these ranks are those of the suffix array's construction. Exact, not hashed.
    """
    n = len(numbers)
    ranks = [memoryview(level.data) for level in _ranks(numbers)]
    highest = len(ranks) - 1

    def key(start: int, length: int) -> int:
        # Beyond the highest power all ranks differ, and one alone tells the run.
        power = min(length.bit_length() - 1, highest)
        level = ranks[power]
        return int((length * (n + 1) + level[start]) * (n + 1) + level[start + length - (1 << power)])

    known: set[int] = set()
    total = length = 0
    for start in range(n):
        rest = n - start
        # The run before, less its first token, is a likely length; from there in growing steps, then by halves.
        length = min(max(length - 1, 0), rest)
        low, high, step = 0, rest + 1, 1  # a run of `low` tokens is known, one of `high` is not
        while high - low > 1:
            if low < length < high:
                probe = length
            elif high > rest:
                probe = min(low + step, rest)
                step *= 2
            elif low == 0:
                probe = max(high - step, 1)
                step *= 2
            else:
                probe = (low + high) // 2
            if key(start, probe) in known:
                low = probe
            else:
                high = probe
        length = low
        if length < rest:
            known.add(key(start, length + 1))
        total += length + 1
    return total


def _dense(values: Integers) -> Places:
    """The values as 0, 1, ... in their order."""
    return np.unique(values, return_inverse=True)[1].astype(np.int64)


def _ranks(tokens: Places) -> list[npt.NDArray[np.int32]]:
    """For every power of two, the rank (n + 1,) of so many tokens from each place on, from 1; 0 at the end.

    Prefix doubling (Manber and Myers 1993): with the order by h tokens known, that by 2h is a sort of pairs. What is
    shorter than 2^k comes before its continuations. The last power is one by which all ranks differ, or beyond n.
    """
    n = len(tokens)
    rank = tokens + 1
    levels: list[npt.NDArray[np.int32]] = []
    length = 1
    while True:
        levels.append(np.append(rank, 0).astype(np.int32))
        if rank.max() == n or length > n:
            return levels
        beyond = np.zeros(n, dtype=np.int64)
        beyond[: max(n - length, 0)] = rank[length:]
        rank = _dense(rank * (n + 1) + beyond) + 1
        length *= 2


def _suffix_array(tokens: Places) -> tuple[Places, Places]:
    """Start places of the suffixes in order (n,), and what each shares with the one before (n + 1,), -1 at both ends.

    The orders by 1, 2, 4, ... tokens tell the shared length of two suffixes bit by bit.
    """
    n = len(tokens)
    levels = _ranks(tokens)
    suffixes = np.argsort(levels[-1][:n], kind="stable")
    common = np.zeros(n + 1, dtype=np.int64)
    first, second = suffixes[:-1].copy(), suffixes[1:].copy()
    for power in range(len(levels) - 1, -1, -1):
        ranks = levels[power]
        # Equal ranks of suffixes that end sooner cannot be: the end itself differs.
        equal = (ranks[first] == ranks[second]) & (first < n) & (second < n)
        step = np.where(equal, 1 << power, 0)
        common[1:n] += step
        first, second = np.minimum(first + step, n), np.minimum(second + step, n)
    common[0] = common[n] = -1
    return suffixes, common


def _nearest_smaller(values: Places) -> Places:
    """For every place the nearest one before it with a smaller value, -1 if there is none.

    Minima of blocks of 2, 4, 8, ... places; from every place one goes up to a block on the left with something
    smaller, and down in it to the last one.
    """
    n = len(values)
    size = 1 << max(n - 1, 0).bit_length()
    largest = np.iinfo(np.int64).max
    minima = [np.concatenate([values, np.full(size - n, largest)])]
    while len(minima[-1]) > 1:
        minima.append(minima[-1].reshape(-1, 2).min(axis=1))
    found = np.full(n, -1)
    active, block = np.arange(n), np.arange(n)
    found_at: list[tuple[Places, Places]] = []
    for level in minima[:-1]:
        neighbour = block ^ 1
        hit = (block & 1 == 1) & (level[neighbour] < values[active])
        found_at.append((active[hit], neighbour[hit]))
        active, block = active[~hit], block[~hit] >> 1
    below_places, below_blocks = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    for height in range(len(found_at) - 1, -1, -1):
        places = np.concatenate([below_places, found_at[height][0]])
        blocks = np.concatenate([below_blocks, found_at[height][1]])
        if height == 0:
            found[places] = blocks
            break
        last = 2 * blocks + 1
        below_places = places
        below_blocks = np.where(minima[height - 1][last] < values[places], last, last - 1)
    return found


def _range_minima(values: Places, starts: Places, ends: Places) -> Places:
    """The least of values[start:end] for every pair; no range may be empty."""
    result = np.empty(len(starts), dtype=np.int64)
    powers = np.frexp((ends - starts).astype(np.float64))[1] - 1  # 2^power is the largest that fits
    order = np.argsort(powers, kind="stable")
    bounds = np.searchsorted(powers[order], np.arange(int(powers.max(initial=-1)) + 2))
    minima = values
    for power in range(len(bounds) - 1):
        if power:
            half = 1 << (power - 1)
            minima = np.minimum(minima[:-half], minima[half:])
        chosen = order[bounds[power] : bounds[power + 1]]
        result[chosen] = np.minimum(minima[starts[chosen]], minima[ends[chosen] - (1 << power)])
    return result
