"""Measures a server under load: `icae bench serve`.

The same requests are sent by many clients and then one at a time, in rounds, so that what else the
machine does meets both. Every answer is compared with the one that was given alone. Figures are
medians over rounds with their range; ratios are taken within a round.
"""

import contextlib
import dataclasses
import math
import os
import pathlib
import signal
import sys
import tempfile
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from icae_jax import files
from icae_jax.compression.config import CompressionConfig
from icae_jax.errors import UserError
from icae_jax.inference.sampling import TIE
from icae_jax.performance import bench_serve_first, bench_serve_requests
from icae_jax.performance.bench import spread
from icae_jax.performance.bench_ask_ways import Subject
from icae_jax.performance.bench_serve_client import Answered, Client, Server, ask_all
from icae_jax.performance.bench_serve_requests import CHAT, Drawn

PERCENTILES = (50, 90, 99)
STEPS = 10  # of a soak, at whose ends memory is read
PREFIX = "icae-bench-serve-"  # of the documents' ids
PAGE = 100  # memories listed at a time


@dataclasses.dataclass(frozen=True)
class Options:
    """What is measured. Each field is a flag of the same name.

    adapter, base, base_dtype, method, k, ratio: see `bench_ask_ways.Subject`. rows, cache_mib: of
    the server that is started. url: of one that runs, in place of all these. store: folder of
    documents that are asked about; by default one of `documents` documents is made, and removed at
    the end. kv: whether that one also keeps what the decoder reads of a memory. requests, clients:
    how many. new_tokens: the most of an answer. rounds: of which a figure is the median. soak: that
    many other requests after the rounds, while memory is watched. first_token: in place of the
    rounds, how much sooner a question on stored documents of `context_tokens` tokens is answered
    than one on their text. seed: of all texts and lengths. save: file for the report.
    """

    adapter: str | None = None
    base: str | None = None
    base_dtype: str | None = None
    method: str = CompressionConfig.method
    k: int = 128
    ratio: float = 4.0
    rows: int = 16
    cache_mib: int = 64
    url: str | None = None
    store: str | None = None
    kv: bool = False
    documents: int = 32
    requests: int = 1000
    clients: int = 64
    new_tokens: int = 64
    rounds: int = 3
    soak: int = 0
    first_token: bool = False
    context_tokens: int = 2048
    seed: int = 0
    save: str | None = None

    def __post_init__(self):
        least = {name: 1 for name in ("k", "rows", "cache_mib", "documents", "requests", "clients")}
        least |= {"new_tokens": 1, "rounds": 1, "soak": 0, "context_tokens": 16}
        for name, smallest in least.items():
            if getattr(self, name) < smallest:
                raise UserError(
                    f"--{name} is {getattr(self, name)}; give a whole number of at least {smallest}"
                )
        if not 0 < self.ratio < math.inf:
            raise UserError(f"--ratio is {self.ratio}; it must be positive and finite")
        if self.url and (self.adapter or self.base or self.store):
            raise UserError(
                "--url names a server that runs, which has its own adapter, base and store; leave "
                "out --adapter, --base and --store"
            )
        if self.kv and (self.url or self.store):
            raise UserError(
                "--kv is of the store that is made; leave out --kv, or --url and --store"
            )
        if not (self.url or self.adapter or self.base or self.store):
            raise UserError("give --adapter, --store, --url, or --base for an untrained adapter")
        if self.save and pathlib.Path(self.save).is_dir():
            raise UserError(f"--save {self.save} is a folder; give another path")


def bench(options: Options) -> dict[str, Any]:
    """The report as plain values, which is also written to `options.save`.

    UserError on bad input. SIGTERM ends it with what it started.
    """
    with contextlib.ExitStack() as stack:
        if threading.current_thread() is threading.main_thread():
            before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
            stack.callback(signal.signal, signal.SIGTERM, before)
        server, url = _server(options, stack)
        client = stack.enter_context(contextlib.closing(Client(url)))
        model = client.call("GET", "/v1/models")["data"][0]
        report = {"bench": "serve", "cores": len(os.sched_getaffinity(0))}
        report |= {"rows": None if options.url else options.rows, "rounds": options.rounds}
        report |= {"kv": options.kv, "model": model["id"], **model["compressor"]}
        if options.first_token:
            sizes = options.context_tokens, options.rounds, options.seed
            report["first_token"] = bench_serve_first.measure(client, *sizes, _progress)
        else:
            ids = stack.enter_context(_documents(options, client))
            clients = [
                stack.enter_context(contextlib.closing(Client(url))) for _ in range(options.clients)
            ]
            load = Load(options, ids, client, clients, server.takes if server else dict)
            report |= load.measure()
    if options.save:
        files.write_json(options.save, report)
    return report


