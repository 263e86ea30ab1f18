"""`llmrec quickstart`: every stage once, by the scripts that a user runs, and three users served over HTTP."""

import fcntl
import json
import math
import os
import shlex
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from llmrec.data.arguments import ColumnArguments, SplitArguments, SplitName
from llmrec.data.interactions import Interactions, InvalidRows
from llmrec.data.items import Items
from llmrec.data.sample import make_sample
from llmrec.data.split import Split
from llmrec.data.timestamps import TimestampUnit
from llmrec.engine.launch import check_port, running_server
from llmrec.exceptions import DataError, StageError
from llmrec.guard import run as run_guarded
from llmrec.stages import stage_command, stage_path
from llmrec.storage import write_json

_STEPS = 6
_SHOWN_USERS = 3
_SAMPLE_EPOCHS = 8
_STAGE_ENVIRONMENT = {
    # Threads that spin while they wait keep the cores from whatever else runs on a small machine.
    "OMP_WAIT_POLICY": "passive",
    # Small steps allocate and free the same large blocks: kept, they need not be mapped and cleared each time.
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 31),
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONUNBUFFERED": "1",
}


class _Run:
    """One quickstart: its folders, its clock and its console."""

    def __init__(self, out: Path) -> None:
        """Takes the folder for itself, and removes the results of an earlier run, which are this one's to write.

        Raises:
            StageError: if another quickstart is using the folder.
        """
        self.out = out
        out.mkdir(parents=True, exist_ok=True)
        self._lock = open(out / ".lock", "w")  # noqa: SIM115 (held until this process ends)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise StageError(f"Another quickstart is using {out}. Wait for it, or give another --out.") from error
        for name in ("evaluation.json", "result.json"):
            (out / name).unlink(missing_ok=True)
        self.begin = time.monotonic()
        # Where nobody watches, lines are as long as they are: a log is searched, not read column by column.
        self.console = Console(width=None if sys.stdout.isatty() else 140)
        self.commands: list[str] = []
        self._step = 0
        self._environment = _STAGE_ENVIRONMENT | dict(os.environ)

    def announce(self, title: str) -> None:
        self._step += 1
        self.console.print(Rule(f"[{self._step}/{_STEPS}] {title}   ({self.seconds():.0f} s)", align="left"))

    def say(self, text: str) -> None:
        """Prints a line that may hold names and paths: no markup, no colours, no line breaks of rich's own."""
        self.console.print(text, soft_wrap=True, markup=False, highlight=False)

    def seconds(self) -> float:
        return time.monotonic() - self.begin

    def stage(self, name: str, arguments: Sequence[str], launcher_args: Sequence[str] = ()) -> None:
        """Runs one script in a process of its own, its output on this terminal; raises StageError if it fails."""
        command = stage_command(name, arguments, launcher_args=launcher_args)
        self.commands.append(shlex.join(["python", *command[1:]]))
        self.console.print(f"$ {self.commands[-1]}", style="dim", soft_wrap=True, markup=False, highlight=False)
        if (code := run_guarded(command, self._environment)) != 0:
            raise StageError(
                f"{name} ended with code {code}; what it said is above. Mend that and repeat the command: finished "
                "stages are quick, and training continues from its last checkpoint."
            )


