"""Every family of models against transformers in PyTorch, and the NLA's own parts on such models."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

import nla_jax
from nla_jax import bundle, objectives, reconstructor, specs, verbalizer
from nla_jax.data import store
from nla_jax.errors import UserError
from nla_jax.evaluate.probes import patch
from nla_jax.lm import generate, lora, model, weights
from nla_jax.lm import params as params_lib
from nla_jax.lm import tokenizer as tok_lib
from nla_jax.lm.config import LMConfig
from nla_jax.pipeline import stages
from nla_jax.sharding import rules
from tests.helpers import family_pairs, parity_table, tiny, world
from tests.helpers.family_pairs import CASES, LENGTHS, WINDOW, capture, logits_of, made, texts

TOLERANCE = 1e-4  # float32: largest error over the root mean square
# bfloat16 matrices against float32 ones: root mean square, and largest, error over the same.
BAND_RMS, BAND_MAX = 0.03, 0.5
# Rounding makes a router choose other experts, and a recurrent state carries it on. So the bounds are also
# these times the errors of transformers' own model in bfloat16.
WIDE_RMS, WIDE_MAX = 0.12, 3.0
TIMES_RMS, TIMES_MAX = 1.2, 2.0


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    yield tmp_path_factory.mktemp("families")
    made.cache_clear()


@pytest.fixture(params=list(CASES))
def pair(request, root):
    return made(request.param, root)


# Against transformers


@pytest.mark.parametrize("side", ["right", "left"])
def test_logits_and_every_block(pair, side):
    assert family_pairs.logits_errors(pair, pair.params, side)[0] < TOLERANCE
    assert family_pairs.hidden_error(pair, pair.params, side) < TOLERANCE


def test_bfloat16(pair):
    """Products in bfloat16 stay in the band around transformers' float32."""
    most, rms = family_pairs.logits_errors(pair, model.cast(pair.params, jnp.bfloat16))
    if not (pair.cfg.experts or pair.cfg.linear):
        assert rms < BAND_RMS and most < BAND_MAX
        return
    their_most, their_rms = family_pairs.torch_bfloat16_errors(pair)
    assert rms < TIMES_RMS * their_rms and most < TIMES_MAX * their_most
    if not (pair.cfg.experts and pair.cfg.linear):  # with both, transformers itself is beyond these
        assert rms < WIDE_RMS and most < WIDE_MAX


def test_settings_matter(pair):
    """Without any one of the settings that its family adds, a model computes something else."""
    ids_BT, valid_BT = texts()
    want = logits_of(pair.params, pair.cfg, ids_BT, valid_BT)
    plain = dict(rope_scaling=(), local_rope_theta=None, activation="silu", scale_embed=False,
                 query_scalar=None, attn_softcap=None, final_softcap=None)
    plain |= dict(rotary_dim=0, v_norm=False, block_scale=False, experts_beside=False, shared_expert=False)
    if not pair.cfg.experts_beside:  # there a norm follows, which removes the scale of a mixture
        plain |= dict(experts_normed=False)
    changes = [{k: v} for k, v in plain.items() if getattr(pair.cfg, k) != v]
    if pair.cfg.local:
        changes += [dict(window=pair.cfg.window + 1)]
    if pair.cfg.local and not pair.cfg.global_heads:
        changes += [dict(window=0, local=())]
    for change in changes:
        other = dataclasses.replace(pair.cfg, **change)
        known = params_lib.table(other)
        blocks = {k: v for k, v in pair.params["blocks"].items() if f"blocks/{k}" in known}
        got = logits_of({**pair.params, "blocks": blocks}, other, ids_BT, valid_BT)
        assert tiny.relative(got[valid_BT], want[valid_BT]) > 100 * TOLERANCE, change
    optional = {"wq_bias", "wk_bias", "q_norm", "global_k_norm", "attn_post_norm", "attn_norm"}
    for name in optional & pair.params["blocks"].keys():
        rest = {k: v for k, v in pair.params["blocks"].items() if k != name}
        got = logits_of({**pair.params, "blocks": rest}, pair.cfg, ids_BT, valid_BT)
        # The bias of the keys adds the same to a whole row of scores, but for rotary embedding.
        assert tiny.relative(got[valid_BT], want[valid_BT]) > 10 * TOLERANCE, name


