"""One level of an RQ-VAE against the formulas of its sources, in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrec.quantization.rqvae.codebook import Codebook, nearest_codes, rotation_trick, straight_through


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


def gradient(estimate, vectors: torch.Tensor, points: torch.Tensor, upstream: torch.Tensor) -> torch.Tensor:
    leaf = vectors.clone().requires_grad_()
    estimate(leaf, points).backward(upstream)
    return leaf.grad


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_nearest_codes_break_ties_by_the_lowest_index(data: st.DataObject) -> None:
    width = data.draw(st.integers(1, 3))
    point = st.lists(st.integers(-2, 2), min_size=width, max_size=width)
    vectors = np.array(data.draw(st.lists(point, min_size=1, max_size=8)), dtype=np.float64)
    codes = np.array(data.draw(st.lists(point, min_size=1, max_size=12)), dtype=np.float64)
    expected = ((vectors[:, None] - codes[None]) ** 2).sum(axis=2).argmin(axis=1)
    found = nearest_codes(torch.from_numpy(vectors), torch.from_numpy(codes))
    np.testing.assert_array_equal(found.numpy(), expected)


@pytest.mark.parametrize("estimate", [straight_through, rotation_trick])
def test_the_value_is_the_point(estimate) -> None:
    vectors, points = random(20, 5).float(), random(20, 5, seed=1).float()
    assert torch.equal(estimate(vectors, points), points)


def test_straight_through_passes_the_gradient_unchanged() -> None:
    upstream = random(20, 5, seed=2)
    assert torch.equal(gradient(straight_through, random(20, 5), random(20, 5, seed=1), upstream), upstream)


@pytest.mark.parametrize("seed", range(5))
def test_the_rotation_trick_multiplies_by_the_transposed_rotation(seed: int) -> None:
    vectors, points, upstream = (random(12, 6, seed=3 * seed + offset) for offset in range(3))
    found = gradient(rotation_trick, vectors, points, upstream)
    for e, q, g, row in zip(vectors.numpy(), points.numpy(), upstream.numpy(), found.numpy(), strict=True):
        # The paper's formula as it stands, with the matrix that the code never forms.
        unit_e, unit_q = e / np.linalg.norm(e), q / np.linalg.norm(q)
        r = (unit_e + unit_q) / np.linalg.norm(unit_e + unit_q)
        rotation = np.eye(6) - 2 * np.outer(r, r) + 2 * np.outer(unit_q, unit_e)
        stretch = np.linalg.norm(q) / np.linalg.norm(e)
        np.testing.assert_allclose(rotation @ rotation.T, np.eye(6), atol=1e-12)
        np.testing.assert_allclose(stretch * rotation @ e, q, atol=1e-12)
        np.testing.assert_allclose(row, stretch * rotation.T @ g, atol=1e-12)
        # What it is for: gradient and vector enclose the angle that gradient and point did.
        before = g @ unit_q / np.linalg.norm(g)
        assert row @ unit_e / np.linalg.norm(row) == pytest.approx(before, abs=1e-12)


def test_where_no_rotation_is_defined_the_gradient_passes_straight_through() -> None:
    vectors = torch.tensor([[0.0, 0.0], [1.0, 2.0], [1.0, 2.0], [0.0, 0.0], [1.0, 2.0]], dtype=torch.float64)
    points = torch.tensor([[1.0, 1.0], [0.0, 0.0], [-2.0, -4.0], [0.0, 0.0], [1.0, 2.0]], dtype=torch.float64)
    upstream = random(5, 2)
    found = gradient(rotation_trick, vectors, points, upstream)
    np.testing.assert_allclose(found, upstream, atol=1e-12)
    assert torch.equal(rotation_trick(vectors, points), points)


def test_averages_equal_their_closed_form() -> None:
    decay, size, batches = 0.9, 4, 7
    codebook = Codebook(size, 3, "ema", decay).double()
    counts, codes = torch.tensor([2.0, 1.0, 3.0, 0.5], dtype=torch.float64), random(size, 3)
    codebook.counts.copy_(counts)
    codebook.codes.copy_(codes)
    codebook.sums.copy_(codes * counts[:, None])
    residuals = [random(10, 3, seed=batch) for batch in range(batches)]
    chosen = [torch.from_numpy(np.random.default_rng(batch).integers(0, 3, 10)) for batch in range(batches)]
    for batch in range(batches):
        codebook.average(residuals[batch], chosen[batch])
    for code in range(size):  # code 3 is never chosen
        count, total = decay**batches * counts[code], decay**batches * counts[code] * codes[code]
        for batch in range(batches):
            weight = (1 - decay) * decay ** (batches - 1 - batch)
            mine = residuals[batch][chosen[batch] == code]
            count, total = count + weight * len(mine), total + weight * mine.sum(dim=0)
        np.testing.assert_allclose(codebook.counts[code], count, rtol=1e-12)
        np.testing.assert_allclose(codebook.codes[code], total / count, rtol=1e-10)
    np.testing.assert_allclose(codebook.codes[3], codes[3], rtol=1e-12)


def test_a_code_that_nobody_ever_chooses_stays_finite() -> None:
    codebook = Codebook(2, 1, "ema", decay=0.01)
    codebook.codes.copy_(torch.tensor([[5.0], [0.0]]))
    codebook.counts.fill_(1.0)
    codebook.sums.copy_(codebook.codes)
    for _ in range(100):
        codebook.average(torch.tensor([[1.0]]), torch.tensor([1]))
    assert codebook.counts[0] == 0
    np.testing.assert_allclose(codebook.codes, [[5.0], [1.0]], rtol=1e-5)


def test_the_optimiser_s_codes_are_no_average() -> None:
    codebook = Codebook(2, 3, "gradient")
    assert [name for name, _ in codebook.named_parameters()] == ["codes"]
    assert not list(Codebook(2, 3, "ema").parameters())
    codebook.average(random(4, 3).float(), torch.tensor([0, 0, 1, 1]))
    assert torch.equal(codebook.codes, torch.zeros(2, 3))


def test_codes_are_placed_where_k_means_comes_to_rest() -> None:
    residuals = random(400, 2).float()
    codebook = Codebook(5, 2)
    codebook.place(residuals, rows_per_batch=40, seed=0)
    chosen = ((residuals[:, None] - codebook.codes[None]) ** 2).sum(dim=2).argmin(dim=1)
    for code in range(5):
        mine = residuals[chosen == code]
        np.testing.assert_allclose(codebook.codes[code], mine.mean(dim=0), atol=0.05)
        assert float(codebook.counts[code]) == pytest.approx(len(mine) / 10)
    np.testing.assert_allclose(codebook.sums, codebook.codes * codebook.counts[:, None])
    again, other = Codebook(5, 2), Codebook(5, 2)
    again.place(residuals, rows_per_batch=40, seed=0)
    other.place(residuals, rows_per_batch=40, seed=1)
    assert torch.equal(again.codes, codebook.codes)
    assert not torch.equal(other.codes, codebook.codes)


def test_revived_codes_begin_anew_and_others_stay() -> None:
    codebook = Codebook(3, 2, decay=0.5)
    codebook.codes.copy_(torch.tensor([[1.0, 1.0], [9.0, 9.0], [3.0, 3.0]]))
    codebook.counts.copy_(torch.tensor([4.0, 0.001, 4.0]))
    codebook.sums.copy_(codebook.codes * codebook.counts[:, None])
    codebook.revive(torch.tensor([1]), torch.tensor([[2.0, 0.0]]))
    assert codebook.codes.tolist() == [[1.0, 1.0], [2.0, 0.0], [3.0, 3.0]]
    codebook.average(torch.tensor([[4.0, 2.0]]), torch.tensor([1]))
    # Counts 0.5 * 1 + 0.5 * 1; sums 0.5 * (2, 0) + 0.5 * (4, 2).
    np.testing.assert_allclose(codebook.codes, [[1, 1], [3, 1], [3, 3]], rtol=1e-6)
    np.testing.assert_allclose(codebook.counts, [2, 1, 2])
