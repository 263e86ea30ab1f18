"""StudyPlan: which trainings a study is made of. Knows neither scripts, folders nor results."""

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llmrec.exceptions import RecipeError

Flags = dict[str, Any]

# What the study itself decides for every run.
_OWN = frozenset({"artefact", "output_dir", "seed", "system", "fresh", "config"})
# What names a file as it is: a cell's name is that of its system and of its folders.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+_-]{0,79}")
_OTHER = re.compile(r"[^A-Za-z0-9.+_-]+")


@dataclass(frozen=True)
class StudyRun:
    """One training.

    Attributes:
        variant: the variant's name.
        axes: the value of each axis, by its flag.
        seed: of the training.
        flags: all flags that decide it, the seed included; none of them is None.
    """

    variant: str
    axes: Mapping[str, Any]
    seed: int
    flags: Mapping[str, Any] = field(repr=False)

    @property
    def cell(self) -> str:
        """What all seeds of it are called: its system's name.

        >>> StudyRun("hstu", {"num_hidden_layers": 8}, 0, {}).cell
        'hstu-num_hidden_layers=8'
        """
        parts = [f"{name}={_OTHER.sub('_', spelt(value))}" for name, value in self.axes.items()]
        return "-".join([self.variant, *parts])


@dataclass(frozen=True)
class StudyPlan:
    """A grid of trainings: variants times axes times seeds, over common flags.

    Attributes:
        title: what is studied.
        flags: of all runs.
        variants: flags by the variant's name, which override the common ones; None takes a flag away.
        axes: the values that each further flag takes; all combinations are run, for every variant. They override the
            variants.
        seeds: one or more.
        metrics: of the test, such as "NDCG@10", or of a slice, "later_day NDCG@10"; the first is plotted.
        note: what a reader has to know.
        published: what was published, by the name of a variant (or a variant with its axes) and the metric.
        reference: the variant that every other is compared with, at the same axes; "" for none.

    Raises:
        RecipeError: if the plan has no runs, two equal ones, or a name or flag that cannot be.
    """

    title: str
    flags: Mapping[str, Any]
    variants: Mapping[str, Mapping[str, Any]]
    axes: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    seeds: Sequence[int] = (0,)
    metrics: Sequence[str] = ("NDCG@10", "HR@10")
    note: str = ""
    published: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    reference: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.variants, Mapping) or not self.variants:
            raise RecipeError("The study has no variants. Name at least one, with the flags in which it differs.")
        for name, flags in self.variants.items():
            if not isinstance(name, str) or not _NAME.fullmatch(name):
                raise RecipeError(f"{name!r} cannot be a variant's name. Use letters, digits and . + _ -, up to 80.")
            if not isinstance(flags, Mapping):
                raise RecipeError(f"The variant {name!r} is {flags!r}. Give its flags as names with values, or {{}}.")
        for name, values in self.axes.items():
            if not isinstance(values, Sequence) or isinstance(values, str) or not values:
                raise RecipeError(f"The axis {name} has the values {values!r}. Give a list of one or more.")
        for flags in (self.flags, self.axes, *self.variants.values()):
            if taken := sorted(_OWN & flags.keys()):
                raise RecipeError(f"The study has {taken[0]!r} among its flags, which it sets itself. Leave it out.")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds) or min(self.seeds) < 0:
            raise RecipeError(f"The seeds are {list(self.seeds)}. Give one or more, all different, none negative.")
        known = r"(\S+ )?(HR|NDCG|MRR)@[1-9]\d*"  # maybe a slice's
        if not self.metrics or not all(re.fullmatch(known, metric) for metric in self.metrics):
            raise RecipeError(f"The metrics are {list(self.metrics)}. Name such as NDCG@10 and later_day HR@10.")
        cells = [run.cell for run in self.runs if run.seed == self.seeds[0]]
        if repeated := [cell for cell in cells if cells.count(cell) > 1]:
            raise RecipeError(f"The study has two runs of the name {repeated[0]!r}. Give an axis each value once.")
        if unknown := sorted(set(self.published) - set(cells) - set(self.variants)):
            raise RecipeError(f"What was published names {unknown[0]!r}, which is no variant. Name one of {cells}.")
        if self.reference and self.reference not in self.variants:
            raise RecipeError(
                f"The reference {self.reference!r} is no variant of the study. Name one of {', '.join(self.variants)}."
            )

    @property
    def runs(self) -> list[StudyRun]:
        """All runs: those of the first seed, variant by variant, then those of the next."""
        found = []
        for seed in self.seeds:
            for variant, own in self.variants.items():
                for values in itertools.product(*self.axes.values()):
                    axes = dict(zip(self.axes, values, strict=True))
                    flags = {**self.flags, **own, **axes, "seed": seed}
                    kept = {name: value for name, value in flags.items() if value is not None}
                    found.append(StudyRun(variant, axes, seed, kept))
        return found

    @property
    def cells(self) -> list[str]:
        """The names of what differs in more than its seed, in order."""
        return list(dict.fromkeys(run.cell for run in self.runs))

    @property
    def curve(self) -> str | None:
        """The axis that a curve is drawn over: the first that takes two numbers or more; None if none does."""
        for name, values in self.axes.items():
            numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
            if len(numbers) == len(values) > 1:
                return name
        return None

    def reference_of(self, run: StudyRun) -> str:
        """The cell that a run is compared with: of the reference variant, at the same values of the axes."""
        return StudyRun(self.reference, run.axes, run.seed, {}).cell

    def chosen(self, names: Sequence[str]) -> list[StudyRun]:
        """The runs of these variants or cells; all for no names.

        Raises:
            RecipeError: if a name is neither.
        """
        runs = self.runs
        for name in names:
            if name not in self.variants and name not in self.cells:
                raise RecipeError(f"The study has no {name!r}. Name one of {', '.join(self.cells)}.")
        return [run for run in runs if not names or run.variant in names or run.cell in names]


def spelt(value: Any) -> str:
    """A flag's value as a recipe writes it.

    >>> spelt(True), spelt(0.001), spelt([5, 10])
    ('true', '0.001', '5 10')
    """
    if isinstance(value, bool):
        return str(value).lower()
    return " ".join(map(spelt, value)) if isinstance(value, list | tuple) else str(value)
