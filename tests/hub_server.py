"""A local stand-in for the model hub, for the hub's own client: repositories, commits, files by
revision.
"""

import base64
import contextlib
import hashlib
import http.server
import json
import re
import threading
import urllib.parse

from huggingface_hub import constants, hf_api


class Hub:
    """A stand-in for the hub. repositories: `{id: [commit, …]}`, each `(sha, {path: bytes})`, the
    last one main. private, gated, forbidden: ids. requests: every `METHOD path` received. status:
    `(method, part of the path, status)` that is answered instead.
    """

    def __init__(self):
        self.repositories, self.private, self.gated, self.forbidden = {}, set(), set(), set()
        self.requests, self.status, self.tokens = [], None, {"hf_good"}

    def commit(self, name, files):
        """Adds a commit that holds these files, by path; returns its id."""
        before = self.repositories.setdefault(name, [])
        sha = hashlib.sha1(f"{name}{len(before)}{sorted(files)}".encode()).hexdigest()
        before.append((sha, dict(files)))
        return sha

    def upload(self, name, folder, only=None):
        """Adds a commit with the files of a local folder; returns its id."""
        paths = [p for p in sorted(folder.rglob("*")) if p.is_file()]
        named = {p.relative_to(folder).as_posix(): p.read_bytes() for p in paths}
        return self.commit(name, {k: v for k, v in named.items() if only is None or k in only})

    def find(self, name, revision):
        """(sha, files) of a revision, or None."""
        commits = self.repositories.get(name, [])
        if revision == "main":
            return commits[-1] if commits else None
        return next((c for c in commits if c[0] == revision), None)


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # otherwise the body, sent after the headers, waits 40 ms

    def log_message(self, *_):
        pass

    def answer(self, status, body=b"", **headers):
        body = json.dumps(body).encode() if isinstance(body, dict | list) else body
        self.send_response(status)
        headers = {"Content-Type": "application/json", "Content-Length": str(len(body))} | {
            k.replace("_", "-"): v for k, v in headers.items()
        }
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status, code):
        self.answer(status, {"error": code}, X_Error_Code=code, X_Error_Message=code)

    def may_write(self):
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token in self.server.hub.tokens:
            return True
        self.answer(401, {"error": "Invalid username or password."})
        return False

    def handle_any(self):
        hub = self.server.hub
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        hub.requests.append(f"{self.command} {path}")
        if hub.status and hub.status[0] == self.command and hub.status[1] in path:
            return self.answer(hub.status[2], {"error": f"status {hub.status[2]}"})
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        found = re.fullmatch(
            r"/api/models/([^/]+/[^/]+)"
            r"(?:/(revision|tree|preupload|commit|paths-info)/([^/]+)(?:/(.*))?)?",
            path,
        )
        if found:
            return self.api(*found.groups(), body)
        found = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.*)", path)
        return self.file(*found.groups()) if found else self.answer(404, {"error": "no such page"})

    do_GET = do_HEAD = do_POST = handle_any

    def create(self, wanted):
        if not self.may_write():
            return None
        name = (
            f"{wanted['organization']}/{wanted['name']}"
            if wanted.get("organization")
            else wanted["name"]
        )
        hub = self.server.hub
        if name.startswith("others/"):
            return self.answer(
                403,
                {"error": "You don't have the rights to create a model under the namespace others"},
            )
        if name in hub.repositories:
            return self.answer(
                409,
                {
                    "error": "You already created this model repo",
                    "url": f"{self.server.url}/{name}",
                },
            )
        hub.repositories[name] = []
        if wanted.get("private"):
            hub.private.add(name)
        return self.answer(200, {"url": f"{self.server.url}/{name}", "name": name, "id": name})

    def readable(self, name, revision):
        hub = self.server.hub
        known = self.headers.get("Authorization", "").removeprefix("Bearer ") in hub.tokens
        if name not in hub.repositories or (name in hub.private and not known):
            self.refuse(404 if known else 401, "RepoNotFound")
        elif name in hub.gated:
            self.refuse(403, "GatedRepo")
        else:
            found = hub.find(name, revision)
            if found:
                return found
            self.refuse(404, "RevisionNotFound")
        return None

    def api(self, name, kind, revision, _, body):
        hub = self.server.hub
        if kind in ("preupload", "commit"):
            if not self.may_write():
                return None
            if name in hub.forbidden:
                return self.answer(
                    403,
                    {
                        "error": "You have read access but not the required permissions "
                        "for this operation"
                    },
                )
            if kind == "preupload":
                wanted = [f["path"] for f in json.loads(body)["files"]]
                return self.answer(
                    200,
                    {
                        "files": [
                            {"path": p, "uploadMode": "regular", "shouldIgnore": False}
                            for p in wanted
                        ]
                    },
                )
            files = dict(hub.find(name, "main")[1]) if hub.repositories[name] else {}
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "deletedFile":
                    files.pop(value["path"])
            sha = hub.commit(name, files)
            return self.answer(
                200,
                {
                    "commitUrl": f"{self.server.url}/{name}/commit/{sha}",
                    "commitOid": sha,
                    "hookOutput": "",
                },
            )
        if not kind and not hub.repositories.get(name, True):  # new, without commits
            return self.answer(
                200, {"id": name, "private": name in hub.private, "siblings": [], "tags": []}
            )
        if kind == "tree" and not hub.repositories.get(name, True):
            return self.answer(200, [])
        found = self.readable(name, revision or "main")
        if found is None:
            return None
        sha, files = found
        entries = [self.entry(path, content) for path, content in files.items()]
        if kind == "tree":
            return self.answer(200, entries)
        if kind == "paths-info":
            wanted = urllib.parse.parse_qs(body.decode()).get("paths", [])
            return self.answer(200, [e for e in entries if e["path"] in wanted])
        siblings = [{"rfilename": path} for path in files]
        return self.answer(
            200,
            {
                "id": name,
                "modelId": name,
                "sha": sha,
                "private": name in hub.private,
                "siblings": siblings,
                "tags": [],
            },
        )

    @staticmethod
    def entry(path, content):
        return {
            "type": "file",
            "path": path,
            "size": len(content),
            "oid": hashlib.sha1(content).hexdigest(),
        }

    def file(self, name, revision, path):
        found = self.readable(name, revision)
        if found is None:
            return None
        sha, files = found
        if path not in files:
            return self.answer(
                404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound", X_Repo_Commit=sha
            )
        content, headers = (
            files[path],
            {"ETag": f'"{hashlib.sha1(files[path]).hexdigest()}"', "X_Repo_Commit": sha},
        )
        ranged = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if ranged:
            first, last = int(ranged[1]), int(ranged[2] or len(content) - 1)
            return self.answer(
                206,
                content[first : last + 1],
                Content_Range=f"bytes {first}-{last}/{len(content)}",
                **headers,
            )
        return self.answer(200, content, Accept_Ranges="bytes", **headers)


@contextlib.contextmanager
def serving(cache, monkeypatch):
    """A `Hub`, which the hub's client asks within, keeping what it fetches in `cache`."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.hub, server.url = Hub(), f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(
        target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
    )
    thread.start()
    for name, value in (
        ("ENDPOINT", server.url),
        ("HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"),
        ("HF_HUB_CACHE", str(cache)),
        ("HF_HUB_OFFLINE", False),
        ("HF_HUB_DISABLE_XET", True),
        ("HF_TOKEN_PATH", str(cache / "token")),
    ):
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(hf_api.api, "endpoint", server.url)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    try:
        yield server.hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
