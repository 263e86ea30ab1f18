"""Texts' vectors: the adapter by definition in numpy, its scale, tuning, cold items, ids beside them."""

import numpy as np
import pytest
import torch

from llmrec.exceptions import DataError
from llmrec.representations.ids_and_text import IdsAndText
from llmrec.representations.item_features import ItemFeatures
from llmrec.representations.text import TextVectors

N, D, E = 6, 4, 5


def vectors(number: int = N, seed: int = 0) -> np.ndarray:
    # With a large mean that says nothing, as language models' have.
    drawn: np.ndarray = np.random.default_rng(seed).normal(size=(number, E)) * 3 + 100
    return drawn.astype(np.float32)


def items(number: int = N, seed: int = 0, trained: np.ndarray | None = None) -> ItemFeatures:
    return ItemFeatures([f"{seed} {row}" for row in range(number)], vectors(number, seed), trained=trained)


def gelu(x: np.ndarray) -> np.ndarray:
    from scipy.special import erf

    return np.asarray(x * (1 + erf(x / np.sqrt(2))) / 2)


@pytest.mark.parametrize("adapter", ["linear", "mlp"])
def test_the_adapter_by_definition(adapter: str) -> None:
    text = TextVectors(N, D, E, adapter, 7).double()  # type: ignore[arg-type]
    text.set_items(items())
    with torch.no_grad():
        for parameter in text.parameters():
            parameter += torch.randn_like(parameter)
    given = vectors().astype(np.float64)
    centred = given - given.mean(axis=0)
    # Root mean squares: of lengths for a matrix, of components for an MLP.
    x = centred / np.sqrt((centred**2).sum(axis=1).mean() if adapter == "linear" else (centred**2).mean())
    layers = [text.adapter] if adapter == "linear" else [text.adapter[0], text.adapter[2]]  # type: ignore[index]
    weights = [(layer.weight.detach().numpy(), layer.bias.detach().numpy()) for layer in layers]  # type: ignore[union-attr, operator]
    x = x @ weights[0][0].T + weights[0][1]
    if adapter == "mlp":
        assert x.shape == (N, 7)
        x = gelu(x) @ weights[1][0].T + weights[1][1]
    np.testing.assert_allclose(text.table().detach().numpy(), x, atol=1e-5)


@pytest.mark.parametrize("adapter", ["linear", "mlp"])
def test_new_vectors_are_about_as_large_as_a_tables(adapter: str) -> None:
    torch.manual_seed(0)
    given = np.random.default_rng(0).normal(size=(200, 384)).astype(np.float32) + 7
    text = TextVectors(200, 64, 384, adapter)  # type: ignore[arg-type]
    text.set_items(ItemFeatures([str(row) for row in range(200)], given))
    assert 0.01 < text.table().std() < 0.1


def test_frozen_vectors_are_no_parameters_and_tuned_ones_are() -> None:
    frozen, tuned = TextVectors(N, D, E), TextVectors(N, D, E, tuned=True)
    for text in (frozen, tuned):
        text.set_items(items())
    assert {name for name, _ in frozen.named_parameters()} == {"adapter.weight", "adapter.bias"}
    before = tuned.vectors.clone()
    torch.optim.SGD(tuned.parameters(), lr=1.0).zero_grad()
    tuned(torch.tensor([2])).sum().backward()
    assert tuned.vectors.grad is not None
    assert tuned.vectors.grad.abs().sum(dim=1).nonzero().tolist() == [[2]]
    assert torch.equal(before, torch.from_numpy(vectors()))


def test_another_catalogue_keeps_the_adapters_centre_and_scale() -> None:
    text = TextVectors(N, D, E)
    text.set_items(items())
    # The same vectors among others give the same: nothing is centred anew.
    more = ItemFeatures(["x", "y", "z"], np.vstack([vectors()[[4]], vectors(2, seed=9) + 50]).astype(np.float32))
    other = text.with_items(more, np.full(3, -1))
    torch.testing.assert_close(other.table()[0], text.table()[4])
    assert other.adapter is text.adapter
    assert torch.equal(other.scale, text.scale)


def test_old_items_keep_their_tuned_vectors_and_new_ones_start_from_their_own() -> None:
    text = TextVectors(N, D, E, tuned=True)
    text.set_items(items())
    with torch.no_grad():
        text.vectors += 1
    other = text.with_items(items(3, seed=4), np.array([5, -1, 0]))
    assert isinstance(other.vectors, torch.nn.Parameter)
    assert torch.equal(other.vectors[[0, 2]], text.vectors[[5, 0]])
    assert torch.equal(other.vectors[1], torch.from_numpy(vectors(3, seed=4)[1]))


def test_equal_vectors_have_no_scale() -> None:
    text = TextVectors(2, D, E)
    text.set_items(ItemFeatures(["a", "b"], np.ones((2, E), dtype=np.float32)))
    assert text.table().isfinite().all()


def test_read_only_and_half_precision_vectors() -> None:
    given = vectors().astype(np.float16)
    given.setflags(write=False)
    text = TextVectors(N, D, E)
    text.set_items(ItemFeatures([str(row) for row in range(N)], given))
    assert torch.equal(text.vectors, torch.from_numpy(given.astype(np.float32)))


def test_wrong_widths_and_numbers() -> None:
    text = TextVectors(N, D, E + 1)
    with pytest.raises(DataError, match=r"of width 5.* of width 6"):
        text.set_items(items())
    with pytest.raises(DataError, match="NaN"):
        ItemFeatures(["a"], np.array([[np.nan]]))
    for wrong in ({"vectors": np.zeros((2, 3))}, {"codes": np.zeros(1, int)}, {"trained": np.zeros((1, 1), bool)}):
        with pytest.raises(DataError, match="do not belong to 1 items"):
            ItemFeatures(["a"], **wrong)  # type: ignore[arg-type]


def test_ids_and_text_are_added_and_cold_items_are_text_alone() -> None:
    both = IdsAndText(N, D, E)
    trained = np.array([True, False, True, True, False, True])
    both.set_items(items(trained=trained))
    ids, text, table = both.ids.table(), both.text.table(), both.table()
    torch.testing.assert_close(table[trained], (ids + text)[trained])
    torch.testing.assert_close(table[~trained], text[~trained])
    table.sum().backward()
    assert both.ids.items.weight.grad is not None
    assert both.ids.items.weight.grad.any(dim=1).tolist() == trained.tolist()
    # A short lookup too, which does not go by the table.
    torch.testing.assert_close(both(torch.tensor([1, 2])), both.table()[[1, 2]])


def test_new_items_beside_ids_are_text_alone() -> None:
    both = IdsAndText(N, D, E)
    both.set_items(items(trained=np.arange(N) != 2))
    added = items(4, seed=3, trained=np.ones(4, dtype=bool))
    other = both.with_items(added, np.array([0, -1, 2, -1]))
    assert other.trained.tolist() == [True, False, False, False]
    torch.testing.assert_close(other.table()[1:], other.text.table()[1:])
    torch.testing.assert_close(other.table()[0], other.text.table()[0] + both.ids.table()[0])
