"""Run Tunix on a case: its vanilla sampler, and one GRPO update. It runs in Tunix's own environment.

It is a script and not a module, because that environment does not have nla_jax: `benchmarks.peer` gives it
the weights and the inputs as files. Requests and answers are JSON lines, as of `benchmarks.child`.

The model is Tunix's Llama3 with the case's sizes. It has what SmolLM2 needs: grouped heads, tied embeddings,
and rotary embeddings over halves, as in Hugging Face's layout, which nla_jax's parameters have too. Tunix
0.1.7 ignores the config's `rope_theta` (its attention calls `apply_rope` without it, which means 1,000,000),
so it is set here.
"""

import functools
import json
import os
import sys
import time
from importlib import metadata
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tunix.generate.sampler import CacheConfig, Sampler
from tunix.models.llama3 import model as llama
from tunix.rl import algo_core, common
from tunix.rl.grpo.grpo_learner import GRPOConfig
from tunix.rl.trainer import Trainer
from tunix.sft.peft_trainer import TrainingConfig

APPLY_ROPE = llama.apply_rope
PAD = -1  # an id that no prompt and no answer has
ATTENTION = {"wq": "q_proj", "wk": "k_proj", "wv": "v_proj", "wo": "o_proj"}
MLP = {"w_gate": "gate_proj", "w_up": "up_proj", "w_down": "down_proj"}
NORMS = {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}


class Tokens:
    """In place of a tokenizer: every text is the case's prompt, and no answer ends."""

    def __init__(self, prompt: list[int], vocab: int):
        self.prompt, self.vocab = prompt, vocab

    def encode(self, text, **kwargs):
        return self.prompt

    def decode(self, ids, **kwargs):
        return ""

    def bos_id(self):
        return None

    def eos_id(self):
        return self.vocab + 1

    def pad_id(self):
        return PAD


def build(words: dict, tree, dtype) -> llama.Llama3:
    """Return the model with the parameters of `tree`, {"blocks/wq": [L, in, out], ...}, in `dtype`."""
    lm = words["lm"]
    config = llama.ModelConfig(
        num_layers=lm["n_blocks"], vocab_size=lm["vocab_size"], embed_dim=lm["d_model"],
        hidden_dim=lm["d_ff"], num_heads=lm["n_heads"], head_dim=lm["head_dim"],
        num_kv_heads=lm["n_kv_heads"], rope_theta=int(lm["rope_theta"]), norm_eps=lm["norm_eps"],
        weight_tying=lm["tied"])
    llama.apply_rope = functools.partial(APPLY_ROPE, rope_theta=lm["rope_theta"])
    net = llama.Llama3(config, rngs=nnx.Rngs(0))

    def put(parameter, value):
        parameter.set_value(jnp.asarray(np.asarray(value).reshape(parameter.get_value().shape), dtype))

    put(net.embedder.input_embedding, tree["embed"])
    put(net.final_norm.w, tree["final_norm"])
    if not lm["tied"]:
        put(net.lm_head.w, tree["lm_head"])
    for i, layer in enumerate(net.layers):
        for name, place in ATTENTION.items():
            put(getattr(layer.attn, place).w, tree[f"blocks/{name}"][i])
        for name, place in MLP.items():
            put(getattr(layer.mlp, place).kernel, tree[f"blocks/{name}"][i])
        for name, place in NORMS.items():
            put(getattr(layer, place).w, tree[f"blocks/{name}"][i])
    return net


