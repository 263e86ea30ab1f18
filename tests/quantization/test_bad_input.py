"""Every tokenizer on what it cannot quantise, on files it cannot read, and what its codes promise."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrec.exceptions import ArtefactError, LLMRecError, TokenizerError
from llmrec.quantization import HashedCodes, ProductQuantizer, ResidualKMeans, ResidualVQ, ScalarQuantizer
from llmrec.quantization.rqvae import RQVAE
from llmrec.quantization.titles import TitleCodes

TINY = {"latent_dim": 3, "hidden": (8,), "epochs": 3, "batch_size": 32}
QUANTIZERS: dict[str, Callable[[], Any]] = {
    "residual k-means": lambda: ResidualKMeans(2, 6),
    "balanced": lambda: ResidualKMeans(2, 6, balanced=True),
    "normalised": lambda: ResidualKMeans(2, 6, normalise_residuals=True),
    "residual VQ": lambda: ResidualVQ(2, 6),
    "PQ": lambda: ProductQuantizer(2, 6, rotate=False),
    "OPQ": lambda: ProductQuantizer(2, 6, rounds=3),
    "FSQ": lambda: ScalarQuantizer(2, (3, 2)),
    "FSQ tanh": lambda: ScalarQuantizer(2, (3, 2), layout="components", bound="tanh"),
    "RQ-VAE": lambda: RQVAE(2, 6, **TINY),
    "hashed": lambda: HashedCodes(2, 6),
}
# Codes of one sub-space or number each, which decoding does not mix: decoded and encoded again, they come back.
IDEMPOTENT = ("PQ", "OPQ", "FSQ", "FSQ tanh")
WIDTH = 5

every = pytest.mark.parametrize("name", QUANTIZERS)


def vectors(rows: int = 60, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, WIDTH)).astype(np.float32)


@pytest.fixture(scope="module")
def fitted() -> dict[str, Any]:
    return {name: make().fit(vectors()) for name, make in QUANTIZERS.items()}


def refused(call: Callable[[], Any], error: type[LLMRecError] = TokenizerError) -> str:
    """The message, which has two sentences: what is wrong, and what to do."""
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    assert re.search(r"[^\s]\. [A-Z][^.]", message), message
    assert message.endswith("."), message
    return message


def check_codes(quantizer: Any, rows: np.ndarray) -> np.ndarray:
    """Codes of the rows, in shape, type and range, and the same one by one; their points too."""
    codes = quantizer.encode(rows)
    assert codes.shape == (len(rows), 2)
    assert codes.dtype == np.int32
    assert codes.min() >= 0
    assert (codes < np.array(quantizer.codebook_sizes)).all()
    points = quantizer.decode(codes)
    assert points.shape == rows.shape
    assert points.dtype == np.float32
    assert np.isfinite(points).all()
    for row in range(min(3, len(rows))):
        np.testing.assert_array_equal(quantizer.encode(rows[row : row + 1])[0], codes[row])
    return codes


@every
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_none_are_refused_and_located(fitted: dict[str, Any], name: str, bad: float) -> None:
    rows = vectors()
    rows[7, 2] = rows[40, 0] = bad
    for call in (QUANTIZERS[name]().fit, fitted[name].encode):
        assert refused(lambda call=call: call(rows)).startswith("2 embedding(s) hold NaN or infinity, row 7 first.")


@every
@pytest.mark.parametrize("shape", [(0, WIDTH), (3, 0), (WIDTH,), (), (2, 3, WIDTH)])
def test_what_is_no_matrix_is_refused(fitted: dict[str, Any], name: str, shape: tuple[int, ...]) -> None:
    for call in (QUANTIZERS[name]().fit, fitted[name].encode):
        assert f"shape {shape}" in refused(lambda call=call: call(np.zeros(shape)))


@every
def test_another_width_is_refused_at_encode(fitted: dict[str, Any], name: str) -> None:
    for width in (WIDTH - 1, WIDTH + 1):
        message = refused(lambda width=width: fitted[name].encode(np.zeros((3, width))))
        assert f"{width} wide, the codebooks {WIDTH}" in message


@every
def test_numbers_too_large_to_square_are_refused(fitted: dict[str, Any], name: str) -> None:
    rows = vectors().astype(np.float64) * 1e30
    for call in (QUANTIZERS[name]().fit, fitted[name].encode):
        assert "whose squares are too large" in refused(lambda call=call: call(rows))


@every
@pytest.mark.parametrize("value", [0.0, 0.3, -7e9])
def test_equal_embeddings_share_one_code_whose_point_they_are(name: str, value: float) -> None:
    rows = np.full((30, WIDTH), value)
    quantizer = QUANTIZERS[name]().fit(rows)
    codes = check_codes(quantizer, rows)
    assert len(np.unique(codes, axis=0)) == 1
    # The decoder of an RQ-VAE learns the point, in units of the embeddings' spread, here 1.
    np.testing.assert_allclose(quantizer.decode(codes), rows, rtol=1e-5, atol=0.8 if name == "RQ-VAE" else 1e-5)


@every
@pytest.mark.parametrize("items", [1, 2, 4])
def test_fewer_items_than_codes_have_at_most_as_many_codes(
    name: str, items: int, caplog: pytest.LogCaptureFixture
) -> None:
    rows = vectors(items)
    quantizer = QUANTIZERS[name]().fit(rows)
    assert max(quantizer.codebook_sizes) <= items
    check_codes(quantizer, rows)
    assert f"{items} " in caplog.text
    assert "not" in caplog.text  # a warning that names both numbers


@every
def test_duplicates_share_a_code(name: str) -> None:
    rows = vectors(8).repeat(5, axis=0)[np.random.default_rng(1).permutation(40)]
    quantizer = QUANTIZERS[name]().fit(rows)
    codes = check_codes(quantizer, rows)
    _, which = np.unique(rows, axis=0, return_inverse=True)
    for item in range(8):
        assert len(np.unique(codes[which.reshape(-1) == item], axis=0)) == 1


@every
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int64])
def test_every_number_type_gives_the_codes_of_its_float64(fitted: dict[str, Any], name: str, dtype: type) -> None:
    rows = (8 * vectors()).astype(dtype)
    wide = rows.astype(np.float64)
    codes = check_codes(fitted[name], rows)
    np.testing.assert_array_equal(codes, fitted[name].encode(wide))
    quantizer = QUANTIZERS[name]().fit(rows)
    np.testing.assert_array_equal(check_codes(quantizer, rows), quantizer.encode(wide))


@every
def test_codes_that_are_none_are_refused_at_decode(fitted: dict[str, Any], name: str) -> None:
    quantizer = fitted[name]
    sizes = quantizer.codebook_sizes
    for codes in (
        *([[sizes[0], 0]], [[0, sizes[1]]], [[0, 0], [-1, 0]], [[0, -1]], [[0, 2**31 - 1]]),
        *([[0]], [[0, 0, 0]], [0, 0]),
    ):
        refused(lambda codes=codes: quantizer.decode(np.array(codes)))
    assert quantizer.decode(np.zeros((0, 2), dtype=np.int32)).shape == (0, WIDTH)


@every
@pytest.mark.parametrize("codes", [np.array([[0.5, 0.0]]), np.array([["0", "0"]]), np.array([[np.nan, 0]])])
def test_codes_that_are_no_whole_numbers_are_refused(fitted: dict[str, Any], name: str, codes: np.ndarray) -> None:
    refused(lambda: fitted[name].decode(codes))


@every
def test_before_the_fit_everything_is_refused(name: str, tmp_path: Path) -> None:
    quantizer = QUANTIZERS[name]()
    calls: tuple[Callable[[], Any], ...] = (
        lambda: quantizer.encode(vectors()),
        lambda: quantizer.decode(np.zeros((1, 2), dtype=np.int32)),
        lambda: quantizer.codebook_sizes,
        lambda: quantizer.save(tmp_path),
    )
    for call in calls:
        assert "no codebooks yet. Call fit" in refused(call)
    assert not list(tmp_path.iterdir())


@every
def test_saved_and_loaded_it_gives_equal_codes_and_points(fitted: dict[str, Any], name: str, tmp_path: Path) -> None:
    quantizer, unseen = fitted[name], vectors(200, seed=3)
    quantizer.save(tmp_path / "codebooks")
    loaded = type(quantizer).from_pretrained(tmp_path / "codebooks")
    codes = quantizer.encode(unseen)
    np.testing.assert_array_equal(loaded.encode(unseen), codes)
    assert loaded.decode(codes).tobytes() == quantizer.decode(codes).tobytes()
    assert loaded.codebook_sizes == quantizer.codebook_sizes


@every
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_torn_codebooks_are_refused(fitted: dict[str, Any], name: str, share: float, tmp_path: Path) -> None:
    fitted[name].save(tmp_path)
    file = next(tmp_path.glob("*.safetensors"))
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    assert "holds no" in refused(lambda: type(fitted[name]).from_pretrained(tmp_path), ArtefactError)


@every
def test_manifests_that_are_missing_torn_or_of_another_kind_are_refused(
    fitted: dict[str, Any], name: str, tmp_path: Path
) -> None:
    quantizer = fitted[name]
    load = type(quantizer).from_pretrained
    quantizer.save(tmp_path)
    manifest = tmp_path / "quantizer.json"
    whole = json.loads(manifest.read_text(encoding="utf-8"))
    texts = ["", "[1]", "null", manifest.read_text(encoding="utf-8")[:-20]]
    texts += [json.dumps({**whole, "quantizer": "another"})]
    if name != "hashed":  # which has no tensor per level: with three levels it is another, whole quantizer
        texts += [json.dumps({**whole, "num_levels": 3})]
    texts += [json.dumps({key: value for key, value in whole.items() if key != "quantizer"})]
    for text in texts:
        manifest.write_text(text, encoding="utf-8")
        assert str(tmp_path) in refused(lambda: load(tmp_path), ArtefactError)
    manifest.unlink()
    refused(lambda: load(tmp_path), ArtefactError)
    refused(lambda: load(tmp_path / "nowhere"), ArtefactError)
    manifest.write_text(json.dumps(whole), encoding="utf-8")
    np.testing.assert_array_equal(load(tmp_path).encode(vectors()), quantizer.encode(vectors()))


@pytest.mark.parametrize("name", IDEMPOTENT)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 999), rows=st.integers(6, 60))
def test_codes_of_exchangeable_levels_come_back_from_their_points(name: str, seed: int, rows: int) -> None:
    quantizer = QUANTIZERS[name]().fit(vectors(rows, seed))
    codes = quantizer.encode(vectors(50, seed + 1))
    np.testing.assert_array_equal(quantizer.encode(quantizer.decode(codes)), codes)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 999), rows=st.integers(6, 60))
def test_residual_codes_come_back_where_a_search_of_all_sums_finds_them(seed: int, rows: int) -> None:
    # A beam of all K prefixes is exhaustive for two levels; one level of k-means is a nearest centroid.
    for quantizer in (ResidualVQ(2, 6, beam=6), ResidualKMeans(1, 6)):
        quantizer.fit(vectors(rows, seed))
        codes = quantizer.encode(vectors(50, seed + 1))
        np.testing.assert_array_equal(quantizer.encode(quantizer.decode(codes)), codes)


@pytest.mark.parametrize("name", [name for name in QUANTIZERS if name not in IDEMPOTENT])
def test_the_others_promise_no_such_thing_and_say_so(name: str) -> None:
    quantizer = QUANTIZERS[name]()
    said = " ".join(str(type(quantizer).__doc__).split())
    assert re.search("need not give back the codes|need not be `codes`|need not get that code|is not `codes`", said)
    if name == "residual VQ":  # its beam of 5 is nearly all of 6 prefixes: a narrower one loses codes
        quantizer = ResidualVQ(2, 6, beam=1)
    lost = False
    for seed in range(6):
        rows = np.random.default_rng(seed).uniform(size=(20, WIDTH)) ** 3
        quantizer.fit(rows)
        codes = np.stack(np.meshgrid(*map(np.arange, quantizer.codebook_sizes)), axis=-1).reshape(-1, 2)
        lost |= bool((check_codes(quantizer, quantizer.decode(codes)) != codes).any())
    assert lost


@pytest.mark.parametrize("name", ["residual k-means", "residual VQ", "PQ", "OPQ", "FSQ", "FSQ tanh", "hashed"])
def test_points_are_the_sums_of_their_levels(fitted: dict[str, Any], name: str) -> None:
    quantizer = fitted[name]
    codes = quantizer.encode(vectors(40, seed=4))
    total = sum(quantizer.level_points(level)[codes[:, level]].astype(np.float64) for level in range(2))
    np.testing.assert_allclose(quantizer.decode(codes), total, atol=1e-5)


TITLES = ["Red shoes", "red \U0001f45f shoes, size 42", "<b>Blue</b>\x00 hat", "", None, "blue hat", "  "]


def test_titles_of_any_kind_have_codes() -> None:
    titles = TitleCodes(2, 6).fit(TITLES)
    codes = titles.encode(TITLES)
    assert (codes.shape, codes.dtype) == ((7, 2), np.int32)
    assert (codes < np.array(titles.codebook_sizes)).all()
    assert codes[[3, 4, 6]].tolist() == [[0, 0]] * 3
    assert len(titles.decode(codes)) == 7
    one = TitleCodes(2, 6).fit(["shoes"])
    assert one.encode(["shoes", "hat"]).tolist() == [[0, 0], [0, 0]]  # one item leaves room for no n-gram
    assert TitleCodes(2, 6).fit(["shoes"] * 9).encode(["shoes"]).tolist() == [[1, 0]]


def test_titles_that_are_none_are_refused(tmp_path: Path) -> None:
    titles = TitleCodes(2, 6).fit(TITLES)
    refused(lambda: TitleCodes(2, 6).fit([]))
    refused(lambda: TitleCodes(2, 6).encode(TITLES))
    for codes in ([[0, titles.codebook_sizes[1]]], [[-1, 0]], [[0]], [[0.5, 0]]):
        refused(lambda codes=codes: titles.decode(np.array(codes)))
    titles.save(tmp_path)
    np.testing.assert_array_equal(TitleCodes.from_pretrained(tmp_path).encode(TITLES), titles.encode(TITLES))
    for file in sorted(tmp_path.iterdir()):
        content = file.read_bytes()
        for share in (0.0, 0.5, 0.95):
            file.write_bytes(content[: int(share * len(content))])
            refused(lambda: TitleCodes.from_pretrained(tmp_path), ArtefactError)
        file.unlink()
        refused(lambda: TitleCodes.from_pretrained(tmp_path), ArtefactError)
        file.write_bytes(content)
    ResidualKMeans(2, 2).fit(np.eye(3)).save(tmp_path)
    refused(lambda: TitleCodes.from_pretrained(tmp_path), ArtefactError)
