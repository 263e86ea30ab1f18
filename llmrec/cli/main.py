"""The `llmrec` command line: names, options and help; each command's work is in the module of its name.

Nothing heavy is imported before a command runs, so that `llmrec --help` answers at once.
"""

import errno
import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

import llmrec
from llmrec.cli import baseline, data, export, ids, layers, reasoning, recommend, scale, servers, tradeoff
from llmrec.cli.options import Artefact, InvalidRows, Revision, SplitName, TimestampUnit
from llmrec.exceptions import LLMRecError

app = typer.Typer(
    name="llmrec",
    help="Generative recommendation: items become semantic IDs, a language model writes the next one, vLLM serves it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
app.add_typer(data.app, name="data")
app.add_typer(ids.app, name="ids")
app.add_typer(scale.app, name="scale")


# What a path of the user's can be, and no fault of the code's.
_PATHS = (
    errno.EISDIR,
    errno.ENOTDIR,
    errno.ENOTEMPTY,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOSPC,
    errno.EDQUOT,
)


def main() -> None:
    """The console script: runs the command.

    An error of llmrec's own, or a path that cannot be read or written, becomes its message, and exit code 2.
    """
    try:
        app()
    except (LLMRecError, OSError) as error:
        said = str(error)
        if isinstance(error, OSError) and not isinstance(error, LLMRecError):
            path = error.filename2 or error.filename
            if error.errno not in _PATHS or path is None:
                raise
            said = f"{path} cannot be read or written: {error.strerror}. Give a path that can."
        if os.environ.get("LLMREC_DEBUG", "0") not in ("", "0"):
            raise
        from rich.console import Console

        Console(stderr=True).print(said, style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"llmrec {llmrec.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    pass


@app.command()
def quickstart(
    interactions: Annotated[
        Path | None, typer.Option(help="Own interactions: parquet, csv, jsonl, …, a folder, or `hub:user/name`.")
    ] = None,
    items: Annotated[Path | None, typer.Option(help="Own items, with ids and titles, in the same formats.")] = None,
    out: Annotated[Path, typer.Option(help="The folder for every stage's files, result.json and artefact/.")] = Path(
        "runs/quickstart"
    ),
    user_column: Annotated[str | None, typer.Option(help="The interactions' column of user ids.")] = None,
    item_column: Annotated[str | None, typer.Option(help="The column of item ids, in both files.")] = None,
    timestamp_column: Annotated[str | None, typer.Option(help="The interactions' column of times.")] = None,
    position_column: Annotated[
        str | None, typer.Option(help="The column of places in a user's history, where there are no times.")
    ] = None,
    title_column: Annotated[str | None, typer.Option(help="The items' column of titles.")] = None,
    timestamp_unit: TimestampUnit = "auto",
    invalid_rows: InvalidRows = "error",
    split: SplitName = "leave-one-out",
    seed: Annotated[int, typer.Option(min=0, help="The seed of everything random.")] = 0,
    epochs: Annotated[
        float | None, typer.Option(help="Passes over the training rows; by default fitted to the data.")
    ] = None,
    embedding_model: Annotated[
        str | None, typer.Option(help="A sentence-transformers model: a Hub id or a folder.")
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="The server's port; 0 takes a free one.")] = 0,
    keep_serving: Annotated[bool, typer.Option("--keep-serving", help="Leave the server up at the end.")] = False,
) -> None:
    """Run every stage once, from interactions to a served recommender, on a made-up sample or on your own files.

    Example, on synthetic data: `llmrec quickstart`

    Example, on your own:
    `llmrec quickstart --interactions ratings.csv.gz --items items.jsonl --user-column user --out runs/mine`
    """
    from llmrec.cli.quickstart import quickstart as run

    run(
        interactions=interactions,
        items=items,
        out=out,
        user_column=user_column,
        item_column=item_column,
        timestamp_column=timestamp_column,
        position_column=position_column,
        title_column=title_column,
        timestamp_unit=timestamp_unit,
        invalid_rows=invalid_rows,
        split=split,
        seed=seed,
        epochs=epochs,
        embedding_model=embedding_model,
        port=port,
        keep_serving=keep_serving,
    )


app.command("serve")(servers.serve)
app.command("demo")(servers.demo)
app.command("recommend")(recommend.command)


@app.command()
def search(
    artefact: Artefact,
    query: Annotated[str, typer.Argument(help="What to search for, in words.")],
    k: Annotated[int, typer.Option("-k", "--k", min=1, help="How many items to find.")] = 10,
    revision: Revision = None,
    as_json: AsJson = False,
) -> None:
    """Find the items that a query means, by a model that was trained on the task search.

    Example: `llmrec search runs/mine/artefact "a red lipstick that lasts" -k 5`
    """
    from llmrec.cli.search import search as run

    run(artefact, query, k=k, revision=revision, as_json=as_json)


@app.command()
def push(
    artefact: Annotated[Path, typer.Argument(help="An artefact folder.")],
    repo_id: Annotated[str, typer.Argument(help="The Hub's repository, `user/name`; made if need be.")],
    private: Annotated[
        bool | None, typer.Option("--private/--public", help="For a new repository; by default as the account says.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="The branch to push to; by default main.")] = None,
    message: Annotated[str | None, typer.Option("--message", "-m", help="The commit's title.")] = None,
    evaluation: Annotated[
        list[Path] | None, typer.Option(help="For the card: a JSON of train/score.py or train/rate.py; repeatable.")
    ] = None,
    licence: Annotated[
        str | None, typer.Option("--license", help="For the card: the Hub's id of the weights' licence.")
    ] = None,
    base_model: Annotated[str | None, typer.Option(help="For the card: the Hub id of the base.")] = None,
    dataset: Annotated[list[str] | None, typer.Option(help="For the card: the data's Hub id; repeatable.")] = None,
    card: Annotated[Path | None, typer.Option(help="A card of your own, instead of one that is made.")] = None,
) -> None:
    """Upload a finished artefact to the Hugging Face Hub, with a model card made from its run.

    Example: `llmrec push runs/quickstart/artefact user/my-recommender --private`

    Example: `llmrec push runs/mine/artefact user/name --evaluation runs/mine/evaluation.json --license apache-2.0`
    """
    from llmrec.cli.push import push as run

    run(
        artefact,
        repo_id=repo_id,
        private=private,
        revision=revision,
        message=message,
        evaluations=evaluation or [],
        licence=licence,
        card=card,
        base_model=base_model,
        datasets=dataset or [],
    )


@app.command()
def stages(
    name: Annotated[str | None, typer.Argument(help="A stage file, e.g. train/sft.py: print its path alone.")] = None,
    as_json: AsJson = False,
) -> None:
    """List the stages' scripts, recipes and templates, and where they lie, to run them or to copy and edit them.

    Example: `llmrec stages`

    Example: `cp "$(llmrec stages prompts/next_item.jinja)" my_prompt.jinja`
    """
    from llmrec.cli.stages import show_stages

    show_stages(name, as_json=as_json)


@app.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
def run(
    stage: Annotated[str, typer.Argument(help="A stage's script, e.g. train/sft.py (`llmrec stages` lists them).")],
    args: Annotated[list[str] | None, typer.Argument(help="The script's own arguments; --help shows them.")] = None,
    launcher: Annotated[
        Literal["python", "accelerate"] | None,
        typer.Option(help="By default accelerate for scripts that train a model, else python."),
    ] = None,
    launch_config: Annotated[
        Path | None, typer.Option(help="A config file of `accelerate launch`, e.g. one from train/accelerate/.")
    ] = None,
) -> None:
    """Run one stage's script, wherever llmrec is installed; options before the script's name are for `llmrec run`.

    Example: `llmrec run train/sft.py --config my_recipe.yaml`

    Example: `llmrec run --launch-config ddp.yaml train/sft.py --config my_recipe.yaml`
    """
    from llmrec.cli.run import run_stage

    run_stage(stage, args or [], launcher=launcher, launch_config=launch_config)


@app.command()
def doctor(
    deep: Annotated[
        bool, typer.Option("--deep", help="Also import torch, transformers and vLLM, each in a Python of its own.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Look the environment over: what is installed, which lane it is, each known trap and the command that mends it.

    Exit code 1 if something is broken, 0 otherwise, warnings included.

    Example: `llmrec doctor --deep`
    """
    from llmrec.cli.doctor import examine

    raise typer.Exit(examine(deep=deep, as_json=as_json))


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Run folders that hold evaluation/NAME.json and .parquet.")],
    out: Annotated[Path | None, typer.Option(help="Also write card.md, .json and .html to this folder.")] = None,
    metrics: Annotated[
        str, typer.Option(help="Metrics, such as `HR@10,NDCG@10,MRR@10`; default: HR and NDCG at 5 and 10.")
    ] = "",
    reference: Annotated[
        str | None, typer.Option(help="The system to test against; default: the best baseline, or the first.")
    ] = None,
    resamples: Annotated[int, typer.Option(min=1, help="Of the bootstrap over users.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Of the bootstrap.")] = 0,
) -> None:
    """Compare finished evaluations: intervals, paired tests, slices and cost in one card; refuse unequal splits.

    Example: `llmrec compare runs/mine runs/baselines --out runs/card`
    """
    from llmrec.cli.compare import print_card

    chosen = [name.strip() for name in metrics.split(",") if name.strip()]
    print_card(runs, out=out, metrics=chosen, reference=reference, resamples=resamples, seed=seed)


app.command()(baseline.baseline)
app.command()(layers.layers)
app.command()(reasoning.reasoning)
app.command()(tradeoff.tradeoff)
app.command()(export.export)


if __name__ == "__main__":
    main()
