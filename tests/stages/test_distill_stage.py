"""train/distill.py as a user runs it, on a ring of items: language and sequence teachers, students and controls."""

import copy
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from ring import write_ring
from safetensors import safe_open
from safetensors.torch import load_file

from llmrec import Recommender
from llmrec.backbones.causal_lm import BackboneArguments, from_scratch
from llmrec.data.arguments import ColumnArguments, SplitArguments
from llmrec.distillation.arguments import DistillArguments, StudentArguments
from llmrec.distillation.into_items import IntoItems
from llmrec.distillation.into_language import IntoLanguage
from llmrec.distillation.item_distributions import training_places
from llmrec.distillation.measurement import size_of
from llmrec.distillation.teacher import Teacher
from llmrec.evaluation.evaluation import Evaluation
from llmrec.exceptions import BackboneError, DataError, LLMRecError, RecipeError
from llmrec.losses.arguments import LossArguments
from llmrec.model_card import card_of
from llmrec.representations.item_features import ItemFeatures
from llmrec.script import parse
from llmrec.sequence.arguments import EventArguments, ItemArguments
from llmrec.sequence.recommender import SequenceRecommender
from llmrec.stages import stage_command, stage_path
from llmrec.training.arguments import FineTuningArguments
from llmrec.vocabulary import train_tokenizer

pytestmark = pytest.mark.slow

BRIEFLY = ["--max_steps", "12", "--eval_steps", "6", "--save_steps", "6", "--logging_steps", "4"]
QUIETLY = ["--disable_tqdm", "true", "--report_to", "none", "--use_cpu", "true"]


