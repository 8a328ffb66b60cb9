"""Errors that the user must fix, errors worth a retry, and how messages show values."""

import contextlib
import errno
import functools
import os
import re
import socket
import sys
import time
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import TypeVar

T = TypeVar("T")

# A full disk or quota: the code is fine, and a restart does not help until someone frees space.
_FULL = {errno.ENOSPC, errno.EDQUOT}
# The path is wrong, missing, or not permitted.
_PATHS = {
    errno.ENOENT,
    errno.EACCES,
    errno.EPERM,
    errno.EISDIR,
    errno.ENOTDIR,
    errno.EEXIST,
    errno.ENOTEMPTY,
    errno.ENAMETOOLONG,
    errno.ELOOP,
    errno.EROFS,
}
# A network, or a network filesystem, may recover from these. Not every system has the last two.
_TRANSIENT = {
    errno.EIO,
    errno.ESTALE,
    errno.EAGAIN,
    errno.EBUSY,
    errno.EINTR,
    errno.ETIMEDOUT,
    errno.ECONNRESET,
    errno.ECONNREFUSED,
    errno.ECONNABORTED,
    errno.ENOTCONN,
    errno.EPIPE,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.ENETDOWN,
    errno.ENETUNREACH,
    errno.ENETRESET,
    getattr(errno, "EREMOTEIO", errno.EIO),
    getattr(errno, "ENOLINK", errno.EIO),
}
# HTTP clients and storage libraries raise their own types. They are matched by name, so that no
# client has to be imported. HTTP statuses are checked before the names are.
_TRANSIENT_TYPES = re.compile(
    "Time(d)?out|Connect|Disconnect|Transport|Network|Protocol|Payload|ChunkedEncoding|Incomplete"
    "|ReadError|WriteError|MaxRetry|LocalEntryNotFound|Unavailable|InternalServerError"
    "|TooManyRequests|BadGateway"
)
_NETWORK_PACKAGES = {
    "httpx",
    "httpx2",
    "httpcore",
    "httpcore2",
    "http",
    "urllib",
    "requests",
    "urllib3",
    "huggingface_hub",
    "google",
    "aiohttp",
    "botocore",
    "gcsfs",
    "fsspec",
}
# Messages of tensorstore, and of the hub's own downloader.
_TRANSIENT_WORDS = re.compile(
    r"\b(UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED): |\b(server error|service error) \(?5\d\d\b",
    re.IGNORECASE,
)
_OFFLINE = "OfflineModeIsEnabled"  # a ConnectionError of the hub's client, but a permanent one
_RETRIED_STATUSES = {408, 425, 429}  # transient HTTP statuses below 500

FIRST_DELAY = 1.0  # seconds before the second attempt; each later delay doubles
TRIES = 6
_GIVEN_UP = "_icae_given_up"  # set on an exception that has used up its attempts


class UserError(ValueError):
    """Bad input. The message names the field or file, its value and the remedy; exit code 2."""


def causes(error: BaseException) -> Iterator[BaseException]:
    """Yields an exception and the chain of its causes, outermost first."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or link.__context__


def _errno(error: BaseException) -> int | None:
    """An exception's errno; tensorstore and Rust libraries only write it into the message."""
    if isinstance(error, OSError) and error.errno:
        return error.errno
    match = re.search(r"os_error_code='(\d+)'|\(os error (\d+)\)", str(error))
    return int(match[1] or match[2]) if match else None


def disk_full(error: BaseException) -> bool:
    """Whether a full disk or quota is among the causes of an exception."""
    return any(_errno(e) in _FULL or os.strerror(errno.ENOSPC) in str(e) for e in causes(error))


def is_users(error: BaseException) -> bool:
    """Whether the user must act (exit code 2); launchers do not restart such a run."""
    return isinstance(error, UserError) or disk_full(error)


def transient(error: BaseException) -> bool:
    """Whether a retry may help: a connection, a network filesystem or a server failed."""
    for e in causes(error):
        if isinstance(e, UserError) or type(e).__name__ == _OFFLINE:
            return False
        if isinstance(e, ConnectionError | TimeoutError) or _errno(e) in _TRANSIENT:
            return True
        if isinstance(e, socket.gaierror):
            # The name server did not answer; if it says the host does not exist, the user is wrong.
            return e.errno == socket.EAI_AGAIN
        status = _status(e)
        if status is not None:
            return status in _RETRIED_STATUSES or status >= 500
        package = type(e).__module__.split(".")[0]
        if package in _NETWORK_PACKAGES and _TRANSIENT_TYPES.search(type(e).__name__):
            return True
        if _TRANSIENT_WORDS.search(str(e)):
            return True
    return False


