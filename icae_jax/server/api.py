"""The HTTP interface: routes, each a few lines above the service."""

import asyncio
import contextlib
import functools
import io
import json
import pathlib
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Annotated, Any, TypeVar

import anyio
from fastapi import FastAPI, Path, Query, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.openapi.utils import get_openapi
from sse_starlette.sse import EventSourceResponse
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

import icae_jax
from icae_jax.server import failures, middleware, schema
from icae_jax.server.answers import CHAT, COMPLETION, Answer
from icae_jax.server.asking import Asked, size_of
from icae_jax.server.failures import ApiError, shown
from icae_jax.server.memories import checked_metadata
from icae_jax.server.options import Options
from icae_jax.server.service import Feed, Service

T = TypeVar("T")

POLL_SECONDS = 0.2  # between two looks whether a client is still there
FIRST_SECONDS = 2.0  # that a stream waits for its first piece, which may be an error with a status
PING_SECONDS = 15  # between comments in a stream of which nothing comes
SEND_SECONDS = 60  # that a client may take to read a chunk
PAGE = pathlib.Path(__file__).parent / "page"
PAGE_FILES = {
    "index.html": "text/html; charset=utf-8",
    "page.css": "text/css; charset=utf-8",
    "icon.svg": "image/svg+xml",
    **dict.fromkeys(
        ("page.js", "client.js", "diff.js", "documents.js", "dom.js", "questions.js"),
        "text/javascript; charset=utf-8",
    ),
}
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
DESCRIPTION = """\
An OpenAI-compatible server whose answers come from memories: texts that were compressed into a few
tokens. Beside OpenAI's fields, requests name a stored `memory`, or bring a `context` that is
compressed now.
"""
_ERRORS = {
    400: "the request cannot be answered as it is",
    401: "no token, or a wrong one",
    403: "wrong host or origin, or a store that is only read",
    404: "no such memory or model",
    409: "the id is a document's of the store",
    408: "the body has not come in time",
    413: "the body is too large",
    429: "too many requests wait; see Retry-After",
    500: "the server or a stored memory is damaged",
    503: "not ready, shutting down, out of memory, or the store is gone",
    504: "the request took too long",
}
_RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"model": schema.Error, "description": text} for status, text in _ERRORS.items()
}
_EVENT = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
_STREAM = {"text/event-stream": {"schema": _EVENT}}

MemoryId = Annotated[
    str, Path(min_length=1, max_length=schema.LONGEST_ID, openapi_examples={"one": {"value": "0"}})
]


