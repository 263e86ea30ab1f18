"""PilotRunner: trains what a pilot plans, and keeps a table of its points that a law can be fitted to at any time."""

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import polars as pl

from llmrec.exceptions import StageError
from llmrec.scaling.grid import Trial
from llmrec.scaling.pilot import Pilot
from llmrec.storage import atomic_path
from llmrec.study.place import RunPlace
from llmrec.study.plan import StudyRun
from llmrec.study.runner import StudyRunner

logger = logging.getLogger(__name__)

RUNS = "runs"
POINTS = "points.csv"
_COLUMNS: dict[str, type[pl.DataType]] = {
    **{"depth": pl.Int64, "width": pl.Int64, "tokens": pl.Int64, "quality": pl.Float64, "metric": pl.Float64},
    **{"seed": pl.Int64, "encoder": pl.String, "negatives": pl.Int64, "share": pl.Float64, "parameters": pl.Int64},
    **{"flops": pl.Float64, "seconds": pl.Float64, "loss": pl.Float64, "held_out": pl.Boolean},
}


class PilotRunner:
    """Runs a pilot's trainings, the first seed of all encoders first, each the shortest first.

    Each is a process of its own in a folder of its own, `runs/ENCODER-DEPTHxWIDTH-shareSHARE-seed=SEED-HASH`; what is
    done is not repeated, and what was interrupted goes on (`StudyRunner`). After each, points.csv is written anew.
    """

    def __init__(self, folder: str | Path, pilot: Pilot | None = None, processes: int = 1) -> None:
        """
        Args:
            folder: with the pilot's pilot.json.
            pilot: default: the folder's.
            processes: of each training, which accelerate starts.

        Raises:
            DataError: if the folder has no pilot, or it cannot be read.
            RecipeError: if its flags make no plan.
        """
        self.folder, self.processes = Path(folder), processes
        self.pilot = Pilot.load(folder) if pilot is None else pilot
        if processes < 1:
            raise StageError(f"--processes is {processes}. Give 1 or more.")
        # (encoder, trial, its FLOPs, its place) of all trainings, in the order in which they are run
        self.places: list[tuple[str, Trial, float | None, RunPlace]] = []
        for name in self.pilot.encoders:
            for (trial, run), flops in zip(self.pilot.runs(name), self.pilot.flops[name], strict=True):
                self.places.append((name, trial, flops, RunPlace(self.folder / RUNS, run)))
        self.places.sort(key=lambda one: (one[1].seed, one[1].seconds))

    @property
    def left(self) -> int:
        """How many trainings are not done."""
        return sum(place.state() != "done" for *_, place in self.places)

    def run(self, max_minutes: float = 0.0) -> int:
        """Trains what is left.

        Args:
            max_minutes: after which no further training begins; 0: no limit.

        Returns:
            0 if all that was begun is done, 1 if a training failed, 128 + the signal's number if one stopped it.

        Raises:
            DataError: if the interactions have changed since the pilot was planned.
            StageError: if another process is running this pilot, the limit is negative, or trainings that are done
                had another number of processes.
        """
        if not 0 <= max_minutes < float("inf"):
            raise StageError(f"--max-minutes is {max_minutes}. Give 0 or more.")
        self.pilot.check_data()
        self.write()
        by_script: dict[str, list[StudyRun]] = {}
        for name, _, _, place in self.places:
            by_script.setdefault(self.pilot.encoders[name].script, []).append(place.run)
        runners = [
            StudyRunner(self.folder / RUNS, runs, script, self.processes, finished=self.write)
            for script, runs in by_script.items()
        ]
        for runner in runners:  # all of them before the first trains
            runner.check_processes()
        code, left, begun = 0, max_minutes, time.monotonic()
        for runner in runners:
            if max_minutes and left <= 0:
                break
            if (found := runner.run(left if max_minutes else 0.0)) > 1:  # a signal
                return found
            code = max(code, found)
            left = max_minutes - (time.monotonic() - begun) / 60
        return code

    def points(self) -> list[dict[str, Any]]:
        """A row for each training that is done, in the order in which they are run; `_COLUMNS` says what is in it."""
        found = []
        for name, trial, flops, place in self.places:
            metrics = place.metrics()
            if metrics is None:
                continue
            found.append(
                {
                    "depth": trial.depth,
                    "width": trial.width,
                    "tokens": metrics["training"]["data"]["train_tokens"],
                    "quality": self.pilot.shares[name][trial.share].quality,
                    "metric": metrics["test"][self.pilot.metric],
                    "seed": trial.seed,
                    "encoder": name,
                    "negatives": self.pilot.encoders[name].negatives,
                    "share": trial.share,
                    "parameters": metrics["cost"]["parameters"],
                    "flops": flops,
                    "seconds": place.record().get("seconds"),
                    "loss": validation_loss(metrics),
                    "held_out": trial.held_out,
                }
            )
        return found

    def write(self) -> None:
        """Writes points.csv, atomically."""
        with atomic_path(self.folder / POINTS) as temporary:
            pl.DataFrame(self.points(), schema=_COLUMNS).write_csv(temporary)


def validation_loss(metrics: Mapping[str, Any]) -> float | None:
    """The loss on validation of the weights that were tested; None if it was not measured.

    These are the best ones, if the training took them back (`load_best_model_at_end`), else the last.
    """
    rows = [row for row in metrics.get("validation", ()) if "eval_loss" in row]
    trainer = metrics["training"].get("trainer", {})
    name = f"eval_{str(trainer.get('metric_for_best_model') or 'loss').removeprefix('eval_')}"
    if trainer.get("load_best_model_at_end"):
        rows = [row for row in rows if name in row]
        ranked = sorted(
            rows, key=lambda row: row[name] if "loss" in name else -row[name]
        )  # stable: the first of equals
        return float(ranked[0]["eval_loss"]) if ranked else None
    return float(rows[-1]["eval_loss"]) if rows else None
