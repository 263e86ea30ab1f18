"""`llmrec scale cost`: what training a model costs, and with a probe how long it takes on this machine."""

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from llmrec.cli.options import (
    InvalidRows,
    ItemColumn,
    MinHistory,
    PositionColumn,
    SplitName,
    TimestampColumn,
    TimestampUnit,
    UserColumn,
)
from llmrec.exceptions import DataError

if TYPE_CHECKING:
    from llmrec.scaling.cost import Cost
    from llmrec.scaling.language import LanguageShape
    from llmrec.scaling.shape import Shape
    from llmrec.scaling.throughput import Probe
    from llmrec.scaling.workload import Workload

_MODEL = "Model"
_MACHINE = "This machine"
_LANGUAGE = "lm:"
# Flags of train/seqrec.py whose names are longer than a Shape's.
_LONG_NAMES = {"inner": "intermediate_size", "time_buckets": "num_time_buckets"}
_TEXT, _LEVELS, _CODES = 512, 3, 256  # words of a small text vocabulary, codes of an item, and how many a level has


def cost(
    encoder: Annotated[
        str,
        typer.Option(
            help="hstu, sasrec, bert4rec, gru4rec, llama or gpt2 over items; lm:llama, lm:gpt2 or lm:qwen3 over the "
            "tokens of semantic IDs."
        ),
    ],
    depth: Annotated[int, typer.Option(min=1, help="Layers.")],
    width: Annotated[int, typer.Option(min=1, help="Hidden size.")],
    items: Annotated[int | None, typer.Option(help="Items; with --interactions they are counted.")] = None,
    tokens: Annotated[
        float | None, typer.Option(help="Events that an epoch learns; with --interactions they are counted.")
    ] = None,
    epochs: Annotated[float, typer.Option(help="How often.")] = 1.0,
    length: Annotated[int, typer.Option(min=1, help="Items of a history, at most.")] = 50,
    heads: Annotated[int | None, typer.Option(min=1, help="Attention heads.", rich_help_panel=_MODEL)] = None,
    negatives: Annotated[
        int | None,
        typer.Option(
            min=1, help="Negatives of a sampled softmax; without, it is over all items.", rich_help_panel=_MODEL
        ),
    ] = None,
    shared_negatives: Annotated[
        bool, typer.Option("--shared-negatives", help="All targets of a batch share them.", rich_help_panel=_MODEL)
    ] = False,
    flag: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help="Another of the encoder's flags: relative_bias=none, residual=llama, gate=true, inner=256, …; repeat "
            "it for more.",
            rich_help_panel=_MODEL,
        ),
    ] = None,
    vocabulary: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="lm: words; default: 512 of text and those of --semantic-ids, else 256 of each code.",
            rich_help_panel=_MODEL,
        ),
    ] = None,
    codes: Annotated[
        int | None,
        typer.Option(
            min=1, help="lm: tokens of an item; default: as --semantic-ids has them, else 3.", rich_help_panel=_MODEL
        ),
    ] = None,
    lora_rank: Annotated[
        int | None, typer.Option(min=1, help="lm: of adapters; without, all is trained.", rich_help_panel=_MODEL)
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Windows or rows of a batch.", rich_help_panel=_MACHINE)] = 128,
    device: Annotated[
        Literal["cpu", "gpu"], typer.Option(help="For the bytes that kernels keep.", rich_help_panel=_MACHINE)
    ] = "cpu",
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"],
        typer.Option(help="What a probe computes in.", rich_help_panel=_MACHINE),
    ] = "float32",
    probe: Annotated[
        bool,
        typer.Option("--probe", help="Train for 50 steps, and say how long it takes here.", rich_help_panel=_MACHINE),
    ] = False,
    folder: Annotated[
        Path,
        typer.Option(
            "--probes", metavar="DIR", help="Where probes are kept, to be made once.", rich_help_panel=_MACHINE
        ),
    ] = Path("runs/probes"),
    semantic_ids: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="lm: of semantic_ids/build.py, for a probe.", rich_help_panel=_MACHINE),
    ] = None,
    interactions: Annotated[
        str | None, typer.Option(metavar="SOURCE", help="Interactions, whose windows are counted and probed.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the account as JSON to this file too.")
    ] = None,
    split: SplitName = "leave-one-out",
    min_history: MinHistory = 3,
    user_column: UserColumn = None,
    item_column: ItemColumn = None,
    timestamp_column: TimestampColumn = None,
    position_column: PositionColumn = None,
    timestamp_unit: TimestampUnit = "auto",
    invalid_rows: InvalidRows = "error",
) -> None:
    """Say what training a model costs: weights, operations, memory; and with --probe seconds on this machine.

    Operations are those of matrix products, forwards and backwards, with attention and the loss. No speed is ever
    assumed: seconds are there with a probe alone, which is kept and not repeated.

    Example: `llmrec scale cost --encoder hstu --depth 8 --width 64 --items 3706 --tokens 1e6`

    Example: `llmrec scale cost --encoder sasrec --depth 4 --width 128 --interactions log.parquet --probe`
    """
    from llmrec.scaling.cost import cost_of
    from llmrec.scaling.probing import probe as measure
    from llmrec.scaling.throughput import seconds
    from llmrec.storage import write_json

    if probe and interactions is None:
        raise DataError("--probe trains a model, and there is nothing to train on. Name the log with --interactions.")
    if interactions is not None and (items is not None or tokens is not None):
        raise DataError("--items or --tokens is given beside --interactions, where they are counted. Leave it out.")
    if interactions is None and (tokens is None or (items is None and not encoder.startswith(_LANGUAGE))):
        raise DataError("Nothing says how many items and events there are. Give --items and --tokens, or a log.")
    found: Shape | LanguageShape
    if encoder.startswith(_LANGUAGE):
        _refuse(encoder, {"--items": items, "--negatives": negatives, "--shared-negatives": shared_negatives or None})
        sizes = _codebooks(vocabulary, codes, semantic_ids)
        found = _language(encoder, depth, width, *sizes, length, heads, lora_rank, device, flag)
    else:
        own = {"--vocabulary": vocabulary, "--codes": codes, "--lora-rank": lora_rank, "--semantic-ids": semantic_ids}
        _refuse(encoder, own)
        known = 2 if items is None else items  # with a log they are counted, below
        found = _sequence(encoder, depth, width, known, length, heads, negatives, shared_negatives, device, flag)
    given = {
        **{"user_column": user_column, "item_column": item_column, "timestamp_column": timestamp_column},
        **{"position_column": position_column, "timestamp_unit": timestamp_unit, "invalid_rows": invalid_rows},
    }
    read = {name: value for name, value in given.items() if value is not None}
    if interactions is None:
        whole, events = cost_of(found), float(tokens or 0)
    else:
        workload = _workload(interactions, read, split, min_history, found, length)
        whole, events = workload.cost(found), float(workload.tokens)
    measured, taken = None, None
    if probe:
        said = {**read, "interactions": str(interactions), "split": split, "min_history": min_history}
        arguments, script = _arguments(whole, said, length, batch, flag, semantic_ids)
        measured = measure(whole, events, arguments, script, folder=folder, dtype=dtype)
        taken = seconds(whole, events, epochs, [measured])
    account = _account(whole, encoder, events, epochs, batch, measured, taken)
    if json_file is not None:
        write_json(json_file, account)
    _show(account)


