"""Blocks with linear attention and mixtures of experts: padding, states, gradients, decoding, meshes."""

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.extend.core import jaxprs_in_params

from nla_jax import objectives, reconstructor, steps, target, verbalizer
from nla_jax.lm import decode_tp, delta_net, generate, lora, model, sharded_load, weights
from nla_jax.lm import params as params_lib
from nla_jax.lm.experts import EXPERTS
from nla_jax.lm.files.families import FAMILIES
from nla_jax.sharding import mesh as mesh_lib
from nla_jax.sharding import placement
from nla_jax.studies import planting
from nla_jax.util import int8
from nla_jax.util.keys import new_key
from tests.helpers import family_pairs, tiny

# Three linear blocks and one other are a period; the last block is a part of the next.
HYBRID = dataclasses.replace(
    tiny.lm(n_blocks=5), head_dim=16, rotary_dim=8, qk_norm=True, attn_gate=True,
    linear=(True, True, True, False, True), delta=(2, 4, 16, 12, 4),
)
MIXTURE = dataclasses.replace(
    tiny.lm(n_blocks=3, tied=False), qk_norm=True, experts=(8, 3, 24), experts_normed=True)
POST = dataclasses.replace(
    tiny.lm(n_blocks=3), pre_norms=False, post_norms=True, qk_norm=True, qk_norm_whole=True, rotary_dim=4,
    window=9, local=(True, False, True), local_rope_theta=50.0, rope_scaling=("yarn", 8.0, 8.0, 1.0, 64, 1.2),
)
GEMMA4 = dataclasses.replace(
    tiny.lm(n_blocks=5), qk_norm=True, v_norm=True, post_norms=True, block_scale=True, query_scalar=4.0,
    window=9, local=(True, True, False, True, False), rope_scaling=("proportional", 0.5), final_softcap=3.0,
    local_rope_theta=50.0, global_heads=(1, 16), global_k_is_v=True, activation="gelu_tanh", scale_embed=True,
    experts=(8, 3, 24), experts_normed=True, experts_beside=True,
)
SHARED = dataclasses.replace(MIXTURE, shared_expert=True)
CFGS = {"hybrid": HYBRID, "mixture": MIXTURE, "shared": SHARED, "post": POST, "gemma4": GEMMA4}
CLOSE = 1e-4  # of the root mean square: the same sums in another order


@functools.cache
def params(name):
    """`tiny.params`, with decays that differ by head and remember many tokens."""
    tree = tiny.params(CFGS[name])
    if "delta_a_log" in tree["blocks"]:
        shape = tree["blocks"]["delta_a_log"].shape
        tree["blocks"]["delta_a_log"] = jax.random.normal(jax.random.key(0), shape) - 3.0
        tree["blocks"]["delta_dt_bias"] = jax.random.normal(jax.random.key(1), shape)
    for i, key in enumerate(n for n in tree["blocks"] if n.endswith("_scale")):
        tree["blocks"][key] += 0.2 * jax.random.normal(jax.random.key(i), tree["blocks"][key].shape)
    return tree


forward = jax.jit(model.forward, static_argnums=1, static_argnames="keep_kv")


@pytest.mark.parametrize("name", ["hybrid", "mixture", "gemma4"])
def test_a_batch_is_its_rows_under_any_padding(name):
    """Padding on the left, on the right and between tokens, with garbage in it."""
    cfg, p, rng = CFGS[name], params(name), np.random.default_rng(0)
    ids_BT = tiny.random_ids(rng, (4, 90))
    valid_BT = np.ones((4, 90), bool)
    valid_BT[0, :20] = valid_BT[1, 70:] = False
    valid_BT[2, rng.permutation(90)[:20]] = False
    valid_BT[3, 2:12] = valid_BT[3, 80:] = False
    x, kv = forward(p, cfg, model.embed(p, cfg, ids_BT), valid_BT, keep_kv=True)
    other, _ = forward(p, cfg, model.embed(p, cfg, np.where(valid_BT, ids_BT, 7)), valid_BT)
    np.testing.assert_array_equal(x[valid_BT], other[valid_BT])
    for row in range(4):
        words = ids_BT[row][valid_BT[row]][None]
        want, alone = forward(p, cfg, model.embed(p, cfg, words), np.ones_like(words, bool), keep_kv=True)
        assert tiny.relative(x[row][valid_BT[row]], want[0]) < CLOSE
        if cfg.linear:
            assert tiny.relative(kv.conv_LBWC[:, row], alone.conv_LBWC[:, 0]) < CLOSE
            assert tiny.relative(kv.state_LBHkv[:, row], alone.state_LBHkv[:, 0]) < CLOSE


