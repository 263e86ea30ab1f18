"""What the choice of tokenizer is worth: each one's report, and the same small model trained on its semantic IDs.

    python benchmarks/item_tokenizers.py [--data ../shared/data] [--runs runs/item_tokenizers] [--quick] [--json FILE]

For every data set, tokenizer and seed the stages run as a user would run them: `semantic_ids/build.py` with the
tokenizer's recipe, `train/sft.py` (a Llama of four layers of 128, the same passes over the same histories for all) and
`train/score.py` (the same test cases, beams, full ranking of items). The seed is the tokenizer's and the model's. Then
`semantic_ids/report.py` looks each table over, before and after collisions are resolved. Text embeddings are made
once; all tokenizers quantise the same fused vectors, except `hash`, the control, which knows the items' ids alone.

Every level has 256 codes, FSQ's too (four steps in four dimensions; RecGPT's own levels have thousands, and made the
model 2.5 times as large and a training four times as long). What still differs is told in the result: `opq` and `fsq`
write four codes per item and the others three, so that their rows are longer and their models have 256 tokens more.

Intervals are Student's over the seeds, which vary tokenizer and training; those of differences to `hash` are paired by
seed. With three seeds they are wide, as they should be. What a longer training would give is not measured. Runs that
--runs already holds are not repeated, so an interrupted run goes on; one that was made with other options is refused.

--quick: two tokenizers, one seed, a short training on the synthetic sample; its numbers only show that all works.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from environment import add_flags, environment, report
from scipy import stats

ROOT = Path(__file__).resolve().parents[1]
# "hash" has no recipe: random codes are a flag.
RECIPES = {
    "hash": ["--quantizer", "hash"],
    "rkmeans": ["--config", str(ROOT / "semantic_ids/recipes/rkmeans_3x256.yaml")],
    "rkmeans-normalised": [
        *("--config", str(ROOT / "semantic_ids/recipes/rkmeans_3x256.yaml"), "--normalise_residuals", "True"),
    ],
    "rqvae": ["--config", str(ROOT / "semantic_ids/recipes/rqvae_3x256.yaml")],
    "opq": ["--config", str(ROOT / "semantic_ids/recipes/opq_4x256.yaml")],
    "fsq": ["--config", str(ROOT / "semantic_ids/recipes/fsq_4.yaml"), "--fsq_levels", "4", "4", "4", "4"],
}
METRICS = ("HR@10", "NDCG@10")
FACTS = (
    *("collision_rate", "sharing_rate", "perplexity", "used_share", "dead_codes", "neighbour_purity", "neighbours"),
    *("reconstruction", "ceiling", "tokens_per_item", "quantised", "verdict"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="Folder of data sets.")
    parser.add_argument("--runs", type=Path, default=Path("runs/item_tokenizers"), help="Folder for the run folders.")
    parser.add_argument("--datasets", nargs="+", default=["amazon-scientific"], help="Names of folders below --data.")
    parser.add_argument("--tokenizers", nargs="+", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--seeds", type=int, default=3, help="Of tokenizer and training: 0, 1, …")
    parser.add_argument("--epochs", type=float, default=8, help="Passes over the training rows.")
    parser.add_argument("--cases", type=int, default=4000, help="Test cases, drawn with one seed; 0: all.")
    parser.add_argument("--reports-only", nargs="+", default=[], help="Data sets to build and look over, no training.")
    add_flags(parser)
    options = parser.parse_args()
    if options.quick:
        options.tokenizers, options.seeds, options.epochs, options.cases = ["hash", "rkmeans"], 1, 0.5, 200
        options.datasets = ["sample"]
    before = environment()
    begin = time.perf_counter()
    found = {
        name: measure(*prepared(name, options), options, name not in options.reports_only) for name in options.datasets
    }
    ratios = {}
    for name, rows in found.items():
        for tokenizer, row in rows.items():
            show(name, tokenizer, row)
            if "hash" in rows and "NDCG@10" in row and rows["hash"]["NDCG@10"]["mean"]:
                share = row["NDCG@10"]["mean"] / rows["hash"]["NDCG@10"]["mean"]
                ratios[f"{name}: {tokenizer} over hash, NDCG@10"] = round(share, 3)
    result = {
        "protocol": "leave-one-out, full ranking of items, items of the history excluded",
        "options": {"epochs": options.epochs, "cases": options.cases, "seeds": options.seeds},
        "seconds": round(time.perf_counter() - begin, 1),
        "tokenizers": found,
    }
    report("item_tokenizers", result, ratios, before, options)


def folder_of(name: str, options: argparse.Namespace) -> Path:
    """The folder that holds a data set's items and interactions; the sample's are made in its run folder."""
    folder: Path = options.data / name
    if name == "sample":
        from llmrec.data.sample import make_sample

        folder = options.runs / name
        folder.mkdir(parents=True, exist_ok=True)
        log, table = make_sample(seed=0)
        log.write_parquet(folder / "interactions.parquet")
        table.write_parquet(folder / "items.parquet")
    if not folder.is_dir():
        sys.exit(f"There is no {name} below {options.data}. Name data sets that are there, or use --quick.")
    return folder


def prepared(name: str, options: argparse.Namespace) -> tuple[Path, list[str], list[str]]:
    """The data set's run folder with its text embeddings in it, and the flags of its two files."""
    runs = options.runs / name
    folder = folder_of(name, options)
    items = ["--items", str(next(folder.glob("items.*")))]
    interactions = ["--interactions", str(next(folder.glob("interactions.*")))]
    model = ["--model", "static"] if name == "sample" else []
    stage("semantic_ids/embed.py", [*items, *interactions, *model, "--out", str(runs / "embeddings")])
    return runs, items, interactions


