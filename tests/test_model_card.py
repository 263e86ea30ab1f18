"""The card of an artefact: what it says, what it never says, and its way to the Hub."""

import json
import re

import pytest
import yaml
from factories import random_recommender
from huggingface_hub import ModelCard

from llmrec import Recommender
from llmrec.artefact import CALIBRATION_FILE, MANIFEST, verify_manifest
from llmrec.cli.push import push
from llmrec.exceptions import ArtefactError, DataError
from llmrec.model_card import card_of, model_card
from llmrec.prompt import Prompt
from llmrec.title_spelling import title_catalog

SPLIT = "5" * 64
HOSTILE = "a|b `x` <b> [l](u) *i* _u_\n---\n# Title \u202e\u200b {{ 7*7 }}"
SCORE = {
    "split": SPLIT,
    "part": "test",
    "cases": 1200,
    "users": 1000,
    "items": 40,
    "artefact": "/home/someone/runs/artefact",
    "systems": {
        "popularity": {"HR@10": 0.01, "HR@10 interval95": [0.005, 0.0151], "NDCG@10": 0.004, "beyond_list_share": 0.9},
        "llmrec": {"HR@10": 0.08094, "HR@10 interval95": [0.07, 0.09], "NDCG@10": 0.0464, "invalid_rate": 0.0},
    },
}
RATE = {
    "split": SPLIT,
    "part": "test",
    "cases": 50,
    "systems": {"raw": {"AUC": None, "log_loss": 0.7, "UAUC_users": 3}},
}
CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}


def settings(**changes):
    found = {
        "llmrec": "0.1.0",
        "max_history": 20,
        "num_beams": 50,
        "split": SPLIT,
        "protocol": {"split": "leave-one-out", "min_history": 3},
        "training": {
            "backbone": {"backbone": "meta-llama/Llama-3.2-1B"},
            "data": {"prompt": "/home/someone/prompts/mine.jinja", "folders": ["~/x/ids", "C:\\Users\\me\\y"]},
            "cost": {"parameters": 12_345_678},
            "evaluations": [{"step": 1}],
            "versions": {"torch": "2.13.0"},
        },
    }
    return found | changes


@pytest.fixture(scope="module")
def recommender():
    return random_recommender(4, hidden_size=32)


def test_front_matter_is_yaml_that_the_hub_reads(recommender):
    card = model_card(
        settings(), recommender.catalog, CONFIG, repo_id="me/rec", licence="apache-2.0", datasets=["them/log"]
    )
    head = yaml.safe_load(card.split("---\n")[1])
    assert head == {
        "library_name": "llmrec",
        "pipeline_tag": "text-generation",
        "license": "apache-2.0",
        "base_model": "meta-llama/Llama-3.2-1B",
        "datasets": ["them/log"],
        "tags": ["recommender-system", "generative-recommendation", "semantic-ids", "llmrec"],
    }
    parsed = ModelCard(card)
    assert parsed.data.license == "apache-2.0"
    assert parsed.data.base_model == "meta-llama/Llama-3.2-1B"
    assert parsed.text.startswith("# rec\n") or parsed.text.lstrip().startswith("# rec\n")
    assert "license" not in yaml.safe_load(model_card(settings(), recommender.catalog, CONFIG).split("---\n")[1])


