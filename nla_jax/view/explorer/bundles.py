"""Open one or two bundles over one target, and stream the explanations of their AVs.

An explanation depends only on (bundle, text, token, sample). Sample 0 is greedy; the others are sampled at
temperature 1 with a fixed key, so the same link shows the same words.
"""

import dataclasses
import json
from collections.abc import Iterator

import numpy as np

from nla_jax import api, bundle
from nla_jax.data import store
from nla_jax.errors import UserError
from nla_jax.evaluate.runner import Runner, read_tag
from nla_jax.evaluate.trust import model as trust_model
from nla_jax.evaluate.writer import Writer
from nla_jax.sharding import mesh as mesh_lib
from nla_jax.util import paths
from nla_jax.util.keys import new_key
from nla_jax.view.explorer import frozen_reader

SEED = 0
READ_ROWS = 4  # rows that AR reads at once: an explanation, and the same without each of its parts
# The "another text" control uses explanations of the last tokens of these texts.
ELSEWHERE = (
    "The recipe asks for two cups of flour and a pinch of salt",
    "In the second half the home side scored three goals in ten minutes and",
    "The court ruled that the company must pay damages to the former",
    "She opened the window and listened to the rain on the roof of the",
    "Shares of the bank fell by nine percent after the quarterly report was",
    "The telescope found water vapour in the atmosphere of a planet that",
    "To install the package, open a terminal and type the following",
    "Heavy snow has closed the mountain pass, and drivers are told to",
)


@dataclasses.dataclass(frozen=True)
class Side:
    """An open bundle.

    writer: decodes AV's answers of all requests together. bare: the frozen target as a reader
    (`frozen_reader.reader`). others_ND, others_bare_ND: ĥ by AR and by the frozen target from its
    explanations of `ELSEWHERE`. others_ok: which of these are readable.
    """

    name: str
    nla: api.NLA
    writer: Writer
    facts: dict
    bare: Runner
    others_ND: np.ndarray | None = None
    others_bare_ND: np.ndarray | None = None
    others_ok: np.ndarray | None = None


def open_sides(directory, compare="", target: str | None = None, batch: int = 8, dtype: str = "",
               announce: bool = False) -> dict[str, Side]:
    """Open the bundles: {"a": the first, "b": the second, if any}. dtype, announce: as for `bundle.load`.

    Raises UserError as `bundle.load`, and when the two bundles have different targets or layers.
    """
    metas = [bundle.read_sidecar(d) for d in (directory, compare) if d]
    if compare:
        what = {"target": "base_fingerprint", "architecture": "lm"}
        differ = [name for name, key in what.items() if metas[0][key] != metas[1][key]]
        differ += ["layer"] * (metas[0]["extraction"]["layer_index"] != metas[1]["extraction"]["layer_index"])
        if differ:
            raise UserError(f"{compare} is of another {differ[0]} than {directory}: they cannot be compared")
    first = bundle.load(directory, target, dtype=dtype, announce=announce)
    found = {"a": (directory, first)}
    if compare:
        found["b"] = (
            compare,
            _open_over_same_target(compare, metas[1], first)
            or bundle.load(compare, target, dtype=dtype, mesh=mesh_lib.mesh_of(first.base)),
        )
    sides: dict[str, Side] = {}
    for side, (place, opened) in found.items():
        sides[side] = _side(place, opened, batch, sides.get("a"))
    return sides


def _open_over_same_target(directory, meta: dict, first: bundle.LoadedBundle) -> bundle.LoadedBundle | None:
    """Open the second bundle with the first one's target in memory; None if prompts or dtypes differ."""
    if any(meta[k] != first.meta[k] for k in ("tokens", "prompt_templates", "dtype", "extraction")):
        return None
    on = mesh_lib.mesh_of(first.base)
    trees = bundle.place_trees(directory, meta, first.spec.lm, on, first.dtype)
    return bundle.LoadedBundle(meta, first.spec, first.tok, first.base, trees["av"], trees["ar"],
                               first.dtype)


