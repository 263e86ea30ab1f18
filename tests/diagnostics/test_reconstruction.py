"""Reconstruction errors, against loops over items in float64."""

import json
import math

import numpy as np
import pytest

from llmrec.diagnostics import reconstruction
from llmrec.exceptions import TokenizerError
from llmrec.quantization import HashedCodes, ProductQuantizer, ResidualKMeans, ResidualVQ, ScalarQuantizer


def by_loops(vectors: np.ndarray, points: np.ndarray) -> dict:
    vectors, points = vectors.astype(np.float64), points.astype(np.float64)
    mean = [math.fsum(column) / len(vectors) for column in vectors.T]
    errors = [math.fsum((vector - point) ** 2) for vector, point in zip(vectors, points, strict=True)]
    spread = [math.fsum((vector - mean) ** 2) for vector in vectors]
    cosines = []
    for vector, point in zip(vectors, points, strict=True):
        norms = np.linalg.norm(vector), np.linalg.norm(point)
        if norms[0] > 0:
            cosines.append(vector @ point / norms[0] / norms[1] if norms[1] > 0 else 0.0)
    return {
        "mse": math.fsum(errors) / len(vectors),
        "relative": math.fsum(errors) / math.fsum(spread),
        "cosine": math.fsum(cosines) / len(cosines),
    }


QUANTIZERS = {
    "residual_kmeans": lambda: ResidualKMeans(3, 16, niter=4),
    "normalised": lambda: ResidualKMeans(3, 16, niter=4, normalise_residuals=True),
    "residual_vq": lambda: ResidualVQ(2, 8),
    "product": lambda: ProductQuantizer(3, 8),
    "scalar": lambda: ScalarQuantizer(2, (4, 3)),
}


@pytest.mark.parametrize("name", list(QUANTIZERS))
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_errors_are_the_definition(name: str, dtype: type) -> None:
    generator = np.random.default_rng(3)
    vectors = (generator.normal(size=(300, 9)) * np.linspace(2, 0.1, 9) + 1).astype(dtype)
    vectors[5] = 0
    quantizer = QUANTIZERS[name]().fit(vectors)
    codes = quantizer.encode(vectors)
    appended = np.column_stack([codes, generator.integers(0, 9, 300)])
    expected = by_loops(vectors, quantizer.decode(codes))
    for given in (codes, appended):
        found = reconstruction(vectors, given, quantizer)
        json.dumps(found, allow_nan=False)
        for key, value in expected.items():
            assert found[key] == pytest.approx(value, rel=1e-9), key
        assert len(found["per_level"]) == codes.shape[1]
        for level in range(codes.shape[1]):
            partial = sum(quantizer.level_points(i)[codes[:, i]].astype(np.float64) for i in range(level + 1))
            assert found["per_level"][level] == pytest.approx(by_loops(vectors, partial)["relative"], rel=1e-9)
        assert found["per_level"][-1] == pytest.approx(found["relative"], rel=1e-5)  # `decode` is float32


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = np.random.default_rng(0).normal(size=(100, 4))
    quantizer = ResidualKMeans(2, 8, niter=3).fit(vectors)
    codes = quantizer.encode(vectors)
    whole = reconstruction(vectors, codes, quantizer)
    monkeypatch.setattr("llmrec.quantization.nearest.CHUNK", 7)
    parts = reconstruction(vectors, codes, quantizer)
    assert parts["per_level"] == pytest.approx(whole["per_level"])
    assert {key: parts[key] for key in ("mse", "relative", "cosine")} == pytest.approx(
        {key: whole[key] for key in ("mse", "relative", "cosine")}
    )


def test_codes_that_say_nothing_are_as_good_as_the_mean() -> None:
    vectors = np.random.default_rng(0).normal(size=(200, 5)) + 3
    hashed = HashedCodes(3, 16).fit(vectors)
    codes = np.random.default_rng(1).integers(0, hashed.codebook_sizes[0], size=(200, 3))
    found = reconstruction(vectors, codes, hashed)
    assert found["relative"] == pytest.approx(1, abs=1e-6)
    assert found["per_level"] == pytest.approx([1, 1, 1], abs=1e-6)


