"""The Recommender as a user sees it: items, ranks, scores, folders."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from factories import PROMPTS, random_histories, random_recommender

from llmrec import Recommender
from llmrec.beam import TrieTensors
from llmrec.catalog_versions import CatalogVersions
from llmrec.decoding import score_catalog
from llmrec.exceptions import ArtefactError, BackboneError, CatalogError, LLMRecError, RequestError, UnknownItemError
from llmrec.prompt import Prompt
from llmrec.recommender import Settings


@pytest.fixture(scope="module")
def recommender():
    return random_recommender(1)


def ids(found):
    return [item.item_id for item in found]


@pytest.mark.parametrize("exclude_seen", [True, False])
@pytest.mark.parametrize("template", ["semantic_ids", "next_item"])
def test_recommendations_are_the_best_items_of_the_catalog(exclude_seen, template):
    recommender = random_recommender(3, prompt=Prompt.read(PROMPTS / f"{template}.jinja"), max_positions=512)
    trie = TrieTensors(recommender.catalog.trie, recommender.catalog.require_tokens())
    for history in random_histories(3, 40, 3, 6):
        found = recommender.recommend(
            [f"item-{row}" for row in history], k=40, exclude_seen=exclude_seen, num_beams=40
        )
        scores = score_catalog(recommender.model, recommender.encoder.encode(history), trie).tolist()
        candidates = [row for row in range(40) if not (exclude_seen and row in history)]
        order = sorted(candidates, key=lambda row: (-scores[row], recommender.catalog.codes[row].tolist()))
        assert ids(found) == [f"item-{row}" for row in order]
        assert [item.rank for item in found] == list(range(1, len(order) + 1))
        assert [item.log_probability for item in found] == pytest.approx([scores[row] for row in order], abs=1e-9)
        assert [item.title for item in found] == [f"Title {row}" for row in order]


def test_probabilities_of_all_items_are_at_most_one(recommender):
    found = recommender.recommend(["item-1"], k=40, exclude_seen=False)
    assert 0 < sum(math.exp(item.log_probability) for item in found) <= 1


def test_never_twice_never_outside_never_seen(recommender):
    for seed in range(5):
        for history in random_histories(seed, 40, 6, 39):
            names = [f"item-{row}" for row in history]
            found = ids(recommender.recommend(names, k=15, num_beams=3))
            assert len(found) == len(set(found)) == min(15, 40 - len(set(names)))
            assert set(found) <= set(recommender.catalog.ids) - set(names)


def test_only_recent_items_are_prompted_but_all_are_seen(recommender):
    history = [f"item-{row}" for row in range(30)]
    found = recommender.recommend(history, k=10)
    assert set(ids(found)) == {f"item-{row}" for row in range(30, 40)}
    tail = recommender.recommend(history[-6:], k=40, num_beams=40)
    scores = {item.item_id: item.log_probability for item in tail}
    assert [item.log_probability for item in found] == pytest.approx([scores[i] for i in ids(found)], abs=1e-9)


def test_many_histories_are_answered_in_order(recommender):
    histories = random_histories(8, 40, 20, 12)
    items, scores = recommender.recommend_rows(histories, k=7)
    for history, found, values in zip(histories, items, scores, strict=True):
        alone, alone_scores = recommender.recommend_rows([history], k=7)
        assert alone == [found]
        assert alone_scores[0] == pytest.approx(values, abs=1e-9)


def test_requests_that_cannot_be_answered(recommender):
    with pytest.raises(UnknownItemError, match="'lost'"):
        recommender.recommend(["item-1", "lost"])
    assert recommender.recommend(["item-1", "lost"], ignore_unknown=True) == recommender.recommend(["item-1"])
    with pytest.raises(RequestError, match="k is 0"):
        recommender.recommend(["item-1"], k=0)
    with pytest.raises(RequestError, match="num_beams is 0"):
        recommender.recommend(["item-1"], num_beams=0)
    with pytest.raises(RequestError, match=r"k is 2\.5"):
        recommender.recommend(["item-1"], k=2.5)
    with pytest.raises(RequestError, match="the string 'item-1'"):
        recommender.recommend("item-1")
    with pytest.raises(RequestError, match="Row -1"):
        recommender.recommend_rows([[3, -1]])
    with pytest.raises(RequestError, match="max_history is 0"):
        Settings(max_history=0)
    with pytest.raises(RequestError, match="num_beams is -1"):
        recommender.recommend(["item-1"], num_beams=-1)


def test_broken_weights_are_no_recommendation():
    recommender = random_recommender(1)
    with torch.no_grad():
        recommender.model.get_input_embeddings().weight.fill_(torch.nan)
    with pytest.raises(BackboneError, match="not numbers"):
        recommender.recommend(["item-1"])


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_saved_and_loaded_it_answers_the_same(tmp_path, model_type):
    recommender = random_recommender(4, model_type, dtype=torch.float32)
    recommender.save_pretrained(tmp_path / "artefact")
    again = Recommender.from_pretrained(tmp_path / "artefact")
    assert again.recommend(["item-3", "item-5"]) == recommender.recommend(["item-3", "item-5"])
    assert again.settings == recommender.settings


def test_plain_transformers_load_the_artefact_without_llmrec(tmp_path):
    recommender = random_recommender(4, dtype=torch.float32)
    recommender.save_pretrained(tmp_path / "artefact")
    best = recommender.recommend(["item-3"], k=1)[0]
    row = recommender.catalog.row(best.item_id)
    strings = [
        "".join(f"<s{level}_{code}>" for level, code in enumerate(recommender.catalog.codes[place]))
        for place in (recommender.catalog.row("item-3"), row)
    ]
    # Blocking the import proves that nothing of llmrec is needed.
    program = """
