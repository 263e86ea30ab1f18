"""Serves an artefact over HTTP; `llmrec serve` does the same from anywhere.

    python serve/server.py --config serve/recipes/cpu.yaml --artefact runs/quickstart/artefact
    python serve/server.py --config serve/recipes/gpu.yaml --artefact user/name --port 9000
    python serve/server.py --config serve/recipes/transformers.yaml --artefact runs/quickstart/artefact
    python serve/server.py --config serve/recipes/replica.yaml --artefact user/name --catalog books=books music=music

Flags override the recipe. The API key comes by LLMREC_API_KEY or LLMREC_API_KEY_FILE, a history store with a password
by LLMREC_HISTORY_STORE. The process becomes the server's parent, and ends with its exit code.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from llmrec.script import parser, run

if TYPE_CHECKING:
    from trl import TrlParser


@dataclass
class ServeArguments:
    """What to serve, and how."""

    artefact: str = field(metadata={"help": "Artefact folder, or a Hub id."})
    host: str = field(default="127.0.0.1", metadata={"help": "Address to listen on; 0.0.0.0 is every one."})
    port: int = field(default=8000, metadata={"help": "Port to listen on; 0 takes a free one."})
    backend: Literal["vllm", "transformers"] = field(default="vllm", metadata={"help": "What runs the model."})
    dtype: str = field(default="auto", metadata={"help": "auto (as saved), float32, bfloat16 or float16."})
    max_num_seqs: int | None = field(default=None, metadata={"help": "Requests searched together."})
    max_model_len: int | None = field(default=None, metadata={"help": "Tokens of a prompt."})
    kv_cache_gib: float | None = field(default=None, metadata={"help": "Memory for the KV cache on a CPU, in GiB."})
    tensor_parallel_size: int = field(default=1, metadata={"help": "Parts that vLLM splits each layer into."})
    data_parallel_size: int = field(default=1, metadata={"help": "Engines of vLLM that share the requests."})
    catalog: list[str] = field(
        default_factory=list, metadata={"help": "NAME=FOLDER of catalogs or artefacts, the default one first."}
    )
    adapter: list[str] = field(default_factory=list, metadata={"help": "NAME=FOLDER of LoRA adapters."})
    history_store: str | None = field(default=None, metadata={"help": "memory:, sqlite:PATH or redis://…"})
    index_folder: Path | None = field(
        default=None, metadata={"help": "Keeps the catalogs' tries for the next start; one server's alone."}
    )
    max_beams: int | None = field(default=None, metadata={"help": "The widest search that a request may ask for."})
    max_rows: int | None = field(default=None, metadata={"help": "Beam rows that are searched at once."})
    max_body_bytes: int | None = field(default=None, metadata={"help": "Bytes of a request's body."})
    deadline_ms: int | None = field(default=None, metadata={"help": "Milliseconds for requests without a deadline."})
    limit: list[str] = field(default_factory=list, metadata={"help": "NAME=NUMBER of other limits."})
    drain_seconds: float = field(
        default=30.0, metadata={"help": "How long a server that is stopped may go on answering what it has."}
    )
    supervise: bool = field(default=False, metadata={"help": "Start the server again whenever it dies."})
    quiet: bool = field(default=False, metadata={"help": "Show the stages of the start, but not the log."})
    retrieval: Literal["exact", "faiss-flat", "faiss-ivf", "faiss-hnsw"] = field(
        default="exact", metadata={"help": "How a sequence model's items are found."}
    )
    log_file: Path | None = field(default=None, metadata={"help": "A file that the log is appended to."})
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit on the Hub."})
    vllm_args: list[str] = field(default_factory=list, metadata={"help": "Further arguments for vLLM's own server."})


def make_parser() -> "TrlParser":
    return parser((ServeArguments,), __doc__)


def main(arguments: ServeArguments) -> None:
    from llmrec.cli.serve import serve

    serve(**asdict(arguments))


if __name__ == "__main__":
    run(main, make_parser())
