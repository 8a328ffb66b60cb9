"""What every request passes before the API: the log, hosts and origins, tokens, size."""

import asyncio
import datetime
import hashlib
import hmac
import io
import json
import secrets
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import urlsplit

from sse_starlette.sse import SendTimeoutError
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from icae_jax.server.failures import ApiError, of_fault, shown

SLOW = 408  # the client has not read what was sent
GONE = 499  # the client has hung up, as nginx logs it
OPEN_PATHS = ("/", "/healthz", "/readyz")  # without a token
OPEN_FOLDER = "/page/"
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")


class AccessLog:
    """Writes a line of JSON for each request: never texts, ids or tokens.

    file: where to; None for nowhere. ended: told (route, status, seconds) of each request.
    """

    def __init__(
        self, app: ASGIApp, file: io.TextIOBase | None, ended: Callable[[str, int, float], Any]
    ):
        self.app, self.file, self.ended = app, file, ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request, and logs it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, line = time.monotonic(), {"id": secrets.token_hex(8)}
        scope.setdefault("state", {}).update(log=line, began=began)
        status, started = 0, False

        async def sending(message: Message) -> None:
            nonlocal status, started
            if message["type"] == "http.response.start":
                status, started = message["status"], True
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = line["id"]
                headers["X-Content-Type-Options"] = "nosniff"
            await send(message)

        try:
            await self.app(scope, receive, sending)
        except SendTimeoutError:
            line["status"] = SLOW
        except Exception as error:
            failure = None if "fault" in line else of_fault(error)
            if failure is not None and not started:
                await failure.response()(scope, receive, sending)
        finally:
            seconds = time.monotonic() - began
            # Routes, since paths may hold ids.
            route = getattr(scope.get("route"), "path", "other")
            status = line.pop("status", status)
            self.ended(route, status, seconds)
            if self.file is not None:
                now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
                client = (scope.get("client") or ("",))[0]
                fields = {"time": now, "client": client, "method": scope["method"]}
                fields |= {"route": route, "status": status, "ms": round(seconds * 1000, 1)}
                print(json.dumps(fields | line), file=self.file, flush=True)


class Guard:
    """Lets a request through if its host, origin, token and size are right, and it is due.

    Args:
        app: what is behind.
        tokens: bearer tokens, one of which every request but those of `OPEN_PATHS` must have; ()
            for none.
        hosts: names by which the server may be called; () for any. Without a token, they keep
            another site's page, whose name was made to lead here, from asking.
        origins: of pages that may ask, beside the server's own.
        most_bytes: of a body.
        seconds: in which a body must have come.
        status: of the server: "ready" if it takes requests.
    """

    def __init__(
        self,
        app: ASGIApp,
        tokens: Sequence[str],
        hosts: Sequence[str],
        origins: Sequence[str],
        most_bytes: int,
        seconds: float,
        status: Callable[[], str],
    ):
        self.app, self.hosts, self.origins = app, hosts, origins
        self.most_bytes, self.seconds, self.status = most_bytes, seconds, status
        self._digests = [_digest(token) for token in tokens]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers with an error, or passes a request on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        try:
            self._check(scope, headers)
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        await self.app(scope, self._limited(scope, receive), send)

    def _check(self, scope, headers):
        host = _host(headers.get("host", ""))
        if self.hosts and host not in self.hosts:
            raise ApiError(403, f"this server is not called {shown(host)}", code="wrong_host")
        origin = headers.get("origin")
        own = origin is None or origin.partition("://")[2] == headers.get("host", "")
        if not own and origin not in self.origins:
            raise ApiError(
                403,
                f"pages of {shown(origin)} may not ask; name them with --cors",
                code="wrong_origin",
            )
        path = scope["path"]
        if self._digests and path not in OPEN_PATHS and not path.startswith(OPEN_FOLDER):
            self._check_token(headers.get("authorization", ""))
        if scope["method"] not in ("GET", "HEAD", "OPTIONS"):
            status = self.status()
            if status != "ready":
                what = "shutting down" if status == "draining" else "not ready yet"
                raise ApiError(
                    503, f"the server is {what}; try again", None, status, {"Retry-After": "2"}
                )
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length) > self.most_bytes:
            raise self._too_large()

    def _check_token(self, authorization):
        scheme, _, token = authorization.partition(" ")
        given = _digest(token.strip())
        # All are compared, so that the time says nothing of which one is nearly right.
        right = [hmac.compare_digest(given, digest) for digest in self._digests]
        if scheme.lower() != "bearer" or not any(right):
            raise ApiError(
                401,
                "give one of the server's tokens: Authorization: Bearer TOKEN",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    def _limited(self, scope: Scope, receive: Receive) -> Receive:
        taken, whole = 0, False

        async def receiving() -> Message:
            nonlocal taken, whole
            ends = scope["state"]["began"] + self.seconds
            try:
                async with asyncio.timeout(None if whole else ends - time.monotonic()):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, "the body has not come in time") from None
            whole = not message.get("more_body", False)
            if message["type"] == "http.request":
                taken += len(message.get("body", b""))
                if taken > self.most_bytes:
                    raise HTTPException(413, self._too_large().message)
            return message

        return receiving

    def _too_large(self):
        return ApiError(
            413,
            f"the body has more than {self.most_bytes:,} bytes; send a long text in several parts",
            code="body_too_large",
        )


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()


def _host(header: str) -> str:
    """The name in a Host header, without its port."""
    try:
        return (urlsplit(f"//{header}").hostname or "").lower()
    except ValueError:
        return ""


def open_log(path: str | None) -> io.TextIOBase | None:
    """The access log's file: stderr for None, nothing for "none"."""
    if path == "none":
        return None
    return sys.stderr if path is None else open(path, "a", encoding="utf-8")
