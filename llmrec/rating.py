"""Rating: the probability that a user will like an item, as the model's answer to a yes-or-no question.

The question is a template of the task yes_no: what a user liked and disliked, and a candidate (TALLRec, arXiv
2305.00447). The answer is not sampled: the exact log-probabilities of the two words are compared. Q questions.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt

from llmrec.artefact import CALIBRATION_FILE, weights_hash
from llmrec.calibration import Calibrator, sigmoid
from llmrec.evaluation.probability import auc, calibration, log_loss, user_auc
from llmrec.exceptions import ArtefactError, DataError, LLMRecError, PromptError, RequestError
from llmrec.storage import write_json
from llmrec.tasks.ratings import NO, YES
from llmrec.vocabulary import PlainText, start_token

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from llmrec.catalog import Catalog
    from llmrec.prompt import Prompt
    from llmrec.recommender import Recommender

Vector = npt.NDArray[np.float64]
TASK = "yes_no"
_BATCH_TOKENS = 8_000  # of prompts that are run at once, padding included: bounds the memory


@dataclass(frozen=True)
class Question:
    """Whether a user will like a candidate; catalog rows, oldest first.

    Attributes:
        liked, disliked: what is known of the user; together, the most recent `max_history` belong here.
        candidate: the item asked about.
    """

    liked: Sequence[int]
    disliked: Sequence[int]
    candidate: int


@dataclass(frozen=True)
class Rating:
    """One candidate's answer.

    Attributes:
        item_id: as in the catalog.
        rank: 1 for the likeliest to be liked; equal ones in the order in which they were asked.
        probability: of Yes, calibrated if the rater is.
        logit: log P(Yes) - log P(No), as the model has it.
        title: for reading.
    """

    item_id: str
    rank: int
    probability: float
    logit: float
    title: str


class Rater:
    """Answers with the model's own probability of Yes against No, and a calibrated one if it has a calibrator.

    P(Yes) = p(Yes | question) / (p(Yes | question) + p(No | question)), where p is of the whole word: the product
    over its tokens, for the words may have several.

    Attributes:
        prompt: the template, over `liked`, `disliked` and `candidate`.
        calibrator: None leaves the probabilities as the model has them.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        catalog: "Catalog",
        prompt: "Prompt",
        calibrator: Calibrator | None = None,
        answers: tuple[str, str] = (YES, NO),
    ) -> None:
        """Raises PromptError if the template needs what a question does not have, or the two answers are one."""
        self.model, self.catalog, self.prompt, self.calibrator = model, catalog, prompt, calibrator
        self._text, self._start = PlainText(tokenizer), start_token(tokenizer)
        self._answers = tuple(self._text.encode(answer) for answer in answers)
        yes, no = self._answers
        shorter = min(len(yes), len(no))
        if not shorter or yes[:shorter] == no[:shorter]:
            raise PromptError(
                f"The tokenizer spells the answers {answers[0]!r} and {answers[1]!r} as {yes} and {no}, of which one "
                "begins the other. Give answers that differ."
            )
        if lacking := {"candidate"} - prompt.variables:
            raise PromptError(f"The template does not show its {lacking.pop()}. Use it in a yes_no template.")
        prompt.check(catalog, liked=[0], disliked=[0], candidate=0)

    @classmethod
    def of(cls, recommender: "Recommender", template: str | None = None, calibrator: Calibrator | None = None) -> Self:
        """A rater by an artefact's model and its own templates.

        Args:
            recommender: trained on the task yes_no.
            template: the template's name; default: the first.
            calibrator: see `load_calibration`.

        Raises:
            RequestError: if it was not trained on the task, has no template of that name, or its scores are over
                semantic IDs alone.
        """
        found = recommender.templates.get(TASK, {})
        if recommender.settings.softmax != "vocabulary":
            raise RequestError(
                f"The model was trained with a loss over {recommender.settings.softmax} alone, so its other scores, "
                "such as those of Yes and No, mean nothing. Train it with the loss over the vocabulary."
            )
        if not found:
            raise RequestError(
                f"The artefact has no template of the task {TASK}: it was not trained to answer Yes or No. "
                f"Train with {TASK} in the mixture."
            )
        name = min(found) if template is None else template
        if name not in found:
            raise RequestError(f"There is no template {name!r} among {', '.join(sorted(found))}. Name one of these.")
        return cls(recommender.model, recommender.tokenizer, recommender.catalog, found[name], calibrator)

    def encode(self, question: Question) -> list[int]:
        """Token ids of the prompt that a question renders to."""
        return self.prompt.encode(
            self.catalog,
            [],
            self._text,
            self._start,
            liked=list(question.liked),
            disliked=list(question.disliked),
            candidate=question.candidate,
        )

    def logits(self, questions: Sequence[Question], progress: bool = False) -> Vector:
        """(Q,) log p(Yes) - log p(No), in float64, exact up to the model's own arithmetic.

        Raises:
            RequestError: if a question is longer than the model's positions.
            PromptError: if the template cannot be rendered for one.
        """
        import torch

        prompts = [self.encode(question) for question in questions]
        answers = self._answers
        longest_answer = max(map(len, answers))
        limit = getattr(self.model.config, "max_position_embeddings", None)
        longest = max((len(prompt) for prompt in prompts), default=0) + longest_answer - 1
        if limit is not None and longest > limit:
            raise RequestError(
                f"A question has {longest} tokens, and the model has {limit} positions. "
                "Show fewer liked and disliked items, or shorter texts of them."
            )
        # What is run: with answers that differ in the last token alone, every prompt once, otherwise once per answer.
        contexts = [list(context) for context in dict.fromkeys(tuple(answer[:-1]) for answer in answers)]
        rows = [(number, place) for number in range(len(prompts)) for place in range(len(contexts))]
        values = np.full((len(prompts), 2), np.nan)
        with torch.inference_mode():
            for batch in _batches([len(prompts[n]) + len(contexts[c]) for n, c in rows], progress):
                chosen = [rows[place] for place in batch]
                sequences = [prompts[n] + contexts[c] for n, c in chosen]
                found = self._log_probabilities(sequences, longest_answer)  # (b, longest_answer, V)
                for row, (number, place) in enumerate(chosen):
                    for side, answer in enumerate(answers):
                        if answer[:-1] == contexts[place]:
                            last = found[row, longest_answer - len(answer) :]
                            values[number, side] = sum(float(last[t, token]) for t, token in enumerate(answer))
        difference: Vector = values[:, 0] - values[:, 1]
        return difference

    def _log_probabilities(self, sequences: list[list[int]], kept: int) -> Any:
        """(b, kept, V) float64 log-probabilities of what follows each of the last `kept` tokens."""
        import torch

        from llmrec.decoding import pad_left

        tokens, mask, positions = pad_left(sequences, self.model.device)
        output = self.model(
            input_ids=tokens, attention_mask=mask, position_ids=positions, use_cache=False, logits_to_keep=kept
        )
        return torch.log_softmax(output.logits[:, -kept:].double(), dim=-1).cpu()

    def probabilities(self, questions: Sequence[Question], progress: bool = False) -> Vector:
        """(Q,) the probability of Yes, calibrated if there is a calibrator."""
        return self.calibrated(self.logits(questions, progress))

    def calibrated(self, logits: Vector) -> Vector:
        return sigmoid(logits) if self.calibrator is None else self.calibrator(logits)

    def rate(
        self, liked: Sequence[str], disliked: Sequence[str], candidates: Sequence[str], ignore_unknown: bool = False
    ) -> list[Rating]:
        """The candidates by falling probability that the user likes them; equal ones keep their order.

        Args:
            liked, disliked: item ids, oldest first.
            candidates: item ids.
            ignore_unknown: skip liked and disliked ids that the catalog does not hold, instead of refusing.

        Raises:
            UnknownItemError: if an id is not in the catalog.
        """
        likes, dislikes = (self.catalog.rows(ids, ignore_unknown) for ids in (liked, disliked))
        rows = self.catalog.rows(candidates)
        logits = self.logits([Question(likes, dislikes, row) for row in rows])
        probabilities = self.calibrated(logits)
        # By the logit, which a calibrator with steps would make equal.
        order = np.argsort(-logits, kind="stable").tolist()
        return [
            Rating(
                self.catalog.ids[rows[place]],
                rank,
                float(probabilities[place]),
                float(logits[place]),
                self.catalog.title(rows[place]),
            )
            for rank, place in enumerate(order, start=1)
        ]


