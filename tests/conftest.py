"""Fixtures that any test may use."""

import base64
import hashlib
import json
import logging
import os
import re
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def checkout() -> Path:
    """The repository's root."""
    return ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The real data sets, which lie beside the repository and not in it; a test that needs them skips without."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no ../shared/data beside the repository")
    return folder


def _mended_logging() -> list[str]:
    """Lets the root and llmrec's loggers say warnings again; tells what forbade it."""
    found = []
    if logging.root.manager.disable:
        found.append(f"logging.disable({logging.root.manager.disable})")
        logging.disable(logging.NOTSET)
    if logging.root.level > logging.WARNING:
        found.append(f"the root at level {logging.root.level}")
        logging.root.setLevel(logging.WARNING)
    for name in [name for name in logging.root.manager.loggerDict if name.partition(".")[0] == "llmrec"]:
        logger = logging.getLogger(name)
        if logger.disabled or not logger.propagate or logger.level > logging.WARNING:
            found.append(f"{name} disabled {logger.disabled}, propagate {logger.propagate}, level {logger.level}")
            logger.disabled, logger.propagate = False, True
        logger.setLevel(logging.NOTSET)  # it also forgets what was asked of all loggers before
    return found


@pytest.fixture(autouse=True)
def logging_works() -> Iterator[None]:
    """What one test does to logging, in its thread or in one that outlives it, must not silence another's warnings."""
    _mended_logging()
    yield
    if found := _mended_logging():
        warnings.warn(f"This test left logging silenced: {'; '.join(found)}.", stacklevel=1)


class FakeHub:
    """As much of the Hub as `snapshot_download`, `create_repo` and `upload_folder` ask for, on this machine alone."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self.repos: dict[str, dict[str, dict[str, bytes]]] = {}  # repository -> branch -> path -> content
        self.private: dict[str, bool] = {}
        self.commits: list[str] = []
        self.requests: list[str] = []

    def put(self, repo_id: str, folder: Path, branch: str = "main") -> None:
        """Fills a branch with a folder's files."""
        files = {f.relative_to(folder).as_posix(): f.read_bytes() for f in folder.rglob("*") if f.is_file()}
        self.repos.setdefault(repo_id, {})[branch] = files

    def variables(self, home: Path) -> dict[str, str]:
        """The environment variables that send huggingface_hub here, with its cache in `home`."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_TOKEN": "hf_test",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_OFFLINE": "0",
            "TRANSFORMERS_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1",
        }

    @staticmethod
    def sha(files: dict[str, bytes]) -> str:
        """The commit's id: here a hash of all that it holds."""
        return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()

    def commit(self, repo_id: str, branch: str, lines: list[dict[str, object]]) -> str:
        """Applies a commit's lines; returns its id."""
        files = self.repos[repo_id].setdefault(branch, {})
        for line in lines:
            value = line["value"]
            assert isinstance(value, dict)
            if line["key"] == "header":
                self.commits.append(value["summary"])
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        return self.sha(files)

    def find(self, repo_id: str, revision: str) -> dict[str, bytes] | str:
        """A revision's files, or the Hub's code of the error."""
        branches = self.repos.get(repo_id)
        if branches is None:
            return "RepoNotFound"
        revisions = {self.sha(files): files for files in branches.values()} | branches
        return revisions.get(revision, "RevisionNotFound")


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, status: int, body: object = b"", **headers: str) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(revision|tree)/([^/]+)", path):
            files = self.hub.find(match[1], match[3])
            if isinstance(files, str):
                return self.answer(404, {}, X_Error_Code=files)
            if match[2] == "revision":
                siblings = [{"rfilename": name} for name in files]
                return self.answer(200, {"id": match[1], "sha": self.hub.sha(files), "siblings": siblings})
            tree = [
                {"type": "file", "path": name, "size": len(body), "oid": hashlib.sha1(body).hexdigest()}
                for name, body in files.items()
            ]
            return self.answer(200, tree)
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            files = self.hub.find(match[1], match[2])
            if isinstance(files, str):
                return self.answer(404, {}, X_Error_Code=files)
            if match[3] not in files:
                return self.answer(404, {}, X_Error_Code="EntryNotFound")
            body = files[match[3]]
            etag = f'"{hashlib.sha1(body).hexdigest()}"'
            return self.answer(200, body, ETag=etag, X_Repo_Commit=self.hub.sha(files))
        return self.answer(404, {})

    do_HEAD = do_GET  # noqa: N815  # http.server's name

    def do_POST(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"POST {path}")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Authorization") != "Bearer hf_test":
            return self.answer(401, {"error": "Invalid credentials"})
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else f"me/{asked['name']}"
            if name.startswith("forbidden/"):
                return self.answer(403, {"error": "You may not write there"})
            known = name in self.hub.repos
            self.hub.repos.setdefault(name, {"main": {}})
            # By the version of huggingface_hub.
            private = asked.get("visibility") == "private" or asked.get("private") is True
            self.hub.private.setdefault(name, private)
            return self.answer(409 if known else 200, {"url": f"{self.hub.endpoint}/{name}"})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(branch|preupload|commit)/([^/]+)", path):
            repo_id, action, branch = match.groups()
            if action == "branch":
                self.hub.repos[repo_id].setdefault(branch, dict(self.hub.repos[repo_id]["main"]))
                return self.answer(200, {})
            if action == "preupload":
                files = json.loads(body)["files"]
                modes = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in files]
                return self.answer(200, {"files": modes})
            oid = self.hub.commit(repo_id, branch, [json.loads(line) for line in body.splitlines()])
            url = f"{self.hub.endpoint}/{repo_id}/commit/{oid}"
            return self.answer(200, {"commitUrl": url, "commitOid": oid, "success": True})
        return self.answer(200 if path == "/api/validate-yaml" else 404, {"errors": [], "warnings": []})


@pytest.fixture
def fake_hub() -> Iterator[FakeHub]:
    """A fake of the Hugging Face Hub that listens on this machine."""
    handler = type("Handler", (_Handler,), {})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    handler.hub = FakeHub(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield handler.hub
    server.shutdown()
    server.server_close()


RunPython = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def run_python() -> RunPython:
    """Runs Python code in a process of its own, with further environment variables; returns the finished process."""

    def run(code: str, **variables: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-c", code]
        return subprocess.run(
            command, env={**os.environ, **variables}, capture_output=True, text=True, timeout=120, check=False
        )

    return run
