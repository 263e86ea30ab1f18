"""The course of a training, step by step: as lines of JSON, as rows, as a page."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llmrec.exceptions import DataError
from llmrec.storage import atomic_path

if TYPE_CHECKING:
    from llmrec.page import Page

LOG_FILE = "log.jsonl"

# Told apart in the light, in the dark, and by those who see fewer colours.
_COLOURS = ("#0a63c9", "#c2570c", "#6f42c1", "#1a7f37", "#9a6700", "#bf3989")


class LogLines(TrainerCallback):
    """Writes everything that a Trainer logs to a file, a line of JSON per event, on the main process.

    A line has `step` and `epoch`, and each number under the Trainer's name for it, None where it is not finite. Lines
    are flushed one by one. A run that is resumed drops what was logged behind its checkpoint, and a line that a kill
    tore; a run that begins anew begins the file anew.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._opened = False  # by this run: what stands there is its own

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            self._open(state.global_step)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        self._open(state.global_step)
        line = {"step": state.global_step, "epoch": state.epoch, **kwargs["logs"]}
        text = json.dumps({name: _finite(value) for name, value in line.items()}, ensure_ascii=False, allow_nan=False)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(text + "\n")

    def _open(self, step: int) -> None:
        """Keeps the lines of a run that continues from `step`, once."""
        if self._opened:
            return
        self._opened = True
        # The summary at the end of a run is written again at the end of the one that continues it.
        kept = [line for line in read_log(self.path) if line["step"] <= step and "train_runtime" not in line]
        with atomic_path(self.path) as temporary:
            lines = kept if step else []
            text = "".join(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in lines)
            temporary.write_text(text, encoding="utf-8")


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a `log.jsonl`, without one that a kill tore; none if there is no file."""
    path = Path(path)
    found = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            found.append(line)
    return found


def log_curve(history: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """The evaluations of a Trainer's `log_history`, one row a step: loss and ranking metrics."""
    curve: dict[int, dict[str, float]] = {}
    for entry in history:
        if "eval_loss" in entry:
            # A diverged loss is NaN, which JSON has no word for.
            finite = (name for name, value in entry.items() if isinstance(value, int | float) and math.isfinite(value))
            numbers = {name: float(entry[name]) for name in finite}
            curve.setdefault(int(entry["step"]), {}).update(numbers)
    return list(curve.values())


def training_page(folder: str | Path) -> "Page":
    """A page of a training's course: its losses and ranking metrics over the steps, and its evaluations as a table.

    Args:
        folder: the Trainer's output folder, with its `log.jsonl`.

    Raises:
        DataError: if the log is missing or holds no numbers.
    """
    from llmrec.page import Page

    path = Path(folder) / LOG_FILE
    lines = [line for line in read_log(path) if "train_runtime" not in line]
    if not lines:
        raise DataError(f"{path} is missing or holds nothing. Give the output folder of a training that logged.")
    page = Page("Training")
    losses = {"training": _series(lines, "loss"), "validation": _series(lines, "eval_loss")}
    ranked = sorted({name for line in lines for name in line if name.startswith("eval_") and "@" in name})
    metrics = {name.removeprefix("eval_"): _series(lines, name) for name in ranked}
    page.paragraph(_summary(lines, losses, metrics))
    tasks = sorted({name for line in lines for name in line if name.startswith("loss/")})
    for heading, series, unit in (
        ("Loss", losses, "nats per token"),
        ("Loss of each task", {name.partition("/")[2]: _series(lines, name) for name in tasks}, "nats per token"),
        ("Ranking of held-out users", metrics, "share"),
    ):
        shown = {name: points for name, points in series.items() if points}
        if shown:
            page.heading(heading)
            _figure(page, shown, unit)
    evaluations = [line for line in lines if "eval_loss" in line]
    if evaluations:
        header = ["step", "epoch", "eval_loss", *ranked]
        rows = [[_cell(line.get(name)) for name in header] for line in evaluations]
        page.heading("Evaluations")
        page.table([name.removeprefix("eval_") for name in header], rows, "Each evaluation on the way.")
    return page


def _series(lines: Sequence[Mapping[str, Any]], name: str) -> list[tuple[int, float]]:
    """Steps and finite values; of two at one step the later."""
    return sorted({line["step"]: line[name] for line in lines if line.get(name) is not None}.items())


def _summary(
    lines: Sequence[Mapping[str, Any]],
    losses: Mapping[str, list[tuple[int, float]]],
    metrics: Mapping[str, list[tuple[int, float]]],
) -> str:
    """What the curves say, in sentences."""
    said = [f"{max(line['step'] for line in lines)} steps."]
    if losses["validation"]:
        step, value = min(losses["validation"], key=lambda point: (point[1], point[0]))
        said.append(f"The validation loss is lowest at step {step}, {value:.4f} nats per token.")
    for name, points in metrics.items():
        if points:
            step, value = min(points, key=lambda point: (-point[1], point[0]))
            said.append(f"{name} is highest at step {step}, {value:.4f}.")
    broken = sorted({name for line in lines for name, value in line.items() if value is None and name != "epoch"})
    if broken:
        said.append(f"Not finite at some step: {', '.join(broken)}.")
    return " ".join(said)


def _figure(page: "Page", series: Mapping[str, list[tuple[int, float]]], unit: str) -> None:
    from llmrec.page import plot

    figure, axes = plot()
    for place, (name, points) in enumerate(series.items()):
        steps, values = zip(*points, strict=True)
        mark = "o" if len(points) < 40 else None
        axes.plot(steps, values, color=_COLOURS[place % len(_COLOURS)], marker=mark, markersize=4, label=name)
    axes.set_xlabel("step")
    axes.set_ylabel(unit)
    axes.legend(frameon=False)
    last = ", ".join(f"{name} {points[-1][1]:.4f}" for name, points in series.items())
    page.figure(figure, f"At the last step that has one: {last} ({unit}).")


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
