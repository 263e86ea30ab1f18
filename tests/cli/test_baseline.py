import json

import numpy as np
import polars as pl
import pytest
from typer.testing import CliRunner

from llmrec.cli.main import app
from llmrec.data.interactions import Interactions
from llmrec.data.items import Items
from llmrec.data.protocols import leave_one_out
from llmrec.embedding import EmbeddingStore, static_embeddings
from llmrec.evaluation.baselines import EASE, ItemCF, Markov, Popularity, TextKNN
from llmrec.evaluation.baselines.named import BASELINES, fit_on
from llmrec.evaluation.evaluation import Evaluation, evaluate
from llmrec.evaluation.metrics import ranking_metrics, ranks_of
from llmrec.exceptions import DataError

USERS, ITEMS = 60, 30


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A log in which what follows is near, with one item that the table lacks."""
    folder = tmp_path_factory.mktemp("log")
    rng = np.random.default_rng(0)
    lengths = rng.integers(4, 12, size=USERS)
    pl.DataFrame(
        {
            "user_id": np.repeat([f"u{user}" for user in range(USERS)], lengths),
            "item_id": [f"i{row % ITEMS}" for row in np.cumsum(rng.integers(1, 4, size=lengths.sum()))],
            "timestamp": np.concatenate([1_400_000_000 + 7200 * np.sort(rng.integers(0, 900, n)) for n in lengths]),
        }
    ).write_csv(folder / "log.csv")
    words = ["red", "blue", "green", "tent", "lamp", "mug"]
    titles = [f"{words[row % 3]} {words[3 + row // 3 % 3]} no {row}" for row in range(ITEMS - 1)]
    pl.DataFrame({"item_id": [f"i{row}" for row in range(ITEMS - 1)], "title": titles}).write_csv(folder / "items.csv")
    return folder


@pytest.fixture(scope="module")
def split(files):
    interactions = Interactions.read(files / "log.csv")
    return leave_one_out(interactions, Items.read(files / "items.csv").with_missing(interactions))


def call(files, name, *flags):
    arguments = ["baseline", name, "--interactions", str(files / "log.csv"), "--items", str(files / "items.csv")]
    return CliRunner().invoke(app, [*arguments, *map(str, flags)], catch_exceptions=True)


def document_of(files, tmp_path, name, *flags):
    result = call(files, name, "--json", tmp_path / "out.json", *flags)
    assert result.exit_code == 0, result.output + repr(result.exception)
    return json.loads((tmp_path / "out.json").read_text()), result


def expected(model, split, part="test", ks=(5, 10, 20)):
    lists = fit_on(model, split).recommend(split.histories(part), max(ks))
    return ranking_metrics(ranks_of(lists, split.targets(part)), ks)


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("item-cf", ItemCF()),
        ("popularity", Popularity()),
        ("popularity-recent", Popularity(half_life_days=365.0)),
        ("ease", EASE()),
        ("markov", Markov()),
    ],
)
def test_each_name_is_its_model_with_the_defaults(files, tmp_path, split, name, model):
    document, result = document_of(files, tmp_path, name)
    metrics = expected(model, split)
    for metric, value in metrics.items():
        assert document[metric] == pytest.approx(value)
    assert metrics["NDCG@10"] > 0
    assert document["system"] == name
    assert document["split"] == split.content_hash
    assert document["settings"]["tuned"] is False
    assert document["cost"]["parameters"] == model.parameters > 0
    assert document["cost"]["device"] == "cpu"
    assert document["cost"]["fit_seconds"] >= 0
    assert document["cost"]["ms_per_request"] > 0
    assert {"later_day", "head", "tail"} <= set(document["slices"])
    assert f"{metrics['NDCG@10']:.4f}" in result.output
    assert "later_day" in result.output
    assert "tuning" not in document


def test_parameters_part_and_cutoffs_are_taken(files, tmp_path, split):
    flags = ("--param", "window=2", "--param", "decay=0.3", "--part", "valid", "--ks", "3 7,3")
    document, _ = document_of(files, tmp_path, "item-cf", *flags)
    metrics = expected(ItemCF(window=2, decay=0.3), split, "valid", (3, 7))
    assert {name: document[name] for name in metrics} == pytest.approx(metrics)
    assert metrics != expected(ItemCF(), split, "valid", (3, 7))
    assert document["part"] == "valid"
    assert "HR@10" not in document
    assert document["settings"] == {
        "tuned": False, "ties": "rule", "window": 2, "backward": 0.7, "decay": 0.3,
        "max_train": 200, "max_history": 20,
    }  # fmt: skip


def test_ties_are_averaged_on_request(files, tmp_path, split):
    result = call(files, "popularity", "--expected-ties", "--json", tmp_path / "out.json")
    document = json.loads((tmp_path / "out.json").read_text())
    model = Popularity().fit(split.train, split.num_items)
    expected = evaluate("popularity", split, scores=model.scores).document()
    assert document["NDCG@10"] == expected["NDCG@10"]
    assert document["settings"]["ties"] == "expected"
    worst, best = document["NDCG@10 ties"]
    assert worst < document["NDCG@10"] < best
    assert f"Ties leave NDCG@10 between {worst:.4f} and {best:.4f}." in result.output


def test_recent_popularity_takes_a_share_instead_of_a_half_life(files, tmp_path, split):
    document, _ = document_of(files, tmp_path, "popularity-recent", "--param", "last_share=0.2")
    assert document["HR@20"] == pytest.approx(expected(Popularity(last_share=0.2), split)["HR@20"])
    assert document["settings"]["half_life_days"] is None


def test_other_splits_and_columns_are_passed_on(files, tmp_path):
    document, _ = document_of(
        files, tmp_path, "popularity", "--split", "cold-users", "--test-share", "0.2", "--split-seed", "3"
    )
    assert document["protocol"]["split"] == "cold-users"
    assert document["protocol"]["test_share"] == 0.2
    assert document["protocol"]["seed"] == 3
    assert document["cases"] == USERS // 5
    result = call(files, "popularity", "--item-column", "absent")
    assert isinstance(result.exception, DataError)
    assert "absent" in str(result.exception)


def test_tuning_says_what_it_tried_and_chose(files, tmp_path, split):
    flags = ("--tune", "--budget", "5", "--budget-seconds", "60", "--metric", "HR@5", "--seed", "4")
    document, result = document_of(files, tmp_path, "item-cf", *flags, "--param", "max_history=3")
    tuning = document["tuning"]
    assert tuning["grid"] == [dict(BASELINES["item-cf"].grid[0])]
    assert (tuning["budget"], tuning["budget_seconds"], tuning["seed"]) == (5, 60, 4)
    assert (tuning["configurations"], tuning["not_tried"], len(tuning["trials"])) == (27, 22, 5)
    best = max(tuning["trials"], key=lambda trial: trial["HR@5"])
    assert tuning["chosen"] == best["parameters"]
    chosen = ItemCF(**tuning["chosen"], max_history=3)
    assert best["HR@5"] == pytest.approx(expected(chosen, split, "valid")["HR@5"])
    assert document["HR@10"] == pytest.approx(expected(chosen, split)["HR@10"])
    assert document["settings"]["tuned"] is True
    assert document["settings"]["max_history"] == 3
    assert document["seeds"] == {"bootstrap": 4, "tuning": 4}
    assert document["cost"]["tuning_seconds"] > 0
    assert "5 of 27 configurations" in result.output


@pytest.mark.parametrize("name", BASELINES)
def test_every_baseline_can_be_tuned(files, tmp_path, name):
    store = tmp_path / "store"
    ids = [f"i{row}" for row in range(ITEMS)]
    EmbeddingStore(ids, np.random.default_rng(0).normal(size=(ITEMS, 4)), {"model": "made up"}).save(store)
    flags = ("--embeddings", store) if name == "text-knn" else ()
    document, _ = document_of(files, tmp_path, name, "--tune", "--budget", "3", *flags)
    assert 1 <= len(document["tuning"]["trials"]) <= 3
    for parameter, value in document["tuning"]["chosen"].items():
        assert document["settings"][parameter] == value


def test_text_knn_takes_embeddings_by_item_id(files, tmp_path, split):
    vectors = np.random.default_rng(0).normal(size=(ITEMS, 4)).astype(np.float32)
    ids = [f"i{row}" for row in range(ITEMS)]
    EmbeddingStore(ids[::-1], vectors[::-1], {"model": "made up"}).save(tmp_path / "store")
    document, result = document_of(files, tmp_path, "text-knn", "--embeddings", tmp_path / "store")
    rows = [ids.index(item) for item in split.item_ids]
    assert document["HR@5"] == pytest.approx(expected(TextKNN(vectors[rows]), split)["HR@5"])
    assert document["settings"]["embeddings"]["model"] == "made up"
    assert "30 items embedded with made up" in result.output


def test_text_knn_embeds_the_texts_itself_and_says_with_what(files, tmp_path, split, monkeypatch):
    monkeypatch.setattr("llmrec.embedding.encoder._packaged_minilm", lambda: None)
    document, result = document_of(files, tmp_path, "text-knn")
    texts = Items.read(files / "items.csv").with_missing(Interactions.read(files / "log.csv")).texts()
    assert document["HR@10"] == pytest.approx(expected(TextKNN(static_embeddings(texts)), split)["HR@10"])
    assert document["settings"]["embeddings"]["model"] == "static"
    assert "30 items embedded with static" in result.output


def test_items_that_the_table_lacks_are_warned_of(files, tmp_path, caplog):
    document, _ = document_of(files, tmp_path, "popularity")
    assert document["items"] == ITEMS
    assert "1 item(s) of the interactions are not in the item table, such as 'i29'" in caplog.text


def test_the_run_folder_can_be_loaded_again(files, tmp_path):
    document, _ = document_of(files, tmp_path, "markov", "--out", tmp_path / "run", "--param", "order=2")
    evaluation, loaded = Evaluation.load(tmp_path / "run" / "evaluation" / "markov.json")
    assert loaded["NDCG@10"] == document["NDCG@10"]
    assert evaluation.document()["HR@10"] == document["HR@10"]
    assert loaded["settings"]["order"] == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--ks", "5,x"), "'5,x' holds no cut-offs"),
        (("--ks", ""), "holds no cut-offs"),
        (("--param", "nothing=1"), "'nothing=1' gives no parameter"),
        (("--param", "decay=2"), "decay 2.0"),
        (("--embeddings", "somewhere"), "item-cf uses no embeddings"),
        (("--tune", "--metric", "AUC@1"), "no metric to tune by"),
    ],
)
def test_misuse_is_refused(files, flags, message):
    result = call(files, "item-cf", *flags)
    assert isinstance(result.exception, DataError)
    assert message in str(result.exception)


def test_figures_measured_elsewhere(shared_data, tmp_path):
    folder = shared_data / "amazon-scientific"
    result = CliRunner().invoke(
        app,
        [
            *("baseline", "item-cf", "--interactions", str(folder / "interactions.csv.gz")),
            *("--items", str(folder / "items.jsonl.gz"), "--split", "leave-one-out"),
            *("--json", str(tmp_path / "out.json")),
        ],
    )
    assert result.exit_code == 0, result.output
    document = json.loads((tmp_path / "out.json").read_text())
    assert document["HR@10"] == pytest.approx(0.1033, abs=0.0005)
    assert document["NDCG@10"] == pytest.approx(0.0775, abs=0.0005)
