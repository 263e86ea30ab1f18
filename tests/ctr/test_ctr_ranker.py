import importlib.util
import json
import shutil

import numpy as np
import polars as pl
import pytest
import torch
from ctr_factories import tiny_ctr

from llmrec.backbones.encoder import UNKNOWN_TIME
from llmrec.ctr.card import page, read_card, summarised
from llmrec.ctr.dataset import case_tensors
from llmrec.ctr.histories import Events
from llmrec.ctr.items import CandidateItems
from llmrec.ctr.ranker import Ranker
from llmrec.ctr.task import CTRTask, features_of
from llmrec.embedding.store import EmbeddingStore
from llmrec.exceptions import ArtefactError, DataError, RecipeError, RequestError
from llmrec.script import parse

IDS = [f"item {number}" for number in range(11)]


def make_ranker(labels=("click", "buy"), **settings):
    return Ranker(tiny_ctr("hstu", "interleaved", labels=labels), CandidateItems(IDS), settings)


def test_candidates_are_ranked_by_their_first_label():
    ranker = make_ranker()
    history, times = ["item 3", "unheard of", "item 9"], [100, None, 300]
    candidates = ["item 5", "nobody knows", "item 5", "item 0"]
    found = ranker.rank(history, candidates, [(1, 0), (None, None), (0, 1)], times, 400)
    events = Events(np.array([4, 0, 10]), np.array([2, 0, 3]), np.array([100, UNKNOWN_TIME, 300]))
    rows = [6, 0, 6, 1]
    logits = ranker.model(**case_tensors([events] * 4, rows, [400] * 4, ranker.model.config.asked)).detach()
    wanted = dict(zip(candidates, torch.sigmoid(logits.double()).tolist(), strict=True))
    for one in found:
        assert list(one.probabilities.values()) == pytest.approx(wanted[one.item_id], abs=1e-6)
        assert list(one.probabilities) == ["click", "buy"]
        assert one.known == (one.item_id != "nobody knows")
    clicks = [one.probabilities["click"] for one in found]
    assert clicks == sorted(clicks, reverse=True)
    assert [one.rank for one in found] == [1, 2, 3, 4]


def test_labels_that_are_left_out_are_what_the_training_knew():
    liked, labelled = make_ranker(("like",), history="liked"), make_ranker(("like",), history="labelled")
    for ranker, said in ((liked, [1, 1]), (labelled, [None, None])):
        left_out, given = (ranker.rank(IDS[:2], IDS[4:6], labels) for labels in (None, said))
        assert left_out == given
    assert liked.rank(IDS[:2], IDS[4:6]) != labelled.rank(IDS[:2], IDS[4:6])
    assert labelled.rank([], IDS[:3]) != []
    assert labelled.rank(IDS[:2], []) == []


def test_a_saved_ranker_answers_alike(tmp_path):
    ranker = make_ranker(history="labelled", seed=3)
    ranker.save_pretrained(tmp_path / "model")
    again = Ranker.from_pretrained(tmp_path / "model")
    asked = (IDS[:4], IDS[4:], [(1, 0)] * 4, [1, 2, 3, 4], 5)
    for one, other in zip(ranker.rank(*asked), again.rank(*asked), strict=True):
        assert (one.item_id, one.rank) == (other.item_id, other.rank)
        assert one.probabilities == pytest.approx(other.probabilities, abs=1e-6)
    assert again.settings["seed"] == 3
    (tmp_path / "model" / "ctr.json").write_text("{}")
    with pytest.raises(ArtefactError):
        Ranker.from_pretrained(tmp_path / "model")


@pytest.mark.parametrize(
    "wrong",
    [{"labels": [(1, 0)]}, {"labels": [1, 0]}, {"labels": [(1, 2), (0, 0)]}, {"timestamps": [1]}],
    ids=["number", "one of two", "value", "times"],
)
def test_requests_that_do_not_fit_are_refused(wrong):
    with pytest.raises(RequestError):
        make_ranker().rank(IDS[:2], IDS[2:], **wrong)


def test_items_of_another_model_are_refused():
    with pytest.raises(ArtefactError, match="item rows"):
        Ranker(tiny_ctr(), CandidateItems(IDS[:3]))


