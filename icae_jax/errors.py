"""What a user must change, as against what a machine or this code did wrong; and which failures are worth another try."""

import contextlib
import errno
import os
import re
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
    errno.EIO, errno.ESTALE, errno.EREMOTEIO, errno.EAGAIN, errno.EBUSY, errno.EINTR, errno.ETIMEDOUT, errno.ECONNRESET,
    errno.ECONNREFUSED, errno.ECONNABORTED, errno.ENOTCONN, errno.EPIPE, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN,
    errno.ENETUNREACH, errno.ENETRESET, errno.ENOLINK,
}  # fmt: skip
# HTTP clients and storage libraries raise types of their own, which are not imported for this.
_TRANSIENT_TYPES = re.compile(
    "(Connect|Read|Write|Pool)?(Timeout|Error)|(Connection|Transport|Network|Protocol|RemoteProtocol|ChunkedEncoding|IncompleteRead)Error"
    "|ConnectTimeout|ReadTimeout|LocalEntryNotFoundError|ServiceUnavailable|InternalServerError|TooManyRequests"
)
_NETWORK_PACKAGES = (
    "httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3", "huggingface_hub", "google", "aiohttp", "botocore", "gcsfs",
    "fsspec",
)  # fmt: skip
_TRANSIENT_STATUS = re.compile(r"\b(UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED): ")  # how tensorstore begins

FIRST_DELAY = 1.0  # seconds before the second try; each later wait is twice as long
TRIES = 6


class UserError(ValueError):
    """Bad input: the message names the field or file, the value and the remedy. It alone (and a full disk) gives exit code 2."""


def _causes(error: BaseException) -> Iterator[BaseException]:
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
    return any(_errno(e) in _FULL or os.strerror(errno.ENOSPC) in str(e) for e in _causes(error))


def is_users(error: BaseException) -> bool:
    """Whether the user must change something (exit code 2): launchers do not restart such a run."""
    return isinstance(error, UserError) or disk_full(error)


def transient(error: BaseException) -> bool:
    """Whether an exception is one that passes: a connection, a network filesystem, a server that is overloaded or being restarted."""
    for e in _causes(error):
        if isinstance(e, ConnectionError | TimeoutError) or _errno(e) in _TRANSIENT:
            return True
        kind = type(e)
        status = getattr(getattr(e, "response", None), "status_code", None)
        if isinstance(status, int):
            return status in (408, 429) or status >= 500
        if kind.__module__.split(".")[0] in _NETWORK_PACKAGES and _TRANSIENT_TYPES.fullmatch(kind.__name__):
            return True
        if _TRANSIENT_STATUS.match(str(e)):
            return True
    return False


def retrying(function: Callable[[], T], what: str) -> T:
    """What `function()` returns, called again with growing pauses as long as its failures are `transient`, `TRIES` times at most.

    what: names the work in the notes on stderr. The last failure is raised as it is. `function` must be one that can be called again.
    """
    for tried in range(1, TRIES + 1):
        try:
            return function()
        except Exception as error:
            if tried == TRIES or not transient(error):
                raise
            delay = FIRST_DELAY * 2 ** (tried - 1)
            reason = (str(error).strip().splitlines() or [repr(error)])[0][:200]
            print(f"{what}: {type(error).__name__}: {reason}; trying again in {delay:g} s ({tried} of {TRIES - 1})", file=sys.stderr)
            time.sleep(delay)
    raise AssertionError("unreachable")


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
