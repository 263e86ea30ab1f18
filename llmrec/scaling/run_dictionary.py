"""The runs of a sequence that are new to a dictionary of earlier new runs, as in LZ78 but from every place on.

It imports numba, which takes a while: import it inside functions.
"""

import numpy as np
import numpy.typing as npt

from llmrec.scaling.compilation import compiled
from llmrec.scaling.suffix_automaton import Numbers, Tokens, links


def new_run_lengths(tokens: Tokens) -> npt.NDArray[np.int64]:
    """(n,) for every place the length of the shortest run from there on that is not in the dictionary, which gets it.

    Where all that is left is in the dictionary, it counts as that and one more. Tokens are numbered 0 ... below n.

    A run's beginnings are in the dictionary too, so that it is a part of the suffix tree around its root, and each
    new run makes it one token deeper somewhere. The suffix tree is the tree of links of the tokens read backwards.
    From a suffix's node one looks upwards for the first that the dictionary has reached, by heavy paths (Sleator and
    Tarjan 1983): of such a path the dictionary holds a beginning, and above any node there are at most log2 of 2 n of
    them. That is O(n log n), also where walking run by run would take n^2 steps.
    """
    tree = links(np.ascontiguousarray(tokens[::-1]))
    return _lengths(tree.length, tree.link, tree.beginnings)


@compiled
def _lengths(length: Numbers, link: Numbers, beginnings: Numbers) -> npt.NDArray[np.int64]:
    heavy, top = _paths(length, link)
    states, n = len(length), len(beginnings)
    reached = np.full(states, -1, dtype=np.int32)  # of the path that begins here, the lowest node reached
    begun = np.zeros(states, dtype=np.int32)  # how far the way from the node above to this one is in the dictionary
    reached[0] = 0
    found = np.empty(n, dtype=np.int64)
    for place in range(n):
        rest = n - place
        node = beginnings[rest - 1]
        below = -1  # the beginning of the path that was left upwards
        while reached[top[node]] < 0:
            below = top[node]
            node = link[below]
        lowest = reached[top[node]]
        if length[lowest] < length[node]:
            node, below = lowest, heavy[lowest]
        if below < 0:
            found[place] = rest + 1
            continue
        begun[below] += 1
        found[place] = length[node] + begun[below]
        if found[place] == length[below]:
            reached[top[below]] = below
    return found


@compiled
def _paths(length: Numbers, link: Numbers) -> tuple[Numbers, Numbers]:
    """Of every node the child with the most nodes below it, -1 without any, and the first node of its path."""
    states = len(length)
    # Nodes in the order of their lengths, by counting: a node comes after the one above it.
    ends = np.zeros(length.max() + 2, dtype=np.int32)
    for node in range(states):
        ends[length[node] + 1] += 1
    for value in range(1, len(ends)):
        ends[value] += ends[value - 1]
    order = np.empty(states, dtype=np.int32)
    for node in range(states):
        order[ends[length[node]]] = node
        ends[length[node]] += 1
    sizes = np.ones(states, dtype=np.int32)
    heavy = np.full(states, -1, dtype=np.int32)
    for place in range(states - 1, 0, -1):
        node = order[place]
        above = link[node]
        sizes[above] += sizes[node]
        if heavy[above] < 0 or sizes[node] > sizes[heavy[above]]:
            heavy[above] = node
    top = np.arange(states).astype(np.int32)
    for place in range(1, states):
        node = order[place]
        if heavy[link[node]] == node:
            top[node] = top[link[node]]
    return heavy, top