def test_configurations(root):
    """What is local, scaled and tied, as LMConfig has it."""
    got = {name: made(name, root).cfg for name in CASES}
    assert got["llama"].local == () and got["llama"].window == 0 and not got["llama"].tied
    assert got["llama llama3"].rope_scaling == ("llama3", 8.0, 1.0, 4.0, 64)
    assert got["llama linear"].rope_scaling == ("linear", 3.0)
    assert got["mistral"].local == (True,) * 4 and got["mistral"].window == WINDOW
    assert got["mistral tied global"].local == ()
    assert got["qwen2"].local == () and got["qwen2"].qkv_bias
    assert got["qwen2 window untied"].local == (False, False, True, True)
    assert got["qwen3"].head_dim == 16 and got["qwen3"].qk_norm
    assert got["olmo2"].n_kv_heads == 4 and got["olmo2"].qk_norm_whole and not got["olmo2"].pre_norms
    assert got["olmo3"].local == (True, True, True, False) and got["olmo3"].local_rope_theta == 100.0
    assert got["olmo3"].rope_scaling == ("yarn", 8.0, 8.0, 1, 64, 0.1 * np.log(8) + 1)
    assert got["phi3"].rotary_dim == 12 and got["phi3"].local == (True,) * 4
    assert got["qwen3_moe"].experts == (8, 3, 24) and got["qwen3_moe"].experts_normed
    assert not got["qwen3_moe tied"].experts_normed
    assert got["qwen3_5_text"].linear == (True, True, True, False) and got["qwen3_5_text"].rotary_dim == 8
    assert got["qwen3_5"].linear == (True, True, True, False, True) and got["qwen3_5"].tied
    shared = got["qwen3_5_moe_text"]
    assert shared.shared_expert and shared.d_ff == 40 and shared.experts == (8, 3, 24) and shared.linear
    assert got["qwen3_5"].first_blocks(4).linear == got["qwen3_5_text"].linear
    assert got["gemma2"].local == (True, False, True, False) and got["gemma2"].query_scalar == 24
    assert got["gemma3"].local == (True,) * 5 + (False, True)
    assert got["gemma3"].local_rope_theta == 100.0 and got["gemma3"].rope_theta == 5000.0
    assert got["gemma3"] == got["gemma3_text"]
    assert got["gemma4_text"].global_heads == (1, 32) and got["gemma4_text"].global_k_is_v
    assert got["gemma4_text"].rope_scaling == ("proportional", 0.25)
    assert got["gemma4_text untied"].global_heads == (4, 32) and got["gemma4_text untied"].n_kv_heads == 4
    assert not got["gemma4_text untied"].global_k_is_v and not got["gemma4_text untied"].experts
    assert got["gemma4_text"] == dataclasses.replace(
        got["gemma4"], experts=(8, 3, 24), experts_normed=True, experts_beside=True)
    assert got["gemma4"].first_blocks(2).global_heads == () and got["gemma4"].of_blocks(2, 4).local == ()
    assert got["gemma3"].first_blocks(3).local == (True,) * 3
    assert got["qwen2 window untied"].first_blocks(2).local == ()
    assert got["gemma3"].of_blocks(5, 7).local == (False, True)


# Cached decoding and pieces

def test_decoding_token_by_token_is_the_full_forward(pair):
    assert family_pairs.decoding_error(pair) < TOLERANCE


