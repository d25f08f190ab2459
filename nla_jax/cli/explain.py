"""`nla explain`: explain the tokens of a text."""

import dataclasses
import io
import json

from nla_jax.errors import UserError


def add(sub) -> None:
    """Add the command to the subparsers of `nla`."""
    p = sub.add_parser("explain", help="explain the tokens of a text")
    p.add_argument("--bundle", default="", help="default: the one that nla_jax ships")
    p.add_argument("--text", required=True)
    p.add_argument("--tokens", default="all", help="all, an index (-1 is the last), or a range 3:9")
    p.add_argument("--samples", type=int, default=1)
    p.add_argument("--temperature", type=float, default=None, help="default: 0, or 1 with --samples")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--target", default="", help="location of the target; default: as in the sidecar")
    p.add_argument("--trust", type=float, default=None, metavar="P",
                   help="show only claims that are true with probability P or more (needs `nla trust`)")
    p.add_argument("--json", action="store_true")
    p.add_argument("--svg", default="", help="also write the table as a picture to this file")
    p.set_defaults(work=_explain)


def choose_tokens(spec: str, n: int) -> list[int]:
    """Return the token indices of "all", "-1" or "3:9" in a text of n tokens. Raises UserError."""
    try:
        if spec == "all":
            return list(range(n))
        if ":" in spec:
            a, b = (int(x) if x else None for x in spec.split(":"))
            found = list(range(n))[a:b]
            if not found:
                raise UserError(f"--tokens {spec} selects nothing in a text of {n} tokens")
            return found
        return [int(spec)]
    except ValueError:
        raise UserError(f"--tokens {spec!r}: use all, an index such as -1, or a range such as 3:9") from None


def _explain(args, rest) -> None:
    import jax

    import nla_jax
    from nla_jax import bundle

    if args.samples < 1:
        raise UserError(f"--samples {args.samples}: must be at least 1")
    if args.trust is not None and not 0 <= args.trust <= 1:
        raise UserError(f"--trust {args.trust}: must be from 0 to 1")
    nla = nla_jax.load(bundle.bundle_or_shipped(args.bundle), args.target or None)
    positions = choose_tokens(args.tokens, len(nla.tokens(args.text)))
    temperature = args.temperature
    if temperature is None:
        temperature = 1.0 if args.samples > 1 else 0.0
    reports = nla.round_trip(
        args.text,
        positions=positions,
        key=jax.random.key(args.seed),
        temperature=temperature,
        samples=args.samples,
    )
    claims = None
    if args.trust is not None:
        words = [r.explanation for r in reports]
        claims = nla.claims(args.text, [r.position for r in reports], words, args.seed)
    if args.json:
        print(json.dumps(_as_json(reports, claims), indent=1, ensure_ascii=False))
        return
    if claims is not None:
        from nla_jax.evaluate.trust.apply import keep_trusted

        reports = [dataclasses.replace(r, explanation=keep_trusted(r.explanation, c, args.trust))
                   for r, c in zip(reports, claims, strict=True)]
    print_reports(reports, f"{args.bundle or 'shipped'}: what block {nla.spec.layer} holds", args.svg)


def _as_json(reports, claims) -> list[dict]:
    """Return the reports as JSON values, with the claims of each if they were judged."""
    out = [dataclasses.asdict(r) for r in reports]
    if claims is None:
        return out
    return [r | {"claims": [dataclasses.asdict(c) for c in row]} for r, row in zip(out, claims, strict=True)]


def print_reports(reports, title: str, svg: str) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from nla_jax.util.terminal_text import replace_unprintable

    table = Table(title=title, show_lines=True)
    table.add_column("token", no_wrap=True)
    table.add_column("explanation")
    table.add_column("FVE", justify="right")
    table.add_column("cos", justify="right")
    for r in reports:
        # Rich does not strip escape sequences; `replace_unprintable` would also remove line breaks.
        text = "\n".join(map(replace_unprintable, r.explanation.split("\n")))
        text = escape(text) if r.ok else "[dim](no readable explanation)[/dim]"
        table.add_row(escape(repr(r.token)[1:-1]), text, f"{r.fve:.2f}", f"{r.cos:.2f}")
    Console().print(table)
    if svg:
        picture = Console(record=True, width=110, file=io.StringIO())
        picture.print(table)
        picture.save_svg(svg, title="nla explain")
