"""`llmrec scale fit` and `llmrec scale predict`: laws from a table of trainings, and what they say of other sizes."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from llmrec.scaling.optimum import Budget
    from llmrec.scaling.scaling_fit import ScalingFit

_LAWS = {"performance_law": "Performance Law", "power_law": "power law", "chinchilla": "Chinchilla's form"}


def fit(
    points: Annotated[
        Path,
        typer.Option(
            metavar="FILE",
            help="One row per training, CSV, parquet or JSON lines: depth, width, tokens, quality, metric[, seed, "
            "negatives, encoder, held_out].",
        ),
    ],
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the laws, optimum and verdict to this file.")
    ] = None,
    encoder: Annotated[str | None, typer.Option(metavar="NAME", help="Whose rows, where there are several.")] = None,
    resamples: Annotated[int, typer.Option(min=20, help="Of the bootstrap.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Of the bootstrap, the tests and the search.")] = 0,
) -> None:
    """Fit the Performance Law, a power law and Chinchilla's form to trainings, and say what they tell.

    R² and errors on the points and on points left out; the optimum of depth and width with a 90 % interval, or why
    the points do not determine it; whether more data or a bigger model would help. Rows marked held_out are not used.

    Example: `llmrec scale fit --points runs/pilot/points.csv --encoder hstu --json runs/pilot/hstu.json`
    """
    from llmrec.scaling.fit_document import fit_document, summary
    from llmrec.scaling.points import ScalingPoints
    from llmrec.scaling.scaling_fit import ScalingFit
    from llmrec.storage import write_json

    found = ScalingFit.of(ScalingPoints.read(points, encoder), resamples, seed)
    document = fit_document(found)
    if json_file is not None:
        write_json(json_file, document)
    console = _console()
    console.print(summary(document), markup=False, highlight=False)
    _print_laws(console, document)
    _print_optimum(console, document)
    console.print(document["verdict"], markup=False, highlight=False)
    for reason in document["reasons"]:
        console.print(f"- {reason}", markup=False, highlight=False)
    if json_file is not None:
        console.print(f"Written: {json_file}", markup=False, highlight=False, soft_wrap=True)


def predict(
    fit: Annotated[Path, typer.Option(metavar="FILE", help="What `llmrec scale fit --json` wrote.")],
    depth: Annotated[int | None, typer.Option(min=1, help="Layers to predict for, with --width.")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Hidden size to predict for, with --depth.")] = None,
    tokens: Annotated[
        float | None, typer.Option(help="Events trained on; default: the most that the points have.")
    ] = None,
    quality: Annotated[
        float | None, typer.Option(help="1 / real entropy; default: that of the points with the most data.")
    ] = None,
    negatives: Annotated[
        float | None, typer.Option(help="Per target; default: the most that the points have.")
    ] = None,
    fixed_depth: Annotated[int | None, typer.Option(min=1, help="The best width at this depth.")] = None,
    fixed_size: Annotated[float | None, typer.Option(help="The best depth and width with this product.")] = None,
    max_parameters: Annotated[
        float | None, typer.Option(help="The best size with no more parameters; needs --items.")
    ] = None,
    max_flops: Annotated[
        float | None, typer.Option(help="The best size whose training takes no more operations; needs --items.")
    ] = None,
    encoder: Annotated[
        str | None, typer.Option(metavar="NAME", help="For a budget: the backbone; default: the fit's.")
    ] = None,
    items: Annotated[int | None, typer.Option(min=1, help="For a budget: items of the catalog.")] = None,
    length: Annotated[int, typer.Option(min=1, help="For a budget: events of a window.")] = 50,
    heads: Annotated[int | None, typer.Option(min=1, help="For a budget: heads; widths are multiples of it.")] = None,
    epochs: Annotated[float, typer.Option(help="For --max-flops: passes over the tokens.")] = 1.0,
    force: Annotated[bool, typer.Option("--force", help="Predict beyond 3 times the points' grid too.")] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the prediction as JSON to this file.")
    ] = None,
) -> None:
    """Predict the metric of a size, or the best size under a constraint, with what doubling would add.

    Without a size and a constraint: the best size within reach of the points. All intervals are 90 %.

    Example: `llmrec scale predict --fit hstu.json --depth 16 --width 64`

    Example: `llmrec scale predict --fit hstu.json --max-parameters 2e6 --items 3706 --json best.json`
    """
    from llmrec.exceptions import DataError
    from llmrec.scaling.scaling_fit import ScalingFit
    from llmrec.storage import write_json

    constraints = {
        "fixed_depth": fixed_depth,
        "fixed_size": fixed_size,
        "max_parameters": max_parameters,
        "max_flops": max_flops,
    }
    given = [f"--{name.replace('_', '-')}" for name, value in constraints.items() if value is not None]
    given += ["--depth and --width"] if depth is not None and width is not None else []
    if (depth is None) != (width is None):
        raise DataError("A size has a depth and a width, and one of them is missing. Give both, or --fixed-depth.")
    if len(given) > 1:
        raise DataError(f"{', '.join(given)} are given together. Give a size or one constraint.")
    has_budget = max_parameters is not None or max_flops is not None
    unused = {"--encoder": encoder, "--items": items, "--heads": heads}
    if idle := [name for name, value in unused.items() if value is not None and not has_budget]:
        raise DataError(
            f"{', '.join(idle)} say what a model costs, and there is no budget. Give --max-parameters or --max-flops, "
            "or leave them out."
        )
    found = ScalingFit.load(fit)
    tokens, quality = _data(found, tokens, quality)
    for name, value in (("tokens", tokens), ("quality", quality)):
        if not 0 < value < math.inf:
            raise DataError(f"The {name} to predict for is {value:g}. Give a number above 0.")
    if negatives not in (None, found.most[1]) and not has_budget and found.grid.levels("negatives") < 2:
        raise DataError(
            f"--negatives is {negatives:g}, and the points do not tell what negatives do: "
            f"{'none has any' if found.most[1] is None else f'all have {found.most[1]:g}'}. Leave it out, or add "
            "trainings with other numbers of negatives."
        )
    effective = tokens * quality
    document: dict[str, Any] = {
        "fit": str(fit),
        "tokens": tokens,
        "quality": quality,
        "effective": effective,
        "negatives": found.most[1] if negatives is None else negatives,
        "constraint": {name: value for name, value in constraints.items() if value is not None},
        "forced": force,
        "optimum": None,
    }
    if depth is None or width is None:
        given_negatives = found.most[1] if negatives is None else negatives
        budget = _budget(
            found, max_parameters, max_flops, encoder, items, length, heads, given_negatives, tokens, epochs
        )
        best = found.best(effective, negatives, fixed_depth, fixed_size, budget, force)
        depth, width = best.depth, best.width
        document["optimum"] = best.document() | {"cost_of": None if budget is None else budget.what}
    predicted = found.predict(depth, width, effective, negatives, force)
    base = (float(depth), float(width))
    doubled = found.gains(None, base, effective, negatives, force)
    document |= {"depth": depth, "width": width, "prediction": predicted}
    document |= {
        "metric": predicted[found.chosen]["metric"],
        "interval": predicted[found.chosen]["interval"],
        "run_interval": predicted[found.chosen]["run_interval"],
        "chosen": found.chosen,
        "gains": {name: gain.document() for name, gain in doubled.items()},
        "verdict": found.verdict(base, effective, negatives, force),
        "reasons": found.reasons(),
    }
    if not 0 <= document["metric"] <= 1:
        document["reasons"].append(
            f"The law says {document['metric']:.4g}, which no metric can be: it does not hold so far from the points."
        )
    if json_file is not None:
        write_json(json_file, document)
    _print_prediction(_console(), document)


def _data(found: "ScalingFit", tokens: float | None, quality: float | None) -> tuple[float, float]:
    """Tokens and quality to predict for; what is not given is that of the point with the most effective data."""
    most = int(found.points.effective.argmax())
    return (
        float(found.points.tokens[most]) if tokens is None else tokens,
        float(found.points.quality[most]) if quality is None else quality,
    )


def _budget(
    found: "ScalingFit",
    max_parameters: float | None,
    max_flops: float | None,
    encoder: str | None,
    items: int | None,
    length: int,
    heads: int | None,
    negatives: float | None,
    tokens: float,
    epochs: float,
) -> "Budget | None":
    """The cost model's parameters or operations as a budget; None if there is none."""
    import numpy as np

    from llmrec.exceptions import DataError
    from llmrec.scaling.cost import cost_of
    from llmrec.scaling.optimum import Budget
    from llmrec.scaling.shape import ENCODERS, Shape

    if max_parameters is None and max_flops is None:
        return None
    name = encoder or found.points.encoder
    known = {entry: entry for entry in ENCODERS}
    if name not in known:
        raise DataError(
            f"The cost of the encoder {name!r} is not known. Give --encoder, one of {', '.join(ENCODERS)}."
        )
    if items is None:
        raise DataError("A budget needs the size of the catalog, whose table is part of the model. Give --items.")

    def shape(layers: float, size: float) -> Shape:
        sampled = None if negatives is None else int(negatives)
        return Shape(known[name], int(layers), int(size), items, length, heads=heads, negatives=sampled)

    def parameters(depths: "np.typing.NDArray[np.float64]", widths: "np.typing.NDArray[np.float64]") -> list[float]:
        return [float(cost_of(shape(*size)).parameters) for size in zip(depths, widths, strict=True)]

    def operations(depths: "np.typing.NDArray[np.float64]", widths: "np.typing.NDArray[np.float64]") -> list[float]:
        return [cost_of(shape(*size)).flops(tokens, epochs) for size in zip(depths, widths, strict=True)]

    # Widths that can be built: the heads share them, and those of a llama are turned in pairs.
    step = 1 if name == "gru4rec" else shape(1, heads or 2).num_heads * (2 if name == "llama" else 1)
    if max_parameters is not None:
        return Budget(parameters, max_parameters, "parameters", step)
    assert max_flops is not None
    return Budget(operations, max_flops, "floating-point operations", step)