@pytest.mark.parametrize("name", ["mistral", "gemma2", "gemma3", "gemma4_text", "olmo3"])
def test_forward_in_pieces(root, name):
    """`past` and `join` with windows: a shared piece, one with padding on the right, the rest."""
    pair = made(name, root)
    cfg, params = pair.cfg, pair.params
    ids_BT = tiny.random_ids(np.random.default_rng(1), (3, 90), 90)
    ids_BT[:, :40] = ids_BT[0, :40]
    valid_BT = np.ones((3, 90), bool)
    valid_BT[1, 45:50] = False
    forward = jax.jit(model.forward, static_argnums=1, static_argnames="keep_kv")
    piece = functools.partial(forward, params, cfg, keep_kv=True)
    x = model.embed(params, cfg, ids_BT)
    want, _ = piece(x, valid_BT)
    a, kv = piece(x[:1, :40], valid_BT[:1, :40])
    b, kv_b = piece(x[:, 40:50], valid_BT[:, 40:50], past=kv)
    c, _ = piece(x[:, 50:], valid_BT[:, 50:], past=model.join(kv, kv_b))
    got = jnp.concatenate([jnp.repeat(a, 3, 0), b, c], 1)
    assert tiny.relative(got[valid_BT], want[valid_BT]) < TOLERANCE


def test_blocks_in_two_halves(root):
    """The upper blocks alone, by `LMConfig.of_blocks`, go on where the lower ones stopped."""
    pair = made("gemma3", root)
    cfg, params = pair.cfg, pair.params
    ids_BT, valid_BT = texts()
    x = model.embed(params, cfg, ids_BT)
    want, _ = model.forward(params, cfg, x, valid_BT)
    x, _ = model.forward(params_lib.truncate(params, 3), cfg, x, valid_BT)
    upper = {"blocks": jax.tree.map(lambda a: a[3:], params["blocks"])}
    got, _ = model.forward(upper, cfg.of_blocks(3, 7), x, valid_BT)
    assert tiny.relative(got[valid_BT], want[valid_BT]) < 1e-5


# The NLA's own parts on such models

SANDWICH = dataclasses.replace(
    tiny.lm(n_blocks=3), window=9, local=(True, True, False), local_rope_theta=50.0, qk_norm=True,
    post_norms=True, activation="gelu_tanh", scale_embed=True, final_softcap=2.0, attn_softcap=3.0,
    rope_scaling=("linear", 4.0),
)
BIASED = dataclasses.replace(tiny.lm(n_blocks=3), qkv_bias=True, window=9, local=(False, True, True))


def random_params(cfg, seed=0):
    """`tiny.params`, biases shaken too."""
    tree = tiny.params(cfg, seed)
    for i, name in enumerate(n for n in tree["blocks"] if "bias" in n):
        noise = jax.random.normal(jax.random.key(50 + i), tree["blocks"][name].shape)
        tree["blocks"][name] = 0.5 * noise
    return tree