def test_a_sequence_is_its_halves():
    """A piece that all rows share, one with padding in it, and the rest; then rows of a cache."""
    cfg, p = HYBRID, params("hybrid")
    ids_BT = tiny.random_ids(np.random.default_rng(1), (3, 200))
    ids_BT[:, :70] = ids_BT[0, :70]
    valid_BT = np.ones((3, 200), bool)
    valid_BT[1, 85:90] = valid_BT[2, 70:72] = False
    x = model.embed(p, cfg, ids_BT)
    want, whole = forward(p, cfg, x, valid_BT, keep_kv=True)
    a, kv = forward(p, cfg, x[:1, :70], valid_BT[:1, :70], keep_kv=True)
    b, kv_b = forward(p, cfg, x[:, 70:90], valid_BT[:, 70:90], past=kv, keep_kv=True)
    both = model.join(kv, kv_b)
    c, last = forward(p, cfg, x[:, 90:], valid_BT[:, 90:], past=both, keep_kv=True)
    got = jnp.concatenate([jnp.repeat(a, 3, 0), b, c], 1)
    assert tiny.relative(got[valid_BT], want[valid_BT]) < CLOSE
    assert tiny.relative(last.state_LBHkv, whole.state_LBHkv) < CLOSE
    rows = jnp.array([2, 0])
    d, _ = forward(p, cfg, x[rows, 90:], valid_BT[rows, 90:], past=both.rows(rows))
    assert tiny.relative(d, c[rows]) < CLOSE


@pytest.mark.parametrize("name", ["hybrid", "gemma4"])
def test_blocks_in_pieces(name):
    """Lower and upper blocks, each with its kinds, go on where the others stopped; so do their caches."""
    cfg, p = CFGS[name], params(name)
    ids_BT, valid_BT = tiny.random_ids(np.random.default_rng(1), (2, 30)), np.ones((2, 30), bool)
    want, kv = model.forward(p, cfg, model.embed(p, cfg, ids_BT), valid_BT, keep_kv=True)
    for cut in (2, 4):
        x, low = model.forward(
            params_lib.truncate(p, cut, cfg), cfg, model.embed(p, cfg, ids_BT), valid_BT, keep_kv=True)
        upper, part = params_lib.slice_blocks(p["blocks"], cfg, cut, 5), cfg.of_blocks(cut, 5)
        assert {f"blocks/{n}": a.shape for n, a in upper.items()} == {
            n: s.shape for n, s in params_lib.table(part).items() if n.startswith("blocks/")}
        x, high = model.forward({"blocks": upper}, part, x, valid_BT, keep_kv=True)
        assert tiny.relative(x, want) < CLOSE
        for got, whole in zip(jax.tree.leaves(low.above(high)), jax.tree.leaves(kv), strict=True):
            np.testing.assert_allclose(got, whole, atol=5e-4)
    every = np.arange(30)[None].repeat(2, 0)
    layers = target.capture_layers(p, cfg, (0, 3, 4), ids_BT, valid_BT, every)
    for n, layer in enumerate((0, 3, 4)):
        one = target.capture(p, cfg, layer, ids_BT, valid_BT, every)
        assert tiny.relative(layers[:, :, n], one) < CLOSE
    with pytest.raises(ValueError, match="give cfg"):
        params_lib.truncate(p, 2)


