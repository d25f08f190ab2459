"""Make the batch of each training stage, as a pure function of the step."""

import functools
from collections.abc import Callable

import numpy as np

from nla_jax import reconstructor, specs
from nla_jax.data import explanations as explanations_lib
from nla_jax.data import lessons, online, shuffle
from nla_jax.data.splits import keyed_hash
from nla_jax.errors import UserError
from nla_jax.lm import tokenizer as tok_lib
from nla_jax.prompts import CLOSE, OPEN
from nla_jax.util.batching import pad_rows, width_for
from nla_jax.util.terminal_text import shorten


def response_rows(tok, prompt, texts: list[str]) -> list[list[int]]:
    """Tokenise the answers that AV is trained on: opening tag, text, closing tag, end of turn.

    For a drill (`prompts.drill_prompt`) there are no tags."""
    if not prompt.open:
        rows = tok_lib.batch_ids(tok, texts)
    else:
        rows = tok_lib.all_plain_ids(tok, [OPEN + text + CLOSE for text in texts])
    return [[*ids, prompt.end_of_turn] for ids in rows]


BLOCK = 8  # batches of written explanations that are drawn and sorted by length together


class WarmStartPairs:
    """Draw the rows of a warm-start stage and pair them with words, as a function of the step.

    Args:
      columns: of a store, or of pass `number` of `online.Passes`.
      kind: "lessons" uses every row with a source text; its words are the text's ending line. "written" uses
        rows with a written explanation; its words are the lines `which` of that, then the ending line.
      which: the lines of the description (`data.explanation_lines`).
      end: texts -> their ending lines; None for explanations without one.
      lengths, most: `lengths` maps texts to lengths in tokens. Rows longer than `most` are dropped, and the
        rows of a batch have similar lengths.

    Raises UserError when no row is left.
    """

    def __init__(
        self,
        columns: dict,
        kind: str,
        *,
        batch: int,
        seed: int,
        which: str = "all",
        end: Callable[[list[str]], list[str]] | None = None,
        lengths: Callable[[list[str]], np.ndarray] | None = None,
        most: int = 0,
        number: int = 0,
    ):
        self.columns, self.kind, self.batch, self.seed, self.which = (
            columns,
            kind,
            batch,
            seed,
            which,
        )
        self.number = number
        self._end = end
        self._lengths: np.ndarray | None = None
        self._block = (-1, "", np.zeros(0, int))
        self.dropped = 0  # written explanations that do not fit
        self.rows = np.array([i for i, text in enumerate(columns["text"]) if text], int)
        if kind == "lessons" and not len(self.rows):
            raise UserError(
                "no row of the store has its text, which reading lessons need; set lessons_av.steps=0 "
                "and lessons_ar.steps=0"
            )
        if kind == "written":
            rows = [i for i, words in enumerate(columns["explanation"]) if words]
            if not rows:
                raise UserError(
                    "no row of the store has an explanation: extract with data.explanations set, "
                    "or train on reading lessons alone (warm_av.steps=0, warm_ar.steps=0)"
                )
            self.rows = np.array(rows, int)
            if lengths:
                sizes = lengths(self.words(rows))
                fit = sizes <= most
                self.rows, self._lengths, self.dropped = self.rows[fit], sizes[fit], int(np.sum(~fit))
            if not len(self.rows):
                raise UserError(
                    "every written explanation is longer than max_tokens; raise it, or "
                    "choose fewer lines with data.explanation_lines"
                )
        # AV and AR see the same rows in different orders, because the role is part of the key.
        self._order = {
            p: shuffle.epoch_indices(len(self.rows), batch, seed, f"{kind}/{p}" + f"/{number}" * bool(number))
            for p in ("av", "ar")
        }

    def words(self, rows) -> list[str]:
        """Return the words of these rows of `columns`."""
        texts = [self.columns["text"][i] for i in rows]
        ends = self._end(texts) if self._end else [""] * len(texts)
        if self.kind == "lessons":
            return ends
        said = [explanations_lib.lines(self.columns["explanation"][i], self.which) for i in rows]
        return [lessons.join_end(s, e if t else "") for s, e, t in zip(said, ends, texts, strict=True)]

    def at(self, step: int, role: str) -> tuple[np.ndarray, list[str]]:
        """Return (rows of `columns` [B], their words) of a step; `role` is "av" or "ar"."""
        pick = self.rows[self._picked(step, role)]
        return pick, self.words(pick)

    def _picked(self, step: int, role: str) -> np.ndarray:
        """Return indices into `rows` [B] for a step.

        `BLOCK` batches are drawn together, sorted by length, and permuted by a key. This reduces padding."""
        draws = self._order[role]
        if self._lengths is None:
            return np.asarray(draws[step])
        block, place = divmod(step, BLOCK)
        if self._block[:2] != (block, role):
            drawn = np.concatenate([np.asarray(draws[block * BLOCK + i]) for i in range(BLOCK)])
            drawn = drawn[np.argsort(self._lengths[drawn], kind="stable")]
            rng = np.random.Generator(np.random.Philox(key=keyed_hash("block", self.seed, role, block)))
            self._block = block, role, drawn.reshape(BLOCK, -1)[rng.permutation(BLOCK)]
        return self._block[2][place]

    def drawn(self, step: int, role: str) -> tuple[dict, list[str]]:
        """Return ({"h_BD": activations}, words) of a step."""
        pick, words = self.at(step, role)
        return {"h_BD": self.columns["h"][pick]}, words


