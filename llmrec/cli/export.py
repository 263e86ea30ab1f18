"""`llmrec export`: an adapter and its base to an artefact."""

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console


def export(
    adapter: Annotated[str, typer.Argument(help="The adapter's folder, or its id on the Hub (`user/name`).")],
    base: Annotated[Path, typer.Option(help="The extended base that the run saved beside the adapter.")],
    out: Annotated[Path, typer.Option(help="The folder for the artefact.")],
    unmerged: Annotated[
        bool,
        typer.Option(
            "--unmerged",
            help="Keep LoRA apart: OUT/base with the new tokens' trained rows, OUT/adapter for vLLM's --enable-lora.",
        ),
    ] = False,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"],
        typer.Option(help="The artefact's number format: float32 loses nothing, the others round."),
    ] = "float32",
) -> None:
    """Merge an adapter into its base: the artefact that `llmrec serve` and `llmrec push` take.

    Adapters of LoRA, DoRA, rsLoRA, QLoRA and int8, and the new tokens' rows, are merged without loss; how far the
    merged model's log-probabilities are from the trained one's is measured and printed. The base must be the very one
    that the adapter was trained on: its hash is compared.

    Example: `llmrec export runs/beauty/adapter --base runs/beauty/base --out runs/beauty/artefact`

    Example, for vLLM with the adapter kept apart:
    `llmrec export runs/beauty/adapter --base runs/beauty/base --out runs/beauty/lora --unmerged`
    """
    from llmrec.export import export as merge
    from llmrec.export import export_unmerged

    result = export_unmerged(adapter, base, out) if unmerged else merge(adapter, base, out, dtype=dtype)
    lines = [
        f"largest difference of a log-probability between the trained model ({result.method}) and the exported one: "
        f"{result.difference:.1e}, on {result.prompts} prompts"
    ]
    lines += [f"base: {out / 'base'}", f"adapter: {out / 'adapter'}"] if unmerged else [f"artefact: {out}"]
    Console(highlight=False, soft_wrap=True).print("\n".join(lines), markup=False)
