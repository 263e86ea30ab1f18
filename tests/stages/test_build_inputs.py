"""semantic_ids/build.py by what it is given: whitening, collaborative sources, LETTER, several processes."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from safetensors.numpy import load_file

from llmrec.catalog import Catalog
from llmrec.data import Interactions, Items, leave_one_out
from llmrec.data.arguments import ColumnArguments, SplitArguments
from llmrec.embedding import EmbeddingStore, Fusion, Whitening, cooccurrence_embeddings, sasrec_embeddings
from llmrec.exceptions import ArtefactError, DataError
from llmrec.item_tokenizer import ItemTokenizer
from llmrec.quantization.rqvae import RQVAE
from llmrec.quantization.titles import TitleCodes

ROOT = Path(__file__).parents[2]
IDS = [f"i{n}" for n in range(30)]


@pytest.fixture(scope="module")
def build():
    spec = importlib.util.spec_from_file_location("build_stage", ROOT / "semantic_ids/build.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty items with random vectors, sold in three circles of ten; one item is in no history."""
    folder = tmp_path_factory.mktemp("inputs")
    rng = np.random.default_rng(0)
    EmbeddingStore(IDS, rng.normal(size=(30, 8)), {"model": "own"}).save(folder / "embeddings")
    pl.DataFrame({"item_id": IDS, "title": [f"thing {n}" for n in range(30)]}).write_csv(folder / "items.csv")
    rows = [(f"u{user}", f"i{10 * (user % 3) + (user + step) % 9}", step) for user in range(45) for step in range(6)]
    pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row").write_csv(folder / "log.csv")
    return folder


def made(build, data: Path, out: Path, **arguments) -> ItemTokenizer:
    """Runs the stage in this process and reads what it wrote."""
    given = {"items": str(data / "items.csv"), "interactions": str(data / "log.csv"), "num_levels": 2}
    given |= {"codebook_size": 8, "niter": 4, "embeddings": str(data / "embeddings"), "out": str(out), **arguments}
    build.main(build.BuildArguments(**given), ColumnArguments(), SplitArguments())
    return ItemTokenizer.load(out)


def histories(data: Path) -> list[np.ndarray]:
    return leave_one_out(Interactions.read(data / "log.csv"), Items.read(data / "items.csv")).train


def recorded_error(out: Path) -> float:
    return json.loads((out / "semantic_ids.json").read_text())["collisions"]["distortion_before"]


@pytest.mark.parametrize("power", [None, 0.0, 1.0])
def test_text_is_whitened_before_it_is_fused(build, data, tmp_path, power) -> None:
    tokenizer = made(build, data, tmp_path / "ids", pca_dim=5, whitening=power)
    text = EmbeddingStore.load(data / "embeddings").rows(IDS)
    white = Whitening.fit(text, 5, power or 0.0).transform(text)
    signals = cooccurrence_embeddings(histories(data), 30, 64, 5, 0)
    fused = Fusion.fit(white, signals, 0.5).transform(white, signals)
    np.testing.assert_allclose(tokenizer.vectors(text, signals), fused, atol=1e-5)
    error = ((fused - tokenizer.quantizer.decode(tokenizer.quantizer.encode(fused))) ** 2).sum(axis=1).mean()
    assert recorded_error(tmp_path / "ids") == pytest.approx(error, rel=1e-4)


def test_whitening_alone_is_all_that_text_alone_needs(build, data, tmp_path) -> None:
    tokenizer = made(build, data, tmp_path / "ids", whitening=1.0, interactions=None)
    assert tokenizer.fusion is None
    vectors = tokenizer.vectors(EmbeddingStore.load(data / "embeddings").rows(IDS))
    np.testing.assert_allclose(np.cov(vectors.T, bias=True), np.eye(8), atol=1e-4)