@pytest.mark.parametrize("T", [1, 150])
def test_chunks_are_the_recurrence(T):
    """Whole chunks and a part of one, from a state, against one token at a time."""
    rng, C, H = np.random.default_rng(T), 2 * 2 * 16 + 4 * 12, 4
    qkv, conv, past = rng.normal(size=(2, T, C)), rng.normal(size=(C, 4)), rng.normal(size=(2, 3, C))
    S, decay, beta = rng.normal(size=(2, H, 16, 12)), -rng.exponential(size=(2, T, H)), rng.random((2, T, H))
    qkv, conv, past, S, decay, beta = (jnp.float32(a) for a in (qkv, conv, past, S, decay, beta))
    got, state = delta_net.over_sequence(HYBRID, None, (past, S), qkv, conv, decay, beta)
    now, want = (past, S), []
    step = jax.jit(functools.partial(delta_net.over_token, HYBRID))
    for t in range(T):
        o, now = step(now, qkv[:, t : t + 1], conv, decay[:, t : t + 1], beta[:, t : t + 1])
        want.append(o)
    assert tiny.relative(got, jnp.concatenate(want, 1)) < CLOSE
    for a, b in zip(state, now, strict=True):
        assert tiny.relative(a, b) < CLOSE


def keys_of_chunks(kind: str):
    """Keys [5, 64, 128] of norm 1, and the decay of a token: random ones, and ones that are alike."""
    rng, unit = np.random.default_rng(0), lambda k: k / np.linalg.norm(k, axis=-1, keepdims=True)
    k, one = rng.normal(size=(5, 64, 128)), rng.normal(size=(5, 1, 128))
    return unit({
        "random": k, "forgetting": k, "alike": unit(one) + 0.03 * k, "equal": one + 0.0 * k,
        "alternating": one * np.where(np.arange(64) % 2, 1, -1)[:, None], "of a plane": k[..., :2],
    }[kind]), 0.3 if kind == "forgetting" else 0.0


@pytest.mark.parametrize("kind", ["random", "forgetting", "alike", "equal", "alternating", "of a plane"])
@pytest.mark.parametrize("c", [64, 40, 13])
def test_the_inverse_of_a_chunk(kind, c):
    """As exact as row by row, for rates of 1. Powers of the matrix would reach 1e17 for equal keys."""
    k, decay = keys_of_chunks(kind)
    k, at = k[:, :c], np.arange(c)
    a = np.einsum("bid,bjd->bij", k, k) * np.exp(-decay * np.maximum(at[:, None] - at, 0))
    a = a.astype(np.float32)[:, None, None]
    want = np.linalg.inv(np.tril(a, -1).astype(np.float64) + np.eye(c))
    np.testing.assert_allclose(delta_net._invert(a), want, atol=2e-6)
    np.testing.assert_allclose(delta_net._invert_rows(jnp.tril(a, -1)), want, atol=2e-6)


def test_the_gradient_of_the_inverse():
    """That of LAPACK's inverse, and nothing above the diagonal."""
    k, _ = keys_of_chunks("alike")
    a = jnp.einsum("bid,bjd->bij", k[:, :40], k[:, :40])[:, None, None].astype(jnp.float32)
    weight = jnp.asarray(np.random.default_rng(1).normal(size=a.shape), jnp.float32)
    eye = jnp.eye(40)[None, None, None]
    got = jax.grad(lambda a: jnp.sum(delta_net._invert(a) * weight))(a)
    want = jax.grad(lambda a: jnp.sum(jnp.linalg.inv(jnp.tril(a, -1) + eye) * weight))(a)
    assert tiny.relative(got, want) < CLOSE and not np.triu(got).any()


