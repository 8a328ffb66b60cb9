"""`icae bench serve`: what is asked, what is made of the answers, and the whole of it."""

import http.server
import io
import itertools
import json
import math
import threading
import time
import types

import pytest

from icae_jax.cli import main as cli
from icae_jax.errors import UserError
from icae_jax.performance import (
    bench_serve,
    bench_serve_client,
    bench_serve_first,
    bench_serve_report,
    bench_serve_requests,
)
from icae_jax.performance.bench_serve import Options
from icae_jax.performance.bench_serve_client import Answered, Client
from icae_jax.performance.bench_serve_requests import CHAT, COMPLETIONS, Drawn
from icae_jax.server import schema

IDS = ["a", "b", "c"]


# --- What is asked ---


def test_requests_are_mixed_and_a_function_of_the_seed():
    """Breaks when a kind or length is never asked, or two runs ask different things."""
    drawn = [bench_serve_requests.request(0, i, IDS, 32) for i in range(300)]
    assert drawn == [bench_serve_requests.request(0, i, IDS, 32) for i in range(300)]
    assert drawn[0] != bench_serve_requests.request(1, 0, IDS, 32)
    assert {d.kind for d in drawn} == set(bench_serve_requests.KINDS)
    assert {d.path for d in drawn} == {CHAT, COMPLETIONS}
    assert {bool(d.body.get("stream")) for d in drawn} == {True, False}
    lengths = {d.body["max_tokens"] for d in drawn}
    assert min(lengths) == 4 and max(lengths) == 32 and len(lengths) > 20
    turns = {len(d.body["messages"]) for d in drawn if d.path == CHAT}
    assert turns == {1, 3, 5}
    texts = [d.body["context"] for d in drawn if d.kind == "context"]
    assert len(set(texts)) == len(texts)  # compressed now, not found
    for d in drawn:
        assert ("memory" in d.body) == (d.kind in ("memory", "joined"))
        kind = schema.ChatRequest if d.path == CHAT else schema.CompletionRequest
        kind.model_validate(d.body)
    without = [bench_serve_requests.request(0, i, [], 32).kind for i in range(100)]
    assert {"memory", "joined"}.isdisjoint(without)
    documents = bench_serve_requests.documents(0, 5)
    assert documents[:3] == bench_serve_requests.documents(0, 3) and len(set(documents)) == 5


# --- A client ---


class Fake(http.server.BaseHTTPRequestHandler):
    """A server that answers as its path says."""

    protocol_version = "HTTP/1.1"
    asked: list = []  # noqa: RUF012 (one for all)

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append((self.path, body, self.headers.get("Authorization")))
        self.connections.add(self.client_address)
        if self.path == "/gone":
            self.close_connection = True
            return
        status, content = self.answers[self.path]
        kind = "text/event-stream" if body.get("stream") else "application/json"
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        time.sleep(self.waits)
        self.wfile.write(content)

    def log_message(self, *_):
        pass


def events(*data):
    return "".join(f"data: {d if isinstance(d, str) else json.dumps(d)}\n\n" for d in data).encode()


def chunk(content, finish=None):
    return {"choices": [{"delta": {"content": content}, "finish_reason": finish}]}


