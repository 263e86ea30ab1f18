"""The page as a web application that talks to its own visitor and to nobody else: no network but the servers'."""

import contextlib
import socket
from typing import TYPE_CHECKING, Any

from llmrec.demo.actions import Actions
from llmrec.demo.servers import Target, is_loopback
from llmrec.demo.style import CSS
from llmrec.exceptions import DependencyError, EngineError

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

# What the page itself asks for. Gradio has more routes (uploads, files, a proxy), which nothing here needs.
_PATHS = frozenset(
    ("/", "/config", "/theme.css", "/favicon.ico", "/manifest.json", "/gradio_api/reset", "/gradio_api/cancel")
)
_FOLDERS = ("/assets/", "/static/", "/gradio_api/queue/", "/gradio_api/heartbeat/", "/gradio_api/startup-events")
# Gradio evaluates the script that a component brings, so 'unsafe-eval' stays; but whatever runs reaches no other host.
_HEADERS = (
    (
        b"content-security-policy",
        b"default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
        b"img-src 'self' data:; font-src 'self' data:; frame-ancestors 'none'; form-action 'self'; base-uri 'self'",
    ),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
)


class _Fenced:
    """Answers only for what the page needs, and tells browsers to fetch nothing from elsewhere."""

    def __init__(self, app: "ASGIApp") -> None:
        self._app = app

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http" or not (scope["path"] in _PATHS or scope["path"].startswith(_FOLDERS)):
            from starlette.responses import PlainTextResponse

            await PlainTextResponse("The page has no such part.", 404)(scope, receive, send)
            return

        async def fenced(message: "Message") -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], *_HEADERS]}
            await send(message)

        await self._app(scope, receive, fenced)


def build_page(first: Target, second: Target | None = None, host: str = "127.0.0.1") -> "FastAPI":
    """The page over one server or two.

    It sends no statistics, loads no font from elsewhere and makes no public link, whatever gradio's environment
    variables say. On this machine's own address it answers only to that address, so that no foreign site can point
    its own name here.

    Raises:
        DependencyError: if gradio is not installed.
    """
    try:
        import gradio as gr
    except ImportError as error:
        raise DependencyError("gradio is not installed, and the page needs it. Install llmrec[demo].") from error
    from fastapi import FastAPI
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    from llmrec.demo.page import blocks

    sans: Any = ["system-ui", "DejaVu Sans", "sans-serif"]
    mono: Any = ["ui-monospace", "DejaVu Sans Mono", "monospace"]
    soft = {
        "body_text_color_subdued": "#59636e",
        "block_info_text_color": "#59636e",
        "input_placeholder_color": "#6b7480",
    }
    dark = {f"{name}_dark": "#a3afbb" for name in soft}
    button = {f"button_primary_background_fill{end}": "#0a58c2" for end in ("", "_hover", "_dark", "_hover_dark")}
    theme = gr.themes.Default(primary_hue="blue", font=sans, font_mono=mono, spacing_size="sm")
    theme.set(
        layout_gap="10px",
        **soft,
        **dark,
        **button,
        button_primary_text_color="#ffffff",
        button_primary_text_color_dark="#ffffff",
    )
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    if is_loopback(host):
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost", host])
    app.add_middleware(_Fenced)
    gr.mount_gradio_app(
        app,
        blocks(Actions(first, second)),
        "/",
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        enable_monitoring=False,
        show_error=False,
        max_file_size="1kb",
        theme=theme,
        css=CSS,
    )
    return app


def serve_page(app: "FastAPI", host: str, port: int) -> None:
    """Serves the page until it is interrupted.

    Raises:
        EngineError: if the address cannot be listened on.
    """
    import uvicorn

    try:
        listening = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise EngineError(
            f"The page cannot listen on {host}:{port}: {error}. Choose another port, or stop what uses it."
        ) from error
    with listening, contextlib.suppress(KeyboardInterrupt):
        uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=3)).run([listening])
