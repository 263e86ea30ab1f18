"""What latent reasoning is worth and costs on real data: 0 to 3 steps of three kinds behind a SASRec, several seeds.

    python benchmarks/reasoning.py [--data ../shared/data] [--runs runs/reasoning] [--quick] [--json FILE]

For every data set train/recipes/study_reasoning.yaml: the SASRec without a step, and ReaRec's two kinds and OnePiece's
blocks with 1, 2 and 3, every seed each; all against none, paired by test case. Then `llmrec reasoning` of the models
with the most steps: what each of their own steps is worth, the oracle's step, and the time to an answer; means over
the seeds, latencies of the first.

Runs that --runs already holds are not repeated, so an interrupted run goes on. Cards are written beside the result;
with --kinds or --datasets, its name holds what was asked for, and a card's the kinds.

--quick: one kind, one step, some trainings' steps on the synthetic sample; its numbers only show that all works.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from environment import add_flags, environment, report, result_name
from item_tokenizers import ROOT, folder_of, stage

RECIPE = "train/recipes/study_reasoning.yaml"
DATASETS = ("amazon-scientific", "amazon-beauty")
KINDS = ("erl", "prl", "block")
MOST = 3  # steps of the recipe's variants
SHOWN = ("NDCG@10", "HR@10")
QUICK = (
    *("max_steps=4", "eval_strategy=steps", "eval_steps=2", "save_strategy=steps", "save_steps=2"),
    *("hidden_size=16", "eval_users=50", "logging_steps=2", "early_stopping=0"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="Folder of data sets.")
    parser.add_argument("--runs", type=Path, default=Path("runs/reasoning"), help="Folder for the run folders.")
    parser.add_argument("--datasets", nargs="+", default=list(DATASETS))
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--seeds", type=int, default=3, help="Of every variant.")
    parser.add_argument("--override", nargs="*", default=[], help="NAME=VALUE flags of all trainings.")
    add_flags(parser)
    options = parser.parse_args()
    most = 1 if options.quick else MOST
    if options.quick:
        options.datasets, options.kinds, options.seeds = ["sample"], ["erl"], 1
        options.override = list(QUICK)
    # The commands below run elsewhere.
    options.data, options.runs = options.data.resolve(), options.runs.resolve()
    before = environment()
    found: dict[str, Any] = {}
    ratios: dict[str, float] = {}
    for name in options.datasets:
        log, runs = next(folder_of(name, options).glob("interactions.*")), options.runs / name
        study = studied(log, runs, options, most)
        steps = {kind: thought(f"{kind}-{most}", study, log, runs) for kind in options.kinds}
        found[name] = {"study": study, "steps": steps}
        for cell, one in study["differences"]["cells"].items():
            ndcg = one["metrics"]["NDCG@10"]
            ratios[f"{name}: {cell} over none, NDCG@10"] = ndcg["after"] / max(ndcg["before"], 1e-9)
        for kind, one in steps.items():
            ratios[f"{name}: {kind}, milliseconds after {most} steps over none"] = one["latency"]["ratio"][-1]
        print(card(name, found[name], (runs / "table.md").read_text(encoding="utf-8")))
    settings = {"seeds": options.seeds, "override": options.override}
    others = [f"seeds-{options.seeds}"] if options.seeds != parser.get_default("seeds") else []
    asked = ([*options.kinds, *others, *(one.replace("/", "-") for one in options.override)], KINDS)
    own = result_name("reasoning", asked, (options.datasets, DATASETS))
    report("reasoning", {"settings": settings, "datasets": found}, ratios, before, options, own)
    if not options.quick:  # a table is for reading
        for name, one in found.items():
            table = (options.runs / name / "table.md").read_text(encoding="utf-8")
            path = ROOT / "benchmarks" / "results" / f"{result_name('reasoning', asked)}_{name}.md"
            path.write_text(card(name, one, table), encoding="utf-8")


def studied(log: Path, runs: Path, options: argparse.Namespace, most: int) -> dict[str, Any]:
    """The study's document, without what names this machine's files."""
    chosen = ["none", *(f"{kind}-{steps}" for kind in options.kinds for steps in range(1, most + 1))]
    flags = ["--config", str(ROOT / RECIPE), "--interactions", str(log)]
    flags += ["--seeds", *map(str, range(options.seeds)), "--only", *chosen]
    flags += ["--override", *options.override] if options.override else []
    stage("train/study.py", [*flags, "--runs", str(runs)])
    document: dict[str, Any] = json.loads((runs / "results.json").read_text(encoding="utf-8"))
    asked = [run for run in document["runs"] if run["cell"] in chosen]
    left = [f"{run['cell']}, seed {run['seed']}" for run in asked if run["state"] != "done"]
    if left:
        sys.exit(f"{len(left)} runs of the study are not done, such as {left[0]}. See its log in {runs}.")
    for run in document["runs"]:
        run["flags"].pop("interactions")
        run.pop("validation", None)  # their courses are on the study's page
    return document


def thought(cell: str, study: Mapping[str, Any], log: Path, runs: Path) -> dict[str, Any]:
    """What each step of the trained models of a cell is worth, as means over its seeds, and what it costs."""
    reports = []
    for run in study["runs"]:
        if run["cell"] == cell:
            folder = runs / run["folder"]
            path = folder / "reasoning.json"
            if not path.is_file() or path.stat().st_mtime < (folder / "metrics.json").stat().st_mtime:
                command = [sys.executable, "-m", "llmrec.cli.main", "reasoning", str(folder / "artefact")]
                subprocess.run([*command, "--interactions", str(log), "--json", str(path)], check=True, cwd=ROOT)
            reports.append(json.loads(path.read_text(encoding="utf-8")))
    first = reports[0]
    return {
        "cell": cell,
        "seeds": len(reports),
        "by_step": [
            {name: mean([one["by_step"][step][name] for one in reports]) for name in SHOWN}
            for step in range(len(first["by_step"]))
        ],
        "oracle": {name: mean([one["oracle"][name] for one in reports]) for name in SHOWN},
        "slices": {
            name: mean([one["slices"][name]["NDCG@10"] for one in reports])
            for name in first["slices"]
            if all(name in one["slices"] for one in reports)
        },
        "over_thinking": [
            f"seed {seed}: {part['sentence']}"
            for seed, one in enumerate(reports)
            for part in one["slices"].values()
            if part["over_thinking"] is not None
        ],
        "latency": first["latency"]["batches"][0] | {"device": first["latency"]["device"]},
        "reports": reports,
    }


def mean(values: Sequence[Any]) -> Any:
    """Over the first axis, as plain numbers."""
    return np.mean(np.array(values, dtype=np.float64), axis=0).tolist()


def card(dataset: str, found: Mapping[str, Any], table: str) -> str:
    """The study's own table, and below it what each step of the models with the most is worth and costs."""
    lines = [f"# Latent reasoning: {dataset}", "", *table.splitlines()[2:], "", "## Step by step", ""]
    header = ["model", "after", *SHOWN, "milliseconds", "times none"]
    lines += ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for kind in found["steps"].values():
        latency = kind["latency"]
        for step, row in enumerate(kind["by_step"]):
            cost = [f"{latency['milliseconds'][step]:.2f}", f"{latency['ratio'][step]:.2f}"]
            lines.append(_row(kind["cell"], f"step {step}", row, cost))
        lines.append(_row(kind["cell"], "each case's best step", kind["oracle"], ["–", "–"]))
    seeds = next(iter(found["steps"].values()))["seeds"]
    lines += [
        "",
        f"Means over {seeds} seed(s); one history at once, medians of the first seed. Step 0 of a model that was "
        "trained to think is no model without thought. Each case's best step is chosen by looking at the answer: a "
        "ceiling that chance raises too, and that nothing can serve.",
    ]
    said = [f"{kind['cell']}, {text}" for kind in found["steps"].values() for text in kind["over_thinking"]]
    lines += ["", *(f"- {text}" for text in said)] if said else ["", "No over-thinking can be told in any slice."]
    slices = {name for kind in found["steps"].values() for name in kind["slices"]}
    lines += ["", "NDCG@10 after 0, 1, … steps, by slice:", ""]
    for kind in found["steps"].values():
        for name in sorted(slices & kind["slices"].keys()):
            lines.append(f"- {kind['cell']}, {name}: {', '.join(f'{one:.4f}' for one in kind['slices'][name])}")
    return "\n".join(lines) + "\n"


def _row(cell: str, after: str, metrics: Mapping[str, float], cost: Sequence[str]) -> str:
    return "| " + " | ".join([cell, after, *(f"{metrics[name]:.4f}" for name in SHOWN), *cost]) + " |"


if __name__ == "__main__":
    main()
