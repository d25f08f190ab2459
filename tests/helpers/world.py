"""A whole run in seconds: a tiny target that chatters, a tiny corpus, and every stage on them.

Nothing is learned here; what a run writes, refuses and prints is what the tests look at. The target
is a random Llama whose next token hangs on the last one, so that about half of its answers are whole
explanations and the others fail in all the ways that there are.
"""

import contextlib
import dataclasses
import functools
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from nla_jax import bundle, cli, configs, prompts, specs
from nla_jax.data import corpora, explanations
from nla_jax.lm import params as params_lib
from nla_jax.lm import tokenizer as tok_lib
from nla_jax.lm import weights
from nla_jax.pipeline import stages
from nla_jax.sharding import mesh as mesh_lib
from tests.helpers import tiny

SEED = 3
LETTERS = "abcdefghijklmnopqrstuvwxyz"
# What may follow a token, and how often; "a" stands for any letter, "." for the end of the turn.
CHAIN = {
    "assistant": {"<": 0.85, "a": 0.15},
    "\n": {"a": 0.9, "</": 0.1},
    "<": {"explanation": 1.0},
    "explanation": {">": 1.0},
    ">": {"\n": 1.0},
    "a": {"a": 0.35, "Ġ": 0.15, "\n": 0.1, "</": 0.35, ".": 0.05},
    "Ġ": {"a": 0.5, "t": 0.5},  # two tokens for what the tokenizer writes as one
    "</": {"explanation": 1.0},
}


def target(seed: int = 0, n_blocks: int = 2):
    """(config, parameters, tokenizer) of the chattering target."""
    tok = tiny.tokenizer()
    tok.chat_template = tiny.CHAT_TEMPLATE.replace("assistant\n", "assistant")
    cfg = dataclasses.replace(tiny.lm(tied=False, n_blocks=n_blocks), max_position=1536)
    tree = params_lib.init(cfg, jax.random.key(seed))
    tree = jax.tree_util.tree_map_with_path(
        lambda path, a: 0.3 * np.array(a) if path[-1].key in ("wo", "w_down") else np.array(a), tree
    )
    vocab = tok.get_vocab()

    def ids(token):
        if token == "a":
            return [vocab[c] for c in LETTERS]
        return [vocab[{"\n": "Ċ", ".": "<|im_end|>"}.get(token, token)]]

    # One dimension of the residual stream for each state of the chain.
    tree["embed"][:, : len(CHAIN)] = 0.0
    tree["lm_head"][: len(CHAIN)] = 0.0
    for state, (token, following) in enumerate(CHAIN.items()):
        tree["embed"][ids(token), state] = 4.0
        for other, share in following.items():
            for i in ids(other):
                # The final norm turns the 4.0 into about 5.
                tree["lm_head"][state, i] = (16.0 + np.log(share / len(ids(other)))) / 5.0
    return cfg, tree, tok


def write_target(directory: Path, seed: int = 0, n_blocks: int = 2) -> Path:
    """A directory in Hugging Face layout."""
    cfg, tree, tok = target(seed, n_blocks)
    tok_lib.save(tok, directory)
    weights.save_hf(directory, cfg, tree)
    return directory


def write_corpus(path: Path, rng, held_out: int = 6, trained: int = 24) -> None:
    """Documents of made-up words, of which `held_out` fall to the held-out side by their hash."""
    lines, wanted = [], {True: held_out, False: trained}
    while any(wanted.values()):
        words = ["".join(rng.choice(list("aeioulnrst"), rng.integers(2, 7))) for _ in range(24)]
        text = " ".join(words)
        if wanted[corpora.is_heldout(text)]:
            wanted[corpora.is_heldout(text)] -= 1
            lines.append(json.dumps({"id": len(lines), "text": text}))
    path.write_text("\n".join(lines) + "\n", "utf-8")


def write_explanations(path: Path, corpus: str) -> None:
    """One for each document, about its first words."""
    records = []
    for i, doc in enumerate(corpora.open_corpus(corpus)):
        end = doc.text.index(" ", 30)
        first, last = doc.text[:end].split()[0], doc.text[:end].split()[-1]
        records.append(explanations.record_of(i, doc, 0, end, f"on {first}\nthe {last}"))
    explanations.append(path, records)


