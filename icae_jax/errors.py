"""What a user must change, as against what a machine or this code did wrong; and which failures are worth another try."""

import contextlib
import errno
import os
import re
import socket
import sys
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

T = TypeVar("T")

# A full disk, or a full share of it: nothing is wrong with the code, and running again does not help until somebody makes room.
_FULL = {errno.ENOSPC, errno.EDQUOT}
# A path that is wrong, absent or closed to this user.
_PATHS = {
    errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENOTEMPTY, errno.ENAMETOOLONG, errno.ELOOP,
    errno.EROFS,
}  # fmt: skip
# What a network, or a filesystem behind one, may recover from.
_TRANSIENT = {
    errno.EIO, errno.ESTALE, errno.EAGAIN, errno.EBUSY, errno.EINTR, errno.ETIMEDOUT, errno.ECONNRESET, errno.ECONNREFUSED,
    errno.ECONNABORTED, errno.ENOTCONN, errno.EPIPE, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH,
    errno.ENETRESET, getattr(errno, "EREMOTEIO", errno.EIO), getattr(errno, "ENOLINK", errno.EIO),  # not on every system
}  # fmt: skip
# HTTP clients and storage libraries raise types of their own, which are not imported for this: any that names a connection, its time or
# its end. A response that says no (a status below 500) has been looked at before.
_TRANSIENT_TYPES = re.compile(
    "Time(d)?out|Connect|Disconnect|Transport|Network|Protocol|Payload|ChunkedEncoding|Incomplete|ReadError|WriteError|MaxRetry"
    "|LocalEntryNotFound|Unavailable|InternalServerError|TooManyRequests|BadGateway"
)
_NETWORK_PACKAGES = (
    "httpx", "httpx2", "httpcore", "httpcore2", "http", "urllib", "requests", "urllib3", "huggingface_hub", "google", "aiohttp", "botocore",
    "gcsfs", "fsspec",
)  # fmt: skip
# How tensorstore begins, and what the hub's own downloader says.
_TRANSIENT_WORDS = re.compile(
    r"\b(UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED): |\b(server error|service error) \(?5\d\d\b",
    re.IGNORECASE,
)
_OFFLINE = "OfflineModeIsEnabled"  # the hub's client, told not to ask: a ConnectionError that does not pass
_ASKED_LATER = (408, 425, 429)  # HTTP statuses below 500 that pass

FIRST_DELAY = 1.0  # seconds before the second try; each later wait is twice as long
TRIES = 6
_GIVEN_UP = "_icae_given_up"  # marks an exception whose tries are over


class UserError(ValueError):
    """Bad input: the message names the field or file, the value and the remedy. It alone (and a full disk) gives exit code 2."""


def causes(error: BaseException) -> Iterator[BaseException]:
    """An exception and what it was raised from, the outermost first."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or link.__context__


def _errno(error: BaseException) -> int | None:
    """The operating system's error number of an exception; tensorstore and libraries in Rust (safetensors) write it into the message."""
    if isinstance(error, OSError) and error.errno:
        return error.errno
    told = re.search(r"os_error_code='(\d+)'|\(os error (\d+)\)", str(error))
    return int(told[1] or told[2]) if told else None


def disk_full(error: BaseException) -> bool:
    """Whether an exception, or what caused it, is a disk without room."""
    return any(_errno(e) in _FULL or os.strerror(errno.ENOSPC) in str(e) for e in causes(error))


def is_users(error: BaseException) -> bool:
    """Whether the user must change something (exit code 2): launchers do not restart such a run."""
    return isinstance(error, UserError) or disk_full(error)


