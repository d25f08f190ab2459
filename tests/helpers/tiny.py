"""Tiny things for tests: a random Llama, a tokenizer of some 300 tokens, prompts, batches.

Shapes as in `nla_jax`: B rows, T tokens, D d_model, V vocabulary.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from nla_jax import prompts, reconstructor, specs, steps, verbalizer
from nla_jax.lm import params as params_lib
from nla_jax.lm.config import LMConfig
from nla_jax.sharding import mesh as mesh_lib

MARKER = "\u3231"
AV_TEMPLATE = "Say.\n<concept>{marker}</concept>"
AR_TEMPLATE = "<text>\n{explanation}\n</text> <summary>"
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = ("explanation", "concept", "text", "summary", "user", "assistant", "</", "Ġthe", "Ġof", ".<")
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def tokenizer(bos: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level BPE: all bytes, a few words built from the left, chat tokens, one marker."""
    tokens = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = []
    for word in WORDS:
        for end in range(2, len(word) + 1):
            if (pair := (word[: end - 1], word[end - 1])) not in merges:
                merges.append(pair)
                tokens.append(word[:end])
    core = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(t, normalized=False) for t in SPECIAL])
    core.add_tokens([AddedToken(MARKER, normalized=False)])
    if bos:
        from tokenizers import processors

        core.post_processor = processors.TemplateProcessing(
            single=f"{SPECIAL[0]} $A",
            special_tokens=[(SPECIAL[0], core.token_to_id(SPECIAL[0]))],
        )
    tok = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|im_end|>",
        bos_token=SPECIAL[0], clean_up_tokenization_spaces=False,
    )
    tok.chat_template = CHAT_TEMPLATE
    return tok


def lm(tied: bool = True, n_blocks: int = 4, vocab_size: int = 304) -> LMConfig:
    """D = 32, four heads over two key/value heads."""
    return LMConfig(
        vocab_size=vocab_size, d_model=32, n_blocks=n_blocks, n_heads=4, n_kv_heads=2, head_dim=8,
        d_ff=64, norm_eps=1e-5, tied=tied, max_position=1024,
    )


def smallest(n_blocks: int = 2) -> LMConfig:
    """D = 8, for tests that take very many steps."""
    return dataclasses.replace(
        lm(tied=False, n_blocks=n_blocks), d_model=8, n_heads=2, n_kv_heads=1, head_dim=4, d_ff=16)