def test_more_levels_leave_less() -> None:
    vectors = np.random.default_rng(0).normal(size=(500, 6))
    quantizer = ResidualKMeans(4, 16, niter=5).fit(vectors)
    levels = reconstruction(vectors, quantizer.encode(vectors), quantizer)["per_level"]
    assert levels == sorted(levels, reverse=True)
    assert 0 < levels[-1] < 0.3


class Curved:
    """No sum of points: its decoder is all that is known of it."""

    codebook_sizes = (3, 4)
    tables = tuple(np.random.default_rng(2).normal(size=(size, 5)) for size in codebook_sizes)

    def decode(self, codes: np.ndarray) -> np.ndarray:
        return np.tanh(self.tables[0][codes[:, 0]] * self.tables[1][codes[:, 1]]).astype(np.float32)


def test_without_level_points_there_is_no_error_per_level() -> None:
    generator = np.random.default_rng(0)
    codes = np.column_stack([generator.integers(0, 3, 40), generator.integers(0, 4, 40)])
    vectors = generator.normal(size=(40, 5))
    found = reconstruction(vectors, codes, Curved())
    assert found["per_level"] == []
    expected = by_loops(vectors, Curved().decode(codes))
    assert {key: found[key] for key in expected} == pytest.approx(expected)


class Points:
    """One level of given points."""

    def __init__(self, *points: list[float]) -> None:
        self.points = np.array(points, dtype=np.float32)
        self.codebook_sizes = (len(points),)

    def decode(self, codes: np.ndarray) -> np.ndarray:
        return self.points[codes[:, 0]]


def test_by_hand() -> None:
    vectors = np.array([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0], [0.0, 3.0]])
    quantizer = Points([1.0, 1.0], [0.0, 0.0])
    found = reconstruction(vectors, np.array([[0], [0], [0], [1]]), quantizer)
    # Squared errors 1, 1, 2 and 9; the mean is (1/4, 1), from which squared distances add up to 3/4 + 6.
    assert found["mse"] == pytest.approx(13 / 4)
    assert found["relative"] == pytest.approx(13 / 6.75)
    # Two of 45 degrees, the vector of 0 left out, and a point of 0.
    assert found["cosine"] == pytest.approx(2 * math.sqrt(0.5) / 3)


def test_equal_vectors_have_no_relative_error() -> None:
    vectors = np.full((3, 2), 0.1)  # whose mean is not 0.1
    found = reconstruction(vectors, np.zeros((3, 1), np.int64), Points([0.0, 0.1]))
    assert found["relative"] is None
    assert found["per_level"] == []
    assert found["mse"] == pytest.approx(0.01)
    zeros = reconstruction(np.zeros((3, 2)), np.zeros((3, 1), np.int64), Points([0.0, 0.1]))
    assert zeros["cosine"] is None
    residual = ResidualKMeans(2, 4).fit(vectors)
    assert reconstruction(vectors, residual.encode(vectors), residual)["per_level"] == []


def test_misuse_is_refused() -> None:
    vectors = np.ones((2, 2))
    for codes in (np.zeros((3, 1), np.int64), np.zeros((2, 0), np.int64), np.zeros(2, np.int64)):
        with pytest.raises(TokenizerError, match="do not belong to 2 vectors and 1 levels"):
            reconstruction(vectors, codes, Points([0.0, 0.0]))
    with pytest.raises(TokenizerError, match="NaN"):
        reconstruction(np.array([[np.nan]]), np.zeros((1, 1), np.int64), Points([0.0]))
    quantizer = ResidualKMeans(1, 2).fit(np.eye(2))
    with pytest.raises(TokenizerError, match="codebooks"):
        reconstruction(vectors, np.array([[0], [2]]), quantizer)
