"""Whatever a sidecar says: it is read as it stands or refused in one line, never anything else."""

import copy

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nla_jax.errors import UserError
from nla_jax.interchange import data_sidecar, sidecar_common
from tests.helpers import official

SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=8),
    st.binary(max_size=4), st.dates(), st.datetimes(),
    st.sampled_from(["", "sqrt_d_model", "{injection_char}", "{explanation}", "{", "{}", "{0}", "rl", 0]),
)
KEYS = st.one_of(st.text(max_size=6), st.integers())
VALUES = st.recursive(
    SCALARS, lambda v: st.lists(v, max_size=3) | st.dictionaries(KEYS, v, max_size=3), max_leaves=6
)


def places(value, at=()):
    yield at
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*at, key))


def placed(value, at, new):
    """`value` with `new` at a place; `...` takes out what is there."""
    if not at:
        return {} if new is ... else new
    out = copy.deepcopy(value)
    block = out
    for key in at[:-1]:
        block = block[key]
    if new is ...:
        del block[at[-1]]
    else:
        block[at[-1]] = new
    return out


@st.composite
def broken(draw, whole: dict):
    """A mapping with one or two of its places, at any depth, given other values, taken out or added to."""
    for _ in range(draw(st.integers(1, 2))):
        at = draw(st.sampled_from(sorted(places(whole), key=str)))
        extra = draw(st.booleans()) and isinstance(whole, dict)
        if extra and len(at) < 2:
            at = (*at, draw(st.text(max_size=6)))
            if len(at) > 1 and not isinstance(whole[at[0]], dict):
                at = at[:1]
        new = draw(st.one_of(VALUES, st.just(...)) if not extra else VALUES)
        whole = placed(whole, at, new)
        if not isinstance(whole, dict):
            break
    return whole


FUZZ = settings(
    max_examples=450, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
WHOLE = {
    **official.sidecar("ar_sft", 4),
    "api_summaries": {"model": "m", "max_tokens": 300, "temperature": 0.5, "instruction_prompt": "{text}"},
    "nla_jax": {"base_fingerprint": "f", "injection_scale": 3.0},
}
WHOLE["extraction"] = {**WHOLE["extraction"], "injection_scale": 150, "mse_scale": "sqrt_d_model"}


@FUZZ
@given(st.data())
def test_any_data_sidecar_is_read_or_refused(tmp_path_factory, data):
    stage = data.draw(st.sampled_from(data_sidecar.DATA_STAGES))
    value = data.draw(broken({**WHOLE, "stage": stage}))
    path = tmp_path_factory.getbasetemp() / "fuzzed.parquet"
    official.write_sidecar(path, value)
    try:
        meta = data_sidecar.read(path)
    except UserError as e:
        assert "\n" not in str(e) and len(str(e)) < 1000
        return
    # What was read is what stands there, of the right kind, and is written and read again as the same.
    assert (meta.row_count, meta.stage) == (value["row_count"], value["stage"])
    assert meta.row_count > 0 and type(meta.row_count) is type(meta.d_model) is int
    assert meta.injection_scale is None or meta.injection_scale > 0
    data_sidecar.write(path, meta)
    assert data_sidecar.read(path) == meta


def test_a_scale_of_ours_survives_where_the_extraction_says_null(tmp_path):
    whole = {**WHOLE, "stage": "base", "extraction": {**WHOLE["extraction"], "injection_scale": None}}
    official.write_sidecar(tmp_path / "a.parquet", whole)
    meta = data_sidecar.read(tmp_path / "a.parquet")
    assert meta.injection_scale == 3.0
    data_sidecar.write(tmp_path / "b.parquet", meta)
    assert data_sidecar.read(tmp_path / "b.parquet") == meta


MODEL = {
    "kind": "nla_model", "schema_version": 2, "role": "av", "d_model": 8,
    "extraction": {"injection_scale": 150.0, "mse_scale": "sqrt_d_model"},
    "tokens": {**official.TOKENS, "critic_suffix_ids": [1, 2]},
    "prompt_templates": {"av": official.AV, "ar": official.AR, "actor": official.AV},
}


@FUZZ
@given(st.data())
def test_any_shared_block_is_read_or_refused(tmp_path_factory, data):
    value, strict = data.draw(broken(MODEL)), data.draw(st.booleans())
    path = tmp_path_factory.getbasetemp() / "nla_meta.yaml"
    path.write_text(yaml.safe_dump(value, sort_keys=False, allow_unicode=True), "utf-8")
    try:
        raw = sidecar_common.read(path)
        tokens = sidecar_common.read_tokens(path, raw, strict=strict)
        templates = sidecar_common.read_templates(path, raw, strict=strict)
        at = sidecar_common.get(path, raw, "extraction", dict)
        scales = [sidecar_common.read_scale(path, at, key, 8) for key in ("injection_scale", "mse_scale")]
    except UserError as e:
        assert "\n" not in str(e) and len(str(e)) < 1000
        return
    written = {"tokens": sidecar_common.write_tokens(tokens)}
    assert sidecar_common.read_tokens(path, written, strict=True) == tokens
    written = {"prompt_templates": sidecar_common.write_templates(templates)}
    assert sidecar_common.read_templates(path, written, strict=True) == templates
    for role in ("av", "ar"):
        if (text := getattr(templates, role)) is not None:
            assert (
                sidecar_common.to_official_template(role, sidecar_common.to_our_template(path, role, text))
                == text
            )
    assert all(s is None or s > 0 for s in scales)


@settings(FUZZ, max_examples=100)
@given(st.one_of(st.text(max_size=60), st.binary(max_size=60).map(lambda b: b.decode("latin-1"))))
def test_any_text_for_a_sidecar_is_refused(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "text.parquet"
    data_sidecar.path_of(path).write_text(text, "utf-8")
    with pytest.raises(UserError):
        data_sidecar.read(path)