def test_sections_and_figures(recommender):
    card = model_card(
        settings(), recommender.catalog, CONFIG, repo_id="me/rec", evaluations=[SCORE, RATE], size=5_000_000
    )
    sections = re.findall(r"^## (.*)$", card, flags=re.MULTILINE)
    assert sections == ["Data", "Evaluation", "How to load it", "Training", "Licence", "Limits", "Versions"]
    assert "| system | HR@10 | NDCG@10 |" in card
    assert "| popularity | 0.0100 [0.0050, 0.0151] | 0.0040 |" in card
    assert "| llmrec | 0.0809 [0.0700, 0.0900] | 0.0464 |" in card
    assert "1,200 cases, 1,000 users, 40 items" in card
    assert "| raw | – | 0.7000 |" in card
    assert SPLIT in card
    assert recommender.catalog.content_hash in card
    assert "| items | 40 to recommend, each spelt by 3 codes |" in card
    assert "| codebooks | 5 × 4 × 6 |" in card
    assert "| parameters | 12.3 M |" in card
    assert "| files | 5.0 MB |" in card
    assert "leave-one-out (min\\_history 3)" in card
    for line in (
        'Recommender.from_pretrained("me/rec")',
        'recommender.recommend(["item-0", "item-1"], k=10)',
        'AutoModelForCausalLM.from_pretrained("me/rec")',
        'LLM("me/rec")',
        "llmrec serve me/rec",
    ):
        assert line in card
    assert "stated no licence" in card
    assert "torch 2.13.0" in card
    assert not re.search(r"\n\n\n", card)


OUTCOME = {
    "systems": ["sft", "rl"],
    "part": "test",
    "users": 1500,
    "cases": 1600,
    "tests": 7,
    "seeds": 1,
    "metrics": {
        "NDCG@10": {
            "before": 0.04,
            "after": 0.0312,
            "difference": -0.0088,
            "difference interval95": [-0.012, -0.0056],
            "p_value": 0.001,
            "p_holm": 0.007,
        }
    },
    "verdict": "hurt",
    "sentence": "rl is worse than sft: NDCG@10 0.0400 before, 0.0312 after.",
}


def test_what_came_after_the_first_training_is_told_whatever_it_found(recommender):
    changed = settings()
    changed["training"] |= {
        "further": [
            {"method": "GRPO", "began_with": "sft", "said": ["It ended | early."], "outcome": OUTCOME},
            {"method": HOSTILE, "settings": {"folder": "/home/someone/x", "layers": 2}},
        ]
    }
    card = model_card(changed, recommender.catalog, CONFIG)
    sections = re.findall(r"^## (.*)$", card, flags=re.MULTILINE)
    assert sections[3:6] == ["Training", "After that: GRPO", sections[5]]
    assert sections[5].startswith("After that: a\\|b")
    assert sections[6] == "Licence"
    assert "| metric | sft | rl | difference | 95 % interval | p | p (Holm) |" in card
    row = r"| NDCG@10 | 0.0400 | 0.0312 | -0.0088 | \[-0.0120, -0.0056\] | 0.001 | 0.007 |"
    assert row in card
    assert "It began with sft." in card
    assert "It ended \\| early." in card
    assert "1,600 cases of 1,500 users of the test part (" in card
    assert "rl is worse than sft" in card
    # The second says that nothing is known, and no path of a machine.
    assert card.count("before and after were not evaluated") == 1
    assert '"folder": "x"' in card
    assert "/home/someone" not in card
    # The block of the first training holds none of it.
    block = card.partition("## Training")[2].partition("## After")[0]
    assert "further" not in block
    assert "Its quality is not known from this card" not in card
    assert not re.search(r"\n\n\n", card)
    parsed = ModelCard(card)
    assert parsed.text.count("## After that: ") == 2
    several = OUTCOME | {"seeds": 3}
    changed["training"]["further"] = [{"method": "GRPO", "outcome": several}]
    assert "test part, mean of 3 seeds (" in model_card(changed, recommender.catalog, CONFIG)


def test_it_claims_no_more_than_is_known(recommender):
    bare = model_card(settings(), recommender.catalog, CONFIG)
    assert "No evaluation came with this card" in bare
    assert "Its quality is not known from this card" in bare
    assert "were not calibrated" in bare
    assert '"user/name"' in bare
    told = model_card(settings(), recommender.catalog, CONFIG, evaluations=[SCORE], is_calibrated=True)
    assert "No evaluation" not in told
    assert "Its quality is not known" not in told
    assert "were calibrated on the validation part" in told
    nothing = model_card({}, recommender.catalog, {})
    assert "Nothing is recorded of the training" in nothing
    assert "not recorded" in nothing


