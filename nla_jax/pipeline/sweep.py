"""A sweep over layer K and norm alpha: short warm starts of AR per layer, and of AV per layer and alpha.

One forward pass of the target per text gives the activations of all layers. A cell of the table is the
config's warm start (lessons, then written explanations) from the target's weights:

    AR    per layer: FVE on held-out rows from their own explanations, from those of other documents, and of
          the mean direction
    AV    per layer and alpha: loss of held-out answers with their own h, and with that of other documents

All AVs share one compiled program per stage, because alpha is an argument of it. ARs need one per layer,
because the layer determines their depth. WORKDIR/sweep has the activations and finished cells, so an
interrupted sweep is resumed.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from nla_jax import configs, specs, steps, verbalizer
from nla_jax.data import extract, request_batches, split_requests
from nla_jax.errors import UserError
from nla_jax.evaluate import fve
from nla_jax.evaluate.probe_types import rows_of_other_documents
from nla_jax.evaluate.runner import Runner
from nla_jax.pipeline import activations, config_checks, context, run_directory
from nla_jax.pipeline.context import RunContext
from nla_jax.rl import roles
from nla_jax.sharding import mesh as mesh_lib
from nla_jax.sharding import placement
from nla_jax.training import feeds, jitted_steps
from nla_jax.util import distributed, locks, paths, writable
from nla_jax.util.batching import map_rows, pad_rows
from nla_jax.util.progress import Progress


@dataclasses.dataclass(frozen=True)
class Cell:
    """One warm start. multiple: alpha over the 75th percentile of the layer's norms. Both are for AV only."""

    role: str
    layer: int
    alpha: float = 0.0
    multiple: float = 0.0

    @property
    def name(self) -> str:
        return f"{self.role}-{self.layer}" + (f"-{self.alpha:g}" if self.role == "av" else "")


def run(
    config, workdir: str | Path, layers: Sequence[int], scales: Sequence[float], alphas: Sequence[float] = ()
) -> dict:
    """Train and measure every missing cell.

    Args:
      config: determines the target, the rows and the warm start. Its layer, alpha, RL and out-of-domain rows
        are ignored.
      scales: alphas as multiples of the 75th percentile of a layer's norms (norm-matched: of the marker's own
        norm). alphas: further alphas, used at every layer.

    Returns:
      {"cells": figures of each, "layers": {layer: norms}, "rows", "words" ("lessons" or "written": the
      explanations of held-out rows), "steps" of each role, "documents" held out}.

    Raises UserError for impossible settings, before any work.
    """
    layers, scales, alphas = sorted(set(layers)), sorted(set(scales)), sorted(set(alphas))
    workdir = paths.absolute(workdir)
    _check(config, layers, scales, alphas)
    config.unlock()
    config.update({"layer": -1, "alpha": 0.0, "activations": "stored"})
    config.data.ood, config.rl.steps = "", 0
    config_checks.lock(config)
    with locks.hold_directory(workdir):
        return _run(config, workdir, layers, scales, alphas)


def _run(config, workdir: Path, layers, scales, alphas) -> dict:
    run_directory.check_config(config, workdir)
    writable.check_directory(workdir)
    r = context.open_run(config, workdir)
    if layers[-1] >= r.lm.n_blocks or layers[0] < 0:
        bad = layers[-1] if layers[-1] >= r.lm.n_blocks else layers[0]
        raise UserError(f"--layers {bad}: this target has blocks 0 to {r.lm.n_blocks - 1}")
    wanted, _, _ = split_requests.requests(config.data, config.seed, r.tok, rl=False)
    activations.check_lengths(r, wanted)
    sweep = _Sweep(r, wanted)
    run_directory.record_config(config, workdir)
    sweep.h = _capture_layers(r, wanted, layers)
    return sweep.run(layers, scales, alphas)


def _check(config, layers, scales, alphas) -> None:
    config_checks.validate(config)
    if config.data.store or config.init:
        named = "data.store" if config.data.store else "init"
        raise UserError(f"a sweep reads the target at several layers: unset {named}")
    if config.ar.kind == "frozen":
        raise UserError("a sweep trains an AR at each layer: set --config.ar.kind=trained")
    if (config.lessons_av.form == "drill" and config.lessons_av.steps) or config.warm_av.lessons:
        raise UserError("a sweep trains AV on its whole prompt: set --config.lessons_av.form=full, "
                        "--config.lessons_av.max_tokens=32 and --config.warm_av.lessons=0")
    if not layers:
        raise UserError("--layers: give some, such as --layers 10,15,20")
    if bad := [a for a in (*scales, *alphas) if not 0 < a < float("inf")]:
        raise UserError(f"alpha {bad[0]:g}: a scale or an alpha must be a number above 0")
    for role in ("ar", "av"):
        if not config[f"lessons_{role}"].steps + config[f"warm_{role}"].steps:
            raise UserError(f"lessons_{role} and warm_{role} have no steps: a sweep needs some of either")
    if jax.process_count() > 1:
        raise UserError("a sweep runs in one process, on all of its devices: omit --distributed")