def write_rows(folder, seed=0, count=300, labels=("click",)):
    """Users like the items of their own parity."""
    rng = np.random.default_rng(seed)
    users, items = rng.integers(0, 20, count), rng.integers(0, 30, count)
    columns = {"uid": users, "iid": items, "timestamp": 10**9 + np.arange(count) * 60, "warm": items % 3 == 0}
    for place, label in enumerate(labels):
        columns[label] = ((users + items + place) % 2 == 0).astype(int)
    frame = pl.DataFrame(columns).with_columns(pl.col("warm").cast(pl.Int64))
    frame[: count * 4 // 5].write_parquet(folder / "train.parquet")
    frame[count * 4 // 5 :].write_ndjson(folder / "test.jsonl")
    return folder / "train.parquet", folder / "test.jsonl"


FLAGS = [
    *("--encoder", "hstu", "--hidden_size", "8", "--num_hidden_layers", "1", "--max_history", "10"),
    *("--per_device_train_batch_size", "8", "--num_train_epochs", "2", "--report_to", "none", "--use_cpu", "true"),
    *("--save_strategy", "epoch", "--disable_tqdm", "true", "--history_column", "", "--flag_columns", "warm"),
]


@pytest.fixture
def train(checkout, tmp_path, monkeypatch):
    """train/rank.py in this process: flags -> None, or the error that a user would be told."""
    monkeypatch.chdir(tmp_path)
    spec = importlib.util.spec_from_file_location("rank_stage", checkout / "train" / "rank.py")
    stage = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(stage)
    return lambda *flags: stage.main(*parse(stage.make_parser(), [*FLAGS, *flags]))


def test_the_script_trains_reports_and_continues(train, tmp_path, caplog):
    rows, test = write_rows(tmp_path, labels=("click", "buy"))
    flags = ("--train_rows", str(rows), "--test_rows", str(test), "--artefact", "run/model", "--seed", "1")
    flags += ("--label_columns", "click", "buy", "--layout", "interleaved", "--passes", "windows")
    train(*flags)
    card = read_card(tmp_path / "run" / "metrics.json")
    assert card["task"]["train_rows"] == 240
    assert card["task"]["test_rows"] == 60
    found = card["labels"]["buy"]
    assert set(found["systems"]) == {"model", "share", "item", "user", "item and user"}
    assert found["slices"]["warm"]["cases"] + found["slices"]["not warm"]["cases"] == 60
    assert "item and user" in (tmp_path / "run" / "rank.html").read_text()
    ranker = Ranker.from_pretrained(tmp_path / "run" / "model")
    assert len(ranker.rank(["3", "4"], ["5", "6"], [(1, 0), (0, 1)])) == 2
    # The measures are those of the artefact, asked case by case.
    rows_of = pl.read_ndjson(test)
    everything = pl.concat([pl.read_parquet(rows), rows_of])
    losses = []
    for user, item, time, label in rows_of.select("uid", "iid", "timestamp", "click").iter_rows():
        past = everything.filter((pl.col("uid") == user) & (pl.col("timestamp") < time))
        known = list(zip(past["click"].to_list(), past["buy"].to_list(), strict=True))
        asked = ranker.rank(
            [str(one) for one in past["iid"]], [str(item)], known, past["timestamp"].to_list(), time, str(user)
        )
        probability = asked[0].probabilities["click"]
        losses.append(-np.log(probability if label else 1 - probability))
    assert np.mean(losses) == pytest.approx(card["labels"]["click"]["systems"]["model"]["log_loss"], rel=1e-4)
    with caplog.at_level("INFO", logger="llmrec"):
        train(*flags)
    assert "continuing from" in caplog.text
    assert read_card(tmp_path / "run" / "metrics.json")["labels"] == card["labels"]


def test_checkpoints_of_other_texts_are_not_continued(train, tmp_path, caplog):
    rows, test = write_rows(tmp_path)
    ids = [str(item) for item in range(30)]
    flags = ("--train_rows", str(rows), "--test_rows", str(test), "--artefact", "run/model")
    flags += ("--representation", "ids+text", "--item_embeddings", "texts", "--label_columns", "click")
    for seed, continued in ((0, False), (0, True), (1, False)):
        shutil.rmtree("texts", ignore_errors=True)
        vectors = np.random.default_rng(seed).normal(size=(30, 4)).astype(np.float32)
        EmbeddingStore(ids, vectors).save("texts")
        caplog.clear()
        with caplog.at_level("INFO", logger="llmrec"):
            train(*flags)
        assert ("continuing from" in caplog.text) == continued


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (("--passes", "windows"), RecipeError, "passes is 'windows' with layout 'target'"),
        (("--negative_share", "0"), RecipeError, "negative_share"),
        (("--dev_share", "1"), RecipeError, "dev_share"),
        (("--unknown_rate", "1"), RecipeError, "unknown_rate"),
        (("--similarity", "cosine"), RecipeError, "no similarity"),
        (("--eval_strategy", "epoch"), RecipeError, "no rows to choose by"),
        (("--beside", "metrics.json", "--seed", "0"), RecipeError, "Give each seed once"),
        (("--beside", "metrics.json", "--seed", "1"), DataError, "differ in rows or flags"),
        (("--label_columns", "like"), DataError, "no column 'like'"),
    ],
)
def test_flags_that_do_not_go_together_are_refused_before_training(train, tmp_path, wrong, error, message):
    rows, _ = write_rows(tmp_path)
    (tmp_path / "metrics.json").write_text(json.dumps(card_of(0, 0.5)))
    with pytest.raises(error, match=message):
        train("--train_rows", str(rows), "--artefact", "run/model", "--label_columns", "click", *wrong)
    assert not (tmp_path / "run" / "model").exists()


