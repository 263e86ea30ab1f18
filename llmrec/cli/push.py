"""`llmrec push`: an artefact to the Hub."""

from pathlib import Path

from rich.console import Console

from llmrec.artefact import push_to_hub


def push(
    artefact: Path, repo_id: str, private: bool | None = None, revision: str | None = None, message: str | None = None
) -> None:
    """Uploads the artefact and prints the commit's address.

    Raises:
        ArtefactError: the folder is not whole, or the Hub refused.
    """
    url = push_to_hub(artefact, repo_id, private=private, revision=revision, commit_message=message)
    Console(highlight=False, soft_wrap=True).print(url, markup=False)