def make_app(
    service: Service,
    options: Options,
    tokens: tuple[str, ...] = (),
    log: io.TextIOBase | None = None,
    ready: Callable[[], Any] = lambda: None,
) -> FastAPI:
    """The application of a service, which starts and ends with it.

    tokens: bearer tokens, () for none. log: file for the access log, None for none. ready: called
    when requests are taken.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start(asyncio.get_running_loop(), ready)
        yield
        await asyncio.to_thread(service.close)

    app = FastAPI(
        title="icae serve",
        version=icae_jax.__version__,
        description=DESCRIPTION,
        docs_url=None,  # its pages load assets from elsewhere
        redoc_url=None,
        responses=_RESPONSES,
        lifespan=lifespan,
    )
    failures.install(app)
    _add_answers(app, service)
    _add_memories(app, service)
    _add_status(app, service)
    _add_page(app)
    _describe(app)
    hosts = () if tokens or not options.loopback else (*middleware.LOOPBACK_NAMES, options.host)
    app.add_middleware(
        middleware.Guard,
        tokens=tokens,
        hosts=hosts,
        origins=options.cors,
        most_bytes=int(options.max_body_mib * (1 << 20)),
        seconds=options.timeout,
        status=lambda: service.status,
    )
    if options.cors:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(options.cors),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=["X-Request-Id", "Retry-After"],
        )
    app.add_middleware(middleware.AccessLog, file=log, ended=service.metrics.request)
    return app


# --- Answers ---


def _add_answers(app: FastAPI, service: Service) -> None:
    @app.post(
        "/v1/chat/completions",
        tags=["answers"],
        summary="Answer the last message of a chat",
        responses={200: {"content": _STREAM}},
    )
    async def chat(request: Request, body: schema.ChatRequest) -> Any:
        _check_model(service, body.model)
        asked = await _while_connected(request, _ask(request, service, service.asker.chat, body))
        answer = Answer(CHAT, service.name, [asked], service.tokens, bool(body.logprobs))
        return await _answered(request, service, body, answer)

    @app.post(
        "/v1/completions",
        tags=["answers"],
        summary="Continue a prompt",
        responses={200: {"content": _STREAM}},
    )
    async def completions(request: Request, body: schema.CompletionRequest) -> Any:
        _check_model(service, body.model)
        asked = await _while_connected(
            request, _ask(request, service, service.asker.completions, body)
        )
        logprobs = body.logprobs is not None
        answer = Answer(COMPLETION, service.name, asked, service.tokens, logprobs)
        return await _answered(request, service, body, answer)


def _ends(request: Request, service: Service) -> float:
    """When a request must have been answered, on the monotonic clock."""
    return request.scope["state"]["began"] + service.options.timeout


def _ask(request, service, call, body):
    """What a request asks the engine for; a coroutine."""
    compressing = body.context is not None and body.compress
    return service.blocking(_ends(request, service), compressing, call, body)


def _check_model(service, model):
    if model is not None and model != service.name:
        raise ApiError(
            404,
            f"model {shown(model)} is not served; this one is {shown(service.name)}",
            "model",
            "model_not_found",
        )


async def _answered(request, service, body, answer: Answer) -> Response:
    """A response of chats or completions, whole or streamed."""
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options is given without stream: true", "stream_options")
    if not body.stream:
        feed = service.feed(_ends(request, service), answer.asked, streamed=False)
        await _while_connected(request, _collect(feed, answer))
        _note(request, service, feed, answer.usage())
        return JSONResponse(answer.whole())
    feed = service.feed(_ends(request, service), answer.asked, streamed=True)
    await _while_connected(request, feed.wait(FIRST_SECONDS))
    usage = bool(body.stream_options and body.stream_options.include_usage)

    async def events() -> AsyncGenerator[dict, None]:
        for chunk in answer.opening():
            yield chunk | ({"usage": None} if usage else {})
        async for choice, piece in feed.pieces():
            answer.add(choice, piece)
            if chunk := answer.chunk(choice, piece):
                yield chunk | ({"usage": None} if usage else {})
        if usage:
            yield answer.closing()

    ended = functools.partial(_ended_stream, request, service, feed, answer)
    return _Stream(service, feed, events(), ended)


async def _collect(feed: Feed, answer: Answer) -> None:
    async for choice, piece in feed.pieces():
        answer.add(choice, piece)


def _note(request, service, feed, usage):
    """Counts a request's tokens, in metrics and log."""
    service.metrics.tokens(usage)
    line = request.scope["state"].get("log", {})
    line |= usage
    if feed.first_seconds is not None:
        line["first_ms"] = round(1000 * feed.first_seconds, 1)


def _ended_stream(request, service, feed, answer):
    _note(request, service, feed, answer.usage())


class _Stream(EventSourceResponse):
    """Events as they come, then [DONE]; an error is the last event, in place of that.

    events: of the feed. ended: called at the end, however it comes.
    """

    def __init__(
        self,
        service: Service,
        feed: Feed,
        events: AsyncGenerator[dict, None],
        ended: Callable[[], Any],
    ):
        super().__init__(
            self._lines(events),
            ping=PING_SECONDS,
            sep="\n",
            send_timeout=SEND_SECONDS,
            # What runs when the server is told to end has time to end.
            shutdown_event=anyio.Event(),
            shutdown_grace_period=service.options.grace,
        )
        self._feed, self._ended = feed, ended

    async def _lines(self, events):
        try:
            async for event in events:
                yield {"data": json.dumps(event, ensure_ascii=False)}
            yield {"data": "[DONE]"}
        except ApiError as error:
            yield {"data": json.dumps(error.body)}
        except Exception as error:
            yield {"data": json.dumps(failures.of_fault(error).body)}
        finally:
            await events.aclose()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the events. The feed is closed even if nobody was there to read the first."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._feed.close()
            self._ended()