def _console() -> "Console":
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=140)


def _print_laws(console: "Console", document: Mapping[str, Any]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(title="Laws", title_justify="left")
    for name in ("law", "R²", "MAE", "left out: R²", "left out: MAE", "parameters"):
        table.add_column(name, justify="left" if name in ("law", "parameters") else "right", overflow="fold")
    own = {**document, "parameters": document["law"]["parameters"]}
    for name, title in _LAWS.items():
        found = own if name == "performance_law" else document[name]
        spelt = ", ".join(f"{key} {_number(value)}" for key, value in found["parameters"].items())
        left = found["leave_one_out"]
        cells = [title + (" (predicts)" if document["chosen"] == name else ""), f"{found['r2']:.3f}"]
        cells += [f"{found['mae']:.2e}", f"{left['r2']:.3f}", f"{left['mae']:.2e}", spelt]
        table.add_row(*map(Text, cells))
    console.print(table)


def _print_optimum(console: "Console", document: Mapping[str, Any]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(title="Optimum of the Performance Law", title_justify="left")
    for name in ("axis", "best", "90 % interval", "determined", "shape", "p of a difference", "p of a peak"):
        table.add_column(name, justify="right" if name in ("best", "90 % interval") else "left")
    for axis, found in document["axes"].items():
        low, high = document["interval"][axis]
        below, above = document["interval"]["open"][axis]
        ends = f"{'≤ ' if below else ''}{low:.3g} to {'≥ ' if above else ''}{high:.3g}"
        cells = [axis, _number(document["optimum"][axis]), ends, "yes" if document["determined"][axis] else "no"]
        cells += [found["kind"], f"{found['effect_p']:.3f}", _number(found["peak_p"])]
        table.add_row(*map(Text, cells))
    console.print(table)


def _print_prediction(console: "Console", document: Mapping[str, Any]) -> None:
    from rich.table import Table
    from rich.text import Text

    data = f"{document['tokens']:,.0f} tokens of quality {document['quality']:.4f}"
    best = document["optimum"]
    if best is None:
        said = f"Depth {document['depth']}, width {document['width']}, {data}."
    else:
        ranges = {axis: f"{best['interval'][axis][0]} to {best['interval'][axis][1]}" for axis in ("depth", "width")}
        said = f"Best: depth {best['depth']} ({ranges['depth']}), width {best['width']} ({ranges['width']}), {data}."
        if best["cost"] is not None:
            said += f" It costs {best['cost']:,.0f} {best['cost_of']}."
    console.print(said, markup=False, highlight=False)
    if best is not None:
        for axis, end in best["at_end"].items():
            console.print(
                f"- The best {axis} is the {'largest' if end == 'high' else 'smallest'} within reach: a bound, not an "
                "optimum.",
                markup=False,
                highlight=False,
            )
    table = Table(title="Predicted metric", title_justify="left")
    for name in ("law", "metric", "90 % of the law", "90 % of a training"):
        table.add_column(name, justify="left" if name == "law" else "right")
    for name, title in _LAWS.items():
        found = document["prediction"][name]
        cells = [title + (" (chosen)" if document["chosen"] == name else ""), f"{found['metric']:.4f}"]
        cells += [f"{low:.4f} to {high:.4f}" for low, high in (found["interval"], found["run_interval"])]
        table.add_row(*map(Text, cells))
    console.print(table)
    console.print(document["verdict"], markup=False, highlight=False)
    for reason in document["reasons"]:
        console.print(f"- {reason}", markup=False, highlight=False)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