def _progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------- server


def _server(options, stack) -> tuple[Server | None, str]:
    """The server that is started, None for another's; and its URL."""
    if options.url:
        return None, options.url
    folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="icae_bench_")))
    arguments = []
    adapter, store = options.adapter, options.store or str(folder / "store")
    untrained = adapter is None and options.store is None
    if untrained or options.kv:
        names = ("adapter", "base", "base_dtype", "method", "k", "ratio", "seed")
        subject = Subject(**{name: getattr(options, name) for name in names})
        adapter = str(folder / "adapter") if untrained else adapter
        made = adapter if untrained else None, store if options.kv else None
        bench_serve_first.prepare(subject, *made)
    given = {"adapter": adapter, "base": options.base, "base_dtype": options.base_dtype}
    given |= {"store": store, "rows": options.rows}
    given |= {"cache_mib": options.cache_mib, "queue": max(256, options.clients)}
    for name, value in given.items():
        if value is not None:
            arguments += [f"--{name}", str(value)]
    if options.store is not None:
        arguments += ["--read_only"]
    _progress("starting the server")
    server = stack.enter_context(Server(arguments))
    return server, server.url


@contextlib.contextmanager
def _documents(options: Options, client: Any) -> Iterator[list[str]]:
    """Ids of memories to ask about: a store's own, or some that are made and removed again."""
    if options.store:
        page = client.call("GET", f"/v1/memories?limit={min(PAGE, options.documents)}")["data"]
        if not page:
            raise UserError(f"--store {options.store} holds no documents; give another one")
        yield [memory["id"] for memory in page]
        return
    _progress(f"{options.documents} documents")
    ids = []
    try:
        for number, text in enumerate(
            bench_serve_requests.documents(options.seed, options.documents)
        ):
            body = {"text": text, "id": f"{PREFIX}{number:04}"}
            ids.append(client.call("POST", "/v1/memories", body)["id"])
        yield ids
    finally:
        for memory_id in ids:
            client.call("DELETE", f"/v1/memories/{memory_id}")


def forget(client: Any) -> None:
    """Has the server forget the memories of contexts, so that they are compressed anew."""
    after = ""
    while True:
        page = client.call("GET", f"/v1/memories?prefix=mem-&limit={PAGE}{after}")
        for memory in page["data"]:
            if memory["kept"] == "cache":
                client.call("DELETE", f"/v1/memories/{memory['id']}")
        if not page["has_more"]:
            return
        after = f"&after={urllib.parse.quote(page['last_id'], safe='')}"


# ------------------------------------------------------------------------------------------ load


