"""Measure on all evaluated rows what the drift curve of RL shows (`heldout_watch`): FVE that a paraphrase
keeps, and whether ĥ is nearest to the activation that it is from."""

from nla_jax.evaluate import fve as F
from nla_jax.evaluate.heldout_watch import PLACES, is_nearest, near_activations
from nla_jax.evaluate.probe_types import Evidence, Figure
from nla_jax.evaluate.words import wordnet


def drift(ev: Evidence, label: str = "") -> list[Figure]:
    """Return the share of FVE that a paraphrase keeps, and the share of nearest reconstructions."""
    trip, variance_N = ev.trip, F.variances(ev.columns["h"])
    error_N = ev.errors(trip.h_text, trip.ok)
    said = [wordnet.paraphrase(t, 1.0, ev.seed) for t in trip.explanations]
    other_N = ev.errors(ev.reconstruct(said, label and f"{label} paraphrases"), trip.ok)
    out = [
        ev.ratio("paraphrase_kept", variance_N - other_N, variance_N - error_N,
                 "share of FVE that is left after synonyms replace words; no meaning where FVE is near 0",
                 reference="published: .25"),
    ]
    if not ev.has_texts():
        ev.left_out.append("same_document: the data has no texts from which to capture neighbours")
        return out
    rows, h_RPD = near_activations(ev.runner, ev.columns["text"])
    if len(rows):
        out.append(ev.mean("same_document", is_nearest(trip.h_text, trip.ok, rows, h_RPD),
                           f"how often ĥ is nearest to its own activation, of {len(PLACES)} tokens of a text "
                           f"(chance {1 / len(PLACES):.1f})", rows=rows))
    else:
        ev.left_out.append(f"same_document: no text has more than {PLACES[-1]} tokens")
    return out
