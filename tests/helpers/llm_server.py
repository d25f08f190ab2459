"""A server on 127.0.0.1 that speaks as language-model providers do, and misbehaves on command.

It knows a row by the text in its prompt. What it does is `plan(text, n)`, n = 0 at the first request about
that text: the name of a fault below, or of a way to answer. `charged` counts answers that went out whole.

    python -m tests.helpers.llm_server 8123     # at http://127.0.0.1:8123/v1, with faults at random (`mixed`)
"""

import collections
import contextlib
import email.utils
import json
import random
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

ANSWERS = {
    "ok": "<explanation>\n- A text that begins with {first}.\n- It ends on {last}.\n</explanation>",
    "thought": "<think><explanation></think><explanation>\nOn {first}.\nTo {last}.\n</explanation>",
    "no closing tag": "<explanation>\nA text that begins with {first}.\nIt ends",
    "too few lines": "<explanation>\nOn {first}.\n</explanation>",
    "no opening tag": "I will not speak of {first}.",
    "empty answer": " \n",
    "refused": "",
    "filtered": "<explanation>\nOn {first}.\nIt ends on {last}.\n</explanation>",
    "cut at the token limit": "<explanation>\nOn {first}.\nIt ends on {last}.\n</explanation>",
    "echo": "<explanation>\nOn {first}.\nThe key is {key}.\n</explanation>",
    "surrogate": "<explanation>\nOn {first} \ud800.\nIt ends on {last}.\n</explanation>",
}
KEPT = {"ok", "thought", "echo", "surrogate"}
STATUS = {"500": 500, "503": 503, "529": 529, "429": 429, "429 date": 429, "400": 400, "401": 401, "403": 403,
          "404": 404, "402": 402, "quota": 429, "307": 307, "long wait": 429}
# Nothing was paid, and the next try may be answered.
PASSING = ("429", "429 date", "500", "503", "529", "reset", "reset midway", "short body", "not JSON",
           "deep JSON", "no choices", "error in 200")
SLOW = ("silence", "drip")


def fate(text: str) -> tuple[list[str], str]:
    """At random, from the text alone: a few passing faults, and how it ends."""
    rng = random.Random(text)
    faults = rng.choices(range(4), (6, 2, 1, 1))[0]
    end = rng.choices((*ANSWERS, "400"), (8, *[1] * len(ANSWERS)))[0]
    return [rng.choice(SLOW if rng.random() < 0.01 else PASSING) for _ in range(faults)], end


def mixed(text: str, n: int) -> str:
    """The plan of these fates."""
    faults, end = fate(text)
    return faults[n] if n < len(faults) else end


