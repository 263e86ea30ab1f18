"""Pilot: the trainings that a law is learnt from, as studies of train/seqrec.py or sft.py; kept as pilot.json."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from llmrec.exceptions import DataError, RecipeError
from llmrec.scaling.grid import PilotGrid, Trial
from llmrec.storage import digest_of, write_json
from llmrec.study.plan import StudyPlan, StudyRun

if TYPE_CHECKING:
    from llmrec.data.split import Split

FILE = "pilot.json"
LM = "lm:"  # before a recipe of train/sft.py
SEQUENCE_RECIPE = "sasrec.yaml"  # of train/recipes, for all encoders alike: only what is studied differs
# Flags that hang on the width: each width takes its encoder's own proportions.
_TIED = ("qk_dim", "v_dim", "intermediate_size", "gru_size")
_HEADLESS = ("gru4rec",)
# What a pilot decides for every training.
_OWN = ("encoder", "num_hidden_layers", "hidden_size", "train_share", "train_share_seed")
_LM_CUTOFFS = (5, 10, 20)  # of train/sft.py


@dataclass(frozen=True)
class ShareFacts:
    """What a share of the training users holds.

    Attributes:
        users: who have something to learn from.
        tokens: events that are learnt from.
        quality: S' = 1 / S of these events, S their real entropy in nats; None where S is 0.
    """

    users: int
    tokens: int
    quality: float | None


def share_facts(
    split: "Split", shares: Sequence[float], seed: int = 0, longest: int | None = None
) -> dict[float, ShareFacts]:
    """What each share of a split's training users holds, as train/seqrec.py and train/sft.py take it.

    Args:
        split: the whole one.
        shares: of its training users.
        seed: by which users are drawn; the shares are nested.
        longest: events of a user that are learnt from, the latest; None: all.

    Raises:
        DataError: if a share is none, or leaves nothing to learn from.
    """
    import numpy as np

    from llmrec.data.subset import learnt_events, learnt_split
    from llmrec.scaling.entropy import real_entropy

    found = {}
    for share in shares:
        learnt = learnt_split(split, share, seed)
        seen = learnt_events(learnt, longest)
        if not seen.any():
            raise DataError(
                f"{share:.0%} of the users have no training sequence of two interactions, so nothing can be learnt. "
                "Give larger shares, or more interactions."
            )
        entropy = real_entropy(learnt.rows[seen])
        found[share] = ShareFacts(
            len(np.unique(learnt.owner[seen])), int(seen.sum()), 1 / entropy if entropy > 0 else None
        )
    return found


@dataclass(frozen=True)
class PilotEncoder:
    """One encoder's part of a pilot.

    Attributes:
        name: as train/seqrec.py calls it, or `lm:NAME` for a recipe of train/sft.py.
        flags: of all its trainings, without those that the pilot sets.
    """

    name: str
    flags: Mapping[str, Any] = field(repr=False)

    @classmethod
    def read(
        cls, name: str, recipes: str | Path, recipe: str | None = None, overrides: Mapping[str, Any] | None = None
    ) -> Self:
        """The encoder with the flags of its recipe.

        Args:
            name: an encoder of train/seqrec.py, or `lm:RECIPE` with a recipe of train/sft.py, by its path or its name.
            recipes: the folder of recipes.
            recipe: of train/seqrec.py, for an encoder; default: `SEQUENCE_RECIPE`.
            overrides: flags over the recipe's; None takes one away.

        Raises:
            RecipeError: if the recipe cannot be read, or sets what a pilot varies.
        """
        from llmrec.study.arguments import read_base

        source = recipe or SEQUENCE_RECIPE
        if name.startswith(LM):
            source = name.removeprefix(LM)
            source = source if source.endswith((".yaml", ".yml")) else f"{source}.yaml"
            name = LM + Path(source).stem
        flags = {**read_base(source, recipes), **(overrides or {})}
        if taken := sorted({"seed", *_OWN} & set(overrides or {})):
            raise RecipeError(f"--override sets {taken[0]!r}, which a pilot sets itself. Leave it out.")
        if flags.get("backbone") is not None or flags.get("body") is not None:
            raise RecipeError(
                f"{name} begins with a checkpoint, which has one depth and one width. Name a recipe from scratch."
            )
        if flags.get("negatives") in ("in_batch", "mixed"):
            raise RecipeError(
                f"{name} takes its negatives {flags['negatives']}, and how many these are depends on each batch. Say "
                "negatives uniform or popularity with num_negatives, which a law can count."
            )
        if flags.get("reasoning", "none") != "none":
            raise RecipeError(
                f"{name} reasons ({flags['reasoning']}), and what thoughts cost is not in the cost model. Leave "
                "reasoning out, and add it to the size that is chosen."
            )
        # A seed of its own is the study's; the sizes are the grid's.
        given = set(overrides or {})
        foreign = ("num_attention_heads",) if name in _HEADLESS else ()  # one recipe holds for all encoders
        dropped = {"seed", *_OWN, *(flag for flag in (*_TIED, *foreign) if flag not in given)}
        kept = {key: value for key, value in flags.items() if key not in dropped and value is not None}
        return cls(name, kept)

    @property
    def script(self) -> str:
        """The stage that trains it."""
        return "train/sft.py" if self.name.startswith(LM) else "train/seqrec.py"

    @property
    def longest(self) -> int | None:
        """How many of a user's latest events are learnt from; None: all."""
        if self.flags.get("windows", "all") != "last":
            return None
        return int(self.flags.get("max_history", 50)) + 1

    @property
    def negatives(self) -> int | None:
        """Drawn for each target; None where the loss draws none."""
        if self.name.startswith(LM) or self.flags.get("loss", "softmax") == "softmax":
            return None
        return int(self.flags.get("num_negatives", 128))