@pytest.mark.parametrize("name", ["qwen3_5_text", "qwen3_moe", "gemma4_text"])
def test_gradients_are_those_of_transformers(name, tmp_path):
    """Of a weighted sum of the logits of left-padded rows, for every parameter."""
    pair = family_pairs.made(name, tmp_path)
    # transformers gives the embedding of the padding token, 0, no gradient.
    ids_BT = np.maximum(tiny.random_ids(np.random.default_rng(0), (2, 100), 90), 1)
    valid_BT = np.arange(100)[None] >= np.array([[30], [0]])
    weight = np.random.default_rng(1).normal(size=(2, 100, 99)) * valid_BT[..., None]
    positions = np.maximum(np.cumsum(valid_BT, 1) - 1, 0)
    for q in pair.net.parameters():
        q.requires_grad_(True)
    out = pair.net(input_ids=torch.tensor(ids_BT, dtype=torch.long),
                   attention_mask=torch.tensor(1 * valid_BT),
                   position_ids=torch.tensor(positions), use_cache=False)
    (out.logits * torch.tensor(weight, dtype=torch.float32)).sum().backward()
    theirs = {n: q.grad.numpy() for n, q in pair.net.named_parameters()}

    @jax.jit
    @jax.grad
    def ours(p):
        x, _ = model.forward(p, pair.cfg, model.embed(p, pair.cfg, ids_BT), valid_BT)
        return jnp.sum(model.unembed(p, pair.cfg, x) * jnp.float32(weight))

    names, left = FAMILIES[name].hf, set(theirs)
    grads = tiny.flat(ours(pair.params))
    grads.pop("blocks/block_scale", None)  # transformers has it as a buffer
    for ours_name, grad in grads.items():
        blocks = params_lib.blocks_of(pair.cfg, ours_name) if ours_name.startswith("blocks/") else [None]
        for n, block in enumerate(blocks):
            found = grad if block is None else grad[n]
            found = found if ours_name == "embed" or found.ndim < 2 else found.swapaxes(-1, -2)
            if ours_name.removeprefix("blocks/") in EXPERTS:  # transformers has them in two tensors
                stem = f"model.layers.{block}." + ("mlp." if name == "qwen3_moe" else "") + "experts."
                both, half = theirs[stem + "gate_up_proj"], pair.cfg.experts[2]
                want = {"gate": both[:, :half], "up": both[:, half:], "down": theirs[stem + "down_proj"]}
                want = want[ours_name.rsplit("_", 1)[1]]
            else:
                key = names[ours_name].format(i=block)
                want = theirs[key]
                left.discard(key)
            assert tiny.relative(found, want) < 1e-3, (ours_name, block)
    assert all("experts" in key for key in left)


def written_and_learned(name, rank, injection, mesh):
    """Samples of four activations in groups of two, the scorer's scores, and gradients of AV and AR."""
    cfg, base, spec = CFGS[name], params(name), tiny.spec()
    prompt = dataclasses.replace(spec.av, injection=injection)
    av = verbalizer.init(base, cfg, rank=rank, key=jax.random.key(5))
    av = jax.tree.map(lambda a: a + 0.02, av) if rank else av
    ar = reconstructor.init(base, cfg, 1, rank=rank, key=jax.random.key(6))
    alpha = spec.alpha if injection == "replace" else 0.5

    def run(base, av, ar, h_BD):
        p = verbalizer.weights(base, av)
        e_BD = verbalizer.inject(av, h_BD, alpha)
        keys = generate.row_keys(jax.random.key(0), jnp.arange(8))
        out = verbalizer.write(p, cfg, prompt, e_BD, keys, group=2, max_new=12)

        def score(av, summed):
            p = verbalizer.weights(base, av)
            x = verbalizer.response_hidden(p, cfg, prompt, jnp.repeat(e_BD, 2, 0), out.ids_BT, summed=summed)
            return objectives.token_scores(
                p, cfg, x.reshape(-1, x.shape[-1]), out.ids_BT.reshape(-1), chunk=48)[0]

        zeros = None if rank else jax.tree.map(jnp.zeros_like, av["params"]["blocks"])
        logp = score(av, None)
        grads = jax.grad(lambda av: jnp.sum(score(av, zeros)))(av)

        def recon(ar):
            p = reconstructor.weights(base, ar, 1, cfg=cfg)
            x, _ = model.forward(p, cfg, model.embed(p, cfg, out.ids_BT), jnp.ones((8, 12), bool))
            return jnp.sum((x[:, -1] @ p["head"]) ** 2)

        return out, logp.reshape(8, 12), grads, jax.grad(recon)(ar)

    args = base, av, ar, tiny.activations(4)
    if mesh is not None:
        args = jax.tree.map(lambda a: mesh_lib.shard_array(a, mesh_lib.replicated_sharding(mesh)), args)
    return jax.jit(placement.trace_under_mesh(mesh, run))(*args)