def _sequence(
    encoder: str,
    depth: int,
    width: int,
    items: int,
    length: int,
    heads: int | None,
    negatives: int | None,
    shared: bool,
    device: Any,
    flags: list[str] | None,
) -> "Shape":
    from llmrec.scaling.shape import Shape

    kind: Any = encoder
    return Shape(
        kind, depth, width, items, length, heads, negatives, shared, max_history=length, device=device,
        **_given(flags),
    )  # fmt: skip


def _refuse(encoder: str, given: dict[str, Any]) -> None:
    """Raises DataError for an option whose value nothing of this model would read."""
    if named := [name for name, value in given.items() if value is not None]:
        raise DataError(f"{named[0]} is given, and nothing of {encoder} hangs on it. Leave it out.")


def _codebooks(vocabulary: int | None, codes: int | None, ids: Path | None) -> tuple[int, int]:
    """Words, and tokens of an item: as they were said, else as the codes have them.

    Raises:
        DataError: if the codes contradict what was said.
    """
    if ids is None:
        levels = codes or _LEVELS
        return vocabulary or _TEXT + _CODES * levels, levels
    sizes = _sizes(ids)
    if codes is not None and codes != len(sizes):
        raise DataError(f"--codes is {codes}, and an item has {len(sizes)} in {ids}. Leave it out.")
    if vocabulary is not None and vocabulary <= sum(sizes):
        raise DataError(f"--vocabulary is {vocabulary}, and {ids} has {sum(sizes)} codes. Add the words of text.")
    return vocabulary or _TEXT + sum(sizes), len(sizes)


