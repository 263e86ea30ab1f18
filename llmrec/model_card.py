"""The model card: the README.md of an artefact on the Hub, made from what the artefact and its evaluations say.

Names, ids and settings come from files and are escaped. Nothing of the machine that trained it gets in: of paths, the
last part alone is kept.
"""

import html
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import yaml
from jinja2 import Environment, StrictUndefined

from llmrec.artefact import CALIBRATION_FILE, listed_files
from llmrec.artefact_parts import PROMPT_FILE, is_sequence
from llmrec.catalog import CATALOG_FOLDER, Catalog
from llmrec.catalog_versions import CatalogVersions
from llmrec.evaluation.outcome import outcome_rows
from llmrec.exceptions import ArtefactError, DataError
from llmrec.prompt import EVENT_COLUMNS, Prompt

_TEMPLATE = Path(__file__).with_name("model_card.jinja")
_RANKED = re.compile(r"(HR|NDCG|MRR)@\d+")
_RATED = ("AUC", "UAUC", "log_loss", "Brier", "ECE")
_PART = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?"
_HUB_ID = re.compile(rf"{_PART}/{_PART}")
_LICENCE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
_PATH = re.compile(r"(/|~|\\\\|file:|[A-Za-z]:[\\/])")
# Of the settings' "training", what has a section of its own.
FURTHER = "further"


def model_card(
    settings: Mapping[str, Any],
    catalog: Catalog,
    config: Mapping[str, Any],
    *,
    repo_id: str | None = None,
    evaluations: Sequence[Mapping[str, Any]] = (),
    licence: str | None = None,
    base_model: str | None = None,
    datasets: Sequence[str] = (),
    size: int | None = None,
    is_calibrated: bool = False,
    prompt: Prompt | None = None,
) -> str:
    """The card as Markdown, headed by the YAML that the Hub reads.

    What a model went through after its first training (reinforcement learning, distillation, reasoning steps) stands
    in the settings' `training`, as the list `further`, the oldest first. Each entry is a mapping of `method` (its
    name), `began_with` (which model), `said` (sentences), `outcome` (of `llmrec.evaluation.outcome`, or None where
    nothing was evaluated) and `settings`. It becomes a section of the card, whatever it found.

    Args:
        settings: what `llmrec.json` holds.
        catalog: of the artefact.
        config: what `config.json` holds: the model's kind.
        repo_id: where it will lie, `user/name`, for the examples.
        evaluations: documents of train/score.py or train/rate.py, on the split of the training.
        licence: the Hub's id of the licence of the weights, such as `apache-2.0`.
        base_model: Hub id of the checkpoint that was trained on; default: what the settings record, if it is an id.
        datasets: Hub ids of what it was trained on.
        size: of all files together, in bytes.
        is_calibrated: whether its probabilities of Yes are calibrated.
        prompt: the served one, whose needs the example meets; a sequence model has none.

    Raises:
        DataError: if an evaluation is of another split or is none, or the licence or an id is none.
    """
    if licence is not None and not _LICENCE.fullmatch(licence):
        raise DataError(f"{licence!r} is no licence's id. Give one that the Hub knows, such as apache-2.0, or other.")
    recorded = settings.get("training", {}).get("backbone", {}).get("backbone")
    if base_model is None and isinstance(recorded, str) and _HUB_ID.fullmatch(recorded):
        base_model = recorded
    for given in (*datasets, *([] if base_model is None else [base_model])):
        if not _HUB_ID.fullmatch(given):
            raise DataError(f"{given!r} is no Hub id. Write it as user/name.")
    split = str(settings.get("split", ""))
    for document in evaluations:
        if document.get("split") != split:
            raise DataError(
                f"The evaluation is of the split {str(document.get('split'))[:12]!r}, and the artefact was trained on "
                f"{split[:12]!r}. Evaluate this artefact, with train/score.py."
            )
    front = {
        "library_name": "llmrec",
        **({} if catalog.is_rows else {"pipeline_tag": "text-generation"}),
        **({} if licence is None else {"license": licence}),
        **({} if base_model is None else {"base_model": base_model}),
        **({"datasets": list(datasets)} if datasets else {}),
        "tags": [
            "recommender-system",
            f"{_kind(catalog)}-recommendation",
            *(() if catalog.is_text or catalog.is_rows else ("semantic-ids",)),
            "llmrec",
        ],
    }
    training = _without_paths(settings.get("training", {}))
    is_evaluated = bool(evaluations) or any(entry.get("outcome") for entry in training.get(FURTHER, []))
    environment = Environment(undefined=StrictUndefined, autoescape=False, keep_trailing_newline=True)
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        front_matter=yaml.safe_dump(front, sort_keys=False, allow_unicode=False),
        name=_escaped(PurePosixPath(repo_id).name if repo_id else f"A {_kind(catalog)} recommender"),
        repo_id=repo_id if repo_id and _HUB_ID.fullmatch(repo_id) else "user/name",
        architecture=_escaped(_architecture(config)),
        is_text=catalog.is_text,
        is_rows=catalog.is_rows,
        llmrec=_escaped(str(settings.get("llmrec", "of unknown version"))),
        facts=[(name, _escaped(value)) for name, value in _facts(settings, catalog, base_model, size).items()],
        data=[_escaped(line) for line in _data(settings, catalog, datasets)],
        evaluations=[_evaluation(document) for document in evaluations],
        example=_example(catalog, prompt),
        training=_literal(
            {k: v for k, v in training.items() if k not in ("evaluations", "versions", FURTHER)}, indent=2
        )
        if training
        else "",
        further=[_further(entry) for entry in training.get(FURTHER, [])],
        licence=_escaped(_licence(licence, base_model)),
        limits=[_escaped(line) for line in _limits(is_evaluated, is_calibrated)],
        versions=_escaped(", ".join(f"{name} {value}" for name, value in training.get("versions", {}).items())),
    )


