"""Runs a study: trainings of train/seqrec.py that differ in a few flags, with a table and a plot of what came out.

Which of four backbones gains by depth (RQ1 of arXiv 2412.00714), on MovieLens-1M:

    python train/study.py --config train/recipes/study_rq1.yaml --interactions interactions.parquet --runs runs/rq1

What it has done and what is left, and one part of it at a size for a CPU:

    python train/study.py --config train/recipes/study_rq1.yaml --interactions interactions.parquet --runs runs/rq1 \
        --list
    python train/study.py --config train/recipes/study_rq1.yaml --interactions interactions.parquet --runs runs/small \
        --only hstu sasrec --override num_train_epochs=10 --seeds 0

The same command goes on after an interruption; what is done is not repeated. Every run has a folder of its own, with
its recipe, log, artefact and metrics.json. After each, results.json, table.md and study.html are written anew.
"""

import logging
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from llmrec.exceptions import LLMRecError, RecipeError
from llmrec.script import parse, parser, run
from llmrec.study.arguments import StudyArguments

if TYPE_CHECKING:
    from trl import TrlParser

    from llmrec.study.plan import StudyPlan
    from llmrec.study.runner import StudyRunner

logger = logging.getLogger("llmrec.train.study")

RECIPES = Path(__file__).resolve().parent / "recipes"


def make_parser() -> "TrlParser":
    return parser((StudyArguments,), __doc__)


def main(study: StudyArguments) -> None:
    from llmrec.study import report, results
    from llmrec.study.runner import StudyRunner, duration

    study.check()
    plan = study.plan(RECIPES)
    folder = Path(study.runs)
    # Of all runs, also of those that are not run now: the results are the whole study's.
    every = StudyRunner(folder, plan.runs, processes=study.processes)
    if study.list:
        show(every)
        return
    check(plan)
    every.check_processes()

    def write() -> None:
        document = results.collect(plan, every.places)
        results.save(document, folder)
        report.write(document, folder, plan.curve)

    runner = StudyRunner(folder, plan.chosen(study.only or ()), processes=study.processes, finished=write)
    logger.info("%s: %d of %d runs are left", plan.title, len(runner.left), len(runner.places))
    code = runner.run(study.max_minutes)
    taken = sum(float(place.record().get("seconds", 0.0)) for place in every.places)
    logger.info("%s, in %s; %s", summary(every), duration(taken), folder / report.PAGE)
    if code:
        raise SystemExit(code)


def check(plan: "StudyPlan") -> None:
    """Reads every run's flags as train/seqrec.py will, before hours are spent on the first.

    Raises:
        RecipeError: if a run's flags are not the script's, or do not go together; it names the run.
    """
    import torch
    from transformers import AutoModel

    from llmrec.data.arguments import ColumnArguments, SplitArguments
    from llmrec.losses.arguments import LossArguments
    from llmrec.reasoning.arguments import ReasoningArguments
    from llmrec.sequence.arguments import EncoderArguments, EventArguments, ItemArguments, SequenceArguments
    from llmrec.study.place import RunPlace
    from llmrec.study.runner import write_recipe
    from llmrec.training.arguments import StageArguments

    arguments = (
        *(SequenceArguments, ColumnArguments, SplitArguments, EncoderArguments, ItemArguments, EventArguments),
        *(LossArguments, ReasoningArguments, StageArguments),
    )
    for each in plan.runs:
        if each.seed != plan.seeds[0]:
            continue
        with tempfile.TemporaryDirectory() as folder:
            place = RunPlace(folder, each)
            place.folder.mkdir()
            recipe = write_recipe(place)
            try:
                # A parser takes a recipe's values for its defaults, and would keep them for the next one.
                data, _, _, encoder, item, _, losses, reasoning, _ = parse(
                    parser(arguments, None), ["--config", str(recipe), "--artefact", str(place.artefact)]
                )
                for part in (data, item, losses, reasoning):
                    part.check()
                config = reasoning.config(encoder, 1)
                with torch.device("meta"):  # its checks without its weights
                    AutoModel.from_config(config)
            except LLMRecError as error:
                raise RecipeError(f"{each.cell}: {error}") from error


def show(runner: "StudyRunner") -> None:
    """Says what is done, what is left, how long it took, and how long the rest will take."""
    from llmrec.study.runner import duration

    for place in runner.places:
        seconds = place.record().get("seconds")
        taken = "" if not seconds else f"  {duration(float(seconds))}"
        failed = place.record().get("failed")
        why = f"  {failed['why']}" if failed and place.state() == "failed" else ""
        logger.info("%-7s %s, seed %d%s%s", place.state(), place.run.cell, place.run.seed, taken, why)
    left = runner.seconds_left()
    logger.info("%s; %s", summary(runner), "no estimate yet" if left is None else f"about {duration(left)} are left")


def summary(runner: "StudyRunner") -> str:
    states = [place.state() for place in runner.places]
    counts = [f"{states.count(name)} {name}" for name in ("done", "failed", "begun", "new") if name in states]
    return f"{len(states)} runs: {', '.join(counts)}"


if __name__ == "__main__":
    run(main, make_parser())