def _sizes(ids: Path) -> Sequence[int]:
    """How many codes the levels of semantic IDs have."""
    from llmrec.catalog import Catalog

    return Catalog.from_build(str(ids)).codebook_sizes


def _language(
    encoder: str,
    depth: int,
    width: int,
    vocabulary: int,
    codes: int,
    length: int,
    heads: int | None,
    rank: int | None,
    device: Any,
    flags: list[str] | None,
) -> "LanguageShape":
    from llmrec.scaling.language import LanguageShape

    if flags:
        raise DataError(f"--flag {flags[0]} is an encoder's, and {encoder} is a language model. Leave it out.")
    kind: Any = encoder.removeprefix(_LANGUAGE)
    return LanguageShape(kind, depth, width, vocabulary, codes, length, heads or 4, lora_rank=rank, device=device)


def _given(flags: list[str] | None) -> dict[str, Any]:
    """The values of NAME=VALUE, as a Shape takes them."""
    from llmrec.scaling.shape import OWNERS, Shape

    kinds = {entry.name: str(entry.type) for entry in fields(Shape)}
    known = sorted({*OWNERS, "time_buckets"} - {"heads"})
    found: dict[str, Any] = {}
    for text in flags or []:
        name, _, value = text.partition("=")
        if name not in known or not value:
            raise DataError(f"--flag is {text!r}. Write NAME=VALUE, with one of {', '.join(known)}.")
        if "bool" in kinds[name]:
            if value not in ("true", "false"):
                raise DataError(f"--flag {name} is {value!r}. Say true or false.")
            found[name] = value == "true"
        elif "int" in kinds[name]:
            if not value.isdecimal():
                raise DataError(f"--flag {name} is {value!r}. Give a whole number.")
            found[name] = int(value)
        else:
            found[name] = value
    return found


def _workload(
    source: str, read: dict[str, str], split: Any, min_history: int, shape: "Shape | LanguageShape", length: int
) -> "Workload":
    from llmrec.data.arguments import ColumnArguments, SplitArguments
    from llmrec.data.items import Items
    from llmrec.scaling.language import LanguageShape
    from llmrec.scaling.workload import Workload

    names: Any = read
    log = ColumnArguments(**names).read_interactions(source)
    made = SplitArguments(split=split, min_history=min_history).make(log, Items.from_interactions(log))
    if isinstance(shape, LanguageShape):
        return Workload.of_rows(made, length, "sequence")
    return Workload.of_windows(made, length)


