"""Measure the explorer's latency: from a click to the first word, to the last word, and to the scores.

    python -m benchmarks.explorer --bundle runs/quickstart/bundle --json explorer.json

Starts `nla serve` and sends the page's requests after a click over HTTP. The start is timed, too; a second
start is faster, because compiled programs are cached. `free`: there are no other requests. `colouring`: the
text's tokens are being coloured, as after reading a short text, and the click interrupts that.
"""

import argparse
import contextlib
import http.client
import json
import re
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator

from benchmarks import machine

TEXT = "The committee has said that the bank would not be able to pay its debts this year."
MOMENTS = ("first_word", "all_words", "scored")


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


def main(argv=None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--bundle", required=True)
    p.add_argument("--clicks", type=int, default=12)
    p.add_argument("--port", type=int, default=8421)
    p.add_argument("--json", default="")
    args = p.parse_args(argv)
    with serve(args.bundle, args.port) as start:
        rows = {name: times(args.port, args.clicks, name == "colouring") for name in ("free", "colouring")}
    found = {"start_s": start, "machine": machine.describe(), "clicks": rows}
    for name, clicks in rows.items():
        for moment in MOMENTS:
            seconds = [c[moment] for c in clicks if moment in c]
            middle, most = statistics.median(seconds), max(seconds)
            print(f"{name:10} {moment:11} median {middle:5.2f} s   worst {most:5.2f} s")
    if args.json:
        with open(args.json, "w", encoding="utf-8") as f:
            json.dump(found, f, indent=1)


if __name__ == "__main__":
    main()