async def _while_connected(request: Request, work: Awaitable[T]) -> T:
    """The result of a coroutine, which is cancelled if the client hangs up."""
    task = asyncio.ensure_future(work)
    try:
        while not task.done():
            await asyncio.wait({task}, timeout=POLL_SECONDS)
            if not task.done() and await request.is_disconnected():
                request.scope["state"].get("log", {})["status"] = middleware.GONE
                raise ApiError(middleware.GONE, "the client has hung up")
        return task.result()
    finally:
        task.cancel()


# --- Memories ---


def _add_memories(app: FastAPI, service: Service) -> None:
    memories = service.memories

    async def look_up(request: Request, call: Callable[..., T], *arguments: Any) -> T:
        work = service.blocking(_ends(request, service), False, call, *arguments)
        return await _while_connected(request, work)

    @app.post(
        "/v1/memories",
        tags=["memories"],
        summary="Compress a text, and keep its memory",
        status_code=201,
        response_model=schema.MemoryObject,
        responses={200: {"model": schema.MemoryObject, "description": "was there already"}},
    )
    async def add(request: Request, body: schema.MemoryRequest) -> Response:
        size = size_of(body.ratio, body.memory_tokens)
        if body.id is not None:
            _check_id(body.id)
        metadata = checked_metadata(body.metadata)
        arguments = (body.text, size, "text", body.id, metadata, body.keep)
        work = service.blocking(_ends(request, service), True, memories.compress, *arguments)
        kept, new = await _while_connected(request, work)
        return JSONResponse(kept.facts(), 201 if new else 200)

    @app.get(
        "/v1/memories",
        tags=["memories"],
        summary="List memories",
        response_model=schema.MemoryList,
    )
    async def page(
        request: Request,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        after: Annotated[str | None, Query(max_length=schema.LONGEST_ID)] = None,
        prefix: Annotated[str, Query(max_length=schema.LONGEST_ID)] = "",
    ) -> Response:
        facts, more = await look_up(request, memories.page, prefix, after, limit)
        ids = [one["id"] for one in facts] or [None]
        return JSONResponse(
            {
                "object": "list",
                "data": facts,
                "first_id": ids[0],
                "last_id": ids[-1],
                "has_more": more,
            }
        )

    @app.post(
        "/v1/memories/{memory_id:path}/restore",
        tags=["memories"],
        summary="Read a text back from its memory",
        response_model=schema.Restored,
        responses={200: {"content": _STREAM}},
    )
    async def restore(request: Request, memory_id: MemoryId, body: schema.RestoreRequest) -> Any:
        asked = await look_up(request, service.asker.restore, memory_id, body)
        return await _restored(request, service, memory_id, asked, bool(body.stream))

    @app.get(
        "/v1/memories/{memory_id:path}",
        tags=["memories"],
        summary="What a memory is",
        response_model=schema.MemoryObject,
    )
    async def facts(request: Request, memory_id: MemoryId) -> Response:
        return JSONResponse(await look_up(request, memories.facts, memory_id))

    @app.delete(
        "/v1/memories/{memory_id:path}",
        tags=["memories"],
        summary="Remove a memory",
        response_model=schema.Deleted,
    )
    async def remove(request: Request, memory_id: MemoryId) -> Response:
        work = service.blocking(_ends(request, service), True, memories.remove, memory_id)
        await _while_connected(request, work)
        return JSONResponse({"id": memory_id, "object": "memory.deleted", "deleted": True})


def _check_id(memory_id):
    if not memory_id.isprintable():
        raise ApiError(400, f"id is {shown(memory_id)}; give printable characters", "id")