@pytest.fixture
def fake():
    """A running server with its answers, and its URL."""
    usage = {"completion_tokens": 2}
    ended = {"choices": [], "usage": usage}
    choice = {"message": {"content": "a b"}, "finish_reason": "stop"}
    error = {"error": {"message": "the queue is full", "type": "x", "code": "queue_full"}}
    answers = {
        "/whole": (200, json.dumps({"choices": [choice], "usage": usage}).encode()),
        "/stream": (200, b": ping\n\n"
                    + events(chunk(""), chunk("a "), chunk("b", "stop"), ended, "[DONE]")),
        "/cut": (200, events(chunk("a "))),
        "/fault": (200, events(chunk("a "), error)),
        "/full": (429, json.dumps(error).encode()),
        "/odd": (200, b"[]"),
    }  # fmt: skip
    fields = {"answers": answers, "asked": [], "connections": set(), "waits": 0.0}
    handler = type("Handler", (Fake,), fields)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    server.handler, server.url = handler, f"http://127.0.0.1:{server.server_port}"
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_client_reads_answers_whole_and_streamed(fake, monkeypatch):
    """Breaks when a stream's text, usage or end is lost, or an empty piece counts as the first."""
    monkeypatch.setenv("ICAE_SERVE_TOKENS", "first,second")
    client = Client(fake.url)
    whole, streamed = client.ask("/whole", {}), client.ask("/stream", {"stream": True})
    assert whole.text == streamed.text == "a b" and not whole.error and not streamed.error
    assert whole.tokens == streamed.tokens == 2 and whole.finish == streamed.finish == "stop"
    assert whole.first is None and 0 < streamed.first <= streamed.seconds
    assert fake.handler.asked[0] == ("/whole", {}, "Bearer first")
    assert len(fake.handler.connections) == 1  # kept
    client.close()


@pytest.mark.parametrize(
    ("pieces", "first"),
    [
        ([chunk(""), chunk(""), chunk("a"), chunk("", "stop")], 3),
        ([chunk(""), chunk("", "stop")], 2),  # an answer without a text
        ([chunk(""), {"choices": [chunk("")["choices"][0] | {"logprobs": {"content": []}}]}], 2),
    ],
)
def test_the_first_token_is_no_empty_piece(monkeypatch, pieces, first):
    """Breaks when the role, which is sent before anything is decoded, counts as the first token."""
    lines = events(*pieces, "[DONE]").splitlines(keepends=True)
    reading = io.BytesIO(b"".join(line for line in lines if line.strip()))
    read = [0]

    def readline():
        read[0] += 1
        return reading.readline()

    monkeypatch.setattr(bench_serve_client.time, "perf_counter", lambda: read[0])
    response = types.SimpleNamespace(readline=readline)
    streamed = bench_serve_client._streamed.__wrapped__(response, 0)
    assert streamed.first == first and not streamed.error


@pytest.mark.parametrize(
    "path, stream, said",
    [("/full", False, "429 queue_full"), ("/cut", True, "no end"), ("/odd", False, "not an"),
     ("/fault", True, "in the stream: the queue is full"), ("/gone", False, "broke")],
)  # fmt: skip
def test_what_is_no_answer_is_an_error(fake, path, stream, said):
    """Breaks when a failure counts as an answer, or ends the client."""
    client = Client(fake.url)
    assert said in client.ask(path, {"stream": stream}).error
    assert client.ask("/whole", {}).text == "a b"
    client.close()


def test_clients_ask_at_once_and_answers_keep_their_order(fake):
    """Breaks when requests wait for each other, or an answer is told as another's."""
    clients = [Client(fake.url) for _ in range(4)]
    paths = ["/whole", "/full"] * 4
    counts = []
    fake.handler.waits = 0.1
    answers, seconds = bench_serve_client.ask_all(clients, [(p, {}) for p in paths], counts.append)
    assert [bool(a.error) for a in answers] == [False, True] * 4
    assert seconds < 0.6 and sorted(counts) == list(range(1, 9))
    for client in clients:
        client.close()


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x", "http://"])
def test_a_url_that_is_none_is_refused(url):
    """Breaks when a slip ends in a traceback."""
    with pytest.raises(UserError, match="--url"):
        Client(url)


# --- What is made of the answers ---


def test_percentiles_are_of_values_that_were_measured():
    """Breaks when the worst of a hundred is told as the 99th, or the order decides."""
    values = list(range(100, 0, -1))
    assert bench_serve.percentiles(values) == {"p50": 50, "p90": 90, "p99": 99}
    assert bench_serve.percentiles([3.0]) == {"p50": 3.0, "p90": 3.0, "p99": 3.0}
    assert bench_serve.percentiles([]) == {}


