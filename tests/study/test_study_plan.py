"""Which runs a study has, in which order and with which flags."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmrec.exceptions import RecipeError
from llmrec.study.arguments import StudyArguments, overrides
from llmrec.study.plan import StudyPlan

NAMES = st.sampled_from(["a", "b", "c", "d"])
FLAGS = st.dictionaries(NAMES, st.one_of(st.none(), st.integers(0, 3)), max_size=4)


def plan(**changes):
    values = {
        "title": "t",
        "flags": {"lr": 0.1, "gone": 1},
        "variants": {"x": {}, "y": {"lr": 0.2, "gone": None}},
        "axes": {"layers": [2, 4]},
        "seeds": [5, 3],
    }
    return StudyPlan(**(values | changes))


def test_runs_are_the_grid_with_the_first_seed_first():
    runs = plan().runs
    assert [(run.variant, run.axes["layers"], run.seed) for run in runs] == [
        *(("x", 2, 5), ("x", 4, 5), ("y", 2, 5), ("y", 4, 5)),
        *(("x", 2, 3), ("x", 4, 3), ("y", 2, 3), ("y", 4, 3)),
    ]
    assert runs[0].flags == {"lr": 0.1, "gone": 1, "layers": 2, "seed": 5}
    assert runs[3].flags == {"lr": 0.2, "layers": 4, "seed": 5}
    assert plan().cells == ["x-layers=2", "x-layers=4", "y-layers=2", "y-layers=4"]


@given(common=FLAGS, variants=st.dictionaries(st.sampled_from("pqr"), FLAGS, min_size=1), values=st.data())
def test_flags_are_common_then_variant_then_axis_without_none(common, variants, values):
    axes = {
        name: values.draw(st.lists(st.integers(0, 5), min_size=1, max_size=3, unique=True))
        for name in values.draw(st.lists(NAMES, max_size=2, unique=True))
    }
    runs = StudyPlan("t", common, variants, axes, [0, 1]).runs
    points = [dict(zip(axes, point, strict=True)) for point in itertools.product(*axes.values())]
    assert len(runs) == 2 * len(variants) * len(points)
    wanted = []
    for seed, (name, own), point in itertools.product([0, 1], variants.items(), points):
        flags = dict(common)
        flags.update(own)
        flags.update(point)
        wanted.append((name, seed, {key: value for key, value in flags.items() if value is not None} | {"seed": seed}))
    assert [(run.variant, run.seed, run.flags) for run in runs] == wanted


@pytest.mark.parametrize(
    ("axes", "curve"),
    [
        ({"layers": [2, 4]}, "layers"),
        ({"gate": [True, False]}, None),
        ({"score": ["silu", "softmax"], "dropout": [0.1, 0.5]}, "dropout"),
        ({"layers": [2]}, None),
        ({}, None),
    ],
    ids=["depth", "switch", "second", "one", "none"],
)
def test_a_curve_is_drawn_over_numbers(axes, curve):
    assert plan(axes=axes).curve == curve


def test_runs_are_chosen_by_variant_or_cell():
    assert [run.cell for run in plan(seeds=[0]).chosen(["y-layers=4", "x"])] == [
        "x-layers=2",
        "x-layers=4",
        "y-layers=4",
    ]
    assert plan().chosen([]) == plan().runs
    with pytest.raises(RecipeError, match="has no 'z'"):
        plan().chosen(["z"])


def test_a_value_that_is_a_path_gives_a_name_that_is_none():
    assert plan(axes={"interactions": ["/data/half.csv"]}).cells == [
        "x-interactions=_data_half.csv",
        "y-interactions=_data_half.csv",
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variants": {}}, "no variants"),
        ({"variants": {"a/b": {}}}, "cannot be a variant's name"),
        ({"variants": {"..": {}}}, "cannot be a variant's name"),
        ({"variants": {"x": 3}}, "Give its flags"),
        ({"axes": {"layers": []}}, "list of one or more"),
        ({"axes": {"layers": "24"}}, "list of one or more"),
        ({"axes": {"layers": [2, 2]}}, "two runs of the name"),
        ({"flags": {"artefact": "x"}}, "'artefact' among its flags"),
        ({"variants": {"x": {"seed": 1}}}, "'seed' among its flags"),
        ({"axes": {"output_dir": ["x"]}}, "'output_dir' among its flags"),
        ({"seeds": []}, "seeds are"),
        ({"seeds": [1, 1]}, "all different"),
        ({"metrics": ["AUC"]}, "metrics are"),
        ({"published": {"z": {"HR@10": 0.1}}}, "names 'z', which is no variant"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value[:20],
)
def test_what_is_no_plan_is_refused(changes, message):
    with pytest.raises(RecipeError, match=message):
        plan(**changes)


def test_a_recipe_s_values_over_the_base_s_under_the_command_line_s(tmp_path):
    (tmp_path / "base.yaml").write_text("seed: 7\nlr: 0.1\nepochs: 9\nlayers: 3\nmax_history: 20\n")
    (tmp_path / "table.csv").write_text("x")
    arguments = StudyArguments(
        interactions="log.csv",
        runs="runs",
        base="base.yaml",
        common={"lr": 0.2, "max_history": None},
        variants={"a": {"epochs": 5}, "b": {}},
        axes={"layers": [1, 2]},
        override=["epochs=1", "bf16=true"],
        items="items.csv",
        seeds=[0],
    )
    runs = arguments.plan(tmp_path).runs
    assert [run.flags for run in runs][:2] == [
        {
            "lr": 0.2,
            "epochs": 1,
            "layers": layers,
            "bf16": True,
            "interactions": "log.csv",
            "items": "items.csv",
            "seed": 0,
        }
        for layers in (1, 2)
    ]
    assert runs[2].flags["epochs"] == 1
    arguments.override = ["layers=4"]
    with pytest.raises(RecipeError, match="layers, which is an axis"):
        arguments.plan(tmp_path)
    for base, message in (("absent.yaml", "cannot be read"), ("table.csv", "no names with values")):
        arguments.base = base
        with pytest.raises(RecipeError, match=message):
            arguments.plan(tmp_path)


@pytest.mark.parametrize("word", ["epochs", "=3", "a b=3", "x=[1"])
def test_a_word_that_sets_nothing_is_refused(word):
    with pytest.raises(RecipeError, match="Write NAME=VALUE"):
        overrides([word])
