"""What comes of a fine-tuned model on real data: reinforcement learning and distillation, with several seeds.

    python benchmarks/after_sft.py [--data ../shared/data] [--runs runs/from_scratch] [--quick] [--json FILE]

For every data set and seed: semantic IDs and `train/recipes/llama_scratch.yaml` as in benchmarks/from_scratch.py,
whose run folders it shares; then from that model GRPO and S-DPO (`train/rl.py`), and distillation by hidden states, by
the softmax into a smaller Llama, and into a SASRec (`train/distill.py`), each with its control.

What each changed is told as in their own metrics.json, by test case and paired, but over all seeds at once: a case's
value is its mean over the seeds, intervals are over users, and the standard deviation over seeds stands beside them.
Distillations also say what their students' sizes and latencies are, of the first seed.

Runs that --runs already holds are not repeated, so an interrupted run goes on. Cards are written beside the result;
with --ways or --datasets, its name holds what was asked for, and a card's the ways.

--quick: one seed of everything for some steps on the synthetic sample; its numbers only show that all works.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from environment import add_flags, environment, report, result_name
from from_scratch import PASSES, trained
from item_tokenizers import ROOT, check_options, prepared, stage

DATASETS = ("amazon-scientific", "amazon-beauty")
TEACHER = "llama_scratch"
SHOWN = ("NDCG@1", "NDCG@10", "HR@10", "HR@50")


@dataclass(frozen=True)
class Way:
    """One way to train a fine-tuned model further.

    Attributes:
        script: its stage.
        recipe: of train/recipes.
        start: the flag that names the fine-tuned model.
        systems: names of evaluations: before, after; and the control's, if there is one.
    """

    script: str
    recipe: str
    start: str
    systems: tuple[str, ...]


WAYS = {
    "grpo": Way("train/rl.py", "rl_llama", "--start", ("sft", "rl")),
    "sdpo": Way("train/rl.py", "sdpo_llama", "--start", ("sft", "rl")),
    **{
        name: Way(
            "train/distill.py",
            f"distill_{name}",
            "--teacher",
            ("student-teacher", "student", "student-control"),
        )
        for name in ("slmrec", "logits", "sasrec")
    },
}

_EVALUATED = {"eval_strategy": "steps", "eval_steps": "2", "save_strategy": "steps"}
QUICK: dict[str, dict[str, str]] = {
    "rl_llama": {"num_generations": "4", "per_device_train_batch_size": "32"},
    "sdpo_llama": {"negatives": "3", "per_device_train_batch_size": "8"},
    "distill_slmrec": _EVALUATED,
    "distill_logits": _EVALUATED,
    "distill_sasrec": {**_EVALUATED, "eval_users": "50"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="Folder of data sets.")
    parser.add_argument("--runs", type=Path, default=Path("runs/from_scratch"), help="Folder for the run folders.")
    parser.add_argument("--datasets", nargs="+", default=list(DATASETS))
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--seeds", type=int, default=3, help="Of semantic IDs, fine-tuning and what follows.")
    parser.add_argument("--max-cases", type=int, default=8000, help="Training cases of GRPO and S-DPO.")
    parser.add_argument("--soft-cases", type=int, default=0, help="Into a SASRec: cases with soft targets; 0: all.")
    add_flags(parser)
    options = parser.parse_args()
    if options.quick:
        options.datasets, options.seeds, options.max_cases, options.soft_cases = ["sample"], 1, 64, 64
    before = environment()
    found: dict[str, Any] = {}
    ratios: dict[str, float] = {}
    for name in options.datasets:
        runs, items, interactions = prepared(name, options)
        passes = 0.5 if options.quick else PASSES.get(name, 10.0)
        # Seed by seed, so that an interrupted run has whole rows of all ways.
        for seed in range(options.seeds):
            trained(TEACHER, seed, runs, items, interactions, passes, options.quick)
            for way in options.ways:
                train(way, seed, runs, interactions, options)
        found[name] = {
            way: told(way, [runs / f"{way}-{seed}" for seed in range(options.seeds)]) for way in options.ways
        }
        for way, row in found[name].items():
            ndcg = row["outcome"]["metrics"]["NDCG@10"]
            ratios[f"{name}: {way}, NDCG@10 after over before"] = ndcg["after"] / max(ndcg["before"], 1e-9)
        print(card(name, found[name]))
    settings = {key: getattr(options, key) for key in ("seeds", "max_cases", "soft_cases")}
    result = {
        "protocol": "leave-one-out, full ranking of items, every test case; items of the history are excluded",
        "settings": settings,
        "datasets": found,
    }
    others = [f"{name}-{value}" for name, value in settings.items() if value != parser.get_default(name)]
    asked = ([*options.ways, *others], list(WAYS))
    own = result_name("after_sft", asked, (options.datasets, DATASETS))
    report("after_sft", result, ratios, before, options, own)
    if not options.quick:  # a table is for reading
        for name, ways in found.items():
            path = ROOT / "benchmarks" / "results" / f"{result_name('after_sft', asked)}_{name}.md"
            path.write_text(card(name, ways), encoding="utf-8")


def train(name: str, seed: int, runs: Path, interactions: list[str], options: argparse.Namespace) -> None:
    """One run, unless it is there."""
    way, folder = WAYS[name], runs / f"{name}-{seed}"
    flags = ["--config", str(ROOT / f"train/recipes/{way.recipe}.yaml"), *interactions, "--seed", str(seed)]
    flags += [way.start, str(runs / f"{TEACHER}-{seed}" / "artefact")]
    own: dict[str, str] = {}
    if way.script == "train/rl.py":
        own["max_cases"] = str(options.max_cases)
    elif name == "sasrec":
        own["soft_cases"] = str(options.soft_cases)
    if options.quick:
        own |= {"test_users": "100", "eval_users": "50", "max_steps": "4", "save_steps": "2", **QUICK[way.recipe]}
    folder.mkdir(parents=True, exist_ok=True)
    check_options(folder / "options.json", own)
    if (folder / "metrics.json").is_file():
        return
    flags += [word for key, value in own.items() for word in (f"--{key}", value)]
    stage(way.script, [*flags, "--artefact", str(folder / "artefact")])


def told(name: str, folders: Sequence[Path]) -> dict[str, Any]:
    """What a way changed, over all seeds."""
    from llmrec.evaluation.evaluation import Evaluation
    from llmrec.evaluation.outcome import outcome_over_seeds

    systems = WAYS[name].systems
    documents = [json.loads((folder / "metrics.json").read_text(encoding="utf-8")) for folder in folders]
    evaluations = [
        [Evaluation.load(folder / "evaluation" / f"{system}.json")[0] for system in systems] for folder in folders
    ]
    row: dict[str, Any] = {
        "outcome": outcome_over_seeds([(one[0], one[1]) for one in evaluations]),
        "seconds": [(document.get("cost") or {}).get("fit_seconds") for document in documents],
    }
    if len(systems) > 2:
        row["against the control"] = outcome_over_seeds([(one[2], one[1]) for one in evaluations])
        row["sizes"], row["latency"] = documents[0]["sizes"], documents[0]["latency"]
    else:
        row["guard"] = [document["guard"]["sentence"] for document in documents]
        row["returned_to_start"] = [document["guard"]["returned_to_start"] for document in documents]
    return row


def card(dataset: str, ways: dict[str, Any]) -> str:
    """The table of a data set, in Markdown."""
    header = ["way", "against", *SHOWN, "verdict by NDCG@10", "kept"]
    lines = [f"# After fine-tuning: {dataset}", "", "| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for name, row in ways.items():
        kept = "–"
        if "returned_to_start" in row:
            returned = row["returned_to_start"]
            kept = f"the fine-tuned weights in {sum(returned)} of {len(returned)} seeds"
        lines.append(_line(name, "the teacher" if "sizes" in row else "the start", row["outcome"], kept))
        if "against the control" in row:
            lines.append(_line(name, "its control", row["against the control"], kept))
    seeds = next(iter(ways.values()))["outcome"]["seeds"]
    lines += [
        "",
        f"{seeds} seed(s). Before, then after; the difference with its 95 % interval over users, paired, and the "
        "standard deviation of the seeds' differences.",
    ]
    for name, row in ways.items():
        lines += [f"\n{name}, seed {seed}: {said}" for seed, said in enumerate(row.get("guard", []))]
    return "\n".join(lines) + "\n"


def _line(name: str, against: str, document: dict[str, Any], kept: str) -> str:
    cells = []
    for metric in SHOWN:
        found = document["metrics"].get(metric)
        if found is None:
            cells.append("–")
            continue
        low, high = found["difference interval95"]
        deviation = found.get("sd_over_seeds")
        spread = "" if deviation is None else f", ± {deviation:.4f}"
        gap = f"{found['difference']:+.4f} [{low:+.4f}, {high:+.4f}]{spread}"
        cells.append(f"{found['before']:.4f} {found['after']:.4f} ({gap})")
    verdict = f"{document['verdict']} (p {document['metrics'][document['primary']]['p_holm']:.3f})"
    return "| " + " | ".join([name, against, *cells, verdict, kept]) + " |"


if __name__ == "__main__":
    main()
