"""Plans a pilot: what each share of the users holds, which trainings fit the budget, whether their flags are right."""

import io
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmrec.exceptions import DataError, LLMRecError, RecipeError
from llmrec.scaling.grid import GridRequest, PilotGrid, Seconds, fit_grid
from llmrec.scaling.pilot import Pilot, PilotEncoder, ShareFacts, check_metric, share_facts
from llmrec.storage import digest_of

if TYPE_CHECKING:
    from llmrec.data.split import Split

# Flags that say which interactions are learnt from.
_READ = frozenset(
    (
        *("user_column", "item_column", "timestamp_column", "position_column", "timestamp_unit", "invalid_rows"),
        *("split", "valid_share", "test_share", "valid_time", "test_time", "targets", "min_history", "split_seed"),
        *("ties", "tie_seed"),
    )
)
# (depth, width, tokens) -> floating-point operations of one training
FlopCount = Callable[[int, int, int], float]


@dataclass(frozen=True)
class Estimate:
    """What an encoder's trainings are thought to cost.

    Attributes:
        seconds: of one, by depth, width and tokens.
        flops: of one, likewise; None: not known.
        basis: where that comes from, JSON-ready.
    """

    seconds: Seconds
    flops: FlopCount | None = None
    basis: Mapping[str, Any] = field(default_factory=dict)


def plan_pilot(
    encoders: Sequence[PilotEncoder],
    request: GridRequest,
    split: "Split",
    data: Mapping[str, Any],
    budget_minutes: float,
    estimate: Callable[[PilotEncoder], Estimate],
    metric: str = "NDCG@10",
    share_seed: int = 0,
) -> Pilot:
    """The pilot of some encoders that fits a budget; nothing is trained and nothing written.

    Args:
        encoders: one or more; each gets the same grid, before the budget. They share it alike, and what one does not
            need goes to the others (`share_budget`).
        request: what to vary.
        split: the whole one, of the interactions that `data` names.
        data: flags of all trainings: `interactions`, and those of columns and split.
        budget_minutes: for all trainings, one after another.
        estimate: what an encoder's trainings cost.
        metric: of the test.
        share_seed: by which users are drawn.

    Raises:
        DataError: if the budget has no room for a grid that a law can be fitted to.
        RecipeError: if a training's flags are not its script's, or do not go together, or an encoder is there twice.
    """
    names = [entry.name for entry in encoders]
    if not names or len(set(names)) < len(names):
        raise RecipeError(f"The encoders are {', '.join(names) or 'none'}. Name one or more, each once.")
    check_metric(metric, names)
    # Before anything is made of the flags, and measured with them.
    for entry in encoders:
        check_data(entry, data)
    asked = fit_grid(request, dict.fromkeys(request.shares, 1), lambda *_: 1.0, float("inf"))
    pilot = Pilot(
        data=dict(data),
        sha256=digest_of(str(data["interactions"])),
        metric=metric,
        share_seed=share_seed,
        budget_minutes=budget_minutes,
        encoders={entry.name: entry for entry in encoders},
        shares={},
        grids=dict.fromkeys(names, asked),
        flops={},
    )
    for name in names:
        check_flags(pilot, name)
    # Those of one length learn from the same events.
    facts = {
        longest: share_facts(split, request.shares, share_seed, longest)
        for longest in {entry.longest for entry in encoders}
    }
    shares = {entry.name: facts[entry.longest] for entry in encoders}
    estimates = {entry.name: estimate(entry) for entry in encoders}
    grids = share_budget(request, shares, {name: found.seconds for name, found in estimates.items()}, budget_minutes)
    flops: dict[str, list[float | None]] = {}
    for name, grid in grids.items():
        count = estimates[name].flops
        flops[name] = [count(one.depth, one.width, one.tokens) if count else None for one in grid.trials]
    basis = {name: dict(found.basis) for name, found in estimates.items()}
    return replace(pilot, shares=shares, grids=grids, flops=flops, basis=basis)


def share_budget(
    request: GridRequest,
    shares: Mapping[str, Mapping[float, ShareFacts]],
    seconds: Mapping[str, Seconds],
    budget_minutes: float,
) -> dict[str, PilotGrid]:
    """A grid for each encoder, in the order of `seconds`: equal parts of the budget, and what one has no use for goes
    to the others.

    Raises:
        DataError: if an encoder's part has no room for a grid that a law can be fitted to; it names the encoder.
    """
    tokens = {name: {share: facts.tokens for share, facts in held.items()} for name, held in shares.items()}
    if not 0 < budget_minutes < float("inf"):
        raise DataError(f"The budget is {budget_minutes:g} minutes. Give more than none, and an end.")
    whole = {name: fit_grid(request, tokens[name], seconds[name], float("inf")).seconds for name in seconds}
    left, found = budget_minutes, {}
    for place, name in enumerate(sorted(whole, key=whole.__getitem__)):
        part = left / (len(whole) - place)
        try:
            found[name] = fit_grid(request, tokens[name], seconds[name], part)
        except DataError as error:
            if len(whole) == 1:
                raise
            raise DataError(f"{name} has {part:.3g} of the budget's {budget_minutes:g} minutes: {error}") from error
        left -= found[name].seconds / 60
    return {name: found[name] for name in seconds}


