"""Asks an artefact whether users like held-out items, and says how well it orders them and how true its probabilities
are.

    python train/rate.py --artefact runs/artefact --interactions interactions.parquet --out runs/rating.json

The artefact was trained on the task yes_no, and the interactions have ratings: of --like_threshold or more is a Yes.
What a user rated before is the question's history. With --calibrate, a calibration is fitted on the validation part
first and saved in the artefact; without it, one that lies there is applied.
"""

import logging
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmrec.data.arguments import ColumnArguments, SplitArguments
from llmrec.exceptions import ArtefactError, DataError
from llmrec.script import parser, run

if TYPE_CHECKING:
    from rich.console import Console
    from trl import TrlParser

    from llmrec.data.split import Part, Split
    from llmrec.rating import Question

logger = logging.getLogger("llmrec.train.rate")


@dataclass
class RateArguments:
    """What to rate, on what."""

    artefact: str = field(metadata={"help": "Artefact folder, or a Hub id."})
    interactions: str = field(metadata={"help": "Interactions with ratings: parquet, csv, tsv or jsonl."})
    out: str = field(metadata={"help": "JSON file for the result."})
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit on the Hub."})
    like_threshold: float | None = field(
        default=None, metadata={"help": "The least rating that is a Yes; default: the training's, else 4."}
    )
    template: str | None = field(
        default=None, metadata={"help": "The artefact's yes_no template; default: the calibration's, else the first."}
    )
    calibrate: bool = field(
        default=False, metadata={"help": "Fit a calibration on the validation part, and save it in the artefact."}
    )
    method: str = field(
        default="platt", metadata={"help": "Of the calibration.", "choices": ["temperature", "platt", "isotonic"]}
    )
    max_cases: int = field(default=0, metadata={"help": "Rate only so many of a part, drawn with the seed; 0: all."})
    any_split: bool = field(
        default=False,
        metadata={"help": "Rate interactions that the artefact was not trained on; it may know their ratings."},
    )
    device: str | None = field(default=None, metadata={"help": "Default: a GPU if there is one."})
    seed: int = field(default=0, metadata={"help": "Of the cases that are drawn, and of the intervals."})


def make_parser() -> "TrlParser":
    return parser((RateArguments, ColumnArguments, SplitArguments), __doc__)


def main(arguments: RateArguments, names: ColumnArguments, splits: SplitArguments) -> None:
    import numpy as np
    import torch
    import transformers
    from rich.console import Console

    import llmrec
    from llmrec.artefact import resolve
    from llmrec.calibration import Calibrator, sigmoid
    from llmrec.evaluation.uncertainty import bootstrap_means
    from llmrec.rating import Rater, load_calibration, measures, save_calibration
    from llmrec.recommender import Recommender
    from llmrec.storage import write_json
    from llmrec.trained_split import trained_split

    begin = time.monotonic()
    local = Path(arguments.artefact).expanduser().is_dir()
    if arguments.calibrate and not local:
        raise ArtefactError(
            f"{arguments.artefact!r} is no folder, and a calibration is saved in the artefact. "
            "Download it to a folder of your own first (`hf download --local-dir`)."
        )
    folder = resolve(arguments.artefact, arguments.revision)
    recommender = Recommender.from_pretrained(folder, device=arguments.device)
    settings = recommender.settings
    threshold = arguments.like_threshold
    if threshold is None:
        threshold = float(settings.training.get("data", {}).get("like_threshold", 4.0))
    log = names.read_interactions(arguments.interactions)
    split = trained_split(log, recommender.catalog, settings, splits, arguments.any_split)
    found = None if arguments.calibrate else load_calibration(folder)
    template = arguments.template or (
        found[1] if found else min(recommender.templates.get("yes_no", {}), default=None)
    )
    calibrator, fitted_on = None, {}
    if found is not None:
        asked, meant = (template, threshold), (found[1], found[2].get("like_threshold"))
        if asked == meant:
            calibrator, fitted_on = found[0], found[2]
        else:
            logger.warning(
                "the calibration is of the template %s and of a Yes from %s, not of %s and %s: it is not applied",
                *(*meant, *asked),
            )
    rater = Rater.of(recommender, template)

    if arguments.calibrate:
        questions, labels, _ = cases(split, "valid", threshold, settings.max_history, arguments)
        calibrator = Calibrator.fit(arguments.method, rater.logits(questions, progress=True), labels)  # type: ignore[arg-type]
        fitted_on = {"split": split.content_hash, "part": "valid", "cases": len(labels), "like_threshold": threshold}
        save_calibration(folder, calibrator, str(template), fitted_on)
    questions, labels, users = cases(split, "test", threshold, settings.max_history, arguments)
    logits = rater.logits(questions, progress=True)
    systems = {"raw": sigmoid(logits)} | ({} if calibrator is None else {"calibrated": calibrator(logits)})
    systems |= baselines(split, threshold, [question.candidate for question in questions])
    result: dict[str, Any] = {
        "split": split.content_hash,
        "protocol": dict(split.protocol),
        "part": "test",
        "cases": len(labels),
        "users": len(np.unique(users)),
        "like_threshold": threshold,
        "liked_share": float(labels.mean()),
        "artefact": arguments.artefact,
        "template": template,
        "calibration": None if calibrator is None else calibrator.document() | {"fitted_on": fitted_on},
        "systems": {},
    }
    for name, probabilities in systems.items():
        clipped = np.clip(probabilities, 1e-7, 1 - 1e-7)
        losses = -np.where(labels == 1, np.log(clipped), np.log1p(-clipped))
        intervals = bootstrap_means(
            np.stack([losses, (probabilities - labels) ** 2], axis=1), users, seed=arguments.seed
        )
        document = measures(labels, probabilities, users)
        for place, metric in enumerate(("log_loss", "Brier")):
            document[f"{metric} interval95"] = [float(intervals.low[place]), float(intervals.high[place])]
        result["systems"][name] = document
    result["seeds"] = {"cases": arguments.seed}
    result["versions"] = {module.__name__: str(module.__version__) for module in (llmrec, torch, transformers)}
    result["seconds"] = round(time.monotonic() - begin, 1)
    write_json(arguments.out, result)
    show(Console(width=None if sys.stdout.isatty() else 120), result, arguments.out)


