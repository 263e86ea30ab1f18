"""`llmrec serve` and `llmrec demo`: their options."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from llmrec.cli.options import Artefact, Revision


def serve(
    artefact: Artefact,
    vllm_args: Annotated[list[str] | None, typer.Argument(help="After `--`: arguments for vLLM's own server.")] = None,
    host: Annotated[str, typer.Option(help="The address to listen on; 0.0.0.0 is every one.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port to listen on; 0 takes a free one.")] = 8000,
    backend: Annotated[
        Literal["vllm", "transformers"],
        typer.Option(help="What runs the model; transformers needs no vLLM, and runs sequence models."),
    ] = "vllm",
    dtype: Annotated[
        str, typer.Option(help="The model's number format: auto, float32, bfloat16 or float16.")
    ] = "auto",
    max_num_seqs: Annotated[int | None, typer.Option(min=1, help="Requests that run at once.")] = None,
    max_model_len: Annotated[int | None, typer.Option(min=1, help="Tokens of a prompt and its answer.")] = None,
    kv_cache_gib: Annotated[float | None, typer.Option(min=0, help="Memory for the KV cache, in GiB.")] = None,
    tensor_parallel_size: Annotated[int, typer.Option(min=1, help="Parts that vLLM splits each layer into.")] = 1,
    data_parallel_size: Annotated[int, typer.Option(min=1, help="Engines of vLLM that share the requests.")] = 1,
    catalog: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=FOLDER: a catalog or artefact to recommend from; repeatable, the first is the default."
        ),
    ] = None,
    adapter: Annotated[
        list[str] | None, typer.Option(help="NAME=FOLDER: a LoRA adapter that requests may name; repeatable.")
    ] = None,
    history_store: Annotated[
        str | None,
        typer.Option(
            help="memory:, sqlite:PATH or redis://…; one with a password by the variable LLMREC_HISTORY_STORE."
        ),
    ] = None,
    index_folder: Annotated[
        Path | None, typer.Option(help="Keeps the catalogs' tries for the next start; one server's alone.")
    ] = None,
    retrieval: Annotated[
        Literal["exact", "faiss-flat", "faiss-ivf", "faiss-hnsw"],
        typer.Option(help="How a sequence model's items are found: all looked at, or by an index of faiss."),
    ] = "exact",
    max_beams: Annotated[int | None, typer.Option(min=1, help="The widest beam that a request may ask for.")] = None,
    max_rows: Annotated[int | None, typer.Option(min=1, help="Beam rows that are searched at once.")] = None,
    max_body_bytes: Annotated[int | None, typer.Option(min=1, help="Bytes of a request's body.")] = None,
    deadline_ms: Annotated[
        int | None, typer.Option(min=1, help="Milliseconds for requests that name no deadline.")
    ] = None,
    limit: Annotated[
        list[str] | None, typer.Option(help="NAME=NUMBER: one of the other limits (docs/serving.md); repeatable.")
    ] = None,
    drain_seconds: Annotated[
        float, typer.Option(min=0, help="How long a server that is stopped may go on answering what it has.")
    ] = 30.0,
    supervise: Annotated[bool, typer.Option("--supervise", help="Start the server again whenever it dies.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show the stages of the start, but not the log.")] = False,
    log_file: Annotated[Path | None, typer.Option(help="A file that the log is appended to.")] = None,
    revision: Revision = None,
) -> None:
    """Serve an artefact over HTTP: POST /v1/recommend, /v1/search, /v1/score, /health, /ready, /docs.

    Example: `llmrec serve runs/quickstart/artefact --port 8000`

    Example, without vLLM: `llmrec serve runs/quickstart/artefact --backend transformers`

    Example, kept alive, the log in a file, the API key from a file:
    `LLMREC_API_KEY_FILE=key.txt llmrec serve runs/quickstart/artefact --supervise --quiet --log-file server.log`

    Example, two shops and a user's history by name:
    `llmrec serve user/name --catalog books=books --catalog music=music --history-store sqlite:users.db`

    Example, from the Hub, with options of vLLM's own:
    `llmrec serve user/name --dtype bfloat16 --tensor-parallel-size 2 -- --gpu-memory-utilization 0.8`

    Then: `curl localhost:8000/v1/recommend -H 'Content-Type: application/json' -d '{"history": ["id"], "k": 10}'`
    """
    from llmrec.cli.serve import serve as run

    run(
        artefact=artefact,
        host=host,
        port=port,
        dtype=dtype,
        max_num_seqs=max_num_seqs,
        max_model_len=max_model_len,
        kv_cache_gib=kv_cache_gib,
        max_beams=max_beams,
        revision=revision,
        vllm_args=vllm_args or [],
        backend=backend,
        max_rows=max_rows,
        max_body_bytes=max_body_bytes,
        deadline_ms=deadline_ms,
        limit=limit or [],
        drain_seconds=drain_seconds,
        catalog=catalog or [],
        adapter=adapter or [],
        history_store=history_store,
        index_folder=index_folder,
        tensor_parallel_size=tensor_parallel_size,
        data_parallel_size=data_parallel_size,
        supervise=supervise,
        quiet=quiet,
        log_file=log_file,
        retrieval=retrieval,
    )


def demo(
    url: Annotated[str | None, typer.Argument(help="The server; default: http://127.0.0.1:8000.")] = None,
    compare: Annotated[str | None, typer.Option(help="A second server, to see both side by side.")] = None,
    artefact: Annotated[
        str | None, typer.Option(help="In the place of a server: a folder or Hub id to start one for.")
    ] = None,
    backend: Annotated[
        Literal["vllm", "transformers"], typer.Option(help="Of the server that is started for --artefact.")
    ] = "vllm",
    host: Annotated[str, typer.Option(help="The address that the page listens on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="The port that the page listens on.")] = 7860,
    revision: Revision = None,
) -> None:
    """Try a recommender out on a page: search, build a history by clicking, see recommendations and their paths.

    Keys come from LLMREC_API_KEY, and for the second server from LLMREC_COMPARE_API_KEY.

    Example: `llmrec demo http://127.0.0.1:8000`

    Example: `llmrec demo http://127.0.0.1:8000 --compare http://127.0.0.1:8001`

    Example: `llmrec demo --artefact runs/quickstart/artefact --backend transformers`
    """
    from llmrec.cli.demo import demo as run

    run(url=url, compare=compare, artefact=artefact, backend=backend, host=host, port=port, revision=revision)
