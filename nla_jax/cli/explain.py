"""`nla explain`: explain the tokens of a text, or many texts or activations."""

import dataclasses
import io

from nla_jax.cli import explain_file, flags, parser
from nla_jax.errors import UserError
from nla_jax.util import paths, utf8, writable
from nla_jax.util.number_types import real


def add(sub) -> None:
    """Add the command to the subparsers of `nla`."""
    p = parser.add(sub, "explain", "explain tokens of a text or of many, or any vectors",
                   'nla explain --text "The cat sat on the" --tokens=-3: --samples 4')
    flags.add_bundle(p)
    flags.add_dtype(p)
    p.add_argument("--text", default=None, help="the text that the target reads")
    p.add_argument("--tokens", default="all", metavar="WHICH",
                   help="all, an index (-1 is the last), or a range 3:9")
    p.add_argument("--rendered", action="store_true",
                   help="the text is a chat that the target's template made, with its special tokens")
    p.add_argument("--samples", type=flags.COUNT, default=1, metavar="N", help="explanations of each token")
    flags.add_temperature(p, None, "of sampling; 0 is greedy; default: 0, or 1 with --samples")
    flags.add_seed(p, "of sampling")
    flags.add_target(p)
    p.add_argument("--trust", type=real(0, 1), default=None, metavar="P",
                   help="hide claims whose probability of being true is below P; default: show all")
    flags.add_json(p)
    flags.add_file(p, "svg", "the table as a picture")
    explain_file.add_flags(p)
    p.set_defaults(work=_explain)


def choose_tokens(spec: str, n: int) -> list[int]:
    """Return the token indices of "all", "-1" or "3:9" in a text of n tokens. Raises UserError."""
    found = _check_tokens(spec)
    if isinstance(found, int):
        return [found]
    if not (chosen := list(range(n))[found]):
        raise UserError(f"--tokens {spec} selects nothing in a text of {n} tokens")
    return chosen


def _check_tokens(spec: str) -> int | slice:
    try:
        if ":" not in spec:
            return slice(None) if spec == "all" else int(spec)
        first, end = (int(x) if x else None for x in spec.split(":"))
        return slice(first, end)
    except ValueError:
        raise UserError(f"--tokens {spec!r}: use all, an index such as -1, or a range such as 3:9") from None


def _explain(args, rest) -> None:
    from nla_jax import api
    from nla_jax.util.keys import new_key

    if explain_file.is_asked(args):
        explain_file.work(args)
        return
    _check_tokens(args.tokens)
    writable.check_outputs(args.json, args.svg)
    utf8.check(args.text, "--text")
    positions: list[int] = []

    def choose(spec, tok) -> None:
        n = len(api.ids_of(spec, tok, args.text, args.rendered))
        positions.extend(choose_tokens(args.tokens, n))
        api.check_positions(positions, n)

    # A wrong text or token is found before the weights are read, which takes minutes for a large model.
    nla = api.load(flags.find_bundle(args), args.target or None, check=choose, dtype=args.dtype,
                   whole_target=args.trust is not None, announce=True)
    temperature = args.temperature
    if temperature is None:
        temperature = 1.0 if args.samples > 1 else 0.0
    reports = nla.round_trip(
        args.text,
        positions=positions,
        key=new_key(args.seed),
        temperature=temperature,
        samples=args.samples,
        rendered=args.rendered,
    )
    claims = None
    if args.trust is not None:
        words = [r.explanation for r in reports]
        where = [r.position for r in reports]
        claims = nla.claims(args.text, where, words, seed=args.seed, rendered=args.rendered)
    if flags.put_json(args.json, _as_json(reports, claims)):
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

    from nla_jax.util.terminal_text import console, replace_unprintable

    table = Table(title=escape(title), show_lines=True)
    table.add_column("token", overflow="fold")
    table.add_column("explanation")
    table.add_column("FVE", justify="right", overflow="fold")
    table.add_column("cos", justify="right", overflow="fold")
    for r in reports:
        # Rich does not strip escape sequences; `replace_unprintable` would also remove line breaks.
        text = "\n".join(map(replace_unprintable, r.explanation.split("\n")))
        text = escape(text) if r.ok else "[dim](no readable explanation)[/dim]"
        table.add_row(escape(repr(r.token)[1:-1]), text, f"{r.fve:.2f}", f"{r.cos:.2f}")
    console().print(table)
    if svg:
        picture = Console(record=True, width=110, file=io.StringIO())
        picture.print(table)
        picture.save_svg(paths.expand(svg), title="nla explain")
