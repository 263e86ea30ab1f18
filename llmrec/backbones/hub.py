"""A checkpoint's files in a folder or on the Hub, and what keeps one from them."""

from pathlib import Path

from llmrec.exceptions import BackboneError


def require_file(name: str, revision: str | None, file: str) -> None:
    """Finds or downloads one file of a local folder or a Hub repository, to the Hub's cache.

    Raises:
        BackboneError: the folder lacks it; or the repository is gated, absent or private, lacks the revision or the
            file, or the Hub is offline or out of reach. Each has words of its own.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / file).is_file():
            raise BackboneError(
                f"The folder {name!r} holds no {file}, so no model can be loaded from it. "
                "Give a folder that save_pretrained wrote, or a Hub id."
            )
        return
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (  # type: ignore[attr-defined]
        GatedRepoError,
        HFValidationError,
        HTTPError,
        LocalEntryNotFoundError,
        RemoteEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        hf_hub_download(name, file, revision=revision)
    except GatedRepoError as error:
        raise BackboneError(
            f"{name!r} is gated: its owners ask for your consent to a licence first. "
            "Accept it on the model's page, log in with `hf auth login`, and run this again."
        ) from error
    except RepositoryNotFoundError as error:
        raise BackboneError(
            f"There is no folder {name!r}, and the Hub has no such repository for you. "
            "Check the name; for a private repository log in with `hf auth login`."
        ) from error
    except RevisionNotFoundError as error:
        raise BackboneError(
            f"The Hub's repository {name!r} has no revision {revision or 'main'!r}. "
            "Give a branch, tag or commit that it has."
        ) from error
    except RemoteEntryNotFoundError as error:
        raise BackboneError(
            f"The Hub's repository {name!r} holds no {file}: it is no checkpoint of transformers. "
            "Choose a repository with transformers weights (not GGUF alone, say, or a data set)."
        ) from error
    except LocalEntryNotFoundError as error:
        raise BackboneError(
            f"There is no folder {name!r}, and the Hub's cache does not hold it while the Hub is offline or out of "
            "reach. Check the path; or check the network, HF_ENDPOINT and HF_HUB_OFFLINE, and download it once."
        ) from error
    except HFValidationError as error:
        raise BackboneError(
            f"There is no folder {name!r}, and it cannot be a Hub repository's id either. "
            "Give the path of a model folder, or an id such as 'gpt2' or 'user/name'."
        ) from error
    except (HTTPError, OSError) as error:
        raise BackboneError(
            f"{name!r} could not be downloaded from the Hub: {one_line(error)}. "
            "What is whole stays in the cache: try again, and it goes on from there."
        ) from error


def one_line(error: Exception) -> str:
    """An error's message on one line, cut where it gets long."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text[:300].rstrip(".")
