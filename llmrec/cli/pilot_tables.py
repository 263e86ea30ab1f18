"""A pilot as tables for a terminal: the cells of its grid, and how far its trainings are."""

from typing import Any

from rich.table import Table

from llmrec.scaling.grid import Trial
from llmrec.scaling.pilot import Pilot
from llmrec.scaling.pilot_runner import PilotRunner
from llmrec.study.runner import duration


def grid_tables(pilot: Pilot, encoder: str) -> list[Table]:
    """An encoder's cells with what each takes, and what was left out and why."""
    grid = pilot.grids[encoder]
    planned = Table("depth", "width", "share", "users", "tokens", "seeds", "each", "all", title=f"{encoder}: the grid")
    cells: dict[tuple[Any, ...], list[Trial]] = {}
    for trial in grid.trials:
        cells.setdefault((trial.cell, trial.held_out), []).append(trial)
    for (cell, held_out), trials in cells.items():
        facts = pilot.shares[encoder][cell[2]]
        seeds = ", ".join(str(trial.seed) for trial in trials) + (" (held out)" if held_out else "")
        spent = trials[0].seconds
        planned.add_row(
            *(str(cell[0]), str(cell[1]), f"{cell[2]:.0%}", f"{facts.users:,}", f"{facts.tokens:,}", seeds),
            *(duration(spent), duration(spent * len(trials))),
        )
    if not grid.left_out:
        return [planned]
    left = Table("depth", "width", "share", "seed", "would take", "as", title=f"{encoder}: left out for the budget")
    for trial, reason in grid.left_out:
        why = "a repetition, the longest left" if reason == "repetition" else "a cell that a fit can do without"
        left.add_row(
            *(str(trial.depth), str(trial.width), f"{trial.share:.0%}", str(trial.seed), duration(trial.seconds), why)
        )
    return [planned, left]


def progress_table(runner: PilotRunner) -> Table:
    """A pilot's trainings: what was planned, what was measured."""
    metric = runner.pilot.metric
    shown = Table("encoder", "depth", "width", "share", "seed", "state", "planned", "took", metric, title="The pilot")
    for name, trial, _, place in runner.places:
        metrics, taken = place.metrics(), place.record().get("seconds")
        shown.add_row(
            *(name, str(trial.depth), str(trial.width), f"{trial.share:.0%}"),
            f"{trial.seed}{' (held out)' if trial.held_out else ''}",
            place.state(),
            duration(trial.seconds),
            duration(float(taken)) if taken else "",
            f"{metrics['test'][metric]:.4f}" if metrics else "",
        )
    return shown
