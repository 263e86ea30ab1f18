import itertools
import json
import logging
from dataclasses import replace

import numpy as np
import polars as pl
import pytest

from llmrec.data.interactions import Interactions
from llmrec.data.items import Items
from llmrec.data.protocols import global_temporal, leave_one_out
from llmrec.evaluation.baselines import EASE, ItemCF, Markov, Popularity, TextKNN
from llmrec.evaluation.baselines.named import BASELINES, fit_on
from llmrec.evaluation.baselines.tuning import configurations, tune
from llmrec.evaluation.metrics import ranking_metrics, ranks_of
from llmrec.exceptions import DataError


def random_split(seed=0, users=40, num_items=15, make=leave_one_out):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(4, 12, size=users)
    steps = rng.integers(1, 4, size=lengths.sum())
    frame = pl.DataFrame(
        {
            "user_id": np.repeat([f"u{user}" for user in range(users)], lengths),
            # Somewhat predictable: what follows is near.
            "item_id": [f"i{row % num_items}" for row in np.cumsum(steps)],
            "timestamp": 1_400_000_000 + 3600 * np.concatenate([np.sort(rng.integers(0, 5000, n)) for n in lengths]),
        }
    )
    interactions = Interactions.from_frame(frame)
    return make(interactions, Items.from_interactions(interactions))


def spoilt(split):
    """The same split with other test items: whatever looks at them comes to something else."""
    rows = split.rows.copy()
    rows[split.positions["test"]] = (rows[split.positions["test"]] + 1) % split.num_items
    return replace(split, rows=rows)


def value_of(make, parameters, split):
    model = make(**parameters).fit(split.train, split.num_items)
    ranks = ranks_of(model.recommend(split.histories("valid"), 3), split.targets("valid"))
    return ranking_metrics(ranks, (3,))["NDCG@3"]


@pytest.mark.parametrize(
    ("make", "grid"),
    [
        (ItemCF, [{"window": [5, 1, 2], "decay": [0.8, 0.3], "max_history": [20, 1]}]),
        (EASE, [{"decay": [1.0, 0.5], "regularisation": [100.0, 1.0]}]),
        (
            Markov,
            [{"smoothing": [1.0, 0.0], "order": [1, 2]}, {"max_history": [3], "decay": [0.5, 1.0], "order": [2]}],
        ),
    ],
)
def test_every_trial_is_what_a_model_of_its_own_comes_to(make, grid):
    split = random_split()
    found = tune(make, grid, split, "NDCG@3")
    everything = configurations(grid)
    assert [trial.parameters for trial in found.trials] == everything
    values = [value_of(make, parameters, split) for parameters in everything]
    assert [trial.value for trial in found.trials] == pytest.approx(values)
    assert len(set(values)) > 2  # or nothing would be compared
    assert found.best.place == values.index(max(values))
    for name, value in found.best.parameters.items():
        assert getattr(found.model, name) == value
    # Fitted on training alone.
    again = make(**found.best.parameters).fit(split.train, split.num_items)
    histories = split.histories("test")
    assert (found.model.scores(histories) == again.scores(histories)).all()


def test_configurations_that_share_a_fit_are_fitted_once(monkeypatch):
    fits = []
    fit = ItemCF.fit
    monkeypatch.setattr(ItemCF, "fit", lambda model, *data: fits.append(model.window) or fit(model, *data))
    tune(ItemCF, [{"decay": [0.8, 0.5], "window": [5, 2], "max_history": [20, 1]}], random_split())
    assert fits[:2] == [5, 2]
    assert len(fits) == 3  # and the best one's


def test_the_first_of_equals_is_taken():
    split = random_split()
    found = tune(Markov, [{"decay": [0.9, 0.2, 0.5]}], split)  # of no effect on one item
    assert len({trial.value for trial in found.trials}) == 1
    assert found.best.parameters == {"decay": 0.9}


@pytest.mark.parametrize("make", [leave_one_out, global_temporal])
def test_the_test_part_is_never_looked_at(make):
    split = random_split(make=make)
    grid = BASELINES["item-cf"].grid
    first, second = (tune(ItemCF, grid, one, budget=9) for one in (split, spoilt(split)))
    assert [trial.value for trial in first.trials] == [trial.value for trial in second.trials]
    assert first.best.parameters == second.best.parameters
    histories = split.histories("valid")
    assert (first.model.scores(histories) == second.model.scores(histories)).all()


def test_cases_that_are_kept_apart_do_not_choose():
    split = random_split(users=60, num_items=200, make=global_temporal)
    counted = split.headline("valid")
    assert 0 < counted.sum() < len(counted)
    found = tune(Markov, [{"smoothing": [1.0]}], split, "HR@20")
    model = Markov().fit(split.train, split.num_items)
    ranks = ranks_of(model.recommend(split.histories("valid"), 20), split.targets("valid"))
    assert found.best.value == pytest.approx(ranking_metrics(ranks[counted], (20,))["HR@20"])
    assert found.best.value != pytest.approx(ranking_metrics(ranks, (20,))["HR@20"])


