"""`nla serve`: serve the explorer, a web page."""

from nla_jax.cli import flags, parser
from nla_jax.errors import UserError
from nla_jax.util.number_types import whole


def add(sub) -> None:
    """Add the command to the subparsers of `nla`."""
    p = parser.add(sub, "serve", "explore a bundle in the browser: type a text, click a token",
                   "nla serve --bundle runs/quickstart/bundle --port 8420")
    flags.add_bundle(p)
    flags.add_dtype(p)
    p.add_argument("--compare", default="", metavar="DIR", help="a second bundle, such as the warm start")
    flags.add_target(p)
    p.add_argument("--port", type=whole(1, 65535), default=8420, metavar="N", help="the TCP port")
    p.add_argument("--host", default="127.0.0.1", metavar="ADDRESS",
                   help="another address needs a token; one is generated")
    p.add_argument("--allow-host", nargs="+", action="extend", default=[], metavar="NAME",
                   help="names under which a proxy serves the page; default: those of loopback")
    p.add_argument("--token", default="", metavar="SECRET",
                   help="the token that requests must have; default: none on loopback")
    p.add_argument("--max-tokens", type=flags.COUNT, default=256, metavar="N",
                   help="maximum number of tokens of a text")
    p.add_argument("--queue", type=flags.COUNT, default=16, metavar="N",
                   help="maximum number of waiting requests")
    p.set_defaults(work=_serve)


def _serve(args, rest) -> None:
    import secrets
    import sys
    import urllib.parse

    try:
        import uvicorn

        from nla_jax.view.explorer import bundles, engine, server
    except ImportError as e:
        raise UserError(f"{e.name} is missing: pip install 'nla_jax[serve]'") from e
    local = args.host in server.LOOPBACK
    token = args.token or ("" if local else secrets.token_urlsafe(24))
    if not (token.isascii() and token.isprintable()) or (token and len(token) < 16):
        raise UserError("--token: must be at least 16 printable ASCII characters")
    named = tuple(server.host_name(n) for n in args.allow_host)
    hosts = (*server.LOOPBACK, args.host.lower(), *named) if local or named else ()
    _check_free(args.host, args.port)
    directory = flags.find_bundle(args)
    compare = args.compare and flags.find_bundle(args, args.compare)
    print("opening the bundle and compiling its programs; the cache keeps them", file=sys.stderr)
    sides = bundles.open_sides(directory, compare, args.target or None, dtype=args.dtype, announce=True)
    asked = engine.Engine(sides, args.max_tokens)
    asked.warm_up()
    app = server.app(asked, token=token, hosts=hosts, most_waiting=args.queue)
    if named and not token:
        print("no --token: the proxy must check who may ask", file=sys.stderr)
    name = f"[{args.host}]" if ":" in args.host else args.host
    brings = f"?token={urllib.parse.quote(token, safe='')}" if token else ""
    print(f"http://{name}:{args.port}/{brings}", flush=True)
    uvicorn.run(app, host=args.host, port=args.port, log_level="warning", access_log=False,
                server_header=False, timeout_keep_alive=5, timeout_graceful_shutdown=3,
                limit_concurrency=512)


def _check_free(host: str, port: int) -> None:
    """Raise UserError if the address is not free, before minutes of work."""
    import socket

    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        socket.create_server((host, port), family=family).close()
    except OSError as e:
        raise UserError(f"--host {host} --port {port}: {e.strerror or e}; give another one") from None
