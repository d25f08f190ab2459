"""Measure the explorer's latency: from a click to the first word, to the last word, and to the scores.

    python -m benchmarks.explorer --json explorer.json          # --bundle DIR: another one than the package's
    python -m benchmarks.explorer --pieces                      # what a click consists of, in one process

Starts `nla serve` and sends the page's requests after a click over HTTP. The start is timed, too; a second
start is faster, because compiled programs are cached. `free`: there are no other requests. `colouring`: the
text's tokens are being coloured, as after reading a short text, and the click interrupts that.

`--pieces` starts no server. It times each piece of work before the first word: wall-clock and processor time,
the least of several. Other programs disturb processor time less.
"""

import argparse
import contextlib
import http.client
import importlib.metadata
import json
import re
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator

from benchmarks import machine
from nla_jax import bundle as bundle_lib
from nla_jax.util import path_kinds

TEXT = "The committee has said that the bank would not be able to pay its debts this year."
MOMENTS = {"first_word": "first_s", "all_words": "all_s", "scored": "scores_s"}


@contextlib.contextmanager
def serve(bundle: str, port: int) -> Iterator[float]:
    """Run `nla serve` on the port; yield the seconds that it took to start."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "nla_jax.cli", "serve", "--bundle", bundle, "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        if not re.match("http://", process.stdout.readline()):
            raise SystemExit(f"nla serve did not start: {process.wait()}")
        while True:  # the server prints its address shortly before it accepts connections
            with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.05)
        yield time.perf_counter() - began
    finally:
        process.terminate()
        process.wait()


@contextlib.contextmanager
def send_request(port: int, what: str, **fields) -> Iterator[Iterator[dict]]:
    """Send a request and yield an iterator over the lines of the answer; leaving early disconnects."""
    connection = http.client.HTTPConnection("127.0.0.1", port)
    try:
        connection.request("POST", f"/api/{what}", json.dumps(fields), {"content-type": "application/json"})
        yield map(json.loads, connection.getresponse())
    finally:
        connection.close()


def click(port: int, text: str, token: int) -> dict[str, float]:
    """Return the seconds from the request to each of MOMENTS, and the number of characters written."""
    began, at = time.perf_counter(), {}
    with send_request(port, "explain", text=text, token=token) as events:
        for event in events:
            now = time.perf_counter() - began
            if event.get("written"):
                at.setdefault("first_word", now)
                at["all_words"] = now
            if "done" in event:
                at |= {"scored": now, "characters": len(event["done"]["words"])}
    return at


def times(port: int, clicks: int, colouring: bool) -> list[dict]:
    """Time `clicks` clicks, each on a text that is new to the server."""
    out = []
    for i in range(clicks):
        text = f"{i}. {TEXT}"
        with send_request(port, "read", text=text) as events:
            n = len([*events][-1]["done"]["tokens"])
        with contextlib.ExitStack() as meanwhile:
            if colouring:
                events = meanwhile.enter_context(send_request(port, "heat", text=text))
                next(e for e in events if e.get("place") == 0)
                time.sleep(0.5)
                meanwhile.close()  # the page disconnects when a token is clicked
            out.append(click(port, text, 3 + i % (n - 3)))
    return out


def figures(rows: dict[str, list[dict]]) -> dict[str, dict]:
    """Return the figures of docs/results/performance/epyc_explorer.json."""
    def reduced(name, by):
        return {key: round(by([c[moment] for c in rows[name] if moment in c]), 3)
                for moment, key in MOMENTS.items()}

    return {"median": reduced("free", statistics.median), "slowest": reduced("free", max),
            "busy": reduced("colouring", statistics.median)}


def pieces(bundle: str, repeats: int) -> dict[str, dict[str, float]]:
    """Return {piece: {"wall_ms", "cpu_ms"}} of the work between a text and its first word."""
    import jax

    from nla_jax.view.explorer import bundles

    side = bundles.open_sides(bundle)["a"]
    nla, writer = side.nla, side.writer
    h_TD, out = nla.capture(TEXT), {}

    def timed(name: str, work, *args) -> None:
        wall, cpu = time.perf_counter(), time.process_time()
        work(*args)
        now = {"wall_ms": 1000 * (time.perf_counter() - wall), "cpu_ms": 1000 * (time.process_time() - cpu)}
        old = out.get(name, now)
        out[name] = {key: round(min(value, old[key]), 1) for key, value in now.items()}

    for i in range(repeats + 1):
        if i == 1:
            out.clear()  # the first round compiled
        timed("tokens of the text", nla.tokens, TEXT)
        timed("target reads the text", nla.capture, TEXT)
        answer = writer.submit(h_TD[3 + i % (len(h_TD) - 3)], urgent=True)
        timed("AV reads the prompt and the opening tag",
              lambda: (writer._let_enter(), jax.block_until_ready(writer._now)))
        following = writer.follow([answer])
        timed("look at its tokens", next, following)
        timed("words from tokens", lambda words: bundles.parse_unfinished(writer.text(words)), answer)
        timed("one more token", next, following)
        timed("another token", next, following)
        timed("four more tokens", next, following)
        following.close()
    return out


def measure(where: str, port: int, n: int) -> dict:
    """Time n clicks of each kind on a new server, and print them."""
    with serve(where, port) as start:
        rows = {name: times(port, n, name == "colouring") for name in ("free", "colouring")}
    for name, clicks in rows.items():
        for moment in MOMENTS:
            seconds = [c[moment] for c in clicks if moment in c]
            middle, most = statistics.median(seconds), max(seconds)
            print(f"{name:10} {moment:11} median {middle:5.2f} s   worst {most:5.2f} s")
    return {"start_s": start, "machine": machine.describe(), "clicks": rows, "figures": figures(rows),
            "versions": f"jax {importlib.metadata.version('jax')}"}


def main(argv=None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--bundle", default="", help="default: the one that the package ships")
    p.add_argument("--clicks", type=int, default=12)
    p.add_argument("--port", type=int, default=8421)
    p.add_argument("--json", default="")
    p.add_argument("--pieces", action="store_true", help="time the pieces of a click, without a server")
    args = p.parse_args(argv)
    where = str(path_kinds.bundle_in(args.bundle) if args.bundle else bundle_lib.shipped_bundle())
    if args.pieces:
        found = {"machine": machine.describe(), "pieces": pieces(where, args.clicks)}
        for name, ms in found["pieces"].items():
            print(f"{name:40} {ms['wall_ms']:8.1f} ms, processor {ms['cpu_ms']:8.1f} ms")
    else:
        found = measure(where, args.port, args.clicks)
    if args.json:
        with open(args.json, "w", encoding="utf-8") as f:
            json.dump(found, f, indent=1)


if __name__ == "__main__":
    main()
