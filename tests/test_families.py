"""Every family of models against transformers in PyTorch: random tiny models, all parts different.

Windows are shorter than the texts, texts are longer than what rotary embedding was scaled for, soft
caps bite, biases and norm weights are not what they start as.
"""

import dataclasses
import functools
import json

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
import world
import yaml
from safetensors.numpy import load_file, save_file

import nla_jax
from nla_jax import bundle, objectives, reconstructor, stages, target, verbalizer
from nla_jax import mesh as mesh_lib
from nla_jax.data import store
from nla_jax.errors import UserError
from nla_jax.evaluate import patch
from nla_jax.lm import generate, lora, model, weights
from nla_jax.lm import params as params_lib
from nla_jax.lm import tokenizer as tok_lib
from nla_jax.lm.config import LMConfig
from tests import tiny

TOLERANCE = 1e-4  # float32: largest error over the root mean square
# bfloat16 matrices against float32 ones: root mean square, and largest, error over the same.
BAND_RMS, BAND_MAX = 0.03, 0.5
LENGTHS = np.array([300, 230, 120])
WINDOW = 37

SIZE = dict(
    vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=512, rms_norm_eps=1e-5, pad_token_id=0,
    bos_token_id=1, eos_token_id=2,
)  # fmt: skip
LLAMA3 = dict(
    rope_type="llama3", rope_theta=100.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=64,
)  # fmt: skip
GEMMA = dict(head_dim=16, query_pre_attn_scalar=24, sliding_window=WINDOW, tie_word_embeddings=True)
GEMMA3 = dict(
    GEMMA, num_hidden_layers=7, rope_parameters={
        "full_attention": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 8.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    },
)  # fmt: skip
WINDOWED = dict(use_sliding_window=True, sliding_window=WINDOW, max_window_layers=2)
CASES = {  # name -> (kind of configuration, what it says beside SIZE)
    "llama": ("Llama", dict(tie_word_embeddings=False)),
    "llama llama3": ("Llama", dict(tie_word_embeddings=True, rope_parameters=LLAMA3)),
    "llama linear": ("Llama", dict(
        head_dim=16, rope_parameters=dict(rope_type="linear", rope_theta=50.0, factor=3.0))),
    "mistral": ("Mistral", dict(sliding_window=WINDOW, tie_word_embeddings=False)),
    "mistral tied global": ("Mistral", dict(sliding_window=None, tie_word_embeddings=True)),
    "qwen2": ("Qwen2", dict(tie_word_embeddings=True)),
    "qwen2 window untied": ("Qwen2", dict(WINDOWED, tie_word_embeddings=False)),
    "qwen3": ("Qwen3", dict(head_dim=16, tie_word_embeddings=True)),
    "qwen3 window untied": ("Qwen3", dict(WINDOWED, head_dim=8, tie_word_embeddings=False)),
    "gemma2": ("Gemma2", dict(GEMMA, attn_logit_softcapping=1.5, final_logit_softcapping=2.0)),
    "gemma3_text": ("Gemma3Text", GEMMA3),
    "gemma3": ("Gemma3", GEMMA3),
}  # fmt: skip


def torch_config(name, **changes):
    kind, settings = CASES[name]
    settings = {**SIZE, **settings, **changes}
    if kind == "Gemma3":
        vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                      num_attention_heads=2, image_size=28, patch_size=14)  # fmt: skip
        return transformers.Gemma3Config(
            text_config=settings, vision_config={"model_type": "siglip_vision_model", **vision},
            mm_tokens_per_image=4, image_token_index=98, boi_token_index=97, eoi_token_index=96,
        )  # fmt: skip
    return getattr(transformers, f"{kind}Config")(**settings)


def torch_class(name):
    kind = CASES[name][0]
    if kind == "Gemma3":
        return transformers.Gemma3ForConditionalGeneration
    return getattr(transformers, f"{kind.removesuffix('Text')}ForCausalLM")