def test_the_figures_of_a_pass():
    """Breaks when errors count as answers, or what was not streamed has a first token."""
    usage = {"completion_tokens": 5}
    answers = [Answered("a", usage, None, 2.0, "stop"), Answered("b", usage, 0.5, 1.0, "stop"),
               Answered(error="429")]  # fmt: skip
    got = bench_serve.figures_of(answers, 4.0)
    assert got["requests"] == 0.5 and got["tokens"] == 2.5 and got["new_tokens"] == 10
    assert got["first"]["p99"] == 0.5 and got["whole"] == {"p50": 1.0, "p90": 2.0, "p99": 2.0}


class Explains:
    """A client that answers with log-probabilities."""

    def __init__(self, *tokens):
        self.tokens, self.bodies = tokens, []

    def call(self, method, path, body):
        self.bodies.append(body)
        if path == CHAT:
            rows = [{"token": t, "top_logprobs": [{"logprob": x} for x in best]}
                    for t, best in self.tokens]  # fmt: skip
            return {"choices": [{"logprobs": {"content": rows}}]}
        tops = [{str(i): x for i, x in enumerate(best)} for _, best in self.tokens]
        rows = {"tokens": [t for t, _ in self.tokens], "top_logprobs": tops}
        return {"choices": [{"logprobs": rows}]}


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_a_margin_is_that_of_the_token_where_texts_part(path):
    """Breaks when another token's margin is taken, or a space that a token alone lacks counts."""
    drawn = Drawn("nothing", path, {"stream": True, "stream_options": {}, "max_tokens": 3})
    client = Explains(("the", [-0.1, -3.0]), ("cat", [-0.5, -0.50005]), ("sat", [-0.1, -2.0]))
    margin = bench_serve.margin_at_parting(client, drawn, "the dog sat")
    assert margin == pytest.approx(5e-5)
    (body,) = client.bodies
    assert "stream" not in body and "stream_options" not in body and body["max_tokens"] == 3
    assert bench_serve.margin_at_parting(client, drawn, "the cat ran") == pytest.approx(1.9)
    assert bench_serve.margin_at_parting(client, drawn, "the cat sat on") == math.inf


class Scripted:
    """A server whose answers depend on how many ask at once."""

    def __init__(self, alone, together):
        self.alone, self.together, self.log = alone, together, []

    def ask_all(self, clients, requests, done=None):
        many = len(clients) > 1
        self.log.append(len(clients))
        texts = self.together if many else self.alone
        answers = [
            Answered(error="429") if t is None else Answered(t, {"completion_tokens": 1}, 0.1, 1)
            for t, _ in zip(itertools.cycle(texts), requests, strict=False)
        ]
        return answers, (1.0 if many else 4.0) * (1 + self.log.count(len(clients)))


@pytest.fixture
def load(monkeypatch):
    """`load(server, margins, **options)`: a load whose server is scripted."""
    monkeypatch.setattr(bench_serve, "forget", lambda client: None)

    def load(server, margins=(), takes=dict, **options):
        margins = iter(margins)
        monkeypatch.setattr(bench_serve, "ask_all", server.ask_all)
        monkeypatch.setattr(bench_serve, "margin_at_parting", lambda *_: next(margins))
        made = Options(url="http://x", requests=3, clients=2, rounds=2, **options)
        return bench_serve.Load(made, IDS, "one", ["one", "two"], takes)

    return load


def test_all_passes_take_turns_and_are_compared_with_what_was_given_alone(load):
    """Breaks when the pass that compiles is a round, a pass is not compared, a difference counts as
    a tie, a ratio is upside down, or an error is lost."""
    server = Scripted(["a", "b", "c"], ["a", "x", None])
    report = load(server, [1e-5, 0.5, 0.0]).measure()
    assert server.log == [2, 1, 2, 1, 2, 1]
    # Together, in three passes: one equal, one other, one error; alone, in two: all equal.
    assert report["answers"] == {"equal": 9, "tied": 2, "different": 1, "largest_margin": 0.5}
    assert report["errors"] == {"429": 3}
    assert report["ratio"] == {"median": 4.0, "min": 4.0, "max": 4.0}
    assert report["together"]["seconds"] == {"median": 3.5, "min": 3.0, "max": 4.0}
    assert report["together"]["first"]["p50"]["median"] == 0.1
    assert "soak" not in report and "server" not in report
    assert sum(report["kinds"].values()) == 3
    described = {
        "model": "m",
        "rows": 16,
        "cores": 2,
        "rounds": 2,
        "method": "icae",
        "base": "b",
        "kv": False,
    }
    described |= {"default_memory_tokens_per_segment": 4, "segment_tokens": 16}
    text = bench_serve_report.text(described | report)
    assert "9 equal to the one given alone, 2 part at a tie, 1 elsewhere" in text
    assert "4 (4 to 4) times the throughput" in text and "3 x 429" in text