def measures(labels: npt.ArrayLike, probabilities: npt.ArrayLike, users: npt.ArrayLike) -> dict[str, Any]:
    """What is said of predicted probabilities, JSON-ready.

    AUC and UAUC (users with both labels, each counting once) say how well they order, and are None where no pair can
    be ordered; log-loss (nats), the Brier score (mean squared error) and ECE (ten bins of equal width) how true the
    probabilities are, lower being better.

    Raises:
        DataError: if shapes disagree, a label is not 0 or 1, or a probability is outside [0, 1].

    >>> found = measures([1, 0, 1, 0], [0.9, 0.2, 0.6, 0.7], ["a", "a", "b", "b"])
    >>> found["AUC"], found["UAUC"], round(found["Brier"], 3)
    (0.75, 0.5, 0.175)
    """
    known, given = np.asarray(labels, dtype=np.float64), np.asarray(probabilities, dtype=np.float64)
    table = calibration(known, given)
    result: dict[str, Any] = {"AUC": None, "UAUC": None, "UAUC_users": 0}
    try:
        result["AUC"] = auc(known, given)
        by_user = user_auc(known, given, users)
        result |= {"UAUC": by_user.mean, "UAUC_users": len(by_user.users)}
    except DataError:  # shapes and ranges are right, as the calibration has seen: there are no pairs
        pass
    result["log_loss"] = log_loss(known, given)
    result["Brier"] = float(np.mean((given - known) ** 2))
    result["ECE"] = table.error
    result["mean_probability"] = float(given.mean())
    return result