@pytest.mark.parametrize("cfg", [SANDWICH, BIASED], ids=["sandwich", "biased"])
@pytest.mark.parametrize("rank", [0, 4])
def test_stored_log_probs_are_the_scorers(cfg, rank):
    """`verbalizer.write` against `response_hidden` + `token_scores`, every token written."""
    spec, base = tiny.spec(), random_params(cfg)
    av = verbalizer.init(base, cfg, rank=rank, key=jax.random.key(5))
    if rank:
        av = jax.tree.map(lambda a: a + 0.02, av)
    assert tiny.flat(av).keys() == verbalizer.table(cfg, rank=rank).keys()

    @jax.jit
    def both(av, h_BD):
        params = verbalizer.weights(base, av)
        e_BD = verbalizer.inject(av, h_BD, spec.alpha)
        keys = generate.row_keys(jax.random.key(0), jnp.arange(6))
        out = verbalizer.write(params, cfg, spec.av, e_BD, keys, group=2, max_new=20)
        e_ND = jnp.repeat(e_BD, 2, 0)
        x = verbalizer.response_hidden(params, cfg, spec.av, e_ND, out.ids_BT)
        logp, _, _ = objectives.token_scores(
            params, cfg, x.reshape(-1, x.shape[-1]), out.ids_BT.reshape(-1), chunk=50)
        # The marker's embedding is replaced after the scale: its norm is alpha exactly.
        ids = jnp.array([*spec.av.before, spec.av.marker, *spec.av.after])
        ids = jnp.concatenate([jnp.repeat(ids[None], 6, 0), out.ids_BT[:, :-1]], 1)
        whole = model.embed(params, cfg, ids).at[:, len(spec.av.before)].set(e_ND)
        y, _ = model.forward(params, cfg, whole, jnp.ones(ids.shape, bool))
        return out, logp.reshape(out.ids_BT.shape), x, y[:, -x.shape[1] :]

    out, logp, x, y = both(av, tiny.activations(3))
    written = np.arange(20)[None] < out.length_B[:, None]
    assert written.sum() > 60
    np.testing.assert_allclose(out.logp_BT[written], logp[written], atol=1e-4)
    assert tiny.relative(x, y) < 1e-5


def test_embeddings_are_scaled_where_the_family_does():
    params = random_params(SANDWICH)
    ids = jnp.arange(20)[None]
    raw = params["embed"][:20]
    np.testing.assert_allclose(model.embed(params, SANDWICH, ids)[0], raw * 32**0.5, rtol=1e-6)
    np.testing.assert_array_equal(model.embed(params, BIASED, ids)[0], raw)
    low = model.cast(params, jnp.bfloat16)
    want = low["embed"][:20] * jnp.bfloat16(32**0.5)
    np.testing.assert_array_equal(model.embed(low, SANDWICH, ids)[0], want.astype(jnp.float32))


def test_adapters_beside_biases_and_casts():
    params = random_params(BIASED)
    ids_BT = tiny.random_ids(np.random.default_rng(0), (2, 30))
    valid_BT = np.ones((2, 30), bool)
    adapter = jax.tree.map(lambda a: a + 0.05, lora.init(BIASED, 4, jax.random.key(1)))
    attached = lora.attach(params, adapter)
    want = logits_of(lora.merge(attached), BIASED, ids_BT, valid_BT)
    assert tiny.relative(logits_of(attached, BIASED, ids_BT, valid_BT), want) < 1e-4
    low = model.cast(params, jnp.bfloat16)
    kept = {n for n, a in tiny.flat(low).items() if a.dtype == np.float32}
    assert kept == {n for n in params_lib.table(BIASED) if "norm" in n or "bias" in n}


@pytest.mark.parametrize("cfg", [SANDWICH, BIASED], ids=["sandwich", "biased"])
def test_table_axes_and_plain_round_trip(cfg):
    axes = {axis for spec in params_lib.table(cfg).values() for axis in spec.axes}
    assert axes <= rules.PARAMETERS.keys()
    assert hash(cfg) == hash(dataclasses.replace(cfg))
    plain = yaml.safe_load(yaml.safe_dump(dataclasses.asdict(cfg)))
    assert LMConfig.of_plain(plain) == cfg == LMConfig.of_plain(json.loads(json.dumps(plain)))
    first = [field.name for field in dataclasses.fields(LMConfig)][:11]
    older = {k: v for k, v in dataclasses.asdict(tiny.lm()).items() if k in first}
    assert LMConfig.of_plain(older) == tiny.lm()
    with pytest.raises(UserError, match="not the configuration of a language model.*'n_experts'"):
        LMConfig.of_plain({**plain, "n_experts": 8})


