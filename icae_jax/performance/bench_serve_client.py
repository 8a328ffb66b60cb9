"""The clients of `icae bench serve`, and the server's process.

Clients are threads with the standard library's HTTP, a kept connection each: they share the machine
with the server, so they should take little of it.
"""

import contextlib
import http.client
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import types
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from icae_jax.errors import UserError

TOKENS_VARIABLE = "ICAE_SERVE_TOKENS"  # whose first token is sent
START_SECONDS = 900  # until a server that was started is ready: it may load and compile much
END_SECONDS = 60
IDLE_SECONDS = 5  # after which a server may have closed a kept connection: then a new one is made
READY = re.compile(r"ready on (http://\S+) ")
_PROC = pathlib.Path("/proc")


class Answered(NamedTuple):
    """What came back.

    Attributes:
        text: of the first choice.
        usage: as the server says it.
        first: seconds until the first text of a stream; None where nothing was streamed, or no text
            came.
        seconds: until all was there.
        finish: why it ended.
        error: what went wrong, in a few words; "" if nothing did.
    """

    text: str = ""
    usage: Mapping[str, Any] = types.MappingProxyType({})
    first: float | None = None
    seconds: float = 0.0
    finish: str | None = None
    error: str = ""

    @property
    def tokens(self) -> int:
        """New tokens."""
        return self.usage.get("completion_tokens", 0)


class Client:
    """One connection to a server, which is made anew when it was lost.

    Args:
        url: such as http://127.0.0.1:8000. UserError if it is none.
        timeout: seconds without a byte after which a request counts as lost.
    """

    def __init__(self, url: str, timeout: float = 600.0):
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"--url is {url!r}; give one such as http://127.0.0.1:8000")
        kind = http.client.HTTPConnection
        if parts.scheme == "https":
            kind = http.client.HTTPSConnection
        self._connection = kind(parts.hostname, parts.port, timeout=timeout)
        self._used = 0.0
        self._headers = {"Content-Type": "application/json"}
        tokens = os.environ.get(TOKENS_VARIABLE, "").replace(",", " ").split()
        if tokens:
            self._headers["Authorization"] = f"Bearer {tokens[0]}"

    def close(self) -> None:
        """Closes the connection."""
        self._connection.close()

    def call(self, method: str, path: str, body: Any = None) -> Any:
        """The JSON that a request is answered with. UserError if that is an error."""
        try:
            response = self._send(method, path, body)
            content = response.read()
        except (OSError, http.client.HTTPException) as error:
            self.close()
            raise UserError(f"the server does not answer {method} {path}: {error!r}") from error
        if response.status >= 400:
            raise UserError(f"{method} {path}: {_problem(response.status, content)}")
        return json.loads(content)

    def ask(self, path: str, body: dict[str, Any]) -> Answered:
        """The answer to a chat or completion, streamed if the body says so. Never raises."""
        began = time.perf_counter()
        try:
            response = self._send("POST", path, body)
            if response.status != 200:
                return Answered(error=_problem(response.status, response.read()))
            if body.get("stream"):
                answered = _streamed(response, began)
                if answered.error:
                    self.close()
                return answered
            whole = json.loads(response.read())
            seconds = time.perf_counter() - began
            choice = whole["choices"][0]
            return Answered(
                _text(choice, "message"), whole["usage"], None, seconds, choice["finish_reason"]
            )
        except (OSError, http.client.HTTPException) as error:
            self.close()
            return Answered(error=f"the connection broke: {type(error).__name__}")
        except (ValueError, LookupError, TypeError) as error:
            self.close()
            return Answered(error=f"not an answer: {error!r}")

    def _send(self, method, path, body):
        content = None if body is None else json.dumps(body).encode()
        if time.monotonic() - self._used > IDLE_SECONDS:
            self.close()
        self._connection.request(method, path, content, self._headers)
        response = self._connection.getresponse()
        self._used = time.monotonic()
        return response


def _problem(status: int, content: bytes) -> str:
    with contextlib.suppress(ValueError, LookupError, TypeError):
        error = json.loads(content)["error"]
        return f"{status} {error['code'] or error['type']}: {error['message']}"
    return f"{status}"


def _text(choice: dict[str, Any], key: str) -> str:
    """Of a chat's choice, or of a completion's."""
    return choice["text"] if "text" in choice else choice[key].get("content") or ""


