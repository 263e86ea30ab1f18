"""RunPlace: the folder of one training of a study, and what it says: done, failed, begun, or nothing yet."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

from llmrec.storage import digest_of, write_json
from llmrec.study.plan import StudyRun

State = Literal["done", "failed", "begun", "new"]

METRICS = "metrics.json"
RUN = "run.json"
LOG = "log.txt"
# Flags that name files or folders: what is in them decides a run, not where they lie.
DATA = ("interactions", "items", "item_embeddings", "semantic_ids", "body")


@cache
def first_digest(path: str) -> str:
    """`digest_of`, but what changes while this process runs keeps its first digest."""
    return digest_of(path)


class RunPlace:
    """A run's folder. It holds:

    * `run.json`: the run's identity and flags, the seconds that it has taken, and how it failed, if it did;
    * `recipe.yaml`: its flags, by which it can be repeated by hand;
    * `log.txt`: what the script said, of all its starts;
    * what the script writes: `artefact/`, its checkpoints, `metrics.json`, `evaluation/`.
    """

    def __init__(self, folder: str | Path, run: StudyRun) -> None:
        """
        Args:
            folder: the study's.
            run: whose place it is.
        """
        self.run = run
        data = {name: first_digest(str(run.flags[name])) for name in DATA if name in run.flags}
        plain = {name: value for name, value in run.flags.items() if name not in DATA}
        described = json.dumps({"flags": plain, "data": data}, sort_keys=True, default=str)
        self.identity = hashlib.sha256(described.encode()).hexdigest()
        self.folder = Path(folder) / f"{run.cell}-seed={run.seed}-{self.identity[:8]}"

    @property
    def artefact(self) -> Path:
        """Where the script saves the model."""
        return self.folder / "artefact"

    def state(self) -> State:
        """What is there."""
        if self.metrics() is not None:
            return "done"
        record = self.record()
        return "new" if not record else "failed" if record.get("failed") else "begun"

    def record(self) -> dict[str, Any]:
        """`run.json`; empty if there is none, or one of another run."""
        found = _read(self.folder / RUN)
        return found if found.get("identity") == self.identity else {}

    def note(self, seconds: float = 0.0, failed: Mapping[str, Any] | None = None) -> None:
        """Writes `run.json`: `seconds` more were taken; and how it ended, if it failed."""
        taken = float(self.record().get("seconds", 0.0)) + seconds
        write_json(
            self.folder / RUN,
            {
                "identity": self.identity,
                "cell": self.run.cell,
                "seed": self.run.seed,
                "flags": dict(self.run.flags),
                "seconds": round(taken, 1),
                "failed": dict(failed) if failed else None,
            },
        )

    def metrics(self) -> dict[str, Any] | None:
        """What the script wrote when it had finished; None if it has not, or not with these flags."""
        found = _read(self.folder / METRICS)
        if not self.record() or not isinstance(found.get("test"), dict) or self.disagreement(found):
            return None
        return found

    def disagreement(self, metrics: Mapping[str, Any]) -> str:
        """How `metrics.json` contradicts the flags; empty if it does not."""
        said: dict[str, Any] = {}
        for part in metrics.get("training", {}).values():
            said |= part if isinstance(part, dict) else {}
        for name, value in self.run.flags.items():
            if name in said and name not in DATA and not _same(said[name], value):
                return f"{METRICS} says {name} {said[name]!r}, and the run has {value!r}"
        return ""

    def last_lines(self, count: int = 15) -> list[str]:
        """The end of the log, progress bars as they stood last."""
        path = self.folder / LOG
        if not path.is_file():
            return []
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - 100_000))
            text = file.read().decode("utf-8", errors="replace")
        lines = [line.rstrip().rpartition("\r")[2] for line in text.split("\n")]
        return [line[:500] for line in lines if line.strip()][-count:]


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _same(said: Any, asked: Any) -> bool:
    if isinstance(asked, Sequence) and not isinstance(asked, str):
        return isinstance(said, list) and len(said) == len(asked) and all(map(_same, said, asked))
    if isinstance(said, bool) or isinstance(asked, bool):
        return said is asked or str(said).lower() == str(asked).lower()
    try:
        return float(said) == float(asked)
    except (TypeError, ValueError):
        return str(said) == str(asked)
