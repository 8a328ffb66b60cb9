"""What `icae serve` does when clients, stores, devices or time are against it."""

import concurrent.futures
import contextlib
import http.client
import io
import json
import shutil
import socket
import time

import jax
import numpy as np
import pytest
from cli_helpers import sentence
from serve_helpers import load, running, wait_for, write_adapter

from icae_jax.errors import UserError
from icae_jax.inference import store
from icae_jax.inference.texts import Size
from icae_jax.server import serve
from icae_jax.server.failures import ApiError
from icae_jax.server.memories import Work
from icae_jax.server.options import TOKENS_VARIABLE, Options, read_tokens
from icae_jax.server.schema import MOST_STOPS

RNG = np.random.default_rng(8)
TEXT = sentence(RNG, 12)
CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "who ran ?"}]
SECRET = "a-long-enough-secret"


@pytest.fixture(scope="module")
def compressor(tmp_path_factory, tiny_base):
    return load(write_adapter(tmp_path_factory.mktemp("adapter") / "a", tiny_base))


@pytest.fixture(scope="module")
def server(compressor, tmp_path_factory):
    path = tmp_path_factory.mktemp("served") / "store"
    with running(compressor, str(path), max_body_mib=0.5) as server:
        assert server.post("/v1/memories", {"text": TEXT, "id": "t"})[0] == 201
        yield server
        assert server.wait_idle()
        assert server.chat("who ran ?", memory="t", max_tokens=4)[0] == 200  # after all of that


def is_error(reply, status=400, word=""):
    """Whether a reply is an error in OpenAI's form, which names nothing of the program."""
    got, body = reply[:2]
    error = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "Traceback" not in json.dumps(body) and ".py" not in json.dumps(body)
    return got == status and word in error["message"]


# --- Bad requests ---


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b'{"messages": [}',
        b'{"messages": "\xff\xfe"}',
        b"\x00\x01\x02",
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b'{"temperature": ' + b"9" * 6000 + b"}",
    ],
    ids=range(12),
)
def test_malformed_bodies_are_400(server, raw):
    """Breaks when a body that is no JSON, no text, or nested deeply is a fault of the server."""
    for path in (CHAT, "/v1/completions", "/v1/memories", "/v1/memories/t/restore"):
        if path.endswith("restore") and raw == b"":
            continue
        assert is_error(server.post(path, raw=raw))


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": "hello"}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "messages"),
        ({"messages": [*MESSAGES, {"role": "assistant", "content": "x"}]}, "messages"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 10**8}, "max_tokens"),
        ({"max_tokens": 10**30}, "max_tokens"),
        ({"max_tokens": "4"}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": -0.1}, "top_p"),
        ({"seed": 1 << 64}, "seed"),
        ({"n": 0}, "n"),
        ({"n": 1000}, "n"),
        ({"stop": ["x"] * 10_000}, "stop"),
        ({"stop": ["x" * 10_000]}, "stop"),
        ({"stop": ""}, "stop"),
        ({"messages": [{"role": "user", "content": "x" * 20_000}]}, "messages"),
        ({"messages": MESSAGES, "n": 16, "memory": ["t"] * 65}, "memory"),
        ({"memmory": "t"}, "memmory"),
        ({"memory": ""}, "memory"),
        ({"memory": []}, "memory"),
        ({"memory": 3}, "memory"),
        ({"memory": "t", "ratio": 4.0}, "ratio"),
        ({"context": "a", "ratio": float("nan")}, "ratio"),
        ({"context": "a", "ratio": 4.0, "memory_tokens": 4}, "ratio"),
        ({"context": ""}, "context"),
        ({"context": "a", "memory": "t", "compress": False}, "compress"),
        ({"context": "the cat " * 3000}, "context"),
        ({"context": "the cat " * 3000, "compress": False}, "context"),
        ({"messages": [{"role": "user", "content": "cat " * 300}]}, "messages"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"tools": [{}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"frequency_penalty": 1.0}, "frequency_penalty"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
    ],
    ids=str,
)
def test_bad_fields_are_400_and_named(server, fields, param):
    """Breaks when a field that cannot be is guessed at, ignored, or a fault of the server."""
    status, body = server.post(CHAT, {"messages": MESSAGES} | fields)
    assert is_error((status, body))
    assert (body["error"]["param"] or "").startswith(param), body


