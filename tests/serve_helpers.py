"""Servers of tests: the tiny base with a random adapter, on a port of this machine, in a thread."""

import contextlib
import http.client
import json
import socket
import threading
import time

import openai
import uvicorn
from conftest import TINY, random_trained

from icae_jax.compression.config import CompressionConfig
from icae_jax.inference import loading
from icae_jax.interop.adapters import folder as adapters
from icae_jax.interop.hub import base as bases
from icae_jax.models.lora import LoraConfig
from icae_jax.objectives import targets
from icae_jax.server import api
from icae_jax.server.documents import Documents
from icae_jax.server.options import Options
from icae_jax.server.service import Service

WORDS = [
    "the",
    "cat",
    "dog",
    "bird",
    "saw",
    "ran",
    "ate",
    "in",
    "on",
    "red",
    "blue",
    "big",
    "small",
    "old",
    "new",
    "king",
    "milk",
    "sea",
    "sun",
]
# The template has a head, so that what is read behind it and behind none differ.
TEMPLATE = "mistral"


def write_adapter(path, base_path, **compression):
    """Writes a random adapter for the tiny base; returns the path."""
    base = bases.load_base(base_path)
    config = CompressionConfig(**{"k": 4, "rate": 4} | compression)
    template = targets.make_template(TEMPLATE, base.tokenizer)
    trained = random_trained(TINY, config.k)
    adapter = adapters.Adapter(
        config, LoraConfig(4), template, trained, str(base_path), base.fingerprint
    )
    adapters.save_adapter(path, adapter)
    return path


def load(path):
    """The compressor of an adapter's folder."""
    return loading.load(path)


class Running:
    """A server that runs: its service, its port, and ways to ask it."""

    def __init__(self, service, port, token=""):
        self.service, self.port, self.token = service, port, token
        self.url = f"http://127.0.0.1:{port}"

    @property
    def client(self):
        """OpenAI's own, without retries."""
        key = self.token or "none"
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)

    def ask(self, method, path, body=None, headers=(), raw=None):
        """(status, JSON or text, headers) of a request. body: as JSON; raw: as it is."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        sent = {"Content-Type": "application/json"} if body is not None or raw is not None else {}
        if self.token:
            sent["Authorization"] = f"Bearer {self.token}"
        data = raw if raw is not None else None if body is None else json.dumps(body)
        with contextlib.closing(connection):
            connection.request(method, path, data, sent | dict(headers))
            reply = connection.getresponse()
            text = reply.read()
            kind = reply.headers.get("content-type", "")
            value = json.loads(text) if kind.startswith("application/json") else text.decode()
            return reply.status, value, reply.headers

    def post(self, path, body=None, **how):
        """(status, JSON) of a POST."""
        return self.ask("POST", path, {} if body is None and "raw" not in how else body, **how)[:2]

    def chat(self, text, **fields):
        """(status, JSON) of a chat of one message."""
        message = {"role": "user", "content": text}
        return self.post("/v1/chat/completions", {"messages": [message]} | fields)

    @property
    def idle(self):
        """Whether nothing waits or runs."""
        scheduler = self.service.scheduler
        return not scheduler.waiting and not scheduler.running

    def wait_idle(self, seconds=20):
        """Waits until nothing waits or runs; whether that came."""
        return wait_for(lambda: self.idle, seconds)


def wait_for(condition, seconds=20):
    """Waits until a condition holds; whether it did."""
    ends = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > ends:
            return False
        time.sleep(0.01)
    return True


@contextlib.contextmanager
def running(compressor, store=None, tokens=(), log=None, read_only=False, prepare=None, **options):
    """A server of a compressor, `Running`; ended behind the block.

    prepare: called with the service before it starts.
    """
    options = Options(
        **{"adapter": "a", "rows": 4, "read_only": read_only, "store": store} | options
    )
    documents = None if store is None else Documents(compressor, store, read_only)
    service = Service(compressor, options, documents)
    if prepare is not None:
        prepare(service)
    ready = threading.Event()
    app = api.make_app(service, options, tuple(tokens), log, ready.set)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        config = uvicorn.Config(app, log_level="error", lifespan="on", ws="none")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        try:
            assert wait_for(lambda: ready.is_set() or not thread.is_alive(), 120)
            assert ready.is_set()
            yield Running(service, listening.getsockname()[1], tokens[0] if tokens else "")
        finally:
            server.should_exit = True
            thread.join(60)
            assert not thread.is_alive()
