"""What a fine-tuning is made of, as flags: interactions, how items are spelt, prompts, and the mixture of tasks."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmrec.backbones.causal_lm import BackboneArguments
from llmrec.data.arguments import ColumnArguments, SplitArguments
from llmrec.exceptions import DataError

if TYPE_CHECKING:
    from llmrec.data.split import Split
    from llmrec.tasks.task_data import TaskData


@dataclass
class DataArguments:
    """What to train on, and where the artefact goes."""

    interactions: str = field(metadata={"help": "Interactions: parquet, csv, tsv or jsonl, gzipped or not."})
    artefact: str = field(metadata={"help": "Folder for the artefact."})
    semantic_ids: str | None = field(default=None, metadata={"help": "Folder that semantic_ids/build.py wrote."})
    items: str | None = field(
        default=None, metadata={"help": "Instead of --semantic_ids: the item table, whose titles spell the items."}
    )
    max_title_tokens: int = field(default=32, metadata={"help": "With --items: a title's tokens beyond are cut."})
    prompt: str = field(
        default="semantic_ids",
        metadata={"help": "The served template: its name in prompts/, or a .jinja file."},
    )
    tasks: list[str] = field(
        default_factory=lambda: ["sequence"],
        metadata={
            "help": "The mixture: NAME[/TEMPLATE][=PASSES][:CAP] each, such as next_item item_to_id=0.5:10000. "
            "'sequence': one row a user, every item a target (bare prompts); 'next_item': one row a target; "
            "prompts/README.md lists all."
        },
    )
    templates: str | None = field(
        default=None, metadata={"help": "Folder with the tasks' templates, TASK/NAME.jinja; default: prompts/tasks."}
    )
    queries: str | None = field(default=None, metadata={"help": "Table for the task search: item_id and query."})
    preferences: str | None = field(
        default=None, metadata={"help": "Table for the task preference: user_id, preference and maybe timestamp."}
    )
    like_threshold: float = field(default=4.0, metadata={"help": "Task yes_no: the least rating that is a Yes."})
    max_text_tokens: int = field(default=64, metadata={"help": "An item's text, query or preference is cut to these."})
    max_history: int = field(default=20, metadata={"help": "Most recent items in a prompt."})
    num_beams: int = field(default=50, metadata={"help": "Beams of a search, saved with the artefact."})
    eval_users: int = field(
        default=500, metadata={"help": "Validation cases ranked at every evaluation, drawn with the seed; 0 for none."}
    )
    eval_rows: int = field(default=5000, metadata={"help": "Validation cases whose loss is measured, drawn likewise."})
    row_cache: str | None = field(default=None, metadata={"help": "Folder that keeps built rows for later runs."})
    stream: bool = field(default=False, metadata={"help": "Make rows when they are needed; then say --max_steps."})
    any_split: bool = field(
        default=False, metadata={"help": "Take codes that were built on another split; they may know held-out items."}
    )
    train_share: float = field(
        default=1.0,
        metadata={
            "help": "The share of the users whose training interactions are learnt from; smaller shares are parts of "
            "larger ones. Validation, test, items and histories stay the same; so do semantic IDs, built before."
        },
    )
    train_share_seed: int = field(default=0, metadata={"help": "The seed by which these users are drawn."})
    test_users: int = field(
        default=0,
        metadata={
            "help": "Test cases ranked when the artefact is saved, the same in every training, for metrics.json "
            "and evaluation/ beside it; -1: all, 0: none, and train/score.py does it."
        },
    )
    system: str = field(default="llmrec", metadata={"help": "With --test_users: its name in a comparison."})
    fresh: bool = field(default=False, metadata={"help": "Ignore the checkpoints of an earlier run."})

    def check(self, max_steps: int) -> None:
        """Raises DataError for flags that ask for nothing or do not go together; `max_steps` is the Trainer's."""
        from llmrec.data.subset import check_share

        check_share(self.train_share, self.train_share_seed)
        counted = (("max_history", 1), ("num_beams", 1), ("eval_users", 0), ("eval_rows", 1), ("test_users", -1))
        for name, least in counted:
            if getattr(self, name) < least:
                raise DataError(f"--{name} is {getattr(self, name)}. It counts from {least}.")
        if (self.semantic_ids is None) == (self.items is None):
            raise DataError("Items are spelt by semantic IDs or by titles. Give one of --semantic_ids and --items.")
        if self.stream and max_steps <= 0:
            raise DataError("A stream has no length, so its epochs cannot be counted. Say --max_steps with --stream.")

    def read(
        self, names: ColumnArguments, splits: SplitArguments, backbone: BackboneArguments
    ) -> tuple["TaskData", "Split", dict[str, Any]]:
        """What rows are made of, the whole split, and what is recorded of how the codes were built.

        The split of the former has the training interactions of `train_share` alone; the whole one says what the
        recommender is tested on, and what its artefact belongs to.

        Raises:
            DataError: if the tables cannot be read or split, or the codes were built on another split.
            CatalogError, PromptError, BackboneError: if codes, templates or the tokenizer cannot be read.
        """
        import polars

        from llmrec.backbones.causal_lm import load_tokenizer
        from llmrec.catalog_versions import CatalogVersions
        from llmrec.data.items import Items
        from llmrec.data.subset import learnt_split
        from llmrec.prompt import Prompt
        from llmrec.stages import stage_path
        from llmrec.tasks.tables import Preferences, Queries
        from llmrec.tasks.task_data import TaskData
        from llmrec.tasks.templates import load_templates, shipped_templates
        from llmrec.title_spelling import title_catalog
        from llmrec.vocabulary import add_catalog_tokens, train_tokenizer

        built: dict[str, Any] = {}
        catalog = None
        if self.semantic_ids is not None:
            catalog = CatalogVersions(self.semantic_ids).load()
            try:
                items = Items.from_frame(polars.from_dicts(catalog.items, infer_schema_length=None, strict=False))
            except polars.exceptions.PolarsError as error:
                raise DataError(
                    f"The items of {self.semantic_ids} are no table: a column of added items is of another kind "
                    f"({error}). Roll back, and add them with columns like the others'."
                ) from error
            built = json.loads((Path(self.semantic_ids) / "semantic_ids.json").read_text(encoding="utf-8"))
        else:
            items = names.read_items(str(self.items))
        split = splits.make(names.read_interactions(self.interactions), items)
        if not self.any_split and built.get("split") not in (None, split.content_hash):
            raise DataError(
                f"The semantic IDs in {self.semantic_ids} were built on the split {built['split'][:12]}, and this is "
                f"{split.content_hash[:12]}: they may know its held-out items. Build them again from the same "
                "interactions, items and split flags; or say --any_split, as when items and interactions came since."
            )
        learnt = learnt_split(split, self.train_share, self.train_share_seed)
        own = self.prompt.endswith(".jinja")
        prompt = Prompt.read(self.prompt if own else stage_path(f"prompts/{self.prompt}.jinja"))
        templates = shipped_templates() if self.templates is None else load_templates(self.templates)
        if backbone.backbone is None:
            tokenizer = train_tokenizer(items.texts(), backbone.text_vocab_size)
        else:
            tokenizer = load_tokenizer(backbone)
        if catalog is None:
            catalog = title_catalog(items.frame.to_dicts(), tokenizer, self.max_title_tokens)
        else:
            catalog = add_catalog_tokens(tokenizer, catalog)
        held = TaskData(
            learnt,
            catalog,
            tokenizer,
            prompt,
            templates,
            max_history=self.max_history,
            max_text_tokens=self.max_text_tokens,
            like_threshold=self.like_threshold,
            text_columns=None if names.text_columns is None else tuple(names.text_columns),
            queries=None if self.queries is None else Queries.read(self.queries, learnt, names.names()),
            preferences=None if self.preferences is None else Preferences.read(self.preferences, names.names()),
        )
        return held, split, built