@pytest.mark.parametrize(
    "wrong",
    [dict(local=(True,), window=3), dict(local=(False,) * 4, window=3), dict(window=3),
     dict(local=(True,) * 4), dict(activation="relu"), dict(rope_scaling=("yarn", 2.0)),
     dict(rope_scaling=("linear",)), dict(rope_scaling=("proportional", 1.5)), dict(global_heads=(3, 8)),
     dict(global_heads=(2, 8), qkv_bias=True), dict(global_k_is_v=True), dict(experts_beside=True),
     dict(shared_expert=True)],
)
def test_configurations_that_make_no_sense(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        dataclasses.replace(tiny.lm(), **wrong)


# Beginning of text


@pytest.mark.parametrize("side", ["right", "left"])
def test_capture_reads_what_stands_before_every_text(root, side):
    """h of a text with a leading token in front equals h of the longer text, counted without it."""
    pair = made("gemma3", root)
    ids_BT, valid_BT = texts(side)
    every = np.where(valid_BT, np.arange(300), -1)
    got = capture(pair.params, pair.cfg, 4, ids_BT, valid_BT, every, lead=(7, 3))
    for row in range(3):
        words = ids_BT[row][valid_BT[row]]
        whole = np.concatenate([[7, 3], words])[None].astype(np.int32)
        want = capture(pair.params, pair.cfg, 4, whole, np.ones_like(whole, bool),
                       np.arange(2, len(words) + 2)[None])
        assert tiny.relative(got[row][valid_BT[row]], want[0]) < 1e-5
    without = capture(pair.params, pair.cfg, 4, ids_BT, valid_BT, every)
    assert tiny.relative(got[valid_BT], without[valid_BT]) > 0.01


def test_lead_ids():
    plain, bos = tiny.tokenizer(), tiny.tokenizer(bos=True)
    assert tok_lib.lead_ids(plain) == ()
    assert tok_lib.lead_ids(bos) == (bos.bos_token_id,)
    text = "the text of the user"
    assert tok_lib.raw_ids(bos, text) == [*tok_lib.lead_ids(bos), *tok_lib.plain_ids(bos, text)]


@pytest.fixture(scope="module")
def bos_world(tmp_path_factory):
    """A target with windows whose tokenizer adds a token, corpora, and the extracted store."""
    folder, rng = tmp_path_factory.mktemp("bos"), np.random.default_rng(0)
    cfg = dataclasses.replace(SANDWICH, max_position=1536, attn_softcap=None, final_softcap=None)
    tok = tiny.tokenizer(bos=True)
    tok.chat_template = "{{ bos_token }}" + tiny.CHAT_TEMPLATE
    tok_lib.save(tok, folder / "target")
    weights.save_hf(folder / "target", cfg, jax.tree.map(np.asarray, random_params(cfg)))
    world.write_corpus(folder / "corpus.jsonl", rng)
    world.write_corpus(folder / "ood.jsonl", rng, 2, 6)
    world.write_explanations(folder / "explanations.jsonl", f"file:{folder / 'corpus.jsonl'}")
    with world.one_device(), world.quick_compiles(folder):
        stages.run(world.config(folder, layer=1), folder / "run", only="extract")
        yield folder, cfg, tok


def test_a_run_reads_texts_with_their_beginning(bos_world):
    """The store, the library and the target agree; positions are those of the text alone."""
    folder, cfg, tok = bos_world
    columns = store.load_columns(folder / "run" / "data", "heldout")
    params = random_params(cfg)
    for text, position, h in list(zip(*(columns[k] for k in ("text", "position", "h")), strict=True))[:3]:
        plain = tok_lib.plain_ids(tok, text)
        assert position == len(plain) - 1
        ids_BT = np.array([[tok.bos_token_id, *plain]], np.int32)
        want = capture(params, cfg, 1, ids_BT, np.ones_like(ids_BT, bool), np.array([[position + 1]]))
        np.testing.assert_allclose(h, want[0, 0], rtol=1e-3, atol=1e-3)


def test_a_bundle_keeps_the_architecture(bos_world):
    folder, cfg, tok = bos_world
    base = random_params(cfg)
    spec = specs.make_spec(cfg, tok, layer=1, dtype="float32", alpha=5.0, marker=tiny.MARKER,
                           av_template=tiny.AV_TEMPLATE, ar_template=tiny.AR_TEMPLATE)
    assert spec.lead == (tok.bos_token_id,) and spec.ar.before[0] == spec.av.before[0] == spec.lead[0]
    meta = specs.sidecar(
        spec, target=str(folder / "target"), target_path=folder / "target", av_rank=2, ar_rank=2,
        affine=False, marker=tiny.MARKER, av_template=tiny.AV_TEMPLATE, ar_template=tiny.AR_TEMPLATE,
        stage="rl", max_new=12, mean_D=np.ones(32), training={},
    )
    av = verbalizer.init(base, cfg, rank=2, key=jax.random.key(0))
    ar = reconstructor.init(base, cfg, 1, rank=2, key=jax.random.key(1))
    bundle.save(folder / "bundle", meta, av, ar, tok)
    nla = nla_jax.load(folder / "bundle", batch=2)
    assert nla.spec == spec and nla.spec.lm == cfg
    text = "an old town by the sea " * 3
    ids_BT = np.array([tok_lib.raw_ids(tok, text)], np.int32)
    every = np.arange(ids_BT.shape[1])[None]
    want = capture(base, cfg, 1, ids_BT, np.ones_like(ids_BT, bool), every)
    h = nla.capture(text)
    np.testing.assert_allclose(h, want[0, 1:], rtol=1e-3, atol=1e-3)
    assert len(nla.tokens(text)) == len(h) and len(nla.verbalize(h[:2])) == 2
    assert nla.reconstruct(["the words"]).shape == (1, 32)
    with pytest.raises(UserError, match="1536 tokens; this target reads at most 1535"):
        nla.capture("a" * 1536)


def test_patched_runs_know_which_blocks_are_local(root):
    """The untouched loss after the split at K is that of the whole model."""
    pair = made("gemma3", root)
    spec = dataclasses.replace(tiny.spec(), lm=pair.cfg, layer=3)
    ids_BT, valid_BT = texts()
    at_B, n_B = LENGTHS - 1 - patch.AHEAD, np.full(3, patch.AHEAD)
    run = jax.jit(functools.partial(patch.run_patched, spec=spec))
    kl, ce, clean, mask = run(pair.params, ids_BT=ids_BT, valid_BT=valid_BT, at_B=at_B, n_B=n_B,
                              vectors_CBD=np.ones((1, 3, 32), np.float32))
    logp = np.asarray(jax.nn.log_softmax(logits_of(pair.params, pair.cfg, ids_BT, valid_BT)))
    for row, at in enumerate(at_B):
        ahead = np.arange(at, at + patch.AHEAD)
        np.testing.assert_allclose(clean[row], -logp[row, ahead, ids_BT[row, ahead + 1]], atol=1e-3)
    assert mask.all() and (np.asarray(kl) > -1e-5).all() and not np.allclose(ce[0], clean)


def test_the_page_has_every_family():
    """docs/models.md, by `python -m tests.helpers.parity_table`: a line for each case, within the bounds."""
    page = (Path(__file__).resolve().parent.parent.parent / "docs" / "models.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in page.splitlines()]
    found = {row[0]: row[1:] for row in rows if len(row) == len(parity_table.COLUMNS) and row[0] in CASES}
    assert found.keys() == CASES.keys()
    for name, (tokens, *exact_and_low) in found.items():
        most = WIDE_MAX if name.startswith(("qwen3_moe", "qwen3_5")) or name == "gemma4_text" else BAND_MAX
        exact, low, cached = exact_and_low[:2], exact_and_low[2:4], exact_and_low[4]
        assert int(tokens) >= 600 and all(float(e) < TOLERANCE for e in (*exact, cached))
        assert all(TOLERANCE < float(e) < most for e in low)
