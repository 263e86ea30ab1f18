"""Probabilities of Yes and No against one full run of the model per answer, without padding or batches."""

import json

import numpy as np
import pytest
import torch
from factories import random_recommender
from sklearn.metrics import brier_score_loss, log_loss, roc_auc_score

from llmrec.artefact import CALIBRATION_FILE, MANIFEST, verify_manifest, weights_hash, write_manifest
from llmrec.calibration import Calibrator, sigmoid
from llmrec.exceptions import ArtefactError, DataError, PromptError, RequestError, UnknownItemError
from llmrec.prompt import Prompt
from llmrec.rating import Question, Rater, load_calibration, measures, save_calibration
from llmrec.tasks.templates import shipped_templates
from llmrec.vocabulary import PlainText

TEMPLATES = shipped_templates(["yes_no"])
QUESTIONS = [
    Question([], [], 3),
    Question([1, 2], [5], 7),
    Question([], [9, 8, 4], 0),
    Question([1, 2, 3, 4], [], 39),
    Question([1, 2], [5], 8),
    Question([30], [31], 1),
]


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def recommender(request):
    found = random_recommender(5, request.param, max_positions=400, hidden_size=32)
    found.templates = TEMPLATES
    return found


def by_definition(recommender, prompt, question, answers):
    """log P(Yes) - log P(No), each the sum over its tokens of the log-softmax at its place."""
    text, totals = PlainText(recommender.tokenizer), []
    shown = {"liked": question.liked, "disliked": question.disliked, "candidate": question.candidate}
    start = recommender.tokenizer.bos_token_id
    ids = prompt.encode(recommender.catalog, [], text, start, **shown)
    for answer in answers:
        tokens = text.encode(answer)
        logits = recommender.model(torch.tensor([ids + tokens])).logits[0].log_softmax(-1)
        totals.append(sum(float(logits[len(ids) - 1 + place, token]) for place, token in enumerate(tokens)))
    return totals[0] - totals[1]


@pytest.mark.parametrize("name", sorted(TEMPLATES["yes_no"]))
@torch.no_grad()
def test_probability_is_that_of_the_two_words(recommender, name):
    rater = Rater.of(recommender, name)
    expected = [by_definition(recommender, rater.prompt, q, (" Yes", " No")) for q in QUESTIONS]
    assert rater.logits(QUESTIONS) == pytest.approx(expected, abs=1e-10)
    yes, no = np.exp(expected), np.ones(len(QUESTIONS))
    assert rater.probabilities(QUESTIONS) == pytest.approx(yes / (yes + no), abs=1e-12)


# One token each; one and several; several that begin alike and end in the last; that part before it.
@pytest.mark.parametrize("answers", [("Y", "N"), (" a", " No"), ("qx", "qz"), ("qxx", "qzyw"), ("Yes", "No")])
@torch.no_grad()
def test_answers_may_have_any_tokens(recommender, answers):
    prompt = TEMPLATES["yes_no"]["semantic_ids"]
    rater = Rater(recommender.model, recommender.tokenizer, recommender.catalog, prompt, answers=answers)
    expected = [by_definition(recommender, prompt, q, answers) for q in QUESTIONS]
    assert rater.logits(QUESTIONS) == pytest.approx(expected, abs=1e-10)


def test_batches_change_nothing(recommender, monkeypatch):
    rater = Rater.of(recommender)
    once = rater.logits(QUESTIONS, progress=True)
    monkeypatch.setattr("llmrec.rating._BATCH_TOKENS", 1)
    assert rater.logits(QUESTIONS) == pytest.approx(once, abs=1e-10)
    assert rater.logits([]).shape == (0,)


def test_candidates_are_ranked_by_falling_probability(recommender):
    ids = recommender.catalog.ids
    rater = Rater.of(recommender)
    asked = [ids[row] for row in (3, 17, 3, 8, 22)]
    found = rater.rate([ids[1]], [ids[2]], asked)
    logits = rater.logits([Question([1], [2], row) for row in (3, 17, 3, 8, 22)])
    assert [r.rank for r in found] == [1, 2, 3, 4, 5]
    assert [r.logit for r in found] == sorted(logits.tolist(), reverse=True)
    assert {r.item_id: r.probability for r in found} == dict(zip(asked, sigmoid(logits).tolist(), strict=True))
    assert [r.title for r in found] == [recommender.catalog.title(ids.index(r.item_id)) for r in found]
    # A calibrator that makes all alike keeps the model's order.
    flat = Rater.of(recommender, calibrator=Calibrator("platt", 0.0, 1.0)).rate([ids[1]], [ids[2]], asked)
    assert [r.item_id for r in flat] == [r.item_id for r in found]
    assert {r.probability for r in flat} == {sigmoid(np.array(1.0)).item()}
    with pytest.raises(UnknownItemError, match="'absent'"):
        rater.rate(["absent"], [], asked)
    assert rater.rate(["absent", ids[1]], [ids[2]], asked, ignore_unknown=True) == found
    with pytest.raises(UnknownItemError):
        rater.rate([], [], ["absent"], ignore_unknown=True)


