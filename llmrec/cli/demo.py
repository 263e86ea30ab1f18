"""`llmrec demo`: the page over servers that run, or over one that it starts for itself."""

import os
import shutil
import socket
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from llmrec.client.calls import API_KEY
from llmrec.exceptions import RequestError

if TYPE_CHECKING:
    from llmrec.engine.launch import Backend

COMPARE_API_KEY = "LLMREC_COMPARE_API_KEY"
DEFAULT_URL = "http://127.0.0.1:8000"


def demo(
    url: str | None = None,
    compare: str | None = None,
    artefact: str | None = None,
    backend: "Backend" = "vllm",
    host: str = "127.0.0.1",
    port: int = 7860,
    revision: str | None = None,
) -> None:
    """Serves the page until it is interrupted.

    API keys come from the environment alone: LLMREC_API_KEY for the first server, LLMREC_COMPARE_API_KEY for the
    second; neither server is sent the other's.

    Args:
        url: of the server; default http://127.0.0.1:8000.
        compare: URL of a second server, to see both side by side.
        artefact: a folder or a Hub id, in the place of `url`: a server is started for it, and ends with the page.
        backend: of that server, "vllm" or "transformers".
        host, port: where the page listens.
        revision: of the artefact on the Hub.

    Raises:
        RequestError: if both a URL and an artefact came, or a URL or key is none.
        ArtefactError: if the artefact cannot be used.
        EngineError: if its server does not start, or the page's port is taken.
        DependencyError: if gradio is not installed.
    """
    from llmrec.demo.app import build_page, serve_page
    from llmrec.demo.servers import Target, is_loopback

    if url is not None and artefact is not None:
        raise RequestError(f"Both the server {url} and an artefact came. Give one of them; --compare takes a second.")
    console = Console(soft_wrap=True, highlight=False, markup=False)
    if not is_loopback(host):
        console.print(
            f"Warning: who reaches {host}:{port} asks the server with your API key, and the page has no password. "
            "Put a proxy with one in front, or leave out --host."
        )
    with ExitStack() as stack:
        second = Target(compare, os.environ.get(COMPARE_API_KEY)) if compare is not None else None
        if artefact is not None:
            url = _started(stack, artefact, backend, revision, console)
        first = Target(url or DEFAULT_URL, os.environ.get(API_KEY))
        page = build_page(first, second, host)
        name = f"[{host}]" if ":" in host else host
        console.print(f"The page over {first.name} is at http://{name}:{port} (Ctrl-C ends it)")
        serve_page(page, host, port)


def _started(stack: ExitStack, artefact: str, backend: "Backend", revision: str | None, console: Console) -> str:
    """The URL of a server that was started for an artefact, and that the stack ends."""
    from llmrec import artefact as folders
    from llmrec.engine.launch import running_server

    folder = folders.resolve(artefact, revision)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    logs = Path(tempfile.mkdtemp(prefix="llmrec-demo-"))
    stack.push(lambda error, *_: None if error else shutil.rmtree(logs))  # what went wrong may stand in there
    console.print(f"Starting a server for {folder} …")
    server = stack.enter_context(running_server(folder, port, logs / "server.log", backend=backend))
    server.wait_until_ready()
    return server.url