def test_openais_other_fields_are_taken(server):
    """Breaks when clients that always send them are refused."""
    status, _ = server.chat(
        "who ran ?",
        max_completion_tokens=2,
        user="me",
        metadata={"a": "b"},
        store=False,
        tools=[],
        frequency_penalty=0,
        presence_penalty=0.0,
        response_format={"type": "text"},
        service_tier="auto",
        parallel_tool_calls=True,
        stop=["x"] * MOST_STOPS,
    )
    assert status == 200


def test_bad_completions_memories_and_paths(server):
    """Breaks when what is refused of chats is not of the others."""
    for body in (
        {"prompt": ""},
        {"prompt": []},
        {"prompt": [1, 64]},
        {"prompt": [[]]},
        {"prompt": [-1]},
        {"prompt": "a", "echo": True},
        {"prompt": "a", "logprobs": 50},
        {"prompt": [["a"]]},
    ):
        assert is_error(server.post("/v1/completions", body)), body
    deep = {"a": 1}
    for _ in range(90):
        deep = {"a": deep}
    for body in (
        {"text": ""},
        {"text": 3},
        {"text": "a", "id": ""},
        {"text": "a", "id": "x" * 600},
        {"text": "a", "id": "a\nb"},
        {"text": "a", "metadata": []},
        {"text": "a", "metadata": deep},
        {"text": "a", "metadata": {"x": float("nan")}},
        {"text": "a", "memory_tokens": -1},
        {"text": "a", "keep": "yes"},
        {"text": "the cat " * 3000},
    ):
        assert is_error(server.post("/v1/memories", body)), body
    assert is_error(server.post("/v1/memories", {"text": "a", "id": "t", "keep": False}), 409)
    assert is_error(server.post("/v1/memories/t/restore", {"max_tokens": 0}))
    for path in ("/v1/memories?limit=0", "/v1/memories?limit=x", "/v1/memories?after=nothing"):
        assert is_error(server.ask("GET", path)), path
    for memory_id in ("..", "../../etc/passwd", "%00", "' OR 1=1 --", "%F0%9F%90%88"):
        path = "/v1/memories/" + memory_id.replace("/", "%2F").replace(" ", "%20")
        assert is_error(server.ask("GET", path), 404), memory_id
        assert is_error(server.post(path + "/restore"), 404), memory_id
    assert is_error(server.ask("GET", "/nothing"), 404)
    assert is_error(server.ask("GET", "/page/../api"), 404)
    assert is_error(server.ask("PUT", CHAT, {}), 405)
    status, _, headers = server.ask("PUT", "/v1/memories/t", {})
    assert status == 405 and headers["Allow"] == "DELETE, GET"
    assert server.ask("PUT", "/v1/memories/t/restore", {})[2]["Allow"] == "POST"
    assert is_error(server.chat("x", model="gpt-9"), 404, "gpt-9")
    assert is_error(server.chat("x", memory="nothing"), 404)


def test_a_body_may_not_be_too_large(server):
    """Breaks when a body is read whole before it is refused, with or without its length."""
    large = b'{"text": "' + b"a" * (1 << 20) + b'"}'
    assert is_error(server.post("/v1/memories", raw=large), 413)

    def pieces():
        for _ in range(64):
            yield b"a" * (1 << 14)

    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    with contextlib.closing(connection):
        headers = {"Content-Type": "application/json", "Transfer-Encoding": "chunked"}
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.request("POST", "/v1/memories", pieces(), headers, encode_chunked=True)
        assert connection.getresponse().status == 413


# --- Who may ask ---