def test_collaborative_vectors_come_from_a_sasrec_or_from_the_user(build, data, tmp_path) -> None:
    text = EmbeddingStore.load(data / "embeddings").rows(IDS)
    table = sasrec_embeddings(histories(data), 30, 6, epochs=2, seed=3)
    learnt = made(build, data, tmp_path / "a", collaborative="sasrec", collaborative_dim=6, sasrec_epochs=2, seed=3)
    np.testing.assert_allclose(
        learnt.vectors(text, table), Fusion.fit(text, table, 0.5).transform(text, table), atol=1e-5
    )
    # The user's own, in another order, without one item, with one that is not in the table.
    own = EmbeddingStore([*IDS[:0:-1], "stranger"], np.concatenate([table[:0:-1], np.ones((1, 6))]), {"model": "mine"})
    own.save(tmp_path / "own")
    given = made(build, data, tmp_path / "b", collaborative_embeddings=str(tmp_path / "own"))
    kept = table.copy()
    kept[0] = 0
    np.testing.assert_allclose(given.vectors(text, kept), Fusion.fit(text, kept, 0.5).transform(text, kept), atol=1e-5)
    assert recorded_error(tmp_path / "a") != recorded_error(tmp_path / "b")


def test_letter_learns_from_text_drawn_to_the_signals(build, data, tmp_path) -> None:
    chosen = {"quantizer": "rqvae", "fusion": "letter", "epochs": 4, "seed": 1, "collaborative_dim": 6}
    tokenizer = made(build, data, tmp_path / "ids", alignment=0.1, diversity=0.001, **chosen)
    assert tokenizer.fusion is None
    text = EmbeddingStore.load(data / "embeddings").rows(IDS)
    signals = cooccurrence_embeddings(histories(data), 30, 6, 5, 1)
    settings = {"alignment": 0.1, "diversity": 0.001, "update": "gradient", "epochs": 4, "seed": 1}
    alone = RQVAE(2, 8, **settings).fit(text, collaborative=signals)
    assert (tokenizer.quantizer.encode(text) == alone.encode(text)).all()
    plain = RQVAE(2, 8, epochs=4, seed=1).fit(text)
    assert not np.allclose(plain.decode(plain.encode(text)), alone.decode(alone.encode(text)))


@pytest.mark.parametrize("wrong", [{"quantizer": "rkmeans"}, {"quantizer": "rqvae", "interactions": None}])
def test_letter_needs_an_rqvae_and_a_log(build, data, tmp_path, wrong) -> None:
    with pytest.raises(DataError, match="It aligns an RQ-VAE with what users do"):
        made(build, data, tmp_path / "ids", fusion="letter", **wrong)
    assert not (tmp_path / "ids").exists()


@pytest.mark.slow
def test_two_processes_write_one_result(build, data, tmp_path) -> None:
    flags = ["--embeddings", data / "embeddings", "--items", data / "items.csv", "--interactions", data / "log.csv"]
    flags += ["--quantizer", "rqvae", "--num_levels", 2, "--codebook_size", 8, "--epochs", 4]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command = [*launcher, ROOT / "semantic_ids/build.py", *flags, "--out", tmp_path / "two"]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(list(map(str, command)), env=variables, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("Every item has a code of its own") == 1
    made(build, data, tmp_path / "one", quantizer="rqvae", epochs=4)
    one, two = (load_file(tmp_path / name / "codes.safetensors")["codes"] for name in ("one", "two"))
    assert (one == two).all()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


def test_titles_need_no_vectors(build, data, tmp_path) -> None:
    items = pl.DataFrame({"item_id": IDS, "title": ["red bolt", "red bolt", "Blue bolt", *["nut"] * 27]})
    items.write_csv(tmp_path / "items.csv")
    arguments = {"items": str(tmp_path / "items.csv"), "quantizer": "titles", "interactions": str(data / "log.csv")}
    with pytest.raises(ArtefactError, match="'titles', which encodes no vectors"):
        made(build, data, tmp_path / "ids", **arguments)
    described = json.loads((tmp_path / "ids/semantic_ids.json").read_text())
    report = described["collisions"]
    assert (described["split"], report["policy"], report["tokens_per_item"]) == (None, "append", 3)
    assert (report["sharing_items"], report["largest_group"], report["unique_codes_before"]) == (29, 27, 3)
    codes = Catalog.from_build(tmp_path / "ids").codes
    assert len(np.unique(codes, axis=0)) == 30
    titles = TitleCodes.from_pretrained(tmp_path / "ids/codebooks").decode(codes[:3, :2])
    assert titles == ["red | bolt", "red | bolt", "blue | bolt"]
    assert described["codebook_sizes"] == [5, 5, 27]