def test_a_grid_larger_than_the_budget_is_sampled_and_said(caplog):
    split, grid = random_split(), [{"window": [5, 1, 2, 3, 4], "decay": [0.8, 0.5, 0.3, 0.1]}]
    samples = set()
    for seed in range(6):
        found = tune(ItemCF, grid, split, budget=4, seed=seed)
        again = tune(ItemCF, grid, split, budget=4, seed=seed)
        places = [trial.place for trial in found.trials]
        assert places == [trial.place for trial in again.trials]
        assert places == sorted(set(places))
        assert len(places) == 4
        assert places[0] == 0  # the defaults
        samples.add(tuple(places))
    assert len(samples) > 3
    assert "20 configurations, of which a sample of 4" in caplog.text
    assert found.document()["not_tried"] == 16


def test_time_that_is_over_begins_no_trial(caplog):
    split, grid = random_split(), [{"window": [5, 1, 2], "decay": [0.8, 0.5]}]
    found = tune(ItemCF, grid, split, seconds=0)
    assert [trial.parameters for trial in found.trials] == [{"window": 5, "decay": 0.8}]
    assert "with 1 of 6 trials" in caplog.text
    assert found.document()["not_tried"] == 5
    assert len(tune(ItemCF, grid, split, seconds=600).trials) == 6


def test_the_document_holds_grid_budget_trials_and_choice(caplog):
    caplog.set_level(logging.WARNING)
    found = tune(ItemCF, [{"window": [5, 2]}], random_split(), "MRR@5", budget=7, seconds=60, seed=3)
    document = json.loads(json.dumps(found.document(), allow_nan=False))
    assert document["grid"] == [{"window": [5, 2]}]
    assert (document["budget"], document["budget_seconds"], document["seed"]) == (7, 60, 3)
    assert [trial["parameters"] for trial in document["trials"]] == [{"window": 5}, {"window": 2}]
    assert document["trials"][0]["MRR@5"] == found.trials[0].value
    assert document["chosen"] == found.best.parameters
    assert document["metric"] == "validation MRR@5"
    assert document["not_tried"] == 0
    assert not caplog.records


@pytest.mark.parametrize("metric", ["NDCG", "NDCG@0", "NDCG@x", "AUC@10", "@10"])
def test_an_unknown_metric_is_refused(metric):
    with pytest.raises(DataError, match="is no metric to tune by"):
        tune(ItemCF, [{}], random_split(), metric)


def test_an_empty_search_is_refused():
    for grid, budget in (([], 5), ([{"window": []}], 5), ([{}], 0)):
        with pytest.raises(DataError, match="nothing to try"):
            tune(ItemCF, grid, random_split(), budget=budget)


@pytest.mark.parametrize("name", BASELINES)
def test_the_grids_begin_with_the_defaults_and_every_value_is_taken(name):
    entry = BASELINES[name]
    given = {"embeddings": np.eye(15, 4)} if name == "text-knn" else {}
    untuned = entry.make(**given, **entry.fixed)
    everything = configurations(entry.grid)
    for parameter, value in everything[0].items():
        assert getattr(untuned, parameter) == value
    for parameters in everything:
        model = fit_on(entry.make(**given, **parameters), random_split())
        assert len(model.recommend([np.array([0])], 3)[0]) == 3


def test_recent_popularity_gets_the_times_of_training_alone():
    split = random_split()
    model = fit_on(Popularity(half_life_days=10.0), split)
    newest = split.timestamps[split.in_training].max()
    ages = (newest - split.timestamps[split.in_training]) / 86_400
    weights = np.bincount(split.rows[split.in_training], weights=0.5 ** (ages / 10), minlength=split.num_items)
    assert model.weights == pytest.approx(weights, abs=1e-8)
    with pytest.raises(DataError, match="needs timestamps"):
        fit_on(Popularity(last_share=0.5), replace(split, timestamps=None))


def test_a_warning_that_every_fit_repeats_is_given_once(caplog):
    split = random_split()
    times = split.timestamps.copy()
    times[0] = np.nan
    grid = [{"half_life_days": [5.0, 50.0, 500.0]}]
    for _ in range(2):
        caplog.clear()
        tune(Popularity, grid, replace(split, timestamps=times))
        assert [record.getMessage().split(" have")[0] for record in caplog.records] == [
            f"1 of {split.in_training.sum()} training interactions"
        ]


def test_what_a_fitted_model_may_change_is_nothing_that_fit_looks_at():
    split = random_split()
    values = {"decay": 0.11, "max_history": 2, "smoothing": 7.5}
    embeddings = np.random.default_rng(0).normal(size=(split.num_items, 4))
    histories = split.histories("valid")
    for cls, given in ((ItemCF, {}), (EASE, {}), (Markov, {"order": 2}), (TextKNN, {"embeddings": embeddings})):
        for count in (1, 2, 3):
            for names in itertools.combinations(sorted(cls.query_parameters), count):
                chosen = {name: values[name] for name in names}
                changed = cls(**given).fit(split.train, split.num_items)
                for name, value in chosen.items():
                    setattr(changed, name, value)
                fresh = cls(**given, **chosen).fit(split.train, split.num_items)
                assert (changed.scores(histories) == fresh.scores(histories)).all()
