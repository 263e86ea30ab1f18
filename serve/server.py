"""Serves an artefact over HTTP with vLLM; `llmrec serve` does the same from anywhere.

    python serve/server.py --config serve/recipes/cpu.yaml --artefact runs/quickstart/artefact
    python serve/server.py --config serve/recipes/gpu.yaml --artefact user/name --port 9000

Flags override the recipe. The process becomes vLLM's server.
"""

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from llmrec.script import parser, run

if TYPE_CHECKING:
    from trl import TrlParser


@dataclass
class ServeArguments:
    """What to serve, and how."""

    artefact: str = field(metadata={"help": "Artefact folder, or a Hub id."})
    host: str = field(default="127.0.0.1", metadata={"help": "Address to listen on; 0.0.0.0 is every one."})
    port: int = field(default=8000, metadata={"help": "Port to listen on."})
    dtype: str = field(default="auto", metadata={"help": "auto (as saved), float32, bfloat16 or float16."})
    max_num_seqs: int | None = field(default=None, metadata={"help": "Requests searched together."})
    max_model_len: int | None = field(default=None, metadata={"help": "Tokens of a prompt."})
    kv_cache_gib: float | None = field(default=None, metadata={"help": "Memory for the KV cache on a CPU, in GiB."})
    max_beams: int | None = field(default=None, metadata={"help": "The widest search that a request may ask for."})
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit on the Hub."})
    vllm_args: list[str] = field(default_factory=list, metadata={"help": "Further arguments for vLLM's own server."})


def make_parser() -> "TrlParser":
    return parser((ServeArguments,), __doc__)


def main(arguments: ServeArguments) -> None:
    from llmrec.cli.serve import serve

    serve(**asdict(arguments))


if __name__ == "__main__":
    run(main, make_parser())
