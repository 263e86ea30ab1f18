"""Tables of trainings: what is read from them, and what is refused with a sentence that says what to add."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from llmrec.exceptions import DataError
from llmrec.scaling.additive import Grid
from llmrec.scaling.points import ScalingPoints
from llmrec.scaling.sufficiency import parameters_needed, require_enough


def table(**changes: list[object]) -> pl.DataFrame:
    columns: dict[str, list[object]] = {
        "depth": [2, 4, 2],
        "width": [16, 16, 32],
        "tokens": [1000, 1000, 500],
        "quality": [0.2, 0.2, 0.25],
        "metric": [0.1, 0.2, 0.3],
    }
    return pl.DataFrame({name: values for name, values in (columns | changes).items() if values}, strict=False)


def grid(depths: list[float], widths: list[float], tokens: list[float] | None = None) -> Grid:
    data = tokens or [1000.0] * len(depths)
    metric = np.linspace(0.1, 0.2, len(depths))
    return Grid.of(ScalingPoints(depths, widths, data, [0.2] * len(depths), metric))


@pytest.mark.parametrize("ending", [".csv", ".parquet", ".jsonl"])
def test_a_table_is_read_from_any_of_the_formats(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"points{ending}"
    frame = table(seed=[0, 1, 2], loss=[1.5, None, 2.5], share=[1.0, 1.0, 0.5])
    {".csv": frame.write_csv, ".parquet": frame.write_parquet, ".jsonl": frame.write_ndjson}[ending](path)
    points = ScalingPoints.read(path)
    assert points.depth.tolist() == [2, 4, 2]
    assert points.effective.tolist() == [200, 200, 125]
    assert points.seed is not None
    assert points.seed.tolist() == [0, 1, 2]
    assert points.loss is not None
    assert np.isnan(points.loss).tolist() == [False, True, False]
    assert points.negatives is None
    assert points.records()[1] == {
        **dict(zip(("depth", "width", "tokens", "quality", "metric"), (4, 16, 1000, 0.2, 0.2), strict=True)),
        "seed": 1,
        "loss": None,
    }


def test_encoders_and_held_out_rows_are_chosen() -> None:
    frame = table(encoder=["hstu", "sasrec", "hstu"], held_out=["false", "", "True"])
    assert ScalingPoints.from_frame(frame, "hstu").metric.tolist() == [0.1]
    assert ScalingPoints.from_frame(frame, "hstu").encoder == "hstu"
    assert ScalingPoints.from_frame(frame, "hstu", held_out=True).metric.tolist() == [0.3]
    assert ScalingPoints.from_frame(table(encoder=["gpt2"] * 3)).encoder == "gpt2"
    with pytest.raises(DataError, match=r"2 encoders, hstu, sasrec.*--encoder"):
        ScalingPoints.from_frame(frame)
    with pytest.raises(DataError, match=r"'llama'. The points are of hstu, sasrec"):
        ScalingPoints.from_frame(frame, "llama")
    with pytest.raises(DataError, match="name no encoder"):
        ScalingPoints.from_frame(table(), "llama")
    with pytest.raises(DataError, match="No point is held out"):
        ScalingPoints.from_frame(table(), held_out=True)
    with pytest.raises(DataError, match="held_out says 'maybe'"):
        ScalingPoints.from_frame(table(held_out=["maybe", "true", "false"]))


def test_seeds_of_one_size_are_replicates_in_the_order_of_rows() -> None:
    points = ScalingPoints([8, 2, 8, 8], [4] * 4, [100] * 4, [1] * 4, [0.1, 0.2, 0.3, 0.5], [0, 0, 1, 2])
    first, cell = points.cells()
    assert first.tolist() == [0, 1]
    assert cell.tolist() == [0, 1, 0, 0]
    found = Grid.of(points)
    assert found.mean.tolist() == [pytest.approx(0.3), 0.2]
    assert found.count.tolist() == [3, 1]
    other = ScalingPoints([8, 8], [4] * 2, [100] * 2, [1] * 2, [0.1, 0.2], [0, 0], negatives=[64, 128])
    assert len(Grid.of(other)) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metric": [0.1, float("nan"), 0.2]}, r"Row 2 has the metric nan.*Run this training again"),
        ({"metric": [0.1, None, 0.2]}, "Row 2 has the metric None, which is no number"),
        ({"metric": ["0.1", "0.2", "failed"]}, "Row 3 has the metric 'failed', which is no number"),
        ({"metric": [0.1, 12.5, 0.2]}, r"Row 2 has the metric 12.5, outside \[0, 1\].*not in per cent"),
        ({"metric": [-0.1, 0.5, 0.2]}, r"Row 1 has the metric -0.1, outside \[0, 1\]"),
        ({"metric": []}, r"lack the column\(s\) metric; they have depth"),
        ({"depth": [2, 0, 2]}, "Row 2 has the depth 0, which must be above 0"),
        ({"tokens": [1000, -1, 500]}, "Row 2 has the tokens -1"),
        ({"quality": [0.2, 0.2, float("inf")]}, "Row 3 has the quality inf"),
        ({"seed": [0, 0.5, 1]}, "A seed is 0.5. Give whole numbers"),
        ({"negatives": [64, None, 64]}, "Row 2 has the negatives None"),
        ({"depth": [True, True, False]}, "Row 1 has the depth True, which is no number"),
        ({"depth": [2, 2.5, 2]}, "Row 2 has the depth 2.5. Layers are whole numbers"),
        ({"width": [0.5, 16, 32]}, "Row 1 has the width 0.5. Hidden sizes are whole numbers"),
        ({"seed": [0, float("inf"), 1]}, "A seed is inf. Give whole numbers"),
        ({"seed": [0, 1, 1e300]}, r"A seed is 1e\+300. Give whole numbers"),
        ({"metric": [[0.1], [0.2], [0.3]]}, "Row 1 has the metric .*, which is no number"),
        ({"encoder": ["hstu", None, "hstu"]}, "Row 2 names no encoder, and others do"),
        ({"held_out": [True, True, True]}, "All points are held out, so no law"),
    ],
    ids=[
        *("nan", "missing", "text", "per-cent", "negative", "column", "depth", "tokens", "quality", "seed"),
        *("negatives", "boolean", "layers", "size", "endless-seed", "huge-seed", "list", "encoder", "held-out"),
    ],
)
def test_values_that_cannot_be_are_refused(changes: dict[str, list[object]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        ScalingPoints.from_frame(table(**changes))


def test_rows_are_named_by_their_place_in_the_table() -> None:
    """Rows of other encoders and held-out ones stand before them, and count."""
    frame = table(encoder=["sasrec", "hstu", "hstu"], metric=[0.1, 0.2, 3.0])
    with pytest.raises(DataError, match="Row 3 has the metric 3"):
        ScalingPoints.from_frame(frame, "hstu")
    twice = table(depth=[2, 2, 2], width=[16, 16, 16], tokens=[9, 9, 9], quality=[0.2] * 3, seed=[1, 1, 1])
    with pytest.raises(DataError, match="Rows 2 and 3 are one training"):
        ScalingPoints.from_frame(twice.with_columns(held_out=pl.Series([True, False, False])))


def test_an_empty_column_of_encoders_is_none() -> None:
    frame = table().with_columns(encoder=pl.lit(None, dtype=pl.String))
    assert ScalingPoints.from_frame(frame).encoder is None
    with pytest.raises(DataError, match="name no encoder, so 'hstu' cannot be chosen"):
        ScalingPoints.from_frame(frame, "hstu")
    with pytest.raises(DataError, match="All points of hstu are held out"):
        ScalingPoints.from_frame(table(encoder=["hstu"] * 3, held_out=[True] * 3))


def test_a_training_that_is_there_twice_is_refused() -> None:
    with pytest.raises(DataError, match="Rows 1 and 3 are one training: depth 2, width 16, 1000 tokens and seed 7"):
        ScalingPoints([2, 4, 2], [16] * 3, [1000] * 3, [0.2] * 3, [0.1, 0.2, 0.3], [7, 7, 7])


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="There is no file"):
        ScalingPoints.read(tmp_path / "none.csv")
    (tmp_path / "bad.parquet").write_bytes(b"no parquet")
    (tmp_path / "empty.csv").write_text("")
    for name in ("bad.parquet", "empty.csv"):
        with pytest.raises(DataError, match="cannot be read as a table"):
            ScalingPoints.read(tmp_path / name)
    (tmp_path / "header.csv").write_text("depth,width,tokens,quality,metric\n")
    with pytest.raises(DataError, match=r"There are no points. Add one row per training"):
        ScalingPoints.read(tmp_path / "header.csv")
    with pytest.raises(DataError, match=r"\[2, 3\] values"):
        ScalingPoints([1, 2, 3], [1, 2], [1, 2], [1, 2], [0.1, 0.2])


def test_points_that_tell_no_law_are_refused() -> None:
    wide = [16.0, 32.0, 64.0]
    with pytest.raises(DataError, match=r"All points have one depth, 4.*Add trainings.*depth 2 and 8"):
        require_enough(grid([4.0] * 6, wide * 2, [1000.0] * 3 + [2000.0] * 3))
    with pytest.raises(DataError, match=r"such as depth 2 and 4, at each width"):
        require_enough(grid([1.0] * 6, wide * 2, [1000.0] * 3 + [2000.0] * 3))
    with pytest.raises(DataError, match=r"such as depth 1 and 6, at each width"):
        require_enough(grid([3.0] * 6, wide * 2, [1000.0] * 3 + [2000.0] * 3))
    with pytest.raises(DataError, match="All points have one width, 16"):
        require_enough(grid([2.0, 4.0, 8.0], [16.0] * 3))
    same = ScalingPoints([2, 4, 2, 4], [16, 16, 32, 32], [1e3] * 4, [0.2] * 4, [0.5] * 4)
    with pytest.raises(DataError, match=r"All points have the metric 0.5"):
        require_enough(Grid.of(same))
    identical = ScalingPoints([2] * 9, [16] * 9, [1e3] * 9, [0.2] * 9, np.linspace(0, 1, 9))
    with pytest.raises(DataError, match="one depth"):
        require_enough(Grid.of(identical))
    cross = [(2.0, 16.0), (4.0, 16.0), (8.0, 16.0), (2.0, 32.0), (2.0, 64.0)]
    with pytest.raises(DataError, match=r"5 different points .* for 5 parameters. Add at least 1 more"):
        require_enough(grid([h for h, _ in cross], [d for _, d in cross]))
    together = [(h, 8 * h, t) for h in (2.0, 4.0, 8.0) for t in (1e3, 2e3, 4e3)]
    with pytest.raises(DataError, match="width of the points changes only together with their depth"):
        require_enough(grid([h for h, _, _ in together], [d for _, d, _ in together], [t for _, _, t in together]))


def test_parameters_are_those_that_the_grid_can_tell() -> None:
    depths, widths = [2.0, 2.0, 4.0, 4.0, 8.0, 8.0], [16.0, 32.0] * 3
    assert parameters_needed(grid(depths, widths)) == 1 + 2 + 1
    require_enough(grid(depths, widths))
    assert parameters_needed(grid(depths, widths, [1e3, 1e3, 1e3, 2e3, 2e3, 2e3])) == 1 + 2 + 1 + 1
