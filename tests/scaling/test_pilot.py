"""A pilot's plan: flags of its trainings, what its shares hold, its file, and what is refused before the first."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import yaml

from llmrec.data.arguments import ColumnArguments, SplitArguments
from llmrec.data.items import Items
from llmrec.data.sample import make_sample
from llmrec.data.subset import training_users
from llmrec.exceptions import DataError, RecipeError
from llmrec.scaling.entropy import real_entropy
from llmrec.scaling.grid import GridRequest
from llmrec.scaling.pilot import Pilot, PilotEncoder, ShareFacts, share_facts
from llmrec.scaling.pilot_planner import Estimate, plan_pilot, share_budget
from llmrec.stages import stage_path
from llmrec.study.place import RunPlace

RECIPES = stage_path("train/recipes/sasrec.yaml").parent
REQUEST = GridRequest([1, 2, 4], [8, 16, 32], [0.5, 1.0], [0, 1], [(4, 64)])


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "log.parquet"
    make_sample(0, 100, 40)[0].write_parquet(path)
    return path


@pytest.fixture(scope="module")
def split(log):
    interactions = ColumnArguments().read_interactions(log)
    return SplitArguments().make(interactions, Items.from_interactions(interactions))


def cost(depth, width, tokens):
    return float(depth * width * tokens)


def estimate(entry):
    return Estimate(lambda depth, width, tokens: depth * width / 10, cost, {"how": entry.name})


def planned(log, split, *names, minutes=1000.0, **changes):
    encoders = [PilotEncoder.read(name, RECIPES, "debug_seqrec.yaml") for name in names or ["hstu"]]
    given = {"request": REQUEST, "metric": "NDCG@10"} | changes
    return plan_pilot(encoders, given.pop("request"), split, {"interactions": str(log)}, minutes, estimate, **given)


def test_each_training_differs_in_what_is_studied_alone(log, split):
    pilot = planned(log, split, "hstu", "sasrec", share_seed=3, metric="HR@7")
    for name in ("hstu", "sasrec"):
        runs = pilot.runs(name)
        assert len(runs) == 3 * 3 * 2 * 2 + 2
        common = [{key: value for key, value in run.flags.items() if key not in VARIED} for _, run in runs]
        assert all(flags == common[0] for flags in common)
        assert (
            common[0].items()
            >= {
                **{
                    "encoder": name,
                    "interactions": str(log),
                    "train_share_seed": 3,
                    "ks": [5, 7, 10],
                    "max_steps": 20,
                },
            }.items()
        )
        for trial, run in runs:
            assert [run.flags[flag] for flag in VARIED] == [trial.depth, trial.width, trial.share, trial.seed]
        assert len({run.cell for _, run in runs}) == 3 * 3 * 2 + 1
        assert runs[0][1].cell == f"{name}-1x8-share0.5"
    # By hand, with the recipe and these flags, it is the same training.
    place = RunPlace("x", runs[0][1])
    assert place.folder.name.startswith("sasrec-1x8-share0.5-seed=0-")


VARIED = ("num_hidden_layers", "hidden_size", "train_share", "seed")


def test_sizes_that_hang_on_the_width_are_the_encoder_s_own(tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(yaml.safe_dump({"qk_dim": 50, "v_dim": 50, "seed": 4, "hidden_size": 50, "dropout": 0.2}))
    assert PilotEncoder.read("hstu", RECIPES, str(recipe)).flags == {"dropout": 0.2}
    given = {"v_dim": 8, "dropout": None, "max_steps": 5}
    flags = PilotEncoder.read("hstu", RECIPES, str(recipe), given).flags
    assert flags == {"v_dim": 8, "max_steps": 5}
    for name in ("hidden_size", "train_share", "encoder", "seed"):
        with pytest.raises(RecipeError, match=f"--override sets '{name}'"):
            PilotEncoder.read("hstu", RECIPES, None, {name: 1})
    recipe.write_text(yaml.safe_dump({"backbone": "user/model"}))
    with pytest.raises(RecipeError, match="lm:mine begins with a checkpoint"):
        PilotEncoder.read(f"lm:{recipe}", RECIPES)


@pytest.mark.parametrize("drawn", ["in_batch", "mixed"])
def test_negatives_that_no_law_can_count_are_refused(drawn):
    given = {"loss": "sampled_softmax", "negatives": drawn}
    with pytest.raises(RecipeError, match=f"sasrec takes its negatives {drawn}, and how many"):
        PilotEncoder.read("sasrec", RECIPES, None, given)
    assert PilotEncoder.read("sasrec", RECIPES, None, {**given, "negatives": "uniform"}).negatives == 128


def test_what_reasons_is_refused():
    with pytest.raises(RecipeError, match=r"sasrec reasons \(prl\), and what thoughts cost"):
        PilotEncoder.read("sasrec", RECIPES, None, {"reasoning": "prl"})
    assert PilotEncoder.read("sasrec", RECIPES, None, {"reasoning": "none"}).name == "sasrec"


def test_negatives_and_windows_are_the_recipe_s():
    published = PilotEncoder.read("hstu", RECIPES, "hstu_ml1m.yaml")
    assert (published.negatives, published.longest, published.script) == (128, 201, "train/seqrec.py")
    ours = PilotEncoder.read("sasrec", RECIPES)
    assert (ours.negatives, ours.longest) == (None, None)
    language = PilotEncoder.read("lm:llama_scratch", RECIPES)
    assert (language.name, language.script) == ("lm:llama_scratch", "train/sft.py")
    assert (language.negatives, language.longest) == (None, None)
    assert "intermediate_size" not in language.flags
    assert language.flags["num_attention_heads"] == 4


def test_what_a_share_holds(split):
    found = share_facts(split, [0.25, 1.0], seed=2, longest=6)
    for share, facts in found.items():
        users = training_users(split, share, 2)
        kept = [one[-6:] for one, chosen in zip(split.train, users, strict=True) if chosen and len(one) > 1]
        assert facts.users == len(kept)
        assert facts.tokens == sum(map(len, kept))
        assert facts.quality == pytest.approx(1 / real_entropy(np.concatenate(kept)), rel=1e-12)
    assert found[0.25].tokens < found[1.0].tokens
    assert share_facts(split, [1.0])[1.0].tokens == sum(len(one) for one in split.train if len(one) > 1)
    nothing = replace(split, train_ends=split.offsets[:-1] + 1)
    with pytest.raises(DataError, match="25% of the users have no training sequence"):
        share_facts(nothing, [0.25])


def test_the_file_holds_the_plan(log, split, tmp_path):
    pilot = planned(log, split, minutes=1.2)
    path = pilot.save(tmp_path)
    assert Pilot.load(tmp_path) == pilot
    document = json.loads(path.read_text())
    part = document["encoders"]["hstu"]
    assert document["seconds"] == pytest.approx(sum(trial["seconds"] for trial in part["trials"]))
    assert document["seconds"] <= 1.2 * 60
    assert part["left_out"]
    assert {entry["as"] for entry in part["left_out"]} == {"repetition", "cell"}
    assert all(trial["flops"] == cost(trial["depth"], trial["width"], trial["tokens"]) for trial in part["trials"])
    assert document["basis"] == {"hstu": {"how": "hstu"}}
    assert [entry["share"] for entry in part["shares"]] == [0.5, 1.0]
    assert all(math.isfinite(entry["quality"]) for entry in part["shares"])
    path.write_text(path.read_text().replace('"trials"', '"trails"'))
    with pytest.raises(DataError, match=r"no pilot that can be read: KeyError.*llmrec scale plan"):
        Pilot.load(tmp_path)
    with pytest.raises(DataError, match="FileNotFoundError"):
        Pilot.load(tmp_path / "none")


def test_other_data_than_was_planned_is_refused(log, split, tmp_path):
    mine = tmp_path / "log.parquet"
    mine.write_bytes(log.read_bytes())
    pilot = planned(mine, split)
    pilot.check_data()
    mine.write_bytes(b"other")
    with pytest.raises(DataError, match="is another than when the pilot was planned"):
        pilot.check_data()
    mine.unlink()
    with pytest.raises(DataError, match="or is not there"):
        pilot.check_data()


def test_encoders_share_the_budget_and_what_one_leaves_is_the_others():
    facts = {share: ShareFacts(10, int(100 * share), 0.2) for share in (0.5, 1.0)}
    times = {"slow": 40.0, "fast": 1.0}
    seconds = {name: lambda depth, width, tokens, each=each: each for name, each in times.items()}
    shares = dict.fromkeys(times, facts)
    # 38 trainings each: the fast one's take 38 seconds of its 10 minutes, and the rest is the slow one's.
    grids = share_budget(REQUEST, shares, seconds, 20)
    assert list(grids) == ["slow", "fast"]
    assert len(grids["fast"].trials) == 38
    assert len(grids["slow"].trials) == (20 * 60 - 38) // 40
    assert len(share_budget(REQUEST, shares, seconds, 1000)["slow"].trials) == 38
    with pytest.raises(
        DataError, match=r"^slow has 3\.37 of the budget's 4 minutes: In 3\.37 minutes there is no room"
    ):
        share_budget(REQUEST, shares, seconds, 4)
    with pytest.raises(DataError, match=r"^The budget of 0\.1 minutes is below the smallest model"):
        share_budget(REQUEST, {"slow": facts}, {"slow": seconds["slow"]}, 0.1)
    for minutes in (0, float("nan"), float("inf")):
        with pytest.raises(DataError, match="Give more than none"):
            share_budget(REQUEST, shares, seconds, minutes)


@pytest.mark.parametrize(
    ("name", "overrides", "said"),
    [
        ("hstu", {"num_attention_heads": 3, "norm": "pre"}, "hstu, depth 1, width 8: hstu has no norm"),
        ("sasrec", {"num_attention_heads": 3}, "sasrec, depth 1, width 8: hidden_size 8 is not a multiple"),
        ("sasrec", {"hiden": 3}, "unknown key 'hiden'"),
        ("sasrec", {"ks": [0]}, "--ks is"),
        ("hsut", {}, "hsut: .*hsut"),
        ("lm:debug", {}, "lm:debug: .*one of --semantic_ids and --items"),
        ("lm:debug", {"num_attention_heads": 3, "semantic_ids": "."}, "lm:debug, depth 1, width 8: hidden_size 8"),
        ("lm:debug", {"semantic_ids": "nowhere"}, "There is no nowhere"),
    ],
    ids=lambda value: str(value)[:25],
)
def test_what_a_training_would_refuse_is_refused_before_the_first(log, split, name, overrides, said):
    entry = PilotEncoder.read(name, RECIPES, "debug_seqrec.yaml", overrides)
    with pytest.raises(RecipeError, match=said):
        plan_pilot([entry], REQUEST, split, {"interactions": str(log)}, 1000, estimate)


def test_encoders_and_metrics_that_cannot_be_are_refused(log, split):
    for names, metric, said in (
        (["hstu", "hstu"], "NDCG@10", "encoders are hstu, hstu"),
        (["hstu"], "AUC", "metric is 'AUC'"),
        (["lm:debug"], "NDCG@7", "train/sft.py tests at 5, 10 and 20"),
    ):
        with pytest.raises(RecipeError, match=said):
            planned(log, split, *names, metric=metric)
    with pytest.raises(RecipeError, match=r"none\. Name one or more"):
        plan_pilot([], REQUEST, split, {"interactions": str(log)}, 1000, estimate)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            {"max_history": "many"},
            "hstu: argument --max_history.*invalid int value: 'many'. Give the flag",
        ),
        ({"loss": "hinge"}, "says loss: hinge. Choose one of softmax"),
        ({"stride": 99}, "^hstu: --stride is 99, more than"),
        ({"relative_bias": "none of ours"}, "^hstu, depth 1, width 8: There is no relative bias"),
        ({"ks": 5}, "hstu has the cut-offs ks 5. Give a list"),
        ({"ks": ["a"]}, r"hstu has the cut-offs ks \['a'\]"),
        ({"min_history": 9}, "hstu has the flag min_history 9, and the pilot is planned with 3. Tell the plan"),
        ({"split": "global-temporal"}, "planned with 'leave-one-out'"),
        ({"interactions": "other.csv"}, "hstu has the flag interactions 'other.csv'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_flags_are_found_out_before_anything_is_measured(log, split, flags, said, capfd):
    def measured(entry):
        raise AssertionError

    encoder = PilotEncoder.read("hstu", RECIPES, None, flags)
    with pytest.raises(RecipeError, match=said):
        plan_pilot([encoder], REQUEST, split, {"interactions": str(log)}, 1000, measured)
    assert "usage:" not in capfd.readouterr().err


def test_flags_that_say_what_the_plan_says_are_no_harm(log, split):
    encoder = PilotEncoder.read("hstu", RECIPES, None, {"min_history": 3, "interactions": str(log), "ks": [20]})
    pilot = plan_pilot([encoder], REQUEST, split, {"interactions": str(log)}, 1000, estimate)
    assert pilot.runs("hstu")[0][1].flags["ks"] == [10, 20]