def torch_model(name, **changes):
    """A random model: matrices keep the size of what they multiply, the rest is spread around."""
    torch.manual_seed(0)
    net = torch_class(name)(torch_config(name, **changes))
    for key, p in net.named_parameters():
        if "norm" in key:
            p.data += 0.3 * torch.randn_like(p)
        elif p.ndim == 2:
            p.data.normal_(std=p.shape[1] ** -0.5)
        else:
            p.data.normal_(std=0.5)
    return net


def read_torch(folder, kind, dtype=torch.float32):
    net, info = kind.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    return net.eval()


@dataclasses.dataclass(frozen=True)
class Pair:
    name: str
    folder: object
    net: object  # transformers, read back from `folder`
    cfg: LMConfig
    params: dict


@functools.cache
def made(name, root):
    folder = root / name.replace(" ", "_")
    torch_model(name).save_pretrained(folder)
    cfg, params = weights.load(folder)
    return Pair(name, folder, read_torch(folder, torch_class(name)), cfg, params)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    yield tmp_path_factory.mktemp("families")
    made.cache_clear()


@pytest.fixture(params=list(CASES))
def pair(request, root):
    return made(request.param, root)


def torch_forward(net, ids_BT, valid_BT):
    """(logits_BTV, the output of every block), positions counting real tokens only."""
    inner = net.model.language_model if hasattr(net.model, "language_model") else net.model
    states = []

    def keep(module, args, out):
        states.append((out[0] if isinstance(out, tuple) else out).float().numpy())

    hooks = [layer.register_forward_hook(keep) for layer in inner.layers]
    positions = np.maximum(np.cumsum(valid_BT, 1) - 1, 0)
    with torch.no_grad():
        out = net(
            input_ids=torch.tensor(ids_BT, dtype=torch.long),
            attention_mask=torch.tensor(valid_BT.astype(np.int64)),
            position_ids=torch.tensor(positions, dtype=torch.long), use_cache=False,
        )  # fmt: skip
    for hook in hooks:
        hook.remove()
    return out.logits.float().numpy(), states


def texts(side="right"):
    """650 tokens in rows of three lengths; garbage stands in the padding."""
    ids_BT = tiny.random_ids(np.random.default_rng(0), (3, 300), 90)
    valid_BT = np.arange(300)[None] < LENGTHS[:, None]
    assert valid_BT.sum() >= 600
    return ids_BT, valid_BT[:, ::-1].copy() if side == "left" else valid_BT


@functools.partial(jax.jit, static_argnums=1)
def logits_of(params, cfg, ids_BT, valid_BT):
    x, _ = model.forward(params, cfg, model.embed(params, cfg, ids_BT), valid_BT)
    return model.unembed(params, cfg, x)


capture = jax.jit(target.capture, static_argnums=(1, 2), static_argnames="lead")


def reported(record_property, name, value):
    record_property(name, value)
    print(f"{name}: {value:.2e}")


# Against transformers


@pytest.mark.parametrize("side", ["right", "left"])
def test_logits_and_every_block(pair, side, record_property):
    ids_BT, valid_BT = texts(side)
    logits, states = torch_forward(pair.net, ids_BT, valid_BT)
    assert len(states) == pair.cfg.n_blocks
    got = logits_of(pair.params, pair.cfg, ids_BT, valid_BT)
    error = tiny.relative(got[valid_BT], logits[valid_BT])
    reported(record_property, f"logits, {pair.name}, {side}", error)
    every = np.where(valid_BT, np.arange(300), -1)
    worst = 0.0
    for layer, state in enumerate(states):
        h = capture(pair.params, pair.cfg, layer, ids_BT, valid_BT, every)
        worst = max(worst, tiny.relative(h[valid_BT], state[valid_BT]))
    reported(record_property, f"hidden, {pair.name}, {side}", worst)
    assert error < TOLERANCE and worst < TOLERANCE