def _status(error: BaseException) -> int | None:
    """An exception's HTTP status, where httpx, requests, botocore, google or gcsfs keep it."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    else:
        status = (
            getattr(response, "status_code", None)
            or getattr(error, "code", None)
            or getattr(error, "status", None)
        )
    return int(status) if isinstance(status, int) and 100 <= status < 600 else None


# Refusals that clients of the hub and of buckets raise without an HTTP status.
_REFUSALS = {
    "HFValidationError",
    "RepositoryNotFoundError",
    "RevisionNotFoundError",
    "GatedRepoError",
    "RemoteEntryNotFoundError",
    "LocalTokenNotFoundError",
    "DefaultCredentialsError",
    "NoCredentialsError",
    _OFFLINE,
}


def answered_no(error: BaseException) -> bool:
    """Whether a server refused: not found, not permitted, not a valid id, or no client for it."""
    for link in causes(error):
        status = getattr(
            getattr(link, "response", None), "status_code", getattr(link, "code", None)
        )
        if status in (400, 401, 403, 404, 410, 451):
            return True
        if type(link).__name__ in _REFUSALS:
            return True
    refused = FileNotFoundError | NotADirectoryError | PermissionError | ImportError
    return isinstance(error, refused) and not transient(error)


def retrying(function: Callable[[], T], what: str) -> T:
    """Calls `function()` up to `TRIES` times, with growing delays, while it fails transiently.

    The last failure is raised unchanged, and an enclosing `retrying` does not retry it again.

    Args:
        function: must be safe to call again.
        what: describes the work in the notes on stderr.
    """
    for attempt in range(1, TRIES + 1):
        try:
            return function()
        except Exception as error:
            if attempt == TRIES or getattr(error, _GIVEN_UP, False) or not transient(error):
                with contextlib.suppress(AttributeError):
                    setattr(error, _GIVEN_UP, True)
                raise
            delay = FIRST_DELAY * 2 ** (attempt - 1)
            reason = (str(error).strip().splitlines() or [repr(error)])[0][:200]
            print(
                f"{what}: {type(error).__name__}: {reason}; "
                f"trying again in {delay:g} s ({attempt} of {TRIES - 1})",
                file=sys.stderr,
            )
            time.sleep(delay)
    raise AssertionError("unreachable")


def is_there(path: str | os.PathLike, kind: Callable[[int], bool]) -> bool:
    """Whether a path exists and its mode satisfies `kind`, such as `stat.S_ISDIR`.

    A transient failure is retried and then raised, where `os.path.isdir` would return False.
    """

    def check():
        try:
            return kind(os.stat(path).st_mode)
        except OSError as error:
            if error.errno in _PATHS or error.errno == errno.EINVAL:
                return False
            raise
        except ValueError:  # a null byte
            return False

    return retrying(check, f"looking for {path}")


@contextlib.contextmanager
def naming(what: str, remedy: str = "") -> Iterator[None]:
    """Turns the OSError of a wrong, missing or forbidden path into a `UserError`.

    Other OSErrors, such as of a network or a full disk, pass unchanged.

    Args:
        what: the flag or field and its value; the message begins with it.
        remedy: what the user should do.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _PATHS:
            raise
        reason = (error.strerror or str(error)).lower()
        where = f" ({error.filename})" if error.filename and str(error.filename) not in what else ""
        raise UserError(f"{what}: {reason}{where}{f'; {remedy}' if remedy else ''}") from error


def need_torch(what: str) -> ModuleType:
    """Imports torch for `what`; UserError where it is not installed."""
    try:
        import torch
    except ImportError as error:
        raise UserError(f"{what} needs PyTorch: pip install torch") from error
    return torch


# ------------------------------------------------------------------------------------ messages


def shown(value: object) -> str:
    """A value as messages show it: its repr, cut to 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


def field(name: str) -> str:
    """A field's name as messages show it: bare where it is an identifier, else `shown`."""
    return name if name.isidentifier() else shown(name)


def counted(count: int, things: str) -> str:
    """A number of things as messages show it: "1 empty text", "2,000 texts without tokens".

    things: several of them; the first word that ends in s is the regular plural.
    """
    if count == 1:
        plural = r"(\w+?)(?:(i)es|(?<=ch|sh|ss)es|(?<=x)es|s)\b"
        things = re.sub(plural, lambda m: m[1] + ("y" if m[2] else ""), things, count=1)
    return f"{count:,} {things}"


@functools.cache
def say(text: str) -> None:
    """Prints a note on stderr, once per process: something happens that the user may not expect."""
    print(text, file=sys.stderr, flush=True)