class Side:
    """The policy, the frozen reference with the same weights, Tunix's sampler and its trainer."""

    def __init__(self, words: dict):
        self.words, given = words, np.load(words["path"], allow_pickle=False)
        dtype = jnp.dtype(words["dtype"])
        tree = {k.removeprefix("params/"): given[k] for k in given if k.startswith("params/")}
        self.policy, self.ref = build(words, tree, dtype), build(words, tree, dtype)
        self.answers, self.advantage = given["answers_NT"], given["advantage_N"]
        self.ids = self.answers
        rows, T, prompt = len(self.answers), self.answers.shape[1], given["prompt_P"]
        self.prompts = np.tile(prompt[None], (rows, 1))
        lm, vocab = words["lm"], words["lm"]["vocab_size"]
        self.eos = vocab + 1
        cache = CacheConfig(cache_size=len(prompt) + T, num_layers=lm["n_blocks"],
                            num_kv_heads=lm["n_kv_heads"], head_dim=lm["head_dim"])
        self.sampler = Sampler(self.policy, Tokens(prompt.tolist(), vocab), cache)
        self.grpo = GRPOConfig(num_generations=words["group"], beta=words["kl"], epsilon=0.2,
                               loss_agg_mode="token-mean", kl_loss_mode="low_var_kl")
        self.grpo.temperature = 1.0
        tx = optax.chain(optax.clip_by_global_norm(words["clip"]),
                         optax.adamw(words["lr"], b1=0.9, b2=words["b2"], weight_decay=0.0))
        self.micro = words["micro"]
        self.trainer = Trainer(
            self.policy, tx, TrainingConfig(eval_every_n_steps=10**9, max_steps=10**9,
                                            gradient_accumulation_steps=self.micro), lambda: {})
        self.trainer.with_loss_fn(self._loss, has_aux=True)
        self.trainer.with_gen_model_input_fn(lambda x: {"train_example": x})
        self.train, _ = self.trainer.jit_train_and_eval_step()
        self.count = 0

    def _loss(self, model, train_example):
        return algo_core.grpo_loss_fn(
            model, train_example, algo_config=self.grpo, pad_id=PAD, eos_id=self.eos)

    def _logps(self, model, prompts, ids):
        graph, state = nnx.split(model)
        return common.compute_per_token_logps(
            graph, state, prompt_tokens=jnp.asarray(prompts), completion_tokens=jnp.asarray(ids), pad_id=PAD,
            eos_id=self.eos)

    def check(self) -> dict:
        """Return the log-probabilities of up to four answers, by precision."""
        n = min(len(self.answers), 4)
        kind = "fp32" if self.words["dtype"] == "float32" else "bf16"
        logp = self._logps(self.policy, self.prompts[:n], self.answers[:n])
        return {f"logp_{kind}": np.asarray(logp, np.float32).tolist()}

    def rollout(self) -> dict:
        """Sample an answer for every row with the policy's present weights."""
        self.count += 1
        self.sampler.transformer_state = nnx.variables(self.policy)
        out = self.sampler(
            ["p"] * len(self.prompts), self.answers.shape[1], max_prompt_length=self.prompts.shape[1],
            temperature=1.0, top_p=1.0, seed=self.count)
        self.ids = np.stack([np.asarray(t) for t in out.tokens])
        return {"length": float(self.ids.shape[1])}

    def _examples(self):
        """Yield the microbatches of an update on the last answers, with the reference's forward pass."""
        parts = (self.prompts, self.ids, self.advantage)
        for prompts, ids, adv in zip(*(np.array_split(a, self.micro) for a in parts), strict=True):
            yield common.TrainExample(
                prompt_ids=jnp.asarray(prompts), prompt_mask=jnp.ones(prompts.shape, jnp.int32),
                completion_ids=jnp.asarray(ids), completion_mask=jnp.ones(ids.shape, jnp.int32),
                advantages=jnp.asarray(adv), ref_per_token_logps=self._logps(self.ref, prompts, ids),
                old_per_token_logps=None)

    def gradient(self) -> dict:
        """Return the norm of the gradient of a whole update, without updating."""
        f = nnx.jit(nnx.grad(lambda model, x: self._loss(model, x)[0]))
        grads = [f(self.policy, x) for x in self._examples()]
        mean = jax.tree.map(lambda *g: sum(g) / len(g), *grads)
        return {"av_grad_norm": float(optax.global_norm(mean))}

    def av_update(self) -> dict:
        """Update the policy once."""
        found = [self.train(x) for x in self._examples()]
        jax.block_until_ready(nnx.state(self.policy))
        return {"loss": float(np.mean([float(loss) for loss, _, _ in found]))}


def rss_peak() -> int:
    """Return the peak resident memory in bytes (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) * 1024 for x in lines if x.startswith("VmHWM"))


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    answer = lambda value: print(json.dumps(value), file=answers, flush=True)
    side = Side(json.loads(sys.argv[1]))
    answer({"tunix": metadata.version("google-tunix"), "jax": jax.__version__,
            "device": jax.devices()[0].device_kind})
    for line in sys.stdin:
        request = json.loads(line)
        match request["do"]:
            case "check":
                answer(side.check())
            case "gradient":
                answer(side.gradient())
            case "phase":
                begin, cpu = time.perf_counter(), time.process_time()
                info = getattr(side, request["phase"])()
                seconds = {request["phase"]: time.perf_counter() - begin}
                answer({"seconds": seconds, "info": info, "cpu": time.process_time() - cpu})
            case _:
                answer({"rss": rss_peak(), "device": None, "notes": {}})


if __name__ == "__main__":
    main()
