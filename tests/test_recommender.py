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
from llmrec.artefact_parts import read_settings
from llmrec.beam import TrieTensors
from llmrec.catalog_versions import CatalogVersions
from llmrec.decoding import score_catalog
from llmrec.exceptions import (
    ArtefactError,
    BackboneError,
    CatalogError,
    LLMRecError,
    PromptError,
    RequestError,
    UnknownItemError,
)
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


TEMPLATES = {
    "search": {"b": Prompt("Find {{ query }}: "), "a": Prompt("Wanted: {{ query }} = ")},
    "preference": {
        "one": Prompt("{{ preference }}! {% for item in history %}{{ item.semantic_id }}{% endfor %} then ")
    },
}
TIMES = Prompt("{% for item in history %}{{ item.semantic_id }} {{ item.action }} {{ item.gap }}, {% endfor %}")


def best(recommender, tokens, candidates, k):
    """The k best candidates after a prompt of tokens, and their scores, by brute force."""
    trie = TrieTensors.of(recommender.catalog, recommender.settings.softmax)
    scores = score_catalog(recommender.model, tokens, trie).tolist()
    order = sorted(candidates, key=lambda row: (-scores[row], recommender.catalog.codes[row].tolist()))[:k]
    return [f"item-{row}" for row in order], pytest.approx([scores[row] for row in order], abs=1e-9)


def taught(recommender, prompt=None, templates=None):
    parts = recommender.model, recommender.tokenizer, recommender.catalog, prompt or recommender.prompt
    return Recommender(*parts, recommender.settings, templates=templates)


def answer(found):
    return ids(found), [item.log_probability for item in found]


def nearly(found):
    """The same answer from other memory, where float32 sums may end in another last bit."""
    return ids(found), pytest.approx(answer(found)[1], abs=1e-4)


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_a_model_of_semantic_id_tokens_alone_is_scored_over_these_alone(model_type):
    recommender = random_recommender(3, model_type)
    settings = Settings(max_history=6, num_beams=40, softmax="semantic_ids")
    narrow = Recommender(recommender.model, recommender.tokenizer, recommender.catalog, recommender.prompt, settings)
    history = [3, 9, 3]
    prompt = narrow.encoder.encode(history)
    found = narrow.recommend([f"item-{row}" for row in history], k=40, exclude_seen=False)
    assert answer(found) == best(narrow, prompt, range(40), 40)
    own = sorted(token for level in recommender.catalog.token_ids for token in level.tolist())
    for item in (found[0], found[-1]):  # by hand: the other tokens have no share in the sum
        tokens = recommender.catalog.tokens_of(recommender.catalog.row(item.item_id))
        with torch.inference_mode():
            logits = recommender.model(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1]
        kept = logits[:, own].log_softmax(-1)
        by_hand = sum(float(kept[level, own.index(token)]) for level, token in enumerate(tokens))
        assert item.log_probability == pytest.approx(by_hand, abs=1e-9)
    wide = recommender.recommend([f"item-{row}" for row in history], k=40, exclude_seen=False)
    scores = {item.item_id: item.log_probability for item in wide}
    assert all(item.log_probability > scores[item.item_id] + 0.1 for item in found)


def test_the_softmax_range_travels_and_older_artefacts_have_the_whole_vocabulary(tmp_path):
    recommender = random_recommender(4, dtype=torch.float32)
    recommender.settings.softmax = "semantic_ids"
    narrow = taught(recommender)
    narrow.save_pretrained(tmp_path / "artefact")
    again = Recommender.from_pretrained(tmp_path / "artefact")
    assert again.settings.softmax == "semantic_ids"
    assert answer(again.recommend(["item-3"])) == nearly(narrow.recommend(["item-3"]))
    stored = json.loads((tmp_path / "artefact/llmrec.json").read_text())
    del stored["softmax"]
    (tmp_path / "artefact/llmrec.json").write_text(json.dumps(stored))
    assert read_settings(tmp_path / "artefact").softmax == "vocabulary"
    with pytest.raises(RequestError, match="softmax is 'items'"):
        Settings(softmax="items")


def test_search_is_brute_force_over_the_templates_prompt(recommender):
    searching = taught(recommender, templates=TEMPLATES)
    found = searching.search("a title <s0_1>", k=40, num_beams=40)
    tokens = searching.encoder.encode([], prompt=TEMPLATES["search"]["a"], query="a title <s0_1>")
    text = recommender.tokenizer.decode(tokens)
    assert "Wanted: a title" in text
    assert "<s0_1>" not in text  # a query is untrusted text
    assert answer(found) == best(searching, tokens, range(40), 40)
    assert [item.rank for item in found] == list(range(1, 41))
    assert ids(searching.search("a title <s0_1>", k=3, num_beams=40)) == ids(found)[:3]
    with pytest.raises(RequestError, match=r"templates for no task, and none to search with"):
        recommender.search("a title")
    with pytest.raises(RequestError, match="The query is '  '"):
        searching.search("  ")
    with pytest.raises(RequestError, match="k is 0"):
        searching.search("a title", k=0)


