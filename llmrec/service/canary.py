"""Two checks of an engine: that a search computes what ordinary prefills compute, and that it answers at all."""

import math

from llmrec.engine.request import SearchEngine, SearchParameters
from llmrec.exceptions import EngineError
from llmrec.service.live_version import ServedCatalog

# Prefill and beam step of one model agree to rounding; a wrong cache layout is off by orders of magnitude.
TOLERANCE = {"float64": 1e-6, "float32": 1e-3, "bfloat16": 0.5, "float16": 0.1}

_BEAMS = 4


async def check(engine: SearchEngine, served: ServedCatalog) -> float:
    """Compares the best item's log-probability with the sum over its tokens, each after a prompt of its own.

    It takes as many engine requests as the item has tokens, and one. Returns the difference.

    Raises:
        EngineError: if they differ by more than the dtype's `TOLERANCE`, or the search found no live item.
    """
    prompt = served.encoder.example()
    row, score = await _best(engine, served, prompt, _BEAMS)
    total = 0.0
    for token in served.catalog.tokens_of(row):
        asked = SearchParameters(num_beams=0, token=token, index=served.index)
        total += (await engine.search(prompt, asked)).scores[0]
        prompt = [*prompt, token]
    difference = abs(total - score)
    if not difference <= TOLERANCE.get(engine.dtype, TOLERANCE["float32"]):
        raise EngineError(
            f"A beam search gave the log-probability {score:.6f}, ordinary prefill {total:.6f}. The engine works "
            "otherwise than the one llmrec was built for: use vllm 0.32, or the transformers backend."
        )
    return difference


async def canary(engine: SearchEngine, served: ServedCatalog) -> None:
    """One search for one item, by one beam; raises EngineError if the engine does not answer it with a live item."""
    await _best(engine, served, served.encoder.example(), 1)


async def _best(engine: SearchEngine, served: ServedCatalog, prompt: list[int], beams: int) -> tuple[int, float]:
    """The best item's row and score."""
    found = await engine.search(prompt, SearchParameters(k=1, num_beams=beams, index=served.index))
    if len(found.rows) != 1 or not math.isfinite(found.scores[0]):
        raise EngineError(
            f"A search for one item found {len(found.rows)}: the model's scores are not numbers. Its weights are "
            "broken or its dtype overflows; serve it in float32."
        )
    row = found.rows[0]
    if not 0 <= row < len(served.catalog) or served.catalog.retired[row]:
        raise EngineError(
            f"A search of catalog {served.name!r}, version {served.version}, found the row {row}, which is no live "
            "item of it. The engine reads another index: restart the server."
        )
    return row, found.scores[0]
