"""What is kept of a level's candidates, and the noise of draws."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare, kstest

from llmrec.exceptions import RequestError
from llmrec.selection import (
    Draw,
    PrefixCap,
    best_in_order,
    beyond_cap,
    gumbel,
    keys_of_children,
    perturbed,
    seeded,
    seeds_of,
    tempered,
    uniform,
)

ROWS = st.lists(st.sampled_from([-math.inf, -2.0, -1.0, 0.0, 0.5]), min_size=1, max_size=30)


@settings(max_examples=200, deadline=None)
@given(rows=st.lists(ROWS, min_size=1, max_size=3), data=st.data())
def test_the_best_are_those_of_a_stable_sort(rows, data):
    width = min(map(len, rows))
    candidate = torch.tensor([row[:width] for row in rows], dtype=torch.float64)
    if data.draw(st.booleans()):  # without ties, which is another path
        candidate = candidate + torch.arange(width) / 1000
    wanted = data.draw(st.integers(1, width))
    expected = candidate.argsort(dim=1, descending=True, stable=True)[:, :wanted].sort(dim=1).values
    assert best_in_order(candidate, wanted).equal(expected)


@settings(max_examples=200, deadline=None)
@given(rows=st.lists(ROWS, min_size=1, max_size=3), data=st.data())
def test_what_is_beyond_a_cap_is_what_a_walk_from_the_best_passes_over(rows, data):
    width = min(map(len, rows))
    candidate = torch.tensor([row[:width] for row in rows], dtype=torch.float64)
    branches = st.lists(st.integers(0, 5), min_size=width, max_size=width).map(sorted)
    branch = torch.tensor([data.draw(branches) for _ in rows])
    most = torch.tensor([[data.draw(st.integers(1, 4))] for _ in rows])
    found = beyond_cap(candidate, branch, most)
    for row in range(len(rows)):
        kept = Counter()
        for place in sorted(range(width), key=lambda place, row=row: (-float(candidate[row, place]), place)):
            own = int(branch[row, place])
            assert bool(found[row, place]) == (kept[own] >= int(most[row]))
            kept[own] += not found[row, place]


@pytest.mark.parametrize(("levels", "most"), [(0, 1), (1, 0), (-1, 3)])
def test_caps_that_keep_nothing_are_refused(levels, most):
    with pytest.raises(RequestError, match=f"A cap of {most} items on {levels} levels"):
        PrefixCap(levels, most)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_temperatures_that_are_none_are_refused(temperature):
    with pytest.raises(RequestError, match="temperature of a draw"):
        Draw(temperature)


def test_noise_is_a_function_of_integers_written_down_once():
    # From Python's integers modulo 2^64: a change of these numbers would change everybody's draws.
    roots = seeded(seeds_of([Draw(seed=0), Draw(seed=7), Draw(seed=2**64 + 7), Draw(seed=-1)], torch.device("cpu")))
    assert [root % 2**64 for root in roots.tolist()] == [
        0xE220A8397B1DCDAF,  # the first number of splitmix64 from 0
        mixed(7 + 0x9E3779B97F4A7C15),
        mixed(7 + 0x9E3779B97F4A7C15),
        mixed(2**64 - 1 + 0x9E3779B97F4A7C15),
    ]
    keys = keys_of_children(roots[:1], torch.tensor([[0, 5]]))
    assert [key % 2**64 for key in keys[0].tolist()] == [
        mixed(0xE220A8397B1DCDAF + (code + 1) * 0x9E3779B97F4A7C15) for code in (0, 5)
    ]
    numbers = [((mixed(key ^ 0xBF58476D1CE4E5B9) >> 12) + 0.5) / 2**52 for key in keys[0].tolist()]
    assert uniform(keys)[0].tolist() == numbers


def mixed(key):
    key %= 2**64
    key = (key ^ key >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    key = (key ^ key >> 27) * 0x94D049BB133111EB % 2**64
    return key ^ key >> 31


@pytest.mark.parametrize("across", ["seeds", "codes", "levels"])
def test_noise_is_uniform_across_whatever_varies(across):
    count = 200_000
    if across == "seeds":
        keys = keys_of_children(seeded(torch.arange(count)), torch.zeros((count, 1), dtype=torch.long)).flatten()
    elif across == "codes":
        keys = keys_of_children(seeded(torch.tensor([3])), torch.arange(count).unsqueeze(0)).flatten()
    else:
        keys = seeded(torch.arange(100))
        for _ in range(3):
            keys = keys_of_children(keys, torch.arange(13).expand(len(keys), -1)).flatten()
    assert len(keys.unique()) == len(keys)
    numbers = uniform(keys).numpy()
    assert numbers.min() > 0
    assert numbers.max() < 1
    assert kstest(numbers, "uniform").pvalue > 1e-3
    for bits in (numbers * 256 % 1, numbers * 2**20 % 1):  # lower digits are no worse
        assert kstest(bits, "uniform").pvalue > 1e-3
    neighbours = np.floor(numbers[:-1] * 8) * 8 + np.floor(numbers[1:] * 8)
    assert chisquare(np.bincount(neighbours.astype(int), minlength=64)).pvalue > 1e-3
    assert kstest(gumbel(keys).numpy(), "gumbel_r").pvalue > 1e-3


def test_children_are_perturbed_up_to_their_parent():
    generator = torch.Generator().manual_seed(0)
    own = torch.randn((4, 3, 6), generator=generator, dtype=torch.float64) * 3
    own[:, :, 4] = -torch.inf
    own[1, 2] = -torch.inf  # a dead beam
    noise = gumbel(torch.randint(-(2**62), 2**62, own.shape, generator=generator))
    parent = torch.randn((4, 3), generator=generator, dtype=torch.float64)
    found = perturbed(own, noise, parent)
    dead = torch.zeros(4, 3, dtype=torch.bool)
    dead[1, 2] = True
    assert found.amax(-1)[~dead].equal(parent[~dead])  # the very number
    assert (found[dead] == -torch.inf).all()
    assert (found[..., 4] == -torch.inf).all()
    assert found.argsort(-1)[~dead].equal((own + noise).argsort(-1)[~dead])  # in the order they were in
    free = (own + noise)[0, 0, :4].exp()  # as the formula is written
    plain = -torch.log((-parent[0, 0]).exp() - 1 / (own + noise)[0, 0].max().exp() + 1 / free)
    assert torch.allclose(found[0, 0, :4], plain, atol=1e-10)


def test_children_far_below_and_close_to_their_parent_are_perturbed_stably():
    own = torch.tensor([[[0.0, -1e-13, -800.0, -1e300, -40.0]]], dtype=torch.float64)
    found = perturbed(own, torch.zeros_like(own), torch.tensor([[5.0]], dtype=torch.float64))[0, 0]
    assert found[0] == 5.0
    assert torch.isfinite(found).all()
    assert 0 <= float(found[0] - found[1]) < 1e-10
    assert float(found[2]) == pytest.approx(-800.0)  # the parent's 5 is far above, and bounds nothing
    assert float(found[3]) == -1e300
    assert float(found[4]) == pytest.approx(-40.0, abs=1e-12)


def test_tempered_probabilities_by_hand():
    found = torch.tensor([[[0.1, 0.2, 0.4, 0.0]], [[0.0, 0.0, 0.0, 0.0]]], dtype=torch.float64).log()
    warm = tempered(found, torch.tensor([2.0, 1.0], dtype=torch.float64))
    roots = [math.sqrt(0.1), math.sqrt(0.2), math.sqrt(0.4)]
    assert warm[0, 0, :3].exp().tolist() == pytest.approx([root / sum(roots) for root in roots], abs=1e-15)
    assert warm[0, 0, 3] == -math.inf
    assert (warm[1] == -math.inf).all()
    cold = tempered(found[:1], torch.tensor([1e-305], dtype=torch.float64))
    assert cold[0, 0].tolist() == [-1e300, -1e300, 0.0, -math.inf]
