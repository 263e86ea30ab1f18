"""The result of a training after SFT: test cases ranked before and after, and all that is written of them."""

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from llmrec.data.subset import drawn_cases
from llmrec.evaluation.evaluation import Evaluation, evaluate
from llmrec.evaluation.outcome import outcome, outcome_table
from llmrec.reinforcement.report import closing_words, course, rl_page
from llmrec.reinforcement.start import Start
from llmrec.storage import write_json
from llmrec.tasks.case_lists import CaseLists

if TYPE_CHECKING:
    from llmrec.recommender import Recommender

logger = logging.getLogger(__name__)

KS = (1, 5, 10, 20, 50)


def write_result(
    folder: str | Path,
    system: str,
    method: str,
    start: Start,
    model: Any,
    guard: Mapping[str, Any],
    described: Mapping[str, Any],
    *,
    lines: Sequence[Mapping[str, Any]] = (),
    test_users: int = -1,
    num_beams: int = 50,
    seed: int = 0,
    cost: Mapping[str, Any] | None = None,
    versions: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Writes the artefact, and beside it metrics.json, rl.html and evaluation/; says whether it helped.

    Both are ranked by the same search, with the weights as they are saved. Without a model the artefact holds the
    start's weights, bit for bit, and nothing is ranked twice.

    Args:
        folder: for the artefact.
        system: its name in comparisons.
        method: the training's, as people write it.
        start: what it began with.
        model: what came out, whole and plain; None if the start is kept.
        guard: of `RLGuard.document`.
        described: the flags that decided the weights, JSON-ready.
        lines: the training's log.
        test_users: test cases; -1: all, 0: none.
        num_beams: of the search.
        seed: the training's.
        cost: seconds, steps, device.
        versions: of packages.

    Returns:
        What metrics.json holds.
    """
    from llmrec.recommender import Recommender

    before = start.recommender()
    after, held = before, start.held
    if model is not None:
        extras = (before.item_tokenizer, before.templates)
        after = Recommender(model, held.tokenizer, held.catalog, held.prompt, start.settings, *extras)
    seeds = start.settings.seeds
    facts: dict[str, Any] = {
        "seeds": seeds | {"further": [*seeds.get("further", []), seed], "users": 0},
        "cost": {**(cost or {}), "parameters": after.model.num_parameters()},
        "versions": dict(versions or {}),
    }
    first, second, found = None, None, None
    cases = drawn_cases(start.split, test_users)
    if len(cases):
        old = {
            "seeds": start.settings.seeds | {"users": 0},
            "cost": start.settings.training.get("cost", {}),
            "versions": facts["versions"],
        }
        first = rank_test(before, start, start.name, cases, num_beams, old)
        if model is None:
            second = replace(first, system=system, facts={**first.facts, **facts})
        else:
            second = rank_test(after, start, system, cases, num_beams, facts)
        second = replace(second, facts={**second.facts, "settings": {**second.facts["settings"], **described}})
        found = outcome(first, second)
    words = closing_words(method, guard, found)
    entry = {
        "method": method,
        "began_with": f"{start.name}, whose weights and tokenizer have the hash {start.weights_hash[:12]}",
        "said": [words, guard["sentence"]],
        "outcome": found,
        "settings": dict(described),
        "cost": facts["cost"],
    }
    kept = copy.deepcopy(start.settings)
    kept.training = {
        **kept.training,
        "further": [*kept.training.get("further", []), entry],
        "versions": {**kept.training.get("versions", {}), **facts["versions"]},
    }
    after.settings = kept
    after.save_pretrained(folder)
    place = Path(folder).resolve().parent
    documents = [None if one is None else one.document() for one in (first, second)]
    for evaluation, document in zip((first, second), documents, strict=True):
        if evaluation is not None:
            evaluation.save(place, document)
    rl_page(method, lines, guard, found).write(place / "rl.html")
    result = {
        "system": system,
        "start_system": start.name,
        "method": method,
        "split": start.split.content_hash,
        "protocol": dict(start.split.protocol),
        "before": documents[0],
        "after": documents[1],
        "outcome": found,
        "closing": words,
        "guard": dict(guard),
        "course": course(lines),
        "training": dict(described),
        "cost": facts["cost"],
        "versions": facts["versions"],
    }
    write_json(place / "metrics.json", result)
    if found is not None:
        logger.info("%s", outcome_table(found))
    logger.info("%s", words)
    logger.info("artefact saved to %s; its course is in %s", folder, place / "rl.html")
    return result


def rank_test(
    recommender: "Recommender",
    start: Start,
    system: str,
    cases: npt.NDArray[np.int64],
    num_beams: int,
    facts: Mapping[str, Any],
) -> Evaluation:
    """Ranks test cases as they are served, 50 items deep."""
    lists = CaseLists(start.held, start.settings, "test", cases.tolist(), num_beams)
    return evaluate(
        system,
        start.split,
        "test",
        recommend=lambda histories, k: lists.of(recommender, range(len(histories)), k, progress=True),
        ks=KS,
        cases=cases,
        facts={**facts, "settings": {"num_beams": num_beams, "training": start.settings.recipe}},
    )
