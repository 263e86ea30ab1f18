"""What each step of thought is worth: quality after 0…K steps, the best step of each case, and over-thinking.

Made of one evaluation for each number of steps, all of the same cases. Knows neither models nor what wrote them.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from llmrec.evaluation.comparison import LEVEL
from llmrec.evaluation.evaluation import Evaluation
from llmrec.evaluation.metrics import Metric, values
from llmrec.evaluation.uncertainty import bootstrap_means, holm, paired_difference
from llmrec.exceptions import DataError

CUTOFF = 10
METRICS: tuple[Metric, ...] = ("NDCG", "HR")  # the first decides
NAMES = tuple(f"{metric}@{CUTOFF}" for metric in METRICS)
PRIMARY = NAMES[0]
_ITEMS = ("head", "torso", "tail")

Mask = npt.NDArray[np.bool_]


def reasoning_report(
    evaluations: Sequence[Evaluation],
    lengths: npt.ArrayLike,
    latency: Mapping[str, Any] | None = None,
    facts: Mapping[str, Any] | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """The report, JSON-ready.

    Figures are of the headline cases, ties in expectation; intervals and tests resample users whole. Differences are
    paired by case. Holm's correction spans all tests of the report: every step against none, by both metrics, and the
    last step against every earlier one, in every slice. The last against none over all cases is both: it counts once.

    Args:
        evaluations: after 0, 1, …, K steps, of the same cases.
        lengths: (C,) the items of each case's history.
        latency: of `step_latency`.
        facts: what else it shall say first.
        resamples: of the bootstrap and of the tests.
        seed: of both.

    Returns:
        `by_step`: of each step both metrics with `interval95`, and `against step 0`; `oracle`: the same where each
        case is given the step that ranks its target best, and how many cases each step is (the first) best for;
        `slices`: of head, torso and tail items, of short and long users and of `all`: metrics by step, `best_step`,
        the last step `against` the others, `over_thinking` and a sentence; `latency`; `findings`: sentences with their
        level.

    Raises:
        DataError: if there are not two evaluations or more, they are not of the same cases, no case counts, or so few
            resamples could show nothing.
    """
    first = evaluations[0] if evaluations else None
    if first is None or len(evaluations) < 2:
        raise DataError("A report on steps of thought needs the evaluation of none and of one at least. Give both.")
    asked = (first.user_ids, first.targets, first.counted.tolist())
    sizes = np.asarray(lengths, dtype=np.int64)
    if any((one.user_ids, one.targets, one.counted.tolist()) != asked for one in evaluations) or sizes.shape != (
        len(first.targets),
    ):
        raise DataError("The steps were evaluated on different cases. Evaluate all of them on the same.")
    if not first.counted.any():
        raise DataError(
            "All cases are of users or items that training does not hold, so there is no headline figure. Give "
            "training a longer span, or split by leave-one-out."
        )
    counted = first.counted
    table = np.stack([_table(one)[counted] for one in evaluations])  # (K + 1, C, 2)
    users = first.user_places()[counted]
    masks = {"all": np.ones(len(users), dtype=np.bool_)} | dict(_slices(first, sizes[counted]))
    last = len(evaluations) - 1
    tests = last * (len(METRICS) + len(masks)) - 1
    if tests / (resamples + 1) >= LEVEL:
        raise DataError(
            f"With {resamples} resamples and {tests} tests no corrected p-value can fall below {LEVEL}, so nothing "
            f"could be found. Ask for {int(np.ceil(tests / LEVEL))} resamples or more."
        )
    found: dict[str, Any] = {**(facts or {}), "steps": last, "cases": len(users), "users": len(np.unique(users))}
    found |= {"primary": PRIMARY, "level": LEVEL, "tests": tests, "resamples": resamples, "seed": seed}
    found["by_step"] = [_step(table, users, step, resamples, seed) for step in range(last + 1)]
    found["oracle"] = _oracle(table, users, resamples, seed)
    found["slices"] = {name: _slice(table[:, mask, 0], users[mask], resamples, seed) for name, mask in masks.items()}
    _correct(found)
    for name, part in found["slices"].items():
        part["over_thinking"] = _over_thinking(part)
        part["sentence"] = _slice_sentence(name, part)
    found["latency"] = None if latency is None else dict(latency)
    found["findings"] = [{"level": level, "text": text} for level, text in _findings(found)]
    return found


def _table(evaluation: Evaluation) -> npt.NDArray[np.float64]:
    """(C, 2) every case's value of both metrics."""
    return np.stack([values(evaluation.ranks, metric, CUTOFF) for metric in METRICS], axis=1)


def _slices(evaluation: Evaluation, lengths: npt.NDArray[np.int64]) -> Iterator[tuple[str, Mask]]:
    """Slices of the headline cases that hold any; users are short and long by the thirds of the cases."""
    for name in _ITEMS:
        if name in evaluation.slices:
            mask = np.asarray(evaluation.slices[name])[evaluation.counted]
            if mask.any():
                yield f"{name} items", mask
    low, high = np.quantile(lengths, [1 / 3, 2 / 3], method="lower")
    for name, mask in (
        (f"short users (up to {low} items)", lengths <= low),
        (f"long users (more than {high} items)", lengths > high),
    ):
        if mask.any() and not mask.all():
            yield name, mask


