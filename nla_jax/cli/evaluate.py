"""`nla evaluate`: the grounding table of a bundle."""

from nla_jax.cli import flags, parser
from nla_jax.errors import UserError
from nla_jax.util import path_kinds, paths, writable
from nla_jax.util.number_types import whole
from nla_jax.util.terminal_text import console


def add(sub) -> None:
    """Add the command to the subparsers of `nla`."""
    p = parser.add(sub, "evaluate", "compute the grounding table of a bundle on held-out rows",
                   "nla evaluate --bundle runs/quickstart/bundle --probes round_trip --json figures.json")
    flags.add_bundle(p)
    flags.add_dtype(p)
    flags.add_store(p, about="the activations; default: those of the bundle's run, or a store in the cache")
    p.add_argument("--splits", default="heldout", metavar="NAME,…", help="such as heldout,ood")
    p.add_argument("--probes", default="all", metavar="NAME,…",
                   help="families of figures, such as round_trip,form,my_module:function")
    p.add_argument("--rows", type=whole(0), default=0, metavar="N",
                   help="number of evenly spaced rows of each split; default: all")
    flags.add_temperature(p, 1.0)
    flags.add_seed(p, "of sampling")
    flags.add_target(p)
    flags.add_json(p)
    flags.add_file(p, "markdown", "the tables")
    flags.add_wandb(p, "add the tables and the verdict to the run")
    p.add_argument("--paraphraser", default="", metavar="SPEC",
                    help="openai:MODEL@URL or anthropic:MODEL; all explanations are sent to it")
    p.add_argument("--judge", default="", metavar="SPEC",
                   help="an LLM that judges claims beside the rules: as --paraphraser, or module:function, "
                        "or target; explanations and their texts are sent to it")
    p.add_argument("--key-env", default="", metavar="NAME", help="the environment variable with URL's key")
    flags.add_price(p)
    p.add_argument("--yes", action="store_true", help="send them without confirmation")
    p.set_defaults(work=_evaluate)


def _evaluate(args, rest) -> None:
    from nla_jax.evaluate import figure_table, verdict
    from nla_jax.pipeline import grounding, tracking
    from nla_jax.util import wandb_log

    writable.check_outputs(args.json, args.markdown)
    if args.wandb:
        wandb_log.check(args.wandb)
    probes, splits = args.probes.split(","), args.splits.split(",")
    name, args.bundle = args.bundle or "shipped", flags.find_bundle(args)
    args.store = args.store and path_kinds.store_in(args.store)
    found = grounding.evaluate_bundle(
        args.bundle,
        data=args.store,
        splits=splits,
        probes=probes,
        rows=args.rows,
        temperature=args.temperature,
        seed=args.seed,
        target=args.target or None,
        paraphraser=_asker(args, splits, probes, "paraphraser") if args.paraphraser else None,
        judge=_asker(args, splits, probes, "judge") if args.judge else None,
        dtype=args.dtype,
    )
    out, page = {}, []
    for split, t in found.items():
        said, missing = [f"- {s}" for s in t.verdict], [f"left out: {s}" for s in t.left_out]
        title = figure_table.split_title(split, t.note)
        if args.json != "-":
            about = f"\n{title}: {name}\n{verdict.TERMS}\n\n"
            console().print(about, "\n".join(said), "\n", sep="", markup=False)
            console().print(figure_table.table({"value": t.figures}, f"{title}: {name}"))
            console().print("\n".join(missing), markup=False)
        out[split] = t.as_json()
        table = figure_table.markdown({"value": t.figures})
        page += [f"## {title}", "", verdict.TERMS, "", *said, "", *table, "", *missing, ""]
    flags.put_json(args.json, out)
    if args.wandb:
        tracking.log_grounding(args.wandb, args.bundle, found)
    if args.markdown:
        paths.write(paths.path(args.markdown), "\n".join(page))


# What asks another model -> (its probe, its journal).
ASKERS = {"paraphraser": ("meaning", "paraphrases.journal"), "judge": ("claims", "judgements.journal")}


def _asker(args, splits: list[str], probes: list[str], what: str):
    from nla_jax.data import store
    from nla_jax.evaluate.words import claim_judge, paraphrase
    from nla_jax.pipeline import held_out_rows
    from nla_jax.providers import consent
    from nla_jax.providers.scheduler import Settings

    probe, journal = ASKERS[what]
    if not {"all", probe} & set(probes):
        raise UserError(f"--{what} is for the probe {probe}: add it to --probes, or omit --{what}")
    data = paths.path(args.store) if args.store else held_out_rows.store_of(args.bundle, args.target or None)
    there = store.read_meta(data)["splits"]
    make = {"paraphraser": paraphrase.make_paraphraser, "judge": claim_judge.make_judge}[what]
    return make(
        getattr(args, what), held_out_rows.evaluation_dir(args.bundle) / journal,
        texts=sum(args.rows or there.get(s, {"rows": 0})["rows"] for s in splits),
        key_env=args.key_env, settings=Settings(price=args.price),
        ask_for=lambda said: consent.ask_consent(said, args.yes))