def params(cfg: LMConfig, seed: int = 0) -> dict:
    """Random float32 parameters whose norm weights are not all one."""
    tree = params_lib.init(cfg, jax.random.key(seed))
    leaves, treedef = jax.tree_util.tree_flatten_with_path(tree)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    shaken = [
        a * (1 + 0.2 * jax.random.normal(k, a.shape)) if "norm" in str(path) else a
        for (path, a), k in zip(leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(treedef, shaken)


@functools.cache
def spec(**changes) -> specs.Spec:
    """The tiny NLA in float32 over `tokenizer()`; `changes` replace fields of the Spec."""
    tok = tokenizer()
    made = specs.Spec(
        lm=lm(), layer=2, alpha=6.0, av=prompts.av_prompt(tok, AV_TEMPLATE, MARKER),
        ar=prompts.ar_prompt(tok, AR_TEMPLATE), dtype="float32", remat=False, vocab_chunk=64,
    )
    return dataclasses.replace(made, **changes)


OPEN_ID, CLOSE_ID, NEWLINE_ID, EOS_ID = 3, 5, 7, 9


@functools.cache
def talker(**changes) -> specs.Spec:
    """`spec` with tags and ends of single tokens, which `talker_params` writes often."""
    made = spec(**changes)
    av = dataclasses.replace(
        made.av, open=(OPEN_ID,), close=(CLOSE_ID,), newline=(NEWLINE_ID,), eos=(EOS_ID,),
        end_of_turn=EOS_ID, pad=EOS_ID,
    )
    return dataclasses.replace(made, av=av)


def talker_params(cfg: LMConfig, seed: int = 0) -> dict:
    """A random model that samples opened, unopened, closed, empty and truncated answers alike.

    Every embedding has the same first entry and the first entry of the residual stream becomes a
    constant, through which the unembedding gives some tokens a higher logit.
    """
    tree = params(dataclasses.replace(cfg, tied=False), seed)
    tree["embed"] = tree["embed"].at[:, 0].set(3.0)
    tree["final_norm"] = tree["final_norm"].at[0].set(1.0)
    bias = jnp.zeros(cfg.vocab_size).at[jnp.array([OPEN_ID, CLOSE_ID, NEWLINE_ID, EOS_ID])].set(
        jnp.array([3.0, 2.9, 1.3, 1.8]))
    tree["lm_head"] = tree["lm_head"].at[0].set(bias)
    return tree


def rl_options(group: int, max_new: int, **changes) -> steps.RLOptions:
    """Options of RL: rewards of log MSE, no KL, no cost of length, AR trained, and one microbatch."""
    plain = {"reward": "log_mse", "advantage": "mean", "kl": 0.0, "length_penalty": 0.0, "train_ar": True,
             "micro_av": 1, "micro_ar": 1}
    return steps.RLOptions(group=group, max_new=max_new, **{**plain, **changes})


def placed_pair(spec: specs.Spec, rank: int, on):
    """Return (the target's parameters on a mesh, {role: table}, `place`).

    place(role) puts a new tree of a role on the mesh."""
    own = talker_params(spec.lm)
    tables = {"av": verbalizer.table(spec.lm, rank=rank),
              "ar": reconstructor.table(spec.lm, spec.layer, rank=rank)}
    trees = {"av": verbalizer.init(own, spec.lm, rank=rank, key=jax.random.key(0)),
             "ar": reconstructor.init(own, spec.lm, spec.layer, rank=rank, key=jax.random.key(1))}
    place = lambda role: mesh_lib.shard_params(jax.tree.map(np.array, trees[role]), tables[role], on)
    return mesh_lib.shard_params(own, params_lib.table(spec.lm), on), tables, place


def reference_cut(av, row, length, closed):
    """The words of an answer in plain Python, or None where it cannot be read."""
    row = row[:length].tolist()
    if not closed or tuple(row[: len(av.open)]) != av.open:
        return None
    row = row[: len(row) - len(av.close)]
    if row[-1:] == list(av.newline):
        row = row[:-1]
    return row[len(av.open) :] or None


def activations(n: int, d: int = 32, seed: int = 0) -> np.ndarray:
    """h [n, D] float32 of differing norms."""
    rng = np.random.default_rng(seed)
    h = rng.normal(size=(n, d)) * rng.uniform(2, 20, size=(n, 1))
    return h.astype(np.float32)


def random_ids(rng, shape, high: int = 256) -> np.ndarray:
    return rng.integers(0, high, shape).astype(np.int32)


def flat(tree) -> dict[str, np.ndarray]:
    """{"a/b": array} of a pytree, on the host."""
    pairs = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {
        "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path):
        np.asarray(a) for path, a in pairs
    }


def assert_trees_close(a, b, *, rtol=0.0, atol=0.0) -> None:
    """Leaf by leaf, each named when it differs."""
    a, b = flat(a), flat(b)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_allclose(a[name], b[name], rtol=rtol, atol=atol, err_msg=name)


def relative(a, b) -> float:
    """Largest difference of two arrays over the root mean square of the second."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.abs(a - b).max() / np.sqrt(np.mean(b * b)))


def mesh(*sizes):
    """A mesh of the first devices."""
    return mesh_lib.make(*sizes, devices=jax.devices()[: int(np.prod(sizes))])


def leaves(tree) -> dict[str, jax.Array]:
    """{"a/b": array} of nested dicts, on the devices."""
    pairs = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {"/".join(k.key for k in path): a for path, a in pairs}


def assert_placed(tree, table, on) -> None:
    """Every leaf of the nested dicts lies on the mesh where the table says."""
    for name, value in leaves(tree).items():
        want = jax.sharding.NamedSharding(on, mesh_lib.spec_of(value.shape, table[name].axes, on))
        assert value.sharding.is_equivalent_to(want, value.ndim), (name, value.sharding)