def test_a_soak_asks_anew_and_tells_what_the_server_takes(load):
    """Breaks when a soak asks what was asked before, leaves requests out, or hides growth."""
    asked = []
    taken = itertools.count()

    def takes():
        number = next(taken)
        return {"rss": (100 + number) << 20, "maps": 5, "threads": 6, "files": 7, "cpu": number}

    server = Scripted(["a"], ["a"])
    made = load(server, takes=takes, soak=25)
    whole = server.ask_all
    bench_serve.ask_all = lambda c, r, done=None: (asked.append(r), whole(c, r))[1]
    report = made.measure()
    soak = report["soak"]
    assert [p["requests"] for p in soak["points"]] == [0, 2, 5, 7, 10, 12, 15, 17, 20, 22, 25]
    new = [json.dumps(r) for r in itertools.chain(*asked[6:])]
    assert len(set(new)) == 25 and not set(new) & {json.dumps(r) for r in asked[0]}
    rss = [p["rss"] for p in soak["points"]]
    assert soak["growth"] == pytest.approx(rss[-1] / rss[5] - 1) and soak["growth"] > 0
    assert report["together"]["cpu"]["median"] == pytest.approx(1 / 3)
    described = {"model": "m", "rows": None, "cores": 2, "rounds": 2, "method": "icae"}
    described |= {
        "base": "b",
        "kv": False,
        "default_memory_tokens_per_segment": 4,
        "segment_tokens": 16,
    }
    assert "25 other requests" in bench_serve_report.text(described | report)


def test_contexts_are_forgotten_between_passes():
    """Breaks when a context of one pass is at hand in the next, or a stored memory is removed."""
    kept = {f"mem-{i}": "store" if i == 7 else "cache" for i in range(250)}

    class Listing:
        def call(self, method, path, body=None):
            if method == "DELETE":
                assert kept.pop(path.rpartition("/")[2]) == "cache"
                return None
            _, _, after = path.partition("&after=")
            ids = [i for i in sorted(kept) if i > after]
            data = [{"id": i, "kept": kept[i]} for i in ids[:100]]
            last = data[-1]["id"] if data else None
            return {"data": data, "has_more": len(ids) > 100, "last_id": last}

    bench_serve.forget(Listing())
    assert kept == {"mem-7": "store"}


# --- First tokens ---


