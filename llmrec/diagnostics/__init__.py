"""Whether a tokenizer is healthy: what its codes use, share, keep apart and leave to a perfect model.

Works on codes (N, L) alone, whatever made them; nothing here knows of language models.
"""

from llmrec.diagnostics.branching import prefix_branching
from llmrec.diagnostics.ceiling import beam_recall, collision_ceiling
from llmrec.diagnostics.groups import collision_groups
from llmrec.diagnostics.neighbours import co_sold, nearest_texts, neighbour_purity
from llmrec.diagnostics.reconstruction import reconstruction
from llmrec.diagnostics.usage import code_counts, level_usage

__all__ = [
    "beam_recall",
    "co_sold",
    "code_counts",
    "collision_ceiling",
    "collision_groups",
    "level_usage",
    "nearest_texts",
    "neighbour_purity",
    "prefix_branching",
    "reconstruction",
]
