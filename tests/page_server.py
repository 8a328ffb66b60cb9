"""A stand-in for `icae serve` that the page's tests can rule: answers, odd chunks, slow streams,
errors, a token. It speaks the server's HTTP interface and serves the page's own files.
"""

import contextlib
import http.server
import json
import pathlib
import threading
import time
import urllib.parse

PAGE = pathlib.Path(__file__).resolve().parents[1] / "icae_jax" / "server" / "page"
TYPES = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}
POLICY = "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
SEGMENT = 46  # tokens of text that one segment takes


class Stand:
    """What the server holds and does.

    icae: the model's facts. token: what it asks for, or None. documents: `{id: memory}` of the
    store. answers: `{way: text}` with the ways "memory", "full" and "none". restored: the text of a
    memory from its original. errors: `{way or "restore" or "METHOD path": (status, message)}`.
    broken: ways whose stream ends in the middle. chunk: bytes of a stream that are sent at once, 0
    for all. pause: seconds between chunks. requests: `(method, path, body)` of all that came;
    closed: ways whose client went away.
    """

    def __init__(self):
        self.compressor = {
            "method": "icae", "base": "tiny_base", "template": "plain", "context_positions": 512,
            "segment_tokens": SEGMENT, "memory_tokens_per_segment": [2, 11],
            "default_memory_tokens_per_segment": 11, "max_context_tokens": 100_000,
            "documents": False, "writable": False,
        }  # fmt: skip
        self.token, self.documents, self.texts, self.requests = None, {}, {}, []
        self.answers = {"memory": "a ferret", "full": "a ferret, I think", "none": "a dog"}
        self.errors, self.broken, self.closed = {}, set(), []
        self.chunk, self.pause, self.finish = 0, 0.0, "stop"

    def restored(self, text):
        """What the memory of a text gives back."""
        return text

    def with_store(self, count, writable=True):
        """Opens a store of documents "doc-000", …"""
        self.compressor |= {"documents": True, "writable": writable}
        for i in range(count):
            self.write(f"doc-{i:03}", "the cat sat " * (i + 1), 11, "store")

    def write(self, name, text, k, kept):
        """A memory object; one of the store is listed."""
        tokens = max(len(text.split()), 1)
        memory_tokens = k * -(-tokens // SEGMENT)
        memory = {
            "object": "memory", "id": name, "context_tokens": tokens, "kept": kept, "metadata": {},
            "memory_tokens": memory_tokens, "memory_tokens_per_segment": k,
            "ratio": tokens / memory_tokens, "bytes": 640 * memory_tokens,
        }  # fmt: skip
        self.texts[name] = text
        if kept == "store":
            self.documents[name] = memory
        return memory

    def bodies(self, path):
        """The bodies of the POST requests for a path."""
        return [body for method, at, body in self.requests if (method, at) == ("POST", path)]


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_):
        pass

    def send(self, status, body, kind="application/json", **headers):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        fixed = {"Content-Type": kind, "Content-Length": str(len(data))}
        fixed["Content-Security-Policy"] = POLICY
        for name, value in (fixed | named).items():
            self.send_header(name, value)
        self.send_header(
            "Connection", "close"
        )  # so that nothing is answered after the server's end
        self.end_headers()
        self.close_connection = True
        self.wfile.write(data)

    def refuse(self, status, message):
        error = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
        more = {"Retry_After": "7"} if status == 429 else {}
        self.send(status, {"error": error}, **more)

    def stream(self, chunks, way):
        """Server-sent events, cut as the stand says, also within a character and a line's end."""
        stand = self.server.stand
        events = [f"data: {json.dumps(chunk, ensure_ascii=False)}\r\n\r\n" for chunk in chunks]
        events = [": a comment\n\n", *events, "data: [DONE]\n\n"]
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        data = "".join(events).encode()
        data = data[: len(data) // 2] if way in stand.broken else data
        size = stand.chunk or len(data)
        try:
            for start in range(0, len(data), size):
                self.wfile.write(data[start : start + size])
                self.wfile.flush()
                time.sleep(stand.pause)
        except OSError:
            stand.closed.append(way)

    def handle_any(self):
        stand = self.server.stand
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = json.loads(raw) if raw else None
        url = urllib.parse.urlsplit(self.path)
        path = url.path
        if self.command == "GET" and not path.startswith("/v1/"):
            self.asset(path)
            return
        stand.requests.append((self.command, self.path, body))
        if stand.token and self.headers.get("Authorization") != f"Bearer {stand.token}":
            self.refuse(401, "a token is needed")
        elif (key := f"{self.command} {path}") in stand.errors:
            self.refuse(*stand.errors[key])
        elif path == "/v1/models":
            model = {"id": "tiny", "object": "model", "created": 0, "owned_by": "icae_jax"}
            self.send(200, {"object": "list", "data": [model | {"compressor": stand.compressor}]})
        elif path == "/v1/chat/completions":
            self.chat(body)
        elif path == "/v1/memories" and self.command == "POST":
            self.compress(body)
        elif path == "/v1/memories":
            self.list(dict(urllib.parse.parse_qsl(url.query)))
        else:
            name, _, verb = path.removeprefix("/v1/memories/").partition("/")
            self.one(urllib.parse.unquote(name), verb)

    do_GET = do_POST = do_DELETE = handle_any

    def asset(self, path):
        name = "index.html" if path == "/" else path.removeprefix("/page/")
        file = PAGE / name
        if "/" in name or file.suffix not in TYPES or not file.is_file():
            self.refuse(404, "not here")
            return
        self.send(200, file.read_bytes(), TYPES[file.suffix])

    def compress(self, body):
        stand, known = self.server.stand, self.server.stand.compressor["memory_tokens_per_segment"]
        k = stand.compressor["default_memory_tokens_per_segment"]
        if "ratio" in body:
            wanted = SEGMENT / body["ratio"]
            k = min(known, key=lambda n: abs(n - wanted)) if known else max(1, round(wanted))
        name = body.get("id") or f"mem-{len(stand.texts)}"
        time.sleep(stand.pause)
        self.send(201, stand.write(name, body["text"], k, "store" if body["keep"] else "cache"))

    def list(self, query):
        stand, limit = self.server.stand, int(query["limit"])
        if "after" in query and query["after"] not in stand.documents:
            self.refuse(400, "after is no document")
            return
        names = sorted(n for n in stand.documents if n.startswith(query.get("prefix", "")))
        names = [n for n in names if n > query.get("after", "")]
        data = [stand.documents[n] for n in names[:limit]]
        self.send(200, {"object": "list", "data": data, "has_more": len(names) > limit})

    def one(self, name, verb):
        stand = self.server.stand
        if name not in stand.texts:
            self.refuse(404, f"there is no memory {name}")
        elif self.command == "DELETE":
            stand.documents.pop(name, None)
            del stand.texts[name]
            self.send(200, {"id": name, "object": "memory.deleted", "deleted": True})
        elif verb == "restore" and "restore" in stand.errors:
            self.refuse(*stand.errors["restore"])
        elif verb == "restore":
            text = stand.restored(stand.texts[name])
            parts = (
                [text[i : i + 7] for i in range(0, len(text), 7)] if len(text) < 9999 else [text]
            )
            chunks = [{"id": name, "delta": part, "finish_reason": None} for part in parts]
            end = {"id": name, "delta": "", "finish_reason": stand.finish}
            self.stream([*chunks, end], "restore")
        else:
            self.send(200, stand.documents[name])

    def chat(self, body):
        stand = self.server.stand
        way = "memory" if "memory" in body else "full" if "context" in body else "none"
        if way in stand.errors:
            self.refuse(*stand.errors[way])
            return
        text, chunk = stand.answers[way], {"object": "chat.completion.chunk"}
        deltas = [{"role": "assistant", "content": ""}]
        deltas += [{"content": text[i : i + 3]} for i in range(0, len(text), 3)]
        chunks = [chunk | {"choices": [{"index": 0, "delta": delta}]} for delta in deltas]
        end = {"index": 0, "delta": {}, "finish_reason": stand.finish}
        usage = {"prompt_tokens": 24, "completion_tokens": 3, "total_tokens": 27}
        usage |= {"memory_tokens": 11, "context_tokens": 46} if way == "memory" else {}
        last = chunk | {"choices": [], "usage": usage}
        self.stream([*chunks, chunk | {"choices": [end]}, last], way)


@contextlib.contextmanager
def serving(stand):
    """The address at which the stand answers, on the loopback interface."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.stand, server.daemon_threads = stand, True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