@pytest.mark.parametrize("name, rank, injection", [
    ("hybrid", 0, "norm_matched"), ("mixture", 0, "replace"), ("post", 4, "replace"),
    ("shared", 4, "replace"), ("gemma4", 4, "norm_matched"), ("gemma4", 0, "replace")])
def test_one_policy_on_one_device_and_on_eight(name, rank, injection):
    """The scorer gives the sampler's log-probabilities; on a mesh all is the same."""
    out, logp, *grads = written_and_learned(name, rank, injection, None)
    here = np.arange(12)[None] < np.asarray(out.length_B)[:, None]
    assert here.sum() > 50
    np.testing.assert_allclose(out.logp_BT[here], logp[here], atol=1e-4)
    other, logp_8, *grads_8 = written_and_learned(name, rank, injection, tiny.mesh(2, 2, 2))
    np.testing.assert_array_equal(other.ids_BT, out.ids_BT)
    np.testing.assert_allclose(logp_8, logp, atol=1e-4)
    for one, eight in zip(grads, grads_8, strict=True):
        for leaf, want in tiny.flat(one).items():
            got = tiny.flat(eight)[leaf]
            np.testing.assert_allclose(got, want, atol=2e-4 * max(np.abs(want).max(), 1e-3), err_msg=leaf)


@pytest.mark.parametrize("name, sizes", [("hybrid", None), ("hybrid", (1, 2, 2)), ("gemma4", (1, 2, 2))])
def test_scanned_decoding_is_unrolled_decoding(name, sizes, monkeypatch):
    """Of a large model with blocks of two kinds, by periods; adapters are merged stack by stack."""
    cfg = CFGS[name]
    adapter = jax.tree.map(lambda a: a + 0.02, lora.init(cfg, 4, jax.random.key(1)))
    spec, h, rows = dataclasses.replace(tiny.spec(), lm=cfg), tiny.activations(4), jnp.arange(4)

    def written(mesh):
        base = params(name)
        base = base if mesh is None else mesh_lib.shard_params(base, params_lib.table(cfg), mesh)
        run = lambda b: steps.rollout({"lora": adapter}, b, spec, h, rows, new_key(0), group=2, max_new=6)[0]
        return jax.jit(placement.trace_under_mesh(mesh, run))(base)

    one = written(None)
    monkeypatch.setattr(decode_tp, "UNROLLED", 0)
    assert decode_tp.is_scanned(cfg)
    other = written(None if sizes is None else tiny.mesh(*sizes))
    np.testing.assert_array_equal(one.ids_BT, other.ids_BT)
    np.testing.assert_allclose(one.logp_BT, other.logp_BT, atol=1e-4)


def test_decoding_scans_over_no_weights(monkeypatch):
    """A scan by periods takes indices, with which blocks index the stacks: XLA would copy slices of them."""
    monkeypatch.setattr(decode_tp, "UNROLLED", 0)
    spec, h = dataclasses.replace(tiny.spec(), lm=HYBRID), tiny.activations(2)
    run = lambda b: steps.rollout({"params": b}, b, spec, h, jnp.arange(2), new_key(0), group=2, max_new=4)[0]
    traced = jax.make_jaxpr(run)(params("hybrid")).jaxpr
    loop = next(e for e in traced.eqns if e.primitive.name == "while")
    scans = list(jaxpr_scans(loop.params["body_jaxpr"].jaxpr))
    given = [v.aval for e in scans for v in e.invars[e.params["num_consts"] + e.params["num_carry"] :]]
    assert scans and given and max(a.size for a in given) <= HYBRID.n_blocks


