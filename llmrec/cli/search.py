"""`llmrec search`: the items that a query means, as a table or as JSON."""

from llmrec.cli.recommend import show


def search(
    artefact: str,
    query: str,
    k: int = 10,
    revision: str | None = None,
    as_json: bool = False,
) -> None:
    """Prints the `k` items that the artefact's model most probably means by `query`.

    Raises:
        ArtefactError: the artefact cannot be loaded.
        RequestError: it was not trained for search, or the query is empty.
    """
    from llmrec.recommender import Recommender

    show(Recommender.from_pretrained(artefact, revision=revision).search(query, k=k), as_json)
