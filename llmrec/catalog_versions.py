"""CatalogVersions: a catalog that lives; every change is a new immutable version beside those before it.

The folder that holds a catalog (an artefact's `catalog/`, or what `semantic_ids/build.py` wrote) is the base, and is
never changed. A version is a folder `versions/VERSION/` with what it changes of its parent: items added with their
codes, items retired or restored. Which version is in use stands in `current.json`, the one file that changes; so going
back is one small write. Versions are named by a hash of the whole catalog they make (`Catalog.version`), which is
checked whenever one is read: equal catalogs are one version, however they came about.
"""

import fcntl
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from llmrec import __version__
from llmrec.catalog import CATALOG_FILE, CODES_FILE, ITEMS_FILE, Catalog, read_items, write_items
from llmrec.exceptions import ArtefactError, CatalogError
from llmrec.storage import atomic_folder, sha256_of, write_json

VERSIONS_FOLDER, VERSION_FILE, CURRENT_FILE, LOCK_FILE = "versions", "version.json", "current.json", ".versions.lock"


class CatalogVersions:
    """The versions of the catalog in one folder.

    Two processes may change it at a time: changes are made one after another, each to the version that is current
    then. A process that is killed leaves the old version in use, or the new one.

    Attributes:
        folder: where the base lies.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

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
        """The catalog of a version, by default the current one.

        Raises:
            CatalogError: if there is no such version, or its files do not make the catalog it is named after.
            ArtefactError: if a file of it is missing or altered.
        """
        version = version or self.current
        chain = []
        at = version
        while at != self.base.version:
            chain.append(self._read(at))
            at = str(chain[-1]["parent"])
            if len(chain) > len(self._names()):
                raise CatalogError(f"The versions in {self.folder} are their own ancestors. Restore the folder.")
        if not chain:
            return self.base
        items, codes = list(self.base.items), [self.base.codes]
        retired = {self.base.ids[row] for row in np.flatnonzero(self.base.retired)}
        for change in reversed(chain):
            if change["added"]:
                items += read_items(self._folder(change["version"]) / ITEMS_FILE)
                codes.append(self._codes(change["version"]))
            retired = (retired | set(change["retired"])) - set(change["restored"])
        marks = np.zeros(len(items), dtype=bool)
        if retired:
            marks[:] = [str(item["item_id"]) in retired for item in items]
        catalog = Catalog(items, np.concatenate(codes), self.base.codebook_sizes, self.base.token_ids, marks)
        if catalog.version != version:
            raise CatalogError(
                f"The files of version {version} in {self.folder} make the catalog {catalog.version}. "
                "Restore the folder, or roll back to a version that is whole."
            )
        return catalog

    def log(self) -> list[dict[str, Any]]:
        """All versions, the base first, others by the time they were made.

        Returns:
            JSON-ready rows: "version", "parent" (None for the base), "created" (None for the base), "items" and "live"
            (how many it has), "added" (how many), "retired" and "restored" (item ids), "note", "current".
        """
        base: dict[str, Any] = {"version": self.base.version, "parent": None, "created": None, "items": len(self.base)}
        base |= {"live": self.base.num_live, "added": 0, "retired": [], "restored": [], "note": "as built"}
        changes = sorted((self._read(name) for name in self._names()), key=lambda row: (row["created"], row["items"]))
        shown = [{name: row[name] for name in base} for row in changes]
        return [{**row, "current": row["version"] == self.current} for row in [base, *shown]]

    def moves(self) -> list[dict[str, Any]]:
        """Which version came into use when: "version", "previous", "what", "at", the oldest first."""
        return list(self._pointer()["moves"])

    def add(
        self, items: Sequence[Mapping[str, Any]], codes: npt.NDArray[np.integer], note: str = "", parent: str = ""
    ) -> str:
        """New items (M) with codes (M, L) of their own, such as `quantization.assignment.assign` gives.

        Args:
            items: mappings with "item_id" and "title".
            codes: (M, L).
            note: for the log.
            parent: the version that the codes were made for; if another one is current by now they may collide.

        Returns:
            The new version, which is now current.

        Raises:
            CatalogError: if an item is there already, a code is taken, or `parent` is not current any more.
        """
        with self._change() as current:
            if parent and parent != current.version:
                raise CatalogError(
                    f"The catalog in {self.folder} went from version {parent} to {current.version} meanwhile. "
                    "Assign codes again."
                )
            grown = current.with_items(items, codes)
            return self._commit(grown, current, note or f"added {len(items)} items", added=len(items))

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
        """
        with self._locked():
            current = self.current
            if to is None:
                if current == self.base.version:
                    raise CatalogError(
                        f"Version {current} in {self.folder} is the base and has no parent. Name a version to go to."
                    )
                to = str(self._read(current)["parent"])
            if to != current:
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
    ) -> str:
        folder = self._folder(catalog.version)
        if catalog.version != self.base.version and not folder.is_dir():
            with atomic_folder(folder) as temporary:
                if added:
                    write_items(temporary / ITEMS_FILE, catalog.items[-added:])
                    save_file({"codes": np.ascontiguousarray(catalog.codes[-added:])}, temporary / CODES_FILE)
                described = {
                    "version": catalog.version,
                    "parent": parent.version,
                    "created": datetime.now(UTC).isoformat(timespec="microseconds"),
                    "items": len(catalog),
                    "live": catalog.num_live,
                    "added": added,
                    "retired": list(retired),
                    "restored": list(restored),
                    "note": note,
                    "sha256": {name: sha256_of(temporary / name) for name in (ITEMS_FILE, CODES_FILE) if added},
                    "llmrec_version": __version__,
                }
                write_json(temporary / VERSION_FILE, described)
        self._point(catalog.version, note)
        return catalog.version

    def _point(self, version: str, what: str) -> None:
        pointer = self._pointer()
        at = datetime.now(UTC).isoformat(timespec="seconds")
        moves = [*pointer["moves"], {"version": version, "previous": pointer["version"], "what": what, "at": at}]
        write_json(self.folder / CURRENT_FILE, {"version": version, "moves": moves})

    def _pointer(self) -> dict[str, Any]:
        path = self.folder / CURRENT_FILE
        if not path.is_file():
            return {"version": self.base.version, "moves": []}
        try:
            pointer = json.loads(path.read_text(encoding="utf-8"))
            return {"version": str(pointer["version"]), "moves": list(pointer["moves"])}
        except (ValueError, KeyError, TypeError) as error:
            raise CatalogError(
                f"{path} does not say which version is current ({error!r}). Remove it to go back to the base."
            ) from error

    def _read(self, version: str) -> dict[str, Any]:
        """What a version changes, its files checked."""
        folder = self._folder(version)
        if not (folder / VERSION_FILE).is_file():
            known = ", ".join([self.base.version, *self._names()])
            raise CatalogError(f"There is no version {version!r} in {self.folder}. Name one of {known}.")
        try:
            change: dict[str, Any] = json.loads((folder / VERSION_FILE).read_text(encoding="utf-8"))
            files = [(name, change["sha256"][name]) for name in (ITEMS_FILE, CODES_FILE) if change["added"]]
            change = {**change, "version": version, "parent": str(change["parent"])}
            change |= {"retired": list(change["retired"]), "restored": list(change["restored"])}
        except (ValueError, KeyError, TypeError) as error:
            raise ArtefactError(f"{folder / VERSION_FILE} is no version ({error!r}). Restore the folder.") from error
        for name, digest in files:
            if not (folder / name).is_file() or sha256_of(folder / name) != digest:
                raise ArtefactError(
                    f"{folder / name} is missing or not the file that {VERSION_FILE} describes. "
                    "Restore the folder, or roll back to another version."
                )
        return change

    def _codes(self, version: str) -> npt.NDArray[np.int32]:
        path = self._folder(version) / CODES_FILE
        try:
            codes: npt.NDArray[np.int32] = load_file(path)["codes"]
        except (KeyError, SafetensorError) as error:
            raise ArtefactError(f"{path} holds no codes ({error!r}). Restore the folder.") from error
        return codes

    def _names(self) -> list[str]:
        folders = (self.folder / VERSIONS_FOLDER).glob("*/" + VERSION_FILE)
        return sorted(file.parent.name for file in folders if not file.parent.name.startswith("."))

    def _folder(self, version: str) -> Path:
        if not version or not version.isalnum():
            raise CatalogError(f"{version!r} is no version of a catalog. Versions are hexadecimal numbers.")
        return self.folder / VERSIONS_FOLDER / version

    @contextmanager
    def _locked(self) -> Iterator[None]:
        if not self.folder.is_dir():
            raise CatalogError(f"There is no catalog folder {self.folder}. Name an artefact or a built one.")
        with open(self.folder / LOCK_FILE, "w", encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