def measure(
    runs: Path, items: list[str], interactions: list[str], options: argparse.Namespace, train: bool
) -> dict[str, dict[str, Any]]:
    """Every tokenizer's report of seed 0, and what its model reaches over the seeds."""
    scores: dict[str, list[dict[str, Any]]] = {name: [] for name in options.tokenizers}
    for seed in range(options.seeds if train else 1):  # seed by seed, so that an interrupted run has whole rows of all
        for name in options.tokenizers:
            folder = runs / f"{name}-{seed}"
            built(name, seed, folder, [*items, *interactions], runs / "embeddings")
            if train:
                scores[name].append(trained(seed, folder, interactions, options))
    rows: dict[str, dict[str, Any]] = {}
    for name in options.tokenizers:
        rows[name] = looked_over(runs / f"{name}-0", [*items, *interactions], runs / "embeddings")
        rows[name] |= {metric: over_seeds([one[metric] for one in scores[name]]) for metric in METRICS if scores[name]}
        rows[name]["runs"] = scores[name]
    for name, row in rows.items():
        if not scores[name] or "hash" not in scores:
            continue
        for metric in METRICS:
            pairs = zip(scores[name], scores["hash"], strict=True)
            row[f"{metric} over hash"] = over_seeds([one[metric] - control[metric] for one, control in pairs])
    return rows


def built(name: str, seed: int, folder: Path, data: list[str], embeddings: Path) -> None:
    if not (folder / "ids" / "semantic_ids.json").is_file():
        flags = [*RECIPES[name], *data, "--embeddings", str(embeddings), "--seed", str(seed)]
        stage("semantic_ids/build.py", [*flags, "--out", str(folder / "ids")])


