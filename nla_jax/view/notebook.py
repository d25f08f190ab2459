"""Show the explorer below a notebook's cell. The notebook's own process serves it, because a second process
could not use the accelerator.

    explorer = notebook.explorer("runs/quickstart/bundle")
    explorer            # the last line of a cell: Jupyter shows the page; in Colab see launch/colab.ipynb
"""

import dataclasses
import html
import os
import socket
import threading
import time

from nla_jax.errors import UserError
from nla_jax.interchange import find_bundle

# Pages that may embed the explorer in a frame: notebooks on this machine, on a JupyterHub, in VS Code, and in
# Colab.
FRAMES = (
    "'self' http://localhost:* http://127.0.0.1:* vscode-webview: https://colab.research.google.com "
    "https://*.googleusercontent.com"
)


@dataclasses.dataclass(frozen=True)
class Explorer:
    """A running explorer, served on loopback. `close` ends it.

    hub: the path of the user's server on a JupyterHub, whose proxy (jupyter-server-proxy) passes the page on;
    "" elsewhere."""

    port: int
    height: int
    server: object
    thread: threading.Thread
    hub: str = ""

    @property
    def url(self) -> str:
        return f"{self.hub}proxy/{self.port}/" if self.hub else f"http://127.0.0.1:{self.port}/"

    def _repr_html_(self) -> str:
        return (
            f'<iframe src="{html.escape(self.url)}" title="explorer" width="100%" height="{self.height}" '
            'style="border: 0"></iframe>'
        )

    def close(self) -> None:
        self.server.should_exit = True
        self.thread.join(10)


def explorer(
    bundle,
    compare="",
    *,
    target: str | None = None,
    port: int = 0,
    height: int = 760,
    max_tokens: int = 256,
    any_host: bool = False,
) -> Explorer:
    """Open a bundle, compile its programs, and serve the explorer until `close` or the process ends.

    Args:
      compare: a second bundle of the same target, such as the warm start.
      target: the target's directory, if it has moved. port: 0 chooses a free one. height: in pixels.
      max_tokens: longest text, in tokens.
      any_host: answer to every host name, for a proxy such as Colab's, which has its own name. On a
        JupyterHub it always does.

    Raises:
      UserError: the bundle does not exist, or the extra `serve` is not installed.
    """
    try:
        import uvicorn

        from nla_jax.view.explorer import bundles, engine, server
    except ImportError as e:
        raise UserError(f"{e.name} is missing: pip install 'nla_jax[serve]'") from e
    places = [find_bundle.find(b, target=target or "") if b else b for b in (bundle, compare)]
    asked = engine.Engine(bundles.open_sides(*places, target), max_tokens)
    asked.warm_up()
    hub = os.environ.get("JUPYTERHUB_SERVICE_PREFIX", "")
    app = AllowFrames(server.app(asked, hosts=() if any_host or hub else server.LOOPBACK))
    listening = socket.create_server(("127.0.0.1", port))
    served = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False, server_header=False))
    thread = threading.Thread(target=served.run, args=([listening],), name="explorer's server", daemon=True)
    thread.start()
    while thread.is_alive() and not served.started:
        time.sleep(0.01)
    return Explorer(listening.getsockname()[1], height, served, thread, hub)


class AllowFrames:
    """Wrap an application so that a notebook may show its pages in a frame."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send) -> None:
        async def framed(message):
            if message["type"] == "http.response.start":
                name, none, own = b"content-security-policy", b"frame-ancestors 'none'", FRAMES.encode()
                headers = [(k, v.replace(none, b"frame-ancestors " + own) if k == name else v)
                           for k, v in message["headers"]]
                message = {**message, "headers": headers}
            await send(message)

        await self.app(scope, receive, framed)