def test_tokens(compressor, tmp_path, monkeypatch):
    """Breaks when a wrong token opens a door, or the page and the probes need one."""
    with running(compressor, tokens=("other-long-secret-1", SECRET)) as server:
        server.token = ""
        for path in ("/healthz", "/readyz"):
            assert server.ask("GET", path)[0] == 200
        wrong = ["", "Bearer", "Bearer wrong", f"Basic {SECRET}", f"Bearer {SECRET}x", SECRET]
        for authorization in wrong:
            headers = {"Authorization": authorization}
            for path in ("/v1/models", "/metrics", "/openapi.json", "/nothing"):
                assert is_error(server.ask("GET", path, headers=headers), 401), authorization
            assert is_error(server.post(CHAT, {"messages": MESSAGES}, headers=headers), 401)
        for token in ("other-long-secret-1", SECRET):
            server.token = token
            assert server.ask("GET", "/v1/models")[0] == 200
            assert server.chat("who ran ?", max_tokens=1)[0] == 200
        # Behind a name of its own: tokens are enough.
        assert server.ask("GET", "/v1/models", headers={"Host": "icae.example.org"})[0] == 200
    file = tmp_path / "tokens"
    file.write_text(f"\n{SECRET}\n")
    monkeypatch.setenv(TOKENS_VARIABLE, "from-the-environment-1, from-the-environment-2")
    options = Options("a", token_file=str(file), host="0.0.0.0")
    assert read_tokens(options) == (SECRET, "from-the-environment-1", "from-the-environment-2")
    monkeypatch.delenv(TOKENS_VARIABLE)
    for options, word in (
        (Options("a", host="0.0.0.0"), "no bearer token"),
        (Options("a", host="::"), "no bearer token"),
        (Options("a", host="example.org"), "no bearer token"),
        (Options("a", token_file=str(tmp_path / "none")), "cannot be read"),
    ):
        with pytest.raises(UserError, match=word):
            read_tokens(options)
    for text, word in (("short\n", "at least 16"), (" \n", "holds no token")):
        file.write_text(text)
        with pytest.raises(UserError, match=word):
            read_tokens(Options("a", token_file=str(file)))
    for host in ("127.0.0.1", "::1", "localhost", "127.3.4.5"):
        assert read_tokens(Options("a", host=host)) == ()


def test_pages_of_other_sites_may_not_ask(server, compressor):
    """Breaks when a page that a browser shows can use a server that only this machine reaches."""
    ask = server.ask
    assert is_error(ask("GET", "/v1/models", headers={"Host": "evil.example.org"}), 403)
    assert is_error(ask("GET", "/v1/models", headers={"Origin": "https://evil.example"}), 403)
    for origin in ("null", "http://[", "", "http://127.0.0.1"):
        assert is_error(ask("GET", "/v1/models", headers={"Origin": origin}), 403)
    assert ask("GET", "/v1/models", headers={"Origin": server.url})[0] == 200
    body = {"messages": MESSAGES, "max_tokens": 1}
    plain = {"Content-Type": "text/plain"}
    assert is_error(server.post(CHAT, body, headers=plain), 400, "Content-Type")
    assert "access-control-allow-origin" not in ask("GET", "/v1/models")[2]
    with running(compressor, cors=("https://a.example",)) as named:
        headers = {"Origin": "https://a.example"}
        reply = named.ask("GET", "/v1/models", headers=headers)
        assert reply[0] == 200
        assert reply[2]["access-control-allow-origin"] == "https://a.example"
        preflight = headers | {"Access-Control-Request-Method": "POST"}
        preflight["Access-Control-Request-Headers"] = "authorization,x-stainless-lang"
        assert named.ask("OPTIONS", CHAT, headers=preflight)[0] == 200
        assert is_error(
            named.ask("GET", "/v1/models", headers={"Origin": "https://b.example"}), 403
        )


def test_the_access_log_has_no_texts(compressor):
    """Breaks when texts, ids, answers or tokens are written down, or a line is no JSON."""
    log = io.StringIO()
    with running(compressor, log=log, tokens=(SECRET,)) as server:
        made = server.post("/v1/memories", {"text": TEXT, "id": "secret-id"})
        assert made[0] == 201
        _, answer = server.chat("who ran ?", memory="secret-id", max_tokens=8)
        assert server.ask("GET", "/v1/memories/secret-id")[0] == 200
        assert server.chat("who ran ?", memory="secret-id", stream=True)[0] == 200
        assert server.post(CHAT, {"no": "ran"})[0] == 400
        _, metrics, _ = server.ask("GET", "/metrics")
    lines = [json.loads(line) for line in log.getvalue().splitlines()]
    # A stream's line may come behind the next request's.
    assert sorted(line["status"] for line in lines) == [200, 200, 200, 200, 201, 400]
    assert lines[1]["route"] == CHAT and lines[2]["route"] == "/v1/memories/{memory_id:path}"
    assert lines[1]["completion_tokens"] == answer["usage"]["completion_tokens"] > 0
    assert lines[1]["first_ms"] > 0 and len({line["id"] for line in lines}) == 6
    written = log.getvalue() + metrics
    for text in ("secret-id", "ran", SECRET, answer["choices"][0]["message"]["content"]):
        assert text not in written
    values = dict(line.rsplit(" ", 1) for line in metrics.splitlines() if line[0] != "#")
    assert values[f'icae_requests_total{{route="{CHAT}",status="200"}}'] == "2.0"
    assert float(values['icae_tokens_total{kind="memory"}']) == 8
    assert float(values["icae_compressed_tokens_total"]) > 0 and values["icae_ready"] == "1.0"