def pairs_arguments(config, stage: str, tok, spec: specs.Spec, template: str) -> dict:
    """Return the keyword arguments of `WarmStartPairs` for a stage ("lessons_av", "warm_ar", ...).

    Args:
      template: AR's prompt, with `{explanation}`.
    """
    kind, role = stage.split("_")

    def lengths(texts: list[str]) -> np.ndarray:
        if role == "av":
            return np.array([len(ids) for ids in response_rows(tok, spec.av, texts)])
        return reconstructor.rows(tok, template, texts, 0)[2] + 1

    return {
        "kind": "lessons" if kind == "lessons" else "written",
        "batch": config[stage].batch,
        "seed": config.seed,
        "which": config.data.explanation_lines,
        "end": ending_function(tok, config.data.to_dict(), spec, lessons_only=kind == "lessons"),
        "lengths": lengths,
        "most": config[stage].max_tokens,
    }


def ending_function(tok, data: dict, spec: specs.Spec, lessons_only: bool = False):
    """Return a function from texts to the ending lines of their explanations.

    `data` is that section of the config. Returns None if explanations have no ending line: AR's template has
    text after the explanation (which lessons ignore), or `data.ending_tokens` is 0."""
    most = data.get("ending_tokens", 0)
    if not most or (spec.ar.after and not lessons_only):
        return None
    return functools.partial(lessons.quote_ends, tok, most=most, ids={})


class OnlinePairs:
    """`WarmStartPairs` over successive passes of `online.Passes`, each used for one epoch.

    The first pass gives the same rows and words as a store."""

    def __init__(self, passes: online.Passes, kind: str, *, batch: int, **options):
        self._passes, self._make = (
            passes,
            functools.partial(WarmStartPairs, kind=kind, batch=batch, **options),
        )
        self._now = self._make(passes.columns(0))
        self.rows, self.dropped = self._now.rows, self._now.dropped
        self.steps_per_pass, self._width = max(len(self.rows) // batch, 1), passes.width()

    def drawn(self, step: int, role: str) -> tuple[dict, list[str]]:
        """Return (`online.capture_inputs` of a step, which replace h_BD, and its words)."""
        number, i = divmod(step, self.steps_per_pass)
        if number != self._now.number:
            self._now = self._make(self._passes.columns(number), number=number)
        pick, words = self._now.at(i, role)
        return online.capture_inputs(self._now.columns, pick, self._width), words


def av_batch(texts: WarmStartPairs | OnlinePairs, tok, spec: specs.Spec, width: int, step: int) -> dict:
    """Return the batch of a warm-start AV step: h (or readings), ids_BT and mask_BT of the answers."""
    h, words = texts.drawn(step, "av")
    rows = response_rows(tok, spec.av, words)
    width = min(width, width_for(max(map(len, rows))))
    ids, mask, _ = pad_rows([r[:width] for r in rows], spec.av.pad, width)
    return {**h, "ids_BT": ids, "mask_BT": mask}


def ar_batch(
    texts: WarmStartPairs | OnlinePairs, tok, spec: specs.Spec, template: str, width: int, step: int
) -> dict:
    """Return the batch of a warm-start AR step: prompts, h (or readings), and weight_B.

    Prompts longer than `width` tokens are cut and get weight 0."""
    h, words = texts.drawn(step, "ar")
    ids, valid, last = reconstructor.rows(tok, template, words, spec.ar.pad)
    width = min(width, width_for(int(last.max()) + 1))
    weight = (last < width).astype(np.float32)
    return {
        "ids_BT": ids[:, :width],
        "valid_BT": valid[:, :width],
        "last_B": np.minimum(last, width - 1),
        "weight_B": weight,
        **h,
    }


def rl_batch(columns: dict, *, batch: int, seed: int, step: int, draws) -> dict:
    """Return the batch of an RL step: h_BD, and row_B, the index in the batch (part of the sample's key)."""
    pick = np.asarray(draws[step])
    out = {"h_BD": columns["h"][pick], "row_B": np.arange(batch, dtype=np.int32)}
    if "goal" in columns:  # the shuffled control
        out["goal_BD"] = columns["goal"][pick]
    return out


def add_written_batch(batch_at: Callable, texts: WarmStartPairs, tok, spec: specs.Spec, template: str,
                      max_new: int):
    """Return a function from i to the batch of RL step i with `texts.batch` written explanations for AR.

    Their keys begin with "written_" (`steps.rl`). Prompts have at most `max_new` tokens of explanation."""
    width = len(spec.ar.before) + max_new + len(spec.ar.after)

    def batch(i: int) -> dict:
        written = ar_batch(texts, tok, spec, template, width, i)
        return {**batch_at(i), **{f"written_{k}": v for k, v in written.items()}}

    return batch


def best_and_worst(tok):
    """Return a function: array metrics of an RL step -> the best and worst answer of its first group."""

    def notes(arrays):
        ids_GT, reward_G = np.asarray(arrays["ids_BGT"])[0], np.asarray(arrays["reward_BG"])[0]
        best, worst = int(reward_G.argmax()), int(reward_G.argmin())
        return {
            name: {
                "text": shorten(tok.decode(ids_GT[g], skip_special_tokens=True), 400),
                "reward": float(reward_G[g]),
            }
            for name, g in (("best", best), ("worst", worst))
        }

    return notes
