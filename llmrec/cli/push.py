"""`llmrec push`: an artefact to the Hub, with its card."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from llmrec.artefact import push_to_hub
from llmrec.exceptions import ArtefactError


def push(
    artefact: Path,
    repo_id: str,
    private: bool | None = None,
    revision: str | None = None,
    message: str | None = None,
    evaluations: Sequence[Path] = (),
    licence: str | None = None,
    card: Path | None = None,
    base_model: str | None = None,
    datasets: Sequence[str] = (),
) -> None:
    """Uploads the artefact and prints the commit's address.

    Args:
        artefact: its folder.
        repo_id: `user/name`.
        private: whether a new repository is.
        revision: the branch.
        message: the commit's title.
        evaluations: JSON files of train/score.py and train/rate.py for the card.
        licence: the Hub's id of the weights' licence.
        card: a card of one's own, instead of one that is made.
        base_model: the Hub id that the card names as the base.
        datasets: the Hub ids that the card names as the data.

    Raises:
        ArtefactError: the folder is not whole, the card cannot be read, or the Hub refused.
        DataError: an evaluation is of another split, or an id is none.
    """
    described = bool(evaluations or licence or base_model or datasets)
    more: dict[str, str] = {}
    if card is not None:
        if described:
            raise ArtefactError(
                f"{card} is a card of your own, and facts for one that is made were given too. Give one or the other."
            )
        try:
            more["card"] = card.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ArtefactError(f"The card {card} cannot be read ({error}). Check its path.") from error
    elif described:
        from llmrec.model_card import card_of

        more["card"] = card_of(artefact, repo_id, evaluations, licence, base_model, datasets)
    url = push_to_hub(artefact, repo_id, private=private, revision=revision, commit_message=message, **more)
    Console(highlight=False, soft_wrap=True).print(url, markup=False)