def test_no_path_of_the_machine_is_in_it(recommender):
    card = model_card(settings(), recommender.catalog, CONFIG, evaluations=[SCORE])
    assert "mine.jinja" in card
    assert '"ids"' in card
    assert '"y"' in card
    for word in ("someone", "home", "~/", "Users", "C:"):
        assert word not in card


def test_names_from_files_stay_text(recommender):
    catalog = random_recommender(4, hidden_size=32).catalog
    catalog.items[0] = {"item_id": '"]); import os #```' + HOSTILE, "title": HOSTILE}
    systems = {HOSTILE: {"HR@10": 0.5}}
    hostile = settings(protocol={"split": HOSTILE, "x": "/etc/secret\n# y"}, llmrec=HOSTILE)
    hostile["training"]["data"]["prompt"] = "```\n" + HOSTILE
    hostile["training"]["versions"] = {HOSTILE: HOSTILE}
    card = model_card(
        hostile, catalog, {"model_type": HOSTILE}, evaluations=[SCORE | {"systems": systems, "part": HOSTILE}]
    )
    assert re.findall(r"^#+ (.*)$", card, flags=re.MULTILINE) == [
        "A generative recommender", "Data", "Evaluation", "How to load it",
        "Training", "Licence", "Limits", "Versions",
    ]  # fmt: skip
    assert card.count("```") == 10
    assert "\u202e" not in card
    assert "\u200b" not in card
    assert "<b>" not in card.replace(json.dumps("<b>"), "").split("```")[0]
    assert "a\\|b" in card
    assert "49" not in card.split("## Versions")[1]
    assert card.count("\n---\n") == 1
    ModelCard(card)
    # The example is Python, in which the id is what it was.
    line = next(line for line in card.splitlines() if line.startswith("recommender.recommend("))
    assert eval(line, {"recommender": Echo()}) == [catalog.items[0]["item_id"], "item-1"]


class Echo:
    """Gives back the history that it is asked with."""

    def recommend(self, history, k):
        return history


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"licence": "Apache 2.0\nx: y"}, "is no licence's id"),
        ({"base_model": "gpt2\n"}, "is no Hub id"),
        ({"datasets": ["a/b/c"]}, "is no Hub id"),
        ({"evaluations": [SCORE | {"split": "6" * 64}]}, "is of the split '666666666666'"),
        ({"evaluations": [{}]}, "is of the split 'None'"),
        ({"evaluations": [{"split": SPLIT}]}, "has no systems"),
        ({"evaluations": [{"split": SPLIT, "systems": {"a": {"x": 1}}}]}, "has no metric that a card shows"),
    ],
)
def test_what_cannot_be_said_is_refused(recommender, changes, message):
    with pytest.raises(DataError, match=message):
        model_card(settings(), recommender.catalog, CONFIG, **changes)


def test_a_local_folder_is_no_base_model(recommender):
    for name in ("base", "/home/someone/base", None):
        made = settings(training={"backbone": {"backbone": name}})
        assert "base_model" not in yaml.safe_load(model_card(made, recommender.catalog, CONFIG).split("---\n")[1])


@pytest.fixture
def artefact(recommender, tmp_path):
    recommender.settings.split = SPLIT
    recommender.save_pretrained(tmp_path / "artefact")
    return tmp_path / "artefact"


PUSH = (
    "from pathlib import Path; from llmrec.cli.push import push; "
    "push(Path({!r}), 'me/rec', evaluations=[Path(p) for p in {!r}], licence={!r}, card={!r} and Path({!r}))"
)


