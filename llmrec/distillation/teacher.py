"""Teacher: an artefact that is learnt from, the interactions it was trained on, and how it does on their test part."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self, cast

import numpy as np
import numpy.typing as npt

from llmrec import artefact
from llmrec.data.arguments import ColumnArguments, SplitArguments
from llmrec.exceptions import BackboneError
from llmrec.recommender import Recommender

if TYPE_CHECKING:
    from llmrec.data.split import Split
    from llmrec.evaluation.evaluation import Evaluation
    from llmrec.sequence.model import SequenceModel


@dataclass(frozen=True)
class Teacher:
    """A trained recommender and its split.

    Attributes:
        recommender: of a language model, or of a sequence model.
        split: of all interactions: what it and its students are tested on.
        learnt: the same with the training interactions of the users alone whom it learnt from, as its students do.
        identity: a hash of its weights.
    """

    recommender: Recommender
    split: "Split" = field(repr=False)
    learnt: "Split" = field(repr=False)
    identity: str

    @classmethod
    def read(
        cls,
        path_or_repo_id: str,
        interactions: str,
        names: ColumnArguments,
        splits: SplitArguments,
        device: str | None = None,
    ) -> Self:
        """Loads an artefact and splits the interactions as its own training did, over its own items.

        Args:
            path_or_repo_id: of the artefact.
            interactions: the log.
            names: the log's columns.
            splits: how it is split; left at their defaults, as the artefact says.
            device: of the model; default: a GPU if there is one.

        Raises:
            ArtefactError: if the folder is none.
            RecipeError: if its catalog has grown since its training.
            DataError: if the split is not the artefact's: its training may hold what is tested.
        """
        from llmrec.trained_split import learnt_part, refuse_grown, trained_split

        folder = artefact.resolve(path_or_repo_id)
        recommender = Recommender.from_pretrained(folder, device=device)
        refuse_grown(recommender.catalog, path_or_repo_id)
        split = trained_split(names.read_interactions(interactions), recommender.catalog, recommender.settings, splits)
        return cls(recommender, split, learnt_part(split, recommender.settings), artefact.weights_hash(folder))

    @property
    def share(self) -> dict[str, Any]:
        """The share of the users whom it learnt from, in the words of its own record; empty for all."""
        recorded = self.recommender.settings.training.get("data", {})
        return {name: recorded[name] for name in ("train_share", "train_share_seed") if name in recorded}

    @property
    def is_sequence(self) -> bool:
        """Whether it is a sequence model."""
        from llmrec.sequence.recommender import SequenceRecommender

        return isinstance(self.recommender, SequenceRecommender)

    @property
    def sequence_model(self) -> "SequenceModel":
        """Its model; raises BackboneError of a language model, or of one that hides items (BERT4Rec)."""
        if not self.is_sequence:
            raise BackboneError("The teacher is a language model. Name a sequence model's artefact.")
        model = cast("SequenceModel", self.recommender.model)
        if not model.causal:
            raise BackboneError(
                "The teacher predicts hidden items from both sides, and not what follows a history. Distil from a "
                "model that reads from left to right, such as SASRec or HSTU."
            )
        return model


def evaluated(
    system: str,
    recommender: Recommender,
    split: "Split",
    cases: npt.NDArray[np.int64],
    ks: Sequence[int],
    facts: Mapping[str, Any] | None = None,
) -> "Evaluation":
    """The evaluation of a recommender on test cases, as it is served; a bar is shown.

    A sequence model is told of the request what its events say (`LoggedHistories`), as train/seqrec.py does it.
    """
    from llmrec.evaluation.evaluation import evaluate
    from llmrec.prompt import EVENT_COLUMNS
    from llmrec.sequence.histories import LoggedHistories
    from llmrec.sequence.recommender import SequenceRecommender
    from llmrec.sequence.scores import CaseScores
    from llmrec.tasks.events import LoggedEvents

    if isinstance(recommender, SequenceRecommender):
        histories = LoggedHistories(split, recommender.model.events).cases("test", cases)
        scores = CaseScores(recommender.model, histories, progress=f"testing {system}")
        return evaluate(system, split, "test", scores=scores, ks=sorted(ks), cases=cases, facts=facts)
    shown = bool(recommender.prompt.attributes & set(EVENT_COLUMNS))
    events = LoggedEvents(split).of_cases("test", cases.tolist()) if shown else None

    def recommend(histories: Any, k: int) -> list[list[int]]:
        rows = [history.tolist() for history in histories]
        num_beams = max(k, recommender.settings.num_beams)
        return recommender.recommend_rows(rows, k, num_beams=num_beams, progress=True, events=events)[0]

    return evaluate(system, split, "test", recommend=recommend, ks=sorted(ks), cases=cases, facts=facts)
