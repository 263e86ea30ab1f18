"""CatalogVersions: a catalog that lives; every change is a new immutable version beside those before it.

The folder that holds a catalog (an artefact's `catalog/`, or what `semantic_ids/build.py` wrote) is the base, and is
never changed. A version is a folder `versions/VERSION/` with what it changes of its parent: items added with their
codes, items retired or restored. Which version is in use stands in `current.json`, the one file that changes; so going
back is one small write.

A version's name is a hash of its description, `version.json`, which holds its parent's name, the hash of the catalog
that it makes (`Catalog.content_hash`) and the sha256 of its files. All of it is compared when a version is read: none
can be changed unseen. The base's name is its content hash.
"""

import fcntl
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save

from llmrec import __version__
from llmrec.catalog import CATALOG_FOLDER, Catalog
from llmrec.catalog_files import CATALOG_FILE, CODES_FILE, ITEMS_FILE, codes_in, item_lines, read_items, read_tensors
from llmrec.exceptions import ArtefactError, CatalogError
from llmrec.storage import atomic_folder, sha256_of, write_json

VERSIONS_FOLDER, VERSION_FILE, CURRENT_FILE, LOCK_FILE = "versions", "version.json", "current.json", ".versions.lock"
FEATURES_FILE = "features.safetensors"  # of the items that a version adds, for models that are given them

_NAME = re.compile("[0-9a-f]{16}")
_COUNTS, _IDS, _WORDS = ("items", "live", "added"), ("retired", "restored"), ("parent", "catalog", "created", "note")


