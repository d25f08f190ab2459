"""`nla evaluate`: the grounding table of a bundle."""

import json

from nla_jax.errors import UserError
from nla_jax.util import paths, writable


def add(sub) -> None:
    """Add the command to the subparsers of `nla`."""
    p = sub.add_parser("evaluate", help="compute the grounding table of a bundle on held-out rows")
    p.add_argument("--bundle", default="", help="default: the one that nla_jax ships")
    p.add_argument("--data", default="",
                   help="a store of activations; default: that of the bundle's run, or one in the cache")
    p.add_argument("--splits", default="heldout", help="such as heldout,ood")
    p.add_argument("--probes", default="all",
                   help="families of figures, such as round_trip,form,my_module:function")
    p.add_argument("--rows", type=int, default=0,
                   help="number of evenly spaced rows of each split; default: all")
    p.add_argument("--temperature", type=float, default=1.0)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--target", default="", help="location of the target; default: as in the sidecar")
    p.add_argument("--json", default="", help="also write the figures to this file")
    p.add_argument("--markdown", default="", help="also write the tables to this file")
    p.add_argument("--paraphraser", default="", metavar="SPEC",
                    help="openai:MODEL@URL or anthropic:MODEL; all explanations are sent to it")
    p.add_argument("--key-env", default="", metavar="NAME", help="the environment variable with URL's key")
    p.add_argument("--yes", action="store_true", help="send them without confirmation")
    p.set_defaults(work=_evaluate)


def _evaluate(args, rest) -> None:
    from rich.console import Console

    from nla_jax import bundle
    from nla_jax.evaluate import figure_table
    from nla_jax.pipeline import grounding

    writable.check_outputs(args.json, args.markdown)
    probes, splits = args.probes.split(","), args.splits.split(",")
    name, args.bundle = args.bundle or "shipped", bundle.bundle_or_shipped(args.bundle)
    found = grounding.evaluate_bundle(
        args.bundle,
        data=args.data,
        splits=splits,
        probes=probes,
        rows=args.rows,
        temperature=args.temperature,
        seed=args.seed,
        target=args.target or None,
        paraphraser=_paraphraser(args, splits, probes) if args.paraphraser else None,
    )
    out, page = {}, []
    for split, t in found.items():
        said, missing = [f"- {s}" for s in t.verdict], [f"left out: {s}" for s in t.left_out]
        title = figure_table.split_title(split, t.note)
        Console().print(f"\n{title}: {name}\n", "\n".join(said), "\n", sep="", markup=False)
        Console().print(figure_table.table({"value": t.figures}, f"{title}: {name}"))
        Console().print("\n".join(missing), markup=False)
        out[split] = t.as_json()
        page += [f"## {title}", "", *said, "", *figure_table.markdown({"value": t.figures}), "", *missing, ""]
    if args.json:
        paths.write(paths.path(args.json), json.dumps(out, indent=1, ensure_ascii=False))
    if args.markdown:
        paths.write(paths.path(args.markdown), "\n".join(page))


def _paraphraser(args, splits: list[str], probes: list[str]):
    from nla_jax.data import store
    from nla_jax.evaluate.words import paraphrase
    from nla_jax.pipeline import held_out_rows
    from nla_jax.providers import consent

    if not {"all", "meaning"} & set(probes):
        raise UserError("--paraphraser is for the probe meaning: add it to --probes, or omit --paraphraser")
    data = paths.path(args.data) if args.data else held_out_rows.store_of(args.bundle, args.target or None)
    there, journal = (
        store.read_meta(data)["splits"],
        held_out_rows.evaluation_dir(args.bundle) / "paraphrases.journal",
    )
    texts = sum(args.rows or there.get(s, {"rows": 0})["rows"] for s in splits)
    return paraphrase.make_paraphraser(
        args.paraphraser, journal, texts=texts, key_env=args.key_env,
        ask_for=lambda what: consent.ask_consent(what, args.yes))
