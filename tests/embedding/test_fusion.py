"""Fusion: each block's share of the distances, items without a signal, and new items by text alone."""

import numpy as np
import pytest

from llmrec.embedding import Fusion, Whitening
from llmrec.exceptions import ArtefactError, DataError


@pytest.fixture
def blocks() -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    text = 5 + generator.normal(size=(60, 10)) * np.linspace(0.1, 3, 10)
    collaborative = 100 * generator.normal(size=(60, 4)) + 7
    collaborative[:5] = 0
    return text, collaborative


@pytest.mark.parametrize("weight", [0.0, 0.25, 0.5, 1.0])
def test_blocks_have_their_share(blocks, weight: float) -> None:
    text, collaborative = blocks
    fused = Fusion.fit(text, collaborative, weight).transform(text, collaborative)
    assert fused.shape == (60, 8)
    assert fused.dtype == np.float32
    assert np.linalg.norm(fused[:, :4], axis=1).mean() == pytest.approx(np.sqrt(1 - weight), abs=1e-5)
    assert np.linalg.norm(fused[5:, 4:], axis=1).mean() == pytest.approx(np.sqrt(weight), abs=1e-5)
    np.testing.assert_allclose(fused[:, :4].mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(fused[5:, 4:].mean(axis=0), 0, atol=1e-5)


def test_text_is_its_principal_components_half_whitened(blocks) -> None:
    text, collaborative = blocks
    fused = Fusion.fit(text, collaborative, 0.5).transform(text, collaborative)[:, :4].astype(np.float64)
    covariance = fused.T @ fused
    np.testing.assert_allclose(covariance - np.diag(np.diag(covariance)), 0, atol=1e-4)
    variances = np.linalg.eigvalsh(np.cov(text.T))[::-1][:4]
    np.testing.assert_allclose(
        np.diag(covariance) / np.diag(covariance)[0], np.sqrt(variances / variances[0]), rtol=1e-4
    )


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("text_dim", "kept"), [(None, 4), (6, 6), (99, 10)])
def test_whitened_text_is_cut_centred_and_scaled_and_no_more(blocks, power: float, text_dim, kept: int) -> None:
    text, collaborative = blocks
    white = Whitening.fit(text, power=power).transform(text).astype(np.float64) + 3
    fusion = Fusion.fit(white, collaborative, 0.3, text_dim, whitened=True)
    centred = white[:, :kept] - white[:, :kept].mean(axis=0)
    expected = centred * np.sqrt(0.7) / np.linalg.norm(centred, axis=1).mean()
    fused = fusion.transform(white, collaborative)
    np.testing.assert_allclose(fused[:, :kept], expected, atol=1e-5)
    plain = Fusion.fit(text, collaborative, 0.3)
    np.testing.assert_allclose(fused[:, kept:], plain.transform(text, collaborative)[:, 4:], atol=1e-5)
    np.testing.assert_array_equal(fusion.transform(white[:5]), fused[:5])


def explained(text: np.ndarray, block: np.ndarray) -> float:
    """The share of the text's variance that lies in the span of a block's columns."""
    centred = text - text.mean(axis=0)
    basis, _ = np.linalg.qr(block - block.mean(axis=0))
    return float(np.linalg.norm(basis.T @ centred) ** 2 / np.linalg.norm(centred) ** 2)


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_whitening_costs_the_fused_text_no_variance(power: float) -> None:
    generator = np.random.default_rng(1)
    rotation, _ = np.linalg.qr(generator.normal(size=(40, 40)))
    text = (generator.normal(size=(500, 40)) * 0.8 ** np.arange(40)) @ rotation
    collaborative = generator.normal(size=(500, 4))
    largest = np.linalg.svd(text - text.mean(axis=0), compute_uv=False) ** 2
    white = Whitening.fit(text, power=power).transform(text)
    block = Fusion.fit(white, collaborative, whitened=True).transform(white, collaborative)[:, :4]
    assert explained(text, block) == pytest.approx(largest[:4].sum() / largest.sum(), abs=1e-5)
    # Without the word, fully whitened text keeps four directions of rounding.
    blind = Fusion.fit(white, collaborative).transform(white, collaborative)[:, :4]
    assert (explained(text, blind) < 0.5) == (power == 1.0)


def test_items_without_a_signal_rely_on_text_alone(blocks) -> None:
    text, collaborative = blocks
    fusion = Fusion.fit(text, collaborative)
    fused = fusion.transform(text, collaborative)
    assert not fused[:5, 4:].any()
    np.testing.assert_array_equal(fusion.transform(text[:5]), fused[:5])


def test_distances_of_collaborative_vectors_keep_their_order(blocks) -> None:
    text, collaborative = blocks
    fused = Fusion.fit(text, collaborative, 1.0).transform(text, collaborative)[5:, 4:].astype(np.float64)
    original = collaborative[5:] - collaborative[5]
    ratio = np.linalg.norm(fused - fused[0], axis=1)[1:] / np.linalg.norm(original, axis=1)[1:]
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-5)


def test_saved_and_loaded(blocks, tmp_path) -> None:
    text, collaborative = blocks
    whitened = Fusion.fit(text, collaborative, 0.3, whitened=True)
    whitened.save(tmp_path)
    again = Fusion.from_pretrained(tmp_path)
    np.testing.assert_array_equal(again.transform(text, collaborative), whitened.transform(text, collaborative))
    fusion = Fusion.fit(text, collaborative, 0.3)
    fusion.save(tmp_path)
    loaded = Fusion.from_pretrained(tmp_path)
    np.testing.assert_array_equal(loaded.transform(text, collaborative), fusion.transform(text, collaborative))
    (tmp_path / "fusion.json").write_text("{}")
    with pytest.raises(ArtefactError, match="holds no fitted fusion"):
        Fusion.from_pretrained(tmp_path)


def test_items_that_are_all_alike_stay_finite() -> None:
    for text in (np.ones((6, 3)), np.zeros((6, 3))):
        for whitened in (False, True):
            fused = Fusion.fit(text, np.ones((6, 2)), whitened=whitened).transform(text, np.ones((6, 2)))
            np.testing.assert_allclose(fused, 0, atol=1e-6)


def test_misuse_is_refused(blocks) -> None:
    text, collaborative = blocks
    with pytest.raises(DataError, match=r"weight of 1\.5"):
        Fusion.fit(text, collaborative, 1.5)
    with pytest.raises(DataError, match="do not belong to the same items"):
        Fusion.fit(text[:-1], collaborative)
    with pytest.raises(DataError, match="no collaborative signal"):
        Fusion.fit(text, np.zeros((60, 4)))
