"""A model hub on a port of this machine, with the part of its interface that `snapshot_download` uses."""

import contextlib
import hashlib
import http.server
import json
import threading
from pathlib import Path
from urllib.parse import unquote, urlsplit


@contextlib.contextmanager
def serve(root: Path, revisions: tuple[str, ...] = ("main",)):
    """Serve ROOT/org/name as `org/name`; yield (address, list of the paths that were asked)."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args):
            pass

        def answer(self, status: int, body: bytes = b"", **headers) -> None:
            self.send_response(status)
            for key, value in {"content-length": len(body), **headers}.items():
                self.send_header(key.replace("_", "-"), str(value))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def do_GET(self):
            path = unquote(urlsplit(self.path).path).strip("/")
            asked.append(path)
            parts = path.split("/")
            if parts[:2] == ["api", "models"]:
                return self.facts("/".join(parts[2:4]), parts[4:])
            if len(parts) > 4 and parts[2] == "resolve":
                return self.file(root / parts[0] / parts[1] / "/".join(parts[4:]), parts[3])
            return self.answer(404)

        do_HEAD = do_GET

        def facts(self, name: str, rest: list[str]) -> None:
            place, revision = root / name, rest[1] if len(rest) > 1 else "main"
            known = [*revisions, *(commit(name, r) for r in revisions)]
            if not place.is_dir() or revision not in known:
                code = "RepoNotFound" if not place.is_dir() else "RevisionNotFound"
                return self.answer(404, X_Error_Code=code)
            files = [p for p in sorted(place.rglob("*")) if p.is_file()]
            if rest[:1] == ["tree"]:
                found = [{"type": "file", "path": str(p.relative_to(place)), "size": p.stat().st_size,
                          "oid": hashlib.sha1(p.read_bytes()).hexdigest()} for p in files]
                return self.answer(200, json.dumps(found).encode(), content_type="application/json")
            found = {"id": name, "sha": commit(name, revision),
                     "siblings": [{"rfilename": str(p.relative_to(place))} for p in files]}
            return self.answer(200, json.dumps(found).encode(), content_type="application/json")

        def file(self, path: Path, revision: str) -> None:
            if not path.is_file():
                return self.answer(404, X_Error_Code="EntryNotFound")
            body = path.read_bytes()
            tag = f'"{hashlib.sha256(body).hexdigest()}"'
            return self.answer(200, body, ETag=tag, X_Repo_Commit=revision)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()


def commit(name: str, revision: str) -> str:
    return hashlib.sha1(f"{name}@{revision}".encode()).hexdigest()