def check_data(entry: PilotEncoder, data: Mapping[str, Any]) -> None:
    """Raises RecipeError if an encoder's flags would have it learn from other data, or split them in another way.

    What a share holds is told by the plan's own split: a training has to learn from the same.
    """
    from llmrec.data.arguments import ColumnArguments, SplitArguments

    known = {one.name: one.default for one in (*fields(ColumnArguments), *fields(SplitArguments)) if one.name in _READ}
    for name in sorted({"interactions", *known} & entry.flags.keys()):
        if (planned := data.get(name, known.get(name))) != (said := entry.flags[name]):
            raise RecipeError(
                f"{entry.name} has the flag {name} {said!r}, and the pilot is planned with {planned!r}. Tell the "
                "plan, by its own option, and leave it out of the recipe and of --override."
            )


def check_flags(pilot: Pilot, encoder: str) -> None:
    """Reads every size's flags as the script will, before hours are spent on the first training.

    Raises:
        RecipeError: if they are not the script's, or do not go together; it names the encoder, and maybe the size.
    """
    from llmrec.study.place import RunPlace
    from llmrec.study.runner import write_recipe

    runs = pilot.runs(encoder)
    with tempfile.TemporaryDirectory() as folder:
        place = RunPlace(folder, runs[0][1])
        place.folder.mkdir()
        words = ["--config", str(write_recipe(place)), "--artefact", str(place.artefact)]
        read = _read_sft if pilot.encoders[encoder].script == "train/sft.py" else _read_seqrec
        which = encoder
        try:
            with redirect_stderr(io.StringIO()) as said:
                check = read(words)
            for depth, width in dict.fromkeys((trial.depth, trial.width) for trial, _ in runs):
                which = f"{encoder}, depth {depth}, width {width}"
                check(depth, width)
        except LLMRecError as error:
            raise RecipeError(f"{which}: {error}") from error
        except SystemExit as error:  # argparse's, of a value that is none; its last line says which
            why = said.getvalue().strip().rpartition("error: ")[2]
            raise RecipeError(f"{which}: {why}. Give the flag another value, or leave it out.") from error


def _read_seqrec(words: Sequence[str]) -> Callable[[int, int], None]:
    """Checks the flags of a training; returns what checks a depth and a width with them."""
    import torch
    from transformers import AutoModel

    from llmrec.data.arguments import ColumnArguments, SplitArguments
    from llmrec.losses.arguments import LossArguments
    from llmrec.script import parse, parser
    from llmrec.sequence.arguments import EncoderArguments, EventArguments, ItemArguments, SequenceArguments
    from llmrec.training.arguments import StageArguments

    arguments = (
        *(SequenceArguments, ColumnArguments, SplitArguments, EncoderArguments, ItemArguments, EventArguments),
        *(LossArguments, StageArguments),
    )
    data, _, _, encoder, item, _, losses, _ = parse(parser(arguments, None), words)
    for part in (data, item, losses):
        part.check()

    def check(depth: int, width: int) -> None:
        config = replace(encoder, num_hidden_layers=depth, hidden_size=width).config(1)
        with torch.device("meta"):  # its checks without its weights
            AutoModel.from_config(config)

    return check


def _read_sft(words: Sequence[str]) -> Callable[[int, int], None]:
    """As `_read_seqrec`."""
    from llmrec.backbones.causal_lm import BackboneArguments, build_config
    from llmrec.data.arguments import ColumnArguments, SplitArguments
    from llmrec.script import parse, parser
    from llmrec.tasks.arguments import DataArguments
    from llmrec.training.arguments import FineTuningArguments

    arguments = (DataArguments, ColumnArguments, SplitArguments, BackboneArguments, FineTuningArguments)
    data, _, _, backbone, training = parse(parser(arguments, None), words)
    data.check(training.max_steps)
    backbone.check()
    for folder in (data.semantic_ids, data.items):
        if folder is not None and not Path(folder).exists():
            raise RecipeError(f"There is no {folder}. Name the codes of semantic_ids/build.py, or the item table.")

    def check(depth: int, width: int) -> None:
        build_config(replace(backbone, num_hidden_layers=depth, hidden_size=width), 512, 64)

    return check
