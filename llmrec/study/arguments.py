"""A study as flags: the values of its recipe, its data, and which of its runs are run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmrec.exceptions import RecipeError
from llmrec.study.place import DATA
from llmrec.study.plan import StudyPlan


@dataclass
class StudyArguments:
    """What is studied, on which data, and which runs are run now."""

    interactions: str = field(metadata={"help": "Interactions: parquet, csv, tsv or jsonl, gzipped or not."})
    runs: str = field(metadata={"help": "Folder of the study: a folder for each run, results, table and page."})
    title: str = field(default="Study", metadata={"help": "What is studied; heading of its page."})
    base: str | None = field(
        default=None, metadata={"help": "A recipe of train/seqrec.py, which all runs begin with; beside the study's."}
    )
    common: dict[str, Any] | None = field(
        default=None, metadata={"help": "In a recipe: flags of all runs, over the base's. null takes one away."}
    )
    variants: dict[str, Any] | None = field(
        default=None, metadata={"help": "In a recipe: by name, the flags in which each differs."}
    )
    axes: dict[str, Any] | None = field(
        default=None, metadata={"help": "In a recipe: by flag, a list of values; all combinations are run."}
    )
    published: dict[str, Any] | None = field(
        default=None, metadata={"help": "In a recipe: by variant and metric, what was published, to stand beside."}
    )
    reference: str = field(
        default="",
        metadata={"help": "The variant that all others are compared with, at the same axes, paired by test case."},
    )
    note: str = field(default="", metadata={"help": "What a reader of the results has to know."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Seeds of the trainings."})
    metrics: list[str] = field(
        default_factory=lambda: ["NDCG@10", "HR@10"], metadata={"help": "Of the test; the first is plotted."}
    )
    override: list[str] | None = field(
        default=None,
        metadata={"help": "Flags of all runs, over the recipe's: num_train_epochs=3 eval_users=500. Axes stand."},
    )
    items: str | None = field(default=None, metadata={"help": "The item table."})
    item_embeddings: str | None = field(default=None, metadata={"help": "Folder that semantic_ids/embed.py wrote."})
    semantic_ids: str | None = field(default=None, metadata={"help": "Folder that semantic_ids/build.py wrote."})
    only: list[str] | None = field(
        default=None, metadata={"help": "Run these variants alone, or these of --list's names."}
    )
    max_minutes: float = field(default=0.0, metadata={"help": "Begin no run after so many minutes; 0: no limit."})
    processes: int = field(default=1, metadata={"help": "Processes of each training, started by accelerate."})
    list: bool = field(default=False, metadata={"help": "Say what is done and what is left, and run nothing."})

    def check(self) -> None:
        """Raises RecipeError for numbers that make no sense."""
        if self.processes < 1:
            raise RecipeError(f"--processes is {self.processes}. Give 1 or more.")
        if not 0 <= self.max_minutes < float("inf"):
            raise RecipeError(f"--max_minutes is {self.max_minutes}. Give 0 or more.")

    def plan(self, recipes: str | Path) -> StudyPlan:
        """The study's plan.

        Args:
            recipes: the folder that `base` is looked for in, if it is no path.

        Raises:
            RecipeError: if the base cannot be read, or the values make no plan.
        """
        flags = {} if self.base is None else read_base(self.base, recipes)
        flags.pop("seed", None)  # a recipe has one seed, a study its own
        for name in ("common", "variants", "axes", "published"):
            if not isinstance(getattr(self, name) or {}, Mapping):
                raise RecipeError(f"{name} is {getattr(self, name)!r}. Give names with values.")
        flags |= self.common or {}
        given = overrides(self.override or [])
        variants = dict(self.variants or {})
        for name, own in variants.items():
            if isinstance(own, Mapping):
                # What the command line says holds for all.
                variants[name] = {key: value for key, value in own.items() if key not in given}
        if fixed := sorted(given.keys() & (self.axes or {}).keys()):
            raise RecipeError(f"--override sets {fixed[0]}, which is an axis. Run fewer values with --only.")
        flags |= given
        for name in DATA:
            if (value := getattr(self, name, None)) is not None:
                flags[name] = value
        return StudyPlan(
            self.title,
            flags,
            variants,
            self.axes or {},
            self.seeds,
            self.metrics,
            self.note,
            self.published or {},
            self.reference,
        )


def read_base(name: str, recipes: str | Path) -> dict[str, Any]:
    """The values of a recipe, by its path or its name in the folder of recipes.

    Raises:
        RecipeError: if it cannot be read or holds no values.
    """
    import yaml

    path = Path(recipes) / name
    path = path if path.is_file() else Path(name)
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(
            f"The base {name!r} cannot be read: {' '.join(str(error).split())}. Name a recipe in {recipes}."
        ) from error
    if not isinstance(found, dict):
        raise RecipeError(f"The base {name!r} holds no names with values. Name a recipe of train/seqrec.py.")
    return found


def overrides(pairs: Sequence[str]) -> dict[str, Any]:
    """`NAME=VALUE` words as flags, values as YAML has them.

    Raises:
        RecipeError: if a word is none.

    >>> overrides(["bf16=true", "learning_rate=0.01", "ks=[5, 10]"])
    {'bf16': True, 'learning_rate': 0.01, 'ks': [5, 10]}
    """
    import yaml

    found = {}
    for pair in pairs:
        name, sign, text = pair.partition("=")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            value, sign = None, ""
        if not sign or not name.isidentifier():
            raise RecipeError(f"--override has {pair!r}. Write NAME=VALUE, such as num_train_epochs=3.")
        found[name] = value
    return found
