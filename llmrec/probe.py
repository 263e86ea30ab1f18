"""Asks a server whether it is ready: `python -m llmrec.probe http://127.0.0.1:8000/ready`; exit code 0 if so, else 1.

For supervisors, containers and orchestrators. It takes the API key from where the server has it, so that no probe has
a secret in its description, and needs nothing but Python.
"""

import http.client
import json
import os
import sys
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path

# As `llmrec.service.keys` has them, which is too heavy to be imported here.
KEY, KEY_FILE = "LLMREC_API_KEY", "LLMREC_API_KEY_FILE"


def api_key(environment: Mapping[str, str]) -> str:
    """One of the keys that a server in this environment accepts; "" if it asks for none, or its file is unreadable."""
    if KEY in environment:
        return environment[KEY].strip()
    try:
        lines = Path(environment[KEY_FILE]).read_text(encoding="utf-8").split()
    except (KeyError, OSError, ValueError):
        return ""
    return lines[0] if lines else ""


def is_ready(url: str, key: str = "", launch: str = "", timeout: float = 5.0) -> bool:
    """Whether a server answers `/ready` with 200.

    Args:
        url: of the server, without a path.
        key: for a server that asks for one.
        launch: what its answer has to repeat, so that no other server is taken for it; "" for anything.
        timeout: seconds.
    """
    return _answers(f"{url}/ready", key, launch, timeout)


def _answers(url: str, key: str, launch: str, timeout: float) -> bool:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {key}"} if key else {})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # what stays on a machine needs no proxy
    try:
        with opener.open(request, timeout=timeout) as answer:
            return answer.status == 200 and (not launch or json.load(answer).get("launch") == launch)
    except (OSError, ValueError, AttributeError, http.client.HTTPException):  # the last: no HTTP, or half an answer
        return False


def main(arguments: Sequence[str]) -> int:
    """The probe's exit code; `/health` may be asked for in the same way."""
    url = arguments[0] if arguments else "http://127.0.0.1:8000/ready"
    return 0 if _answers(url, api_key(os.environ), launch="", timeout=5.0) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
