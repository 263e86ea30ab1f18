"""What a pilot's trainings are thought to take: by measurements that are made up here."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.numpy import save_file

from llmrec.data.arguments import ColumnArguments, SplitArguments
from llmrec.data.items import Items
from llmrec.data.sample import make_sample
from llmrec.data.subset import learnt_split
from llmrec.examples import windows as rows_of
from llmrec.exceptions import DataError
from llmrec.scaling.cost import cost_of
from llmrec.scaling.language import row_flops
from llmrec.scaling.pilot import PilotEncoder, share_facts
from llmrec.scaling.pilot_estimates import Workload, evaluation_flops, measured, shape_of
from llmrec.scaling.throughput import Probe
from llmrec.sequence.arguments import EncoderArguments
from llmrec.sequence.events import EventConfig
from llmrec.sequence.histories import LoggedHistories
from llmrec.sequence.model import SequenceModel, sequence_config
from llmrec.sequence.windows import TrainingWindows
from llmrec.stages import stage_path

RECIPES = stage_path("train/recipes/sasrec.yaml").parent
RATE, START, STEP_TOKENS = 1e8, 7.0, 64.0


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "log.parquet"
    make_sample(0, 100, 60)[0].write_parquet(path)
    interactions = ColumnArguments().read_interactions(path)
    return SplitArguments().make(interactions, Items.from_interactions(interactions))


class Machine:
    """Does `RATE` operations a second, takes `START` seconds to start, and learns `STEP_TOKENS` events a step."""

    def __init__(self):
        self.asked = []

    def __call__(self, cost, tokens, arguments, script):
        self.asked.append((cost.shape.depth, cost.shape.width, tokens, arguments, script))
        step = cost.flops_per_token * STEP_TOKENS
        name = getattr(cost.shape, "encoder", None) or f"lm:{cost.shape.model_type}"
        return Probe(
            *(name, cost.shape.depth, cost.shape.width, step / RATE, START, STEP_TOKENS, step),
            *(RATE, 10 * RATE, 0.1, "a machine", "float32", 40),
        )


SIZES = [(1, 16), (2, 16), (1, 32), (2, 32), (4, 24)]


def test_the_smallest_and_the_largest_are_measured_with_the_recipe(split, tmp_path):
    machine = Machine()
    entry = PilotEncoder.read("hstu", RECIPES, "hstu_ml1m.yaml", {"qk_dim": 8})
    data = {"interactions": "log.parquet", "min_history": 4}
    found = measured(entry, split, SIZES, data, tmp_path, machine)
    assert [one[:2] for one in machine.asked] == [(1, 16), (4, 24)]
    assert {one[4] for one in machine.asked} == {"train/seqrec.py"}
    assert [len(found.basis["probes"]), found.basis["probes"][1]["width"]] == [2, 24]
    # Each user's last window alone is learnt from, and all of these but their first events are targets.
    targets = sum(min(len(one), 201) - 1 for one in split.train if len(one) > 1)
    assert [one[2] for one in machine.asked] == [pytest.approx(targets)] * 2
    recipe = yaml.safe_load(Path(machine.asked[1][3][1]).read_text())
    assert machine.asked[1][3][0] == "--config"
    assert recipe.items() >= {**entry.flags, **data, "encoder": "hstu", "hidden_size": 24}.items()
    assert recipe["num_hidden_layers"] == 4
    assert "seed" not in recipe


@pytest.mark.parametrize(
    ("overrides", "evaluations"),
    [
        ({"eval_strategy": "no"}, 0),
        ({"eval_strategy": "epoch", "eval_users": 20}, 5),
        ({"eval_strategy": "steps", "eval_steps": 0.25, "eval_users": 20}, 4),
        ({"eval_strategy": "steps", "eval_steps": 10, "eval_users": 20, "max_steps": 30}, 3),
    ],
    ids=["none", "epochs", "parts", "steps"],
)
def test_seconds_are_the_start_the_steps_and_the_evaluations(split, tmp_path, overrides, evaluations):
    entry = PilotEncoder.read("sasrec", RECIPES, None, {"num_train_epochs": 5, **overrides})
    found = measured(entry, split, SIZES, {"interactions": "x"}, tmp_path, Machine())
    facts = share_facts(split, [0.5, 1.0])
    work = Workload.of(entry, split)
    for depth, width in ((1, 16), (2, 32)):
        cost = cost_of(shape_of(entry, depth, width, work))
        for share in (0.5, 1.0):
            tokens = facts[share].tokens
            an_epoch = math.ceil(tokens * work.targets_per_token / STEP_TOKENS)
            steps = overrides.get("max_steps") or 5 * an_epoch
            assert found.flops(depth, width, tokens) == pytest.approx(cost.flops_per_token * STEP_TOKENS * steps)
            case = (cost.window.layers + cost.window.attention) / 3 + 2 * split.num_items * width
            counted = evaluations * 20 + len(split.targets("test"))
            expected = START + cost.flops_per_token * STEP_TOKENS * steps / RATE + case * counted / RATE
            # Between probes the line is straight in logarithms, so that seconds in proportion are exact; epochs of the
            # evaluations are those of events, not of whole steps.
            assert found.seconds(depth, width, tokens) == pytest.approx(expected, rel=0.03)
    assert found.seconds(2, 32, facts[1.0].tokens) > found.seconds(1, 16, facts[1.0].tokens)


@pytest.mark.parametrize("recipe", ["sasrec.yaml", "hstu_ml1m.yaml"])
def test_the_workload_is_that_of_the_training_s_windows(split, recipe):
    entry = PilotEncoder.read("hstu", RECIPES, recipe, {"max_history": 6})
    work = Workload.of(entry, split)
    windows = TrainingWindows(LoggedHistories(split, EventConfig()), 6, entry.flags["windows"])
    assert work.length == pytest.approx(windows.lengths.mean())
    assert work.targets == pytest.approx(windows.target_counts().sum() / len(windows))
    assert work.events * work.targets_per_token == pytest.approx(windows.target_counts().sum())
    assert work.events == share_facts(split, [1.0], 0, entry.longest)[1.0].tokens
    assert (work.items, work.valid, work.test) == (
        split.num_items,
        len(split.targets("valid")),
        len(split.targets("test")),
    )
    assert learnt_split(split, 1.0) is split


@pytest.mark.parametrize(
    ("encoder", "overrides"),
    [
        ("hstu", {"num_attention_heads": 2, "relative_bias": "position", "dropout": 0.0}),
        ("sasrec", {"num_attention_heads": 2, "feed_forward": "swiglu", "residual": "llama", "intermediate_size": 24}),
        ("bert4rec", {"num_attention_heads": 2}),
        ("gru4rec", {}),
        ("gru4rec", {"gru_size": 12}),
        ("llama", {"num_attention_heads": 4}),
        ("gpt2", {"num_attention_heads": 4}),
    ],
    ids=lambda value: value if isinstance(value, str) else ",".join(value),
)
def test_the_shape_is_the_model_s(split, encoder, overrides):
    from llmrec.scaling.parameters import parameters

    entry = PilotEncoder.read(encoder, RECIPES, None, overrides)
    shape = shape_of(entry, 3, 16, Workload.of(entry, split))
    flags = {name: value for name, value in entry.flags.items() if name in EncoderArguments.__dataclass_fields__}
    arguments = EncoderArguments(**flags | {"encoder": encoder, "num_hidden_layers": 3, "hidden_size": 16})
    with torch.device("meta"):
        model = SequenceModel(sequence_config(arguments.config(50 + (encoder == "bert4rec")), split.num_items, 50))
    assert parameters(shape) == sum(one.numel() for one in model.parameters())


def test_sampled_losses_and_their_negatives(split):
    for overrides, expected in (
        ({"loss": "softmax"}, (None, False, "softmax")),
        ({"loss": "sampled_softmax", "num_negatives": 7}, (7, False, "sampled_softmax")),
        ({"loss": "sampled_softmax", "shared_negatives": True}, (128, True, "sampled_softmax")),
        ({"loss": "gbce", "num_negatives": 9}, (9, False, "bce")),
    ):
        entry = PilotEncoder.read("sasrec", RECIPES, None, overrides)
        shape = shape_of(entry, 1, 16, Workload.of(entry, split))
        assert (shape.negatives, shape.shared_negatives, shape.loss) == expected
    entry = PilotEncoder.read("sasrec", RECIPES, None, {"num_attention_heads": 3})
    work = Workload.of(entry, split)
    with pytest.raises(DataError, match="3 heads do not share"):
        shape_of(entry, 1, 16, work)


@pytest.fixture(scope="module")
def codes(split, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ids")
    found = np.stack(np.unravel_index(np.arange(split.num_items), (10, 5, 2)), axis=1).astype(np.int32)
    save_file({"codes": found}, folder / "codes.safetensors")
    (folder / "semantic_ids.json").write_text('{"codebook_sizes": [10, 5, 2]}')
    lines = [f'{{"item_id": "{item}", "title": "t"}}\n' for item in split.item_ids]
    (folder / "items.jsonl").write_text("".join(lines))
    return str(folder)


def test_language_models_are_measured_by_their_script_and_write_with_beams(split, codes, tmp_path):
    machine = Machine()
    given = {"semantic_ids": codes, "num_train_epochs": 2, "eval_strategy": "no"}
    entry = PilotEncoder.read("lm:llama_scratch", RECIPES, None, given)
    found = measured(entry, split, SIZES, {"interactions": "x"}, tmp_path, machine)
    assert {one[4] for one in machine.asked} == {"train/sft.py"}
    work = Workload.of(entry, split)
    shape = shape_of(entry, 2, 32, work)
    assert (shape.codes, shape.vocabulary, shape.heads) == (3, 512 + 17, 4)
    tokens = share_facts(split, [1.0])[1.0].tokens
    assert found.flops(2, 32, tokens) > 0
    # Rows overlap: most of a long history's have as much context as targets.
    rows = [row for one in split.train for row in rows_of(len(one), 20)]
    assert shape.length == pytest.approx(np.mean([end - begin for begin, _, end in rows]))
    assert shape.targets == pytest.approx(np.mean([end - first for _, first, end in rows]))
    costs = [row_flops(replace(shape, length=end - begin, targets=end - first)).total for begin, first, end in rows]
    learnt = sum(end - first for _, first, end in rows)
    assert cost_of(shape).flops_per_token == pytest.approx(sum(costs) / learnt, rel=0.05)
    few, all_of_them = (
        evaluation_flops(
            PilotEncoder(entry.name, {**entry.flags, "test_users": users}), cost_of(shape), work, 10, 9, 9
        )
        for users in (5, -1)
    )
    assert all_of_them / few == pytest.approx(len(split.targets("test")) / 5)
    # What titles cost, or rows of other tasks, is not known before they are built.
    for other in ({"tasks": ["next_item"]}, {"items": "items.parquet", "semantic_ids": None}):
        entry = PilotEncoder.read("lm:llama_scratch", RECIPES, None, {**given, **other})
        assert measured(entry, split, SIZES, {"interactions": "x"}, tmp_path, machine).flops is None
