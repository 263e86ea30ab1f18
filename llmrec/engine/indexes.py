"""Indexes: the tries that an engine's worker searches, by the names that requests give."""

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import torch

from llmrec.exceptions import ArtefactError, RequestError
from llmrec.trie_tensors import TrieTensors

DEFAULT_FILES = 64


class Indexes:
    """Tries of a folder's files, each mapped when first asked for; the least recently used are let go.

    Files are immutable: a new version of a catalog has a new name, so a swap is no more than a request that names it,
    and requests of both versions are searched side by side. A trie that is let go lives on in the searches that hold
    it, and is mapped anew when asked for again.
    """

    def __init__(
        self,
        folder: str | Path | None,
        start: str | Callable[[], TrieTensors],
        device: torch.device | str = "cpu",
        most: int = DEFAULT_FILES,
    ) -> None:
        """
        Args:
            folder: of the files; None if there are none but the one at start.
            start: the trie of requests that name none: a file of the folder, or how it is made.
            device: of the tries. A file stays mapped where that is the host.
            most: files kept at once, beside the one at start.

        Raises:
            ArtefactError: if the trie at start is not there whole.
        """
        self._folder = None if folder is None else Path(folder)
        self._device, self._most = device, max(1, most)
        self._known: OrderedDict[str, TrieTensors] = OrderedDict()
        self._start = self._map(start) if isinstance(start, str) else start()

    def of(self, name: str) -> TrieTensors:
        """The trie of a file of the folder, the same object while it is kept; "" for the one at start.

        Raises:
            RequestError: if there is no such file, it is no whole trie, or the name leads out of the folder.
        """
        if not name:
            return self._start
        if name not in self._known:
            try:
                found = self._map(name)
            except ArtefactError as error:
                raise RequestError(str(error)) from error
            # A file that was removed is asked for no more, and its space is free only when no one maps it.
            assert self._folder is not None
            for gone in [kept for kept in self._known if not (self._folder / kept).exists()]:
                del self._known[gone]
            self._known[name] = found
            while len(self._known) > self._most:
                self._known.popitem(last=False)
        self._known.move_to_end(name)
        return self._known[name]

    def _map(self, name: str) -> TrieTensors:
        bare = Path(name).name == name and not name.startswith(".") and "\\" not in name and name.isprintable()
        if self._folder is None or not bare or len(name.encode()) > 255:
            raise RequestError(
                f"{name[:80]!r} is no name of a file in the index folder. Give the bare name of a file that is there."
            )
        return TrieTensors.map(self._folder / name, device=self._device)