def script_of(name):
    """A stage's script as a module."""
    spec = importlib.util.spec_from_file_location(f"{name}_of_distillation", stage_path(f"train/{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def call(module, *flags):
    """What the script does with these flags, in this process."""
    module.main(*parse(module.make_parser(), list(flags)))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_ring(tmp_path_factory.mktemp("data"), users=120)


@pytest.fixture(scope="module")
def teacher(data):
    """A Llama of three layers that knows something."""
    recipe = ["--config", stage_path("train/recipes/debug.yaml").as_posix(), *QUIETLY, "--eval_users", "0"]
    sizes = ["--num_hidden_layers", "3", "--max_steps", "60", "--eval_strategy", "no", "--save_strategy", "no"]
    inputs = ["--interactions", str(data / "log.csv"), "--semantic_ids", str(data / "ids")]
    call(script_of("sft"), *recipe, *sizes, *inputs, "--artefact", str(data / "teacher" / "artefact"))
    return data / "teacher" / "artefact"


@pytest.fixture(scope="module")
def sequence_teacher(data):
    recipe = ["--config", stage_path("train/recipes/debug_seqrec.yaml").as_posix(), *QUIETLY]
    sizes = ["--num_hidden_layers", "3", "--encoder", "sasrec", "--max_steps", "60", "--eval_strategy", "no"]
    given = ["--interactions", str(data / "log.csv"), "--save_strategy", "no", "--dropout", "0.1"]
    call(script_of("seqrec"), *recipe, *sizes, *given, "--artefact", str(data / "sequence" / "artefact"))
    return data / "sequence" / "artefact"


@pytest.fixture(scope="module")
def stage():
    return script_of("distill")


def flags_of(data, teacher, artefact, *more):
    recipe = ["--config", stage_path("train/recipes/distill_debug.yaml").as_posix(), *QUIETLY]
    given = ["--interactions", str(data / "log.csv"), "--teacher", str(teacher), "--artefact", str(artefact)]
    return [*recipe, *given, *BRIEFLY, "--latency_repetitions", "1", *more]


SAME = ["--student", "same", "--num_hidden_layers", "2"]


def without_sizes(flags):
    """The recipe's sizes are of a student of another kind; a student of the teacher's own kind takes none."""
    place = flags.index("--config") + 1
    kept = [
        line
        for line in Path(flags[place]).read_text(encoding="utf-8").splitlines()
        if line.split(":")[0] not in ("hidden_size", "num_attention_heads", "intermediate_size", "num_hidden_layers")
    ]
    return place, "\n".join(kept) + "\n"


def distil(stage, data, teacher, artefact, *more, sized=True):
    flags = flags_of(data, teacher, artefact, *more)
    if not sized:
        place, text = without_sizes(flags)
        artefact.parent.mkdir(parents=True, exist_ok=True)
        (artefact.parent / "recipe.yaml").write_text(text)
        flags[place] = str(artefact.parent / "recipe.yaml")
    call(stage, *flags)
    return json.loads((artefact.parent / "metrics.json").read_text())


def check(metrics, folder, system="student"):
    """What every distillation with a control leaves."""
    assert {"before", "after", "outcome", "control", "sizes", "latency", "machine", "artefacts"} <= set(metrics)
    for side, name in (("before", f"{system}-teacher"), ("after", system)):
        evaluation, document = Evaluation.load(folder / "evaluation" / f"{name}.json")
        assert document["NDCG@10"] == metrics[side]["NDCG@10"]
        assert len(evaluation.targets) == metrics["outcome"]["cases"]
    change = metrics["outcome"]["metrics"]["NDCG@10"]
    assert change["before"] == pytest.approx(metrics["before"]["NDCG@10"])
    assert change["after"] == pytest.approx(metrics["after"]["NDCG@10"])
    alone = metrics["control"]
    assert alone["student outcome"]["systems"] == [f"{system}-control", system]
    assert alone["outcome"]["systems"] == [f"{system}-teacher", f"{system}-control"]
    before = alone["student outcome"]["metrics"]["NDCG@10"]["before"]
    assert before == pytest.approx(alone["evaluation"]["NDCG@10"])
    assert set(metrics["sizes"]) == set(metrics["latency"]) == {"before", "after", "control"}
    assert metrics["sizes"]["after"] == metrics["sizes"]["control"]
    card = (folder / "model_card.md").read_text()
    assert f"{system}-control" in card
    assert "Full ranking of the catalog" in card
    assert str(folder) not in (folder / "artefact" / "llmrec.json").read_text()
    own = card_of(folder / "artefact")
    assert "distillation" in own
    assert "Against the same student by cross\\-entropy alone" in own or "by cross-entropy alone" in own
    assert "a distillation's control" in card_of(folder / "artefact.control").replace("&#x27;", "'")
    recommender = Recommender.from_pretrained(folder / "artefact")
    assert size_of(recommender.model) == metrics["sizes"]["after"]
    assert len(recommender.recommend([recommender.catalog.ids[3], recommender.catalog.ids[4]], k=5)) == 5
    return recommender


def test_a_language_model_teaches_a_smaller_one_and_its_control(stage, data, teacher, tmp_path):
    metrics = distil(stage, data, teacher, tmp_path / "artefact")
    student = check(metrics, tmp_path)
    assert student.model.config.hidden_size == 32
    record = student.settings.training
    assert record["distillation"]["method"] == "logits"
    assert record["distillation"]["teacher"]["parameters"] == metrics["sizes"]["before"]["parameters"]
    assert metrics["after"]["seeds"] == {"training": 0, "teacher": 0, "users": 0}  # each makes another model
    assert metrics["before"]["seeds"]["teacher"] is None
    control = Recommender.from_pretrained(tmp_path / "artefact.control")
    assert control.settings.training["distillation"]["method"] == "cross_entropy"
    logs = [tmp_path / f"artefact.checkpoints{end}" / "log.jsonl" for end in ("", ".control")]
    assert ["distillation/kl" in path.read_text() for path in logs] == [True, False]
    # The same command changes nothing: what had ended takes no step more, and gives the same weights.
    before = load_file(tmp_path / "artefact" / "model.safetensors")
    again = distil(stage, data, teacher, tmp_path / "artefact")
    after = load_file(tmp_path / "artefact" / "model.safetensors")
    assert all((before[name] == after[name]).all() for name in before)
    assert again["after"]["NDCG@10"] == metrics["after"]["NDCG@10"]


def test_hidden_states_teach_fewer_layers(stage, data, teacher, tmp_path):
    more = [*SAME, "--method", "slmrec", "--keep_layers", "0,2", "--learning_rate", "0.0003"]
    metrics = distil(stage, data, teacher, tmp_path / "artefact", *more, sized=False)
    student = check(metrics, tmp_path)
    assert student.model.config.num_hidden_layers == 2
    lines = [json.loads(line) for line in (tmp_path / "artefact.checkpoints" / "log.jsonl").read_text().splitlines()]
    parts = [line for line in lines if "distillation/cosine" in line]
    assert {"distillation/cosine", "distillation/norm", "distillation/multi_signal"} <= set(parts[0])
    # Both began with the teacher's layers: no loss of a model from random weights.
    evaluations = [line["eval_loss"] for line in lines if "eval_loss" in line]
    assert evaluations[0] < 5.0


def test_a_checkpoint_of_another_family_learns_by_codes(stage, data, teacher, tmp_path):
    tokenizer = train_tokenizer(["A customer bought an item"], 280)
    arguments = BackboneArguments(model_type="gpt2", hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    from_scratch(arguments, tokenizer, 256).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    more = ["--student", "gpt2", "--backbone", str(tmp_path / "base")]
    metrics = distil(stage, data, teacher, tmp_path / "run" / "artefact", *more, sized=False)
    student = check(metrics, tmp_path / "run")
    assert student.model.config.model_type == "gpt2"
    own = Recommender.from_pretrained(teacher)
    assert student.catalog.tokens_of(7) != own.catalog.tokens_of(7)
    assert np.array_equal(student.catalog.codes, own.catalog.codes)
    more += ["--softmax_range", "vocabulary"]
    with pytest.raises(RecipeError, match="which both spell"):
        distil(stage, data, teacher, tmp_path / "refused" / "artefact", *more, sized=False)


def test_a_language_model_teaches_a_sasrec(stage, data, teacher, tmp_path):
    more = ["--student", "sasrec", "--soft_items", "8", "--soft_cases", "50", "--dropout", "0.1"]
    metrics = distil(stage, data, teacher, tmp_path / "artefact", *more)
    student = check(metrics, tmp_path)
    assert isinstance(student, SequenceRecommender)
    assert student.catalog.ids == Recommender.from_pretrained(teacher).catalog.ids
    assert student.catalog.title(0) == "Item number 0"
    files = list((tmp_path / "artefact.soft_targets").rglob("*.safetensors"))
    assert len(files) == 1
    assert load_file(files[0])["rows"].shape == (50, 8)


def test_two_processes_share_the_teachers_search(data, teacher, tmp_path):
    artefact = tmp_path / "artefact"
    more = ["--student", "sasrec", "--soft_items", "4", "--dropout", "0.1", "--control", "false"]
    launched = ["--config_file", stage_path("train/accelerate/ddp.yaml").as_posix(), "--main_process_port", "0"]
    script = stage_path("train/distill.py").as_posix()
    argv = [sys.executable, "-m", "accelerate.commands.launch", *launched, script, *flags_of(data, teacher, artefact)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run([*argv, *more], capture_output=True, text=True, env=environment, check=False, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "metrics.json").read_text())["outcome"]["cases"] > 0
    files = sorted((tmp_path / "artefact.soft_targets").rglob("*.safetensors"))
    made = []
    for file in files:
        with safe_open(file, "np") as held:
            made.append(held.metadata()["process"])
    assert made == ["0", "1"]
    # One process alone finds the same.
    call(script_of("distill"), *flags_of(data, teacher, tmp_path / "alone" / "artefact"), *more)
    others = sorted((tmp_path / "alone" / "artefact.soft_targets").rglob("*.safetensors"))
    assert [one.relative_to(tmp_path / "alone") for one in others] == [one.relative_to(tmp_path) for one in files]
    for one, other in zip(files, others, strict=True):
        first, second = load_file(one), load_file(other)
        assert torch.equal(first["rows"], second["rows"])
        torch.testing.assert_close(first["scores"], second["scores"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", ["slmrec", "logits"])
def test_a_sequence_model_teaches_a_smaller_one(stage, data, sequence_teacher, tmp_path, method):
    if method == "slmrec":
        more, sized = [*SAME, "--method", "slmrec"], False
    else:
        more, sized = ["--student", "hstu", "--hidden_size", "8", "--direction", "reverse"], False
    metrics = distil(stage, data, sequence_teacher, tmp_path / "artefact", *more, sized=sized)
    student = check(metrics, tmp_path)
    assert student.model.encoder.config.model_type == ("sasrec" if method == "slmrec" else "hstu")
    assert metrics["sizes"]["after"]["parameters"] < metrics["sizes"]["before"]["parameters"]


@pytest.mark.parametrize(
    ("more", "error", "said"),
    [
        (["--control", "true", "--method", "cross_entropy"], RecipeError, "the control itself"),
        (["--method", "slmrec"], RecipeError, "Say --student same"),
        (["--student", "same"], RecipeError, "--hidden_size is given"),
        (["--keep_layers", "first"], RecipeError, "keeps no layer of the teacher"),
        (["--ks", "1", "5"], RecipeError, "10 or a larger one"),
        (["--test_users", "0"], RecipeError, "told by its test"),
        (["--alpha", "0"], RecipeError, "--method cross_entropy"),
        (["--supervision_points", "2"], RecipeError, "belongs to --method slmrec, and the method is logits"),
        (["--method", "slmrec", "--alpha", "0"], RecipeError, "--alpha belongs to --method logits"),
        (["--method", "cross_entropy", "--soft_items", "5"], RecipeError, "and the method is cross_entropy"),
        (["--student", "sasrec", "--direction", "reverse"], RecipeError, "most probable items alone"),
        (["--student", "no_such_model"], BackboneError, "no_such_model"),
        (["--loss", "bce"], RecipeError, "--loss is for sequence models"),
        (["--windows", "last"], RecipeError, "--windows is for sequence models"),
        (["--student", "sasrec", "--softmax_range", "vocabulary"], RecipeError, "--softmax_range is for language"),
        (["--student", "sasrec", "--batching", "packed"], RecipeError, "--batching is for language"),
        (["--student", "sasrec", "--dtype", "bfloat16"], RecipeError, "--dtype is for language"),
        (["--student", "llama", "--gate", "true"], RecipeError, "--gate is for sequence models"),
        (["--new_tokens_epochs", "1"], RecipeError, "--new_tokens_epochs is of a first stage"),
    ],
    ids=lambda value: "" if isinstance(value, type) else "-".join(value)[:40] if isinstance(value, list) else "said",
)
def test_what_does_not_go_together_is_said_before_anything_is_trained(
    stage, data, teacher, tmp_path, more, error, said
):
    with pytest.raises(error, match=said):
        call(stage, *flags_of(data, teacher, tmp_path / "artefact", *more))
    assert not (tmp_path / "artefact").exists()


@pytest.mark.parametrize("student", ["same", "sasrec"])
def test_students_learn_from_the_users_whom_the_teacher_learnt_from(stage, data, teacher, tmp_path, student):
    taught = Recommender.from_pretrained(teacher)
    taught.settings.training["data"] |= {"train_share": 0.5, "train_share_seed": 1}
    taught.save_pretrained(tmp_path / "teacher")
    names, splits = ColumnArguments(), SplitArguments()
    found = Teacher.read(str(tmp_path / "teacher"), str(data / "log.csv"), names, splits, "cpu")
    lengths = [split.train_ends - split.offsets[:-1] for split in (found.split, found.learnt)]
    assert 2 * (lengths[1] > 0).sum() == (lengths[0] > 0).sum()
    given = DistillArguments(teacher="t", interactions="i", artefact=str(tmp_path / "made"), eval_users=0)
    kind = StudentArguments(student=student, num_hidden_layers=1)
    if student == "same":
        made = IntoLanguage(found, given, kind, FineTuningArguments(output_dir=str(tmp_path), use_cpu=True), None)
        assert made.held.split is found.learnt
    else:
        flags = (ItemArguments(), EventArguments(), LossArguments())
        made = IntoItems(found, given, kind, *flags, FineTuningArguments(output_dir=str(tmp_path), use_cpu=True))
        places = training_places(found.learnt)
        assert made.windows.target_counts().sum() == len(places) < len(training_places(found.split))
        assert made.table.places.tolist() == places.tolist()
        before = made.content_hash
        again = IntoItems(found, given, kind, *flags, FineTuningArguments(output_dir=str(tmp_path), use_cpu=True))
        assert again.content_hash == before
        found.recommender.catalog = copy.deepcopy(found.recommender.catalog)
        vars(found.recommender.catalog).pop("content_hash")  # it is kept, for nothing changes a catalog
        found.recommender.catalog.retired[3] = True
        retired = IntoItems(found, given, kind, *flags, FineTuningArguments(output_dir=str(tmp_path), use_cpu=True))
        assert retired.content_hash != before
        made.features = ItemFeatures(found.split.item_ids, vectors=np.zeros((found.split.num_items, 2)))
        assert made.content_hash != before
    assert made.described()["data"]["eval_users"] == 0  # it chooses the checkpoint, so another makes another student
    assert made.settings({}).split == found.split.content_hash
    assert found.share == {"train_share": 0.5, "train_share_seed": 1}


def test_another_log_and_another_kind_of_teacher_are_refused(stage, data, teacher, sequence_teacher, tmp_path):
    lines = (data / "log.csv").read_text().splitlines()
    (tmp_path / "log.csv").write_text("\n".join(lines[:-1]) + "\n")
    flags = flags_of(data, teacher, tmp_path / "artefact")
    flags[flags.index("--interactions") + 1] = str(tmp_path / "log.csv")
    with pytest.raises(DataError, match="may hold what is held out here"):
        call(stage, *flags)
    with pytest.raises(LLMRecError, match="which knows no tokens"):
        call(stage, *flags_of(data, sequence_teacher, tmp_path / "artefact"))
    soft = ["--student", "sasrec", "--soft_items", "5"]
    with pytest.raises(RecipeError, match="--soft_items is for teachers that are language models"):
        call(stage, *flags_of(data, sequence_teacher, tmp_path / "artefact", *soft))


def test_a_run_that_is_stopped_goes_on(data, teacher, tmp_path):
    artefact = tmp_path / "artefact"
    more = ["--max_steps", "4000", "--eval_strategy", "no", "--save_strategy", "no", "--logging_steps", "1"]
    more += ["--control", "false"]
    command = stage_command("train/distill.py", flags_of(data, teacher, artefact, *more))
    log = tmp_path / "artefact.checkpoints" / "log.jsonl"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    # Without a launcher, which passes no signal on.
    argv = [sys.executable, *command[command.index(next(w for w in command if w.endswith("distill.py"))) :]]
    with subprocess.Popen(argv, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as process:
        deadline = time.monotonic() + 240
        while not log.is_file() or log.read_text().count('"loss"') < 5:
            assert time.monotonic() < deadline
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=240)
    assert process.returncode == 143, said[-2000:]
    assert "the same command continues" in said
    assert not artefact.exists()
    (checkpoint,) = (tmp_path / "artefact.checkpoints").glob("checkpoint-*")
    assert int(checkpoint.name.rpartition("-")[2]) < 4000