def test_bfloat16(pair, record_property):
    """Products in bfloat16 stay in the band around transformers' float32."""
    ids_BT, valid_BT = texts()
    want = torch_forward(pair.net, ids_BT, valid_BT)[0][valid_BT]
    low = model.cast(pair.params, jnp.bfloat16)
    got = np.asarray(logits_of(low, pair.cfg, ids_BT, valid_BT))[valid_BT]
    rms = float(np.sqrt(np.mean((got - want) ** 2) / np.mean(want**2)))
    reported(record_property, f"bfloat16 rms, {pair.name}", rms)
    reported(record_property, f"bfloat16 max, {pair.name}", tiny.relative(got, want))
    assert rms < BAND_RMS and tiny.relative(got, want) < BAND_MAX


def test_settings_matter(pair):
    """Without any one of the settings that its family adds, a model computes something else."""
    ids_BT, valid_BT = texts()
    want = logits_of(pair.params, pair.cfg, ids_BT, valid_BT)
    plain = dict(rope_scaling=(), local_rope_theta=None, activation="silu", scale_embed=False,
                 query_scalar=None, attn_softcap=None, final_softcap=None)  # fmt: skip
    changes = [{k: v} for k, v in plain.items() if getattr(pair.cfg, k) != v]
    if pair.cfg.local:
        changes += [dict(window=0, local=()), dict(window=pair.cfg.window + 1)]
    for change in changes:
        other = dataclasses.replace(pair.cfg, **change)
        got = logits_of(pair.params, other, ids_BT, valid_BT)
        assert tiny.relative(got[valid_BT], want[valid_BT]) > 100 * TOLERANCE, change
    for name in {"wq_bias", "wk_bias", "q_norm", "attn_post_norm"} & pair.params["blocks"].keys():
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
    assert got["gemma2"].local == (True, False, True, False) and got["gemma2"].query_scalar == 24
    assert got["gemma3"].local == (True,) * 5 + (False, True)
    assert got["gemma3"].local_rope_theta == 100.0 and got["gemma3"].rope_theta == 5000.0
    assert got["gemma3"] == got["gemma3_text"]
    assert got["gemma3"].truncated(3).local == (True,) * 3
    assert got["qwen2 window untied"].truncated(2).local == ()
    assert got["gemma3"].of_blocks(5, 7).local == (False, True)


# Cached decoding and pieces


def test_decoding_token_by_token_is_the_full_forward(pair, record_property):
    """80 tokens, 60 of them after a prefill, rows with and without left padding."""
    n, T, cfg, params = 20, 80, pair.cfg, pair.params
    ids_BT = tiny.random_ids(np.random.default_rng(3), (3, T), 90)
    valid_BT = np.ones((3, T), bool)
    valid_BT[1, :7] = False
    want = logits_of(params, cfg, ids_BT, valid_BT)

    @jax.jit
    def decode(params):
        w = generate.decode_weights(params, cfg, jnp.float32)
        x = model.embed(params, cfg, ids_BT[:, :n])
        _, kv = model.forward(params, cfg, x, valid_BT[:, :n], keep_kv=True)
        grow = ((0, 0), (0, 0), (0, T - n), (0, 0))
        caches = [(jnp.pad(k, grow), jnp.pad(v, grow))
                  for k, v in zip(kv.k_LBKSd, kv.v_LBKSd, strict=True)]  # fmt: skip
        prompt_BS = jnp.pad(kv.valid_BS, ((0, 0), (0, T - n)))

        def step(caches, s):
            mask_BS = prompt_BS | ((jnp.arange(T) >= n) & (jnp.arange(T) <= s))
            logits, caches = generate._decode_token(
                w, cfg, jnp.array(ids_BT)[:, s], kv.valid_BS.sum(1) + s - n, caches, s, mask_BS)
            return caches, logits

        return jax.lax.scan(step, caches, jnp.arange(n, T))[1]

    logits = np.swapaxes(decode(params), 0, 1)
    error = tiny.relative(logits, want[:, n:])
    reported(record_property, f"decoding, {pair.name}", error)
    assert error < TOLERANCE


