"""The result card of a ranking model: its measures beside the baselines', as a page, and over seeds."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmrec.evaluation.uncertainty import over_seeds
from llmrec.exceptions import DataError
from llmrec.page import Page, plot

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Card = Mapping[str, Any]

METRICS = ("AUC", "UAUC", "log_loss", "Brier", "ECE")
MODEL = "model"
_NONE = "–"


def summarised(cards: Sequence[Card]) -> dict[str, Any]:
    """Mean and standard deviation of the model's measures over cards of other seeds, by label and metric.

    Args:
        cards: of one task and one model, each with another seed.

    Raises:
        DataError: if a seed is there twice, or the cards are of different rows, labels or flags.
    """
    seeds = [card["seed"] for card in cards]
    if len(set(seeds)) != len(seeds):
        raise DataError(f"The runs have the seeds {seeds}, of which one is there twice. Give each seed once.")
    check_alike(cards)
    found: dict[str, Any] = {"seeds": seeds, "labels": {}}
    for label in cards[0]["labels"]:
        measured = [card["labels"][label]["systems"][MODEL] for card in cards]
        found["labels"][label] = {}
        for metric in METRICS:
            values = [one[metric] for one in measured]
            if None not in values:
                mean, deviation = over_seeds(values)
                found["labels"][label][metric] = {"mean": mean, "deviation": deviation, "values": values}
    return found


def check_alike(cards: Sequence[Card]) -> None:
    """Raises DataError if cards are of different rows or flags, whatever their seeds."""
    if len({json.dumps([card["task"], card["flags"]], sort_keys=True) for card in cards}) > 1:
        raise DataError(
            "The runs differ in rows or flags, and not by their seeds alone. Summarise runs of one recipe."
        )


def read_card(path: str | Path) -> dict[str, Any]:
    """A card that train/rank.py wrote; raises DataError if it is none."""
    try:
        card = json.loads(Path(path).read_text(encoding="utf-8"))
        for name in ("seed", "task", "flags", "labels"):
            card[name]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(
            f"{path} is no result of train/rank.py ({type(error).__name__}: {error}). Give a metrics.json of it."
        ) from error
    assert isinstance(card, dict)
    return card


def page(card: Card) -> Page:
    """The card as a page: what was asked, each label's systems, slices, and a reliability plot."""
    made = Page("Ranking")
    task = card["task"]
    made.paragraph(
        f"{task['train_rows']:,} rows trained on, {task['test_rows']:,} rows of {task['test_users']:,} users reported "
        f"on. Encoder {card['encoder']}, layout {card['layout']}, scorer {card['scorer']}, seed {card['seed']}, "
        f"{card['cost']['parameters']:,} parameters, {card['cost']['fit_seconds']:.0f} s of training."
    )
    summary = card.get("over_seeds")
    for label, found in card["labels"].items():
        made.heading(f"Label {label}")
        rows = [_system(name, measured) for name, measured in found["systems"].items()]
        if summary is not None:
            rows.append(
                ["model, over seeds", *(_deviating(summary["labels"][label].get(metric)) for metric in METRICS)]
            )
        model = found["systems"][MODEL]
        made.table(
            ["system", *METRICS],
            rows,
            f"{model['cases']:,} cases, {model['label_share']:.1%} of label 1, with 95 % intervals of a bootstrap "
            f"over users. UAUC is the mean over {model['UAUC_users']:,} users who have both labels; "
            f"{model['users_left_out']:.1%} of the users have one and are left out. Log-loss in nats; lower is better "
            "there, and for Brier and ECE.",
        )
        made.table(
            ["cases", "number", "label 1", "AUC", "UAUC", "log_loss"],
            [
                [
                    name,
                    f"{part['cases']:,}",
                    f"{part['label_share']:.3f}",
                    *(_number(part[one]) for one in ("AUC", "UAUC", "log_loss")),
                ]
                for name, part in found["slices"].items()
            ],
            "The model on parts of the cases.",
        )
        made.figure(
            reliability_plot(found["reliability"]),
            "Ten bins of about equally many cases: the share of label 1 against the mean probability. A true "
            "probability lies on the line.",
        )
    return made


def reliability_plot(bins: Sequence[Mapping[str, float]]) -> "Figure":
    """Observed shares against predicted probabilities."""
    figure, axes = plot()
    axes.plot([0, 1], [0, 1], color="#59636e", linestyle=":", linewidth=1)
    axes.plot([one["predicted"] for one in bins], [one["observed"] for one in bins], color="#0a63c9", marker="o")
    axes.set_xlabel("predicted probability")
    axes.set_ylabel("share of label 1")
    return figure


def _system(name: str, measured: Mapping[str, Any]) -> list[str]:
    cells = []
    for metric in METRICS:
        bounds = measured.get(f"{metric} interval95")
        spread = "" if bounds is None else f" [{bounds[0]:.4f}, {bounds[1]:.4f}]"
        cells.append(_number(measured[metric]) + spread)
    return [name, *cells]


def _deviating(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return _NONE
    return f"{found['mean']:.4f}" + ("" if found["deviation"] is None else f" ± {found['deviation']:.4f}")


def _number(value: float | None) -> str:
    return _NONE if value is None else f"{value:.4f}"
