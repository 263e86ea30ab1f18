"""Draws of negatives: never the target, in the right shares, by the seed."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from llmrec.exceptions import BackboneError
from llmrec.losses import negatives, sampled_softmax
from llmrec.losses.arguments import LossArguments
from llmrec.losses.negatives import NegativeSampler
from llmrec.representations.id_table import IdTable


@settings(max_examples=50, deadline=None)
@given(
    counts=st.lists(st.integers(0, 10**12), min_size=2, max_size=9),
    seed=st.integers(0, 100),
)
def test_shares_are_the_counts_and_targets_are_never_drawn(counts: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    sampler = NegativeSampler(np.array(counts))
    weights = np.maximum(np.array(counts, dtype=float), 1)
    rows = torch.arange(len(counts))
    np.testing.assert_allclose(sampler.log_shares(rows).exp().numpy(), weights / weights.sum(), rtol=1e-9)
    drawn = sampler.draw_others(rows, 50)
    assert not (drawn == rows[:, None]).any()
    assert drawn.min() >= 0
    assert drawn.max() < len(counts)
    others = sampler.log_shares_of_others(rows.expand(len(counts), -1), rows).exp().numpy()
    for target in range(len(counts)):
        left = np.delete(weights, target)
        np.testing.assert_allclose(np.delete(others[target], target), left / left.sum(), rtol=1e-9)


def test_frequencies_are_the_shares() -> None:
    torch.manual_seed(0)
    counts = np.array([5, 0, 1, 40, 3])  # the second counts 1
    shares = np.array([5, 1, 1, 40, 3]) / 50
    number = 200_000
    sampler = NegativeSampler(counts)
    found = np.bincount(sampler.draw(number).numpy(), minlength=5) / number
    # Five standard deviations.
    np.testing.assert_array_less(np.abs(found - shares), 5 * np.sqrt(shares * (1 - shares) / number))
    for target in range(5):
        left = shares.copy()
        left[target] = 0
        left /= left.sum()
        drawn = sampler.draw_others(torch.tensor([target]), number)
        assert drawn.shape == (1, number)
        found = np.bincount(drawn[0].numpy(), minlength=5) / number
        np.testing.assert_array_less(np.abs(found - left), 5 * np.sqrt(left * (1 - left) / number) + 1e-12)


def test_the_seed_decides_and_is_torchs_own() -> None:
    sampler = NegativeSampler(np.arange(30))
    targets = torch.arange(7)
    torch.manual_seed(3)
    first = sampler.draw(9), sampler.draw_others(targets, 4)
    other = sampler.draw(9), sampler.draw_others(targets, 4)
    torch.manual_seed(3)
    again = sampler.draw(9), sampler.draw_others(targets, 4)
    assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))
    assert not all(torch.equal(one, two) for one, two in zip(first, other, strict=True))


def test_no_targets() -> None:
    sampler = NegativeSampler(np.ones(4, dtype=np.int64))
    assert sampler.draw_others(torch.zeros(0, dtype=torch.int64), 3).shape == (0, 3)
    assert not sampler.state_dict()  # counts are the data's, not the model's


@pytest.mark.parametrize("number", [0, 1])
def test_too_few_items(number: int) -> None:
    with pytest.raises(BackboneError, match="nothing to draw"):
        NegativeSampler(np.ones(number, dtype=np.int64))


class Items(IdTable):
    """Candidates of a loss."""

    def vectors(self, rows: torch.Tensor) -> torch.Tensor:
        return self(rows)  # type: ignore[no-any-return]


class NoFloat64(TorchDispatchMode):
    """A device like Apple's."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        assert not isinstance(made, torch.Tensor) or made.dtype != torch.float64, func
        return made


@pytest.mark.parametrize(
    "flags",
    [
        {"loss": "softmax"},
        {"loss": "sampled_softmax"},
        {"loss": "sampled_softmax", "shared_negatives": True},
        {"loss": "sampled_softmax", "negatives": "in_batch"},
        {"loss": "sampled_softmax", "negatives": "mixed"},
        {"loss": "gbce"},
    ],
    ids=lambda flags: "-".join(map(str, flags.values())),
)
def test_a_device_without_float64_is_enough(flags: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert negatives.finest_type(torch.device("mps")) == torch.float32
    assert negatives.finest_type(torch.device("cpu")) == torch.float64
    loss = LossArguments(num_negatives=5, **flags).build(np.arange(9))
    items, queries, targets = Items(9, 4), torch.randn(6, 4, requires_grad=True), torch.arange(6)

    def slope() -> torch.Tensor:
        torch.manual_seed(2)
        return torch.autograd.grad(loss(queries, targets, items), queries)[0]

    exact = slope()
    for module in (negatives, sampled_softmax):
        monkeypatch.setattr(module, "finest_type", lambda _: torch.float32)
    with NoFloat64():
        torch.testing.assert_close(slope(), exact)
