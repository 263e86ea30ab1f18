"""What the baselines reach on real data, untuned and tuned, each by the command that a user would run.

    python benchmarks/baselines.py [--data ../shared/data] [--runs runs/baselines] [--quick] [--json FILE]

Every data set below --data with interactions and items is split by leave-one-out and ranked in full. For each baseline
`llmrec baseline NAME --out …` runs once with its defaults and once with `--tune`, on validation items alone; then
`llmrec compare` makes the card, whose rows are kept. All are deterministic: the intervals are over users, and there is
no seed to vary. Runs that --runs already holds are not repeated; remove the folder to measure again.

--quick: popularity and item-CF without tuning, on the smallest data set. Nothing is measured where there are no data.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from environment import add_flags, environment, report

BASELINES = ("popularity", "popularity-recent", "item-cf", "markov", "ease", "text-knn")
DATASETS = ("amazon-scientific", "amazon-beauty", "amazon-sports", "movielens-1m")
UNTUNED = ("popularity",)
METRICS = ("HR@5", "NDCG@5", "HR@10", "NDCG@10")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    parser.add_argument("--data", type=Path, default=default, help="Folder of data sets; default: ../shared/data.")
    parser.add_argument("--runs", type=Path, default=Path("runs/baselines"), help="Folder for the run folders.")
    parser.add_argument("--datasets", nargs="+", default=list(DATASETS[:2]), help="Names of folders below --data.")
    parser.add_argument("--baselines", nargs="+", default=list(BASELINES), choices=BASELINES)
    parser.add_argument("--budget-seconds", type=float, default=400, help="Of a grid search.")
    add_flags(parser)
    options = parser.parse_args()
    if options.quick:
        options.datasets, options.baselines = options.datasets[:1], ["popularity", "item-cf"]
    before = environment()
    found: dict[str, Any] = {}
    for name in options.datasets:
        if (options.data / name).is_dir():
            found[name] = measure(options.data / name, options.runs / name, options)
        else:
            print(f"skipped: there is no {name} below {options.data.name}/")
    ratios = {}
    for name, rows in found.items():
        base = rows["item-cf"]["NDCG@10"]
        for system, row in rows.items():
            ratios[f"{name}: {system} over item-cf, NDCG@10"] = round(row["NDCG@10"] / base, 3)
            figures = " ".join(f"{metric} {row[metric]:.4f}" for metric in METRICS)
            print(f"{name}: {system:24} {figures} later day {row['later_day NDCG@10'] or 0:.4f}")
    result = {"systems": found, "ratios": ratios, "protocol": "leave-one-out, full ranking"}
    # A run that measured nothing must not take the place of the results that the documents quote.
    options.quick = options.quick or not found
    report("baselines", result, ratios, before, options)


def measure(data: Path, runs: Path, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Metrics, intervals, later-day slice, settings and cost of every baseline of one data set, by its name."""
    rows = {}
    for baseline in options.baselines:
        tunings = ["", "-tuned"] if not options.quick and baseline not in UNTUNED else [""]
        for tuned in tunings:
            path = runs / f"{baseline}{tuned}" / "evaluation" / f"{baseline}.json"
            if not path.is_file() and not run(baseline, data, path.parents[1], bool(tuned), options):
                continue
            document = json.loads(path.read_text(encoding="utf-8"))
            later = document["slices"].get("later_day", {})
            rows[f"{baseline}{tuned}"] = {
                **{metric: document[metric] for metric in METRICS},
                **{f"{metric} interval95": document[f"{metric} interval95"] for metric in METRICS},
                "later_day NDCG@10": later.get("NDCG@10"),
                "settings": document["settings"],
                "trials": len(document.get("tuning", {}).get("trials", [])),
                "cost": document["cost"],
                "split": document["split"],
            }
    return rows


def run(baseline: str, data: Path, out: Path, tuned: bool, options: argparse.Namespace) -> bool:
    """Whether the command succeeded; what it printed is shown if it did not."""
    command = [
        *(sys.executable, "-m", "llmrec.cli.main", "baseline", baseline, "--out", str(out)),
        *("--interactions", str(next(data.glob("interactions.*"))), "--items", str(next(data.glob("items.*")))),
        *(("--tune", "--budget", "40", "--budget-seconds", str(options.budget_seconds)) if tuned else ()),
    ]
    begin = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    print(f"{data.name}: {baseline}{' tuned' if tuned else ''}, {time.perf_counter() - begin:.0f} s", flush=True)
    if done.returncode:
        print(f"  left out: {done.stderr.strip().splitlines()[-1] if done.stderr.strip() else 'no message'}")
    return done.returncode == 0


if __name__ == "__main__":
    main()
