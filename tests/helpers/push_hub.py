"""A stand-in for the Hugging Face Hub on loopback: the calls that huggingface_hub makes to push and to load.

Repositories with branches and commits, large files by Git LFS (basic transfer), tokens that may write for
some owners. `Hub.asked` has every request, and `Hub.fail` makes one fail.
"""

import base64
import contextlib
import hashlib
import http.server
import json
import re
import threading
from collections.abc import Iterator
from urllib.parse import unquote, urlsplit

import yaml

WRITER, READER = "hf_" + "w" * 34, "hf_" + "r" * 34  # both belong to ada; the second may only read
OWNERS = ("ada",)
LFS_NAMES = (".safetensors", ".bin")


class Refused(Exception):
    def __init__(self, status: int, words: str, code: str = "", **more):
        super().__init__(words)
        self.status, self.code, self.more = status, code, more


class Hub:
    """The state of the server."""

    def __init__(self):
        self.repos: dict[str, dict] = {}  # id -> {"private", "branches": {name: [(oid, {path: bytes})]}}
        self.objects: dict[str, bytes] = {}  # SHA-256 -> large file
        self.asked: list[tuple[str, str]] = []
        self.fail: dict[str, tuple[int, str]] = {}  # part of a path -> status and words

    def files(self, repo: str, branch: str = "main") -> dict[str, bytes]:
        return self.repos[repo]["branches"][branch][-1][1]

    def uploads(self) -> int:
        return sum(method == "PUT" for method, _ in self.asked)

    # --- writing ----------------------------------------------------------------------------------

    def create(self, fields: dict, user: str) -> dict:
        owner = fields.get("organization") or user
        if owner not in OWNERS:
            raise Refused(404, "no such owner")
        repo = f"{owner}/{fields['name']}"
        if repo in self.repos:
            raise Refused(409, "You already created this model repo", url=f"https://huggingface.co/{repo}")
        first = hashlib.sha1(repo.encode()).hexdigest()
        private = fields.get("private") or fields.get("visibility") == "private"
        branches = {"main": [(first, {".gitattributes": b"x"})]}
        self.repos[repo] = {"private": bool(private), "branches": branches}
        return {"url": f"https://huggingface.co/{repo}", "name": repo, "id": repo}

    def preupload(self, repo: str, branch: str, files: list[dict]) -> dict:
        known = self.files(repo, branch)

        def one(f):
            large, old = f["path"].endswith(LFS_NAMES) or f["size"] > 2**20, known.get(f["path"])
            oid = None if old is None else _sha256(old) if large else _git_oid(old)
            return {"path": f["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False,
                    "oid": oid}

        return {"files": [one(f) for f in files]}

    def batch(self, address: str, objects: list[dict]) -> dict:
        def one(o):
            action = {"upload": {"href": f"{address}/lfs/{o['oid']}", "header": {}}}
            return {**o, **({} if o["oid"] in self.objects else {"actions": action})}

        return {"transfer": "basic", "objects": [one(o) for o in objects]}

    def commit(self, repo: str, branch: str, lines: list[dict]) -> dict:
        files = dict(self.files(repo, branch))
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.objects:
                    raise Refused(400, f"{value['path']}: the object was not uploaded")
                files[value["path"]] = self.objects[value["oid"]]
        history = self.repos[repo]["branches"][branch]
        oid = hashlib.sha1(f"{len(history)}{branch}{repo}".encode()).hexdigest()
        history.append((oid, files))
        where = f"https://huggingface.co/{repo}/commit/{oid}"
        return {"commitUrl": where, "commitOid": oid, "hookOutput": ""}

    # --- reading ----------------------------------------------------------------------------------

    def at(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]]:
        branches = self.repos[repo]["branches"]
        found = [c for h in branches.values() for c in h if c[0] == revision]
        if revision in branches:
            return branches[revision][-1]
        if not found:
            raise Refused(404, "no such revision", "RevisionNotFound")
        return found[0]


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_):
        pass

    def _do(self):
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append((self.command, path))
        length = self.headers.get("content-length")
        body = self._chunks() if length is None else self.rfile.read(int(length))
        try:
            for part, (status, words) in self.hub.fail.items():
                if part in path:
                    raise Refused(status, words)
            self._answer(path, body)
        except Refused as e:
            code = {"X-Error-Code": e.code} if e.code else {}
            self._send(json.dumps({"error": str(e), **e.more}).encode(), e.status, **code)

    do_GET = do_HEAD = do_POST = do_PUT = _do

    def _chunks(self) -> bytes:
        out = b""
        if self.headers.get("transfer-encoding") != "chunked":
            return out
        while size := int(self.rfile.readline(), 16):
            out += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return out

    def _send(self, content: bytes, status: int = 200, **headers):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, value):
        self._send(json.dumps(value).encode(), **{"Content-Type": "application/json"})

    def _user(self, writes: bool = False) -> str:
        token = self.headers.get("authorization", "").removeprefix("Bearer ")
        if token not in (WRITER, READER):
            raise Refused(401, "Invalid credentials in Authorization header")
        if writes and token != WRITER:
            raise Refused(403, "Forbidden: you don't have the rights to write")
        return "ada"

    def _repo(self, repo: str) -> str:
        if repo not in self.hub.repos:
            raise Refused(404, "Repository not found", "RepoNotFound")
        if self.hub.repos[repo]["private"]:
            self._user()
        return repo

    def _answer(self, path: str, body: bytes):
        hub, address = self.hub, f"http://127.0.0.1:{self.server.server_port}"
        if path == "/api/whoami-v2":
            return self._json({"name": self._user(), "type": "user"})
        if path == "/api/repos/create":
            return self._json(hub.create(json.loads(body), self._user(writes=True)))
        if path == "/api/validate-yaml":
            head = re.match(r"---\n(.*?)\n---\n", json.loads(body)["content"], re.DOTALL)
            if not head or not isinstance(yaml.safe_load(head[1]).get("license"), str):
                raise Refused(400, "license must be a string")
            return self._json({"errors": [], "warnings": []})
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/branch/(.+)", path):
            self._user(writes=True)
            branches = hub.repos[self._repo(found[1])]["branches"]
            if found[2] in branches:
                raise Refused(409, "the branch exists")
            branches[found[2]] = list(branches["main"])
            return self._json({})
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/(.+)", path):
            self._user(writes=True)
            return self._json(hub.preupload(self._repo(found[1]), found[2], json.loads(body)["files"]))
        if found := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            self._user(writes=True)
            return self._json(hub.batch(address, json.loads(body)["objects"]))
        if found := re.fullmatch(r"/lfs/(\w+)", path):
            if _sha256(body) != found[1]:
                raise Refused(400, "the content is not that of its name")
            hub.objects[found[1]] = body
            return self._send(b"")
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/(.+)", path):
            self._user(writes=True)
            lines = [json.loads(x) for x in body.splitlines()]
            return self._json(hub.commit(self._repo(found[1]), found[2], lines))
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            oid, files = hub.at(self._repo(found[1]), found[2] or "main")
            siblings = [{"rfilename": name} for name in files]
            return self._json({"id": found[1], "modelId": found[1], "sha": oid, "siblings": siblings,
                               "private": hub.repos[found[1]]["private"], "tags": [], "downloads": 0})
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)(?:/.*)?", path):
            _, files = hub.at(self._repo(found[1]), found[2])
            return self._json([{"type": "file", "path": name, "size": len(c), "oid": _git_oid(c)}
                               for name, c in files.items()])
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            oid, files = hub.at(self._repo(found[1]), found[2])
            if found[3] not in files:
                raise Refused(404, "no such file", "EntryNotFound")
            content = files[found[3]]
            return self._send(content, **{"X-Repo-Commit": oid, "ETag": f'"{_sha256(content)}"'})
        raise Refused(404, f"no {self.command} {path} here")


@contextlib.contextmanager
def serve() -> Iterator[tuple[Hub, str]]:
    """Serve an empty hub; yield its state and its address."""
    hub = Hub()
    handler = type("Handler", (Handler,), {"hub": hub})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
