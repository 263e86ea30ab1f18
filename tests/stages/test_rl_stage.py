"""train/rl.py as a user runs it, on sixty items in a ring and a Llama that has only begun to learn them."""

import importlib.util
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from ring import write_ring
from safetensors.torch import load_file

from llmrec import Recommender
from llmrec.artefact import verify_manifest
from llmrec.catalog_versions import CatalogVersions
from llmrec.evaluation.comparison import compare
from llmrec.evaluation.evaluation import Evaluation
from llmrec.evaluation.outcome import outcome
from llmrec.exceptions import LLMRecError
from llmrec.model_card import card_of
from llmrec.reinforcement import preferences
from llmrec.reinforcement.guard import RLGuard
from llmrec.script import parse
from llmrec.stages import stage_path

pytestmark = pytest.mark.slow


def stage_of(name):
    spec = importlib.util.spec_from_file_location(f"{name}_stage", stage_path(f"train/{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def stage():
    return stage_of("rl")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_ring(tmp_path_factory.mktemp("data"), users=240)


@pytest.fixture(scope="module")
def start(data, tmp_path_factory):
    """Fine-tuned for so few steps that most is left to learn."""
    folder = tmp_path_factory.mktemp("sft") / "artefact"
    sft = stage_of("sft")
    flags = ["--config", "train/recipes/debug.yaml", "--interactions", str(data / "log.csv")]
    flags += [
        "--semantic_ids",
        str(data / "ids"),
        "--artefact",
        str(folder),
        "--max_steps",
        "50",
        "--eval_steps",
        "50",
    ]
    sft.main(*parse(sft.make_parser(), [*flags, "--use_cpu", "true", "--disable_tqdm", "true"]))
    return folder


def flags_of(data, start, folder, *flags):
    required = ["--config", "train/recipes/rl_debug.yaml", "--interactions", str(data / "log.csv")]
    required += ["--start", str(start), "--artefact", str(folder / "artefact")]
    return [*required, "--use_cpu", "true", "--disable_tqdm", "true", "--test_users", "-1", *flags]


def train(stage, data, start, folder, *flags):
    """Runs the stage in this process; what metrics.json then holds."""
    stage.main(*parse(stage.make_parser(), flags_of(data, start, folder, *flags)))
    return json.loads((folder / "metrics.json").read_text())


def weights(folder):
    return load_file(folder / "model.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


LEARNS = ["--learning_rate", "0.002", "--max_steps", "40", "--guard_steps", "10", "--save_steps", "10", "--rewards"]
LEARNS += ["exact", "rank=0.5", "later=0.5", "prefix=0.25", "collaborative=0", "--collaborative", "item-cf"]
LEARNS += ["--num_generations", "8", "--per_device_train_batch_size", "64", "--eval_users", "0", "--max_cases", "0"]


@pytest.fixture(scope="module")
def learnt(stage, data, start, tmp_path_factory):
    """A run that helps, and what it left."""
    folder = tmp_path_factory.mktemp("rl")
    return folder, train(stage, data, start, folder, *LEARNS)


def test_what_helps_is_kept_and_said(learnt, start):
    folder, metrics = learnt
    best = metrics["guard"]["best_step"]
    assert best in (10, 20, 30, 40)
    assert metrics["outcome"]["verdict"] == "helped"
    assert metrics["closing"].startswith("GRPO helped: NDCG@10 +")
    # The artefact is the best checkpoint, whole and of the usual layout.
    verify_manifest(folder / "artefact")
    kept = weights(folder / "artefact")
    assert same(kept, weights(folder / "artefact.checkpoints" / f"checkpoint-{best}"))
    assert not same(kept, weights(start))
    recommender = Recommender.from_pretrained(folder / "artefact")
    assert len({found.item_id for found in recommender.recommend(["item-3"], k=20)}) == 20
    # The slice's figures are of the checkpoint that is kept, by what serves it.
    steps = [one["step"] for one in metrics["guard"]["evaluations"]]
    assert steps == [0, 10, 20, 30, 40][: len(steps)]


def test_the_outcome_is_that_of_the_saved_evaluations(learnt, data):
    folder, metrics = learnt
    before, after = (Evaluation.load(folder / "evaluation" / f"{name}.json") for name in ("sft", "rl"))
    assert outcome(before[0], after[0]) == metrics["outcome"]
    assert (before[1], after[1]) == (
        metrics["before"] | {"ks": before[1]["ks"]},
        metrics["after"] | {"ks": after[1]["ks"]},
    )
    assert after[1]["invalid_rate"] == after[1]["duplicate_rate"] == 0.0
    assert len(before[0].targets) == 240
    card = compare([folder], reference="sft")
    assert [system["name"] for system in card["systems"]] == ["rl", "sft"]
    found = card["systems"][0]["metrics"]["NDCG@10"]
    assert found["difference"] == pytest.approx(metrics["outcome"]["metrics"]["NDCG@10"]["difference"])
    # "Before" is what serving the start gives.
    assert before[1]["settings"]["training"]["trainer"]["max_steps"] == 50


def test_scored_anew_both_have_the_same_figures(learnt, start, data, tmp_path):
    folder, metrics = learnt
    score = stage_of("score")
    for side, artefact in (("before", start), ("after", folder / "artefact")):
        out = tmp_path / side / "score.json"
        flags = ["--artefact", str(artefact), "--interactions", str(data / "log.csv"), "--out", str(out)]
        score.main(*parse(score.make_parser(), [*flags, "--ks", "1", "5", "10", "20", "50"]))
        found = json.loads(out.read_text())["systems"]["llmrec"]
        numbers = {name for name, value in metrics[side].items() if isinstance(value, float)}
        assert {"HR@50", "NDCG@10", "coverage@10"} <= numbers
        assert {name: found[name] for name in numbers} == {name: metrics[side][name] for name in numbers}
        assert found["seeds"] == metrics[side]["seeds"]
    assert metrics["before"]["seeds"] == {"training": 0, "users": 0}
    assert metrics["after"]["seeds"] == {"training": 0, "further": [0], "users": 0}


def test_the_course_is_written_down(learnt):
    folder, metrics = learnt
    (first, *_, last) = metrics["course"]
    assert first["step"] == 1
    assert {"reward", "kl", "entropy", "groups_without_signal", "loss", "grad_norm"} <= set(last)
    for name in ("exact", "rank", "later", "prefix", "collaborative"):  # the one of weight 0 is logged, too
        assert f"rewards/{name}/mean" in last
    weighted = {"exact": 1.0, "rank": 0.5, "later": 0.5, "prefix": 0.25, "collaborative": 0.0}
    total = sum(weight * last[f"rewards/{name}/mean"] for name, weight in weighted.items())
    assert last["reward"] == pytest.approx(total, abs=1e-5)
    assert last["reward"] > first["reward"]
    page = (folder / "rl.html").read_text()
    for heading in ("Before and after", "Rewards", "Entropy and KL", "Groups without signal", "Recall against"):
        assert heading in page
    assert "GRPO helped" in page
    assert not re.search(r"(src|href)=[\"']https?:", page)


def test_the_card_says_what_was_done_and_whether_it_helped(learnt, start):
    folder, metrics = learnt
    (entry,) = json.loads((folder / "artefact" / "llmrec.json").read_text())["training"]["further"]
    assert entry["outcome"] == metrics["outcome"]
    card = card_of(folder / "artefact")
    assert "## After that: GRPO" in card
    assert "It began with sft, whose weights" in card
    assert "| NDCG@10 |" in card
    assert "GRPO helped: NDCG@10" in card
    assert str(folder) not in card
    assert str(start) not in card
    # What SFT recorded is still there.
    assert json.loads((folder / "artefact" / "llmrec.json").read_text())["training"]["trainer"]["max_steps"] == 50


def test_a_training_that_had_ended_takes_no_step_more(stage, data, start, learnt, tmp_path, monkeypatch):
    folder, metrics = learnt
    shutil.copytree(folder, tmp_path / "rl")
    shutil.rmtree(tmp_path / "rl" / "artefact")  # as after a kill while it was written
    monkeypatch.setattr(RLGuard, "on_train_begin", lambda *_, **__: pytest.fail("it trains"))
    again = train(stage, data, start, tmp_path / "rl", *LEARNS)
    assert same(weights(tmp_path / "rl" / "artefact"), weights(folder / "artefact"))
    assert again["outcome"] == metrics["outcome"]
    assert again["guard"] == metrics["guard"]


def test_what_harms_is_stopped_and_the_sft_weights_come_back(stage, data, start, tmp_path, caplog):
    harm = [
        "--rewards",
        "diversity",
        "--learning_rate",
        "0.05",
        "--max_steps",
        "60",
        "--beta",
        "0",
        "--eval_users",
        "0",
    ]
    with caplog.at_level(logging.INFO, "llmrec"):
        metrics = train(stage, data, start, tmp_path, *harm, "--guard_steps", "5", "--guard_patience", "2")
    assert metrics["guard"]["returned_to_start"]
    assert metrics["guard"]["stopped"]
    assert metrics["guard"]["evaluations"][-1]["step"] < 60
    assert same(weights(tmp_path / "artefact"), weights(start))
    assert (tmp_path / "artefact" / "model.safetensors").read_bytes() == (start / "model.safetensors").read_bytes()
    assert metrics["outcome"]["verdict"] == "no difference"
    assert {found["difference"] for found in metrics["outcome"]["metrics"].values()} == {0.0}
    said = "GRPO did not help: no checkpoint was better on the validation slice than the SFT model"
    for place in (caplog.text, metrics["closing"], card_of(tmp_path / "artefact"), (tmp_path / "rl.html").read_text()):
        assert said in place
    assert "the guard stops the training at step" in caplog.text
    assert {path.stem for path in (tmp_path / "evaluation").glob("*.json")} == {"sft", "rl"}
    assert metrics["after"]["system"] == "rl"


SHORT = ["--max_steps", "8", "--guard_steps", "2", "--save_steps", "2", "--save_total_limit", "9"]
SHORT += ["--guard_patience", "0"]
GRPO = [*SHORT, "--num_iterations", "2", "--rewards", "exact", "rank", "prefix=0.5", "diversity=0.1"]
SDPO = [*SHORT, "--method", "sdpo", "--negatives", "3", "--per_device_train_batch_size", "8"]


WEIGHTED = [*GRPO, "--rollouts", "sampled", "--group_weights", "policy", "--rewards", "exact", "prefix=0.5"]


@pytest.mark.parametrize("flags", [GRPO, WEIGHTED, SDPO], ids=["beams", "sampled", "sdpo"])
def test_an_interrupted_run_ends_in_the_same_weights(stage, data, start, tmp_path, monkeypatch, flags):
    flags = [*flags, "--learning_rate", "0.001", "--test_users", "20"]
    whole = train(stage, data, start, tmp_path / "whole", *flags)
    evaluate = RLGuard._evaluate
    at = []

    def torn(self, model, args, state, control):
        at.append(state.global_step)
        if state.global_step == 4 and at.count(4) == 1:
            raise KeyError("as a crash would be")
        evaluate(self, model, args, state, control)

    monkeypatch.setattr(RLGuard, "_evaluate", torn)
    with pytest.raises(KeyError):
        train(stage, data, start, tmp_path / "torn", *flags)
    assert not (tmp_path / "torn" / "artefact").exists()
    kept = {file: file.stat().st_mtime_ns for file in (tmp_path / "torn").glob("artefact.negatives/*/*")}
    assert bool(kept) == ("sdpo" in flags)
    monkeypatch.setattr(preferences, "hard_negatives", lambda *_, **__: pytest.fail("negatives are searched again"))
    continued = train(stage, data, start, tmp_path / "torn", *flags)
    assert at == [2, 4, 4, 6, 8]  # step 2 was not judged again
    assert kept == {file: file.stat().st_mtime_ns for file in (tmp_path / "torn").glob("artefact.negatives/*/*")}
    assert continued["guard"] == whole["guard"]
    last = "artefact.checkpoints/checkpoint-8"
    assert same(weights(tmp_path / "torn" / last), weights(tmp_path / "whole" / last))
    assert same(weights(tmp_path / "torn" / "artefact"), weights(tmp_path / "whole" / "artefact"))
    assert [row["step"] for row in continued["course"]] == list(range(1, 9))


def test_a_signal_stops_it_between_steps_and_it_goes_on(stage, data, start, tmp_path, monkeypatch):
    evaluate = RLGuard._evaluate
    sent = []

    def told(self, model, args, state, control):
        evaluate(self, model, args, state, control)
        if not sent:
            sent.append(state.global_step)
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(RLGuard, "_evaluate", told)
    with pytest.raises(SystemExit) as caught:
        train(stage, data, start, tmp_path, *GRPO)
    assert caught.value.code == 128 + signal.SIGTERM
    assert not (tmp_path / "artefact").exists()
    metrics = train(stage, data, start, tmp_path, *GRPO)
    assert [one["step"] for one in metrics["guard"]["evaluations"]] == [0, 2, 4, 6, 8]
    # Another reward is another run, which begins anew, and so are rewards that are joined otherwise.
    other = train(stage, data, start, tmp_path, *GRPO, "--rewards", "exact")
    assert other["training"]["data"]["rewards"] == ["exact"]
    ended = other["course"]
    joined = [*GRPO, "--multi_objective_aggregation", "normalize_then_sum", "--adam_beta2", "0.95"]
    other = train(stage, data, start, tmp_path, *joined)
    assert other["training"]["trainer"]["multi_objective_aggregation"] == "normalize_then_sum"
    assert other["training"]["trainer"]["adam_beta2"] == 0.95
    assert other["cost"]["fit_seconds"] > 0
    assert other["course"] != ended


@pytest.mark.parametrize(
    ("method", "flags"),
    [
        ("S-DPO", ["--method", "sdpo", "--negatives", "5"]),
        ("S-DPO", ["--method", "sdpo", "--negatives", "5", "--negative_source", "uniform"]),
        ("DPO", ["--method", "dpo", "--rollouts", "sampled"]),
    ],
    ids=["hard", "uniform", "dpo"],
)
def test_preferences_help_as_well(stage, data, start, tmp_path, method, flags):
    learns = [
        "--learning_rate",
        "0.002",
        "--max_steps",
        "40",
        "--guard_steps",
        "20",
        "--per_device_train_batch_size",
        "32",
    ]
    metrics = train(stage, data, start, tmp_path, *flags, *learns, "--max_cases", "0", "--eval_users", "0")
    assert metrics["method"] == method
    assert metrics["outcome"]["verdict"] == "helped"
    assert {"rewards/chosen", "rewards/margins", "rewards/accuracies", "kl"} <= set(metrics["course"][-1])
    assert f"## After that: {method}" in card_of(tmp_path / "artefact")
    assert f"{method} helped" in (tmp_path / "rl.html").read_text()


@pytest.mark.parametrize("method", ["dr_grpo", "gspo"])
def test_the_kin_of_grpo_by_an_adapter_that_is_merged(stage, data, start, tmp_path, method):
    flags = [*LEARNS, "--method", method, "--adapter", "lora", "--lora_rank", "8", "--learning_rate", "0.01"]
    flags += ["--beta", "0.01", "--max_steps", "30"]
    metrics = train(stage, data, start, tmp_path, *flags)
    assert metrics["guard"]["best_step"] is not None
    kept = weights(tmp_path / "artefact")
    assert kept.keys() == weights(start).keys()
    assert not same(kept, weights(start))
    trained = metrics["training"]["trainer"]
    expected = ("dr_grpo", "token", "none") if method == "dr_grpo" else ("grpo", "sequence", "group")
    assert (trained["loss_type"], trained["importance_sampling_level"], trained["scale_rewards"]) == expected
    # What was merged ranks as the guard saw the adapter rank, on the slice.
    best = next(one for one in metrics["guard"]["evaluations"] if one["step"] == metrics["guard"]["best_step"])
    assert best["metrics"]["NDCG@10"]["policy"] > best["metrics"]["NDCG@10"]["sft"]


def test_beams_are_counted_as_they_were(stage, data, start, tmp_path):
    # Lists of 50 items need 50 beams, whatever was asked for.
    metrics = train(stage, data, start, tmp_path, "--num_beams", "10", "--max_steps", "1", "--test_users", "3")
    assert metrics["before"]["settings"]["num_beams"] == metrics["training"]["data"]["num_beams"] == 50


def test_without_a_test_nothing_is_claimed(stage, data, start, tmp_path):
    metrics = train(stage, data, start, tmp_path, *LEARNS, "--max_steps", "10", "--test_users", "0")
    assert (metrics["before"], metrics["after"], metrics["outcome"]) == (None, None, None)
    assert metrics["closing"].startswith("Whether GRPO helped is not known")
    assert not (tmp_path / "evaluation").exists()
    assert "before and after were not evaluated" in card_of(tmp_path / "artefact")


def test_rollouts_by_vllm_are_those_by_transformers(stage, data, start, tmp_path):
    pytest.importorskip("vllm")
    flags = ["--max_steps", "2", "--test_users", "0", "--rewards", "exact", "rank", "prefix=0.5", "--beta", "0.1"]
    # Of its own process, which the engine fills with its variables and threads.
    own = flags_of(data, start, tmp_path / "vllm", *flags, "--backend", "vllm")
    done = subprocess.run([sys.executable, "train/rl.py", *own], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "supports vLLM versions" not in done.stderr  # TRL's, of parts that are not used
    theirs = json.loads((tmp_path / "vllm" / "metrics.json").read_text())["course"]
    ours = train(stage, data, start, tmp_path / "transformers", *flags)["course"]
    for one, other in zip(theirs, ours, strict=True):
        for name in ("reward", "rewards/prefix/mean", "kl", "entropy", "grad_norm"):
            assert one[name] == pytest.approx(other[name], rel=1e-3, abs=1e-5), name


def test_two_processes_stop_after_the_same_step(data, start, tmp_path):
    # Behind "--", or torchrun takes --start for the beginning of a flag of its own.
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--", "train/rl.py"]
    flags = ["--ddp_backend", "gloo", "--rewards", "diversity", "--learning_rate", "0.05", "--beta", "0"]
    flags += ["--max_steps", "40", "--guard_steps", "4", "--guard_patience", "2", "--per_device_train_batch_size", "8"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [*launch, *flags_of(data, start, tmp_path, *flags)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["guard"]["stopped"]
    assert metrics["cost"]["steps"] == metrics["guard"]["evaluations"][-1]["step"] < 40
    assert same(weights(tmp_path / "artefact"), weights(start))


@pytest.fixture(scope="module")
def strange(data, start, tmp_path_factory):
    """Things that are no start, no log, and no place for a result."""
    folder = tmp_path_factory.mktemp("strange")
    lines = (data / "log.csv").read_text().splitlines()
    (folder / "shorter.csv").write_text("\n".join(lines[:-1]) + "\n")
    shutil.copytree(start, folder / "grown")
    CatalogVersions(folder / "grown" / "catalog").add(
        [{"item_id": "new", "title": "New"}], torch.tensor([[3, 3, 3]]).numpy()
    )
    shutil.copytree(start, folder / "torn")
    (folder / "torn" / "model.safetensors").write_bytes(b"torn")
    shutil.copytree(start, folder / "sequence")
    config = json.loads((start / "config.json").read_text()) | {"model_type": "llmrec_sequence"}
    (folder / "sequence" / "config.json").write_text(json.dumps(config))
    from llmrec.artefact import write_manifest

    write_manifest(folder / "sequence")
    (folder / "mine" / "artefact").mkdir(parents=True)
    (folder / "mine" / "artefact" / "thesis.tex").write_text("")
    (folder / "taken").mkdir()
    (folder / "taken" / "metrics.json").write_text(json.dumps({"system": "hstu"}))
    return folder


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--rewards", "exakt"], "There is no reward 'exakt'"),
        (["--rewards", "exact=0"], "No reward has a weight above 0"),
        (["--rewards", "semantic"], "needs --embeddings"),
        (["--rewards", "collaborative", "--collaborative", "nowhere"], "nowhere is no folder"),
        (["--embeddings", "runs"], "no reward 'semantic' reads it"),
        (["--rewards", "semantic", "--embeddings", "{strange}/mine"], "mine"),
        (["--per_device_train_batch_size", "6"], "divisible by num_generations"),
        (["--num_generations", "59", "--per_device_train_batch_size", "59"], "items to propose, and a group has 59"),
        (["--max_cases", "2"], "A step asks 4 cases, and there are 2"),
        (["--temperature", "0.7"], "Draws have a temperature of their own"),
        (["--rollout_temperature", "0.7"], "beams have none"),
        (["--rollouts", "sampled", "--rollout_temperature", "0"], "rollout_temperature is 0"),
        (["--group_weights", "policy", "--method", "sdpo"], "S-DPO has preferences, not groups"),
        (
            ["--group_weights", "policy", "--rollouts", "sampled", "--backend", "vllm"],
            "does not say how likely its draws were",
        ),
        (["--group_weights", "policy", "--rollouts", "sampled"], "the reward 'rank' of a drawn item depends"),
        (
            ["--group_weights", "policy", "--multi_objective_aggregation", "normalize_then_sum"],
            "Say group or none, and sum_then_normalize",
        ),
        (["--loss_type", "dr_grpo"], "--method grpo"),
        (["--use_vllm", "true"], "Say --backend vllm"),
        (["--reward_weights", "1", "0.5"], "--reward_weights is [1.0, 0.5], and nothing here reads it. Say --rewards"),
        (["--top_p", "0.9"], "--top_p is 0.9, and nothing here reads it"),
        (["--method", "sdpo", "--max_completion_length", "8"], "--max_completion_length is 8, and nothing"),
        (["--method", "sdpo", "--epsilon", "0.3"], "--epsilon is 0.3, and nothing here reads it. It belongs to"),
        (["--method", "dpo", "--temperature", "0.5"], "--temperature is 0.5, and nothing here reads it"),
        (["--vllm_max_model_length", "64"], "nothing here reads it. Say --backend vllm"),
        (["--entropy_coef_max", "0.5"], "nothing here reads it. The entropy's weight is entropy_coef"),
        (["--negatives", "7"], "--negatives 7 belongs to --method dpo or sdpo"),
        (["--negative_source", "uniform"], "--negative-source uniform belongs to --method dpo or sdpo"),
        (["--later_items", "5"], "no reward 'later' reads it"),
        (["--use_liger_kernel", "true"], "use_liger_kernel is true"),
        (["--use_adaptive_entropy", "true"], "Its weight is in no checkpoint"),
        (["--save_strategy", "best"], "the guard's business"),
        (["--method", "sdpo", "--backend", "vllm"], "makes no rollouts while it trains"),
        (["--method", "dpo", "--negatives", "4"], "Say --method sdpo"),
        (["--method", "sdpo", "--negatives", "58"], "items to propose"),
        (["--method", "dpo", "--later_items", "5"], "--later-items 5 belongs to --method grpo or dr_grpo or gspo"),
        (["--method", "sdpo", "--collaborative", "item-cf"], "--collaborative item-cf belongs to --method grpo"),
        (
            ["--method", "sdpo", "--negative_source", "uniform", "--rollouts", "sampled"],
            "belongs to --negative_source",
        ),
        (["--method", "sdpo", "--beta", "0"], "beta is 0, with which the loss of --method sdpo is constant"),
        (["--lora_rank", "4"], "--lora-rank 4 belongs to --adapter lora or dora or rslora"),
        (["--rewards", "semantic", "--embeddings", "item-cf"], "--embeddings item-cf is no folder"),
        (["--eval_strategy", "steps"], "the guard evaluates"),
        (["--load_best_model_at_end", "true", "--save_strategy", "no"], "the guard's business"),
        (["--beta", "-1"], "beta is -1"),
        (["--max_kl", "0"], "max_kl is 0"),
        (["--guard_steps", "0"], "look every 0"),
        (["--recall_tolerance", "2"], "recall_tolerance is 2"),
        (["--later_items", "0"], "--later-items is 0"),
        (["--dtype", "bfloat16"], "--adapter lora"),
        (["--system", "sft"], "Give --system another name"),
        (["--system", "a/b"], "cannot name a file"),
        (["--start", "/nowhere/at/all"], "/nowhere/at/all"),
        (["--start", "{strange}/torn"], "model.safetensors"),
        (["--start", "{strange}/grown"], "Roll it back"),
        (["--start", "{strange}/sequence"], "a sequence model"),
        (["--interactions", "{strange}/shorter.csv"], "may hold what is held out here"),
        (["--split", "global-temporal"], "was trained on"),
        (["--artefact", "{start}"], "would replace what training begins with"),
        (["--artefact", "{strange}/mine/artefact"], "holds something else"),
        (["--artefact", "{strange}/taken/artefact"], "metrics.json is of hstu"),
        (["--min_case_history", "40"], "No training interaction has 40"),
        (["--rewrads", "exact"], "Did you mean --rewards?"),
    ],
    ids=lambda value: " ".join(value).replace("{", "").replace("}", "") if isinstance(value, list) else "",
)
def test_mistakes_are_named_before_a_weight_is_loaded(data, start, strange, stage, tmp_path, monkeypatch, flags, said):
    monkeypatch.setattr(stage, "policy", lambda *_: pytest.fail("a model is loaded"))
    given = [flag.format(strange=strange, start=start) for flag in flags]
    with pytest.raises(LLMRecError) as caught:
        stage.main(*parse(stage.make_parser(), flags_of(data, start, tmp_path, *given)))
    assert said in str(caught.value)
    assert not (tmp_path / "artefact").exists()
