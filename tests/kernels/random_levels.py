"""Random trie levels and beams for the tests of selection, and its definition."""

import math
from dataclasses import dataclass

import numpy as np
import torch

from llmrec.kernels.select import Level, Selection, pad_keys


@dataclass
class Case:
    """The arguments of `select`, and what the definition needs of them."""

    level: Level
    logits: torch.Tensor
    score: torch.Tensor
    node: torch.Tensor
    width: int
    normal: torch.Tensor
    dead: torch.Tensor | None

    def arguments(self) -> tuple:
        return (self.level, self.logits, self.score, self.node, self.width, self.normal, self.dead)


def random_level(rng, above, fan_out, vocabulary, ragged):
    """Nodes with 0 to `fan_out` children each, one node at least with all of them, distinct tokens per node."""
    counts = rng.integers(0, fan_out + 1, size=above)
    counts[rng.integers(above)] = fan_out
    start = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    token = np.concatenate([np.sort(rng.choice(vocabulary, size=count, replace=False)) for count in counts])
    if ragged:
        token[rng.random(len(token)) < 0.2] = -1
    return Level.of(torch.from_numpy(start), torch.from_numpy(token.astype(np.int32)))


def random_case(seed, dtype=torch.float32, most_beams=24, most_fan_out=20, hostile=True):
    """Rounded numbers, so that ties abound; dead beams, excluded nodes, and logits that are no numbers or infinite."""
    rng = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    requests, beams, vocabulary = int(rng.integers(1, 4)), int(rng.integers(1, most_beams)), int(rng.integers(4, 50))
    above, fan_out = int(rng.integers(1, 20)), int(rng.integers(1, min(vocabulary, most_fan_out) + 1))
    level = random_level(rng, above, fan_out, vocabulary, ragged=seed % 2 == 0)
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    logits = (torch.randn(requests, beams, vocabulary, generator=generator) * 2).round().to(dtype)
    score = ((torch.randn(requests, beams, generator=generator) * 2).round() / 2).to(exact)
    if hostile:
        noise = torch.rand(logits.shape, generator=generator)
        logits[noise < 0.06] = torch.nan
        logits[(noise > 0.06) & (noise < 0.12)] = -torch.inf
        logits[(noise > 0.12) & (noise < 0.14)] = torch.inf
        score[torch.rand(score.shape, generator=generator) < 0.2] = -torch.inf
    node = torch.from_numpy(np.sort(rng.integers(0, above, size=(requests, beams)), axis=1))
    normal = torch.randn(requests, beams, generator=generator).round().to(exact)
    dead = None
    if seed % 3:
        keys = np.unique(rng.integers(0, requests * len(level.token), size=int(rng.integers(0, 2 * len(level.token)))))
        dead = pad_keys(torch.from_numpy(keys), len(keys) + int(rng.integers(0, 4)))  # often without any room
    return Case(level, logits, score, node, int(rng.integers(1, 60)), normal, dead)


def selection_by_definition(case, over_legal=False):
    """With Python lists: all legal children of the live beams, sorted by score and then by place, the best kept."""
    gone = set() if case.dead is None else set(case.dead.tolist())
    rows = []
    for request, beams in enumerate(case.node.tolist()):
        found = []
        for beam, node in enumerate(beams):
            children = range(int(case.level.start[node]), int(case.level.start[node + 1]))
            legal = [c for c in children if request * len(case.level.token) + c not in gone]
            logits = [case.logits[request, beam, max(0, int(case.level.token[c]))].to(case.score.dtype) for c in legal]
            normal = case.normal[request, beam]
            if over_legal:
                normal = torch.stack(logits).logsumexp(0) if logits else torch.zeros(())
                normal = torch.zeros_like(normal) if torch.isinf(normal) else normal
            for child, logit in zip(legal, logits, strict=True):
                token = int(case.level.token[child])
                gain = torch.zeros_like(logit) if token < 0 else logit - normal
                score = case.score[request, beam] + gain
                if not math.isnan(score) and score > -math.inf:
                    found.append((-score.item(), len(found), child, beam, token, score, gain))
        kept = sorted(sorted(found)[: case.width], key=lambda entry: entry[1])
        empty = (None, None, 0, 0, int(case.level.token[0]), torch.tensor(-torch.inf), torch.tensor(0.0))
        rows.append([*kept, *[empty] * (case.width - len(kept))])

    def column(place, dtype):
        return torch.tensor([[row[place] for row in request] for request in rows], dtype=dtype)

    exact = case.score.dtype
    return Selection(*(column(2 + at, torch.long) for at in range(3)), column(5, exact), column(6, exact))


def same(first, second):
    return all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