def test_recomputation_keeps_no_copy_of_the_weights():
    """A scan by periods saves what comes into each block, and no slices of the stacks of weights."""
    p = lora.attach(params("hybrid"), lora.init(HYBRID, 3, jax.random.key(1)))
    x, valid_BT = jnp.zeros((2, 30, HYBRID.d_model)), jnp.ones((2, 30), bool)

    def loss(blocks):
        return jnp.sum(model.forward({"blocks": blocks}, HYBRID, x, valid_BT, remat=True)[0])

    adapters = {n: a for n, a in p["blocks"].items() if n.endswith("_lora")}
    grad = jax.make_jaxpr(jax.grad(lambda a: loss({**p["blocks"], **a})))(adapters)
    saved = {v.aval.shape[-2:] for e in jaxpr_scans(grad.jaxpr) for v in e.outvars[e.params["num_carry"]:]}
    of_weights = {a.shape[-2:] for n, a in p["blocks"].items() if n.startswith(("w", "delta_q", "delta_o"))
                  and not n.endswith("_lora")}
    assert x.shape[-2:] in saved and not saved & of_weights


def jaxpr_scans(jaxpr):
    """Every scan of a jaxpr, and of the jaxprs in it."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "scan":
            yield eqn
        for inner in jaxprs_in_params(eqn.params):
            yield from jaxpr_scans(inner)


def test_adapters_of_linear_blocks():
    """LoRA of every kind of block, attached, is LoRA merged; experts have none."""
    cfg, p = HYBRID, params("hybrid")
    adapter = jax.tree.map(lambda a: a + 0.03, lora.init(cfg, 4, jax.random.key(1)))
    assert set(adapter) == {n for n in lora.ADAPTED if not n.startswith("global_")}
    assert set(lora.init(MIXTURE, 4, jax.random.key(1))) == {"wq", "wk", "wv", "wo"}
    assert {name: ab["a"].shape[0] for name, ab in adapter.items()} == {
        name: len(params_lib.blocks_of(cfg, name)) for name in adapter}
    assert {n for n in lora.init(GEMMA4, 4, jax.random.key(1)) if n.startswith("global_")} == {
        "global_wq", "global_wk", "global_wo"}
    ids_BT, valid_BT = tiny.random_ids(np.random.default_rng(0), (2, 30)), np.ones((2, 30), bool)
    attached = lora.attach(p, adapter)
    want = family_pairs.logits_of(lora.merge(attached), cfg, ids_BT, valid_BT)
    assert tiny.relative(family_pairs.logits_of(attached, cfg, ids_BT, valid_BT), want) < CLOSE
    assert tiny.relative(family_pairs.logits_of(p, cfg, ids_BT, valid_BT), want) > 0.01


def test_every_parameter_of_a_mixture_matters():
    cfg, p = MIXTURE, params("mixture")
    ids_BT, valid_BT = tiny.random_ids(np.random.default_rng(1), (2, 30)), np.ones((2, 30), bool)
    want = family_pairs.logits_of(p, cfg, ids_BT, valid_BT)
    changes = [dict(experts=(8, 2, 24)), dict(experts_normed=False)]
    for change in changes:
        got = family_pairs.logits_of(p, dataclasses.replace(cfg, **change), ids_BT, valid_BT)
        assert tiny.relative(got, want) > 0.01, change


@pytest.mark.parametrize("name, layer", [("hybrid", 1), ("hybrid", 4), ("gemma4", 1), ("gemma4", 4)])
def test_patched_kl_reads_the_state_before_the_patched_token(name, layer):
    """Against a forward pass of all blocks with the vector in the text. Above block 4 there is no block."""
    cfg, p, rng = CFGS[name], params(name), np.random.default_rng(3)
    ids_BT, at_B = tiny.random_ids(rng, (2, 20)), jnp.array([12, 19])
    valid_BT = np.arange(20)[None] < np.array([[16], [20]])
    v_BGD = jnp.float32(rng.normal(size=(2, 2, cfg.d_model)))
    got = target.patched_kl(p, cfg, layer, ids_BT, valid_BT, at_B, v_BGD)
    first = layer + 1
    x, _ = forward(params_lib.truncate(p, first, cfg), cfg, model.embed(p, cfg, ids_BT), valid_BT)
    upper = {"blocks": params_lib.slice_blocks(p["blocks"], cfg, first, 5)}
    here_BT = np.arange(20)[None] == at_B[:, None]

    def predict(x):
        y = x if first == 5 else forward(upper, cfg.of_blocks(first, 5), x, valid_BT)[0]
        y_BD = jnp.take_along_axis(y, at_B[:, None, None], 1)[:, 0]
        return jax.nn.log_softmax(model.unembed(p, cfg, y_BD))

    clean = predict(x)
    for g in range(2):
        patched = predict(target.put_vector(x, here_BT, v_BGD[:, g]))
        want = jnp.sum(jnp.exp(clean) * (clean - patched), -1)
        assert want.min() > 0.01
        np.testing.assert_allclose(got[:, g], want, rtol=1e-3)


def test_adapters_of_later_blocks():
    spec = dataclasses.replace(tiny.spec(), lm=HYBRID)
    whole = planting.attach_adapter(params("hybrid"), planting.new_adapter(spec, 0, range(2, 5)), spec, 2)
    used = {n: [bool(a.any()) for a in ab["a"]] for n, ab in whole["blocks"].items() if n.endswith("_lora")}
    assert used["delta_qkv_lora"] == [False, False, True, True]  # blocks 0, 1, 2 and 4
    assert used["wq_lora"] == [True] and used["w_up_lora"] == [False, False, True, True, True]


@pytest.mark.parametrize("name", ["hybrid", "mixture", "gemma4"])
def test_int8_weights_are_the_dequantized_model(name, tmp_path):
    """From a file onto one device and onto eight: logits, decoding by token, and rollouts."""
    cfg, mesh = CFGS[name], tiny.mesh(2, 2, 2)
    if name == "gemma4":  # its files have no other scale of queries
        cfg = dataclasses.replace(cfg, query_scalar=1.0)
    weights.save_hf(tmp_path, cfg, params(name))
    q = model.cast(sharded_load.place(tmp_path, dtype="int8")[1], jnp.float32)
    of_8 = model.cast(sharded_load.place(tmp_path, mesh, "int8")[1], jnp.float32)
    jax.tree.map(np.testing.assert_array_equal, q, of_8)
    floats = {n for n, a in q["blocks"].items() if not int8.is_int8(a) and "norm" not in n}
    assert floats == {"hybrid": {"delta_conv", "delta_dt_bias", "delta_a_log"}, "mixture": {"router"},
                      "gemma4": {"router", "block_scale", "experts_scale"}}[name]
    ids_BT, valid_BT = tiny.random_ids(np.random.default_rng(1), (2, 30)), np.ones((2, 30), bool)
    want = family_pairs.logits_of(int8.dequantize(q), cfg, ids_BT, valid_BT)
    assert tiny.relative(family_pairs.logits_of(q, cfg, ids_BT, valid_BT), want) < CLOSE
    assert family_pairs.decoding_error(SimpleNamespace(cfg=cfg, params=q)) < CLOSE
    spec, h, rows = dataclasses.replace(tiny.spec(), lm=cfg), tiny.activations(8), jnp.arange(8)

    def written(base, mesh=None):
        run = lambda b: steps.rollout({"params": b}, b, spec, h, rows, new_key(0), group=1, max_new=8)[0]
        return jax.jit(placement.trace_under_mesh(mesh, run))(base)

    one, eight = written(q), written(of_8, mesh)
    np.testing.assert_array_equal(one.ids_BT, eight.ids_BT)
    np.testing.assert_allclose(one.logp_BT, eight.logp_BT, atol=1e-4)