@dataclass(frozen=True)
class Pilot:
    """A pilot as it was planned.

    Attributes:
        data: flags of all trainings that say what they are trained and tested on: interactions, columns, split.
        sha256: of the interactions' file.
        metric: of the test, such as NDCG@10.
        share_seed: by which users are drawn.
        budget_minutes: of the whole pilot.
        encoders: by name.
        shares: what each share holds, by encoder.
        grids: by encoder.
        flops: of each trial, by encoder, in the order of its grid; None where they were not estimated.
        basis: how seconds were estimated, JSON-ready.

    Raises:
        RecipeError: if the metric is none that the trainings are tested by.
    """

    data: Mapping[str, Any]
    sha256: str
    metric: str
    share_seed: int
    budget_minutes: float
    encoders: Mapping[str, PilotEncoder]
    shares: Mapping[str, Mapping[float, ShareFacts]]
    grids: Mapping[str, PilotGrid]
    flops: Mapping[str, Sequence[float | None]]
    basis: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_metric(self.metric, self.encoders)

    @property
    def seconds(self) -> float:
        """That all trainings take, one after another, by estimate."""
        return sum(grid.seconds for grid in self.grids.values())

    def study(self, encoder: str) -> StudyPlan:
        """The study of an encoder: a variant for each cell; `runs` says which seeds of it are trained.

        Raises:
            RecipeError: if the flags make no plan.
        """
        entry, grid = self.encoders[encoder], self.grids[encoder]
        k = int(self.metric.rpartition("@")[2])
        flags = {**entry.flags, **self.data, "train_share_seed": self.share_seed}
        if entry.script == "train/sft.py":
            flags.setdefault("test_users", -1)
        else:
            asked = flags.get("ks", [5, 10])
            if not isinstance(asked, list) or not all(isinstance(one, int) for one in asked):
                raise RecipeError(f"{encoder} has the cut-offs ks {asked!r}. Give a list, such as ks=[5,10].")
            flags |= {"encoder": encoder, "ks": sorted({*asked, k})}
        variants = {
            variant_of(encoder, trial): {
                "num_hidden_layers": trial.depth,
                "hidden_size": trial.width,
                "train_share": trial.share,
            }
            for trial in grid.trials
        }
        seeds = sorted({trial.seed for trial in grid.trials})
        return StudyPlan(f"A pilot of {encoder}", flags, variants, seeds=seeds, metrics=[self.metric])

    def runs(self, encoder: str) -> list[tuple[Trial, StudyRun]]:
        """An encoder's trials with their trainings, in the grid's order."""
        known = {(run.variant, run.seed): run for run in self.study(encoder).runs}
        return [(trial, known[variant_of(encoder, trial), trial.seed]) for trial in self.grids[encoder].trials]

    def save(self, folder: str | Path) -> Path:
        """Writes pilot.json, atomically."""
        path = Path(folder) / FILE
        encoders = {}
        for name, entry in self.encoders.items():
            grid = self.grids[name]
            encoders[name] = {
                "script": entry.script,
                "flags": dict(entry.flags),
                "shares": [{"share": share, **asdict(facts)} for share, facts in self.shares[name].items()],
                "seconds": grid.seconds,
                "budget": grid.budget,
                "trials": [
                    {**asdict(trial), "flops": flops}
                    for trial, flops in zip(grid.trials, self.flops[name], strict=True)
                ],
                "left_out": [{**asdict(trial), "as": reason} for trial, reason in grid.left_out],
                "notes": grid.notes(),
            }
        document = {
            "data": dict(self.data),
            "sha256": self.sha256,
            "metric": self.metric,
            "train_share_seed": self.share_seed,
            "budget_minutes": self.budget_minutes,
            "seconds": self.seconds,
            "basis": dict(self.basis),
            "encoders": encoders,
        }
        write_json(path, document)
        return path

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """What `save` wrote.

        Raises:
            DataError: if the folder has no pilot, or it cannot be read.
        """
        path = Path(folder) / FILE
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            parts = found["encoders"]
            grids, flops = {}, {}
            for name, part in parts.items():
                flops[name] = [trial.pop("flops") for trial in part["trials"]]
                left_out = tuple((Trial(**one), reason) for one in part["left_out"] for reason in [one.pop("as")])
                trials = tuple(Trial(**trial) for trial in part["trials"])
                grids[name] = PilotGrid(trials, left_out, part["budget"])
            return cls(
                data=found["data"],
                sha256=found["sha256"],
                metric=found["metric"],
                share_seed=found["train_share_seed"],
                budget_minutes=found["budget_minutes"],
                encoders={name: PilotEncoder(name, part["flags"]) for name, part in parts.items()},
                shares={
                    name: {one.pop("share"): ShareFacts(**one) for one in part["shares"]}
                    for name, part in parts.items()
                },
                grids=grids,
                flops=flops,
                basis=found["basis"],
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{path} is no pilot that can be read: {type(error).__name__}: {error}. Make one by `llmrec scale "
                "plan`."
            ) from error

    def check_data(self) -> None:
        """Raises DataError if the interactions are not those that the pilot was planned on."""
        source = str(self.data["interactions"])
        if (now := digest_of(source)) != self.sha256:
            raise DataError(
                f"{source} is another than when the pilot was planned, or is not there: its sha256 is {now[:12]}, and "
                f"was {self.sha256[:12]}. Put the old one back, or plan a pilot anew in another folder."
            )


def variant_of(encoder: str, trial: Trial) -> str:
    """What a trial's cell is called among a pilot's folders.

    >>> variant_of("lm:small", Trial(2, 64, 0.5, 0, 10, 1.0))
    'lm.small-2x64-share0.5'
    """
    return re.sub(r"[^A-Za-z0-9.+_-]", ".", f"{encoder}-{trial.depth}x{trial.width}-share{trial.share!r}")


def check_metric(metric: str, encoders: Sequence[str] | Mapping[str, Any]) -> None:
    """Raises RecipeError for a metric that the trainings of these encoders are not tested by."""
    match = re.fullmatch(r"(HR|NDCG|MRR)@([1-9]\d*)", metric)
    if not match:
        raise RecipeError(f"The metric is {metric!r}. Name one such as NDCG@10, HR@10 or MRR@10.")
    if any(name.startswith(LM) for name in encoders) and int(match[2]) not in _LM_CUTOFFS:
        raise RecipeError(f"The metric is {metric}, and train/sft.py tests at 5, 10 and 20. Take one of these.")