def _capture_layers(r: RunContext, wanted: dict, layers) -> dict:
    """Capture or load {split: {layer: h_ND}}, with rows in the order of a store."""
    batch, pad_id = r.config.data.batch, r.tok.eos_token_id or 0
    place = lambda split, layer: r.workdir / "sweep" / f"{split}-{layer}.npy"
    missing = tuple(k for k in layers if not all(place(s, k).is_file() for s in wanted))
    if missing:
        capture = activations.capture_of(r, missing)
        for split, requests in wanted.items():
            found = extract.capture_in_memory(
                requests, capture, batch=batch, pad_id=pad_id, label=f"read {split}"
            )
            for i, layer in enumerate(missing):
                with paths.whole(place(split, layer)) as part, part.open("wb") as file:
                    np.save(file, found["h"][:, i], allow_pickle=False)
    return {
        s: {k: np.load(paths.local_copy(place(s, k)), allow_pickle=False) for k in layers} for s in wanted
    }


class _Sweep:
    """The state that all cells share: rows, explanations, compiled AV steps, and h (set by `run`). Raises
    UserError if fewer than two held-out rows have an explanation."""

    def __init__(self, r: RunContext, wanted: dict):
        self.r, self.h, self.jitted, c = r, {}, {}, r.config
        order = lambda q: request_batches.stored_order(q, extract.ROWS_PER_SHARD, c.data.batch)
        self.columns = columns = {s: request_batches.columns(order(q)) for s, q in wanted.items()}
        self.steps = {x: c[f"lessons_{x}"].steps + c[f"warm_{x}"].steps for x in ("ar", "av")}
        self.words = "written" if c.warm_ar.steps and c.warm_av.steps else "lessons"
        held = columns["heldout"]
        stage = "warm_av" if self.words == "written" else "lessons_av"
        texts = feeds.WarmStartPairs(
            held, **feeds.pairs_arguments(c, stage, r.tok, self._spec(0, 1.0), r.templates[1])
        )
        self.rows = texts.rows
        if len(self.rows) < 2:
            raise UserError("a sweep needs at least two held-out rows with explanations; raise "
                            "data.heldout_rows")
        self.said = texts.words(self.rows)
        self.docs = [held["doc_id"][i] for i in self.rows]
        self.other = rows_of_other_documents(self.docs)
        self.texts = {
            stage: feeds.WarmStartPairs(
                columns["warm"], **feeds.pairs_arguments(c, stage, r.tok, self._spec(0, 1.0), r.templates[1]))
            for stage in configs.STAGES if c[stage].steps
        }

    def _spec(self, layer: int, alpha: float) -> specs.Spec:
        c, given = self.r.config, {**self.r.given, "alpha": alpha}
        return specs.make_spec(self.r.lm, self.r.tok, layer=layer, dtype=c.dtype, **given, remat=c.remat,
                               vocab_chunk=c.vocab_chunk, attention=context.attention_of(self.r))

    def run(self, layers, scales, alphas) -> dict:
        share = verbalizer.adds_to_stream(self.r.config.av.injection, self.r.lm.d_model)
        norms = {k: np.linalg.norm(self.h["warm"][k].astype(np.float64), axis=1) for k in layers}
        cells = []
        for layer in layers:
            unit = 1.0 if share else float(np.percentile(norms[layer], 75))
            cells.append(Cell("ar", layer))
            wanted = {float(f"{s * unit:.3g}"): s for s in scales} | {a: a / unit for a in alphas}
            cells += [Cell("av", layer, a, m) for a, m in sorted(wanted.items())]
        place = lambda cell: self.r.workdir / "sweep" / f"{cell.name}.json"
        total = sum(self.steps[cell.role] for cell in cells)
        done = sum(self.steps[cell.role] for cell in cells if place(cell).is_file())
        found = []
        with Progress("sweep", total, done) as bar:
            for cell in cells:
                if not place(cell).is_file():
                    figures = (self._ar if cell.role == "ar" else self._av)(cell, bar)
                    distributed.write_json(place(cell), {**dataclasses.asdict(cell), **figures})
                found.append(json.loads(place(cell).read_text("utf-8")))
        return {
            "cells": found,
            "layers": {k: {name: float(v) for name, v in _quantiles(norms[k]).items()} for k in layers},
            "rows": {"warm": len(self.columns["warm"]["text"]), "heldout": len(self.rows)},
            "documents": len(set(self.docs)),
            "words": self.words,
            "steps": self.steps,
            "injection": self.r.config.av.injection,
            "share_of_marker": share,
        }

    def _trained(self, cell: Cell, bar: Progress):
        """Train a cell: (RunContext at its layer and alpha, the trained tree, mean of the last 10 losses)."""
        config = context.ConfigDict(self.r.config.to_dict())
        config.update({"layer": cell.layer, "alpha": cell.alpha})
        spec = self._spec(cell.layer, cell.alpha or 1.0)
        r = dataclasses.replace(self.r, config=config, spec=spec)
        tree, losses = context.initial_tree(r, cell.role), []
        for stage in (f"lessons_{cell.role}", f"warm_{cell.role}"):
            s = config[stage]
            if not s.steps:
                continue
            texts = self.texts[stage]
            texts.columns = self.columns["warm"] | {"h": self.h["warm"][cell.layer]}
            state = jitted_steps.learner(tree, jitted_steps.optimizer(config, stage), r.mesh)
            step = self._step(r, stage, state)
            for i in range(s.steps):
                if cell.role == "av":
                    batch = feeds.av_batch(texts, r.tok, spec, s.max_tokens, i)
                else:
                    batch = feeds.ar_batch(texts, r.tok, spec, r.templates[1], s.max_tokens, i)
                state, metrics = step(
                    state, r.base, mesh_lib.shard_batch(batch, r.mesh), np.float32(cell.alpha)
                )
                losses = [*losses[-9:], metrics["loss"]]
                note = "" if i % 10 else f"{cell.name}: loss {float(metrics['loss']):.3f}"
                bar.advance(1, note)
            tree = state.params
        return r, tree, float(np.mean([float(x) for x in losses]))

    def _step(self, r: RunContext, stage: str, state):
        """Return step(state, base, batch, alpha). All layers and alphas of an AV stage share one program."""
        if stage.endswith("ar"):
            jitted = jitted_steps.warm_step(r.config, stage, r.spec, state)
            return lambda state, base, batch, alpha: jitted(state, base, batch)
        if stage not in self.jitted:
            spec, tx, micro = r.spec, jitted_steps.optimizer(r.config, stage), r.config[stage].micro
            mean = jitted_steps.loss_mean(r.config, stage)

            def step(state, base, batch, alpha):
                at = dataclasses.replace(spec, alpha=alpha)
                return steps.warm_start_av(state, base, batch, spec=at, tx=tx, micro=micro, loss_mean=mean)

            self.jitted[stage] = jitted_steps.jit_step(step, state)
        return self.jitted[stage]

    def _ar(self, cell: Cell, bar: Progress) -> dict:
        r, ar, loss = self._trained(cell, bar)
        h, c = self.h["heldout"][cell.layer][self.rows], r.config
        runner = Runner(r.spec, r.base, ar, ar, r.tok, r.templates[1], c.eval.batch)
        h_hat, variance = runner.reconstruct(self.said), fve.variances(h)
        mean = np.broadcast_to(fve.mean_direction(self.h["warm"][cell.layer]), h.shape)
        out = {"train_loss": loss}
        guesses = {"fve": h_hat, "fve_shuffled": h_hat[self.other], "fve_mean_direction": mean}
        for name, guess in guesses.items():
            error = fve.errors(guess, h)
            interval = fve.interval(error, variance, self.docs, n=c.eval.bootstrap, seed=c.seed)
            out[name] = [fve.fve(error, variance), *interval]
        return out

    def _av(self, cell: Cell, bar: Progress) -> dict:
        r, av, loss = self._trained(cell, bar)
        h, c = self.h["heldout"][cell.layer][self.rows], r.config
        own, shuffled = (self._nll(r, av, cell.alpha, h[pick]) for pick in (slice(None), self.other))
        tokens = np.array([len(ids) for ids in self._answers(r)], float)
        out = {"train_loss": loss}
        for name, above in (("loss", own), ("loss_shuffled", shuffled), ("gap", shuffled - own)):
            interval = fve.ratio_interval(above, tokens, self.docs, n=c.eval.bootstrap, seed=c.seed)
            out[name] = [float(above.sum() / tokens.sum()), *interval]
        return out

    def _answers(self, r: RunContext) -> list[list[int]]:
        return feeds.response_rows(r.tok, r.spec.av, self.said)

    def _nll(self, r: RunContext, av, alpha: float, h_ND) -> np.ndarray:
        """Return the negative log-probability [N], in nats, of held-out answers under AV with h."""
        if "score" not in self.jitted:
            spec = r.spec

            def score(av, base, h_BD, ids_BT, mask_BT, alpha):
                at = dataclasses.replace(spec, alpha=alpha)
                return -jnp.sum(roles.answer_logp(av, base, at, h_BD, ids_BT) * mask_BT, 1)

            self.jitted["score"] = jax.jit(
                placement.trace_under_mesh(r.mesh, score), out_shardings=mesh_lib.replicated_sharding(r.mesh))
        ids, mask, _ = pad_rows(self._answers(r), r.spec.av.pad)

        def score_batch(*rows):
            return [self.jitted["score"](av, r.base, *mesh_lib.shard_batch(rows, r.mesh), np.float32(alpha))]

        return map_rows(score_batch, (h_ND, ids, mask), r.config.warm_av.batch)[0].astype(float)


def _quantiles(norms) -> dict:
    return dict(zip(("p25", "p50", "p75"), np.percentile(norms, (25, 50, 75)), strict=True))
