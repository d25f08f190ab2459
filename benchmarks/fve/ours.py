"""The side of nla_jax, of this checkout or of another: the jitted steps of training on a problem's batches.

It uses few functions of nla_jax, so that older checkouts can be measured with it.
"""

import dataclasses
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from benchmarks.fve import problem as problems
from nla_jax import configs, prompts, reconstructor, specs, steps, verbalizer
from nla_jax.lm import model, weights
from nla_jax.lm import params as params_lib
from nla_jax.lm.config import LMConfig
from nla_jax.rl import roles
from nla_jax.sharding import mesh as mesh_lib
from nla_jax.training import jitted_steps
from nla_jax.util.keys import key_for


def read_spec(found: dict) -> specs.Spec:
    """Return the Spec of its fields as JSON. Fields that this version of nla_jax lacks are left out."""

    def build(kind, values: dict, **more):
        names = {f.name for f in dataclasses.fields(kind)}
        return kind(**{k: _tuples(v) for k, v in values.items() if k in names and k not in more}, **more)

    parts = {"lm": build(LMConfig, found["lm"]), "av": build(prompts.AVPrompt, found["av"]),
             "ar": build(prompts.ARPrompt, found["ar"])}
    return build(specs.Spec, found, **parts)


def _tuples(value):
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


class Side:
    """The learners of a problem and its compiled step."""

    def __init__(self, directory: Path):
        p = self.problem = problems.read(directory)
        config = configs.default()
        config.update(p.about["config"])
        self.config: ConfigDict = config
        self.stage, self.spec = p.about["stage"], read_spec(p.about["spec"])
        self.mesh = mesh_lib.make(devices=jax.devices()[:1])
        _, tree = weights.load(Path(p.about["target"]))
        self.base = model.cast(
            mesh_lib.shard_params(tree, params_lib.table(self.spec.lm), self.mesh), self.spec.compute)
        self.reset()
        self.ref = jitted_steps.reference(self._place("av"), config.dtype)
        if self.stage == "rl":
            self.step = jitted_steps.rl_step(config, self.spec, self.state)
        else:
            self.step = jitted_steps.warm_step(config, self.stage, self.spec, self.state)

    def _place(self, role: str):
        c, lm = self.config, self.spec.lm
        if role == "av":
            table = verbalizer.table(lm, rank=c.av.rank, affine=c.av.affine != "none")
        else:
            table = reconstructor.table(lm, self.spec.layer, rank=c.ar.rank, kind=c.ar.kind)
        return mesh_lib.shard_params(self.problem.trees.get(role, {}), table, self.mesh)

    def reset(self) -> None:
        """Return to the start."""
        c = self.config
        learner = lambda role, section, lr: jitted_steps.learner(
            self._place(role), jitted_steps.optimizer(c, section, lr), self.mesh)
        if self.stage == "rl":
            self.state = steps.RLState(learner("av", "rl", "lr_av"), learner("ar", "rl", "lr_ar"))
        else:
            self.state = learner("ar", self.stage, "lr")

    def run(self, i: int) -> dict:
        """Run step i; return its metrics and its seconds, which include moving the batch to the device."""
        begin = time.perf_counter()
        batch = mesh_lib.shard_batch(self.problem.batches[i], self.mesh)
        more = (self.ref, batch, key_for(self.config.seed, "rl", i)) if self.stage == "rl" else (batch,)
        self.state, metrics = jax.block_until_ready(self.step(self.state, self.base, *more))
        seconds = time.perf_counter() - begin
        return {"seconds": seconds} | {k: float(v) for k, v in metrics.items() if jnp.ndim(v) == 0}

    def export(self) -> dict:
        """Return {"av": tree, "ar": tree} as trained so far."""
        if self.stage == "rl":
            return {"av": self.state.av.params, "ar": self.state.ar.params}
        return {"av": self.problem.trees["av"], "ar": self.state.params}

    def check(self) -> dict:
        """Return what the other sides must agree with. The state is not changed."""
        c, spec, given = self.config, self.spec, self.problem.check
        exact = dataclasses.replace(spec, dtype="float32")
        av, ar = self._place("av"), self._place("ar")
        logp = jax.jit(lambda av, base: roles.answer_logp(av, base, exact, given["h_ND"], given["ids_NT"]))(
            av, self.base)
        real = np.arange(given["ids_NT"].shape[1])[None] < given["length_N"][:, None]

        def read(ar, base):
            params = reconstructor.weights(base, ar, spec.layer, exact.compute, spec.lm)
            return reconstructor.reconstruct(
                params, spec.lm, *(given[f"ar_{n}"] for n in ("ids_NT", "valid_NT", "last_N")))

        out = {"logp_fp32": np.asarray(logp)[real].tolist(),
               "h_fp32": np.asarray(jax.jit(read)(ar, self.base)).tolist()}
        section = "rl" if self.stage == "rl" else self.stage
        tx_ar = jitted_steps.optimizer(c, section, "lr_ar" if section == "rl" else "lr")
        batch = {"ids_BT": given["ar_ids_NT"], "valid_BT": given["ar_valid_NT"],
                 "last_B": given["ar_last_N"], "h_BD": given["h_ND"],
                 "weight_B": np.ones(len(given["h_ND"]), np.float32)}
        ar_step = jax.jit(lambda role, base, b: steps.warm_start_ar(role, base, b, spec=spec, tx=tx_ar)[1])
        found = ar_step(jitted_steps.learner(ar, tx_ar, self.mesh), self.base, batch)
        out["ar"] = {k: float(found[k]) for k in ("loss", "grad_norm")}
        if self.stage == "rl":
            out["av"] = self._check_av(av, given)
        return out

    def _check_av(self, av, given) -> dict:
        """Return the KL and the gradient norm of an update whose reference has weaker adapters than AV."""
        names = [f.name for f in dataclasses.fields(steps.RLOptions)]
        opts = steps.RLOptions(**{n: self.config.rl[n] for n in names})
        opts = dataclasses.replace(opts, micro_av=1, update_group=0, group=1)
        tx = jitted_steps.optimizer(self.config, "rl", "lr_av")
        ref = {**av, "lora": {n: ab | {"b": 0.9 * ab["b"]} for n, ab in av["lora"].items()}} \
            if "lora" in av else av
        batch = {n: given[n] for n in ("h_ND", "ids_NT", "logp_NT", "length_N", "advantage_N")}

        def update(role, base, ref, b):
            return roles.av_update(role, base, ref, self.spec, opts, tx, b)[1]

        found = jax.jit(update)(jitted_steps.learner(av, tx, self.mesh), self.base,
                       jitted_steps.reference(ref, self.config.dtype), batch)
        return {k: float(found[k]) for k in ("kl", "av_grad_norm")}
