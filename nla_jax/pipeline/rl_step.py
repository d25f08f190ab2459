"""Joint RL with the settings of its reward: what each batch needs, the work on the host, and the step."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from nla_jax import reconstructor, specs, steps
from nla_jax.data import store
from nla_jax.data.splits import keyed_hash
from nla_jax.errors import UserError
from nla_jax.evaluate.words import claim_score, wordnet
from nla_jax.pipeline import activations, reward_checks
from nla_jax.pipeline.context import RunContext
from nla_jax.training import jitted_steps, reward_inputs
from nla_jax.util.choices import choose
from nla_jax.util.keys import key_for


def fetch(config) -> None:
    """Fetch what the reward needs, before any work."""
    if reward_checks.needs_wordnet(config):
        wordnet.wordnet()


def check_rows(r: RunContext) -> None:
    """Raise UserError if the rows of RL lack texts that the reward needs."""
    if not (name := reward_checks.needs_texts(r.config)):
        return
    texts = store.load_columns(r.workdir / "data", "rl", ["text"])["text"]
    if missing := sum(not t for t in texts):
        raise UserError(f"config {name}: {missing} of {len(texts)} rows of RL have no text in the store; set "
                        f"{name}=0, or extract a store with texts")


def add_inputs(r: RunContext, batch_at: Callable, rows_at: Callable | None) -> Callable:
    """Return `batch_at` (i -> batch) with the inputs that `steps.update` needs for the reward's settings.

    rows_at: i -> the rows of the store's split "rl"; None for online activations."""
    o, spec = r.config.rl, r.spec
    if o.prefix_min:
        batch_at = reward_inputs.add_prefixes(
            batch_at, o.prefix_min, o.prefix_max or o.max_new, r.config.seed)
    if o.patch_kl and rows_at is None:
        batch_at = reward_inputs.add_online_texts(batch_at)
    elif o.patch_kl:
        texts = activations.columns_of(r, "rl")["text"]
        batch_at = reward_inputs.add_texts(batch_at, lambda i: [texts[j] for j in rows_at(i)], r.tok,
                                           spec.av.pad, reward_inputs.longest(r.tok, texts))
    return batch_at


def make_step(r: RunContext, spec: specs.Spec, state: steps.RLState, stage: str, ref, warm_ar: Callable,
              rows_at: Callable | None) -> Callable:
    """Return the step (state, batch, i) -> (state, metrics) of "rl" or "rl_drill".

    Args:
      ref: the KL's reference. warm_ar: () -> a new copy of the warm start's AR. rows_at: as in `add_inputs`.
    """
    c = r.config
    key = lambda i: key_for(c.seed, stage, i)
    if stage != "rl":
        jitted = jitted_steps.rl_step(c, spec, state, stage)
        return lambda state, b, i: jitted(state, r.base, ref, b, key(i))
    reader = warm_ar() if c.rl.reader == "warm_ar" else None
    if reward_checks.edits_answers(c):
        edited = jitted_steps.edited_rl_step(c, spec, state, make_edit(r, spec, rows_at))
        step = lambda state, b, i: edited(state, r.base, ref, b, key(i), reader, i)
    else:
        jitted = jitted_steps.rl_step(c, spec, state)
        step = lambda state, b, i: jitted(state, r.base, ref, b, key(i), reader)
    if not c.rl.ar_reset:
        return step
    start, tx = warm_ar(), jitted_steps.optimizer(c, "rl", "lr_ar")

    def with_reset(state, b, i):
        # The reset depends on i alone, so a resumed run repeats it.
        if i and i % c.rl.ar_reset == 0:
            fresh = jitted_steps.learner(jax.tree.map(jnp.copy, start), tx, r.mesh)
            kept = {name: getattr(state.ar, name) for name in ("skipped", "skipped_run")}
            state = state.replace(ar=fresh.replace(**kept))
        return step(state, b, i)

    return with_reset


def make_edit(r: RunContext, spec: specs.Spec, rows_at: Callable | None) -> Callable:
    """Return the edit of `jitted_steps.edited_rl_step`: paraphrases, and the score of claims.

    It is a function of the step and the answers alone: every process of a pod computes the same, and so does
    a resumed run."""
    c, o = r.config, r.config.rl
    columns = activations.columns_of(r, "rl") if o.false_claims else {}

    def edit(i: int, answers: dict) -> tuple[dict, dict]:
        spans = zip(answers["ids_NT"], answers["start_N"], answers["end_N"], answers["ok_N"], strict=True)
        said = [r.tok.decode(ids[a:b], skip_special_tokens=True).strip() if ok else ""
                for ids, a, b, ok in spans]
        out, metrics = {}, {}
        if o.paraphrase:
            picked = is_picked(o.paraphrase, c.seed, i, len(said) // o.group, o.group)
            wanted = [j for j, t in enumerate(said) if t and picked[j]]
            seed = keyed_hash("synonyms", c.seed, i) % 2**32
            new = paraphrases([said[j] for j in wanted], o.paraphraser, seed)
            changed = {j: t for j, t in zip(wanted, new, strict=True) if t and t != said[j]}
            out |= edited_words(r.tok, spec, r.templates[1], changed, answers["ids_NT"])
        if o.false_claims:
            pick = rows_at(i)
            out["claims_N"], metrics = claim_score.score_claims(
                said, answers["ok_N"] & np.array([bool(t) for t in said]), [columns["text"][j] for j in pick],
                [columns["doc_id"][j] for j in pick], o.group, o.fewest_claims)
        return out, metrics

    return edit


def is_picked(share: float, seed: int, step: int, n: int, group: int) -> np.ndarray:
    """Return whether each of n * group answers is paraphrased: bool [N], the same in a whole group."""
    picked = [keyed_hash("paraphrase", seed, step, row) < share * 2**64 for row in range(n)]
    return np.repeat(picked, group)


def paraphrases(texts: list[str], paraphraser: str, seed: int) -> list[str]:
    """Return the paraphrase of each text by `rl.paraphraser`.

    Raises UserError if the function does not return a text for each."""
    function = choose(reward_checks.PARAPHRASERS, paraphraser, "rl.paraphraser")
    if paraphraser in reward_checks.PARAPHRASERS:
        return [function(t, seed=seed) for t in texts]
    new = list(function(texts))
    if len(new) != len(texts) or not all(isinstance(t, str) for t in new):
        raise UserError(f"rl.paraphraser={paraphraser!r}: must return one text for each of {len(texts)}")
    return new


def edited_words(tok, spec: specs.Spec, template: str, changed: dict[int, str], ids_NT) -> dict:
    """Return edited_ids_NT, edited_end_N and edited_N (`reading.read_words`) of the changed texts by row.

    A text with more than T tokens is not used: its row is read as it is."""
    N, T = ids_NT.shape
    out = {"edited_ids_NT": np.full((N, T), spec.ar.pad, np.int32), "edited_end_N": np.zeros(N, np.int32),
           "edited_N": np.zeros(N, bool)}
    if not changed:
        return out
    ids, _, last = reconstructor.rows(tok, template, list(changed.values()), spec.ar.pad)
    for j, row, end in zip(changed, ids, last + 1, strict=True):
        words = row[len(spec.ar.before) : end - len(spec.ar.after)]
        if 0 < len(words) <= T:
            out["edited_ids_NT"][j, : len(words)] = words
            out["edited_end_N"][j], out["edited_N"][j] = len(words), True
    return out
