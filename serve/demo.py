"""Serves the page on which a recommender is tried out by hand; `llmrec demo` does the same from anywhere.

    python serve/demo.py --url http://127.0.0.1:8000
    python serve/demo.py --url http://127.0.0.1:8000 --compare http://127.0.0.1:8001
    python serve/demo.py --artefact runs/quickstart/artefact --backend transformers --port 7861

A server that wants an API key gets the one in LLMREC_API_KEY, the second server the one in LLMREC_COMPARE_API_KEY.
"""

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Literal

from llmrec.script import parser, run

if TYPE_CHECKING:
    from trl import TrlParser


@dataclass
class DemoArguments:
    """Which servers the page asks, and where it listens."""

    url: str | None = field(default=None, metadata={"help": "The server; http://127.0.0.1:8000 if nothing is said."})
    compare: str | None = field(default=None, metadata={"help": "A second server, to see both side by side."})
    artefact: str | None = field(
        default=None, metadata={"help": "Artefact folder, or a Hub id, to start a server for, in the place of a URL."}
    )
    backend: Literal["vllm", "transformers"] = field(
        default="vllm", metadata={"help": "Of the server that is started."}
    )
    host: str = field(default="127.0.0.1", metadata={"help": "Address to listen on; 0.0.0.0 is every one."})
    port: int = field(default=7860, metadata={"help": "Port to listen on."})
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the artefact on the Hub."})


def make_parser() -> "TrlParser":
    return parser((DemoArguments,), __doc__)


def main(arguments: DemoArguments) -> None:
    from llmrec.cli.demo import demo

    demo(**asdict(arguments))


if __name__ == "__main__":
    run(main, make_parser())
