"""What the two from-scratch recipes reach on real data with a fixed CPU budget, beside tuned baselines.

    python benchmarks/from_scratch.py [--data ../shared/data] [--runs runs/from_scratch] [--quick] [--json FILE]

For every data set, recipe (`llama_scratch`, `gpt2_scratch`) and seed the stages run as a user would run them:
`semantic_ids/build.py` (residual k-means on normalised residuals of text and co-occurrence), `train/sft.py` with the
recipe for a fixed number of passes, `train/score.py` on every test case. Then `llmrec compare` puts the runs beside
`llmrec baseline` of the same split: item-CF and EASE as they are, and the Markov chain, tuned on validation cases.

The budget is passes over the training rows, not minutes, so that it is the same on every machine; what a pass took
here is in the result. Text embeddings and semantic IDs are made once a data set and seed, and are not in it.

Runs that --runs already holds are not repeated, so an interrupted run goes on. Intervals are the evaluation's own,
bootstrap over users; with --seeds of three or more the mean over seeds has Student's interval beside it.

--quick: one recipe and a short training on the synthetic sample; its numbers only show that all works.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from environment import add_flags, environment, report
from item_tokenizers import METRICS, ROOT, check_options, over_seeds, prepared, stage

RECIPES = ("llama_scratch", "gpt2_scratch")
PASSES = {"amazon-scientific": 8.0, "amazon-beauty": 6.0, "sample": 1.0}
BASELINES = {"item-cf": [], "ease": [], "markov": ["--tune"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="Folder of data sets.")
    parser.add_argument("--runs", type=Path, default=Path("runs/from_scratch"), help="Folder for the run folders.")
    parser.add_argument("--datasets", nargs="+", default=["amazon-scientific", "amazon-beauty"])
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--seeds", type=int, default=1, help="Of semantic IDs and training: 0, 1, …")
    parser.add_argument("--epochs", type=float, help="Passes over the training rows; default: by data set.")
    add_flags(parser)
    options = parser.parse_args()
    if options.quick:
        options.datasets, options.recipes, options.seeds, options.epochs = ["sample"], ["llama_scratch"], 1, 0.5
    before = environment()
    found: dict[str, Any] = {}
    ratios: dict[str, float] = {}
    for name in options.datasets:
        runs, items, interactions = prepared(name, options)
        epochs = options.epochs or PASSES.get(name, 10.0)
        rows: dict[str, Any] = {}
        for recipe in options.recipes:
            scores = [
                trained(recipe, seed, runs, items, interactions, epochs, options.quick)
                for seed in range(options.seeds)
            ]
            rows[recipe] = {metric: over_seeds([one[metric] for one in scores]) for metric in METRICS}
            rows[recipe] |= {"passes": epochs, "runs": scores}
        for baseline in BASELINES:
            rows[baseline] = ranked(baseline, runs, [*items, *interactions])
        folders = [runs / f"{recipe}-{seed}" for recipe in options.recipes for seed in range(options.seeds)]
        compared([*folders[:: options.seeds], *(runs / baseline for baseline in BASELINES)], runs / "card")
        best = max(rows[baseline]["NDCG@10"] for baseline in BASELINES)
        for recipe in options.recipes:
            ratios[f"{name}: {recipe} over the best baseline, NDCG@10"] = rows[recipe]["NDCG@10"]["mean"] / best
        # Without the place of the run folders, which are no one else's.
        card = (runs / "card" / "card.md").read_text(encoding="utf-8").replace(f"{runs}/", "")
        found[name] = {"systems": rows, "card": card}
        print(card)
    result = {
        "protocol": "leave-one-out, full ranking of items, every test case; items of the history are excluded",
        "datasets": found,
    }
    report("from_scratch", result, ratios, before, options)
    if not options.quick:  # a table is for reading
        for name, one in found.items():
            (ROOT / "benchmarks" / "results" / f"from_scratch_{name}.md").write_text(one["card"], encoding="utf-8")


def trained(
    recipe: str, seed: int, runs: Path, items: list[str], interactions: list[str], epochs: float, quick: bool
) -> dict[str, Any]:
    """The test metrics of one model, and its cost."""
    ids, folder = runs / f"ids-{seed}", runs / f"{recipe}-{seed}"
    if not (ids / "semantic_ids.json").is_file():
        config = ["--config", str(ROOT / "semantic_ids/recipes/rkmeans_3x256.yaml"), "--normalise_residuals", "True"]
        built = [*config, *items, *interactions, "--embeddings", str(runs / "embeddings"), "--seed", str(seed)]
        stage("semantic_ids/build.py", [*built, "--out", str(ids)])
    result = folder / "evaluation.json"
    check_options(folder / "options.json", {"epochs": epochs})
    if not result.is_file():
        training = ["--config", str(ROOT / f"train/recipes/{recipe}.yaml"), *interactions, "--seed", str(seed)]
        training += ["--semantic_ids", str(ids), "--artefact", str(folder / "artefact")]
        training += ["--output_dir", str(folder / "training"), "--num_train_epochs", f"{epochs:g}"]
        stage("train/sft.py", training)
        scoring = ["--artefact", str(folder / "artefact"), *interactions, "--out", str(result)]
        stage("train/score.py", [*scoring, *(["--max_users", "200"] if quick else [])])
    document = json.loads(result.read_text(encoding="utf-8"))
    own = document["systems"]["llmrec"]
    evaluations = json.loads((folder / "artefact" / "llmrec.json").read_text())["training"]["evaluations"]
    return {
        "seed": seed,
        **{key: own[key] for metric in METRICS for key in (metric, f"{metric} interval95")},
        "later_day NDCG@10": own["slices"].get("later_day", {}).get("NDCG@10"),
        "cost": own["cost"],
        "cases": document["cases"],
        "split": document["split"],
        "evaluations": [
            {key: row[key] for key in ("step", "eval_loss", "eval_HR@10", "eval_NDCG@10")} for row in evaluations
        ],
    }


def ranked(baseline: str, runs: Path, data: list[str]) -> dict[str, Any]:
    """A baseline's test metrics on the same split."""
    out = runs / baseline / "result.json"
    if not out.is_file():
        flags = [baseline, *data, "--split", "leave-one-out", "--json", str(out), "--out", str(runs / baseline)]
        command = [sys.executable, "-m", "llmrec.cli.main", "baseline", *flags, *BASELINES[baseline]]
        subprocess.run(command, check=True, cwd=ROOT)
    document = json.loads(next((runs / baseline / "evaluation").glob("*.json")).read_text(encoding="utf-8"))
    return {key: document[key] for metric in METRICS for key in (metric, f"{metric} interval95")} | {
        "later_day NDCG@10": document["slices"].get("later_day", {}).get("NDCG@10"),
        "cost": document["cost"],
    }


def compared(folders: list[Path], out: Path) -> None:
    command = [sys.executable, "-m", "llmrec.cli.main", "compare", *map(str, folders), "--out", str(out)]
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
