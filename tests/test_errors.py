"""Which errors are the user's: exit codes, retries, and wrong paths."""

import errno
import socket

import jax
import pytest

from icae_jax import errors
from icae_jax.cli import main as cli
from icae_jax.runtime import distributed


class HTTPStatusError(Exception):
    """As HTTP clients raise it: with the response."""

    def __init__(self, status):
        super().__init__(f"status {status}")
        self.response = type("Response", (), {"status_code": status})()


class ConnectError(Exception):
    __module__ = "httpx._exceptions"


def caused_by(cause, kind=RuntimeError):
    error = kind("outer")
    error.__cause__ = cause
    return error


USERS = {
    "bad input": errors.UserError("--k is 0"),
    "a full disk": OSError(errno.ENOSPC, "No space left on device", "w/x"),
    "a full quota": OSError(errno.EDQUOT, "Disk quota exceeded"),
    "a full disk, told by a library": caused_by(
        ValueError("RESOURCE_EXHAUSTED: Error writing x: failed [os_error_code='28']")
    ),
}
NOT_USERS = {
    "a connection": ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"),
    "a network filesystem": OSError(errno.ESTALE, "Stale file handle"),
    "a slip of the code": ValueError("zip() argument 2 is longer than argument 1"),
    "a missing file of ours": FileNotFoundError(errno.ENOENT, "No such file", "x"),
    "a hub that is away": caused_by(ConnectError("refused"), OSError),
    "anything": KeyError("x"),
}


@pytest.mark.parametrize("name", USERS)
def test_what_the_user_must_change_is_one_line_and_exit_code_2(name, monkeypatch, capsys):
    """Breaks when bad input or a full disk shows a traceback, or launchers would restart it."""

    def verb(argv):
        raise USERS[name]

    monkeypatch.setitem(cli.VERBS, "inspect", (verb, "x"))
    assert cli.main(["inspect"]) == cli.BAD_INPUT
    out = capsys.readouterr().err
    assert out.startswith("icae inspect: ") and str(USERS[name]) in out and out.count("\n") == 1


@pytest.mark.parametrize("name", NOT_USERS)
def test_what_nobody_can_change_keeps_its_traceback(name, monkeypatch):
    """Breaks when a network failure or a bug counts as bad input: exit code 2 ends a launched run
    for good.
    """

    def verb(argv):
        raise NOT_USERS[name]

    monkeypatch.setitem(cli.VERBS, "inspect", (verb, "x"))
    with pytest.raises(type(NOT_USERS[name])):  # Python prints the traceback and exits with 1
        cli.main(["inspect"])


@pytest.mark.parametrize("name", USERS | NOT_USERS)
def test_one_of_several_processes_ends_with_the_same_code(name, monkeypatch, capsys):
    """Breaks when one of several processes exits with another code than alone, or says less."""
    codes = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed.os, "_exit", codes.append)
    with distributed.ending_together(cli.BAD_INPUT):
        raise (USERS | NOT_USERS)[name]
    assert codes == [cli.BAD_INPUT if name in USERS else distributed.CRASHED]
    assert ("Traceback" in capsys.readouterr().err) == (name in NOT_USERS)


def of(package, name, base=Exception, **fields):
    """An instance of a library's own kind of exception."""
    error = type(name, (base,), {"__module__": f"{package}.exceptions"})("x")
    for field, value in fields.items():
        setattr(error, field, value)
    return error


