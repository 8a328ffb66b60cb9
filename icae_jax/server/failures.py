"""Errors as clients see them: OpenAI's form, a status, and nothing of the program."""

import itertools
import json
import sys
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.routing import Match, Route

SHOWN = 200  # most characters of a client's own words in a message

_KINDS = {"str", "int", "float", "bool", "list", "dict", "literal", "nullable"}
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


class ApiError(Exception):
    """What a client is told.

    Attributes:
        status: of HTTP.
        message: one or two sentences: what is wrong, and what would do.
        param: the field of the request, if it is one.
        code: a word that programs can compare.
        headers: of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message = status, message
        self.param, self.code, self.headers = param, code, dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """The error in OpenAI's form."""
        kind = _TYPES.get(self.status)
        if kind is None:
            kind = "server_error" if self.status >= 500 else "invalid_request_error"
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    def response(self) -> JSONResponse:
        """The error as a response."""
        return JSONResponse(self.body, self.status, self.headers)


def shown(text: str) -> str:
    """A client's words in a message: on one line, cut where they are long."""
    cut = text if len(text) <= SHOWN else text[:SHOWN] + "…"
    return json.dumps(cut, ensure_ascii=True)


def of_validation(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """The first of pydantic's errors."""
    error = errors[0]
    # Behind a field pydantic names the kinds that it might have had.
    places = itertools.takewhile(_is_place, [part for part in error["loc"] if part != "body"])
    param = ".".join(str(part)[:SHOWN] for part in places) or None
    if error["type"] == "json_invalid":
        return ApiError(400, "the body is not JSON", code="invalid_json")
    if error["type"] == "extra_forbidden":
        return ApiError(
            400, f"the request has an unknown field, {shown(param or '')}", param, "unknown_field"
        )
    if error["loc"] == ("body",):  # another kind of content is not read: other sites' pages send it
        return ApiError(
            400,
            "the body must be a JSON object, sent with Content-Type: application/json",
            code="invalid_json",
        )
    message = " ".join(str(error["msg"]).split())[: 2 * SHOWN]
    return ApiError(400, f"{param or 'the body'}: {message}", param, "invalid_value")


def _is_place(part: object) -> bool:
    """Whether a part of a place is a field or a number, not one of pydantic's names of kinds."""
    return isinstance(part, int) or (str(part).isidentifier() and part not in _KINDS)


def install(app: FastAPI) -> None:
    """Has an application answer every error in this form."""

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> JSONResponse:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def validation_error(request: Request, error: RequestValidationError) -> JSONResponse:
        return of_validation(error.errors()).response()

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        code = {404: "unknown_path", 405: "method_not_allowed"}.get(error.status_code)
        message = f"{request.method} {shown(request.url.path)}: {error.detail}"
        headers = dict(error.headers or {})
        if error.status_code == 405:  # of all routes of the path, not of the first
            headers["Allow"] = ", ".join(sorted(_methods(app, request)))
        return ApiError(error.status_code, message, None, code, headers).response()

    @app.exception_handler(Exception)
    async def fault(request: Request, error: Exception) -> JSONResponse:
        request.scope["state"]["log"]["fault"] = True
        return of_fault(error).response()


def _methods(app: FastAPI, request: Request) -> set[str]:
    """The methods that the path of a request has."""
    routes = [
        route
        for route in app.routes
        if isinstance(route, Route) and route.matches(request.scope)[0] != Match.NONE
    ]
    # An id may hold what looks like another route's end; the first one is meant.
    return {m for route in routes if route.path == routes[0].path for m in route.methods or ()}


def of_fault(error: BaseException) -> ApiError:
    """What a client is told of a fault of the server's own, whose trace goes to stderr."""
    trace = "".join(traceback.format_exception(error))
    print(f"icae serve: a fault of the server's own:\n{trace}", file=sys.stderr, flush=True)
    return ApiError(500, "the server failed; its log says why", code="internal_error")