@pytest.mark.parametrize("name", ["mistral", "gemma2", "gemma3"])
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
)  # fmt: skip
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
    assert axes <= mesh_lib.RULES.keys()
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
     dict(rope_scaling=("linear",))],
)  # fmt: skip
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
                       np.arange(2, len(words) + 2)[None])  # fmt: skip
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
    spec = bundle.make_spec(cfg, tok, layer=1, dtype="float32", alpha=5.0, marker=tiny.MARKER,
                            av_template=tiny.AV_TEMPLATE, ar_template=tiny.AR_TEMPLATE)  # fmt: skip
    assert spec.lead == (tok.bos_token_id,) and spec.ar.before[0] == spec.av.before[0] == spec.lead[0]
    meta = bundle.sidecar(
        spec, target=str(folder / "target"), target_path=folder / "target", av_rank=2, ar_rank=2,
        affine=False, marker=tiny.MARKER, av_template=tiny.AV_TEMPLATE, ar_template=tiny.AR_TEMPLATE,
        stage="rl", max_new=12, mean_D=np.ones(32), training={},
    )  # fmt: skip
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
                              vectors_CBD=np.ones((1, 3, 32), np.float32))  # fmt: skip
    logp = np.asarray(jax.nn.log_softmax(logits_of(pair.params, pair.cfg, ids_BT, valid_BT)))
    for row, at in enumerate(at_B):
        ahead = np.arange(at, at + patch.AHEAD)
        np.testing.assert_allclose(clean[row], -logp[row, ahead, ids_BT[row, ahead + 1]], atol=1e-3)
    assert mask.all() and (np.asarray(kl) > -1e-5).all() and not np.allclose(ce[0], clean)


# Hugging Face directories


def test_save_hf_loads_in_transformers(pair, tmp_path, record_property):
    weights.save_hf(tmp_path, pair.cfg, pair.params)
    kind = torch_class("gemma3_text" if pair.name == "gemma3" else pair.name)
    raw = json.loads((tmp_path / "config.json").read_text())
    if pair.name != "mistral tied global":  # which a Llama computes as well
        assert raw["architectures"] == [kind.__name__]
    net = read_torch(tmp_path, transformers.AutoModelForCausalLM)
    ids_BT, valid_BT = texts()
    want = torch_forward(pair.net, ids_BT, valid_BT)[0][valid_BT]
    error = tiny.relative(torch_forward(net, ids_BT, valid_BT)[0][valid_BT], want)
    reported(record_property, f"written and read by transformers, {pair.name}", error)
    assert error < 1e-5
    cfg, params = weights.load(tmp_path)
    assert cfg == pair.cfg
    tiny.assert_trees_close(params, pair.params, atol=1e-6)


def test_save_hf_refuses_what_no_family_computes(tmp_path):
    cfg = dataclasses.replace(tiny.lm(), qkv_bias=True, post_norms=True)
    params = jax.tree.map(np.asarray, tiny.params(cfg))
    with pytest.raises(UserError, match="no family of models in transformers computes"):
        weights.save_hf(tmp_path, cfg, params)
    assert not list(tmp_path.iterdir())


def test_truncated_models(root, tmp_path):
    """The first blocks, read and written as a model of their own."""
    for name in ("gemma3_text", "qwen2 window untied", "gemma2"):
        pair = made(name, root)
        short = pair.cfg.truncated(2)
        cfg, params = weights.load(pair.folder, short)
        assert cfg == short and params["blocks"]["wq"].shape[0] == 2
        weights.save_hf(tmp_path / name, cfg, params)
        assert weights.read_config(tmp_path / name) == short
        read_torch(tmp_path / name, transformers.AutoModelForCausalLM)


def copied(pair, folder):
    for file in pair.folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


SPELLINGS = [  # of transformers 4, of transformers 5
    ("language_model.model.", "model.language_model."), ("vision_tower.", "model.vision_tower."),
    ("multi_modal_projector.", "model.multi_modal_projector."),
    ("language_model.lm_head.", "lm_head."),
]  # fmt: skip


def spelt(name, version):
    for pair in SPELLINGS:
        other, wanted = pair[5 - version], pair[version - 4]
        if name.startswith(other):
            return wanted + name.removeprefix(other)
    return name