def card_of(
    folder: str | Path,
    repo_id: str | None = None,
    evaluations: Sequence[str | Path] = (),
    licence: str | None = None,
    base_model: str | None = None,
    datasets: Sequence[str] = (),
) -> str:
    """The card of an artefact's folder, with evaluations from JSON files; arguments as for `model_card`.

    Raises:
        ArtefactError: if the folder is no artefact.
        DataError: if a file is no evaluation of it, or the licence or an id is none.
    """
    folder = Path(folder)
    files = listed_files(folder)
    try:
        settings, config = (_read_mapping(folder / name) for name in ("llmrec.json", "config.json"))
    except (OSError, ValueError) as error:
        raise ArtefactError(
            f"{folder} is no artefact of a recommender ({error}). Train one with train/sft.py."
        ) from error
    documents = []
    for path in evaluations:
        try:
            documents.append(_read_mapping(Path(path)))
        except (OSError, ValueError) as error:
            raise DataError(
                f"{path} is no evaluation that can be read ({error}). Give what train/score.py wrote."
            ) from error
    return model_card(
        settings,
        CatalogVersions(folder / CATALOG_FOLDER).load(),
        config,
        repo_id=repo_id,
        evaluations=documents,
        licence=licence,
        base_model=base_model,
        datasets=datasets,
        size=sum(files.values()),
        is_calibrated=(folder / CALIBRATION_FILE).is_file(),
        prompt=None if is_sequence(folder) else Prompt.read(folder / PROMPT_FILE),
    )


def _read_mapping(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} holds no JSON object")
    return content


def _kind(catalog: Catalog) -> str:
    return "sequential" if catalog.is_rows else "generative"


def _architecture(config: Mapping[str, Any]) -> str:
    if encoder := config.get("encoder"):  # of a sequence model
        return f"{encoder.get('model_type', 'an encoder')} in a SequenceModel"
    kinds = config.get("architectures") or [config.get("model_type", "a causal language model")]
    return str(kinds[0])