def _step(
    table: npt.NDArray[np.float64], users: npt.NDArray[np.int64], step: int, resamples: int, seed: int
) -> dict[str, Any]:
    means = bootstrap_means(table[step], users, resamples, seed)
    found: dict[str, Any] = {"step": step}
    for place, name in enumerate(NAMES):
        found[name] = float(means.mean[place])
        found[f"{name} interval95"] = [float(means.low[place]), float(means.high[place])]
    if step:
        gaps = paired_difference(table[step], table[0], users, resamples, seed)
        found["against step 0"] = {
            name: {
                "difference": float(gaps.mean[place]),
                "difference interval95": [float(gaps.low[place]), float(gaps.high[place])],
                "p_value": float(gaps.p_value[place]),
            }
            for place, name in enumerate(NAMES)
        }
    return found


def _oracle(table: npt.NDArray[np.float64], users: npt.NDArray[np.int64], resamples: int, seed: int) -> dict[str, Any]:
    best = table.max(axis=0)
    means = bootstrap_means(best, users, resamples, seed)
    found: dict[str, Any] = {}
    for place, name in enumerate(NAMES):
        found[name] = float(means.mean[place])
        found[f"{name} interval95"] = [float(means.low[place]), float(means.high[place])]
    chosen = table[:, :, 0].argmax(axis=0)  # of equal steps the first
    found["cases_by_step"] = np.bincount(chosen, minlength=len(table)).tolist()
    found["cases_alike"] = int((table[:, :, 0] == table[0, :, 0]).all(axis=0).sum())
    return found


def _slice(table: npt.NDArray[np.float64], users: npt.NDArray[np.int64], resamples: int, seed: int) -> dict[str, Any]:
    """(K + 1, c) of one slice."""
    means = table.mean(axis=1)
    last = len(table) - 1
    gaps = paired_difference(np.repeat(table[last:], last, axis=0).T, table[:last].T, users, resamples, seed)
    return {
        "cases": table.shape[1],
        PRIMARY: means.tolist(),
        "best_step": int(means.argmax()),
        "against": [
            {
                "step": step,
                "difference": float(gaps.mean[step]),
                "difference interval95": [float(gaps.low[step]), float(gaps.high[step])],
                "p_value": float(gaps.p_value[step]),
            }
            for step in range(last)
        ],
    }


def _correct(found: dict[str, Any]) -> None:
    """Writes Holm's `p_holm` beside every `p_value`."""
    tests = [test for row in found["by_step"][1:] for test in row["against step 0"].values()]
    once, twice = found["by_step"][-1]["against step 0"][PRIMARY], found["slices"]["all"]["against"][0]
    tests += [test for part in found["slices"].values() for test in part["against"] if test is not twice]
    for test, corrected in zip(tests, holm([test["p_value"] for test in tests]), strict=True):
        test["p_holm"] = float(corrected)
    twice |= {"p_value": once["p_value"], "p_holm": once["p_holm"]}


def _over_thinking(part: Mapping[str, Any]) -> dict[str, Any] | None:
    """The earlier step that the last one falls behind of the most, where that is more than chance; else None."""
    worse = [test for test in part["against"] if test["difference"] < 0 and test["p_holm"] < LEVEL]
    return min(worse, key=lambda test: float(test["difference"])) if worse else None


def _slice_sentence(name: str, part: Mapping[str, Any]) -> str:
    last = len(part[PRIMARY]) - 1
    of = "over all cases" if name == "all" else f"on {name}"
    if (worse := part["over_thinking"]) is not None:
        return f"Over-thinking {of}: after {_steps(last)} {PRIMARY} is {_gap(worse)} against {_steps(worse['step'])}."
    if part["best_step"] < last:
        best = part["best_step"]
        return (
            f"{_capital(of)} {_steps(best)} came out best ({PRIMARY} {part[PRIMARY][best]:.4f} against "
            f"{part[PRIMARY][last]:.4f}), by no more than chance explains: no over-thinking can be told."
        )
    return f"{_capital(of)} the last step came out best: no over-thinking."


def _findings(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    last = found["steps"]
    end, begin = found["by_step"][last], found["by_step"][0]
    gap = end["against step 0"][PRIMARY]
    both = f"{PRIMARY} {begin[PRIMARY]:.4f} without and {end[PRIMARY]:.4f} with {_steps(last)}: {_gap(gap)}"
    if gap["p_holm"] >= LEVEL:
        yield "note", f"Thinking made no difference to be seen. {both}."
    elif gap["difference"] > 0:
        yield "ok", f"Thinking helped. {both}."
    else:
        yield "warning", f"Thinking hurt. {both}."
    for part in found["slices"].values():
        if part["over_thinking"] is not None:
            yield "warning", part["sentence"]
    oracle = found["oracle"]
    yield (
        "note",
        f"A ceiling, which nothing can serve: with each case's own best step, chosen by looking at the answer, "
        f"{PRIMARY} would be {oracle[PRIMARY]:.4f}. Steps that differ by chance alone would raise it too.",
    )
    yield (
        "note",
        "All steps are of one model that was trained to think; step 0 is its first state, and no model that was "
        "trained without thought. Train that one too, and put both to llmrec compare.",
    )
    if (latency := found["latency"]) is not None:
        for row in latency["batches"]:
            ratio = row["ratio"][last]
            yield (
                "note",
                f"{_steps(last, capital=True)} take {ratio:.2f} times the time of none for {row['histories']} "
                f"histor{'y' if row['histories'] == 1 else 'ies'} at once ({row['milliseconds'][last]:.2f} ms against "
                f"{row['milliseconds'][0]:.2f}, medians of the same run).",
            )


def _gap(test: Mapping[str, Any]) -> str:
    low, high = test["difference interval95"]
    return f"{test['difference']:+.4f} [{low:+.4f}, {high:+.4f}], corrected p {test['p_holm']:.3f}"


def _steps(count: int, capital: bool = False) -> str:
    spelt = {0: "no step", 1: "1 step"}.get(count, f"{count} steps")
    return _capital(spelt) if capital else spelt


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