@pytest.mark.parametrize("version", [4, 5])
def test_both_spellings_of_multimodal_tensors(root, tmp_path, version):
    """Prefixes before the language model and the image parts; what is neither is refused."""
    pair = made("gemma3", root)
    path = copied(pair, tmp_path) / "model.safetensors"
    state = {spelt(name, version): array for name, array in load_file(path).items()}
    starts = {name.split(".")[version - 4] for name in state}
    assert starts == {"language_model", "vision_tower", "multi_modal_projector"}
    save_file(state, path)
    cfg, params = weights.load(tmp_path)
    assert cfg == pair.cfg
    jax.tree.map(np.testing.assert_array_equal, params, pair.params)
    save_file({**state, "model.audio_tower.w": np.zeros(3, np.float32)}, path)
    with pytest.raises(UserError, match=r"model\.audio_tower\.w is not a tensor"):
        weights.load(tmp_path)


def test_sparse_configurations_have_the_defaults_of_transformers(tmp_path):
    """Gemma 3 with images says little of its language model; every family leaves keys out."""
    for name, dropped in {
        "gemma3": ("head_dim", "num_attention_heads", "num_key_value_heads", "vocab_size",
                   "max_position_embeddings", "rms_norm_eps", "rope_parameters", "layer_types",
                   "query_pre_attn_scalar", "tie_word_embeddings", "hidden_activation"),
        "gemma2": ("head_dim", "query_pre_attn_scalar", "tie_word_embeddings", "layer_types",
                   "sliding_window", "attn_logit_softcapping", "final_logit_softcapping"),
        "qwen3 window untied": ("head_dim", "layer_types", "use_sliding_window"),
        "qwen2 window untied": ("layer_types", "max_window_layers", "sliding_window"),
        "mistral": ("sliding_window", "head_dim", "num_key_value_heads"),
    }.items():  # fmt: skip
        config = torch_config(name, num_attention_heads=8)
        raw = json.loads(config.to_json_string())
        part = raw["text_config"] if name == "gemma3" else raw
        for key in dropped:
            part.pop(key, None)
        (tmp_path / "config.json").write_text(json.dumps(raw))
        cfg = weights.read_config(tmp_path)
        want = type(config).from_pretrained(tmp_path).get_text_config()
        ours = (cfg.vocab_size, cfg.n_heads, cfg.n_kv_heads, cfg.head_dim, cfg.max_position,
                cfg.norm_eps, cfg.tied, cfg.attn_softcap, cfg.final_softcap)  # fmt: skip
        head_dim = getattr(want, "head_dim", None) or want.hidden_size // want.num_attention_heads
        assert ours == (
            want.vocab_size, want.num_attention_heads, want.num_key_value_heads, head_dim,
            want.max_position_embeddings, want.rms_norm_eps, want.tie_word_embeddings,
            getattr(want, "attn_logit_softcapping", None),
            getattr(want, "final_logit_softcapping", None),
        ), name  # fmt: skip
        kinds = getattr(want, "layer_types", None) or ["sliding_attention"] * cfg.n_blocks
        local = tuple(k == "sliding_attention" for k in kinds)
        assert cfg.local == (local if any(local) else ()), name
        assert not any(local) or cfg.window == want.sliding_window
        rope = want.rope_parameters
        if name == "gemma3":
            assert cfg.local_rope_theta == rope["sliding_attention"]["rope_theta"]
            rope = rope["full_attention"]
        assert cfg.rope_theta == rope["rope_theta"]


def test_older_configurations(root, tmp_path):
    """transformers 4: bases and scaling at the top, the pattern of local blocks as a number."""
    pair = made("gemma3_text", root)
    raw = json.loads((copied(pair, tmp_path) / "config.json").read_text())
    del raw["rope_parameters"], raw["layer_types"]
    raw |= {"rope_theta": 5000, "rope_local_base_freq": 100, "sliding_window_pattern": 6}
    raw |= {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "cache_implementation": "hybrid"}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert weights.read_config(tmp_path) == pair.cfg