# --- Clients that come and go ---


def raw_post(server, path, body):
    """A socket that has sent a request."""
    data = json.dumps(body).encode()
    sent = socket.create_connection(("127.0.0.1", server.port), timeout=30)
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    sent.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    return sent


class Slowed:
    """An engine whose steps take time, so that a test can come between."""

    def __init__(self, engine, seconds):
        self._engine, self._seconds, self.steps = engine, seconds, 0

    def __getattr__(self, name):
        return getattr(self._engine, name)

    def __len__(self):
        return len(self._engine)

    def step(self):
        time.sleep(self._seconds)
        self.steps += 1
        return self._engine.step()


def slow(server, seconds):
    """Slows the engine of short requests; returns it."""
    lane = server.service.scheduler._lanes[0]
    lane.engine = Slowed(lane.engine, seconds)
    return lane.engine


def test_who_hangs_up_frees_its_row(compressor):
    """Breaks when rows decode on for clients that have gone, whether they ran or waited."""
    with running(compressor, rows=1, queue=4) as server:
        engine, scheduler = slow(server, 0.05), server.service.scheduler
        body = {"messages": MESSAGES, "max_tokens": 100, "temperature": 1.0, "seed": 1}
        for stream, waiting_stream in ((True, False), (False, True)):
            engine.steps = 0
            with raw_post(server, CHAT, body | {"stream": stream}) as running_one:
                assert wait_for(lambda: scheduler.running == 1)
                if stream:
                    assert b"200 OK" in running_one.recv(1024)
                with raw_post(server, CHAT, body | {"stream": waiting_stream}):
                    assert wait_for(lambda: scheduler.waiting == 1)
                assert wait_for(lambda: scheduler.waiting == 0)
                assert scheduler.running == 1
            assert server.wait_idle()
            assert 0 < engine.steps < 95  # all of its tokens would be 100
        assert server.chat("who ran ?", max_tokens=2)[0] == 200


def test_a_slow_reader_holds_no_row(compressor):
    """Breaks when the engine waits for a client that does not read."""
    with running(compressor, rows=1) as server:
        body = {"messages": MESSAGES, "max_tokens": 60, "stream": True, "n": 4, "logprobs": True}
        with raw_post(server, CHAT, body | {"top_logprobs": 20}) as reader:
            reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
            assert server.wait_idle()
            assert server.chat("who ran ?", max_tokens=2)[0] == 200
            got = b""
            while b"[DONE]" not in got:
                got += reader.recv(1 << 16)
                assert got
        assert got.count(b'"finish_reason": "') == 4


def test_a_full_queue_is_429(compressor):
    """Breaks when requests pile up without bound, or clients are not told when to come again."""
    with running(compressor, rows=1, queue=2) as server, contextlib.ExitStack() as stack:
        slow(server, 0.05)
        body = {"messages": MESSAGES, "max_tokens": 100, "temperature": 1.0, "seed": 1}
        for _ in range(3):
            stack.enter_context(raw_post(server, CHAT, body))
        assert wait_for(lambda: server.service.scheduler.waiting == 2)
        status, reply, headers = server.ask("POST", CHAT, body)
        assert is_error((status, reply), 429) and int(headers["Retry-After"]) >= 1
        assert is_error(server.chat("who ran ?", n=2), 429)
        assert is_error(server.chat("who ran ?", n=4), 400, "at most 2")  # not even later