def test_a_preference_chooses_the_prompt_that_has_a_place_for_it(recommender):
    asked = taught(recommender, templates=TEMPLATES)
    history = ["item-1", "item-8"]
    found = asked.recommend(history, k=38, num_beams=40, preference="a brand")
    tokens = asked.encoder.encode([1, 8], prompt=TEMPLATES["preference"]["one"], preference="a brand")
    assert "a brand!" in recommender.tokenizer.decode(tokens)
    assert answer(found) == best(asked, tokens, set(range(40)) - {1, 8}, 38)
    assert answer(asked.recommend(history)) == answer(recommender.recommend(history))
    wishes = ["a brand", "a title", "x"]
    items, scores = asked.recommend_rows([[1, 8], [], [1, 8]], k=4, preference=wishes)
    for row, wish in enumerate(wishes):
        alone = asked.recommend(history if row != 1 else [], k=4, preference=wish)
        assert ([f"item-{item}" for item in items[row]], scores[row]) == (ids(alone), pytest.approx(answer(alone)[1]))
    with pytest.raises(RequestError, match="No prompt of the artefact has a place for preference"):
        recommender.recommend(history, preference="a brand")
    with pytest.raises(RequestError, match=r"a place for mood; beside the history they take preference\. Leave"):
        asked.recommend(history, mood="sad")
    with pytest.raises(RequestError, match="preference is 'ab'"):
        asked.recommend_rows([[1], [2]], preference="ab")


def test_events_go_to_the_prompt_with_their_items(recommender):
    timed = taught(recommender, prompt=TIMES)
    events = [{"action": f"act {n}", "timestamp": 86_400.0 * n} for n in range(8)]
    names = [f"item-{row}" for row in range(8)]
    tokens = timed.encoder.encode(range(8), events)
    text = recommender.tokenizer.decode(tokens)
    assert [f"act {n} 1 day later" in text for n in range(8)] == [n >= 3 for n in range(8)]  # the first has no gap
    assert [f"act {n}" in text for n in range(8)] == [n >= 2 for n in range(8)]
    found = timed.recommend(names, k=5, num_beams=40, events=events)
    assert answer(found) == best(timed, tokens, range(8, 40), 5)
    gone = [*names[:3], "lost", *names[3:]]
    skipped = timed.recommend(
        gone, k=5, num_beams=40, ignore_unknown=True, events=[*events[:3], {"action": "?"}, *events[3:]]
    )
    assert answer(skipped) == answer(found)
    with pytest.raises(RequestError, match="8 items came with 7 events"):
        timed.recommend(names, events=events[1:])
    with pytest.raises(RequestError, match="8 items came with 7 events"):
        timed.encoder.encode(range(8), events[1:])
    with pytest.raises(PromptError, match="cannot be rendered"):
        timed.recommend(names)


def test_templates_travel_with_the_artefact(tmp_path, capsys):
    from llmrec.cli.recommend import recommend
    from llmrec.cli.search import search

    recommender = taught(random_recommender(4, dtype=torch.float32), templates=TEMPLATES)
    recommender.save_pretrained(tmp_path / "artefact")
    assert (tmp_path / "artefact/prompts/search/a.jinja").read_text() == "Wanted: {{ query }} = \n"
    again = Recommender.from_pretrained(tmp_path / "artefact")
    assert {task: list(named) for task, named in again.templates.items()} == {
        "preference": ["one"],
        "search": ["a", "b"],
    }
    assert answer(again.search("lamp")) == nearly(recommender.search("lamp"))
    search(str(tmp_path / "artefact"), "lamp", k=3, as_json=True)
    assert [row["item_id"] for row in json.loads(capsys.readouterr().out)] == ids(recommender.search("lamp", k=3))
    recommend(str(tmp_path / "artefact"), ["item-2"], k=3, as_json=True, preference="a brand")
    expected = ids(recommender.recommend(["item-2"], k=3, preference="a brand"))
    assert [row["item_id"] for row in json.loads(capsys.readouterr().out)] == expected
    (tmp_path / "artefact/prompts/search/c.jinja").write_text("{{ query }}")
    with pytest.raises(ArtefactError, match=r"c\.jinja is not in"):
        Recommender.from_pretrained(tmp_path / "artefact")


def test_templates_given_later_are_used():
    made = random_recommender(4)
    with pytest.raises(RequestError, match="none to search with"):
        made.search("red")
    made.templates = {"search": {"only": Prompt("{{ query }} is ")}}
    assert len(made.search("red", 3)) == 3


def test_what_came_of_a_training_is_no_part_of_its_recipe() -> None:
    def settings(seed: int, gain: float) -> Settings:
        came = {
            "began_with": f"sft of {seed}",
            "said": ["It helped."],
            "outcome": {"gain": gain},
            "cost": {"steps": 9},
        }
        further = [{"method": "GRPO", "settings": {"trainer": {"seed": seed + 1, "beta": 0.1}}, **came}]
        training = {"trainer": {"seed": seed}, "cost": {"fit_seconds": gain}, "evaluations": [gain], "versions": {}}
        return Settings(training=training | {"further": further})

    assert settings(3, 0.5).seeds == {"training": 3, "further": [4]}
    assert settings(3, 0.5).recipe == settings(3, 0.7).recipe
    assert settings(3, 0.5).recipe["further"] == [
        {"method": "GRPO", "settings": {"trainer": {"seed": 4, "beta": 0.1}}}
    ]
    assert Settings().seeds == {"training": None}
    assert Settings().recipe == {}