def trained(seed: int, folder: Path, interactions: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """The test metrics of one model, and its seconds."""
    result = folder / "evaluation.json"
    check_options(folder / "options.json", {"epochs": options.epochs, "cases": options.cases})
    if not result.is_file():
        training = ["--config", str(ROOT / "train/recipes/llama_scratch.yaml"), *interactions, "--seed", str(seed)]
        training += ["--semantic_ids", str(folder / "ids"), "--artefact", str(folder / "artefact")]
        training += ["--output_dir", str(folder / "training"), "--num_train_epochs", f"{options.epochs:g}"]
        training += ["--eval_steps", "0.5", "--save_steps", "0.5"]
        stage("train/sft.py", training)
        scoring = ["--artefact", str(folder / "artefact"), *interactions, "--out", str(result)]
        stage("train/score.py", [*scoring, "--max_users", str(options.cases), "--seed", "0"])
    document = json.loads(result.read_text(encoding="utf-8"))
    own = document["systems"]["llmrec"]
    return {
        "seed": seed,
        **{key: own[key] for metric in METRICS for key in (metric, f"{metric} interval95")},
        "later_day NDCG@10": own["slices"].get("later_day", {}).get("NDCG@10"),
        "item_cf NDCG@10": document["systems"]["item_cf"]["NDCG@10"],
        "invalid_rate": own["invalid_rate"],
        "duplicate_rate": own["duplicate_rate"],
        "cost": own["cost"],
        "parameters": own["cost"].get("parameters"),
        "cases": document["cases"],
        "split": document["split"],
    }


def check_options(path: Path, options: dict[str, Any]) -> None:
    """Ends if what lies in the folder was made with other options; notes these for the next time."""
    if path.is_file() and (made := json.loads(path.read_text(encoding="utf-8"))) != options:
        sys.exit(f"{path.parent} was made with {made}, not {options}. Remove it, or name another folder with --runs.")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(options), encoding="utf-8")


def looked_over(folder: Path, data: list[str], embeddings: Path) -> dict[str, Any]:
    """The doctor's headline numbers of one table of semantic IDs, and what was done about its collisions."""
    path = folder / "report.json"
    if not path.is_file():
        flags = ["--ids", str(folder / "ids"), *data, "--embeddings", str(embeddings)]
        stage("semantic_ids/report.py", [*flags, "--json", str(path), "--html", str(folder / "report.html")])
    document = json.loads(path.read_text(encoding="utf-8"))
    record = json.loads((folder / "ids" / "semantic_ids.json").read_text(encoding="utf-8"))
    return {"report": {key: document[key] for key in FACTS if key in document}, "collisions": record["collisions"]}


def over_seeds(numbers: Sequence[float]) -> dict[str, Any]:
    """Mean, standard deviation and Student's 95 % interval; no interval for one seed."""
    mean = float(np.mean(numbers))
    if len(numbers) < 2:
        return {"mean": mean, "sd": None, "interval95": None, "seeds": len(numbers)}
    spread = float(np.std(numbers, ddof=1))
    half = float(stats.t.ppf(0.975, len(numbers) - 1)) * spread / len(numbers) ** 0.5
    return {"mean": mean, "sd": spread, "interval95": [mean - half, mean + half], "seeds": len(numbers)}


def stage(name: str, flags: list[str]) -> None:
    """Runs a stage's script; ends with its last words if it fails."""
    begin = time.perf_counter()
    done = subprocess.run([sys.executable, str(ROOT / name), *flags], capture_output=True, text=True, check=False)
    print(f"{time.strftime('%H:%M:%S')} {name} {flags[-1]}: {time.perf_counter() - begin:.0f} s", flush=True)
    if done.returncode:
        sys.exit(f"{name} {' '.join(flags)} failed:\n{done.stderr[-3000:]}")


def show(name: str, tokenizer: str, row: dict[str, Any]) -> None:
    before, after = row["collisions"], row["report"]
    used = ", ".join(f"{share:.1%}" for share in after["used_share"])
    print(
        f"{name} {tokenizer}: {before['collision_rate']:.2%} collided, now {after['collision_rate']:.2%}; "
        f"used {used}; purity {after['neighbour_purity'] or 0:.4f}"
    )
    for metric in METRICS:
        if metric in row:
            low, high = row[metric]["interval95"] or (float("nan"), float("nan"))
            print(f"    {metric} {row[metric]['mean']:.4f} [{low:.4f}, {high:.4f}]")


if __name__ == "__main__":
    main()
