"""ServiceSettings: what a server is started with beside its engine, and how that reaches the server's process."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Self

from llmrec.exceptions import RequestError
from llmrec.service.drain import DEFAULT_DRAIN_SECONDS
from llmrec.service.limits import Limits

SERVICE = "LLMREC_SERVICE"  # the variable


@dataclass(frozen=True)
class ServiceSettings:
    """What the service is to be; secrets are not here (`Keys.from_environment`).

    Attributes:
        model: its name in `/v1/models` and in answers; "" for the artefact's folder name.
        catalogs: name -> folder of a catalog or an artefact; the first is the default one. Empty: the artefact's own,
            under the name "default".
        history_store: `memory:`, `sqlite:PATH` or `redis://…`; "" for none. A password in it stays off command lines.
        adapters: name -> folder of a LoRA adapter, for engines that load them here; vLLM loads its own.
        retrieval: how a sequence model's items are found (`llmrec.sequence.index.Retrieval`).
        drain_seconds: what answers in flight may take when the server is stopped.
        launch: `/ready` repeats it, so that whoever started the server knows it for theirs.
        limits: of requests.
    """

    model: str = ""
    catalogs: Mapping[str, str] = field(default_factory=dict)
    history_store: str = ""
    adapters: Mapping[str, str] = field(default_factory=dict)
    retrieval: str = "exact"
    drain_seconds: float = DEFAULT_DRAIN_SECONDS
    launch: str = ""
    limits: Limits = field(default_factory=Limits)

    def named(self, model: str, launch: str) -> Self:
        """The same under other names."""
        return replace(self, model=model, launch=launch)

    def require_kind(self, artefact: str, is_sequence: bool) -> None:
        """Raises RequestError for adapters to a sequence model, and for another retrieval than "exact" to none."""
        wrong, other = "adapters", "sequence"
        if not is_sequence:
            wrong, other = f"retrieval by {self.retrieval!r}", "language"
        if self.adapters if is_sequence else self.retrieval != "exact":
            raise RequestError(f"There is no {wrong} for {artefact!r}, which is a {other} model. Leave it out.")

    def environment(self) -> dict[str, str]:
        """The variable that `from_environment` reads."""
        return {SERVICE: json.dumps(asdict(self))}

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Self:
        """What LLMREC_SERVICE says, a JSON object of some of the fields; the others have their defaults.

        Raises:
            RequestError: if it cannot be read, or a limit is out of its range.

        >>> made = ServiceSettings(model="m", limits=Limits(max_k=7))
        >>> ServiceSettings.from_environment(made.environment()) == made
        True
        """
        try:
            given = json.loads(environment.get(SERVICE) or "{}")
            return cls(**(given | {"limits": Limits(**given.get("limits", {}))}))
        except RequestError:
            raise
        except (ValueError, TypeError, AttributeError) as error:
            raise RequestError(f"{SERVICE} cannot be read: {error}. Give a JSON object of settings.") from error