def settings(directory: Path) -> dict:
    """What the run's config changes in the defaults."""
    # The same widths for lessons and written explanations: one program serves both.
    stage = dict(steps=2, batch=8, max_tokens=64, lr=1e-3)
    return dict(
        seed=SEED, layer=0, target=f"{directory / 'target'}", dtype="float32", remat=False, vocab_chunk=64,
        av_template=tiny.AV_TEMPLATE, ar_template=tiny.AR_TEMPLATE, checkpoint_every=0,
        data=dict(
            corpus=f"file:{directory / 'corpus.jsonl'}", ood=f"file:{directory / 'ood.jsonl'}",
            explanations=f"{directory / 'explanations.jsonl'}", warm_windows=8, rl_windows=8,
            window_tokens=48, positions=4, min_position=16, heldout_rows=8, ood_rows=8, batch=8,
        ),
        av=dict(rank=2), ar=dict(rank=2),
        lessons_ar=stage, warm_ar=stage, warm_av=stage,
        rl=dict(steps=2, batch=4, group=4, max_new=16),
        eval=dict(batch=8, bootstrap=2000),
    )


def config(directory: Path, **changes):
    c = configs.default()
    c.update(settings(directory))
    c.update(changes)
    return c


def write_config(directory: Path) -> Path:
    """The same config as an experiment file."""
    path = directory / "experiment.py"
    path.write_text(
        "from nla_jax import configs\n\n\ndef get_config():\n    c = configs.default()\n"
        f"    c.update({settings(directory)!r})\n    return c\n",
        "utf-8",
    )
    return path


def lay_out(directory: Path) -> Path:
    """Target, corpora, explanations and config file in `directory`."""
    rng = np.random.default_rng(0)
    write_target(directory / "target")
    write_corpus(directory / "corpus.jsonl", rng)
    write_corpus(directory / "ood.jsonl", rng, 2, 6)
    write_explanations(directory / "explanations.jsonl", f"file:{directory / 'corpus.jsonl'}")
    write_config(directory)
    return directory


def build(directory: Path) -> Path:
    """The same, and the finished run in `directory`/run."""
    lay_out(directory)
    with one_device(), quick_compiles(directory):
        stages.run(config(directory), directory / "run")
    return directory


def frozen_bundle(directory: Path, out: Path) -> Path:
    """The bundle of the run in `directory` with the frozen target as AR, which reads the bare explanation."""
    made = bundle.load(directory / "run" / "bundle")
    roles, extraction = made.meta["roles"], made.meta["extraction"]
    templates = {**made.meta["prompt_templates"], "ar": prompts.AR_TEMPLATE}
    spec = specs.make_spec(
        made.spec.lm, made.tok, layer=made.spec.layer, dtype=made.spec.dtype,
        alpha=extraction["injection_scale"], marker=made.meta["tokens"]["injection_char"],
        av_template=templates["av"], ar_template=templates["ar"],
    )
    meta = specs.sidecar(
        spec, target=made.meta["base_checkpoint"], target_path=directory / "target",
        av_rank=roles["av_rank"], ar_rank=0, affine=roles["affine"], ar_kind="frozen",
        marker=made.meta["tokens"]["injection_char"], av_template=templates["av"],
        ar_template=templates["ar"], stage=made.meta["stage"], max_new=made.meta["max_new_tokens"],
        mean_D=made.meta["mean_direction"], training=made.meta["training"],
    )
    bundle.save(out, meta, made.av, {}, made.tok)
    return out


@contextlib.contextmanager
def quick_compiles(directory: Path):
    """Programs are hardly optimized, and kept in `directory` for whoever needs the same one again."""
    wanted = {
        "jax_compilation_cache_dir": str(directory / "xla"),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_disable_most_optimizations": True,
    }
    before = {name: jax.config.values[name] for name in wanted}
    for name, value in wanted.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@contextlib.contextmanager
def one_device():
    """Meshes are made of the first device: eight compile slowly, and test_meshes.py looks at those."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mesh_lib, "make", functools.partial(mesh_lib.make, devices=jax.devices()[:1]))
        yield


def nla(*argv) -> int:
    """The exit status of the command `nla ARGV`; argparse's own exits count as one."""
    try:
        return cli.main([str(a) for a in argv])
    except SystemExit as e:
        return e.code