class CatalogVersions:
    """The versions of the catalog in one folder.

    Two processes may change it at a time: changes are made one after another, each to the version that is current
    then. A process that is killed leaves the old version in use, or the new one.

    Attributes:
        folder: where the base lies.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._loaded: Catalog | None = None

    @classmethod
    def inside(cls, folder: str | Path) -> Self:
        """Those of an artefact, which keeps its catalog in a folder of its own, or of a built folder, which is one."""
        catalog = Path(folder) / CATALOG_FOLDER
        return cls(catalog if catalog.is_dir() else folder)

    @cached_property
    def base(self) -> Catalog:
        """The catalog that the folder was made with; raises CatalogError if there is none."""
        if (self.folder / CATALOG_FILE).is_file():
            return Catalog.load(self.folder)
        return Catalog.from_build(self.folder)

    @property
    def current(self) -> str:
        """The version in use."""
        return str(self._pointer()["version"])

    def load(self, version: str | None = None) -> Catalog:
        """The catalog of a version, by default the current one; its `version` is that name.

        Raises:
            CatalogError: if there is no such version, or its files do not make the catalog that it describes.
            ArtefactError: if a file of it is missing or altered.
        """
        version = self.current if version is None else version
        if version == self.base.version:
            return self.base
        if self._loaded is not None and self._loaded.version == version:
            return self._loaded
        chain = []
        at = version
        while at != self.base.version:
            chain.append(self._describe(at))  # a name is a hash of what names the parent: there are no circles
            at = chain[-1]["parent"]
        items, codes, features = list(self.base.items), [self.base.codes], []
        retired = {self.base.ids[row] for row in np.flatnonzero(self.base.retired)}
        for change in reversed(chain):
            if change["added"]:
                folder = self._whole(change)
                items += read_items(folder / ITEMS_FILE)
                codes.append(codes_in(read_tensors(folder / CODES_FILE)))
                known = FEATURES_FILE in change["sha256"]
                features.append(load_file(folder / FEATURES_FILE) if known else {})
            retired = (retired | set(change["retired"])) - set(change["restored"])
        marks = np.zeros(len(items), dtype=bool)
        if retired:
            marks[:] = [str(item["item_id"]) in retired for item in items]
        made = self.base.respelt(items, codes, marks, version)
        if made.content_hash != chain[0]["catalog"]:
            raise CatalogError(
                f"The files of version {version} in {self.folder} make the catalog {made.content_hash}, not "
                f"{chain[0]['catalog']}. Restore the folder, or roll back to another version."
            )
        made.base_items = len(self.base)
        made.features = _joined(features)
        self._loaded = made
        return made

    def log(self) -> list[dict[str, Any]]:
        """All versions, the base first, others by the time they were made; damaged ones are told, not read.

        Returns:
            JSON-ready rows: "version", "parent" (None for the base), "created" (None for the base), "items" and "live"
            (how many it has), "added" (how many), "retired" and "restored" (item ids), "note", "current", "damaged"
            (None, or what is wrong with its description, and then only "version" and "current" are known).
        """
        current = self.current
        rows: list[dict[str, Any]] = []
        for name in self._names():
            row: dict[str, Any] = {"version": name, "damaged": None}
            try:
                change = self._describe(name)
                row |= {key: change[key] for key in ("parent", "created", *_COUNTS, *_IDS, "note")}
            except ArtefactError as error:
                row |= {"created": "", "items": 0, "damaged": str(error)}
            rows.append(row)
        rows.sort(key=lambda row: (row["created"], row["items"]))
        base: dict[str, Any] = {"version": self.base.version, "damaged": None, "parent": None, "created": None}
        base |= {"items": len(self.base), "live": self.base.num_live, "added": 0, "retired": [], "restored": []}
        return [{**row, "current": row["version"] == current} for row in [base | {"note": "as built"}, *rows]]

    def moves(self) -> list[dict[str, Any]]:
        """Which version came into use when: "version", "previous", "what", "at", the oldest first."""
        return list(self._pointer()["moves"])

    def add(
        self,
        items: Sequence[Mapping[str, Any]],
        codes: npt.NDArray[np.integer],
        note: str = "",
        parent: str = "",
        features: Mapping[str, npt.NDArray[Any]] | None = None,
    ) -> str:
        """New items (M) with codes (M, L) of their own, such as `quantization.assignment.assign` gives.

        Args:
            items: mappings with "item_id" and "title".
            codes: (M, L).
            note: for the log.
            parent: the version that the codes were made for; if another one is current by now they may collide.
            features: arrays with a row per item, see `Catalog.features`.

        Returns:
            The new version, which is now current.

        Raises:
            CatalogError: if there are no items, one is there already, a code is taken, there are not as many features,
                or `parent` is not current any more.
        """
        if not len(items):
            raise CatalogError("No item is to be added. Name at least one.")
        for name, values in (features or {}).items():
            if len(values) != len(items):
                raise CatalogError(f"{len(items)} items have {len(values)} {name}. Give one row per item.")
        with self._change() as current:
            if parent and parent != current.version:
                raise CatalogError(
                    f"The catalog in {self.folder} went from version {parent} to {current.version} meanwhile. "
                    "Assign codes again."
                )
            grown = current.with_items(items, codes)
            before = [current.features] if len(current) > len(self.base) else []
            grown.features = _joined([*before, features or {}])
            said = note or f"added {len(items)} items"
            return self._commit(grown, current, said, added=len(items), features=features)

    def retire(self, item_ids: Sequence[str], note: str = "") -> str:
        """Takes items out of what is recommended; they keep their codes. Returns the new version, which is current.

        Raises:
            CatalogError: for ids that the catalog does not hold, if none of them is live, or no item would be left.
        """
        return self._mark(item_ids, True, note)

    def restore(self, item_ids: Sequence[str], note: str = "") -> str:
        """Brings retired items back under their old codes; otherwise as `retire`."""
        return self._mark(item_ids, False, note)

    def rollback(self, to: str | None = None) -> str:
        """Makes an earlier version current again, by default the parent of the current one; returns it.

        Nothing is removed: the version that was left can be made current in the same way.

        Raises:
            CatalogError: if there is no such version, or the base is current and has no parent.
            ArtefactError: if the version is damaged; another one stays in use then.
        """
        with self._locked():
            if to is None:
                current = self.current
                if current == self.base.version:
                    raise CatalogError(
                        f"Version {current} in {self.folder} is the base and has no parent. Name a version to go to."
                    )
                to = str(self._describe(current)["parent"])
            self.load(to)  # whole, before anyone is sent to it
            self._point(to, "rollback")
        return to

    def _mark(self, item_ids: Sequence[str], retired: bool, note: str) -> str:
        with self._change() as current:
            known = set(current.ids)
            if unknown := [str(item) for item in item_ids if str(item) not in known]:
                raise CatalogError(
                    f"{len(unknown)} item(s) are not in the catalog, {unknown[0]!r} first. Name items that it holds."
                )
            asked = np.unique(np.array(current.rows(item_ids), dtype=np.int64))
            changed = asked[current.retired[asked] != retired]
            if not len(changed):
                state = "retired" if retired else "live"
                raise CatalogError(f"All {len(asked)} items named are {state} already. Name others, or nothing.")
            ids = [current.ids[row] for row in changed.tolist()]
            marked = current.with_retired(changed.tolist(), retired)
            if retired:
                return self._commit(marked, current, note or f"retired {len(ids)} items", retired=ids)
            return self._commit(marked, current, note or f"restored {len(ids)} items", restored=ids)

    @contextmanager
    def _change(self) -> Iterator[Catalog]:
        with self._locked():
            yield self.load()

    def _commit(
        self,
        catalog: Catalog,
        parent: Catalog,
        note: str,
        added: int = 0,
        retired: Sequence[str] = (),
        restored: Sequence[str] = (),
        features: Mapping[str, npt.NDArray[Any]] | None = None,
    ) -> str:
        if not (self.folder / CURRENT_FILE).is_file():
            # From now on its absence means that it was lost.
            write_json(self.folder / CURRENT_FILE, {"version": parent.version, "moves": []})
        files: dict[str, bytes] = {}
        if added:
            files[ITEMS_FILE] = item_lines(catalog.items[-added:])
            files[CODES_FILE] = save(catalog.code_tensors(len(catalog) - added))
        if features:
            files[FEATURES_FILE] = save({name: np.ascontiguousarray(values) for name, values in features.items()})
        note = note.encode("utf-8", "replace").decode("utf-8")
        described = {
            "parent": parent.version,
            "catalog": catalog.content_hash,
            "created": datetime.now(UTC).isoformat(timespec="microseconds"),
            "items": len(catalog),
            "live": catalog.num_live,
            "added": added,
            "retired": list(retired),
            "restored": list(restored),
            "note": note,
            "sha256": {name: hashlib.sha256(content).hexdigest() for name, content in files.items()},
            "llmrec_version": __version__,
        }
        files[VERSION_FILE] = (json.dumps(described, indent=2, ensure_ascii=False) + "\n").encode()
        name = _name_of(files[VERSION_FILE])
        with atomic_folder(self._folder(name)) as temporary:
            for file, content in files.items():
                (temporary / file).write_bytes(content)
        self._point(name, note)
        catalog.version, catalog.base_items = name, len(self.base)
        self._loaded = catalog
        return name

    def _point(self, version: str, what: str) -> None:
        path = self.folder / CURRENT_FILE
        pointer = self._pointer() if path.is_file() else {"version": None, "moves": []}
        at = datetime.now(UTC).isoformat(timespec="seconds")
        moves = [*pointer["moves"], {"version": version, "previous": pointer["version"], "what": what, "at": at}]
        write_json(path, {"version": version, "moves": moves})

    def _pointer(self) -> dict[str, Any]:
        path = self.folder / CURRENT_FILE
        if not path.is_file():
            if not self._names():
                return {"version": self.base.version, "moves": []}
            raise CatalogError(
                f"{path} is missing, though there are versions, so nobody knows which is current. Restore it, or name "
                "one with llmrec ids rollback --to."
            )
        try:
            pointer = json.loads(path.read_text(encoding="utf-8"))
            return {"version": str(pointer["version"]), "moves": list(pointer["moves"])}
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise CatalogError(
                f"{path} does not say which version is current ({error!r}). Remove it, and name a version with "
                "llmrec ids rollback --to."
            ) from error

    def _describe(self, version: str) -> dict[str, Any]:
        """A version's description, which its name is the hash of."""
        path = self._folder(version) / VERSION_FILE
        if not path.is_file():
            known = ", ".join([self.base.version, *self._names()])
            raise CatalogError(f"There is no version {version!r} in {self.folder}. Name one of {known}.")
        try:
            if _name_of(path.read_bytes()) != version:
                raise ValueError("its hash is not its name")
            change: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            kinds = [(_COUNTS, int), (_IDS, list), (_WORDS, str), (("sha256",), dict)]
            if wrong := [key for keys, kind in kinds for key in keys if not isinstance(change.get(key), kind)]:
                raise ValueError(f"no {wrong[0]}")
        except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
            raise ArtefactError(
                f"{path} was altered or is no version ({error}). Restore the folder, or roll back to another version "
                "with llmrec ids rollback --to."
            ) from error
        return {**change, "version": version}

    def _whole(self, change: Mapping[str, Any]) -> Path:
        """The folder of a version that adds items, once its files are found to be those that it describes."""
        folder = self._folder(change["version"])
        for name in (ITEMS_FILE, CODES_FILE, *({FEATURES_FILE} & change["sha256"].keys())):
            if not (folder / name).is_file() or sha256_of(folder / name) != change["sha256"].get(name):
                raise ArtefactError(
                    f"{folder / name} is missing or not the file that {VERSION_FILE} describes. "
                    "Restore the folder, or roll back to another version."
                )
        return folder

    def _names(self) -> list[str]:
        folders = (self.folder / VERSIONS_FOLDER).glob("*/" + VERSION_FILE)
        return sorted(file.parent.name for file in folders if _NAME.fullmatch(file.parent.name))

    def _folder(self, version: str) -> Path:
        if not _NAME.fullmatch(version):
            raise CatalogError(f"{version[:80]!r} is no version of a catalog. A name has 16 hexadecimal digits.")
        return self.folder / VERSIONS_FOLDER / version

    @contextmanager
    def _locked(self) -> Iterator[None]:
        if not self.folder.is_dir():
            raise CatalogError(f"There is no catalog folder {self.folder}. Name an artefact or a built one.")
        try:
            with open(self.folder / LOCK_FILE, "w", encoding="utf-8") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                yield
        except OSError as error:
            raise CatalogError(
                f"The catalog in {self.folder} cannot be changed ({error}). It is as it was: make room or give the "
                "right to write, and try again."
            ) from error


def refuse_to_replace(folder: str | Path) -> None:
    """Raises CatalogError if a catalog with versions lies in `folder`, which a new one written there would delete."""
    versions = sorted((Path(folder) / VERSIONS_FOLDER).glob("*/" + VERSION_FILE))
    if versions:
        raise CatalogError(
            f"{folder} holds a catalog with {len(versions)} version(s) beside its base, which would be lost. "
            "Write to another folder, or remove this one first."
        )


def _joined(features: Sequence[Mapping[str, npt.NDArray[Any]]]) -> dict[str, npt.NDArray[Any]]:
    """The features of items that came one version after another; only what is known of all of them."""
    names = set.intersection(*map(set, features)) if features else set()
    return {name: np.concatenate([one[name] for one in features]) for name in sorted(names)}


def _name_of(description: bytes) -> str:
    return hashlib.sha256(description).hexdigest()[:16]
