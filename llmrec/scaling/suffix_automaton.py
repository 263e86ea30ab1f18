"""The suffix automaton: all runs of tokens in a sequence, in memory and time proportional to its length.

It imports numba, which takes a while: import it inside functions.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from llmrec.scaling.compilation import compiled

Tokens = npt.NDArray[np.int32]
Numbers = npt.NDArray[np.int32]

_FREE = -1  # a state without any edge


class Automaton(NamedTuple):
    """States and edges of n tokens; a path of edges from state 0 exists for what occurs in them, and nothing else.

    A state stands for the runs that end at the same places. There are at most 2 n states and at most n - 1 edges
    besides every state's first, whatever the tokens (Blumer et al. 1985); those edges are in a hash table that is at
    most half full.

    Attributes:
        length: (2 n + 2,) of a state's longest run; its shortest is one longer than the longest of its link.
        link: (2 n + 2,) the state of the longest run that ends a state's runs but occurs at more places; -1 for
            state 0. By the links the states are a tree.
        token: (2 n + 2,) of a state's first edge.
        target: (2 n + 2,) the state that this edge leads to.
        chain: (2 n + 2,) one more than the place in the table of a state's newest other edge; 0 if it has none.
        keys: (2 n + 16,) what the table's places hold: 1 + state * (n + 1) + token, 0 if nothing.
        targets: (2 n + 16,) the states that the table's edges lead to.
        chains: (2 n + 16,) one more than the place of the state's edge before this one; 0 if there is none.
    """

    length: Numbers
    link: Numbers
    token: Numbers
    target: Numbers
    chain: Numbers
    keys: npt.NDArray[np.int64]
    targets: Numbers
    chains: Numbers


class Links(NamedTuple):
    """The tree of an automaton's states, without its edges.

    Attributes:
        length: (Z,) as in `Automaton`, of the states that there are.
        link: (Z,) likewise.
        beginnings: (n,) the state whose longest run is tokens[:j + 1].
    """

    length: Numbers
    link: Numbers
    beginnings: Numbers


def links(tokens: Tokens) -> Links:
    """The tree of links of tokens (n,) that are numbered 0 ... below n."""
    automaton = _empty(len(tokens))
    beginnings, states = _grow(automaton, tokens)
    return Links(automaton.length[:states].copy(), automaton.link[:states].copy(), beginnings)


def earlier_matches(tokens: Tokens) -> Numbers:
    """(n,) for every place j the largest l such that tokens[j:j + l] occurs within tokens[:j].

    Tokens are numbered 0 ... below n. One pass: at place j the automaton holds tokens[:j], and the match is a state of
    it. From one place to the next the match loses its first token, which is a step to the link where the state has no
    shorter run, and then grows as far as there are edges: 2 n steps in all.
    """
    return _match(_empty(len(tokens)), tokens)


def _empty(n: int) -> Automaton:
    # Zeros that nobody wrote take no memory, so that short chains of states leave most of it untouched.
    state, place = 2 * n + 2, 2 * n + 16
    automaton = Automaton(
        length=np.zeros(state, dtype=np.int32),
        link=np.zeros(state, dtype=np.int32),
        token=np.zeros(state, dtype=np.int32),
        target=np.zeros(state, dtype=np.int32),
        chain=np.zeros(state, dtype=np.int32),
        keys=np.zeros(place, dtype=np.int64),
        targets=np.zeros(place, dtype=np.int32),
        chains=np.zeros(place, dtype=np.int32),
    )
    automaton.link[0] = -1
    automaton.token[0] = _FREE
    return automaton


@compiled
def _place(automaton: Automaton, key: int) -> int:
    """Where the table holds this key, or the free place where it would."""
    size = len(automaton.keys)
    mixed = np.uint64(key ^ (key >> 29)) * np.uint64(0x9E3779B97F4A7C15)
    place: int = np.int64(((mixed >> np.uint64(32)) * np.uint64(size)) >> np.uint64(32))  # type: ignore[assignment]
    while automaton.keys[place] != 0 and automaton.keys[place] != key:
        place += 1
        if place == size:
            place = 0
    return place


@compiled
def _base(automaton: Automaton) -> int:
    return len(automaton.length) // 2


@compiled
def _follow(automaton: Automaton, state: int, token: int) -> int:
    """The state that the edge of this token leads to, -1 if there is none."""
    if automaton.token[state] == token:
        return int(automaton.target[state])
    if automaton.chain[state] == 0:
        return -1
    place = _place(automaton, 1 + state * _base(automaton) + token)
    return int(automaton.targets[place]) if automaton.keys[place] != 0 else -1


@compiled
def _lead(automaton: Automaton, state: int, token: int, target: int) -> None:
    """Makes or changes the edge of this token."""
    if automaton.token[state] == token or automaton.token[state] == _FREE:
        automaton.token[state] = token
        automaton.target[state] = target
        return
    key = 1 + state * _base(automaton) + token
    place = _place(automaton, key)
    if automaton.keys[place] == 0:
        automaton.keys[place] = key
        automaton.chains[place] = automaton.chain[state]
        automaton.chain[state] = place + 1
    automaton.targets[place] = target


@compiled
def _append(automaton: Automaton, last: int, states: int, token: int) -> int:
    """Adds a token behind the sequence whose state is `last`; returns how many states there are then.

    The new sequence's state is number `states`.
    """
    length, link = automaton.length, automaton.link
    new = states
    states += 1
    length[new] = length[last] + 1
    automaton.token[new] = _FREE
    state = last
    while state >= 0 and _follow(automaton, state, token) < 0:
        _lead(automaton, state, token, new)
        state = link[state]
    if state < 0:
        link[new] = 0
        return states
    found = _follow(automaton, state, token)
    if length[found] == length[state] + 1:
        link[new] = found
        return states
    # The found state's runs up to this length end at one place more than its longer ones: they get a state of theirs.
    clone = states
    states += 1
    length[clone] = length[state] + 1
    link[clone] = link[found]
    automaton.token[clone] = automaton.token[found]
    automaton.target[clone] = automaton.target[found]
    edge = automaton.chain[found]
    while edge > 0:
        other = automaton.keys[edge - 1] - 1 - found * _base(automaton)
        _lead(automaton, clone, other, automaton.targets[edge - 1])
        edge = automaton.chains[edge - 1]
    link[found] = clone
    link[new] = clone
    while state >= 0 and _follow(automaton, state, token) == found:
        _lead(automaton, state, token, clone)
        state = link[state]
    return states


@compiled
def _grow(automaton: Automaton, tokens: Tokens) -> tuple[Numbers, int]:
    beginnings = np.empty(len(tokens), dtype=np.int32)
    last, states = 0, 1
    for place in range(len(tokens)):
        beginnings[place] = states
        states = _append(automaton, last, states, tokens[place])
        last = beginnings[place]
    return beginnings, states


@compiled
def _match(automaton: Automaton, tokens: Tokens) -> Numbers:
    length, link = automaton.length, automaton.link
    n = len(tokens)
    matches = np.empty(n, dtype=np.int32)
    last, states = 0, 1
    state, matched = 0, 0  # the state of tokens[place:place + matched]
    for place in range(n):
        while place + matched < n:
            following = _follow(automaton, state, tokens[place + matched])
            if following < 0:
                break
            state = following
            matched += 1
        matches[place] = matched
        new = states
        states = _append(automaton, last, states, tokens[place])
        last = new
        # One token less, and what was one state may be two since.
        matched = max(matched - 1, 0)
        while state > 0 and matched <= length[link[state]]:
            state = link[state]
    return matches
