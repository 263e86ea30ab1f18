"""`llmrec scale fit` and `llmrec scale predict`, from a file to a file."""

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import typer
from typer.testing import CliRunner

from llmrec.cli.scale_fit import fit, predict
from llmrec.exceptions import DataError

app = typer.Typer()
app.command()(fit)
app.command()(predict)


@pytest.fixture(scope="module")
def points(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A peak at depth 6 and width 50 for hstu; nothing but noise for gpt2, and one row that is held out."""
    rng = np.random.default_rng(0)
    rows = []
    for encoder, height in (("hstu", 1.0), ("gpt2", 0.0)):
        for depth in (2, 4, 8, 16):
            for width in (16, 32, 64, 128):
                for tokens in (500_000, 1_000_000):
                    below = 0.02 * np.log(depth / 6) ** 2 + 0.02 * np.log(width / 50) ** 2 - 0.02 * np.log(tokens)
                    metric = 0.1 + height * (-0.2 - below) + 0.0008 * rng.normal()
                    rows.append((depth, width, tokens, 0.2, abs(metric), 0, encoder, False))
    rows.append((32, 256, 1_000_000, 0.2, 0.9, 0, "hstu", True))
    names = ["depth", "width", "tokens", "quality", "metric", "seed", "encoder", "held_out"]
    path = tmp_path_factory.mktemp("pilot") / "points.csv"
    pl.DataFrame(rows, schema=names, orient="row").write_csv(path)
    return path


@pytest.fixture(scope="module")
def fitted(points: Path) -> Path:
    out = points.with_name("hstu.json")
    args = ["fit", "--points", str(points), "--encoder", "hstu", "--json", str(out), "--resamples", "60"]
    result = CliRunner().invoke(app, args)
    assert result.exit_code == 0, result.output
    assert "Performance Law (predicts)" in result.output
    assert "peaked: depth is best near 6" in " ".join(result.output.split())
    return out


def test_a_fit_is_written(fitted: Path) -> None:
    document = json.loads(fitted.read_text())
    assert {"r2", "mae", "leave_one_out", "optimum", "interval", "verdict", "determined"} <= document.keys()
    assert document["n"] == 32  # the held-out row is not among them
    assert document["encoder"] == "hstu"
    assert document["optimum"]["depth"] == pytest.approx(6, rel=0.1)
    assert document["interval"]["width"][0] < 50 * 1.1
    assert document["interval"]["width"][1] > 50 * 0.9
    assert (document["resamples"], document["seed"]) == (60, 0)


def run(fitted: Path, *options: str) -> dict[str, object]:
    out = fitted.with_name("prediction.json")
    result = CliRunner().invoke(app, ["predict", "--fit", str(fitted), *options, "--json", str(out)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    assert "Predicted metric" in result.output
    found: dict[str, object] = json.loads(out.read_text())
    return found


def test_a_size_is_predicted(fitted: Path) -> None:
    found = run(fitted, "--depth", "12", "--width", "100", "--tokens", "2e6", "--quality", "0.25")
    assert (found["depth"], found["width"], found["effective"], found["optimum"]) == (12, 100, 5e5, None)
    assert found["metric"] == found["prediction"]["performance_law"]["metric"]  # type: ignore[index]
    assert found["gains"].keys() == {"depth", "width"}  # type: ignore[attr-defined]
    default = run(fitted, "--depth", "12", "--width", "100")
    assert (default["tokens"], default["quality"]) == (1e6, 0.2)
    assert default["gains"].keys() == {"data", "depth", "width"}  # type: ignore[attr-defined]
    assert default["metric"] < found["metric"]  # type: ignore[operator]


def test_the_best_size_is_predicted_under_each_constraint(fitted: Path) -> None:
    free = run(fitted)
    assert 5 <= free["depth"] <= 7  # type: ignore[operator]
    fixed = run(fitted, "--fixed-depth", "3")
    assert (fixed["depth"], fixed["constraint"]) == (3, {"fixed_depth": 3})
    product = run(fitted, "--fixed-size", "120")
    assert product["depth"] * product["width"] == pytest.approx(120, rel=0.1)  # type: ignore[operator]
    small = run(fitted, "--max-parameters", "60000", "--items", "1000")
    assert small["optimum"]["cost"] <= 60_000  # type: ignore[index]
    assert small["width"] < free["width"]  # type: ignore[operator]
    heads = run(fitted, "--max-parameters", "90000", "--items", "1000", "--encoder", "llama", "--heads", "4")
    assert heads["width"] % 4 == 0  # type: ignore[operator]
    cheap = run(fitted, "--max-flops", "2e11", "--items", "1000")
    twice = run(fitted, "--max-flops", "2e11", "--items", "1000", "--epochs", "2")
    assert twice["metric"] < cheap["metric"] < free["metric"]  # type: ignore[operator]
    sampled = run(fitted, "--max-flops", "2e11", "--items", "1000", "--negatives", "10")
    assert sampled["metric"] > cheap["metric"]  # type: ignore[operator]
    assert sampled["optimum"]["cost_of"] == "floating-point operations"  # type: ignore[index]


def test_widths_under_a_budget_can_be_built(fitted: Path) -> None:
    """Heads share the width, and those of a llama have an even one."""
    from llmrec.backbones.causal_body import CausalBodyConfig

    for heads in (2, 3, 16):
        given = ("--max-parameters", "1e7", "--items", "1000", "--encoder", "llama", "--heads", str(heads))
        width = run(fitted, *given)["width"]
        CausalBodyConfig(body="llama", hidden_size=width, num_attention_heads=heads).make_body_config()  # type: ignore[arg-type]


def test_what_no_metric_can_be_is_said(fitted: Path) -> None:
    far = run(fitted, "--depth", "100000", "--width", "64", "--force")
    assert far["metric"] < 0  # type: ignore[operator]
    assert "which no metric can be" in far["reasons"][-1]  # type: ignore[index]
    assert not any("no metric" in reason for reason in run(fitted, "--depth", "8", "--width", "64")["reasons"])  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--depth", "8"], "one of them is missing"),
        (["--fixed-depth", "4", "--max-flops", "1e9"], "--fixed-depth, --max-flops are given together"),
        (["--depth", "4", "--width", "8", "--fixed-size", "64"], "given together"),
        (["--max-parameters", "1e6"], "Give --items"),
        (["--max-parameters", "1e6", "--items", "9", "--encoder", "lm:tiger"], "'lm:tiger' is not known"),
        (["--max-parameters", "10", "--items", "1000"], "above the budget of 10. Raise the budget"),
        (["--depth", "99", "--width", "64"], "more than 3 times beyond the points"),
        (["--depth", "8", "--width", "64", "--tokens", "1e9"], "effective data"),
        (["--tokens", "-1e6", "--quality", "-0.2"], "The tokens to predict for is -1e"),
        (["--quality", "nan"], "The quality to predict for is nan"),
        (["--depth", "8", "--width", "64", "--negatives", "64"], "do not tell what negatives do: none has any"),
        (["--items", "9", "--heads", "2"], "--items, --heads say what a model costs, and there is no budget"),
    ],
    ids=[
        *("half", "two", "size", "items", "encoder", "budget", "far", "data", "tokens", "quality", "negatives"),
        "no-budget",
    ],
)
def test_what_cannot_be_predicted_is_refused(fitted: Path, options: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        run(fitted, *options)


def test_what_is_far_is_predicted_by_force(fitted: Path) -> None:
    assert run(fitted, "--depth", "99", "--width", "64", "--force")["forced"] is True


def test_an_encoder_has_to_be_chosen(points: Path) -> None:
    result = CliRunner().invoke(app, ["fit", "--points", str(points)])
    assert isinstance(result.exception, DataError)
    assert "2 encoders, gpt2, hstu" in str(result.exception)
