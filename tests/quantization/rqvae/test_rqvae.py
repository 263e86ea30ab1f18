"""RQVAE as a quantizer: codes against a brute-force definition, files, odd inputs, real titles."""

import gzip
import json
from typing import get_args

import numpy as np
import pytest
import torch

from llmrec.embedding import static_embeddings
from llmrec.exceptions import ArtefactError, TokenizerError
from llmrec.quantization import ResidualKMeans, resolve_collisions
from llmrec.quantization.rqvae import RQVAE, codebook, rqvae, training
from llmrec.quantization.rqvae.model import Network

SMALL = {
    "codebook_size": 8,
    "latent_dim": 4,
    "hidden": (12, 7),
    "batch_size": 64,
    "epochs": 12,
    "num_levels": 3,
    "learning_rate": 0.02,
}


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    generator = np.random.default_rng(0)
    return (5 + generator.normal(size=(300, 3)) @ generator.normal(size=(3, 6))).astype(np.float32)


@pytest.fixture(scope="module")
def fitted(vectors: np.ndarray) -> RQVAE:
    return RQVAE(**SMALL).fit(vectors)


def brute_force(quantizer: RQVAE, vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes and points by the network itself in float64, one row after another."""
    weights = quantizer._weights
    size, width = weights["quantizer.levels.0.codes"].shape
    network = Network(vectors.shape[1], quantizer.hidden, width, quantizer.num_levels, size).double()
    state = {name: torch.from_numpy(value).double() for name, value in weights.items() if "." in name}
    assert not network.load_state_dict(state, strict=False).unexpected_keys
    codes, points = [], []
    for row in vectors.astype(np.float64):
        with torch.no_grad():
            latent = network.encoder(torch.from_numpy((row - weights["mean"]) / weights["scale"]))
        residual, total, code = latent.numpy(), np.zeros(width), []
        for points_of_level in quantizer.codebooks:
            code.append(int(((residual - points_of_level.astype(np.float64)) ** 2).sum(axis=1).argmin()))
            residual, total = residual - points_of_level[code[-1]], total + points_of_level[code[-1]]
        codes.append(code)
        with torch.no_grad():
            points.append(network.decoder(torch.from_numpy(total)).numpy() * weights["scale"] + weights["mean"])
    return np.array(codes), np.array(points)


def test_encode_and_decode_are_the_network_s_in_float64(fitted: RQVAE, vectors: np.ndarray) -> None:
    unseen = 5 + np.random.default_rng(1).normal(size=(100, 6))
    for rows in (vectors, unseen):
        codes, points = brute_force(fitted, rows)
        found = fitted.encode(rows)
        assert found.dtype == np.int32
        np.testing.assert_array_equal(found, codes)
        np.testing.assert_allclose(fitted.decode(found), points, rtol=1e-5, atol=1e-5)
        assert fitted.decode(found).dtype == np.float32


def test_ties_take_the_lowest_code(fitted: RQVAE, vectors: np.ndarray) -> None:
    twins = RQVAE(**SMALL)
    twins._weights = {**fitted._weights}
    codes = fitted.codebooks[1].copy()
    codes[5] = codes[2]
    codes[1] = codes[2]
    twins._weights["quantizer.levels.1.codes"] = codes
    found = twins.encode(vectors)[:, 1]
    assert 1 in found
    assert not {2, 5} & set(found.tolist())


def test_chunks_change_nothing(fitted: RQVAE, vectors: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = fitted.encode(vectors)
    points = fitted.decode(codes)
    monkeypatch.setattr(rqvae, "CHUNK", 7)
    np.testing.assert_array_equal(fitted.encode(vectors), codes)
    np.testing.assert_allclose(fitted.decode(codes), points, rtol=1e-6)
    np.testing.assert_array_equal(RQVAE(**SMALL).fit(vectors).encode(vectors), codes)
    broken = vectors.copy()
    broken[50, 2] = np.nan
    with pytest.raises(TokenizerError, match="row 50 first"):
        fitted.encode(broken)


def test_embeddings_are_centred_and_keep_their_proportions(fitted: RQVAE, vectors: np.ndarray) -> None:
    exact = vectors.astype(np.float64)
    np.testing.assert_allclose(fitted._weights["mean"], exact.mean(axis=0), rtol=1e-12)
    assert fitted._weights["scale"][0] == pytest.approx(float(np.sqrt(exact.var(axis=0).mean())), rel=1e-12)
    # Shifted and stretched by powers of two, an embedding gets the same codes.
    again = RQVAE(**SMALL).fit(exact * 1024)
    np.testing.assert_array_equal(again.encode(exact * 1024), fitted.encode(vectors))


def test_a_memory_map_is_fitted_as_its_array(fitted: RQVAE, vectors: np.ndarray, tmp_path) -> None:
    np.save(tmp_path / "vectors.npy", vectors)
    mapped = np.load(tmp_path / "vectors.npy", mmap_mode="r")
    np.testing.assert_array_equal(RQVAE(**SMALL).fit(mapped).encode(mapped), fitted.encode(vectors))


def test_quantisation_learns(fitted: RQVAE, vectors: np.ndarray) -> None:
    error = ((vectors - fitted.decode(fitted.encode(vectors))) ** 2).sum()
    assert error < 0.5 * ((vectors - vectors.mean(axis=0)) ** 2).sum()
    resolved = resolve_collisions(fitted.encode(vectors), vectors, fitted)
    assert len(np.unique(resolved.codes, axis=0)) == len(vectors)


def test_saved_and_loaded(fitted: RQVAE, vectors: np.ndarray, tmp_path) -> None:
    fitted.save(tmp_path / "codebooks")
    assert sorted(file.name for file in (tmp_path / "codebooks").iterdir()) == [
        "quantizer.json", "rqvae.safetensors", "training.json",
    ]  # fmt: skip
    loaded = RQVAE.from_pretrained(tmp_path / "codebooks")
    assert loaded.settings == fitted.settings
    assert loaded.log == fitted.log
    assert loaded.codebook_sizes == (8, 8, 8)
    codes = fitted.encode(vectors)
    np.testing.assert_array_equal(loaded.encode(vectors), codes)
    np.testing.assert_array_equal(loaded.decode(codes), fitted.decode(codes))


def test_loading_and_encoding_need_no_torch(fitted: RQVAE, tmp_path, run_python) -> None:
    fitted.save(tmp_path)
    program = f"""
import sys
sys.modules["torch"] = None
import numpy as np
from llmrec.quantization.rqvae import RQVAE
quantizer = RQVAE.from_pretrained({str(tmp_path)!r})
print(quantizer.decode(quantizer.encode(np.ones((2, 6)))).shape)
"""
    done = run_python(program)
    assert done.stdout.strip() == "(2, 6)", done.stderr


@pytest.mark.parametrize("name", ["rqvae.safetensors", "quantizer.json", "training.json"])
@pytest.mark.parametrize("tear", ["gone", "empty", "half", "foreign"])
def test_torn_files_are_refused(fitted: RQVAE, tmp_path, name: str, tear: str) -> None:
    fitted.save(tmp_path)
    content = (tmp_path / name).read_bytes()
    if tear == "gone":
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes({"empty": b"", "half": content[: len(content) // 2], "foreign": b"[1]"}[tear])
    with pytest.raises(ArtefactError, match=r"holds no RQ-VAE \(.+\)\. Point to"):
        RQVAE.from_pretrained(tmp_path)


def test_a_folder_of_another_quantizer_is_refused(tmp_path) -> None:
    ResidualKMeans(2, 2).fit(np.eye(3)).save(tmp_path)
    with pytest.raises(ArtefactError, match="it holds a residual_kmeans"):
        RQVAE.from_pretrained(tmp_path)


@pytest.mark.parametrize("items", [1, 2, 5])
def test_small_catalogs_have_as_many_codes_as_items(items: int, caplog: pytest.LogCaptureFixture) -> None:
    rows = np.random.default_rng(3).normal(size=(items, 4))
    quantizer = RQVAE(epochs=5).fit(rows)
    assert quantizer.codebook_sizes == (items,) * 3
    assert f"{items} items: codebooks have {items} codes, not 256" in caplog.text
    assert quantizer.decode(quantizer.encode(rows)).shape == rows.shape


@pytest.mark.parametrize("value", [0.0, 0.1, 1e14])
def test_equal_items_share_one_code_and_are_reconstructed(value: float) -> None:
    rows = np.full((20, 4), value)
    quantizer = RQVAE(**SMALL).fit(rows)
    codes = quantizer.encode(rows)
    assert len(np.unique(codes, axis=0)) == 1
    np.testing.assert_allclose(quantizer.decode(codes), rows, rtol=1e-5, atol=0.5)


def test_duplicates_share_their_code() -> None:
    rows = np.random.default_rng(4).normal(size=(10, 5)).repeat(6, axis=0)
    codes = RQVAE(**{**SMALL, "codebook_size": 32}).fit(rows).encode(rows)
    assert all(len(np.unique(codes[begin : begin + 6], axis=0)) == 1 for begin in range(0, 60, 6))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (np.zeros((0, 3)), r"shape \(0, 3\)"),
        (np.zeros(3), r"shape \(3,\)"),
        (np.array([[0.0, 1.0], [np.nan, 0.0]]), "row 1 first"),
        (np.array([[np.inf, 1.0], [0.0, 0.0]]), "row 0 first"),
    ],
)
def test_bad_embeddings_are_refused(rows: np.ndarray, message: str) -> None:
    with pytest.raises(TokenizerError, match=message):
        RQVAE().fit(rows)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_levels": 0}, "num_levels is 0"),
        ({"epochs": 0}, "epochs is 0"),
        ({"hidden": (4, 0)}, "hidden is 0"),
        ({"decay": 1.0}, "decay is 1.0"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"commitment": -1.0}, "commitment is -1.0"),
        ({"estimator": "gumbel"}, "estimator is 'gumbel'. Use one of rotation, straight-through"),
        ({"update": "none"}, "update is 'none'"),
        ({"mixed_precision": "fp8"}, "mixed_precision is 'fp8'"),
    ],
)
def test_bad_settings_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(TokenizerError, match=message):
        RQVAE(**changes)


def test_the_words_of_settings_are_those_of_the_network() -> None:
    assert set(get_args(rqvae.Estimator)) == set(codebook.ESTIMATORS) == set(get_args(codebook.Estimator))
    assert get_args(rqvae.Update) == get_args(codebook.Update)
    assert get_args(rqvae.Precision) == get_args(training.Precision)


def test_misuse_is_refused(fitted: RQVAE) -> None:
    for call in (lambda: RQVAE().encode(np.ones((2, 2))), lambda: RQVAE().codebook_sizes, lambda: RQVAE().save("x")):
        with pytest.raises(TokenizerError, match="no codebooks yet"):
            call()
    with pytest.raises(TokenizerError, match="2 wide, the codebooks 6"):
        fitted.encode(np.ones((2, 2)))
    for codes in ([[0, 8, 0]], [[-1, 0, 0]], [[0, 0]]):
        with pytest.raises(TokenizerError):
            fitted.decode(np.array(codes))


def test_real_titles_use_the_codes_and_come_near_residual_kmeans(shared_data) -> None:
    with gzip.open(shared_data / "amazon-scientific" / "items.jsonl.gz", "rt", encoding="utf-8") as file:
        titles = [json.loads(line).get("title") or "" for line in file]
    rows = static_embeddings(titles, 32)
    settings = {"codebook_size": 64, "hidden": (128,), "epochs": 40, "batch_size": 128}
    quantizer = RQVAE(**settings, learning_rate=4e-3).fit(rows)
    codes = quantizer.encode(rows)
    assert min(len(np.unique(level)) / 64 for level in codes.T) >= 0.95

    def error(points: np.ndarray) -> float:
        return float(((rows - points) ** 2).sum(axis=1).mean())

    plain = ResidualKMeans(3, 64).fit(rows)
    assert error(quantizer.decode(codes)) < 1.25 * error(plain.decode(plain.encode(rows)))
