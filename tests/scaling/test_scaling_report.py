"""The report's page holds what the account says."""

import numpy as np
import polars as pl
import pytest
from law_worlds import QUALITY, flat, peaked, power, world

from llmrec.scaling.account import EncoderAccount
from llmrec.scaling.points import ScalingPoints
from llmrec.scaling.report import report_page


def frame_of(points: ScalingPoints) -> pl.DataFrame:
    names = ("depth", "width", "tokens", "quality", "metric", "seed")
    return pl.DataFrame({name: getattr(points, name) for name in names})


@pytest.fixture(scope="module")
def frame() -> pl.DataFrame:
    drawn = world(peaked, widths=(16, 32, 64), tokens=(5e5, 1e6), seeds=1).draw(0.001, np.random.default_rng(0))
    found = frame_of(drawn).with_columns(
        flops=6e9 * pl.col("depth") * pl.col("width"), loss=9 - 3 * pl.col("metric"), held_out=pl.lit(False)
    )
    rows = {"depth": 32.0, "width": 32.0, "tokens": 1e6, "quality": QUALITY, "metric": 0.5, "seed": 0}
    held = pl.DataFrame(rows | {"flops": 1e12, "loss": 7.5, "held_out": True})
    return pl.concat([found, held.cast(dict(found.schema))])


def test_everything_is_there(frame: pl.DataFrame) -> None:
    account = EncoderAccount.of(frame.with_columns(encoder=pl.lit("<b>hstu</b>")), resamples=30)
    assert account.fit is not None
    text = report_page([account], "HR@10", "A & B", "Read this first.").render()
    assert "&lt;b&gt;hstu&lt;/b&gt;" in text
    assert "<b>hstu</b>" not in text
    assert "A &amp; B" in text
    for words in ("Read this first.", "Residuals", "Optimum", "Predicted, then measured", "Loss and metric", "Cost"):
        assert words in text
    # By depth, width and data; residuals; optimum; cost; loss.
    assert text.count("<svg") == 7
    assert account.fit.verdict().split(". ")[0].replace("'", "&#39;") in text
    cell = account.held_out[0]
    for value in (cell.metric, cell.predicted[account.fit.chosen], *cell.interval):
        assert f">{value:.4f}<" in text
    assert ">outside<" in text
    assert text.count("<tr>") > 24
    law = account.fit.candidates["performance_law"]
    assert f">{law.accuracy.r2:.3f}<" in text
    assert f">{law.accuracy.leave_one_out_mae:.4f}<" in text
    assert "The loss would choose other models" not in text  # it falls as the metric rises
    assert "http://" not in text.replace("http://www.w3.org", "")
    assert "https://" not in text


def test_a_table_that_tells_no_law_says_why(frame: pl.DataFrame) -> None:
    account = EncoderAccount.of(frame.head(3), resamples=20)
    text = report_page([account]).render()
    assert "No law was fitted." in text
    assert account.refusal.split(". ")[0].replace("'", "&#39;") in text
    assert text.count("<svg") == 0
    assert "Points" in text


def test_losses_that_mislead_are_warned_of(frame: pl.DataFrame) -> None:
    account = EncoderAccount.of(frame.with_columns(loss=pl.col("metric")), resamples=20)
    assert "The loss would choose other models" in report_page([account]).render()


@pytest.mark.parametrize("law", [power, flat], ids=["power", "flat"])
def test_other_worlds_have_a_report_too(law) -> None:  # type: ignore[no-untyped-def]
    drawn = world(law, widths=(16, 32), tokens=(1e6,), seeds=2).draw(0.002, np.random.default_rng(1))
    account = EncoderAccount.of(frame_of(drawn), resamples=20)
    assert account.fit is not None
    text = report_page([account]).render()
    assert text.count("<svg") == 4  # one amount of data, no costs, no losses
    for reason in account.fit.reasons():
        assert reason.replace("'", "&#39;") in text


def test_most_negatives_need_not_go_with_most_data(frame: pl.DataFrame) -> None:
    few = frame.filter(~pl.col("held_out")).with_columns(negatives=pl.lit(64.0))
    many = few.filter(pl.col("tokens") == 5e5).with_columns(negatives=pl.lit(256.0), metric=pl.col("metric") + 0.01)
    text = report_page([EncoderAccount.of(pl.concat([few, many]), resamples=20)]).render()
    assert text.count("<svg") == 7
