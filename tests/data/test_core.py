import random

import numpy as np
import polars as pl
import pytest

from llmrec.data.core import item_codes, k_core, user_codes
from llmrec.exceptions import DataError


def peeled(pairs, user_core, item_core, rng):
    """The core by its definition: as long as any user or item is too rare, one of them, at random, goes."""
    left = dict(enumerate(pairs))
    while True:
        rare = [
            (side, node)
            for side, fewest in ((0, user_core), (1, item_core))
            for node in {pair[side] for pair in left.values()}
            if sum(pair[side] == node for pair in left.values()) < fewest
        ]
        if not rare:
            return [place in left for place in range(len(pairs))]
        side, node = rng.choice(rare)
        left = {place: pair for place, pair in left.items() if pair[side] != node}


@pytest.mark.parametrize("seed", range(60))
def test_core_equals_its_definition(seed):
    rng = random.Random(seed)
    users, items = rng.randrange(1, 12), rng.randrange(1, 12)
    pairs = [(rng.randrange(users), rng.randrange(items)) for _ in range(rng.randrange(1, 90))]
    for user_core, item_core in [(0, 0), (1, 1), (2, 2), (5, 0), (0, 4), (3, 6), (rng.randrange(9), rng.randrange(9))]:
        kept, passes = k_core(*np.array(pairs).T, user_core, item_core)
        assert kept.tolist() == peeled(pairs, user_core, item_core, rng)
        assert (passes > 0) == (not kept.all())
        again, passes = k_core(*np.array(pairs)[kept].T, user_core, item_core)
        assert again.all()
        assert passes == 0


def test_a_chain_falls_link_by_link():
    # u0 - i0 - u1 - i1 - u2 … : only the ends are rare, and each removal makes the next one rare.
    users = np.repeat(np.arange(10), 2)[1:]
    items = np.repeat(np.arange(10), 2)[:-1]
    kept, passes = k_core(users, items, 2, 2)
    assert not kept.any()
    assert passes > 2


def test_codes_are_dense_and_agree_with_the_ids():
    frame = pl.DataFrame({"user_id": list("bbaac"), "item_id": ["y", "x", "y", "z", "x"]})
    assert user_codes(frame).tolist() == [0, 0, 1, 1, 2]
    assert item_codes(frame).tolist() == [0, 1, 0, 2, 1]
    assert user_codes(frame[:0]).tolist() == item_codes(frame[:0]).tolist() == []


def test_nothing_has_a_core_and_no_count_is_negative():
    empty = np.array([], dtype=np.int64)
    assert k_core(empty, empty, 5, 5)[0].tolist() == []
    with pytest.raises(DataError, match=r"core is -1.*Give 0 or more"):
        k_core(empty, empty, 0, -1)
