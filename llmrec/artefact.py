"""The artefact folder's integrity and its travels: the sha256 manifest, local folders, the Hub.

An artefact is a folder with a model, its tokenizer, its catalog, a prompt and `llmrec.json`. This module knows none of
these: it sees files, and makes sure that a folder is whole before anyone loads it. A repository's card alone comes
from elsewhere (`llmrec.model_card`).
"""

import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

from llmrec.exceptions import ArtefactError
from llmrec.storage import sha256_of, write_json

MANIFEST = "sha256.json"
CARD = "README.md"
CALIBRATION_FILE = "calibration.json"
TEMPLATES_FOLDER = "prompts"  # the tasks' templates, prompts/TASK/NAME.jinja

# Files that transformers, vLLM or llmrec would load when they lie in an artefact's folder. One that the manifest does
# not list would change the model unseen, so it is refused here, and removed on the Hub when a new version is pushed.
LOADABLE = (
    *("*.safetensors", "*.safetensors.index.json", "*.gguf", "*.model", "*.jinja", "*.py", "*.so"),
    *("*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt", "*.msgpack", "*.h5"),
    *("config.json", "generation_config.json", "adapter_config.json", "llmrec.json"),
    *("tokenizer.json", "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "chat_template.json"),
)

# The catalog's versions, the word on which is current, and the calibration of its ratings change while the artefact
# stays: they carry hashes of their own (`CatalogVersions`, `load_calibration`) and are not listed.
LIVING = ("catalog/versions/", "catalog/current.json", CALIBRATION_FILE)

_AGAIN = "Copy or download the artefact again, or save it anew."


def write_manifest(folder: str | Path) -> Path:
    """Writes `sha256.json`, the list of all the folder's files with their sizes and hashes; returns its path.

    It is written last and atomically, so a folder that has one was finished. Hidden files and `README.md` are left
    out, because git and the Hub's web page change these on their own.

    Raises:
        ArtefactError: `folder` is no folder, or holds no file.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ArtefactError(f"{folder} is no folder. Save the artefact before its manifest is written.")
    names = sorted(n for n in _files(folder) if n not in (MANIFEST, CARD) and not n.startswith(LIVING))
    if not names:
        raise ArtefactError(f"{folder} holds no files to list. Save the artefact before its manifest is written.")
    files = {name: {"sha256": sha256_of(folder / name), "bytes": (folder / name).stat().st_size} for name in names}
    write_json(folder / MANIFEST, {"version": 1, "files": files})
    return folder / MANIFEST


def verify_manifest(folder: str | Path, deep: bool = True) -> None:
    """Checks an artefact folder against its manifest; silence means that it is whole.

    Files that the manifest does not list are ignored (notes, logs, a `.git` folder, training checkpoints in folders of
    their own), except one that a loader would read (`LOADABLE`) and that lies where listed files lie.

    Args:
        folder: The artefact folder.
        deep: Also hash every file's bytes; otherwise only existence and sizes are compared.

    Raises:
        ArtefactError: naming the file that is missing, truncated, altered or unlisted, or what the manifest lacks.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ArtefactError(f"There is no artefact folder {folder}. Give the path of one that was saved.")
    files = _read_manifest(folder / MANIFEST)
    for name, entry in files.items():
        path = folder / name
        if not path.is_file():
            raise ArtefactError(f"{path} is missing, though {MANIFEST} lists it. {_AGAIN}")
        size = path.stat().st_size
        if size != entry["bytes"]:
            what = "is truncated" if size < entry["bytes"] else "was altered"
            raise ArtefactError(f"{path} {what}: it has {size} bytes, and {MANIFEST} says {entry['bytes']}. {_AGAIN}")
        if deep and (found := sha256_of(path)) != entry["sha256"]:
            raise ArtefactError(
                f"{path} was altered: its sha256 is {found[:12]}…, not {entry['sha256'][:12]}… as {MANIFEST} says. "
                f"{_AGAIN}"
            )
    homes = {PurePosixPath(name).parent for name in files}
    for name in sorted(_files(folder) - files.keys()):
        posix = PurePosixPath(name)
        at_home = (
            posix.parent in homes or posix.parts[0] == TEMPLATES_FOLDER
        )  # where templates may have any task's name
        if at_home and any(fnmatch(posix.name, pattern) for pattern in LOADABLE):
            raise ArtefactError(
                f"{folder / name} is not in {MANIFEST}, and would be loaded with the artefact. "
                "Remove the file; if it belongs to the model, save the artefact anew with it."
            )


def listed_files(folder: str | Path) -> dict[str, int]:
    """The size in bytes of every file that a manifest lists, by name; raises ArtefactError if there is none."""
    return {name: int(entry["bytes"]) for name, entry in sorted(_read_manifest(Path(folder) / MANIFEST).items())}


def weights_hash(folder: str | Path) -> str:
    """A hash of the model's weights and its tokenizer, by the manifest; raises ArtefactError if it lists none."""
    files = _read_manifest(Path(folder) / MANIFEST)
    kinds = ("*.safetensors", "tokenizer.json")
    chosen = {
        name: entry["sha256"]
        for name, entry in sorted(files.items())
        if "/" not in name and any(fnmatch(name, kind) for kind in kinds)
    }
    if not chosen:
        raise ArtefactError(f"{Path(folder) / MANIFEST} lists no weights and no tokenizer. {_AGAIN}")
    return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()


def resolve(path_or_repo_id: str | Path, revision: str | None = None) -> Path:
    """The verified folder of an artefact: a local one, or a snapshot of a Hub repository in the Hub's cache.

    A local folder of that name wins over a repository. With `HF_HUB_OFFLINE=1` only the cache is read.

    Args:
        path_or_repo_id: A folder, or `user/name` on the Hub.
        revision: A branch, tag or commit of the repository.

    Raises:
        ArtefactError: there is no such folder and no such repository, the Hub cannot be reached and its cache does not
            hold it, or what was found is not whole.
    """
    folder = Path(path_or_repo_id).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise ArtefactError(
                f"{folder} is a local folder, which has no revision {revision!r}. "
                "Leave the revision out, or give the id of a Hub repository."
            )
    elif folder.exists():
        raise ArtefactError(f"{folder} is a file, not an artefact folder. Give the folder that holds it.")
    else:
        folder = _download(str(path_or_repo_id), revision)
    verify_manifest(folder)
    return folder


def push_to_hub(
    folder: str | Path,
    repo_id: str,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    card: str | None = None,
) -> str:
    """Uploads a verified artefact folder to a Hub repository, which is made if need be; returns the commit's URL.

    Model files of an earlier version that the new one does not have are removed in the same upload. The folder itself
    is left as it is.

    Args:
        folder: The artefact folder.
        repo_id: `user/name`.
        private: Whether a new repository is private; None is the account's own default.
        revision: The branch to push to, made if need be; None is `main`.
        commit_message: The commit's title.
        card: The repository's `README.md`; default: the folder's own, or one made from its settings (`model_card`).

    Raises:
        ArtefactError: the folder is not whole, the repository id is not valid, or the Hub refused.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HTTPError  # type: ignore[attr-defined]

    folder = Path(folder)
    verify_manifest(folder)
    _check_repo_id(repo_id)
    listed = sorted(_read_manifest(folder / MANIFEST))
    uploaded = [*listed, *_living(folder), MANIFEST]
    if card is None and not (folder / CARD).is_file() and "llmrec.json" in listed:
        from llmrec.model_card import card_of

        card = card_of(folder, repo_id=repo_id)
    api = HfApi()
    try:
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(url.repo_id, branch=revision, exist_ok=True)
        with _with_card(folder, uploaded, card) as source:
            info = api.upload_folder(
                repo_id=url.repo_id,
                folder_path=source,
                revision=revision,
                commit_message=commit_message or f"Upload the artefact {folder.resolve().name}",
                allow_patterns=[*map(_literally, uploaded), CARD],
                delete_patterns=[*LOADABLE, "catalog/*", "item_tokenizer/*", CALIBRATION_FILE],
            )
    except HfHubHTTPError as error:
        raise ArtefactError(
            f"The Hub refused the upload to {repo_id!r}: {_one_line(error)}. "
            "Log in with a token that may write there (`hf auth login`), and check the repository's name."
        ) from error
    except (HTTPError, OSError) as error:
        raise ArtefactError(
            f"The Hub could not be reached for the upload to {repo_id!r}: {_one_line(error)}. "
            "Check the network, HF_ENDPOINT and HF_HUB_OFFLINE, and push again."
        ) from error
    return str(info.commit_url)


@contextmanager
def _with_card(folder: Path, names: Sequence[str], card: str | None) -> Iterator[Path]:
    """The folder itself; with a card, a temporary folder of links to its files, beside which the card lies."""
    if card is None:
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="llmrec-push-") as temporary:
        source = Path(temporary)
        for name in names:
            link = source / name
            link.parent.mkdir(parents=True, exist_ok=True)
            try:
                link.symlink_to((folder / name).resolve())
            except OSError:  # a system or a user without links
                shutil.copyfile(folder / name, link)
        (source / CARD).write_text(card, encoding="utf-8")
        yield source


def _living(folder: Path) -> list[str]:
    """The files of the catalog's versions, without what a killed process left half-written, and the current one's."""
    return [name for name in sorted(_files(folder)) if name.startswith(LIVING)]


def _files(folder: Path) -> set[str]:
    """The POSIX names of all files under `folder`, without hidden files and what lies in hidden folders."""
    names = (file.relative_to(folder) for file in folder.rglob("*") if file.is_file())
    return {name.as_posix() for name in names if not any(part.startswith(".") for part in name.parts)}


def _read_manifest(path: Path) -> dict[str, dict[str, Any]]:
    if not path.is_file():
        raise ArtefactError(
            f"{path} is missing, so the artefact is unfinished or no artefact at all. "
            "Run the training again, or give a folder that was saved to its end."
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version, files = content["version"], content["files"]
        entries = [(entry["sha256"], entry["bytes"]) for entry in files.values()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtefactError(f"{path} is no manifest ({type(error).__name__}: {error}). {_AGAIN}") from error
    if version != 1:
        raise ArtefactError(f"{path} has version {version!r}; this llmrec reads version 1. Install a newer llmrec.")
    if not files:
        raise ArtefactError(f"{path} lists no files. {_AGAIN}")
    for name, (digest, size) in zip(files, entries, strict=True):
        if not _is_inside(name):
            raise ArtefactError(
                f"{path} names {name!r}, which would lie outside the artefact's folder. "
                "Do not use this artefact: its manifest was not written by llmrec."
            )
        hexadecimal = isinstance(digest, str) and re.fullmatch("[0-9a-f]{64}", digest)
        if not hexadecimal or not isinstance(size, int) or isinstance(size, bool) or size < 0:
            raise ArtefactError(f"{path} has no valid sha256 and size for {name!r}: {digest!r}, {size!r}. {_AGAIN}")
    return dict(files)


def _is_inside(name: str) -> bool:
    """Whether a manifest's name is a plain relative POSIX path below the folder, on every system."""
    plain = all(part not in ("", ".", "..") for part in name.split("/"))
    return plain and name != MANIFEST and not re.search(r"[\\:\x00]", name)


def _download(repo_id: str, revision: str | None) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import (  # type: ignore[attr-defined]
        GatedRepoError,
        HTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    _check_repo_id(repo_id)
    at = "" if revision is None else f" at revision {revision!r}"
    try:
        return Path(snapshot_download(repo_id, revision=revision))
    except RevisionNotFoundError as error:
        raise ArtefactError(
            f"The Hub's repository {repo_id!r} has no revision {revision or 'main'!r}. "
            "Give a branch, tag or commit that it has."
        ) from error
    except GatedRepoError as error:  # a kind of RepositoryNotFoundError
        raise ArtefactError(
            f"The Hub's repository {repo_id!r} is gated, and you are not among those who may read it. "
            f"Ask for access at {constants.ENDPOINT}/{repo_id} and log in with `hf auth login` (or set HF_TOKEN)."
        ) from error
    except RepositoryNotFoundError as error:
        raise ArtefactError(
            f"There is no folder {repo_id!r}, and the Hub has no such repository for you. "
            "Check the name; for a private repository log in with `hf auth login`."
        ) from error
    except LocalEntryNotFoundError as error:
        if constants.HF_HUB_OFFLINE:
            raise ArtefactError(
                f"There is no folder {repo_id!r}, and the Hub's cache does not hold that repository{at}, which "
                "HF_HUB_OFFLINE forbids to download. Check the path, or download it once without HF_HUB_OFFLINE."
            ) from error
        raise ArtefactError(
            f"There is no folder {repo_id!r}, the Hub is out of reach, and its cache does not hold that "
            f"repository{at}. Check the path; or check the network and HF_ENDPOINT, and download it once."
        ) from error
    except (HTTPError, OSError) as error:
        raise ArtefactError(
            f"{repo_id!r}{at} could not be downloaded from the Hub: {_one_line(error)}. "
            "What is whole stays in the cache: try again, and it goes on from there."
        ) from error


def _check_repo_id(repo_id: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ArtefactError(
            f"There is no folder {repo_id!r}, and it cannot be a Hub repository's id either. "
            "Give the path of an artefact folder, or an id such as 'user/name'."
        ) from error


def _literally(name: str) -> str:
    """`name` as a pattern for fnmatch that matches itself alone."""
    return re.sub(r"([*?[])", r"[\1]", name)


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text[:300].rstrip(".")
