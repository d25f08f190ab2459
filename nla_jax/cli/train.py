"""`nla train`: run the unfinished stages of a config."""

from nla_jax.cli import config_arguments, flags, parser
from nla_jax.pipeline import experiment_files
from nla_jax.util import paths
from nla_jax.util.terminal_text import console


def add(sub) -> None:
    """Add the command to the subparsers of `nla`."""
    p = parser.add(sub, "train", "run the stages of a config that are not finished in RUN",
                   "nla train --config experiments/quickstart.py --workdir runs/mine --config.seed=1")
    config_arguments.add(p)
    p.add_argument("--from", dest="source", default="", metavar="RUN",
                    help="another run, whose finished stages are reused if the settings agree")
    flags.add_wandb(p, "track the run: config, metrics, samples, figures")
    p.add_argument("--profile-steps", default="", metavar="[STAGE:]FIRST:END",
                   help="trace these steps of a training stage, or of every one, for Perfetto and XProf; "
                        "such as rl:10:13")
    p.set_defaults(work=_train, takes_config=True)


def _train(args, rest) -> None:
    from nla_jax.evaluate import figure_table
    from nla_jax.pipeline import stages
    from nla_jax.util import distributed, progress
    from nla_jax.view import markdown_report

    config = experiment_files.load_config(args.config, rest)
    config.wandb = args.wandb or config.wandb
    config.profile_steps = args.profile_steps or config.profile_steps
    with distributed.raise_on_sigterm(), progress.plain_progress(args.plain):
        summary = stages.run(config, args.workdir, source=args.source)
    if not distributed.is_first():
        return
    notes = summary.get("notes", {})  # older runs have none
    for split in summary["rl"]:
        columns = {
            name: markdown_report.figures_of(summary, key, split)
            for name, key in markdown_report.COLUMNS.items()
        }
        title = figure_table.split_title(split, notes.get(split, ""))
        console().print(figure_table.table(columns, f"{title}: {args.workdir}"))
    for note in notes.values():
        console().print(note, markup=False)
    print(f"summary: {paths.path(args.workdir) / 'summary.json'}")