import json, sys, torch
sys.modules["llmrec"] = None
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, history, item = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
ids = [tokenizer.bos_token_id] + tokenizer(history + item, add_special_tokens=False)["input_ids"]
logp = model(torch.tensor([ids])).logits[0].log_softmax(-1)
print(json.dumps([len(ids), sum(logp[-4 + i, ids[-3 + i]].item() for i in range(3))]))
"""
    output = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "artefact"), *strings],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    ).stdout
    length, value = json.loads(output.splitlines()[-1])
    assert length == 7
    assert value == pytest.approx(best.log_probability, abs=1e-5)


def test_damaged_artefacts_are_named(tmp_path):
    random_recommender(4, dtype=torch.float32).save_pretrained(tmp_path / "artefact")
    weights = tmp_path / "artefact" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    with pytest.raises(ArtefactError, match=r"model\.safetensors"):
        Recommender.from_pretrained(tmp_path / "artefact")
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ArtefactError, match=r"model\.safetensors"):
        Recommender.from_pretrained(tmp_path / "artefact")
    weights.unlink()
    with pytest.raises(ArtefactError, match=r"model\.safetensors"):
        Recommender.from_pretrained(tmp_path / "artefact")


def test_artefact_of_another_tokenizer_is_refused(tmp_path):
    from llmrec.artefact import write_manifest

    random_recommender(4, dtype=torch.float32).save_pretrained(tmp_path / "one")
    random_recommender(4, sizes=(6, 4, 6), dtype=torch.float32).save_pretrained(tmp_path / "two")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "one" / name).write_bytes((tmp_path / "two" / name).read_bytes())
    write_manifest(tmp_path / "one")
    with pytest.raises(ArtefactError, match="different artefacts"):
        Recommender.from_pretrained(tmp_path / "one")


def test_a_plain_model_is_no_artefact(tmp_path):
    random_recommender(4, dtype=torch.float32).model.save_pretrained(tmp_path / "model")
    with pytest.raises(LLMRecError, match=r"Train one with|unfinished"):
        Recommender.from_pretrained(tmp_path / "model")


def test_saving_is_whole_or_not_at_all(tmp_path, monkeypatch):
    recommender = random_recommender(4, dtype=torch.float32)
    recommender.save_pretrained(tmp_path / "artefact")
    before = {p.name: p.read_bytes() for p in (tmp_path / "artefact").iterdir() if p.is_file()}

    def fail(folder):
        raise OSError("disk full")

    monkeypatch.setattr(recommender.catalog, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        recommender.save_pretrained(tmp_path / "artefact")
    assert before == {p.name: p.read_bytes() for p in (tmp_path / "artefact").iterdir() if p.is_file()}
    assert [p.name for p in tmp_path.iterdir()] == ["artefact"]


def test_pushed_and_pulled_by_id(tmp_path, fake_hub, run_python):
    recommender = random_recommender(4, dtype=torch.float32)
    recommender.save_pretrained(tmp_path / "artefact")
    program = f"""
