"""Padding taken away and put back, against row-by-row definitions."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrec.backbones.jagged import offsets_of, places_in, with_padding, without_padding

rows = st.integers(0, 6).flatmap(lambda width: st.lists(st.lists(st.booleans(), min_size=width, max_size=width)))


@settings(max_examples=60, deadline=None)
@given(rows=rows, inner=st.sampled_from([(), (2,), (2, 3)]))
def test_there_and_back(rows: list[list[bool]], inner: tuple[int, ...]) -> None:
    mask = torch.tensor(rows, dtype=torch.bool).reshape(len(rows), -1 if rows else 0)
    padded = torch.randn(*mask.shape, *inner)
    tokens = without_padding(padded, mask)
    expected = [padded[row, place] for row, places in enumerate(rows) for place, there in enumerate(places) if there]
    assert torch.equal(tokens, torch.stack(expected) if expected else padded.new_zeros(0, *inner))
    offsets = offsets_of(mask)
    counts = [sum(places) for places in rows]
    assert offsets.tolist() == [sum(counts[:row]) for row in range(len(rows) + 1)]
    assert places_in(offsets, len(tokens)).tolist() == [place for count in counts for place in range(count)]
    back = with_padding(tokens, mask)
    assert torch.equal(back[mask], tokens)
    assert back.shape == padded.shape
    assert not back[~mask].any()


def test_no_padding_is_everything() -> None:
    padded = torch.randn(2, 3, 4)
    assert torch.equal(without_padding(padded, None), without_padding(padded, torch.ones(2, 3, dtype=torch.bool)))


def test_gradients_go_through() -> None:
    mask = torch.tensor([[True, False], [False, True]])
    tokens = torch.randn(2, 3, requires_grad=True)
    (with_padding(tokens, mask) * torch.arange(4.0).reshape(2, 2, 1)).sum().backward()
    assert tokens.grad is not None
    assert tokens.grad.tolist() == [[0.0] * 3, [3.0] * 3]