def _facts(settings: Mapping[str, Any], catalog: Catalog, base_model: str | None, size: int | None) -> dict[str, str]:
    facts: dict[str, str] = {}
    if catalog.is_rows:
        facts["items"] = f"{catalog.num_live:,} to recommend"
    elif catalog.is_text:
        facts["items"] = f"{catalog.num_live:,} to recommend, each spelt by its title"
    else:
        facts["items"] = f"{catalog.num_live:,} to recommend, each spelt by {catalog.num_levels} codes"
        facts["codebooks"] = " × ".join(map(str, catalog.codebook_sizes))
    facts["catalog"] = catalog.version
    if base_model or not catalog.is_rows:
        facts["trained from"] = base_model or "see Training"
    parameters = settings.get("training", {}).get("cost", {}).get("parameters")
    if isinstance(parameters, int):
        facts["parameters"] = f"{parameters / 1e6:,.1f} M"
    if size is not None:
        facts["files"] = f"{size / 1e6:,.1f} MB"
    facts["history"] = f"the {settings.get('max_history')} most recent items"
    facts["search"] = "every item is scored" if catalog.is_rows else f"{settings.get('num_beams')} beams"
    return facts


def _example(catalog: Catalog, prompt: Prompt | None) -> str:
    """A call's arguments that the served prompt can be rendered with."""
    history = catalog.ids[:2]
    said = [_literal(history)]
    shown = set() if prompt is None else prompt.attributes & set(EVENT_COLUMNS)
    if shown:
        example = {"action": "view", "domain": "shop", "gap": 1_700_000_000}
        event = {"timestamp" if name == "gap" else name: example[name] for name in EVENT_COLUMNS if name in shown}
        said.append(f"events={_literal([event] * len(history))}")
    if prompt is not None:
        said += [f'{name}="..."' for name in sorted(prompt.variables - {"history"})]
    return ", ".join(said)


def _data(settings: Mapping[str, Any], catalog: Catalog, datasets: Sequence[str]) -> list[str]:
    protocol = _without_paths(dict(settings.get("protocol", {})))
    name = protocol.pop("split", None)
    details = ", ".join(f"{key} {value}" for key, value in protocol.items())
    lines = [f"Trained on {', '.join(datasets) if datasets else 'interactions that are not part of this repository'}."]
    if name:
        lines.append(f"Split: {name}{f' ({details})' if details else ''}; validation and test were held out.")
    lines.append(f"Split's content hash: {settings.get('split') or 'not recorded'}")
    lines.append(f"Catalog's content hash: {catalog.content_hash}")
    return lines


def _evaluation(document: Mapping[str, Any]) -> dict[str, str]:
    """One evaluation's caption and table: every system of it, with 95 % intervals where the document has them."""
    systems = document.get("systems")
    if not isinstance(systems, Mapping) or not systems:
        raise DataError("A document has no systems, so it is no evaluation. Give what train/score.py wrote.")
    names = [
        name
        for name in dict.fromkeys(name for values in systems.values() for name in values)
        if _RANKED.fullmatch(name) or name in _RATED
    ]
    if not names:
        raise DataError(
            f"The evaluation of {', '.join(map(str, systems))} has no metric that a card shows. "
            "Give what train/score.py or train/rate.py wrote."
        )
    rows = [["system", *names], ["---"] * (1 + len(names))]
    for system, values in systems.items():
        cells = [_cell(values.get(name), values.get(f"{name} interval95")) for name in names]
        rows.append([_escaped(str(system)), *cells])
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    counted = [
        f"{document[name]:,} {name}" for name in ("cases", "users", "items") if isinstance(document.get(name), int)
    ]
    what = "Ratings" if set(names) & set(_RATED) else "Full ranking of the catalog"
    caption = (
        f"{what}, {document.get('part', 'test')} part: {', '.join(counted)}. In brackets: 95 % bootstrap intervals."
    )
    return {"caption": _escaped(caption), "table": table}


