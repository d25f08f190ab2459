"""The config: every key known, every value of its type, no impossible combination."""

import pytest

from nla_jax import configs
from nla_jax.errors import UserError
from nla_jax.pipeline import config_checks
from nla_jax.pipeline.experiment_files import load_config
from nla_jax.util import hardware

# ml_collections loads experiment files in an old way.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

EXPERIMENT = "from nla_jax import configs\n\n\ndef get_config(arg='a'):\n    c = configs.default()\n"


def changed(**values):
    """The defaults with dotted keys (a double underscore for the dot) set to other values."""
    c = configs.default()
    c.update_from_flattened_dict({k.replace("__", "."): v for k, v in values.items()})
    return c


@pytest.fixture
def experiment(tmp_path):
    path = tmp_path / "experiment.py"
    path.write_text(EXPERIMENT + "    c.rl.steps = 7\n    return c\n", "utf-8")
    return str(path)


def refusal(call, *args) -> str:
    """The message of the UserError that the call raises: always one line."""
    with pytest.raises(UserError) as e:
        call(*args)
    assert "\n" not in str(e.value) and "Traceback" not in str(e.value)
    return str(e.value)


def test_defaults_are_possible_and_locked():
    c = config_checks.lock(configs.default())
    assert c.is_locked
    with pytest.raises(AttributeError):
        c.rl.no_such_key = 1


@pytest.mark.parametrize("given,settled", [("auto", "float32"), ("bfloat16", "bfloat16")])
def test_auto_becomes_the_dtype_of_the_hardware(monkeypatch, given, settled):
    monkeypatch.setattr(hardware, "product_dtype", lambda: "float32")
    c = configs.default()
    c.dtype = given
    assert config_checks.lock(c).dtype == settled


def test_unknown_and_missing_keys():
    c = configs.default()
    c.rl.grop = 4
    assert "unknown config key 'rl.grop'" in refusal(config_checks.validate, c)
    c = configs.default()
    del c.eval.bootstrap
    assert "'eval.bootstrap' is missing" in refusal(config_checks.validate, c)


IMPOSSIBLE = [
    (dict(dtype="float16"), "dtype='float16': must be one of 'float32', 'bfloat16', 'auto'"),
    (dict(av__affine="ridge"), "av.affine='ridge'"),
    (dict(av__injection="add"), "av.injection='add': must be one of 'replace', 'norm_matched'"),
    (dict(rl__reward="cosine"), "rl.reward='cosine'"),
    (dict(rl__advantage="rank"), "rl.advantage='rank'"),
    (dict(data__explanation_lines="middle"), "data.explanation_lines='middle'"),
    (dict(ar__kind="target"), "ar.kind='target': must be one of 'trained', 'frozen'"),
    (dict(warm_av__loss_mean="rows"), "warm_av.loss_mean='rows': must be one of 'tokens', 'sequences'"),
    (dict(rl__loss_mean=""), "rl.loss_mean='': must be one of 'tokens', 'sequences'"),
    (dict(lessons_av__form="short"), "lessons_av.form='short': must be one of 'drill', 'full'"),
    (dict(lessons_av__form="drill", lessons_av__steps=5, warm_av__steps=0), "give warm_av some steps"),
    (dict(data__explained_positions=0), "data.explained_positions=0: must be from 1 to"),
    (dict(data__explained_positions=4), "data.explained_positions=4: the last line of an"),
    (dict(data__explained_positions=4, data__explanation_lines="first+last"), '"first"'),
    (dict(data__ending_tokens=-1), "data.ending_tokens=-1: must be 0 (no ending line), or from 1 to"),
    (dict(data__ending_tokens=0, lessons_ar__steps=5), "data.ending_tokens=0: reading lessons are"),
    (dict(data__ending_tokens=0, warm_av__lessons=0.5), "data.ending_tokens=0: reading lessons are"),
    (dict(warm_av__lessons=1.0), "warm_av.lessons=1.0: must be from 0 to 0.999"),
    (dict(warm_av__lessons=-0.1), "warm_av.lessons=-0.1"),
    (dict(warm_av__lessons=0.5, warm_av__micro=8, lessons_av__batch=12), "warm_av.micro=8 does not divide"),
    (dict(rl__batch=0), "rl.batch=0: must be from 1 to"),
    (dict(data__positions=0), "data.positions=0"),
    (dict(warm_av__max_tokens=0), "warm_av.max_tokens=0"),
    (dict(rl__steps=-1), "rl.steps=-1: must be from 0 to"),
    (dict(ar__rank=-1), "ar.rank=-1"),
    (dict(data__heldout_rows=-5), "data.heldout_rows=-5"),
    (dict(warm_ar__lr=0.0), "warm_ar.lr=0.0: must be from 1e-07 to 1"),
    (dict(rl__lr_av=1.5), "rl.lr_av=1.5"),
    (dict(rl__group=1), "rl.group=1: must be from 2 to"),
    (dict(rl__micro_av=3), "rl.micro_av=3 does not divide the 64 rows"),
    (dict(warm_ar__micro=0), "warm_ar.micro=0"),
    (dict(data__min_position=128), "leaves no position in windows of data.window_tokens=128"),
    (dict(data__positions=100), "data.positions=100: a window has only 78"),
    (dict(data__warm_fraction=1.0), "data.warm_fraction=1.0"),
    (dict(data__explanations=""), "data.explanations is empty but warm_av/warm_ar have steps"),
    (dict(warm_av__steps=0), "AV and AR both need a warm start"),
    (dict(rl__watch_rows=1), "rl.watch_rows=1: must be from 2 to"),
    (dict(alpha=-1.0), "alpha=-1.0"),
    (dict(layer=-2), "layer=-2"),
    (dict(data__rl_windows=0), "data.rl_windows=0: rl reads windows"),
]


