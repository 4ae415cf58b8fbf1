"""A stand-in for the Hugging Face hub on 127.0.0.1: the part of its HTTP API that uploads use, with real commits."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

from huggingface_hub import constants

TOKEN = "hf_of_the_test"


class Hub:
    """The repositories of a stand-in, and what it was asked for.

    Attributes:
        url: Its address.
        branches: Files by name, by ``(repository, branch)``.
        private: Whether each repository is private.
        asked: Methods and paths of all requests, in order.
        refuse: Status with which it answers the next request whose path holds the text that goes with it.
    """

    def __init__(self):
        self.url = ""
        self.branches = {}
        self.private = {}
        self.asked = []
        self.refuse = None
        self.blobs = {}

    def answer(self, method, path, body, token):
        """Return status and body of an answer."""
        self.asked.append(f"{method} {path}")
        if self.refuse is not None and self.refuse[1] in path:
            return self.refuse[0], {"error": "refused by the stand-in"}
        blob = re.fullmatch(r"/blobs/(\w+)", path)
        if blob:
            assert hashlib.sha256(body).hexdigest() == blob[1]
            self.blobs[blob[1]] = body
            return 200, {}
        if token != f"Bearer {TOKEN}":
            return 401, {"error": "Invalid username or password."}
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        lfs = re.fullmatch(r"/(.+)\.git/info/lfs/objects/batch", path)
        if lfs:
            return 200, {"transfer": "basic", "objects": [self.place(one) for one in json.loads(body)["objects"]]}
        repo, what, branch = re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)/(\w+)/([^/]+)", path).groups()
        key = (repo, unquote(branch))
        if what == "branch":
            status = 409 if key in self.branches else 200
            self.branches.setdefault(key, dict(self.branches[repo, "main"]))
            return status, {}
        files = self.branches[key]
        if what == "tree":
            return 200, [{"type": "file", "path": name, "size": len(files[name]), "oid": "0" * 40} for name in files]
        if what == "preupload":
            given = json.loads(body)["files"]
            modes = {one["path"]: "lfs" if one["path"].endswith(".safetensors") else "regular" for one in given}
            return 200, {"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in modes.items()]}
        assert what == "commit"
        for line in body.splitlines():
            self.change(files, **json.loads(line))
        oid = hashlib.sha1(body).hexdigest()
        return 200, {"success": True, "commitOid": oid, "commitUrl": f"{self.url}/{repo}/commit/{oid}"}

    def create(self, given):
        repo = f"{given['organization'] or 'me'}/{given['name']}"
        status = 409 if repo in self.private else 200
        if status == 200:
            self.private[repo] = given.get("visibility") == "private" or given.get("private") is True
            self.branches[repo, "main"] = {".gitattributes": b""}
        return status, {"url": f"{self.url}/{repo}"}

    def place(self, given):
        here = {"oid": given["oid"], "size": given["size"]}
        known = given["oid"] in self.blobs
        return here if known else {**here, "actions": {"upload": {"href": f"{self.url}/blobs/{given['oid']}"}}}

    def change(self, files, key, value):
        if key == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif key == "lfsFile":
            files[value["path"]] = self.blobs[value["oid"]]
        elif key == "deletedFile":
            del files[value["path"]]


@contextmanager
def logged_in(monkeypatch):
    """Yield a stand-in that huggingface_hub takes for the hub, with a login."""
    with hub_server() as hub, monkeypatch.context() as inside:
        inside.setattr(constants, "ENDPOINT", hub.url)
        inside.setattr(constants, "HF_HUB_OFFLINE", False)
        # The storage behind Xet is not part of the hub's API.
        inside.setattr(constants, "HF_HUB_DISABLE_XET", True)
        inside.setenv("HF_TOKEN", TOKEN)
        yield hub


@contextmanager
def hub_server():
    """Yield a stand-in that answers until the end of the block."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self):
            body = self.body()
            try:
                status, content = hub.answer(
                    self.command, urlsplit(self.path).path, body, self.headers["authorization"]
                )
            except Exception as error:
                status, content = 500, {"error": repr(error)}
            said = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(said)))
            self.end_headers()
            self.wfile.write(said)

        def body(self):
            if self.headers.get("transfer-encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("content-length") or 0))
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        do_GET = do_POST = do_PUT = answer  # noqa: N815 (names of http.server)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
