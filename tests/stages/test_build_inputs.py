"""semantic_ids/build.py by what it is given: whitening, collaborative sources, LETTER, several processes."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import yaml
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


def record(out: Path) -> dict:
    return json.loads((out / "semantic_ids.json").read_text())


def recorded_error(out: Path) -> float:
    return record(out)["collisions"]["distortion_before"]


@pytest.mark.parametrize("power", [None, 0.0, 1.0])
def test_text_is_whitened_before_it_is_fused(build, data, tmp_path, power) -> None:
    tokenizer = made(build, data, tmp_path / "ids", pca_dim=5, whitening=power)
    text = EmbeddingStore.load(data / "embeddings").rows(IDS)
    white = Whitening.fit(text, 5, power or 0.0).transform(text)
    signals = cooccurrence_embeddings(histories(data), 30, 64, 5, 0)
    fused = Fusion.fit(white, signals, 0.5, whitened=True).transform(white, signals)
    assert np.abs(fused - Fusion.fit(white, signals, 0.5).transform(white, signals)).max() > 0.01
    np.testing.assert_allclose(tokenizer.vectors(text, signals), fused, atol=1e-5)
    error = ((fused - tokenizer.quantizer.decode(tokenizer.quantizer.encode(fused))) ** 2).sum(axis=1).mean()
    assert recorded_error(tmp_path / "ids") == pytest.approx(error, rel=1e-4)


def test_whitening_alone_is_all_that_text_alone_needs(build, data, tmp_path) -> None:
    tokenizer = made(build, data, tmp_path / "ids", whitening=1.0, interactions=None)
    assert tokenizer.fusion is None
    assert (record(tmp_path / "ids")["collaborative"], record(tmp_path / "ids")["fusion"]) == (None, None)
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
    facts = [(record(tmp_path / name)["collaborative"], record(tmp_path / name)["fusion"]) for name in "ab"]
    assert facts == [("sasrec", "concat"), ("own", "concat")]


def test_own_collaborative_vectors_need_no_log(build, data, tmp_path) -> None:
    text = EmbeddingStore.load(data / "embeddings").rows(IDS)
    own = np.random.default_rng(2).normal(size=(30, 5)).astype(np.float32)
    own[7] = 0
    EmbeddingStore([*IDS[:7], *IDS[8:]], np.delete(own, 7, axis=0), {"model": "mine"}).save(tmp_path / "own")
    given = {"interactions": None, "collaborative_embeddings": str(tmp_path / "own")}
    tokenizer = made(build, data, tmp_path / "ids", collaborative_weight=0.25, **given)
    fused = Fusion.fit(text, own, 0.25).transform(text, own)
    np.testing.assert_allclose(tokenizer.vectors(text, own), fused, atol=1e-5)
    described = record(tmp_path / "ids")
    assert (described["split"], described["protocol"]) == (None, None)
    assert (described["collaborative"], described["fusion"]) == ("own", "concat")
    error = ((fused - tokenizer.quantizer.decode(tokenizer.quantizer.encode(fused))) ** 2).sum(axis=1).mean()
    assert described["collisions"]["distortion_before"] == pytest.approx(error, rel=1e-4)
    letter = made(build, data, tmp_path / "letter", quantizer="rqvae", niter=25, fusion="letter", epochs=3, **given)
    described = record(tmp_path / "letter")
    assert (described["collaborative"], described["fusion"], letter.fusion) == ("own", "letter", None)
    drawn = RQVAE(2, 8, epochs=3, alignment=0.02, diversity=0.0001, update="gradient").fit(text, collaborative=own)
    assert (letter.quantizer.encode(text) == drawn.encode(text)).all()


def test_a_weight_of_0_or_no_signal_at_all_is_text_alone(build, data, tmp_path) -> None:
    EmbeddingStore(["stranger"], np.ones((1, 5)), {"model": "mine"}).save(tmp_path / "own")
    for name, given in (("weight", {"collaborative_weight": 0}), ("own", {"interactions": None})):
        own = {"collaborative_embeddings": str(tmp_path / "own")}
        tokenizer = made(build, data, tmp_path / name, **own, **given)
        described = record(tmp_path / name)
        assert (described["collaborative"], described["fusion"], described["split"]) == (None, None, None)
        assert tokenizer.fusion is None


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        *[
            ({name: value}, f"--{name.replace('_', '-')} is {value}, which is out of range")
            for name, values in {
                **dict.fromkeys(("num_levels", "codebook_size", "niter", "window", "pca_dim"), (0, -1)),
                **dict.fromkeys(("collaborative_dim", "sasrec_epochs", "epochs", "beam", "ngram"), (0, -1)),
                **dict.fromkeys(("collaborative_weight", "whitening"), (-0.1, 1.1, math.nan)),
                **dict.fromkeys(("alignment", "diversity"), (-0.1, math.inf, math.nan)),
                "seed": (-1,),
            }.items()
            for value in values
        ],
        ({"fsq_levels": [8, 0], "quantizer": "fsq"}, r"--fsq-levels is \[8, 0\], which is out of range"),
        ({"quantizer": "opq", "balanced": True}, "--balanced True belongs to --quantizer rkmeans, which here is opq"),
        ({"normalise_residuals": True, "quantizer": "rvq"}, "--normalise-residuals True belongs to --quantizer rkm"),
        ({"beam": 7}, "--beam 7 belongs to --quantizer rvq, which here is rkmeans"),
        ({"estimator": "rotation"}, "--estimator rotation belongs to --quantizer rqvae"),
        ({"epochs": 3}, "--epochs 3 belongs to --quantizer rqvae"),
        ({"ngram": 2}, "--ngram 2 belongs to --quantizer titles"),
        ({"fsq_levels": [4, 4]}, r"--fsq-levels \[4, 4\] belongs to --quantizer fsq"),
        ({"codebook_size": 8, "niter": 25, "quantizer": "fsq"}, "--codebook-size 8 belongs to --quantizer rkmeans or"),
        ({"niter": 4, "quantizer": "hash"}, "--niter 4 belongs to --quantizer rkmeans or rvq or pq or opq"),
        ({"quantizer": "titles", "niter": 25, "whitening": 0.5}, "--whitening 0.5 belongs to --quantizer rkmeans or"),
        ({"quantizer": "titles", "niter": 25, "window": 3}, "--window 3 belongs to .*, which here is none"),
        ({"alignment": 0.5}, "--alignment 0.5 belongs to --fusion letter, which here is concat"),
        ({"diversity": 0.5, "quantizer": "rqvae", "niter": 25}, "--diversity 0.5 belongs to --fusion letter"),
        (
            {"quantizer": "rqvae", "niter": 25, "fusion": "letter", "collaborative_weight": 0.7},
            "--collaborative-weight 0.7 belongs to --fusion concat, which here is letter",
        ),
        ({"sasrec_epochs": 3}, "--sasrec-epochs 3 belongs to --interactions with --collaborative sasrec"),
        ({"window": 3, "collaborative": "sasrec"}, "--window 3 belongs to .* --collaborative cooccurrence, which"),
        ({"collaborative": "sasrec", "interactions": None}, "--collaborative sasrec belongs to --interactions with"),
        ({"collaborative_dim": 8, "interactions": None}, "--collaborative-dim 8 belongs to --interactions with"),
        ({"collaborative": "sasrec", "collaborative_embeddings": "own"}, "--collaborative sasrec .* here is own"),
        ({"collaborative_weight": 0.7, "interactions": None}, "--collaborative-weight 0.7 has nothing to weigh"),
    ],
)
def test_flags_that_say_nothing_are_refused_before_anything_is_read(build, tmp_path, wrong, message: str) -> None:
    given = {"embeddings": "absent", "out": str(tmp_path / "ids"), "items": "absent", "interactions": "absent"}
    with pytest.raises(DataError, match=f"^{message}"):
        build.main(build.BuildArguments(**{**given, **wrong}), ColumnArguments(), SplitArguments())


def test_recipes_and_defaults_have_only_flags_that_are_read(build) -> None:
    inputs = {"embeddings": "e", "out": "o", "items": "i"}
    recipes = [path for path in sorted((ROOT / "semantic_ids/recipes").glob("*.yaml")) if "embed" not in path.name]
    assert len(recipes) >= 6
    for recipe in recipes:
        build.check(build.BuildArguments(**inputs, interactions="log", **yaml.safe_load(recipe.read_text())))
    for quantizer in (*build.VECTORS, "titles"):
        for log in ("log", None):
            build.check(build.BuildArguments(**inputs, interactions=log, quantizer=quantizer))
    build.check(build.BuildArguments(**inputs, collaborative_weight=0))
    assert set(build.READERS) | set(build.RANGES) <= set(build.BuildArguments("", "").__dict__)
    unread = set(build.BuildArguments("", "").__dict__) - set(build.READERS)
    assert unread == {*inputs, "interactions", "quantizer", "num_levels", "fusion", "seed"}


def test_letter_learns_from_text_drawn_to_the_signals(build, data, tmp_path) -> None:
    chosen = {"quantizer": "rqvae", "fusion": "letter", "epochs": 4, "seed": 1, "collaborative_dim": 6}
    tokenizer = made(build, data, tmp_path / "ids", alignment=0.1, diversity=0.001, niter=25, **chosen)
    assert tokenizer.fusion is None
    described = record(tmp_path / "ids")
    assert (described["collaborative"], described["fusion"]) == ("cooccurrence", "letter")
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
    made(build, data, tmp_path / "one", quantizer="rqvae", niter=25, epochs=4)
    one, two = (load_file(tmp_path / name / "codes.safetensors")["codes"] for name in ("one", "two"))
    assert (one == two).all()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


def test_titles_need_no_vectors(build, data, tmp_path) -> None:
    items = pl.DataFrame({"item_id": IDS, "title": ["red bolt", "red bolt", "Blue bolt", *["nut"] * 27]})
    items.write_csv(tmp_path / "items.csv")
    arguments = {"items": str(tmp_path / "items.csv"), "quantizer": "titles", "niter": 25}
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