class Load:
    """Requests of many clients, against one at a time.

    Args:
        options: how many.
        ids: of stored memories.
        client: asks one at a time.
        clients: ask together.
        takes: what the server takes of the machine, see `Server.takes`; {} where that is unknown.
    """

    def __init__(
        self,
        options: Options,
        ids: Sequence[str],
        client: Any,
        clients: Sequence[Any],
        takes: Callable[[], dict[str, float]],
    ):
        self._options, self._ids, self._takes = options, list(ids), takes
        self._client, self._clients = client, list(clients)
        self._errors: dict[str, int] = {}
        self._drawn = self._draw(0, options.requests)

    def _draw(self, first: int, count: int) -> list[Drawn]:
        o = self._options
        numbers = range(first, first + count)
        return [bench_serve_requests.request(o.seed, i, self._ids, o.new_tokens) for i in numbers]

    def measure(self) -> dict[str, Any]:
        """The report's part about load."""
        began = time.perf_counter()
        _progress("first pass: compiling")
        together, _ = self._run(self._clients)
        _progress("first pass: one at a time")
        alone, _ = self._run([self._client])
        passes, warming = [together], time.perf_counter() - began
        before, rounds = self._takes(), []
        for turn in range(self._options.rounds):
            figures = {}
            for name, clients in (("together", self._clients), ("alone", [self._client])):
                about = f"{len(clients)} clients" if len(clients) > 1 else "one at a time"
                _progress(f"round {turn + 1} of {self._options.rounds}: {about}")
                answers, figures[name] = self._run(clients)
                passes.append(answers)
            rounds.append(figures)
        report = {
            "requests": len(self._drawn),
            "clients": len(self._clients),
            "kinds": {kind: sum(d.kind == kind for d in self._drawn) for kind in _kinds()},
            "streamed": sum(bool(d.body.get("stream")) for d in self._drawn),
            "first_pass_seconds": warming,
            **{name: _summary([r[name] for r in rounds]) for name in ("together", "alone")},
            "ratio": spread([r["alone"]["seconds"] / r["together"]["seconds"] for r in rounds]),
            "answers": self._compared(alone, passes),
        }
        after = self._takes()
        if after:
            report["server"] = {"before": before, "after": after}
        if self._options.soak:
            report["soak"] = self._soak()
        return report | {"errors": self._errors}

    def _run(self, clients) -> tuple[list[Answered], dict[str, Any]]:
        """All requests' answers, and their figures."""
        forget(self._client)
        before = self._takes()
        answers, seconds = ask_all(clients, [(d.path, d.body) for d in self._drawn])
        after = self._takes()
        self._count(answers)
        figures = figures_of(answers, seconds)
        if after:
            figures["cpu"] = (after["cpu"] - before["cpu"]) / len(answers)
        return answers, figures

    def _count(self, answers):
        for answer in answers:
            if answer.error:
                self._errors[answer.error] = self._errors.get(answer.error, 0) + 1

    def _compared(self, alone, passes) -> dict[str, Any]:
        """How many answers of all passes are those that were given alone."""
        counts, margins = {"equal": 0, "tied": 0, "different": 0}, []
        for answers in passes:
            for drawn, expected, answer in zip(self._drawn, alone, answers, strict=True):
                if expected.error or answer.error:
                    continue
                if (expected.text, expected.finish) == (answer.text, answer.finish):
                    counts["equal"] += 1
                    continue
                margins.append(margin_at_parting(self._client, drawn, answer.text))
                counts["tied" if margins[-1] < TIE else "different"] += 1
        return counts | {"largest_margin": max(margins, default=0.0)}

    def _soak(self) -> dict[str, Any]:
        """Other requests, all new, and what the server takes at every tenth of them."""
        count = self._options.soak
        points = [{"requests": 0, **self._takes()}]
        done, began = 0, time.perf_counter()
        for step in range(STEPS):
            until = count * (step + 1) // STEPS
            _progress(f"soak: {done} of {count} requests")
            drawn = self._draw(len(self._drawn) + done, until - done)
            answers, _ = ask_all(self._clients, [(d.path, d.body) for d in drawn])
            self._count(answers)
            done = until
            points.append({"requests": done, **self._takes()})
        soak = {"requests": count, "seconds": time.perf_counter() - began, "points": points}
        if "rss" in points[-1]:
            soak["growth"] = points[-1]["rss"] / points[STEPS // 2]["rss"] - 1
        return soak


def _kinds() -> list[str]:
    return list(bench_serve_requests.KINDS)


def figures_of(answers: Sequence[Answered], seconds: float) -> dict[str, Any]:
    """A pass's figures: `seconds`, `requests` and `tokens` per second, and percentiles of the
    seconds to the first text of a stream (`first`) and to the end of an answer (`whole`).
    """
    right = [answer for answer in answers if not answer.error]
    first = [answer.first for answer in right if answer.first is not None]
    return {
        "seconds": seconds,
        "requests": len(right) / seconds,
        "new_tokens": sum(answer.tokens for answer in right),
        "tokens": sum(answer.tokens for answer in right) / seconds,
        "first": percentiles(first),
        "whole": percentiles([answer.seconds for answer in right]),
    }


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Of `PERCENTILES`: the smallest value that so many of a hundred do not exceed; {} of none."""
    ordered = sorted(values)
    if not ordered:
        return {}
    return {f"p{p}": ordered[math.ceil(len(ordered) * p / 100) - 1] for p in PERCENTILES}


def _summary(passes):
    """Each figure's spread over the rounds."""
    if isinstance(passes[0], dict):
        return {key: _summary([one[key] for one in passes if key in one]) for key in passes[0]}
    return spread(passes)


def margin_at_parting(client: Any, drawn: Drawn, text: str) -> float:
    """How far apart the two best tokens lie where another text parts from the one that is given
    alone; nats. Infinity where that cannot be told, as where one of them ends there.
    """
    path, body = drawn.path, {k: v for k, v in drawn.body.items() if not k.startswith("stream")}
    chat = path == CHAT
    body |= {"logprobs": True, "top_logprobs": 2} if chat else {"logprobs": 2}
    choice = client.call("POST", path, body)["choices"][0]
    # A token alone may be shown without the space before it.
    read, text = "", "".join(text.split())
    for token, best in _tokens(choice["logprobs"], chat):
        read += "".join(token.split())
        if not text.startswith(read):
            return best[0] - best[1] if len(best) > 1 else math.inf
    return math.inf


def _tokens(log_probs, chat):
    """(text, log-probabilities of the likeliest tokens, falling) of each token."""
    if chat:
        for token in log_probs["content"]:
            yield token["token"], [other["logprob"] for other in token["top_logprobs"]]
        return
    for token, others in zip(log_probs["tokens"], log_probs["top_logprobs"], strict=True):
        yield token, sorted(others.values(), reverse=True)