def _streamed(response: http.client.HTTPResponse, began: float) -> Answered:
    """Reads a stream to its end."""
    texts: list[str] = []
    usage, finish, first, ended = {}, None, None, False
    while line := response.readline():
        if not line.startswith(b"data: "):
            continue
        data = line[6:].strip()
        if data == b"[DONE]":
            ended = True
            continue
        event = json.loads(data)
        if "error" in event:
            return Answered(error=f"in the stream: {event['error']['message']}")
        usage = event.get("usage") or usage
        for choice in event["choices"]:
            text = _text(choice, "delta")
            finish = choice["finish_reason"] or finish
            # Without a text, log-probabilities or the end are the first that is heard of it.
            if first is None and (text or finish or choice.get("logprobs")):
                first = time.perf_counter() - began
            texts.append(text)
    if not ended:
        return Answered(error="the stream has no end")
    return Answered("".join(texts), usage, first, time.perf_counter() - began, finish)


def ask_all(
    clients: Sequence[Client],
    requests: Sequence[tuple[str, dict[str, Any]]],
    done: Callable[[int], Any] = lambda count: None,
) -> tuple[list[Answered], float]:
    """The answers, in the requests' order, and the seconds until all were there.

    Each client sends a request as soon as its last one is answered. requests: (path, body). done:
    told after every answer how many there are.
    """
    answers: list[Answered] = [Answered(error="not asked")] * len(requests)
    numbers, mutex, count = iter(range(len(requests))), threading.Lock(), 0

    def work(client: Client) -> None:
        nonlocal count
        while True:
            with mutex:
                number = next(numbers, None)
            if number is None:
                return
            answers[number] = client.ask(*requests[number])
            with mutex:
                count += 1
                done(count)

    began = time.perf_counter()
    if len(clients) == 1:
        work(clients[0])
    else:
        threads = [threading.Thread(target=work, args=(c,), daemon=True) for c in clients]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return answers, time.perf_counter() - began


# --- The server's process ---


class Server:
    """`icae serve` in a process of its own on a free port of loopback, in a `with` statement.

    Args:
        arguments: of `icae serve`, but for host and port.

    Attributes:
        url: where it listens.

    Raises:
        UserError: it refuses its arguments.
        RuntimeError: it ends before it is ready, of anything else; with its last words.
    """

    def __init__(self, arguments: Sequence[str]):
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the server)
        command = [sys.executable, "-m", "icae_jax", "serve", "--port", "0", *arguments]
        command += ["--access_log", "none"]
        # `icae bench` restarts itself with huge pages, which `icae serve` does not.
        environment = dict(os.environ)
        if environment.get("GLIBC_TUNABLES") == "glibc.malloc.hugetlb=1":
            del environment["GLIBC_TUNABLES"]
        self._process = subprocess.Popen(
            command, stdout=self._log, stderr=self._log, env=environment
        )
        try:
            self.url = self._wait()
        except BaseException:
            self.close()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _wait(self):
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if found := READY.search(self.log()):
                return found[1]
            code = self._process.poll()
            if code == 2:
                raise UserError(self.log().strip().splitlines()[-1].removeprefix("error: "))
            if code is not None:
                raise RuntimeError(f"icae serve ended ({code}): {self.log()[-2000:]}")
            time.sleep(0.1)
        raise RuntimeError(f"icae serve is not ready after {START_SECONDS} s: {self.log()[-2000:]}")

    def log(self) -> str:
        """What it has printed."""
        self._log.seek(0, os.SEEK_END)
        size = self._log.tell()
        return os.pread(self._log.fileno(), size, 0).decode(errors="replace")

    def takes(self) -> dict[str, float]:
        """What it takes of the machine: `rss` (bytes), `threads`, `maps` and `files` now, and `cpu`
        (seconds) until now; {} where /proc does not tell.
        """
        folder = _PROC / str(self._process.pid)
        try:
            lines = (folder / "status").read_text().splitlines()
            status = dict(line.split(":", 1) for line in lines)
            times = (folder / "stat").read_text().rpartition(")")[2].split()
            return {
                "cpu": (int(times[11]) + int(times[12])) / os.sysconf("SC_CLK_TCK"),
                "rss": int(status["VmRSS"].split()[0]) * 1024,
                "threads": int(status["Threads"]),
                "maps": (folder / "maps").read_text().count("\n"),
                "files": len(list((folder / "fd").iterdir())),
            }
        except (OSError, LookupError):
            return {}

    def close(self) -> None:
        """Ends it; what it does not end in time is killed."""
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()
