"""Accounts of a table of trainings, against the laws they are made of and by counting."""

import numpy as np
import polars as pl
import pytest
from law_worlds import QUALITY, peaked, world

from llmrec.exceptions import DataError
from llmrec.scaling.account import EncoderAccount, accounts
from llmrec.scaling.points import ScalingPoints
from llmrec.scaling.scaling_fit import ScalingFit

SMALL = {"depths": (2, 4, 8, 16), "widths": (16, 32, 64), "tokens": (5e5, 1e6), "seeds": 1}


def table(encoder: str = "hstu", noise: float = 0.001, seed: int = 0, **columns: object) -> pl.DataFrame:
    points = world(peaked, **SMALL).draw(noise, np.random.default_rng(seed))
    found = {name: getattr(points, name) for name in ("depth", "width", "tokens", "quality", "metric", "seed")}
    frame = pl.DataFrame(found).with_columns(encoder=pl.lit(encoder), held_out=pl.lit(False))
    return frame.with_columns(**columns)  # type: ignore[arg-type]


def held(depth: float, width: float, metric: float, seed: int = 0, encoder: str = "hstu") -> pl.DataFrame:
    row = {"depth": float(depth), "width": float(width), "tokens": 1e6, "quality": QUALITY}
    row |= {"metric": metric, "seed": seed}
    return pl.DataFrame(row | {"encoder": encoder, "held_out": True})


def test_held_out_trainings_are_predicted_and_not_fitted_to() -> None:
    frame = pl.concat([table(), held(32, 32, 0.9), held(32, 32, 0.7, seed=1), held(640, 32, 0.1)])
    account = EncoderAccount.of(frame, resamples=40, seed=3)
    fit = ScalingFit.of(ScalingPoints.from_frame(table()), 40, 3)
    assert account.fit is not None
    assert account.fit.performance_law.parameters == fit.performance_law.parameters
    near, far = account.held_out
    said = fit.predict(32, 32, 1e6 * QUALITY)
    assert (near.depth, near.width, near.seeds, near.beyond) == (32, 32, 2, False)
    assert near.metric == pytest.approx(0.8)
    assert near.predicted == {name: said[name]["metric"] for name in ("performance_law", "power_law", "chinchilla")}
    assert list(near.interval) == said[fit.chosen]["run_interval"]
    assert (far.depth, far.seeds, far.beyond) == (640, 1, True)
    document = account.document()
    assert document["held_out"][0]["metric"] == near.metric
    assert document["fit"]["n"] == 24
    assert document["refusal"] is None


def test_marks_are_read_as_the_points_read_them() -> None:
    frame = pl.concat([table(), held(32, 32, 0.9)]).with_columns(
        held_out=pl.when(pl.col("held_out")).then(pl.lit(" YES ")).otherwise(None)
    )
    frame = frame.with_columns(flops=pl.when(pl.col("held_out").is_null()).then(1e9).otherwise(None))
    account = EncoderAccount.of(frame, resamples=20)
    assert len(account.held_out) == 1
    assert len(account.points) == 24
    assert account.cost == "flops"  # a held-out training without a cost hides no one else's


def test_each_encoder_has_an_account_of_its_own() -> None:
    few = table("few").head(3)
    found = accounts(pl.concat([table("hstu"), few, held(32, 32, 0.1)]), resamples=20)
    assert [account.name for account in found] == ["few", "hstu"]
    assert found[0].fit is None
    assert "one depth" in found[0].refusal
    assert found[0].document()["fit"] is None
    assert found[0].frontier() == []
    assert found[1].refusal == ""
    assert len(found[1].held_out) == 1
    without = accounts(table().drop("encoder", "held_out"), resamples=20)
    assert [account.name for account in without] == ["trainings"]
    unnamed = accounts(table().with_columns(encoder=pl.lit(None, dtype=pl.String)), resamples=20)
    assert [account.name for account in unnamed] == ["trainings"]
    with pytest.raises(DataError, match="There are no points"):
        accounts(table().clear())
    with pytest.raises(DataError, match="All points of few are held out"):
        accounts(pl.concat([table("hstu"), held(2, 16, 0.1, encoder="few")]), resamples=20)


def test_the_frontier_is_what_nothing_cheaper_equals() -> None:
    rng = np.random.default_rng(1)
    frame = pl.concat([table(seed=seed) for seed in (0, 1)])
    frame = frame.with_columns(
        seed=pl.Series(np.repeat([0, 1], 24)), seconds=pl.Series(rng.integers(1, 9, size=48).astype(float))
    )
    account = EncoderAccount.of(frame, resamples=20)
    assert account.fit is not None
    assert account.cost == "seconds"
    mean, costs = account.fit.grid.mean, account.cell_costs()
    for cell in range(24):
        same = frame["depth"].to_numpy() == account.fit.grid.depth[cell]
        same &= frame["width"].to_numpy() == account.fit.grid.width[cell]
        same &= np.isclose(frame["tokens"].to_numpy() * QUALITY, account.fit.grid.effective[cell])
        assert same.sum() == 2
        assert costs[cell] == pytest.approx(frame["seconds"].to_numpy()[same].mean())
    expected = {
        cell
        for cell in range(24)
        if not any(costs[other] <= costs[cell] and mean[other] > mean[cell] for other in range(24))
        and not any(costs[other] < costs[cell] and mean[other] == mean[cell] for other in range(24))
    }
    assert set(account.frontier()) == expected
    assert np.all(np.diff(costs[account.frontier()]) > 0)
    document = account.document()
    assert document["cost"] == "seconds"
    assert [(cell["cost"], cell["metric"]) for cell in document["frontier"]] == [
        (costs[cell], mean[cell]) for cell in account.frontier()
    ]
    assert document["loss_agreement"] is None


@pytest.mark.parametrize("wrong", [None, 0.0, float("inf")], ids=["none", "zero", "infinite"])
def test_costs_that_some_trainings_lack_are_passed_over(wrong: float | None) -> None:
    frame = table(flops=pl.Series([wrong, *[1e9] * 23], dtype=pl.Float64), seconds=pl.lit(2.0))
    assert EncoderAccount.of(frame, resamples=20).cost == "seconds"
    assert EncoderAccount.of(frame.drop("seconds"), resamples=20).cost is None


def test_the_agreement_of_loss_and_metric_is_spearmans() -> None:
    frame = table()
    order = frame["metric"].rank("ordinal").to_numpy()
    agreeing = frame.with_columns(loss=pl.Series(30.0 - order))
    assert EncoderAccount.of(agreeing, resamples=20).loss_agreement() == pytest.approx(1)
    opposed = frame.with_columns(loss=pl.Series(order.astype(float)))
    assert EncoderAccount.of(opposed, resamples=20).loss_agreement() == pytest.approx(-1)
    losses = np.random.default_rng(0).permutation(24).astype(float)
    swapped = frame.with_columns(loss=pl.Series(losses))
    ranks = np.argsort(np.argsort(-losses)) + 1
    expected = 1 - 6 * float(((ranks - order) ** 2).sum()) / (24 * (24**2 - 1))
    assert EncoderAccount.of(swapped, resamples=20).loss_agreement() == pytest.approx(expected)
    assert EncoderAccount.of(swapped, resamples=20).document()["loss_agreement"] == pytest.approx(expected)
    gaps = frame.with_columns(loss=pl.Series([1.0, 2.0, 3.0, *[None] * 21], dtype=pl.Float64))
    assert EncoderAccount.of(gaps, resamples=20).loss_agreement() is None
    assert EncoderAccount.of(frame, resamples=20).loss_agreement() is None