def _side(directory, opened: bundle.LoadedBundle, batch: int, first: Side | None) -> Side:
    nla = api.NLA(opened, batch, trust_model.read_trust(paths.path(directory) / bundle.TRUST))
    nla.runner.read_rows = READ_ROWS if nla.mesh is None else batch
    reader = frozen_reader.reader(nla)
    if first and first.nla.base is nla.base:  # both sides share the compiled programs
        nla.runner, reader = first.nla.runner.with_trees(av=nla.av, ar=nla.ar), first.bare
    nla.spec.check_answer_fits(opened.meta["max_new_tokens"], f"{directory}: max_new_tokens")
    writer = Writer(nla.runner, new_key(SEED), n_slots=batch, max_new=opened.meta["max_new_tokens"])
    side = Side(paths.absolute(directory).name, nla, writer, facts(directory, opened.meta), reader)
    h = np.concatenate([nla.capture(t)[-1:] for t in ELSEWHERE])
    *_, (written, _) = stream_answers(side, h, np.zeros(len(h), int), 0.0)
    said = [read_tag(t) or "" for t in written]
    ok = np.array([bool(t) for t in said])
    return dataclasses.replace(side, others_ND=nla.reconstruct(said), others_ok=ok,
                               others_bare_ND=frozen_reader.read_words(reader, said))


def facts(directory, meta: dict) -> dict:
    """Return the facts of a bundle from its sidecar and from its run.

    They are stage, target, layer, kind of AR (`reconstructor.KINDS`), and its FVE as {name: [value, low,
    high]}. The FVE is {} if neither the run nor the sidecar has an evaluation. note: what a reader of the FVE
    must know (`store.split_notes`), or "" without a FVE."""
    stage = "eval_rl" if meta["stage"] == "rl" else "eval_warm"
    run = paths.absolute(directory).parent
    done, figures, note = run / "done" / f"{stage}.json", {}, ""
    try:
        if store.is_complete(run / "data"):
            notes = store.split_notes(json.loads((run / "data" / store.META).read_text("utf-8")))
        else:
            notes = meta.get("run", {}).get("notes", {})
        note = notes.get("heldout", "")
        found = json.loads(done.read_text("utf-8"))["figures"] if done.exists() else {}
        found = found or meta.get("run", {}).get("rl" if meta["stage"] == "rl" else "warm_start", {})
        for f in found.get("heldout", ()):
            if f["name"] in ("fve", "fve_shuffled", "fve_mean_direction"):
                figures[f["name"]] = [None if f[k] is None else float(f[k]) for k in ("value", "low", "high")]
    except (ValueError, KeyError, TypeError, AttributeError):
        figures = {}  # the file is not part of the bundle, so damage to it is no error
    return {
        "stage": str(meta["stage"]), "target": str(meta["base_checkpoint"]), "figures": figures,
        "note": note if figures else "",
        "layer": meta["extraction"]["layer_index"], "blocks": meta["lm"]["n_blocks"],
        "width": meta["lm"]["d_model"], "ar_kind": bundle.ar_kind(meta),
        "trust": (paths.absolute(directory) / bundle.TRUST).is_file(),
    }


# --- answers --------------------------------------------------------------------------------------


def stream_answers(
    side: Side, h_BD, samples_B, temperature: float, most: int | None = None
) -> Iterator[tuple[list[str], np.ndarray]]:
    """Yield AV's answers so far, tags included, and which rows [B] are finished, every few tokens.

    Args:
      samples_B: the sample's number, which is its random key.
      most: tokens of an answer, by default and at most the bundle's maximum."""
    writer = side.writer
    answers = [writer.submit(h_D, int(i), temperature=temperature, most=most, urgent=True)
               for h_D, i in zip(h_BD, samples_B, strict=True)]
    for _ in writer.follow(answers):
        yield [writer.text(a) for a in answers], np.array([a.done for a in answers])


def parse_unfinished(response: str) -> str:
    """Return the explanation in an unfinished answer, without a partial closing tag or character."""
    _, tag, words = response.partition("<explanation>")
    if not tag:
        return ""
    words = words.partition("</explanation>")[0]
    for n in range(len("</explanation>") - 1, 0, -1):
        if words.endswith("</explanation>"[:n]):
            words = words[:-n]
            break
    return words.strip("\n").removesuffix("\ufffd")