def test_push_writes_the_card_into_the_upload_alone(artefact, fake_hub, run_python, tmp_path):
    (tmp_path / "score.json").write_text(json.dumps(SCORE))
    (tmp_path / "own.md").write_text("# mine")
    before = {path.name: path.read_bytes() for path in artefact.iterdir() if path.is_file()}
    listed = set(json.loads((artefact / MANIFEST).read_text())["files"])
    variables = fake_hub.variables(tmp_path / "home")
    score = [str(tmp_path / "score.json")]
    for evaluations, licence, own, expected in (
        (score, "mit", None, "0.0809 [0.0700, 0.0900]"),
        ([], None, None, "No evaluation came with this card"),
        ([], None, str(tmp_path / "own.md"), "# mine"),
    ):
        done = run_python(PUSH.format(str(artefact), evaluations, licence, own, own), **variables)
        assert done.returncode == 0, done.stderr
        files = fake_hub.repos["me/rec"]["main"]
        assert expected in files["README.md"].decode()
        assert set(files) == listed | {MANIFEST, "README.md"}
        assert files["model.safetensors"] == before["model.safetensors"]
    assert {path.name: path.read_bytes() for path in artefact.iterdir() if path.is_file()} == before
    verify_manifest(artefact)
    back = run_python("from llmrec.artefact import resolve; print(resolve('me/rec'))", **variables)
    assert back.returncode == 0, back.stderr


def test_push_uploads_the_calibration_and_removes_one_that_is_gone(artefact, fake_hub, run_python, tmp_path):
    variables = fake_hub.variables(tmp_path / "home")
    (artefact / CALIBRATION_FILE).write_text("{}")
    for present in (True, False):
        if not present:
            (artefact / CALIBRATION_FILE).unlink()
        done = run_python(PUSH.format(str(artefact), [], None, None, None), **variables)
        assert done.returncode == 0, done.stderr
        assert (CALIBRATION_FILE in fake_hub.repos["me/rec"]["main"]) is present


def test_push_refuses_before_the_hub_is_asked(artefact, tmp_path):
    (tmp_path / "own.md").write_text("# mine")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(ArtefactError, match="Give one or the other"):
        push(artefact, "me/rec", licence="mit", card=tmp_path / "own.md")
    with pytest.raises(ArtefactError, match=r"absent\.md cannot be read"):
        push(artefact, "me/rec", card=tmp_path / "absent.md")
    for name in ("absent.json", "list.json"):
        with pytest.raises(DataError, match="is no evaluation that can be read"):
            card_of(artefact, evaluations=[tmp_path / name])
    (artefact / "llmrec.json").unlink()
    with pytest.raises(ArtefactError, match="is no artefact of a recommender"):
        card_of(artefact)


def test_the_example_is_one_that_the_prompt_can_render(recommender):
    catalog = recommender.catalog
    source = "{{ preference }}{% for i in history %}{{ i.gap }}{{ i.action }}{{ i.semantic_id }}{% endfor %}"
    card = model_card(settings(), catalog, CONFIG, prompt=Prompt(source))
    call = re.search(r"recommender\.(recommend\(.*\))", card)[1]
    assert "preference=" in call
    served = Recommender(recommender.model, recommender.tokenizer, catalog, Prompt(source), recommender.settings)
    assert len(eval(f"served.{call}", {"served": served})) == 10
    plain = model_card(settings(), catalog, CONFIG, prompt=recommender.prompt)
    assert 'recommender.recommend(["item-0", "item-1"], k=10)' in plain
    assert plain == model_card(settings(), catalog, CONFIG)


def test_tags_say_how_items_are_spelt(recommender):
    def tags(catalog):
        return yaml.safe_load(model_card(settings(), catalog, CONFIG).split("---\n")[1])["tags"]

    assert "semantic-ids" in tags(recommender.catalog)
    titles = title_catalog([{"item_id": "a", "title": "Red lamp"}], recommender.tokenizer)
    assert "semantic-ids" not in tags(titles)
    assert "generative-recommendation" in tags(titles)
