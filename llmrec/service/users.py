"""The routes of users' histories: append, read, forget. They need a server with a history store."""

from http import HTTPStatus
from typing import Annotated

from fastapi import APIRouter, Path, Query, Request, Response
from pydantic import BaseModel, Field
from starlette.convertors import StringConvertor, register_url_convertor

from llmrec.exceptions import RequestError
from llmrec.history_store.store import HistoryStore
from llmrec.service.errors import NotServedError
from llmrec.service.routes import ALWAYS, WITH_BODY, documented, service_of
from llmrec.service.schema import MAX_HISTORY, AppendRequest, UserHistory

_REPLACED = "\ufffd"

User = Annotated[
    str,
    Path(
        min_length=1,
        max_length=1_000,
        description="The user's id, percent-encoded: a slash as %2F, and dots as %2E where the id is nothing else.",
    ),
]


class Forgotten(BaseModel):
    """What became of a user."""

    deleted: bool = Field(description="Whether anything was stored of the user.")


class _Anything(StringConvertor):
    """What may stand in a path for a user: slashes, which %2F is decoded to before a route is found, and line ends.

    Starlette's own `path` takes no line ends, and its routes would take a user `a` with one behind it for `a`.
    """

    regex = "(?s:.*)"


def users_router() -> APIRouter:
    """The routes; the service is `app.state.llmrec`, and its `histories` the store."""
    register_url_convertor("user", _Anything())
    router = APIRouter(tags=["users"])

    @router.post(
        "/v1/users/{user_id:user}/events",
        status_code=HTTPStatus.NO_CONTENT,
        responses=documented(*WITH_BODY, 404, 503, 504),
    )
    async def append(user_id: User, body: AppendRequest, request: Request) -> Response:
        """Puts events at the end of a user's history, all of them or none; the oldest beyond the store's limit go.

        After a 503 nothing was put there. After a 504 nobody knows: read the history before sending them again.
        """
        await _histories(request).append(_checked(user_id), body.events)
        return Response(status_code=HTTPStatus.NO_CONTENT)

    @router.get("/v1/users/{user_id:user}/history", responses=documented(*ALWAYS, 404, 422, 503))
    async def history(
        user_id: User,
        request: Request,
        last: Annotated[int, Query(ge=0, le=MAX_HISTORY, description="So many events, the newest.")] = MAX_HISTORY,
    ) -> UserHistory:
        """The last events of a user, oldest first; of a user unknown to the server, none."""
        user_id = _checked(user_id)
        return UserHistory(user_id=user_id, events=await _histories(request).read(user_id, last))

    @router.delete("/v1/users/{user_id:user}", responses=documented(*ALWAYS, 404, 422, 503))
    async def forget(user_id: User, request: Request) -> Forgotten:
        """Deletes all that is stored of a user."""
        return Forgotten(deleted=await _histories(request).delete(_checked(user_id)))

    return router


def _histories(request: Request) -> HistoryStore:
    histories = service_of(request).histories
    if histories is None:
        raise NotServedError(
            "The server keeps no histories. Start it with --history-store, or send a history with each request."
        )
    return histories


def _checked(user_id: str) -> str:
    """Refuses what a server makes of bytes that are no UTF-8: all such ids would be one user."""
    if _REPLACED in user_id:
        raise RequestError("The user's id has U+FFFD in it, or bytes that are no UTF-8. Percent-encode it as UTF-8.")
    return user_id
