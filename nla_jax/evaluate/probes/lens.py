"""Compare explanations with the words that the Jacobian lens reads at h, which needs no NLA."""

import numpy as np

from nla_jax.errors import UserError
from nla_jax.evaluate import jacobian_lens
from nla_jax.evaluate.probe_types import Evidence, Figure, rows_of_other_documents
from nla_jax.evaluate.words import claims as C

TOP = 10  # words of the lens
RANKED = 40  # tokens among which words are sought


def lens(ev: Evidence, label: str = "") -> list[Figure]:
    """Return FVE of the lens's words read as an explanation, and how many of them the text and AV say."""
    texts = (ev.train or {}).get("text") or ev.columns["text"]
    try:
        j_DD = jacobian_lens.fit_or_read(ev.runner, texts, ev.readers, label and f"{label} lens")
    except UserError as e:
        ev.left_out.append(f"lens: {e}")
        return []
    ids_NK, _ = jacobian_lens.rank_tokens(ev.runner, j_DD, ev.columns["h"], RANKED)
    words = [lens_words(ev.runner.tok, row) for row in ids_NK]
    said = [" ".join(w) for w in words]
    by = {"": ev.reconstruct(said), "_frozen": ev.read_frozen(said)}
    reader = {"": "AR", "_frozen": "the frozen target"}
    out = [
        ev.fve(f"fve_lens{name}", ev.errors(h_hat),
               f"{reader[name]} reads the {TOP} first words of the Jacobian lens at h, which needs no NLA")
        for name, h_hat in by.items()
    ]
    n_N = np.array([len(w) for w in words])
    if not n_N.any():
        return out
    other = rows_of_other_documents(ev.columns["doc_id"])
    explanations = ev.trip.explanations

    def share(name, sources, asks):
        hits = [C.count_words(w, s) for w, s in zip(words, sources, strict=True)]
        return ev.ratio(name, hits, n_N, asks)

    out += [
        share("lens_said", explanations, "share of these words that the explanation says, in some form"),
        share("lens_said_shuffled", [explanations[i] for i in other], "the same of another document's"),
    ]
    if ev.has_texts():
        out += [
            share("lens_in_text", ev.columns["text"], "share of these words that the text has, in some form"),
            share("lens_in_text_shuffled", [ev.columns["text"][i] for i in other],
                  "the same of another document's text"),
        ]
    return out


def lens_words(tok, ids_K) -> list[str]:
    """Return the first TOP different words of ranked token ids: whole alphabetic tokens of three letters."""
    found = (tok.decode([int(i)]).strip() for i in ids_K)
    return list(dict.fromkeys(w for w in found if len(w) > 2 and w.isalpha()))[:TOP]
