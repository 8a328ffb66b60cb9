"""`icae serve` as a process: signals, ports, a store that others want, and its own OpenAPI document
as a fuzzer reads it.
"""

import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request

import pytest
from conftest import free_port
from serve_helpers import load, running, wait_for, write_adapter

from icae_jax.cli import main as cli
from icae_jax.inference.store import Writer

pytestmark = pytest.mark.nightly

BODY = {"messages": [{"role": "user", "content": "who ran ?"}], "max_tokens": 200}
BODY |= {"temperature": 1.0, "seed": 1}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, tiny_base):
    return write_adapter(tmp_path_factory.mktemp("adapter") / "a", tiny_base)


class Process:
    """`icae serve` on a free port of this machine."""

    def __init__(self, adapter, folder, *argv):
        self.port, self.folder = free_port(), folder
        self.log = folder / "stderr"
        command = [sys.executable, "-m", "icae_jax", "serve", "--adapter", str(adapter)]
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                [*command, "--port", str(self.port), *argv], stderr=log, stdout=log
            )

    @property
    def told(self):
        """What it has printed."""
        return self.log.read_text()

    def ready(self):
        """Waits until it takes requests."""
        assert wait_for(lambda: "ready on" in self.told or self.process.poll() is not None, 120)
        assert f"ready on http://127.0.0.1:{self.port} (model base-icae)" in self.told, self.told
        return self

    def open(self, body):
        """A response that has begun."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/v1/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        return urllib.request.urlopen(request, timeout=60)


@contextlib.contextmanager
def serving(adapter, folder, *argv):
    served = Process(adapter, folder, *argv)
    try:
        yield served
    finally:
        served.process.kill()
        served.process.wait()


def test_sigterm_in_the_middle(adapter, tmp_path):
    """Breaks when SIGTERM cuts an answer, new requests are still taken, or the exit code is not 0.

    A store that the server wrote can be written by others afterwards.
    """
    store = tmp_path / "store"
    with serving(adapter, tmp_path, "--store", str(store), "--rows", "1") as served:
        served.ready()
        with served.open(BODY | {"stream": True}) as reply:
            first = reply.readline()
            assert first.startswith(b"data: ")
            served.process.send_signal(signal.SIGTERM)
            rest = reply.read()
        events = [line[6:] for line in (first + rest).split(b"\n") if line.startswith(b"data: ")]
        assert events[-1] == b"[DONE]"
        assert json.loads(events[-2])["choices"][0]["finish_reason"] in ("stop", "length")
        assert served.process.wait(30) == 0
        with pytest.raises(OSError, match="refused"):
            served.open(BODY)
        assert "Traceback" not in served.told
    with serving(adapter, tmp_path, "--store", str(store)) as again:
        again.ready()


def test_sigterm_before_it_is_ready(adapter, tmp_path):
    """Breaks when a server that is ended while it warms up leaves a stack trace, or a lock."""
    store = tmp_path / "store"
    argv = ["--store", str(store), "--cors", "https://a.example"]
    with serving(adapter, tmp_path, *argv) as served:
        url = f"http://127.0.0.1:{served.port}/healthz"

        def lives():
            with contextlib.suppress(OSError):
                return urllib.request.urlopen(url, timeout=5).status == 200

        assert wait_for(lives, 120)
        served.process.send_signal(signal.SIGTERM)
        assert served.process.wait(60) == 0
        assert "Traceback" not in served.told
    with Writer(store):
        pass


def test_a_second_signal_gives_up_what_runs(adapter, tmp_path):
    """Breaks when an operator cannot end a server before its answers have ended."""
    with serving(adapter, tmp_path, "--grace", "60", "--rows", "1") as served:
        served.ready()
        with served.open(BODY | {"stream": True, "n": 16, "logprobs": True}) as reply:
            assert reply.readline().startswith(b"data: ")
            for _ in range(3):  # the third finds it ending
                served.process.send_signal(signal.SIGTERM)
                time.sleep(0.2)
            with contextlib.suppress(http.client.HTTPException, OSError):
                assert b"[DONE]" not in reply.read()
        assert served.process.wait(20) == 0


def test_a_second_server(adapter, tmp_path):
    """Breaks when it takes the port or the store of the first, or ends with a stack trace."""
    store = tmp_path / "store"
    other = tmp_path / "other"
    other.mkdir()
    with serving(adapter, tmp_path, "--store", str(store)) as served:
        served.ready()
        for argv, word in (
            (["--port", str(served.port)], f"--port {served.port} cannot be listened on"),
            (["--port", str(free_port()), "--store", str(store)], "is in use"),
        ):
            command = [sys.executable, "-m", "icae_jax", "serve", "--adapter", str(adapter), *argv]
            ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
            assert ended.returncode == 2 and word in ended.stderr, ended.stderr
            assert "Traceback" not in ended.stderr
        command = ["--store", str(store), "--read_only"]
        with serving(adapter, other, *command) as reader:
            reader.ready()


def test_a_public_address_needs_a_token(adapter, capsys):
    """Breaks when a server that anybody reaches answers anybody."""
    assert cli.main(["serve", "--adapter", str(adapter), "--host", "0.0.0.0"]) == 2
    assert "no bearer token" in capsys.readouterr().err


def test_the_openapi_document_holds(adapter, tmp_path):
    """Breaks when a request that a fuzzer makes of the document is answered by a 5xx, or a response
    is not as the document says.

    That a valid request is never refused cannot be asked: texts may be too long for the base, ids
    unknown.
    """
    pytest.importorskip("schemathesis", reason="needs schemathesis")
    compressor = load(adapter)
    with running(compressor, str(tmp_path / "s"), rows=4) as server:
        assert server.post("/v1/memories", {"text": "the cat saw", "id": "0"})[0] == 201
        command = [sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json"]
        command += ["--max-examples", "25", "--seed", "1", "--no-color", "--request-timeout", "60"]
        command += ["--phases", "examples,coverage,fuzzing"]
        command += ["--exclude-checks", "positive_data_acceptance"]
        environment = os.environ | {"HOME": str(tmp_path)}
        ended = subprocess.run(
            command, capture_output=True, text=True, timeout=500, cwd=tmp_path, env=environment
        )
        assert ended.returncode == 0, ended.stdout[-6000:] + ended.stderr[-2000:]
        assert "12/12" in ended.stdout  # operations
        assert server.wait_idle()
        # What it made may be deleted again, "0" too.
        assert server.post("/v1/memories", {"text": "the dog ran", "id": "0"})[0] in (200, 201)
        assert server.chat("who ran ?", memory="0", max_tokens=2)[0] == 200
