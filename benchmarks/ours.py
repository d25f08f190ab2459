"""Run the phases of nla_jax, jitted as in training and evaluation."""

import dataclasses
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import data
from benchmarks.cases import Case
from nla_jax import reconstructor, specs, steps, target, verbalizer
from nla_jax.lm import attention_kernels, model, optimize
from nla_jax.lm import params as params_lib
from nla_jax.rl import reading, roles
from nla_jax.sharding import mesh as mesh_lib
from nla_jax.training import jitted_steps
from nla_jax.util.keys import new_key


def whole_answers(prompt, ids_BT, length_B, closed_B):
    """Replace `verbalizer.parse_ids` for answers without tags: every answer is valid in full length."""
    return jnp.zeros_like(length_B), length_B, jnp.ones_like(closed_B)


class Side:
    """State and compiled functions of one case. `run(phase)` runs a phase once and waits for the result.

    For the phase `step`, set `verbalizer.parse_ids` to `whole_answers`, because random answers have no tags.
    """

    def __init__(self, case: Case):
        self.case, self.inputs = case, data.inputs(case)
        self.mesh = mesh_lib.make(devices=jax.devices()[:1])
        self.spec = specs.Spec(
            lm=case.lm, layer=case.layer, alpha=self.inputs.alpha, av=self.inputs.prompt,
            ar=self.inputs.ar_prompt, remat=case.remat, vocab_chunk=case.vocab_chunk,
            attention=attention_kernels.resolve(case.attention, jax.devices()[0], case.lm, "bfloat16"),
        )
        self.tx = optimize.optimizer(data.LR, 1, final=1.0, clip=data.CLIP, b2=data.B2)
        self.opts = steps.RLOptions(
            group=case.group, max_new=case.max_new, reward="log_mse", advantage="zscore", kl=data.KL,
            length_penalty=0.0, train_ar=True, micro_av=case.micro, micro_ar=case.micro,
            update_widths=case.widths,
        )
        self._load()
        self._functions()
        self.count, self.notes, self.seconds = 0, {}, 0.0
        # Random answers, until the first rollout.
        self.ids, self.logp = self.inputs.answers_NT, np.zeros(self.inputs.answers_NT.shape, np.float32)

    def _load(self):
        case = self.case
        if case.weights == "device":
            whole = jax.jit(lambda k: params_lib.init(case.lm, k, jnp.bfloat16))(new_key(0))
        else:
            whole = data.params(case)
        place = functools.partial(mesh_lib.shard_params, mesh=self.mesh)
        source = place(whole, params_lib.table(case.lm))
        whole = None
        self.base = model.cast(source, self.spec.compute)
        if case.rank:
            av, ref, ar = ({"lora": data.adapters(case, role)} for role in ("av", "ref", "ar"))
            ar["head"] = np.eye(case.lm.d_model, dtype=np.float32)
        else:
            av = verbalizer.init(source, case.lm)
            ref = verbalizer.init(data.other_reference(case, source), case.lm)
            ar = reconstructor.init(source, case.lm, case.layer)
        source = None
        table = verbalizer.table(case.lm, rank=case.rank)
        av, self.ref = place(av, table), place(ref, table)
        ar = place(ar, reconstructor.table(case.lm, case.layer, rank=case.rank))
        learner = functools.partial(jitted_steps.learner, tx=self.tx, mesh=self.mesh)
        self.state = steps.RLState(learner(av), learner(ar))

    def _functions(self):
        case, spec, opts, tx, state = self.case, self.spec, self.opts, self.tx, self.state

        def score(ar, base, ids, start, end, h):
            return reading.score(ar, base, spec, ids, start, end, h, case.widths, case.micro)[0]

        def ar_update(role, base, batch):
            grads, scalars, _ = roles.ar_grads(role.params, base, spec, batch, case.micro, False, case.widths)
            role, info = optimize.apply(role, grads, tx)
            return role, scalars | info

        self.f = {
            "step": jitted_steps.jit_step(
                functools.partial(steps.rl, spec=spec, opts=opts, tx_av=tx, tx_ar=tx), state),
            "rollout": jax.jit(functools.partial(
                self._rollout, spec=spec, group=case.group, max_new=case.max_new)),
            "score": jax.jit(score),
            "read": jax.jit(score),
            "av_update": jitted_steps.jit_step(
                lambda role, base, ref, batch: roles.av_update(role, base, ref, spec, opts, tx, batch),
                state.av),
            "ar_update": jitted_steps.jit_step(ar_update, state.ar),
            "warm_av": jitted_steps.jit_step(
                functools.partial(steps.warm_start_av, spec=spec, tx=tx, micro=1), state.av),
            "warm_ar": jitted_steps.jit_step(
                functools.partial(steps.warm_start_ar, spec=spec, tx=tx, micro=1), state.ar),
            "capture": jax.jit(lambda base, ids, at: target.capture(
                base, case.lm, case.layer, ids, jnp.ones(ids.shape, bool), at)),
            "write": jax.jit(functools.partial(
                self._rollout, spec=spec, group=1, max_new=case.max_new)),
        }

    @staticmethod
    def _rollout(av, base, h, rows, key, *, spec, group, max_new):
        return steps.rollout(av, base, spec, h, rows, key, group=group, max_new=max_new)

    def _put(self, tree):
        """Replicate on the mesh, so that every call of a function gets the same shardings."""
        return jax.tree.map(lambda a: mesh_lib.shard_array(a, mesh_lib.replicated_sharding(self.mesh)), tree)

    def _timed(self, name: str, *args):
        """Call a compiled function, wait for its result, and add the time to `seconds`."""
        jax.block_until_ready(args)
        begin = time.perf_counter()
        out = jax.block_until_ready(self.f[name](*args))
        self.seconds += time.perf_counter() - begin
        return out

    def run(self, phase: str) -> tuple[float, dict]:
        """Run a phase once; return (seconds, its scalar metrics)."""
        self.seconds = 0.0
        info = getattr(self, phase)()
        return self.seconds, {k: float(v) for k, v in info.items() if jnp.ndim(v) == 0}

    def _key(self):
        self.count += 1
        return self._put(new_key(self.count))

    def _h_ND(self):
        return np.repeat(self.inputs.h_BD, self.case.group, 0)

    def _ar_batch(self, ids, h, length=None):
        rows = jnp.full(ids.shape[0], ids.shape[1]) if length is None else jnp.asarray(length)
        ids, valid, last = reconstructor.splice(self.spec.ar, jnp.asarray(ids), jnp.zeros_like(rows), rows)
        return self._put({"ids_BT": ids, "valid_BT": valid, "last_B": last, "h_BD": h,
                          "weight_B": np.ones(len(ids), np.float32)})

    def step(self):
        batch = mesh_lib.shard_batch({"h_BD": self.inputs.h_BD,
                                "row_B": np.arange(self.case.batch, dtype=np.int32)}, self.mesh)
        self.state, metrics = self._timed("step", self.state, self.base, self.ref, batch, self._key())
        if float(metrics["ok"]) != 1 or float(metrics["length"]) != self.case.max_new:
            raise SystemExit(f"every answer must count and have {self.case.max_new} tokens: {metrics}")
        return metrics

    def rollout(self):
        h, rows = self._put((self.inputs.h_BD, np.arange(self.case.batch, dtype=np.int32)))
        out, *_ = self._timed("rollout", self.state.av.params, self.base, h, rows, self._key())
        self.ids, self.logp = np.asarray(out.ids_BT), np.asarray(out.logp_BT)
        return {"length": out.length_B.mean()}

    def score(self):
        length = self.inputs.lengths_N
        args = self._put((self.ids, np.zeros_like(length), length, self._h_ND()))
        return {"mse": self._timed("score", self.state.ar.params, self.base, *args).mean()}

    def av_update(self):
        batch = self._put({
            "h_ND": self._h_ND(), "ids_NT": self.ids, "logp_NT": self.logp,
            "length_N": self.inputs.lengths_N,
            "advantage_N": self.inputs.advantage_N,
        })
        av, metrics = self._timed("av_update", self.state.av, self.base, self.ref, batch)
        self.state = self.state.replace(av=av)
        return metrics

    def _train_ar(self, name: str, batch):
        ar, metrics = self._timed(name, self.state.ar, self.base, batch)
        self.state = self.state.replace(ar=ar)
        return metrics

    def ar_update(self):
        return self._train_ar("ar_update", self._ar_batch(self.ids, self._h_ND(), self.inputs.lengths_N))

    def warm_ar(self):
        ids = self.inputs.warm_ar_BT
        last = np.full(len(ids), ids.shape[1] - 1, np.int32)
        return self._train_ar("warm_ar", mesh_lib.shard_batch({
            "ids_BT": ids, "valid_BT": np.ones(ids.shape, bool), "last_B": last,
            "h_BD": self.inputs.warm_h_BD, "weight_B": np.ones(len(ids), np.float32),
        }, self.mesh))

    def warm_av(self):
        i = self.inputs
        batch = mesh_lib.shard_batch({"h_BD": i.warm_h_BD, "ids_BT": i.warm_BT,
                                "mask_BT": np.ones(i.warm_BT.shape, bool)}, self.mesh)
        av, metrics = self._timed("warm_av", self.state.av, self.base, batch)
        self.state = self.state.replace(av=av)
        return metrics

    def capture(self):
        rows, tokens = self.case.capture
        at = np.tile(np.array([tokens // 2, tokens - 1], np.int32), (rows, 1))
        h = self._timed("capture", self.base, *self._put((self.inputs.capture_BT, at)))
        return {"norm": jnp.linalg.norm(h, axis=-1).mean()}

    def evaluate(self):
        h = self._put(self.inputs.evaluate_ND)
        rows = self._put(np.arange(len(h), dtype=np.int32))
        out, start, end, _ = self._timed("write", self.state.av.params, self.base, h, rows, self._key())
        mse = self._timed("read", self.state.ar.params, self.base, out.ids_BT, start, end, h)
        return {"mse": mse.mean()}

    def check(self, kinds=("bf16", "fp32")) -> dict:
        """Return the values that the reference must match before any update (`rl_step.check_agreement`)."""
        n = min(self.case.rows, 4)
        ids, h = self.inputs.answers_NT[:n], np.repeat(self.inputs.h_BD, self.case.group, 0)[:n]
        out = {}
        for name in kinds:
            spec = self.spec if name == "bf16" else dataclasses.replace(self.spec, dtype="float32")
            logp = jax.jit(lambda av, base, spec=spec: roles.answer_logp(av, base, spec, h, ids))
            out[f"logp_{name}"] = logp(self.state.av.params, self.base)
            b = self._ar_batch(ids, h)

            def read(ar, base, b=b, spec=spec):
                params = reconstructor.weights(base, ar, spec.layer, spec.compute, spec.lm)
                return reconstructor.reconstruct(params, spec.lm, b["ids_BT"], b["valid_BT"], b["last_B"])

            out[f"h_{name}"] = jax.jit(read)(self.state.ar.params, self.base)
        return {k: np.asarray(v, np.float32).tolist() for k, v in out.items()}

    def peak_memory(self) -> int | None:
        """Return the peak of device memory in bytes; None if the backend does not report it (CPU)."""
        stats = jax.devices()[0].memory_stats()
        return stats.get("peak_bytes_in_use") if stats else None


def time_phase(side, phase: str) -> dict:
    seconds, info = side.run(phase)
    return {"seconds": {phase: seconds}, "info": info}