REFUSED = [
    ("llama", {"sliding_window": 5}, "sliding_window = 5"),
    ("llama", {"final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0"),
    ("llama llama3", {"rope_parameters": {**LLAMA3, "rope_type": "yarn"}}, "rope_type 'yarn'"),
    ("llama llama3", {"rope_parameters": {**LLAMA3, "mscale": 2.0}}, "mscale = 2.0"),
    ("llama llama3", {"rope_parameters": {"rope_type": "llama3"}}, "'llama3' has no 'factor'"),
    ("llama llama3", {"rope_scaling": {"rope_type": "linear", "factor": 2}}, "rope_scaling differ"),
    ("llama linear", {"rope_parameters": {"rope_type": "linear", "type": "dynamic", "factor": 2}},
     "rope_parameters with rope_type"),
    ("mistral", {"layer_types": ["full_attention"] * 4}, "layer_types = "),
    ("mistral", {"attention_bias": True}, "attention_bias = True"),
    ("mistral", {"sliding_window": "all"}, "sliding_window = 'all'"),
    ("mistral", {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
    ("qwen2", {"attention_bias": False}, "attention_bias = False"),
    ("qwen2", {"layer_types": ["sliding_attention"] * 4}, "sliding_window"),
    ("qwen2", {"use_mrope": True}, "use_mrope = True"),
    ("qwen2", {"num_experts": 8}, "num_experts = 8"),
    ("qwen3", {"attention_bias": True}, "attention_bias = True"),
    ("qwen3", {"layer_types": ["linear_attention"] * 4}, "layer_types = "),
    ("gemma2", {"layer_types": ["full_attention"] * 3}, "layer_types = "),
    ("gemma2", {"hidden_activation": "gelu"}, "hidden_activation = 'gelu'"),
    ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
    ("gemma2", {"sliding_window": None}, "sliding_window = None"),
    ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0"),
    ("gemma3_text", {"final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0"),
    ("gemma3_text", {"rope_parameters": {"rope_theta": 5.0}}, "rope_parameters: rope_theta = 5.0"),
    ("gemma3_text", {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2}}},
     "rope_parameters: rope_scaling = "),
    ("gemma3_text", {"altup_num_inputs": 4}, "altup_num_inputs = 4"),
    ("gemma3", {"quantization_config": {"bits": 4}}, "quantization_config = "),
    ("gemma3", {"audio_config": {"a": 1}}, "audio_config = "),
    ("gemma3", {"text_config": None}, "text_config is None"),
    ("gemma3", {"text_config": {"num_experts": 4}}, "num_experts = 4"),
    ("gemma3", {"model_type": "gemma3n"}, "model_type 'gemma3n'"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "changes", "named"), REFUSED)
def test_settings_that_are_not_understood(root, tmp_path, name, changes, named):
    path = copied(made(name, root), tmp_path) / "config.json"
    weights.read_config(tmp_path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(UserError, match=named) as err:
        weights.read_config(tmp_path)
    assert str(path) in str(err.value) and "\n" not in str(err.value)


# GGUF

GGUF_CASES = {  # case -> (architecture, changes that llama.cpp's metadata can say)
    "llama": ("llama", {}),
    "llama linear": ("llama", {}),
    "llama llama3": ("llama", dict(rope_parameters={
        **LLAMA3, "rope_theta": 500_000.0, "factor": 32.0, "original_max_position_embeddings": 8192})),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "gemma2": ("gemma2", dict(query_pre_attn_scalar=16)),
    "gemma3_text": ("gemma3", dict(query_pre_attn_scalar=16)),
}  # fmt: skip


def permute(w, heads):
    """llama.cpp's convert_hf_to_gguf.py, LlamaModel.permute."""
    return (
        w.reshape(heads, 2, w.shape[0] // heads // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)
    )


def write_gguf(path, arch, net, extra=()):
    """A GGUF file of a transformers model, as llama.cpp's converter writes it."""
    config = net.config
    writer = gguf.GGUFWriter(str(path), arch)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if head_dim := getattr(config, "head_dim", None):
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if near := config.rope_parameters.get("sliding_attention"):
        writer.add_rope_freq_base_swa(near["rope_theta"])
    if arch in ("gemma2", "gemma3"):
        writer.add_sliding_window(config.sliding_window)
    if arch == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    for key, value in extra:
        add = writer.add_string if isinstance(value, str) else writer.add_uint32
        add(key, value)
    if rope["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_factors(rope, config.head_dim))
    kinds = {v: k for k, v in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[arch], config.num_hidden_layers)
    for name, tensor in net.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        w = tensor.numpy()
        if arch == "llama" and "q_proj" in name:
            w = permute(w, config.num_attention_heads)
        if arch == "llama" and "k_proj" in name:
            w = permute(w, config.num_key_value_heads)
        if arch.startswith("gemma") and name.endswith("norm.weight"):
            w = w + 1
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), w)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama3_factors(rope, head_dim):
    """LlamaModel.generate_extra_tensors of the converter."""
    out = []
    for freq in rope["rope_theta"] ** -(np.arange(0, head_dim, 2) / head_dim):
        turns = rope["original_max_position_embeddings"] * freq / (2 * np.pi)
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        keep = (turns - low) / (high - low)
        mixed = 1 / ((1 - keep) / rope["factor"] + keep)
        out.append(1.0 if turns > high else rope["factor"] if turns < low else mixed)
    return np.array(out, np.float32)


@pytest.mark.parametrize("name", list(GGUF_CASES))
def test_gguf_equals_the_directory(tmp_path, name):
    arch, changes = GGUF_CASES[name]
    net = torch_model(name, **changes)
    net.save_pretrained(tmp_path / "hf")
    write_gguf(tmp_path / "model.gguf", arch, net)
    want_cfg, want = weights.load(tmp_path / "hf")
    cfg, params = weights.load(tmp_path / "model.gguf")
    assert cfg == want_cfg == weights.read_config(tmp_path / "model.gguf")
    assert tiny.flat(params).keys() == params_lib.table(cfg).keys()
    jax.tree.map(np.testing.assert_array_equal, params, want)
    two = weights.load(tmp_path / "model.gguf", cfg.truncated(2))[1]
    np.testing.assert_array_equal(two["blocks"]["wq"], params["blocks"]["wq"][:2])


@pytest.mark.parametrize(
    ("name", "extra", "named"),
    [
        ("qwen2", ("qwen2.attention.sliding_window", 9), "sliding_window = 9"),
        ("qwen2", ("qwen2.rope.scaling.type", "yarn"), r"qwen2\.rope\.scaling\.type = 'yarn'"),
        ("qwen3", ("qwen3.expert_count", 8), r"qwen3\.expert_count = 8"),
        ("gemma2", ("gemma2.attention.scale", 2), r"gemma2\.attention\.scale = 2"),
        ("gemma3_text", ("gemma3.final_logit_softcapping", 30), "final_logit_softcapping = 30"),
        ("gemma3_text", ("gemma3.rope.dimension_count", 8), "dimension_count = 8 is not 16"),
    ],
)
def test_gguf_settings_that_are_not_understood(tmp_path, name, extra, named):
    arch, changes = GGUF_CASES[name]
    write_gguf(tmp_path / "m.gguf", arch, torch_model(name, **changes), [extra])
    with pytest.raises(UserError, match=named):
        weights.load(tmp_path / "m.gguf")


def test_gguf_unlike_llama_3(tmp_path):
    net = torch_model("llama llama3")  # scaled for 64 tokens: not what was published
    write_gguf(tmp_path / "m.gguf", "llama", net)
    with pytest.raises(UserError, match=r"rope_freqs\.weight is not the scaling of Llama 3"):
        weights.load(tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("name", "arch", "n_blocks"), [("gemma2", "gemma2", 46), ("gemma3_text", "gemma3", 62)]
)
def test_gguf_of_the_27b(tmp_path, name, arch, n_blocks):
    """The 27B models divide scores by sqrt(d_model / n_heads), which no metadata says."""
    write_gguf(tmp_path / "m.gguf", arch, torch_model(name, num_hidden_layers=n_blocks))
    cfg = weights.read_config(tmp_path / "m.gguf")
    assert cfg.query_scalar == 8 and cfg.head_dim == 16
    assert cfg.local[:6] == ((True, False) * 3 if arch == "gemma2" else (True,) * 5 + (False,))