from llmrec import Recommender
Recommender.from_pretrained({str(tmp_path / "artefact")!r}).push_to_hub("someone/recommender")
found = Recommender.from_pretrained("someone/recommender").recommend(["item-3"], k=5)
print([(item.item_id, item.log_probability) for item in found])
"""
    result = run_python(program, **fake_hub.variables(tmp_path / "home"))
    assert result.returncode == 0, result.stderr
    expected = [(item.item_id, item.log_probability) for item in recommender.recommend(["item-3"], k=5)]
    assert result.stdout.strip() == str(expected)


def test_scores_do_not_depend_on_numpy_rows(recommender):
    rows = np.array([1, 2, 3])
    assert recommender.recommend_rows([rows])[0] == recommender.recommend_rows([[1, 2, 3]])[0]


@pytest.mark.parametrize("exclude_seen", [True, False])
def test_retired_items_are_not_recommended_but_may_be_in_histories(exclude_seen):
    whole = random_recommender(3)
    gone = [2, 7, 11, 30]
    catalog = whole.catalog.with_retired(gone, True)
    recommender = Recommender(whole.model, whole.tokenizer, catalog, whole.prompt, whole.settings)
    history = [2, 5, 11]
    scores = score_catalog(whole.model, whole.encoder.encode(history), TrieTensors(catalog.trie, catalog.token_ids))
    assert np.flatnonzero(~np.isfinite(scores.numpy())).tolist() == gone
    found = recommender.recommend([f"item-{row}" for row in history], k=40, num_beams=40, exclude_seen=exclude_seen)
    wanted = [row for row in range(40) if row not in gone and not (exclude_seen and row in history)]
    assert {item.item_id for item in found} == {f"item-{row}" for row in wanted}
    assert [item.log_probability for item in found] == pytest.approx(sorted(scores[wanted].tolist())[::-1], abs=1e-9)


def test_an_artefact_is_used_with_its_current_catalog_or_one_that_is_named(tmp_path):
    recommender = random_recommender(1)
    recommender.save_pretrained(tmp_path / "artefact")
    versions = CatalogVersions(tmp_path / "artefact/catalog")
    base, name = versions.current, versions.retire(["item-1"])
    now = Recommender.from_pretrained(tmp_path / "artefact")  # its manifest still holds
    assert now.catalog.version == name
    assert "item-1" not in ids(now.recommend(["item-3"], k=39, num_beams=40))
    before = Recommender.from_pretrained(tmp_path / "artefact", catalog_version=base)
    assert "item-1" in ids(before.recommend(["item-3"], k=39, num_beams=40))
    now.save_pretrained(tmp_path / "flat")
    assert CatalogVersions(tmp_path / "flat/catalog").base.version == now.catalog.content_hash
    assert CatalogVersions(tmp_path / "flat/catalog").base.retired.tolist() == now.catalog.retired.tolist()
    assert not (tmp_path / "flat/catalog/versions").exists()
    with pytest.raises(CatalogError, match=r"1 version\(s\) beside its base, which would be lost"):
        now.save_pretrained(tmp_path / "artefact")
    assert CatalogVersions(tmp_path / "artefact/catalog").current == name