def save_calibration(folder: str | Path, calibrator: Calibrator, template: str, fitted_on: Mapping[str, Any]) -> Path:
    """Writes `calibration.json` into an artefact's folder, with the hash of the weights that it belongs to.

    Args:
        folder: the artefact.
        calibrator: what was fitted.
        template: the yes_no template's name.
        fitted_on: for the record: split, part, cases, threshold.
    """
    path = Path(folder) / CALIBRATION_FILE
    content = {"version": 1, "weights": weights_hash(folder), "template": template, "fitted_on": dict(fitted_on)}
    write_json(path, content | {"calibrator": calibrator.document()})
    return path


def load_calibration(folder: str | Path) -> tuple[Calibrator, str, dict[str, Any]] | None:
    """The calibrator in an artefact's folder, the template's name that it is for, and what it was fitted on.

    None if there is none.

    Raises:
        ArtefactError: if the file cannot be read, or belongs to other weights.
    """
    path = Path(folder) / CALIBRATION_FILE
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        weights, template = str(content["weights"]), str(content["template"])
        calibrator, fitted_on = Calibrator.from_document(content["calibrator"]), dict(content["fitted_on"])
    except (ValueError, KeyError, TypeError, LLMRecError) as error:
        raise ArtefactError(
            f"{path} is no calibration ({error}). Remove it, or calibrate again with train/rate.py --calibrate."
        ) from error
    if weights != weights_hash(folder):
        raise ArtefactError(
            f"{path} was fitted on a model with the weights {weights[:12]}…, not on this one. "
            "Calibrate again with train/rate.py --calibrate."
        )
    return calibrator, template, fitted_on


def _batches(lengths: Sequence[int], progress: bool) -> Any:
    """Places in batches of similar length, each within the budget of tokens."""
    order = sorted(range(len(lengths)), key=lambda place: (lengths[place], place))
    batches: list[list[int]] = []
    for place in order:
        if batches and (len(batches[-1]) + 1) * lengths[place] <= _BATCH_TOKENS:
            batches[-1].append(place)
        else:
            batches.append([place])
    if not progress:
        return batches
    from tqdm.auto import tqdm

    return tqdm(batches, desc="rating", unit="batch")