def _further(entry: Mapping[str, Any]) -> dict[str, Any]:
    """One further training: its heading, what is said of it, its outcome as a table, and its settings."""
    said = [f"It began with {entry['began_with']}."] if entry.get("began_with") else []
    said += [str(sentence) for sentence in entry.get("said", [])]
    outcome, table = entry.get("outcome"), ""
    if outcome:
        header, rows = outcome_rows(outcome)
        lines = [[_escaped(cell) for cell in row] for row in (header, *rows)]
        lines.insert(1, ["---"] * len(header))
        table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        seeds = f", mean of {outcome['seeds']} seeds" if outcome.get("seeds", 1) > 1 else ""
        said.append(
            f"Whether it helped, on {outcome['cases']:,} cases of {outcome['users']:,} users of the {outcome['part']} "
            f"part{seeds} (differences are paired, with 95 % bootstrap intervals over users; p by Holm for "
            f"{outcome['tests']} tests): {outcome['sentence']}"
        )
    else:
        said.append("Whether it helped is not known from this card: before and after were not evaluated.")
    return {
        "method": _escaped(str(entry.get("method", "further training"))),
        "said": [_escaped(sentence) for sentence in said],
        "table": table,
        "settings": _literal(entry["settings"], indent=2) if entry.get("settings") else "",
    }


def _cell(value: Any, interval: Any) -> str:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return "–"
    shown = f"{value:.4f}"
    if isinstance(interval, list) and len(interval) == 2 and all(isinstance(end, int | float) for end in interval):
        shown += f" [{interval[0]:.4f}, {interval[1]:.4f}]"
    return shown


def _licence(licence: str | None, base_model: str | None) -> str:
    of_base = f" The licence of {base_model} holds for what comes from it." if base_model else ""
    if licence is None:
        return f"Whoever published this stated no licence, so ask before you use it.{of_base}"
    return f"The weights are under {licence}.{of_base} The items' texts belong to whoever wrote them."


def _limits(is_evaluated: bool, is_calibrated: bool) -> list[str]:
    quality = (
        "The figures are of held-out interactions of the log above. They say nothing of other catalogs, users or "
        "times, and an offline figure is no promise of clicks or sales."
        if is_evaluated
        else "Its quality is not known from this card: there is no evaluation in it."
    )
    probabilities = (
        "Its answers of Yes and No were calibrated on the validation part; "
        if is_calibrated
        else "Its probabilities were not calibrated; "
    )
    return [
        quality,
        "It learnt from what users did with what they were shown, and repeats that choice's bias to popular items.",
        "Items that the catalog does not hold are never recommended; new ones have to be added to it.",
        probabilities + "scores of recommendations are log-probabilities and order items, nothing more.",
        "It was not examined for fairness between groups, nor for how much of single users' histories it remembers.",
    ]


def _without_paths(value: Any) -> Any:
    """JSON in which of every path of a machine the last part is left."""
    if isinstance(value, str) and _PATH.match(value):
        return re.split(r"[\\/]", value.rstrip("\\/"))[-1]
    if isinstance(value, Mapping):
        return {name: _without_paths(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_without_paths(entry) for entry in value]
    return value


def _literal(value: Any, indent: int | None = None) -> str:
    """JSON for a block of code: ASCII, so that no letter hides or turns lines round, and without the block's fence."""
    return json.dumps(value, indent=indent, ensure_ascii=True, default=str).replace("`", "\\u0060")


def _escaped(text: str) -> str:
    """Text that Markdown shows as it is, on one line, also inside a table; without what cannot be seen."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return re.sub(r"([\\`*_\[\]|~$#])", r"\\\1", html.escape(line, quote=False))
