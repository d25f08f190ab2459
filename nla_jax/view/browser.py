"""Open the explorer in a headless browser, for its tests and for screenshots."""

import contextlib
import os
import shutil
import threading
import time
from collections.abc import Iterator

from nla_jax.errors import UserError

NAMES = ("chromium", "chromium-browser", "google-chrome")


def chromium() -> str:
    """Return the path of Chromium: NLA_CHROMIUM, or one on PATH. Raises UserError if there is none."""
    given = os.environ.get("NLA_CHROMIUM", "")
    found = next(filter(None, map(shutil.which, [given] if given else NAMES)), None)
    if not found:
        raise UserError(f"no browser: {given or 'Chromium'} not found; `apt-get install chromium`, or set "
                        "NLA_CHROMIUM to its path")
    return found


@contextlib.contextmanager
def open_browser() -> Iterator:
    """Open a Playwright browser. Raises UserError if Playwright or Chromium is missing."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError as e:
        raise UserError("Playwright is missing: pip install playwright") from e
    path = chromium()
    with sync_playwright() as p:
        # Chromium's sandbox does not work for root; it is not needed, because the pages are our own.
        browser = p.chromium.launch(executable_path=path, args=["--no-sandbox"] * (os.geteuid() == 0))
        yield browser
        browser.close()


@contextlib.contextmanager
def serve_app(app) -> Iterator[str]:
    """Serve an application on loopback, on a free port, in a thread; yield its address."""
    import uvicorn

    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", ws="none",
                                          timeout_graceful_shutdown=3))
    thread = threading.Thread(target=server.run, name="server")
    thread.start()
    while not server.started:
        if not thread.is_alive():
            raise UserError("the server could not be started")
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