async def _restored(request, service, memory_id, asked: Asked, stream: bool) -> Response:
    answer = Answer(COMPLETION, service.name, [asked], service.tokens, logprobs=False)
    feed = service.feed(_ends(request, service), [asked], streamed=stream)
    if not stream:
        await _while_connected(request, _collect(feed, answer))
        _note(request, service, feed, answer.usage())
        whole = answer.whole()
        choice = whole["choices"][0]
        fields = {"text": choice["text"], "finish_reason": choice["finish_reason"]}
        head = {"id": memory_id, "object": "memory.restored"}
        return JSONResponse(head | fields | {"usage": whole["usage"]})
    await _while_connected(request, feed.wait(FIRST_SECONDS))

    async def events() -> AsyncGenerator[dict, None]:
        async for choice, piece in feed.pieces():
            answer.add(choice, piece)
            head = {"id": memory_id, "object": "memory.restored.chunk"}
            if piece.text or piece.finish:
                yield head | {"delta": piece.text, "finish_reason": piece.finish}

    ended = functools.partial(_ended_stream, request, service, feed, answer)
    return _Stream(service, feed, events(), ended)


# --- Status ---


def _add_status(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models", tags=["status"], summary="The model", response_model=schema.ModelList)
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [_model(service)]})

    @app.get(
        "/v1/models/{model:path}",
        tags=["status"],
        summary="The model, by its name",
        response_model=schema.ModelObject,
    )
    async def model(model: Annotated[str, Path(max_length=1024)]) -> Response:
        _check_model(service, model)
        return JSONResponse(_model(service))

    @app.get("/healthz", tags=["status"], summary="Whether the server lives")
    async def healthz() -> schema.Status:
        return schema.Status(status="ok")

    @app.get(
        "/readyz",
        tags=["status"],
        summary="Whether the server takes requests",
        response_model=schema.Status,
        responses={503: {"model": schema.Status}},
    )
    async def readyz() -> Response:
        ready = service.status == "ready"
        return JSONResponse({"status": service.status}, 200 if ready else 503)

    @app.get(
        "/metrics",
        tags=["status"],
        summary="Counters, as Prometheus reads them",
        response_class=Response,
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
    )
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")


def _model(service: Service) -> dict[str, Any]:
    compressor, documents = service.compressor, service.documents
    config = compressor.config
    facts = {
        "method": config.method,
        "base": pathlib.PurePath(compressor.base.path).name,
        "template": compressor.adapter.template.name,
        "context_positions": compressor.base.config.max_position_embeddings,
        "segment_tokens": config.segment_tokens,
        "memory_tokens_per_segment": None if config.any_k else list(config.choices),
        "default_memory_tokens_per_segment": config.k,
        "max_context_tokens": service.memories.max_context_tokens,
        "documents": documents is not None,
        "writable": documents is not None and documents.writable,
    }
    return {
        "id": service.name,
        "object": "model",
        "created": service.created,
        "owned_by": "icae_jax",
        "compressor": facts,
    }


# --- The page, and the description ---


def _add_page(app: FastAPI) -> None:
    def served(name: str) -> Response:
        content = (PAGE / name).read_bytes()
        return Response(content, media_type=PAGE_FILES[name], headers=PAGE_HEADERS)

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return served("index.html")

    @app.get("/page/{name}", include_in_schema=False)
    async def asset(name: str) -> Response:
        if name not in PAGE_FILES:
            raise ApiError(404, f"the page has no file {shown(name)}", code="unknown_path")
        return served(name)


def _describe(app: FastAPI) -> None:
    """The OpenAPI document: errors in their one form, and bearer tokens."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = get_openapi(
                title=app.title,
                version=app.version,
                description=app.description,
                routes=app.routes,
            )
            for operations in document["paths"].values():
                for operation in operations.values():
                    operation["responses"].pop("422", None)  # those are 400 here
            components = document.setdefault("components", {})
            for name in ("HTTPValidationError", "ValidationError"):
                components.get("schemas", {}).pop(name, None)
            components["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
            document["security"] = [{}, {"token": []}]
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = openapi
