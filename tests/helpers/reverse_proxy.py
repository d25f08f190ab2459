"""A small reverse proxy on loopback, which serves another server under a path, as nginx and notebooks do."""

import contextlib
import http.client
import http.server
import threading
import urllib.parse
from collections.abc import Iterator

OF_THE_CONNECTION = ("connection", "keep-alive", "transfer-encoding", "server", "date")


@contextlib.contextmanager
def serve_under(upstream: str, prefix: str, *, strips: bool, scheme: str = "https") -> Iterator[int]:
    """Serve `upstream` (http://HOST:PORT) under `prefix`; yield the port.

    The browser's Host is passed on. strips: cut the prefix off, else keep it. Every other path is 404. An
    answer is passed on whole at its end, unless it is one that both jupyter-server-proxy (by a header of the
    request) and nginx (by one of the answer) pass on as it comes. scheme: in X-Forwarded-Proto, as of a proxy
    with TLS."""
    to = urllib.parse.urlsplit(upstream)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            path, question, query = self.path.partition("?")
            if path != prefix and not path.startswith(f"{prefix}/"):
                return self.send_error(404)
            path = (path.removeprefix(prefix) or "/") if strips else path
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            headers = dict(self.headers) | {
                "X-Forwarded-For": self.client_address[0], "X-Forwarded-Proto": scheme,
                "X-Forwarded-Host": self.headers["host"], "X-Forwarded-Prefix": prefix}
            out = http.client.HTTPConnection(to.hostname, to.port)
            with contextlib.closing(out):
                out.request(self.command, path + question + query, body, headers)
                answer = out.getresponse()
                self.send_response(answer.status)
                for name, value in answer.getheaders():
                    if name.lower() not in OF_THE_CONNECTION:
                        self.send_header(name, value)
                self.end_headers()
                streams = (self.headers["accept"] == "text/event-stream"
                           and answer.getheader("x-accel-buffering") == "no")
                with contextlib.suppress(ConnectionError):
                    while part := answer.read1(4096) if streams else answer.read():
                        self.wfile.write(part)
                        self.wfile.flush()

        do_POST = do_GET

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()
