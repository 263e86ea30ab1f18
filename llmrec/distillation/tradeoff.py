"""Quality against latency and size: finished runs as points, all timed in one run, and which of them none outdoes."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llmrec.artefact import MANIFEST, listed_files
from llmrec.artefact_parts import SETTINGS_FILE
from llmrec.distillation.measurement import BATCH_SIZES, latencies, size_of, this_machine
from llmrec.evaluation.evaluation import FOLDER
from llmrec.exceptions import DataError

METRIC = "NDCG@10"

_SUFFIXES = (".adapter", ".base", ".checkpoints", ".control")


@dataclass(frozen=True)
class Trained:
    """One artefact with the evaluation that a run wrote of it.

    Attributes:
        name: of its system; with the run's folder where two have one name.
        run: the run's folder.
        artefact: the artefact's folder.
        document: its evaluation.
    """

    name: str
    run: Path
    artefact: Path
    document: Mapping[str, Any] = field(repr=False)


def find_trained(folders: Sequence[str | Path]) -> list[Trained]:
    """The artefacts of finished runs of sft.py, seqrec.py, rl.py or distill.py, in the folders' order.

    A run's folder has metrics.json, evaluation/ and one artefact; of a distillation the control's counts too.

    Raises:
        DataError: if a folder has no metrics.json, no artefact, several of which none is named, or no evaluation of
            it, or evaluations are of different splits or parts, or of more cases than others.
    """
    found: list[Trained] = []
    for given in folders:
        run = Path(given)
        metrics = _read(run / "metrics.json")
        named = metrics.get("artefacts")
        system = str(metrics.get("system") or (metrics.get("after") or {}).get("system") or "")
        pairs = [(_only_artefact(run), system)]
        if isinstance(named, dict) and "after" in named:
            pairs = [(run / str(named["after"]), system)]
            if "control" in named:
                pairs.append((run / str(named["control"]), f"{system}-control"))
        for artefact, name in pairs:
            if not (artefact / MANIFEST).is_file():
                raise DataError(f"{artefact} is no artefact, though {run}'s metrics.json names it. Train it again.")
            found.append(Trained(name, run, artefact, _evaluation(run, name)))
    first = found[0] if found else None
    for other in found[1:]:
        assert first is not None
        for key in ("split", "part"):
            if first.document.get(key) != other.document.get(key):
                raise DataError(
                    f"{first.run} was evaluated on the {key} {str(first.document.get(key))[:12]}, {other.run} on "
                    f"{str(other.document.get(key))[:12]}: their quality does not belong in one plot. Evaluate both "
                    "alike."
                )
        # A sample of the cases is not as hard as all of them: a front of both would be of nothing.
        counts = [one.document.get("cases") for one in (first, other)]
        if counts[0] != counts[1]:
            raise DataError(
                f"{first.run} was evaluated on {counts[0]} cases, {other.run} on {counts[1]}: their quality does not "
                "belong in one plot. Evaluate both on the same (--test_users)."
            )
    names = [one.name for one in found]
    return [
        one
        if names.count(one.name) == 1
        else Trained(f"{one.name} ({one.run.name or one.run.resolve().name})", one.run, one.artefact, one.document)
        for one in found
    ]


def tradeoff(
    folders: Sequence[str | Path],
    repetitions: int = 20,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    device: str | None = None,
    seed: int = 0,
    announce: Callable[[str, float | None], None] | None = None,
) -> dict[str, Any]:
    """What each run's artefact is worth, JSON-ready: NDCG@10 by latency and by size.

    Requests are histories of random items, as long as a model reads at most; all models answer in turns
    (`measurement.latencies`). Times are of this machine and this hour.

    Args:
        folders: of the runs.
        repetitions: timed requests of each batch size and model, after the warm-up.
        batch_sizes: histories of a request.
        device: of the models; default: a GPU if there is one.
        seed: of the histories.
        announce: is told what is going on.

    Returns:
        `metric`, `split`, `part`, `machine`, `warm_ups`, `repetitions`, `k` and `points`: per artefact its `name`,
        `run`, `parameters`, `bytes` (of parameters and buffers), `file_bytes`, `latency` by batch size, NDCG@10 with
        `interval95`, `fronts`: whether no other point is as good and cheaper, or better and as cheap, by `latency`
        (of the smallest batch) and by `parameters`.

    Raises:
        DataError: as `find_trained`, or if there is no run.
    """
    from llmrec.distillation.measurement import WARM_UPS
    from llmrec.recommender import Recommender

    trained = find_trained(folders)
    if not trained:
        raise DataError("No run was given, so there is nothing to weigh. Name one run folder or more.")
    recommenders = {}
    for place, one in enumerate(trained):
        if announce is not None:
            announce(f"loading {one.name}", place / len(trained))
        recommenders[str(place)] = Recommender.from_pretrained(one.artefact, device=device)
    taken = latencies(recommenders, None, batch_sizes, repetitions, seed=seed, announce=announce)
    smallest = str(min(batch_sizes))
    points: list[dict[str, Any]] = []
    for place, one in enumerate(trained):
        points.append(
            {
                "name": one.name,
                "run": one.run.name or one.run.resolve().name,
                **size_of(recommenders[str(place)].model),
                "file_bytes": sum(listed_files(one.artefact).values()),
                "latency": taken[str(place)],
                METRIC: float(one.document[METRIC]),
                f"{METRIC} interval95": one.document.get(f"{METRIC} interval95"),
            }
        )
    quality = np.array([point[METRIC] for point in points])
    costs = {
        "latency": np.array([point["latency"][smallest]["median"] for point in points]),
        "parameters": np.array([point["parameters"] for point in points], dtype=np.float64),
    }
    fronts = {name: pareto(quality, cost) for name, cost in costs.items()}
    for place, point in enumerate(points):
        point["fronts"] = {name: bool(front[place]) for name, front in fronts.items()}
    return {
        "metric": METRIC,
        "split": trained[0].document.get("split"),
        "part": trained[0].document.get("part"),
        "k": 10,
        "warm_ups": WARM_UPS,
        "repetitions": repetitions,
        "seed": seed,
        "device": str(next(iter(recommenders.values())).model.device),
        "machine": this_machine(),
        "points": points,
    }


def pareto(quality: npt.ArrayLike, cost: npt.ArrayLike) -> npt.NDArray[np.bool_]:
    """Which points (P,) none outdoes: no other one has as much quality at less cost, or more at as little.

    Equal points stand on the front together, or not at all.

    >>> pareto([0.3, 0.2, 0.3, 0.1], [9.0, 5.0, 9.0, 6.0]).tolist()
    [True, True, True, False]
    """
    good, dear = np.asarray(quality, dtype=np.float64), np.asarray(cost, dtype=np.float64)
    as_good = good[None, :] >= good[:, None]  # [p, q]: q is as good as p
    as_cheap = dear[None, :] <= dear[:, None]
    more = (good[None, :] > good[:, None]) | (dear[None, :] < dear[:, None])
    front: npt.NDArray[np.bool_] = np.logical_not(np.any(as_good & as_cheap & more, axis=1))
    return front


def _only_artefact(run: Path) -> Path:
    """The artefact of a run that does not name it: the folder artefact/, or the only one there is."""
    if (run / "artefact" / SETTINGS_FILE).is_file():
        return run / "artefact"
    there = sorted(
        path.parent
        for path in run.glob(f"*/{SETTINGS_FILE}")
        if not path.parent.name.endswith(_SUFFIXES) and not path.parent.name.startswith(".")
    )
    if len(there) != 1:
        raise DataError(
            f"{run} holds {len(there)} artefacts, so it is not known whose its evaluation is. Give a run's folder "
            "with one artefact in it, beside metrics.json."
        )
    return there[0]


def _evaluation(run: Path, system: str) -> dict[str, Any]:
    path = run / FOLDER / f"{system}.json"
    if not system or not path.is_file():
        there = sorted((run / FOLDER).glob("*.json"))
        if system or len(there) != 1:
            raise DataError(
                f"{run} has no evaluation of {system or 'a named system'}. Train it with a test (sft.py: "
                "--test_users -1), which writes evaluation/."
            )
        path = there[0]
    document = _read(path)
    if not isinstance(document.get(METRIC), int | float):
        raise DataError(f"{path} has no {METRIC}. Evaluate with a cut-off of 10 (--ks).")
    return document


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} cannot be read: {type(error).__name__}. Give the folder of a finished run, in which metrics.json "
            "stands beside the artefact."
        ) from error
    if not isinstance(found, dict):
        raise DataError(f"{path} holds no JSON object. Give the folder of a finished run.")
    return found