def test_a_request_may_not_take_too_long(compressor):
    """Breaks when a request that takes too long goes on, or a stream just ends."""
    with running(compressor, rows=1, timeout=3) as server:
        slow(server, 0.2)
        body = {"messages": MESSAGES, "max_tokens": 100, "temperature": 1.0, "seed": 1}
        assert is_error(server.post(CHAT, body), 504)
        status, lines, _ = server.ask("POST", CHAT, body | {"stream": True})
        events = [line[6:] for line in lines.split("\n") if line.startswith("data: ")]
        assert status == 200 and is_error((504, json.loads(events[-1])), 504)
        assert len(events) > 3 and "[DONE]" not in events
        assert server.wait_idle()


# --- The store ---


def test_a_damaged_document_is_its_own_error(compressor, tmp_path):
    """Breaks when damaged bytes are read as a memory, or spoil other documents."""
    path = tmp_path / "s"
    with running(compressor, str(path)) as server:
        for name in ("good", "bad"):
            assert server.post("/v1/memories", {"text": sentence(RNG, 9), "id": name})[0] == 201
        with store.open_store(path) as opened:
            entry = opened["bad"]
        (shard,) = (path / "shards").glob(f"{entry.shard}*")
        data = bytearray(shard.read_bytes())
        data[entry.spans["memory"].offset + 3] ^= 1
        shard.write_bytes(bytes(data))
        for reply in (
            server.chat("who ran ?", memory="bad"),
            server.post("/v1/memories/bad/restore"),
            server.chat("who ran ?", memory=["good", "bad"]),
        ):
            assert is_error(reply, 500, "damaged") and reply[1]["error"]["code"] == "memory_damaged"
        assert server.chat("who ran ?", memory="good", max_tokens=2)[0] == 200
        assert server.ask("GET", "/v1/memories/bad")[0] == 200  # what the index says of it


def test_a_store_that_is_replaced(compressor, tmp_path, tiny_base):
    """Breaks when answers come from a store that is not there any more, or another adapter's."""
    path, other = tmp_path / "s", tmp_path / "other"
    text = sentence(RNG, 13)
    with running(compressor, str(other)) as server:
        assert server.post("/v1/memories", {"text": text, "id": "new"})[0] == 201
    with running(compressor, str(path), read_only=False) as server:
        assert server.post("/v1/memories", {"text": TEXT, "id": "old"})[0] == 201
        assert server.chat("who ran ?", memory="old", max_tokens=4)[0] == 200
        path.rename(tmp_path / "away")
        assert is_error(server.chat("who ran ?", memory="old"), 503, "store")
        assert server.chat("who ran ?", max_tokens=2)[0] == 200  # without documents
        shutil.copytree(other, path)
        assert is_error(server.chat("who ran ?", memory="old"), 404)
        status, got = server.chat("who ran ?", memory="new", max_tokens=8)
        want = compressor.ask(compressor.compress(text), ["who ran ?"], 8)[0]
        assert status == 200 and got["choices"][0]["message"]["content"] == want
        # What is written goes where it is found again, not where the folder was moved to.
        assert server.post("/v1/memories", {"text": TEXT, "id": "x"})[0] == 201
        assert server.chat("who ran ?", memory="x", max_tokens=4)[0] == 200
        with store.open_store(path) as opened, store.open_store(tmp_path / "away") as away:
            assert set(opened) == {"new", "x"} and set(away) == {"old"}
        shutil.rmtree(path)
        foreign = load(write_adapter(tmp_path / "b", tiny_base, k=2, rate=8))
        with running(foreign, str(tmp_path / "foreign")) as filled:
            assert filled.post("/v1/memories", {"text": TEXT, "id": "old"})[0] == 201
        shutil.copytree(tmp_path / "foreign", path)
        assert is_error(server.chat("who ran ?", memory="old"), 503)


def test_a_store_that_is_only_read(compressor, tmp_path):
    """Breaks when a read-only server writes, keeps others from writing, or does not see it."""
    path = tmp_path / "s"
    with running(compressor, str(path)) as server:
        assert server.post("/v1/memories", {"text": TEXT, "id": "t"})[0] == 201
        with pytest.raises(UserError, match="is in use"):
            store.Writer(path)
        with running(compressor, str(path), read_only=True) as reader:
            assert is_error(reader.post("/v1/memories", {"text": "the cat", "id": "u"}), 403)
            assert is_error(reader.ask("DELETE", "/v1/memories/t"), 403)
            assert reader.post("/v1/memories", {"text": "the cat", "keep": False})[0] == 201
            assert server.post("/v1/memories", {"text": "the dog", "id": "u"})[0] == 201
            assert reader.chat("who ?", memory="u", max_tokens=2)[0] == 200
            assert not reader.ask("GET", "/v1/models")[1]["data"][0]["compressor"]["writable"]