class Documents:
    """A client of a server that reads a word as two tokens."""

    def __init__(self):
        self.stored, self.log, self.removed = {}, [], []

    def call(self, method, path, body=None):
        if method == "DELETE":
            self.removed.append(path.rpartition("/")[2])
            return None
        if body.get("keep", True):
            self.stored[body["id"]] = body["text"]
        tokens = 2 * len(body["text"].split())
        return {"id": body.get("id"), "context_tokens": tokens, "memory_tokens": tokens // 4}

    def ask(self, path, body):
        full = "context" in body
        way = "full" if full else "again" if body["memory"] in [m for m, _ in self.log] else "first"
        self.log.append((body.get("memory"), body))
        if full:
            assert body["context"] == list(self.stored.values())[-1] and body["compress"] is False
        first = {"full": 10.0, "first": 2.0, "again": 1.0}[way] * len(self.stored)
        return Answered("x", {"prompt_tokens": 5}, first, 11.0, "stop")


def test_first_tokens_are_of_one_document_each_round():
    """Breaks when a stored document's first question is not the first, or ways ask differently."""
    client = Documents()
    got = bench_serve_first.measure(client, 200, 3, 0)
    assert got["context_tokens"] == [200, 200] and got["memory_tokens"] == 50
    assert len(set(client.stored.values())) == 4 and sorted(client.stored) == client.removed
    assert got["sooner"]["stored"]["median"] == 5.0 and got["sooner"]["kept"]["median"] == 10.0
    assert got["ways"]["full"] == {"median": 30.0, "min": 20.0, "max": 40.0}  # the first compiled
    asked = [body["messages"] for _, body in client.log]
    assert asked[0] == asked[2] and asked[0] != asked[1]
    described = {
        "model": "m",
        "rows": 16,
        "cores": 2,
        "rounds": 3,
        "method": "icae",
        "base": "b",
        "kv": False,
    }
    described |= {"default_memory_tokens_per_segment": 4, "segment_tokens": 16}
    text = bench_serve_report.text(described | {"first_token": got})
    assert "documents of 200 tokens" in text and "stored memory, next question" in text


def test_what_a_server_is_to_open_is_made(tiny_base, tmp_path):
    """Breaks when what is saved is no adapter of that base, its store is another's or keeps no K/V,
    or a refusal is a traceback."""
    from icae_jax.inference import loading
    from icae_jax.performance.bench_ask_ways import Subject

    paths = str(tmp_path / "a"), str(tmp_path / "s")
    bench_serve_first.prepare(Subject(base=str(tiny_base), k=4), *paths)
    compressor, store = loading.load_with_store(paths[1], paths[0])
    assert compressor.config.k == 4 and store.info.kv == compressor.adapter.template.name
    store.close()
    with pytest.raises(UserError, match="nowhere"):
        bench_serve_first.prepare(Subject(base=str(tmp_path / "nowhere")), "b")


# --- Input ---


@pytest.mark.parametrize(
    "given, said",
    [
        ({}, "--adapter"),
        ({"url": "http://x", "base": "b"}, "--url"),
        ({"url": "http://x", "kv": True}, "--kv"),
        ({"adapter": "a", "clients": 0}, "--clients is 0"),
        ({"adapter": "a", "soak": -1}, "--soak is -1"),
        ({"adapter": "a", "ratio": math.nan}, "--ratio"),
        ({"adapter": "a", "save": "/"}, "--save"),
    ],
)
def test_bad_input_is_named(given, said):
    """Breaks when a flag that cannot be is noticed after the server was started."""
    with pytest.raises(UserError, match=said):
        Options(**given)


def test_a_server_that_refuses_its_arguments_says_so(tmp_path):
    """Breaks when the server's own message is lost, or a refusal is a traceback."""
    with pytest.raises(UserError, match="cannot be listened on"):
        bench_serve_client.Server(["--adapter", str(tmp_path), "--host", "192.0.2.1",
                                   "--token_file", str(_token(tmp_path))])  # fmt: skip


def _token(folder):
    path = folder / "tokens"
    path.write_text("0123456789abcdef\n")
    return path


# --- The whole ---


@pytest.mark.nightly
def test_the_whole_of_it(tiny_base, tmp_path, capsys):
    """Breaks when the server under load gives another answer than alone, fails a request, or the
    benchmark does not end what it started."""
    path = tmp_path / "report.json"
    command = ["bench", "serve", "--base", str(tiny_base), "--k", "4", "--requests", "60"]
    command += ["--clients", "8", "--rows", "4", "--rounds", "1", "--documents", "4"]
    assert cli.main([*command, "--soak", "20", "--save", str(path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads(path.read_text())
    assert report["errors"] == {}
    answers = report["answers"]
    assert answers["different"] == 0 and answers["equal"] + answers["tied"] == 3 * 60
    assert report["soak"]["points"][-1]["requests"] == 20
    assert report["server"]["after"]["rss"] > 0 and report["ratio"]["median"] > 0

    first = ["--first_token", "--kv", "--context_tokens", "64", "--rounds", "2", "--json"]
    assert cli.main([*command[:6], *first]) == 0
    report = json.loads(capsys.readouterr().out)["first_token"]
    assert min(report["context_tokens"]) >= 56 and set(report["sooner"]) == {"stored", "kept"}