class Server:
    """`with Server(plan) as s: s.url, s.charged, ...`"""

    def __init__(self, plan: Callable[[str, int], str] = lambda text, n: "ok", port: int = 0):
        self.plan, self.port, self.lock = plan, port, threading.Lock()
        self.asked: collections.Counter = collections.Counter()
        self.charged: collections.Counter = collections.Counter()
        self.batches: dict[str, dict] = {}
        self.bodies: list[dict] = []
        self.headers: list[dict] = []
        self.under_way = self.most_under_way = 0
        self.answers_left = 10**9  # then it keeps silent until `release`; and then hangs up,
        self.late = False  # or answers after all
        self.released = threading.Event()
        self.odd: list = []  # what it says to questions about batches, at first
        self.create_fault = self.results_root = ""

    def __enter__(self) -> "Server":
        handler = type("Handler", (_Handler,), {"owner": self})
        self.http = _Http(("127.0.0.1", self.port), handler)
        self.root = f"http://127.0.0.1:{self.http.server_port}"
        self.url = f"{self.root}/v1"
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02})
        self.thread.start()
        return self

    def __exit__(self, *exc) -> None:
        self.released.set()
        self.http.shutdown()
        self.thread.join()
        self.http.server_close()

    def release(self) -> None:
        """Answer again."""
        self.answers_left = 10**9
        self.released.set()


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256  # a connection that is refused would be a fault that nobody planned

    def handle_error(self, request, client_address) -> None:
        if not isinstance(sys.exception(), OSError):  # else whoever asked is gone
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    owner: Server
    protocol_version = "HTTP/1.1"
    wbufsize = -1
    disable_nagle_algorithm = True

    def log_message(self, *args) -> None:
        pass

    def handle(self) -> None:
        with contextlib.suppress(OSError):  # whoever asked is gone
            super().handle()

    def do_POST(self) -> None:
        s, body = self.owner, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with s.lock:
            s.bodies.append(body)
            s.headers.append({k.lower(): v for k, v in self.headers.items()})
            s.under_way += 1
            s.most_under_way = max(s.most_under_way, s.under_way)
        try:
            if self.path == "/v1/messages/batches":
                self.create(body)
            else:
                self.message(body)
        finally:
            with s.lock:
                s.under_way -= 1

    def message(self, body: dict) -> None:
        s, text = self.owner, text_of(body)
        with s.lock:
            n = s.asked[text]
            s.asked[text] += 1
            s.answers_left -= 1
            silent = s.answers_left < 0
        if silent:
            s.released.wait(60)
            if not s.late:
                return self.reset()
        what = s.plan(text, n)
        if what in STATUS:
            return self.refuse(what)
        if what in ("reset", "silence"):
            if what == "silence":
                s.released.wait(4)
            return self.reset()
        answer = self.answer(text, what if what in ANSWERS else "ok")
        payload = json.dumps(answer).encode()
        if what == "not JSON":
            payload = b"<html>Bad gateway</html>"
        elif what == "deep JSON":
            payload = b"[" * 100_000
        elif what == "no choices":
            payload = b'{"id": "x", "choices": [], "content": 3}'
        elif what == "error in 200":
            payload = b'{"error": {"message": "upstream", "code": 502}}'
        if what in ("reset midway", "short body", "drip"):
            self.head(200, len(payload))
            for i in range(len(payload) // 2 if what != "drip" else 80):
                self.wfile.write(payload[i : i + 1])
                if what == "drip":
                    self.wfile.flush()
                    if s.released.wait(0.05):
                        break
            self.wfile.flush()
            return self.reset() if what == "reset midway" else self.hang_up()
        # Charged first: whoever reads the answer finds it so.
        with s.lock:
            s.charged[text] += what in ANSWERS
        self.head(200, len(payload))
        self.wfile.write(payload)
        self.wfile.flush()

    def answer(self, text: str, how: str) -> dict:
        first, *_, last = text.split()
        key = self.headers.get("Authorization", self.headers.get("X-Api-Key", "")).removeprefix("Bearer ")
        said = ANSWERS[how].format(first=first, last=last, key=key)
        if "messages" in self.path:
            stop = {"refused": "refusal", "filtered": "refusal", "cut at the token limit": "max_tokens"}
            return {"type": "message", "role": "assistant", "content": [{"type": "text", "text": said}],
                    "stop_reason": stop.get(how, "end_turn"),
                    "usage": {"input_tokens": 100, "output_tokens": 20}}
        finish = {"filtered": "content_filter", "cut at the token limit": "length"}
        message = {"role": "assistant", "content": said, "refusal": "I cannot." if how == "refused" else None}
        return {"choices": [{"index": 0, "message": message, "finish_reason": finish.get(how, "stop")}],
                "usage": {"prompt_tokens": 100, "completion_tokens": 20}}

    def refuse(self, what: str) -> None:
        key = self.headers.get("Authorization", "")
        error = {"message": f"{what}: Incorrect key \x1b[31m{key}", "type": "invalid_request_error"}
        error |= {"code": "insufficient_quota"} if what == "quota" else {}
        payload = json.dumps({"error": error}).encode()
        later = {"429": "0", "429 date": email.utils.formatdate(0, usegmt=True), "long wait": "7200"}
        more = {"Retry-After": later[what]} if what in later else {}
        more |= {"Location": f"{self.owner.root}/elsewhere"} if what == "307" else {}
        self.head(STATUS[what], len(payload), more)
        self.wfile.write(payload)

    # --- batches ----------------------------------------------------------------------------------

    def create(self, body: dict) -> None:
        s = self.owner
        with s.lock:
            fault, s.create_fault = s.create_fault, ""
            if fault != "500":
                id = f"batch_{len(s.batches)}"
                faults = ["not JSON", "short body"]
                s.batches[id] = {"requests": body["requests"], "looks": 0, "faults": faults}
        if fault == "500":
            return self.refuse("500")
        if fault == "silence":
            s.released.wait(60)
        if fault:
            return self.reset()
        self.say(self.batch(id))

    def do_GET(self) -> None:
        s, path = self.owner, self.path.partition("?")[0].split("/")
        if s.odd:
            return self.say(s.odd.pop())
        if path[-1] == "results":
            return self.results(path[-2])
        if path[-1] != "batches":
            if path[-1] not in s.batches:
                return self.refuse("404")
            s.batches[path[-1]]["looks"] += 1
            return self.say(self.batch(path[-1]))
        how = dict(p.split("=") for p in self.path.partition("?")[2].split("&"))
        ids = list(s.batches)
        newer = ids[ids.index(how["before_id"]) + 1 :] if "before_id" in how else ids
        self.say({"data": [self.batch(i) for i in newer[::-1]][: int(how["limit"])], "has_more": False})

    def batch(self, id: str) -> dict:
        b = self.owner.batches[id]
        ended = b["looks"] > 1
        when = "2026-01-01T00:00:00Z"
        url = f"{self.owner.results_root or self.owner.root}/v1/messages/batches/{id}/results"
        return {"id": id, "type": "message_batch", "processing_status": "ended" if ended else "in_progress",
                "request_counts": {"processing": len(b["requests"]), "succeeded": 0}, "created_at": when,
                "expires_at": when, "results_url": url if ended else None,
                "archived_at": when if b.get("archived") else None}

    def results(self, id: str) -> None:
        s, lines = self.owner, []
        for r in s.batches[id]["requests"]:
            text = text_of(r["params"])
            what = s.plan(text, s.asked[text])
            if what in ANSWERS:
                result = {"type": "succeeded", "message": self.answer(text, what)}
            elif what == "400":
                error = {"type": "error", "error": {"type": "invalid_request_error", "message": "no"}}
                result = {"type": "errored", "error": error}
            elif what == "500":
                result = {"type": "errored", "error": {"type": "error", "error": {"type": "api_error"}}}
            else:
                result = {"type": "expired"}
            line = json.dumps({"custom_id": r["custom_id"], "result": result}).encode() + b"\n"
            lines.append((line, text, what))
        faults = s.batches[id]["faults"]
        fault = faults.pop() if faults else ""
        whole = b"".join(line for line, _, _ in lines)
        if fault:
            payload = whole[: len(whole) // 2] + (b"\n{not JSON}\n" if fault == "not JSON" else b"")
            self.head(200, len(payload) + (10 if fault == "short body" else 0))
            self.wfile.write(payload)
            self.wfile.flush()
            return self.hang_up()
        # Each row of a batch is answered, and charged, once.
        if not s.batches[id].get("counted"):
            s.batches[id]["counted"] = True
            for _, text, what in lines:
                s.asked[text] += 1
                s.charged[text] += what in ANSWERS
        self.head(200, len(whole))
        self.wfile.write(whole)

    # --- bytes ------------------------------------------------------------------------------------

    def say(self, body) -> None:
        payload = json.dumps(body).encode()
        self.head(200, len(payload))
        self.wfile.write(payload)

    def head(self, status: int, length: int, more: dict | None = None) -> None:
        self.send_response(status)
        more = {"Content-Type": "application/json", "Content-Length": str(length), **(more or {})}
        for name, value in more.items():
            self.send_header(name, value)
        self.end_headers()

    def hang_up(self) -> None:
        self.close_connection = True

    def reset(self) -> None:
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()


def text_of(body: dict) -> str:
    """The text that a prompt is about."""
    prompt = body["messages"][0]["content"]
    return prompt.partition("<text>\n")[2].partition("\n</text>")[0] or prompt.partition("\n\n")[2]


if __name__ == "__main__":
    for sign in (signal.SIGINT, signal.SIGTERM):  # a shell's background jobs ignore Ctrl-C
        signal.signal(sign, signal.default_int_handler)
    with Server(mixed, int(sys.argv[1])) as server:
        with contextlib.suppress(KeyboardInterrupt):
            while True:
                time.sleep(1)
        twice = sum(n > 1 for n in server.charged.values())
        print(f"charged for {sum(server.charged.values())} answers; texts charged twice: {twice}")
