"""Whatever the API's description allows, and what it does not, is answered as the description says; never by a 5xx.

Requests are made by schemathesis from the description that the running server gives.
"""

import json
from collections.abc import Callable, Iterator

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from live_service import running, save_artefact
from schemathesis import GenerationMode, openapi
from schemathesis.checks import not_a_server_error
from schemathesis.core.parameters import ParameterLocation
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from llmrec.service.settings import ServiceSettings

KEY = "key-of-the-test"
HEADERS = {"Authorization": f"Bearer {KEY}"}
EXAMPLES = 12
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def schema(tmp_path_factory: pytest.TempPathFactory) -> Iterator[schemathesis.schemas.BaseSchema]:
    """The description of a server with a history store and a key."""
    folder = tmp_path_factory.mktemp("openapi")
    artefact = save_artefact(folder / "artefact")
    with running(artefact, ServiceSettings(history_store=f"sqlite:{folder}/histories.db"), KEY) as (url, _):
        yield openapi.from_url(f"{url}/openapi.json", headers=HEADERS)


def operations(schema: schemathesis.schemas.BaseSchema) -> dict[str, schemathesis.APIOperation]:
    found = [result.ok() for result in schema.get_all_operations()]
    return {f"{operation.method.upper()} {operation.path}": operation for operation in found}


def test_every_route_is_described(schema):
    assert set(operations(schema)) >= {
        "POST /v1/recommend",
        "POST /v1/search",
        "POST /v1/score",
        "GET /v1/catalog",
        "PUT /v1/catalog",
        "GET /v1/catalog/items",
        "GET /v1/models",
        "GET /health",
        "GET /ready",
        "GET /metrics",
        "POST /v1/users/{user_id}/events",
        "GET /v1/users/{user_id}/history",
        "DELETE /v1/users/{user_id}",
    }


def too_late(case: schemathesis.Case, response: schemathesis.Response) -> bool:
    """Whether a request set itself a deadline that passed: the one 5xx that is its own wish."""
    return response.status_code == 504 and "deadline_ms" in json.dumps(case.body)


def every(
    operation: schemathesis.APIOperation,
    mode: GenerationMode,
    examples: int,
    check: Callable[[schemathesis.Case], None],
) -> None:
    """Holds a check against so many requests of an operation."""

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def checked(case: schemathesis.Case) -> None:
        check(case)

    checked()


# Nothing that is sent there could be wrong, and whatever fits the description is answered.
PLAIN = {"GET /v1/catalog", "GET /v1/models", "GET /health", "GET /ready", "GET /metrics"}
SURE = {*PLAIN, "POST /v1/users/{user_id}/events", "GET /v1/users/{user_id}/history", "DELETE /v1/users/{user_id}"}


def test_what_fits_the_description_is_answered_as_it_says(schema):
    statuses: dict[str, set[int]] = {}
    for name, operation in operations(schema).items():
        seen = statuses.setdefault(name, set())

        def answered(case: schemathesis.Case, seen: set[int] = seen) -> None:
            response = case.call(headers=HEADERS, timeout=30)
            seen.add(response.status_code)
            checks = [check for check in CHECKS if check is not not_a_server_error or not too_late(case, response)]
            case.validate_response(response, checks=checks, headers=HEADERS)

        every(operation, GenerationMode.POSITIVE, EXAMPLES, answered)
    assert all(seen & {200, 204} for name, seen in statuses.items() if name in SURE), statuses
    assert all(401 not in seen for seen in statuses.values())


def test_what_does_not_fit_the_description_is_refused(schema):
    seen: set[tuple[str, bool]] = set()
    for name, operation in operations(schema).items():
        if name in PLAIN:
            continue

        def refused(case: schemathesis.Case, name: str = name) -> None:
            response = case.call(headers=HEADERS, timeout=30)
            body = case.meta.components.get(ParameterLocation.BODY)
            # Names in a query that nobody knows are passed over, as everywhere; in a body they are refused.
            wrong = body is not None and body.mode is GenerationMode.NEGATIVE
            seen.add((name, wrong))
            checks = [*CHECKS, negative_data_rejection] if wrong else CHECKS
            case.validate_response(response, checks=checks, headers=HEADERS)

        every(operation, GenerationMode.NEGATIVE, EXAMPLES, refused)
    takes_bodies = {name for name in operations(schema) if name.startswith(("POST", "PUT"))}
    assert {name for name, wrong in seen if wrong} == takes_bodies


def test_without_a_key_nothing_but_health_is_answered(schema):
    for name, operation in operations(schema).items():

        def refused(case: schemathesis.Case, name: str = name) -> None:
            for header in ("", "Bearer", "Bearer wrong", f"Basic {KEY}", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}"):
                response = case.call(headers={"Authorization": header}, timeout=30)
                assert response.status_code == (200 if name == "GET /health" else 401), (name, header)

        every(operation, GenerationMode.POSITIVE, 2, refused)