def _arguments(
    whole: "Cost", said: dict[str, Any], length: int, batch: int, flags: list[str] | None, ids: Path | None
) -> tuple[list[str], str]:
    """The words that train the model, and the script that takes them."""
    from llmrec.scaling.language import LanguageShape

    shape = whole.shape
    values: dict[str, Any] = {
        **said,
        **{"num_hidden_layers": shape.depth, "hidden_size": shape.width, "max_history": length},
        **{"per_device_train_batch_size": batch, "num_attention_heads": shape.heads},
    }
    if isinstance(shape, LanguageShape):
        if ids is None or shape.lora_rank is not None:
            raise DataError(
                "A probe of a language model trains it from scratch, on semantic IDs. Name their folder with "
                "--semantic-ids, and leave --lora-rank out."
            )
        values |= {"model_type": shape.model_type, "intermediate_size": shape.inner_width, "semantic_ids": str(ids)}
        values |= {"tasks": "sequence", "prompt": "semantic_ids", "eval_users": 0}
        values |= {"text_vocab_size": shape.vocabulary - sum(_sizes(ids))}
        script = "train/sft.py"
    else:
        values |= {"encoder": shape.encoder}
        values |= {_LONG_NAMES.get(name, name): value for name, value in _given(flags).items()}
        if "attention_dropout" in values:
            values["attention_dropout"] = 0.1 if values["attention_dropout"] else 0.0
        if shape.negatives is not None:
            values |= {"loss": "sampled_softmax", "num_negatives": shape.negatives}
            values |= {"shared_negatives": True} if shape.shared_negatives else {}
        script = "train/seqrec.py"
    given = {name: value for name, value in values.items() if value is not None}
    return [word for name, value in given.items() for word in (f"--{name}", str(value))], script


def _account(
    whole: "Cost",
    encoder: str,
    tokens: float,
    epochs: float,
    batch: int,
    measured: "Probe | None",
    taken: float | None,
) -> dict[str, Any]:
    from dataclasses import asdict

    window = whole.window
    return {
        "encoder": encoder,
        "depth": whole.shape.depth,
        "width": whole.shape.width,
        "tokens": tokens,
        "epochs": epochs,
        "parameters": whole.parameters,
        "table_parameters": whole.table,
        "trained_parameters": whole.trained,
        "flops_per_token": whole.flops_per_token,
        "shares": {
            "layers": window.layers / window.total,
            "attention": window.attention / window.total,
            "loss": window.loss / window.total,
        },
        "flops": whole.flops(tokens, epochs),
        "batch": batch,
        "state_bytes": whole.state_bytes(),
        "activation_bytes": whole.activation_bytes(batch),
        "probe": None if measured is None else asdict(measured),
        "seconds": taken,
    }


def _show(account: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    shares = ", ".join(f"{name} {100 * share:.0f} %" for name, share in account["shares"].items())
    rows = [
        ("parameters", f"{account['parameters']:,}, {account['table_parameters']:,} of them in tables"),
        ("trained", f"{account['trained_parameters']:,}"),
        ("FLOPs a token", f"{account['flops_per_token']:.3g} ({shares})"),
        ("FLOPs of the training", f"{account['flops']:.3g}"),
        ("weights and optimizer", f"{account['state_bytes'] / 2**20:.1f} MiB"),
        (f"kept of a batch of {account['batch']}", f"{account['activation_bytes'] / 2**20:.1f} MiB"),
    ]
    if (probe := account["probe"]) is not None:
        rows += [
            ("probe", f"{1000 * probe['seconds_per_step']:.1f} ms a step on {probe['device']}, {probe['dtype']}"),
            ("utilisation", f"{100 * probe['mfu']:.1f} % of {probe['peak']:.3g} FLOP/s, measured"),
            ("training", f"{account['seconds']:.0f} s, without evaluations"),
        ]
    table = Table(title=f"{account['encoder']}, {account['depth']} x {account['width']}", title_justify="left")
    table.add_column("")
    table.add_column("")
    table.show_header = False
    for row in rows:
        table.add_row(*row)
    Console().print(table)
