"""What a sequence model is made of and trained on, as flags: data, histories, encoder, items, events."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from llmrec.data.subset import check_share
from llmrec.exceptions import DataError, RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from llmrec.data.split import Split
    from llmrec.representations.item_features import ItemFeatures
    from llmrec.sequence.events import EventConfig

BODIES = ("llama", "gpt2")


@dataclass
class EncoderArguments:
    """Which encoder, and its flags: what is left out is the encoder's own default."""

    encoder: Literal["hstu", "sasrec", "bert4rec", "gru4rec", "llama", "gpt2"] = field(
        default="sasrec", metadata={"help": "What reads a history."}
    )
    hidden_size: int = field(default=64, metadata={"help": "Width D of items, states and queries."})
    num_hidden_layers: int = field(default=2, metadata={"help": "Layers."})
    num_attention_heads: int | None = field(default=None, metadata={"help": "Heads H; GRU4Rec has none."})
    dropout: float | None = field(default=None, metadata={"help": "On the embedded history and in every layer."})
    intermediate_size: int | None = field(
        default=None, metadata={"help": "Width of the feed-forward network; HSTU and GRU4Rec have none."}
    )
    relative_bias: str | None = field(
        default=None,
        metadata={"help": "hstu, sasrec: none, position, time, position+time, rope or rope+time."},
    )
    num_time_buckets: int | None = field(default=None, metadata={"help": "hstu, sasrec: of the time bias."})
    position_embeddings: bool | None = field(
        default=None, metadata={"help": "hstu, sasrec: add learnt vectors of absolute places."}
    )
    residual: str | None = field(
        default=None, metadata={"help": "hstu: hstu, llama, sasrec or post. sasrec: sasrec or llama."}
    )
    qk_dim: int | None = field(default=None, metadata={"help": "hstu: width of a head's queries and keys."})
    v_dim: int | None = field(default=None, metadata={"help": "hstu: width of a head's values and gates."})
    score: str | None = field(default=None, metadata={"help": "hstu: silu or softmax."})
    gate: bool | None = field(default=None, metadata={"help": "hstu: U gates what attention read; sasrec: LiGR's."})
    concat_ua: bool | None = field(default=None, metadata={"help": "hstu: the last matrix reads [U, Y, U * Y]."})
    normalize_by: str | None = field(
        default=None, metadata={"help": "hstu: attention is divided by max_length, or by the length so far (length)."}
    )
    norm: str | None = field(default=None, metadata={"help": "sasrec: pre, authors (their code's) or post."})
    feed_forward: str | None = field(default=None, metadata={"help": "sasrec: relu, gelu or swiglu."})
    attention_dropout: float | None = field(default=None, metadata={"help": "sasrec, bert4rec: on the weights."})
    gru_size: int | None = field(default=None, metadata={"help": "gru4rec: width of the recurrent state."})
    body: str | None = field(
        default=None, metadata={"help": "llama, gpt2: Hub id or folder of a checkpoint; default: random weights."}
    )

    def config(self, positions: int) -> "PreTrainedConfig":
        """The encoder's configuration.

        Args:
            positions: that it needs, for items and the tokens of their events.

        Raises:
            RecipeError: if a flag is given that this encoder does not have.
        """
        from transformers import AutoConfig

        from llmrec.backbones.encoders import register_encoders

        register_encoders()
        given = {
            entry.name: getattr(self, entry.name) for entry in fields(self) if entry.name not in ("encoder", "body")
        }
        if self.body is not None:
            return self._of_checkpoint(self.body, given, positions)
        chosen = {name: value for name, value in given.items() if value is not None}
        kind = "causal_body" if self.encoder in BODIES else self.encoder
        if kind == "causal_body":
            chosen["body"] = self.encoder
        if self.encoder == "hstu":
            # The published configurations share the width out among the heads.
            heads = self.num_attention_heads or 1
            chosen.setdefault("qk_dim", max(1, self.hidden_size // heads))
            chosen.setdefault("v_dim", max(1, self.hidden_size // heads))
        known = AutoConfig.for_model(kind)
        if lacking := sorted(name for name in chosen if not hasattr(known, name)):
            raise RecipeError(f"{self.encoder} has no {lacking[0]}. Leave it out.")
        return AutoConfig.for_model(kind, **chosen, max_position_embeddings=positions)

    def _of_checkpoint(self, body: str, given: dict[str, Any], positions: int) -> "PreTrainedConfig":
        from llmrec.backbones.causal_body import CausalBodyConfig

        if self.encoder not in BODIES:
            raise RecipeError(f"--body is {body!r}, and {self.encoder} reads no checkpoint. Leave it out.")
        own = ("hidden_size", "dropout", "num_hidden_layers")  # depth is the checkpoint's, whatever its flag says
        if named := sorted(name for name, value in given.items() if value is not None and name not in own):
            raise RecipeError(f"--{named[0]} is given beside --body, whose sizes are the checkpoint's. Leave it out.")
        sizes = {} if self.dropout is None else {"dropout": self.dropout}
        config = CausalBodyConfig.of_checkpoint(body, None, hidden_size=self.hidden_size, **sizes)
        if config.max_position_embeddings < positions:
            raise RecipeError(
                f"{body!r} has {config.max_position_embeddings} positions, and {positions} are needed. Shorten the "
                "histories by --max_history."
            )
        if config.body != self.encoder:
            raise RecipeError(f"{body!r} is a {config.body}. Say --encoder {config.body}.")
        return config


@dataclass
class ItemArguments:
    """What items are to the model."""

    representation: Literal["ids", "text", "ids+text", "semantic_ids", "hashed"] = field(
        default="ids",
        metadata={
            "help": "ids: a row of a table each; text: their texts' embedding through an adapter; ids+text: both; "
            "semantic_ids: sums over their codes; hashed: several rows of a small table by hashes of the id."
        },
    )
    item_embeddings: str | None = field(
        default=None, metadata={"help": "text, ids+text: folder that semantic_ids/embed.py wrote."}
    )
    semantic_ids: str | None = field(
        default=None, metadata={"help": "semantic_ids: folder that semantic_ids/build.py wrote."}
    )
    adapter: str | None = field(default=None, metadata={"help": "text, ids+text: linear or mlp."})
    tune_embeddings: bool = field(default=False, metadata={"help": "text, ids+text: train the texts' vectors too."})
    code_pieces: str | None = field(
        default=None, metadata={"help": "semantic_ids: what is summed: unigram, bigram or prefix."}
    )
    table_size: int | None = field(default=None, metadata={"help": "semantic_ids, hashed: rows of the hashed table."})
    sparse_gradients: bool = field(
        default=False,
        metadata={
            "help": "ids: each step updates the rows that it used alone (lazy Adam); faster from some 100,000 items "
            "on, with a sampled loss."
        },
    )
    similarity: Literal["dot", "cosine"] = field(
        default="dot", metadata={"help": "cosine: queries and items are L2-normalised."}
    )
    temperature: float = field(default=1.0, metadata={"help": "Inner products are divided by it."})

    def check(self) -> None:
        """Raises RecipeError if a folder is missing or is of no use."""
        texts = self.representation in ("text", "ids+text")
        if texts and self.item_embeddings is None:
            raise RecipeError(
                f"The representation is {self.representation!r} without texts' embeddings. Write them by "
                "semantic_ids/embed.py, and name their folder with --item_embeddings."
            )
        if self.representation == "semantic_ids" and self.semantic_ids is None:
            raise RecipeError(
                "The representation is 'semantic_ids' without codes. Name a folder of semantic_ids/build.py with "
                "--semantic_ids."
            )
        if self.representation == "hashed" and self.table_size is None:
            raise RecipeError("The representation is 'hashed' without a size of its table. Give --table_size.")
        unused = {
            "item_embeddings": texts, "adapter": texts, "tune_embeddings": texts,
            "semantic_ids": self.representation == "semantic_ids",
            "code_pieces": self.representation == "semantic_ids",
            "table_size": self.representation in ("semantic_ids", "hashed"),
            "sparse_gradients": self.representation == "ids",
        }  # fmt: skip
        for name, used in unused.items():
            if getattr(self, name) and not used:
                raise RecipeError(f"--{name} is given, and {self.representation!r} has no use for it. Leave it out.")

    def features(self, split: "Split") -> "ItemFeatures":
        """What the representation is made of, for the split's items.

        Raises:
            DataError: if an item has no embedding.
            CatalogError: if an item has no code.
        """
        import numpy as np

        from llmrec.representations.item_features import ItemFeatures

        vectors = codes = None
        if self.item_embeddings is not None:
            from llmrec.embedding.store import EmbeddingStore

            vectors = np.ascontiguousarray(EmbeddingStore.load(self.item_embeddings).rows(split.item_ids))
        if self.semantic_ids is not None:
            from llmrec.catalog import Catalog

            catalog = Catalog.from_build(self.semantic_ids)
            codes = catalog.codes[catalog.rows(split.item_ids)]
        return ItemFeatures(split.item_ids, vectors, codes, split.train_counts > 0)

    def described(self, features: "ItemFeatures") -> dict[str, Any]:
        """The representation as `build_representation` takes it."""
        found: dict[str, Any] = {"kind": self.representation} | ({"sparse": True} if self.sparse_gradients else {})
        if features.vectors is not None:
            found |= {"width": int(features.vectors.shape[1]), "tuned": self.tune_embeddings}
            found |= {} if self.adapter is None else {"adapter": self.adapter}
        if features.codes is not None:
            from llmrec.catalog import Catalog

            # Of the codebooks, not of the codes in use: items that come later may have others.
            found["codebook_sizes"] = list(Catalog.from_build(str(self.semantic_ids)).codebook_sizes)
            found |= {} if self.code_pieces is None else {"pieces": self.code_pieces}
        return found | ({} if self.table_size is None else {"table_size": self.table_size})


@dataclass
class EventArguments:
    """What the model is told of events beside their items."""

    action_tokens: Literal["none", "added", "before", "after"] = field(
        default="none",
        metadata={
            "help": "Actions. added: to their items' vectors; before: a token before each item, under which the next "
            "is asked for; after: a token behind each item."
        },
    )
    domain_tokens: Literal["none", "added", "before"] = field(default="none", metadata={"help": "Domains, likewise."})
    target_action: str = field(
        default="", metadata={"help": "The action under which items are asked for where a request names none."}
    )
    action_weights: list[str] | None = field(
        default=None,
        metadata={"help": "What a target counts by its action: view=0.2 purchase=1; others count 1; 0: no target."},
    )
    time_features: bool = field(default=False, metadata={"help": "Add hour, weekday and month of each event (UTC)."})
    request_time: bool = field(
        default=False,
        metadata={
            "help": "The relative time bias counts from when the next item is taken, as HSTU's published code does: "
            "an evaluation then tells the model the test item's time. Without: from the item before."
        },
    )

    def config(self, split: "Split", tasks: bool = False) -> "EventConfig":
        """What the model is told; raises DataError if the interactions do not say it.

        Args:
            split: of the interactions.
            tasks: whether something else than the model asks for what was done, so that actions need numbers.
        """
        from llmrec.sequence.events import EventConfig
        from llmrec.sequence.histories import LoggedHistories

        actions, domains = LoggedHistories.names(split)
        for name, wanted, known in (
            ("action", self.action_tokens != "none" or self.target_action or self.action_weights or tasks, actions),
            ("domain", self.domain_tokens != "none", domains),
        ):
            if wanted and not known:
                raise DataError(f"The interactions have no column of {name}s. Name it with --{name}_column.")
        if self.request_time and not split.clock:
            raise DataError("request_time is true, and the interactions have no times that are a clock. Leave it out.")
        return EventConfig(
            actions=actions if self.action_tokens != "none" or self.action_weights or tasks else [],
            domains=domains if self.domain_tokens != "none" else [],
            action_tokens=self.action_tokens,
            domain_tokens=self.domain_tokens,
            target_action=self.target_action,
            time_features=self.time_features,
            request_time=self.request_time,
        )

    def check(self, causal: bool, relative_bias: str) -> None:
        """Raises RecipeError for flags that nothing of such an encoder reads.

        Args:
            causal: whether it predicts each next item; if not, it is shown what is known of a hidden one.
            relative_bias: the encoder's; "" for one that has none.
        """
        before = "before" in (self.action_tokens, self.domain_tokens)
        if self.target_action and not (
            self.action_tokens == "before" or (self.action_tokens == "added" and not causal)
        ):
            raise RecipeError(
                f"--target_action is {self.target_action!r}, and with action_tokens {self.action_tokens} no item is "
                "asked for under an action. Say --action_tokens before, or leave it out."
            )
        if self.request_time and not ("time" in relative_bias or (self.time_features and (before or not causal))):
            raise RecipeError(
                "request_time is true, and nothing of this model looks at the time of what is asked for. Give it a "
                "relative bias of time, or leave it out."
            )

    def weights(self, names: Sequence[str]) -> list[float] | None:
        """What a target counts by the number of its action (0: unknown), or None.

        Args:
            names: of the actions, as in `EventConfig.actions`.

        Raises:
            RecipeError: if a weight names no action or is no number from 0 on.
        """
        if not self.action_weights:
            return None
        found = dict.fromkeys(names, 1.0)
        for entry in self.action_weights:
            name, _, text = entry.rpartition("=")
            try:
                value = float(text)
            except ValueError:
                value = -1.0
            if name not in found or not 0 <= value < float("inf"):
                raise RecipeError(
                    f"--action_weights has {entry!r}. Write ACTION=NUMBER, from 0 on; the actions are "
                    f"{', '.join(names) or 'none'}."
                )
            found[name] = value
        return [1.0, *found.values()]


@dataclass
class SequenceArguments:
    """What to train on, how histories are cut, how it is evaluated, and where the artefact goes."""

    interactions: str = field(metadata={"help": "Interactions: parquet, csv, tsv or jsonl, gzipped or not."})
    artefact: str = field(metadata={"help": "Folder for the artefact; metrics.json stands beside it."})
    items: str | None = field(
        default=None, metadata={"help": "The item table, for titles and filters; default: the items that occur."}
    )
    system: str | None = field(default=None, metadata={"help": "Its name in a comparison; default: the encoder's."})
    max_history: int = field(default=50, metadata={"help": "Most recent items that the model reads."})
    windows: Literal["all", "last"] = field(
        default="all",
        metadata={
            "help": "all: long histories are cut, and every item is a target once an epoch; last: only the latest "
            "max_history items of each user are learnt from, as in HSTU's protocol."
        },
    )
    stride: int = field(
        default=0, metadata={"help": "windows all: new targets of each further window; 0: as many as it holds."}
    )
    stochastic_length: float = field(
        default=2.0, metadata={"help": "Alpha of the stochastic length (HSTU, equation 4), above 1; 2: none."}
    )
    thinned: Literal["recent", "random", "latest"] = field(
        default="recent", metadata={"help": "stochastic_length: what is kept of a history that is thinned."}
    )
    hidden_share: float = field(default=0.2, metadata={"help": "bert4rec: the share of items that are hidden."})
    tokens_per_batch: int = field(
        default=0,
        metadata={
            "help": "Batches of windows of like length, up to so many items; 0: per_device_train_batch_size windows."
        },
    )
    eval_users: int = field(
        default=0, metadata={"help": "Validation cases ranked at every evaluation, drawn with the seed; 0: all."}
    )
    ks: list[int] = field(default_factory=lambda: [5, 10, 20, 50], metadata={"help": "Cut-offs of the final test."})
    train_share: float = field(
        default=1.0,
        metadata={
            "help": "The share of the users whose training interactions are learnt from; smaller shares are parts of "
            "larger ones. Validation, test, items and histories stay the same."
        },
    )
    train_share_seed: int = field(default=0, metadata={"help": "The seed by which these users are drawn."})
    fresh: bool = field(default=False, metadata={"help": "Ignore the checkpoints of an earlier run."})

    def check(self) -> None:
        """Raises RecipeError for numbers that make no sense."""
        for name, least in (("max_history", 1), ("stride", 0), ("tokens_per_batch", 0), ("eval_users", 0)):
            if getattr(self, name) < least:
                raise RecipeError(f"--{name} is {getattr(self, name)}. It counts from {least}.")
        if self.stride > self.max_history:
            raise RecipeError(f"--stride is {self.stride}, more than --max_history {self.max_history}. Give less.")
        if not 1 < self.stochastic_length <= 2:
            raise RecipeError(f"--stochastic_length is {self.stochastic_length}. Give more than 1 and at most 2.")
        if self.stride and self.windows == "last":
            raise RecipeError(f"--stride is {self.stride}, and windows 'last' are one of each user. Leave it out.")
        if not 0 < self.hidden_share < 1:
            raise RecipeError(f"--hidden_share is {self.hidden_share}. Give a share between 0 and 1.")
        if not self.ks or min(self.ks) < 1:
            raise RecipeError(f"--ks is {self.ks}. Give cut-offs from 1 on.")
        check_share(self.train_share, self.train_share_seed)

    @property
    def folder(self) -> Path:
        """Where metrics.json and the evaluation go: beside the artefact."""
        return Path(self.artefact).resolve().parent
