"""Experiment files: reads their config and applies `--config.key=value` overrides."""

from pathlib import Path

from nla_jax.errors import UserError, did_you_mean
from nla_jax.util import paths


def shipped() -> Path:
    """Return the directory of the experiment files, in an installed package or in a checkout."""
    package = Path(__file__).parents[1]
    inside = package / "experiments"
    return inside if inside.is_dir() else package.parent / "experiments"


def load_config(config: str, overrides: list[str]):
    """Load an experiment file's config with `--config.key=value` overrides, applied by ml_collections.

    experiments/NAME.py is the file that nla_jax ships, if there is none in the working directory.

    Raises UserError for a missing file, an error in it, an unknown key or a value of the wrong type.
    """
    from nla_jax import configs

    path, colon, argument = paths.expand(config).partition(":")
    if not Path(path).is_file() and Path(path).parent == Path("experiments"):
        ours = shipped() / Path(path).name
        path = str(ours) if ours.is_file() else path
    if not Path(path).is_file():
        there = [str(p) for p in Path(path).parent.glob("*.py")]
        hint = did_you_mean(path, there) or "; `nla config list` shows those that there are"
        raise UserError(f"no config file {path!r}{hint}")
    known = sorted(configs.keys(configs.default()))
    for o in overrides:
        key, equals, _ = o.removeprefix("--config.").partition("=")
        if not o.startswith("--config.") or not equals:
            raise UserError(f"unknown argument {o!r}; config overrides look like --config.rl.steps=10")
        if key not in known:
            hint = did_you_mean(key, known) or "; `nla config print` lists the keys"
            raise UserError(f"unknown config key {key!r}{hint}")
    return _read_config(path, ["nla", f"--config={path}{colon}{argument}", *overrides])


def _read_config(path: str, argv: list[str]):
    from absl import flags
    from ml_collections import config_flags

    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values, lock_config=True, sys_argv=argv)
    try:
        values(argv)
        return values.config
    except flags.Error as e:  # it may end with the traceback of a get_config that rejects the ARG
        text = str(e).strip()
        raise UserError(f"{path}: {text.splitlines()[-1] if 'Traceback' in text else text}") from e
    except Exception as e:  # the file's code may raise any class
        raise UserError(f"{path}: {type(e).__name__}: {' '.join(str(e).split())[:400]}") from e