def quickstart(
    interactions: Path | None,
    items: Path | None,
    out: Path,
    user_column: str | None,
    item_column: str | None,
    timestamp_column: str | None,
    position_column: str | None,
    title_column: str | None,
    timestamp_unit: TimestampUnit,
    invalid_rows: InvalidRows,
    split: SplitName,
    seed: int,
    epochs: float | None,
    embedding_model: str | None,
    port: int,
    keep_serving: bool,
) -> None:
    """Interactions and items -> semantic IDs -> fine-tuned model -> evaluation -> HTTP server -> recommendations.

    Leaves `result.json`, `artefact/` and every stage's folder in `out`.

    Raises:
        DataError: if the files cannot be read, or an item file comes without interactions.
        StageError: if a stage fails, or another quickstart uses `out`.
        EngineError: if the port is taken, or the server does not start.
    """
    if epochs is not None and not 0 < epochs < math.inf:
        raise DataError(f"--epochs {epochs} is no number of passes. Give one above 0.")
    port = port or _free_port()
    check_port(port)  # now, not after the training
    run = _Run(out)
    given: dict[str, Any] = {
        "user_column": user_column,
        "item_column": item_column,
        "timestamp_column": timestamp_column,
        "position_column": position_column,
        "title_column": title_column,
    }
    columns = ColumnArguments(
        timestamp_unit=timestamp_unit,
        invalid_rows=invalid_rows,
        **{name: value for name, value in given.items() if value is not None},
    )
    run.announce("Data")
    log, table = _data(run, interactions, items, columns, seed)
    parts = SplitArguments(split).make(log, table)
    for name, value in parts.summary().items():
        run.console.print(
            f"  {name.replace('_', ' ')}: {value:,}" if isinstance(value, int) else f"  {name}: {value:.4f}"
        )
    data = {"--interactions": str(out / "data/interactions.parquet")}
    splitting = {"--split": split}
    table_file = {"--items": str(out / "data/items.parquet")}

    run.announce("Item texts to embeddings")
    model = {"--model": embedding_model} if embedding_model else {}
    run.stage("semantic_ids/embed.py", _flags(table_file | {"--out": str(out / "embeddings")} | model))

    run.announce("Embeddings to semantic IDs")
    folders = {"--embeddings": str(out / "embeddings"), "--out": str(out / "semantic_ids"), "--seed": str(seed)}
    run.stage("semantic_ids/build.py", _flags(table_file | data | splitting | folders))

    run.announce("Fine-tuning a language model to continue histories")
    recipe = "quickstart" if interactions is None else "llama_scratch"
    passes = epochs if epochs is not None else (_SAMPLE_EPOCHS if interactions is None else _epochs(len(log)))
    training = {
        "--config": str(stage_path(f"train/recipes/{recipe}.yaml")),
        "--semantic_ids": str(out / "semantic_ids"),
        "--artefact": str(out / "artefact"),
        "--num_train_epochs": f"{passes:g}",
        "--seed": str(seed),
    }
    single = ["--config_file", str(stage_path("train/accelerate/single.yaml"))]
    run.stage("train/sft.py", _flags(training | data | splitting), single)

    server_log = out / "server.log"
    with running_server(out / "artefact", port, server_log, max_num_seqs=32) as server:
        run.announce("Evaluation on held-out items, while vLLM starts")
        run.say(f"  server log: {server_log}")
        scoring = {"--artefact": str(out / "artefact"), "--out": str(out / "evaluation.json"), "--seed": str(seed)}
        run.stage("train/score.py", _flags(scoring | data))

        run.announce("Recommendations over HTTP")
        server.wait_until_ready()
        answers = _fetch(server.url, parts, table)
        evaluation = json.loads((out / "evaluation.json").read_text(encoding="utf-8"))
        result = _result(evaluation, answers, set(table.ids), run.seconds())
        write_json(out / "result.json", result)
        _show_users(run.console, answers, table)
        _show_end(run, result, synthetic=interactions is None, port=port, serving=keep_serving)
        if keep_serving:
            server.process.wait()


def _data(
    run: _Run, interactions: Path | None, items: Path | None, columns: ColumnArguments, seed: int
) -> tuple[Interactions, Items]:
    """Reads or makes the data, and writes it under canonical column names."""
    if interactions is None:
        if items is not None:
            raise DataError(
                f"--items {items} came without --interactions. Give both files, or neither for the sample."
            )
        run.console.print(
            "  A synthetic sample, made up by llmrec with a seed: invented items, invented users. Its numbers show "
            "that everything works; they say nothing about real people."
        )
        log_frame, item_frame = make_sample(seed=seed)
        log, table = Interactions.from_frame(log_frame), Items.from_frame(item_frame)
    else:
        log = columns.read_interactions(interactions)
        table = columns.read_items(items) if items is not None else Items.from_interactions(log)
        table = table.with_missing(log)
        if table.appended:
            run.console.print(
                f"  {table.appended:,} items have interactions but no row in the item table: kept, by id."
            )
    log.write(run.out / "data/interactions.parquet")
    table.write(run.out / "data/items.parquet")
    run.say(f"  {run.out / 'data'}: {len(log):,} interactions, {len(table):,} items")
    return log, table


def _epochs(interactions: int) -> float:
    """Enough passes for small data, few for large: the time of a first run stays bounded by the data's size."""
    return float(max(3, min(25, round(600_000 / max(1, interactions)))))


