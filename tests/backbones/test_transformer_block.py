"""Masks against their definition; blocks that cannot be."""

import itertools

import torch

from llmrec.backbones.transformer_block import causal_mask


def test_every_mask_of_four_places_is_the_definition() -> None:
    for row in itertools.product((False, True), repeat=4):
        mask = torch.tensor([row])
        expected = [[key == query or (key < query and row[key]) for key in range(4)] for query in range(4)]
        found = causal_mask(mask)
        behind = list(row) == sorted(row, reverse=True)
        assert (found is None) == behind
        if found is not None:
            assert found.shape == (1, 1, 4, 4)
            assert found[0, 0].tolist() == expected


def test_one_history_with_padding_in_front_makes_a_mask_for_all() -> None:
    mask = torch.tensor([[True, True], [False, True], [True, False]])
    found = causal_mask(mask)
    assert found is not None
    assert found.int()[:, 0].tolist() == [[[1, 0], [1, 1]], [[1, 0], [0, 1]], [[1, 0], [1, 1]]]
    assert causal_mask(mask[[0, 2]]) is None
    assert causal_mask(None) is None
    assert causal_mask(torch.ones(2, 0, dtype=torch.bool)) is None