# --- Devices, and faults of the server's own ---


def test_out_of_memory_for_a_bucket(compressor, capsys):
    """Breaks when a bucket that does not fit ends the server, or is never tried with fewer rows."""
    wanted = []

    def prepare(service):
        make = service.scheduler._make_engine

        def scarce(bucket):
            wanted.append(bucket)
            if bucket.tokens > 128 and bucket.rows > limit[0]:
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
            return make(bucket)

        service.scheduler._make_engine = scarce

    limit = [1]
    with running(compressor, prepare=prepare, rows=8) as server:
        long = " ".join(["cat"] * 140)
        assert server.chat(long, max_tokens=4)[0] == 200
        assert [bucket.rows for bucket in wanted if bucket.tokens > 128][-3:] == [4, 2, 1]
        lane = server.service.scheduler._lanes[1]
        lane.engine, limit[0] = None, 0
        status, reply, headers = server.ask(
            "POST", CHAT, {"messages": [{"role": "user", "content": long}]}
        )
        assert is_error((status, reply), 503) and reply["error"]["code"] == "out_of_memory"
        assert int(headers["Retry-After"]) > 0
        assert server.chat("who ran ?", max_tokens=2)[0] == 200  # a short one
    assert "no memory for" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"), 503),
        (ZeroDivisionError("a fault"), 500),
    ],
)
def test_a_step_that_fails(compressor, capsys, error, status):
    """Breaks when a failed step ends the server, tells clients of its insides, or leaves rows."""
    with running(compressor) as server:
        lane = server.service.scheduler._lanes[0]

        def fail():
            raise error

        lane.engine.step = fail
        reply = server.chat("who ran ?", max_tokens=4)
        assert is_error(reply, status) and "Zero" not in json.dumps(reply[1])
        assert server.chat("who ran ?", max_tokens=4)[0] == 200  # on an engine made anew
    told = capsys.readouterr().err
    assert ("ZeroDivisionError: a fault" in told) == (status == 500)


def test_an_engine_that_cannot_be_made_or_emptied(compressor, capsys):
    """Breaks when an error that nobody thought of ends the scheduler's thread, and all who ask wait
    for ever.
    """

    def fail(*arguments):
        raise ZeroDivisionError("a fault")

    with running(compressor) as server:
        lane, scheduler = server.service.scheduler._lanes[0], server.service.scheduler
        made, make = lane.engine, scheduler._make_engine
        lane.engine, scheduler._make_engine = None, fail
        assert is_error(server.chat("who ran ?", max_tokens=4), 500)
        lane.engine, scheduler._make_engine = made, make
        lane.engine.insert = fail
        assert is_error(server.chat("who ran ?", max_tokens=4), 500)
        assert server.chat("who ran ?", max_tokens=4)[0] == 200
        assert server.idle
    assert capsys.readouterr().err.count("ZeroDivisionError: a fault") == 2


def test_what_is_compressed_at_the_end(compressor):
    """Breaks when a text that comes while the server ends is waited for, and the process stays."""
    with running(compressor) as server:
        memories = server.service.memories
    with pytest.raises(ApiError, match="shutting down"):
        memories.compress(TEXT, Size(), "text")
    assert not memories._asked


def test_a_body_that_does_not_come(compressor):
    """Breaks when a client that sends half a request is waited for without limit."""
    with (
        running(compressor, timeout=0.5) as server,
        socket.create_connection(("127.0.0.1", server.port), timeout=30) as sent,
    ):
        head = f"POST {CHAT} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 50\r\n"
        sent.sendall(f"{head}Content-Type: application/json\r\n\r\n{{".encode())
        assert b" 408 " in sent.recv(1024).split(b"\r\n")[0]