def _fetch(url: str, split: Split, items: Items) -> list[dict[str, Any]]:
    """Answers of the running server for three users with histories worth reading, the held-out item beside them."""
    histories, targets, users = split.histories("test"), split.targets("test"), split.users("test")
    readable = [user for user, history in enumerate(histories) if 4 <= len(history) <= 8]
    chosen = (readable or list(range(len(histories))))[:: max(1, len(readable) // _SHOWN_USERS)][:_SHOWN_USERS]
    answers = []
    for user in chosen:
        history = [items.ids[row] for row in histories[user]]
        with httpx.Client(trust_env=False, timeout=120.0) as client:
            response = client.post(f"{url}/v1/recommend", json={"history": history, "k": 5})
        response.raise_for_status()
        answers.append(
            {
                "user": users[user],
                "history": history,
                "next": items.ids[targets[user]],
                "items": response.json()["items"],
            }
        )
    return answers


def _result(
    evaluation: dict[str, Any], answers: list[dict[str, Any]], catalog: set[str], seconds: float
) -> dict[str, Any]:
    """`result.json`: the evaluation, its rates over the lists of all systems and over those that HTTP gave."""
    lists = [[item["id"] for item in answer["items"]] for answer in answers]
    duplicates = sum(len(found) - len(set(found)) for found in lists)
    invalid = sum(item not in catalog for found in lists for item in found)
    shown = max(1, sum(map(len, lists)))
    return evaluation | {
        "invalid_rate": max(evaluation["invalid_rate"], invalid / shown),
        "duplicate_rate": max(evaluation["duplicate_rate"], duplicates / shown),
        "served": answers,
        "seconds": round(seconds, 1),
    }


def _show_users(console: Console, answers: list[dict[str, Any]], items: Items) -> None:
    titles = dict(zip(items.ids, items.titles, strict=True))
    for answer in answers:
        table = Table("rank", "recommended", "probability", title=Text(f"User {answer['user']}"), title_justify="left")
        for item in answer["items"]:
            mark = "   (what they took next)" if item["id"] == answer["next"] else ""
            probability = f"{100 * math.exp(item['log_probability']):.2f} %"
            table.add_row(str(item["rank"]), Text(f"{item['title'][:80]}{mark}"), probability)
        console.print(table)
        console.print(
            "  after: " + "; ".join(titles[i][:60] for i in answer["history"]), markup=False, highlight=False
        )


def _show_end(run: _Run, result: dict[str, Any], synthetic: bool, port: int, serving: bool) -> None:
    out = run.out
    table = Table(
        "system", "HR@10", "NDCG@10", "invalid", "duplicate", title="Test items, full ranking", title_justify="left"
    )
    for name, metrics in result["systems"].items():
        rates = (f"{metrics['invalid_rate']:.4f}", f"{metrics['duplicate_rate']:.4f}")
        table.add_row(name, f"{metrics['HR@10']:.4f}", f"{metrics['NDCG@10']:.4f}", *rates)
    run.console.print(table)
    if synthetic:
        run.console.print("The data is synthetic: compare these numbers with each other, not with any paper's.")
    say = run.say
    say(f"Done in {run.seconds():.0f} s. Numbers: {out / 'result.json'}; model: {out / 'artefact'}/")
    say("")
    say("Serve it:          " + shlex.join(["llmrec", "serve", str(out / "artefact"), "--port", "8000"]))
    body = json.dumps({"history": result["served"][0]["history"][-3:], "k": 10}) if result["served"] else "{}"
    say(f"Ask it:            curl localhost:8000/v1/recommend -H 'Content-Type: application/json' -d '{body}'")
    say("Look at it:        llmrec demo http://localhost:8000")
    say("Your own data:     llmrec quickstart --interactions FILE --items FILE --out runs/mine")
    say("                   (parquet, csv or jsonl; --user-column, --item-column, … name your columns)")
    say("Stage by stage, as it was run here:")
    for command in run.commands:
        say(f"  {command}")
    if serving:
        say(f"Serving on http://127.0.0.1:{port} (docs at /docs); Ctrl-C ends it.")


def _flags(options: dict[str, str]) -> list[str]:
    return [part for pair in options.items() for part in pair]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