def transient(error: BaseException) -> bool:
    """Whether an exception is one that passes: a connection, a network filesystem, a server that is overloaded or being restarted."""
    for e in causes(error):
        if isinstance(e, UserError) or type(e).__name__ == _OFFLINE:
            return False
        if isinstance(e, ConnectionError | TimeoutError) or _errno(e) in _TRANSIENT:
            return True
        if isinstance(
            e, socket.gaierror
        ):  # a name server that does not answer; one that says no is the user's
            return e.errno == socket.EAI_AGAIN
        status = _status(e)
        if status is not None:
            return status in _ASKED_LATER or status >= 500
        if type(e).__module__.split(".")[0] in _NETWORK_PACKAGES and _TRANSIENT_TYPES.search(
            type(e).__name__
        ):
            return True
        if _TRANSIENT_WORDS.search(str(e)):
            return True
    return False


def _status(error: BaseException) -> int | None:
    """The HTTP status that an exception carries: httpx's and requests' response, botocore's dictionary, google's and gcsfs' code."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        told = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    else:
        told = (
            getattr(response, "status_code", None)
            or getattr(error, "code", None)
            or getattr(error, "status", None)
        )
    return int(told) if isinstance(told, int) and 100 <= told < 600 else None


# How clients of the hub and of buckets say so without a status.
_NO = (
    "HFValidationError", "RepositoryNotFoundError", "RevisionNotFoundError", "GatedRepoError", "RemoteEntryNotFoundError",
    "LocalTokenNotFoundError", "DefaultCredentialsError", "NoCredentialsError", _OFFLINE,
)  # fmt: skip


def answered_no(error: BaseException) -> bool:
    """Whether a server answered that there is no such thing, or not for this user; or the id cannot be one, or its client is absent."""
    for link in causes(error):
        status = getattr(
            getattr(link, "response", None), "status_code", getattr(link, "code", None)
        )
        if status in (400, 401, 403, 404, 410, 451):
            return True
        if type(link).__name__ in _NO:
            return True
    return isinstance(
        error, FileNotFoundError | NotADirectoryError | PermissionError | ImportError
    ) and not transient(error)


def retrying(function: Callable[[], T], what: str) -> T:
    """What `function()` returns, called again with growing pauses as long as its failures are `transient`, `TRIES` times at most.

    what: names the work in the notes on stderr. The last failure is raised as it is, and not tried again by whoever retries what holds
    this. `function` must be one that can be called again.
    """
    for tried in range(1, TRIES + 1):
        try:
            return function()
        except Exception as error:
            if tried == TRIES or getattr(error, _GIVEN_UP, False) or not transient(error):
                with contextlib.suppress(AttributeError):
                    setattr(error, _GIVEN_UP, True)
                raise
            delay = FIRST_DELAY * 2 ** (tried - 1)
            reason = (str(error).strip().splitlines() or [repr(error)])[0][:200]
            print(
                f"{what}: {type(error).__name__}: {reason}; trying again in {delay:g} s ({tried} of {TRIES - 1})",
                file=sys.stderr,
            )
            time.sleep(delay)
    raise AssertionError("unreachable")


def is_there(path, kind: Callable[[int], bool]) -> bool:
    """Whether a path is there and of a kind, such as `stat.S_ISDIR`; a fault that passes is tried again and then raised, where
    `os.path.isdir` would say that it is not there.
    """

    def look():
        try:
            return kind(os.stat(path).st_mode)
        except OSError as error:
            if error.errno in _PATHS or error.errno == errno.EINVAL:
                return False
            raise
        except ValueError:  # a null byte
            return False

    return retrying(look, f"looking for {path}")


@contextlib.contextmanager
def naming(what: str, remedy: str = "") -> Iterator[None]:
    """Turns the OSError of a path that is wrong, absent or closed to this user into a `UserError` that begins with `what`.

    Other OSErrors (a network, a full disk) pass as they are: they are nothing that the user wrote. what: the flag or field and its value.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _PATHS:
            raise
        reason = (error.strerror or str(error)).lower()
        where = f" ({error.filename})" if error.filename and str(error.filename) not in what else ""
        raise UserError(f"{what}: {reason}{where}{f'; {remedy}' if remedy else ''}") from error