PASSING = {
    "aiohttp": of("aiohttp", "ServerDisconnectedError"),
    "aiohttp, payload": of("aiohttp", "ClientPayloadError"),
    "botocore": of("botocore", "EndpointConnectionError"),
    "botocore, time": of("botocore", "ReadTimeoutError"),
    "botocore, 503": of(
        "botocore", "ClientError", response={"ResponseMetadata": {"HTTPStatusCode": 503}}
    ),
    "urllib3": of("urllib3", "MaxRetryError"),
    "gcsfs": of("gcsfs", "HttpError", code=503),
    "google": of("google", "BadGateway", code=502),
    "half a body": of("http", "IncompleteRead"),
    "name server": socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution"),
    "hf_xet": RuntimeError("Data processing error: server error (503 Service Unavailable)"),
    "connection": ConnectionResetError(errno.ECONNRESET, "reset"),
    "io": OSError(errno.EIO, "Input/output error"),
    "stale": caused_by(OSError(errno.ESTALE, "Stale file handle")),
    "timeout": TimeoutError("timed out"),
    "503": HTTPStatusError(503),
    "429": HTTPStatusError(429),
    "client": ConnectError("refused"),
    "tensorstore": ValueError("UNAVAILABLE: CURL error"),
    "tensorstore, local": ValueError("INTERNAL: Error reading x: failed [os_error_code='116']"),
}
STAYING = {
    "input, because of a network": caused_by(
        ConnectionResetError(errno.ECONNRESET, "reset"), errors.UserError
    ),
    "gcsfs, 404": of("gcsfs", "HttpError", code=404),
    "botocore, 403": of(
        "botocore", "ClientError", response={"ResponseMetadata": {"HTTPStatusCode": 403}}
    ),
    "404": HTTPStatusError(404),
    "hub, told not to ask": of("huggingface_hub", "OfflineModeIsEnabled", ConnectionError),
    "absent": FileNotFoundError(errno.ENOENT, "No such file"),
    "full": OSError(errno.ENOSPC, "No space left on device"),
    "input": errors.UserError("bad"),
    "code": ValueError("zip() argument 2 is longer than argument 1"),
}


@pytest.mark.parametrize("name", PASSING)
def test_a_passing_failure_is_tried_again_and_then_raised_as_it_is(name, monkeypatch, capsys):
    """Breaks when one dropped connection ends a run, retries never end, or their delays do not
    grow.
    """
    pauses, calls = [], []
    monkeypatch.setattr(errors.time, "sleep", pauses.append)

    def twice():
        calls.append(1)
        if len(calls) < 3:
            raise PASSING[name]
        return "value"

    assert errors.retrying(twice, "reading x") == "value" and pauses == [1, 2]
    assert capsys.readouterr().err.count("; trying again in ") == 2

    def never():
        calls.append(1)
        raise PASSING[name]

    calls.clear()
    with pytest.raises(type(PASSING[name])) as raised:
        errors.retrying(never, "reading x")
    assert (
        raised.value is PASSING[name]
        and len(calls) == errors.TRIES
        and not errors.is_users(raised.value)
    )


def test_tries_within_tries_do_not_multiply(monkeypatch):
    """Breaks when nested retries multiply, so that a file is read thirty-six times."""
    monkeypatch.setattr(errors, "FIRST_DELAY", 0.0)
    calls = []

    def reading():
        calls.append(1)
        raise OSError(errno.ESTALE, "Stale file handle")

    with pytest.raises(OSError, match="Stale"):
        errors.retrying(lambda: errors.retrying(reading, "inner"), "outer")
    assert len(calls) == errors.TRIES


@pytest.mark.parametrize("name", STAYING)
def test_a_failure_that_stays_is_not_tried_again(name, monkeypatch):
    """Breaks when bad input is reported only after half a minute of retries."""
    monkeypatch.setattr(errors.time, "sleep", lambda seconds: pytest.fail("waits"))
    with pytest.raises(type(STAYING[name])):
        errors.retrying(lambda: (_ for _ in ()).throw(STAYING[name]), "reading x")


def test_a_path_of_the_users_is_named(tmp_path):
    """Breaks when a workdir below a file gives a traceback, or a filesystem failure counts as bad
    input.
    """
    (tmp_path / "file").write_text("")
    named = errors.naming("--workdir w", "give a folder")
    with (
        pytest.raises(errors.UserError, match=r"--workdir w: not a directory .*; give a folder"),
        named,
    ):
        (tmp_path / "file" / "w").mkdir()
    with pytest.raises(OSError, match="Stale") as raised, errors.naming("--workdir w"):
        raise OSError(errno.ESTALE, "Stale file handle")
    assert not isinstance(raised.value, errors.UserError)


@pytest.mark.parametrize(
    ("count", "things", "message"),
    [
        (1, "texts", "1 text"),
        (0, "texts without tokens", "0 texts without tokens"),
        (1, "texts without tokens", "1 text without tokens"),
        (2000, "steps", "2,000 steps"),
        (1, "microbatches", "1 microbatch"),
        (1, "empty texts", "1 empty text"),
        (1, "scalar placeholders of the base", "1 scalar placeholder of the base"),
        (1, "memories of a text", "1 memory of a text"),
        (1, "devices", "1 device"),
        (1, "boxes", "1 box"),
    ],
)
def test_things_are_counted(count, things, message):
    assert errors.counted(count, things) == message