def cases(
    split: "Split", part: "Part", threshold: float, max_history: int, arguments: RateArguments
) -> "tuple[list[Question], Any, Any]":
    """A part's rated headline interactions as questions, with labels (C,) and users (C,).

    Raises:
        DataError: if the interactions have no ratings, or none of the part.
    """
    import numpy as np

    from llmrec.rating import Question
    from llmrec.tasks.ratings import rated_before

    if split.ratings is None:
        raise DataError(
            "The interactions have no ratings, so it is not known who liked what. "
            "Name their column with --rating_column."
        )
    places = split.positions[part][split.headline(part)]
    places = places[np.isfinite(split.ratings[places])]
    if not len(places):
        raise DataError(f"No interaction of the {part} part has a rating. Use another split or another file.")
    if arguments.max_cases and arguments.max_cases < len(places):
        drawn = np.random.default_rng(arguments.seed).permutation(len(places))[: arguments.max_cases]
        places = places[np.sort(drawn)]
    questions = [
        Question(*rated_before(split, place, max_history, threshold), int(split.rows[place]))
        for place in places.tolist()
    ]
    return questions, (split.ratings[places] >= threshold).astype(np.int64), split.owner[places]


def baselines(split: "Split", threshold: float, candidates: list[int]) -> "dict[str, Any]":
    """What is known without a model: training's share of likes, and every item's own, with one like-share added."""
    import numpy as np

    assert split.ratings is not None
    rated = split.in_training & np.isfinite(split.ratings)
    likes = split.ratings[rated] >= threshold
    share = float(likes.mean()) if len(likes) else 0.5
    count = np.bincount(split.rows[rated], minlength=split.num_items)
    liked = np.bincount(split.rows[rated], weights=likes, minlength=split.num_items)
    return {
        "share_of_likes": np.full(len(candidates), share),
        "item_share_of_likes": ((liked + share) / (count + 1))[candidates],
    }


def show(console: "Console", result: dict[str, Any], out: str) -> None:
    """The measures as a table."""
    from rich.table import Table

    columns = ("AUC", "UAUC", "log_loss", "Brier", "ECE", "mean_probability")
    table = Table("system", *columns)
    for name, document in result["systems"].items():
        values = (document[column] for column in columns)
        table.add_row(name, *("–" if value is None else f"{value:.4f}" for value in values))
    console.print(table)
    console.print(
        f"{result['cases']:,} rated cases of {result['users']:,} users, {result['liked_share']:.1%} liked, template "
        f"{result['template']}, split {result['split'][:12]}: {out}",
        markup=False,
    )


if __name__ == "__main__":
    run(main, make_parser())