def test_what_cannot_be_rated_is_refused_with_a_reason(recommender):
    parts = recommender.model, recommender.tokenizer, recommender.catalog
    with pytest.raises(PromptError, match="one begins the other"):
        Rater(*parts, TEMPLATES["yes_no"]["titles"], answers=("qx", "qxq"))
    with pytest.raises(PromptError, match="does not show its candidate"):
        Rater(*parts, Prompt("{{ liked | length }}?"))
    with pytest.raises(PromptError, match="colour"):
        Rater(*parts, Prompt("{{ candidate.title }} {{ candidate.colour }}"))
    with pytest.raises(RequestError, match="no template 'other' among both, semantic_ids, titles"):
        Rater.of(recommender, "other")
    with pytest.raises(RequestError, match="positions"):
        Rater.of(recommender, "semantic_ids").logits([Question([1] * 200, [], 1)])
    plain = random_recommender(5, hidden_size=32)
    with pytest.raises(RequestError, match="not trained to answer"):
        Rater.of(plain)
    plain.templates, plain.settings.softmax = TEMPLATES, "semantic_ids"
    with pytest.raises(RequestError, match="mean nothing"):
        Rater.of(plain)


def test_measures_are_sklearn_s():
    rng = np.random.default_rng(0)
    labels, given = rng.integers(0, 2, 300), rng.random(300)
    users = rng.integers(0, 40, 300)
    found = measures(labels, given, users)
    assert found["AUC"] == pytest.approx(roc_auc_score(labels, given))
    assert found["log_loss"] == pytest.approx(log_loss(labels, given))
    assert found["Brier"] == pytest.approx(brier_score_loss(labels, given))
    both = [user for user in range(40) if len(set(labels[users == user].tolist())) == 2]
    aucs = [roc_auc_score(labels[users == user], given[users == user]) for user in both]
    assert (found["UAUC"], found["UAUC_users"]) == (pytest.approx(np.mean(aucs)), len(both))
    place = np.minimum((given * 10).astype(int), 9)
    gaps = [abs((labels - given)[place == b].sum()) for b in range(10)]
    assert found["ECE"] == pytest.approx(sum(gaps) / 300)
    assert found["mean_probability"] == pytest.approx(given.mean())


def test_measures_without_pairs_are_none_and_wrong_input_is_an_error():
    found = measures([1, 1], [0.5, 0.5], ["a", "b"])
    assert (found["AUC"], found["UAUC"], found["UAUC_users"]) == (None, None, 0)
    found = measures([1, 0], [0.5, 0.4], ["a", "b"])
    assert (found["AUC"], found["UAUC"]) == (1.0, None)
    json.dumps(found, allow_nan=False)
    with pytest.raises(DataError):
        measures([1, 0], [0.5], ["a", "b"])
    with pytest.raises(DataError):
        measures([1, 0], [0.5, 1.5], ["a", "b"])


def test_calibration_lies_in_the_artefact_and_belongs_to_its_weights(tmp_path):
    recommender = random_recommender(1, hidden_size=32)
    recommender.templates = TEMPLATES
    folder = tmp_path / "artefact"
    recommender.save_pretrained(folder)
    assert load_calibration(folder) is None
    manifest = (folder / MANIFEST).read_bytes()
    fitted = Calibrator.fit("isotonic", [0.0, 1.0, 2.0], [0, 1, 1])
    save_calibration(folder, fitted, "titles", {"part": "valid"})
    assert load_calibration(folder) == (fitted, "titles", {"part": "valid"})
    assert (folder / MANIFEST).read_bytes() == manifest
    verify_manifest(folder)
    write_manifest(folder)  # anew: it stays outside of the list
    assert (folder / MANIFEST).read_bytes() == manifest
    loaded = type(recommender).from_pretrained(folder)
    assert Rater.of(loaded, "titles").logits(QUESTIONS) == pytest.approx(
        Rater.of(recommender, "titles").logits(QUESTIONS)
    )

    with (folder / "model.safetensors").open("ab") as file:
        file.write(b" ")
    write_manifest(folder)
    with pytest.raises(ArtefactError, match="was fitted on a model with the weights"):
        load_calibration(folder)
    (folder / CALIBRATION_FILE).write_text(json.dumps({"weights": weights_hash(folder), "template": "titles"}))
    with pytest.raises(ArtefactError, match="is no calibration"):
        load_calibration(folder)