def card_of(seed, auc, rows=10):
    measured = {"AUC": auc, "UAUC": None, "log_loss": 0.5, "Brier": 0.2, "ECE": 0.1, "cases": 5, "label_share": 0.5}
    measured |= {"UAUC_users": 0, "users_left_out": 1.0, "AUC interval95": [0.1, 0.9]}
    bins = [{"low": 0.0, "high": 1.0, "cases": 5.0, "predicted": 0.4, "observed": 0.5}]
    part = {"cases": 5, "label_share": 0.5, "AUC": None, "UAUC": None, "log_loss": 0.7}
    return {
        "seed": seed,
        "task": {"train_rows": rows, "test_rows": 5, "test_users": 2},
        "flags": {"a": 1},
        "encoder": "hstu",
        "layout": "target",
        "scorer": "dot",
        "cost": {"parameters": 7, "fit_seconds": 1.0},
        "labels": {"<b>click</b>": {"systems": {"model": measured}, "slices": {"warm": part}, "reliability": bins}},
    }


def test_seeds_are_summarised_by_mean_and_deviation(tmp_path):
    cards = [card_of(seed, auc) for seed, auc in ((0, 0.6), (1, 0.7), (2, 0.8))]
    found = summarised(cards)["labels"]["<b>click</b>"]
    assert found["AUC"]["mean"] == pytest.approx(0.7)
    assert found["AUC"]["deviation"] == pytest.approx(0.1)
    assert "UAUC" not in found
    text = page({**cards[0], "over_seeds": summarised(cards)}).render()
    assert "0.7000 ± 0.1000" in text
    assert "<b>click" not in text
    with pytest.raises(DataError, match="twice"):
        summarised([cards[0], cards[0]])
    with pytest.raises(DataError, match="differ"):
        summarised([cards[0], card_of(1, 0.5, rows=11)])
    (tmp_path / "no.json").write_text(json.dumps({"seed": 1}))
    with pytest.raises(DataError, match="no result"):
        read_card(tmp_path / "no.json")


def test_the_unknown_item_is_what_no_item_is(tmp_path):
    from llmrec.representations.build import build_representation
    from llmrec.sequence.arguments import ItemArguments

    vectors = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    EmbeddingStore(["b", "a", "c"], vectors).save(tmp_path / "texts")
    items = ItemArguments(representation="ids+text", item_embeddings=str(tmp_path / "texts"))
    features = features_of(CandidateItems(["a", "b", "c"]), items, {"a", "c"})
    np.testing.assert_allclose(features.vectors, [vectors.mean(axis=0), vectors[1], vectors[0], vectors[2]], rtol=1e-6)
    assert features.trained.tolist() == [False, True, False, True]
    representation = build_representation(items.described(features), len(features.item_ids), 8)
    representation.set_items(features)
    assert torch.isfinite(representation.table()).all()


def test_a_task_divides_rows_by_time(tmp_path):
    from llmrec.ctr.arguments import CTRDataArguments
    from llmrec.sequence.arguments import ItemArguments

    rows, test = write_rows(tmp_path)
    data = CTRDataArguments(
        train_rows=str(rows), test_rows=str(test), artefact="x", label_columns=["click"], dev_share=0.25,
        negative_share=0.5, min_count=2,
    )  # fmt: skip
    task = CTRTask.make(data, ItemArguments(), seed=0)
    assert (len(task.train), len(task.dev), len(task.test)) == (180, 60, 60)
    times = task.rows.timestamps
    assert times[task.train].max() < times[task.dev].min() <= times[task.dev].max() < times[task.test].min()
    counts = np.bincount(task.rows.items[task.train], minlength=len(task.rows.item_ids))
    assert set(task.items.ids) == {id for id, count in zip(task.rows.item_ids, counts, strict=True) if count >= 2}
    cases = task.cases(task.train, 5, weighted=True)
    positive = task.rows.labels[task.train, 0] == 1
    assert len(cases) == positive.sum() + round(0.5 * (~positive).sum())
    assert len(task.cases(task.dev, 5)) == 60
    only = CTRTask.make(
        CTRDataArguments(train_rows=str(rows), artefact="x", label_columns=["click"]), ItemArguments(), 0
    )
    assert (len(only.train), len(only.test)) == (216, 24)


def test_unused_rows_make_no_task(tmp_path):
    from llmrec.ctr.arguments import CTRDataArguments
    from llmrec.sequence.arguments import ItemArguments

    pl.DataFrame({"uid": [1, 2], "iid": [1, 2], "label": [1, None], "timestamp": [10**9] * 2}).write_parquet(
        tmp_path / "rows.parquet"
    )
    data = CTRDataArguments(train_rows=str(tmp_path / "rows.parquet"), artefact="x", test_share=0.5)
    with pytest.raises(DataError, match="0 test rows"):
        CTRTask.make(data, ItemArguments(), 0)