@pytest.mark.parametrize(
    "values,message", IMPOSSIBLE, ids=lambda v: next(iter(v)) if isinstance(v, dict) else ""
)
def test_impossible(values, message):
    assert message in refusal(config_checks.validate, changed(**values))


@pytest.mark.parametrize(
    "values",
    [
        dict(ar__kind="frozen", warm_ar__steps=0),  # the frozen target needs no start
        dict(lessons_av__form="drill", lessons_av__steps=5),
        dict(lessons_av__form="drill", warm_av__steps=0, lessons_av__steps=0, init="runs/bundle"),
        dict(data__explained_positions=4, data__explanation_lines="first"),
        dict(data__ending_tokens=0),
        dict(warm_av__lessons=0.9),
    ],
    ids=lambda v: next(iter(v)),
)
def test_possible(values):
    config_checks.validate(changed(**values))


def test_differences_names_keys():
    stored, present = configs.default().to_dict(), changed(rl__steps=3, seed=9)
    found = {d.key: (d.stored, d.present) for d in configs.differences(stored, present)}
    assert found == {"rl.steps": (100, 3), "seed": (0, 9)}


def test_overrides(experiment):
    c = load_config(experiment, ["--config.rl.kl=0.5", "--config.data.ood=", "--config.remat=false"])
    assert (c.rl.steps, c.rl.kl, c.data.ood, c.remat) == (7, 0.5, "", False)
    assert load_config(f"{experiment}:b", []).rl.steps == 7


@pytest.mark.parametrize(
    "override,message",
    [
        ("--config.rl.steps=ten", "rl.steps"),
        ("--config.rl.steps=1.5", "rl.steps"),
        ("--config.remat=maybe", "remat"),
        ("--config.rl.stepz=1", "unknown config key 'rl.stepz'; did you mean 'rl.steps'?"),
        ("--config.qqqq=1", "unknown config key 'qqqq'; `nla config print` lists the keys"),
        ("--config.rl=1", "unknown config key 'rl'"),
        ("--config.rl.steps", "unknown argument '--config.rl.steps'"),
        ("--steps=1", "unknown argument '--steps=1'"),
        ("stray", "unknown argument 'stray'"),
    ],
)
def test_bad_overrides(experiment, override, message):
    assert message in refusal(load_config, experiment, [override])


@pytest.mark.parametrize(
    "source,message",
    [
        ("    c.rl.steps = 'ten'\n    return c\n", "steps"),
        ("    c.no_such.key = 1\n    return c\n", "no_such"),
        ("    return c +\n", "SyntaxError"),
        ("    1 / 0\n", "ZeroDivisionError"),
    ],
)
def test_bad_experiment_files(tmp_path, source, message):
    path = tmp_path / "broken.py"
    path.write_text(EXPERIMENT + source, "utf-8")
    found = refusal(load_config, str(path), [])
    assert message in found and "broken.py" in found


def test_missing_experiment_file(tmp_path):
    assert "no config file" in refusal(load_config, str(tmp_path / "none.py"), [])