def test_texts_that_wait_do_not_spoil_each_other(compressor):
    """Breaks when one text that fails takes those with it that are compressed together with it."""
    with running(compressor) as server:
        memories, seen = server.service.memories, []
        compress = memories._compress

        def some(alike, k):
            seen.append(len(alike))
            if any(len(work.context) == 14 for work in alike):
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
            return compress(alike, k)

        memories._compress = some
        futures = [concurrent.futures.Future() for _ in range(3)]
        contexts = [compressor.context_ids("cat " * n) for n in (9, 13, 11)]
        works = [Work(future, c, 4) for future, c in zip(futures, contexts, strict=True)]
        memories._compress_all(works, 4)
        assert seen == [3, 1, 1, 1] and isinstance(futures[1].exception(), ApiError)
        assert futures[1].exception().status == 503
        for i in (0, 2):
            want = compressor.compress("cat " * (9, 13, 11)[i])
            np.testing.assert_allclose(futures[i].result().slots, want.slots, atol=1e-5)


def test_a_text_that_cannot_be_compressed(compressor, capsys):
    """Breaks when a fault while compressing ends the thread, or is told to who comes later."""
    with running(compressor) as server:
        memories = server.service.memories
        compress = memories._compress
        memories._compress = lambda alike, k: 1 / 0
        assert is_error(server.post("/v1/memories", {"text": TEXT}), 500)
        memories._compress = compress
        assert server.post("/v1/memories", {"text": TEXT})[0] == 201
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_a_fault_of_the_servers_own(compressor, capsys, monkeypatch):
    """Breaks when a client is shown a stack trace, or nobody is."""

    def fail(*arguments):
        raise ZeroDivisionError("inside")

    with running(compressor) as server:
        monkeypatch.setattr(server.service.memories, "find", fail)
        reply = server.chat("who ran ?", memory="t")
        assert is_error(reply, 500) and "inside" not in json.dumps(reply[1])
    told = capsys.readouterr().err
    assert told.count("ZeroDivisionError: inside") == 1


def test_numbers_that_are_not_finite(tmp_path, tiny_base):
    """Breaks when NaN is answered with words, or reaches the next request."""
    compressor = load(write_adapter(tmp_path / "a", tiny_base))
    with running(compressor) as server:
        made = server.post("/v1/memories", {"text": TEXT})[1]
        kept = server.service.memories.find(made["id"])
        kept.memory.slots[:] = np.nan
        assert is_error(server.chat("who ran ?", memory=made["id"]), 500, "not finite")
        assert server.chat("who ran ?", max_tokens=2)[0] == 200


# --- Starting and ending ---


def test_nothing_is_taken_before_it_is_ready_and_while_it_ends(compressor):
    """Breaks when probes say ready too early or too late, or requests are lost at the end."""
    with running(compressor) as server:
        for status in ("warming_up", "draining"):
            server.service.status = status
            reply = server.ask("GET", "/readyz")
            assert reply[0] == 503 and reply[1] == {"status": status}
            assert server.ask("GET", "/healthz")[0] == 200
            assert is_error(server.chat("who ran ?"), 503)
            assert server.ask("GET", "/v1/models")[0] == 200
        server.service.status = "ready"
        assert server.ask("GET", "/readyz")[:2] == (200, {"status": "ready"})
        assert server.chat("who ran ?", max_tokens=1)[0] == 200


def test_a_port_in_use(tmp_path):
    """Breaks when a second server on a port loads a base first, or says nothing of use."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        with pytest.raises(UserError, match=f"--port {port} cannot be listened on"):
            serve.serve(Options(adapter=str(tmp_path / "none"), port=port, access_log="none"))
    with pytest.raises(UserError, match="none"):  # the port is free now: the adapter is not there
        serve.serve(Options(adapter=str(tmp_path / "none"), port=port, access_log="none"))


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({}, "--adapter"),
        ({"adapter": "a", "read_only": True}, "--read_only"),
        ({"adapter": "a", "port": 70000}, "--port"),
        ({"adapter": "a", "rows": 0}, "--rows"),
        ({"adapter": "a", "timeout": float("nan")}, "--timeout"),
        ({"adapter": "a", "max_body_mib": -1.0}, "--max_body_mib"),
        ({"adapter": "a", "cors": ("*",)}, "--cors"),
        ({"adapter": "a", "cors": ("https://a.example/",)}, "--cors"),
    ],
)
def test_bad_options(options, word):
    """Breaks when an option that cannot be is found out only by a client."""
    with pytest.raises(UserError, match=word):
        Options(**options)
