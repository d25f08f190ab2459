"""Count which features of h come back in ĥ, by a sparse autoencoder that no NLA had a part in."""

import numpy as np

from nla_jax.errors import UserError
from nla_jax.evaluate import sae as S
from nla_jax.evaluate.probe_types import Evidence, Figure, evenly_spaced, rows_of_other_documents
from nla_jax.evaluate.probes import surface

RARE = 0.05  # a latent that is active in a smaller share of the training rows is rare
SAMPLE = 8192  # training rows for that share


def sae(ev: Evidence, label: str = "") -> list[Figure]:
    """Return the SAE's own FVE, and the shares of the latents of h that ĥ keeps, loses and adds."""
    if ev.train is None:
        ev.left_out.append("sae: needs training rows (split warm) in the store")
        return []
    h_ND = ev.train["h"]
    try:
        params, k = S.train_or_read(h_ND, ev.readers, seed=ev.seed)
    except UserError as e:
        ev.left_out.append(f"sae: {e}")
        return []
    share_M = S.active_share(params, h_ND, k, evenly_spaced(range(len(h_ND)), SAMPLE))
    z_NM = S.latents_of(params, ev.columns["h"], k)
    own = ev.errors(S.reconstruct(params, z_NM))
    asks = f"how much of h the witness itself sees: FVE of an SAE with {len(share_M)} latents, {k} at a time"
    out = [ev.fve("fve_sae", own, asks)]
    other = rows_of_other_documents(ev.columns["doc_id"])
    failed = ~ev.trip.ok
    kept = {"": _latents(params, k, ev.trip.h_text, failed)}
    kept["_shuffled"] = kept[""][other]
    mean_ND = np.broadcast_to(ev.mean_D.astype(np.float32), ev.columns["h"].shape)
    kept["_mean"] = _latents(params, k, mean_ND)
    if ev.has_texts() and ev.trip.ok.any():
        words = surface.equal_quotations(ev)
        kept["_quotation"] = _latents(params, k, ev.reconstruct(words, label and f"{label} quotations"))
    for name, asks in ABOUT.items():
        for control, of in CONTROLS.items():
            if control in kept and (found := _share(name, z_NM, kept[control], share_M < RARE)):
                out.append(ev.ratio(f"sae_{name}{control}", *found, of.format(asks)))
    return out


ABOUT = {
    "kept": "share of the latents of h that are active in ĥ too; the others are lost",
    "kept_weighted": "the same by activation: how much of their sum ĥ has",
    "kept_rare": f"share kept of the latents that are active in under {RARE:.0%} of the training rows",
    "made": "share of the latents of ĥ that are not active in h",
    "made_weighted": "the same by activation: how much of their sum h does not have",
}
CONTROLS = {
    "": "{}",
    "_shuffled": "the same with another document's explanation",
    "_mean": "the same with the mean direction in place of ĥ",
    "_quotation": "the same with a quotation of the text's end of equal length, read by AR",
}


def _latents(params, k: int, h_ND, failed_N=None) -> np.ndarray:
    """Return the latents of reconstructions; none where there is no explanation."""
    z_NM = S.latents_of(params, h_ND, k)
    return z_NM if failed_N is None else np.where(failed_N[:, None], 0.0, z_NM)


def _share(name: str, z_NM, kept_NM, rare_M):
    """Return (numerator, denominator) [N] of a share of ABOUT, or None if no row has such latents."""
    first, second = (kept_NM, z_NM) if name.startswith("made") else (z_NM, kept_NM)
    if name.endswith("_rare"):
        first, second = first[:, rare_M], second[:, rare_M]
    if name.endswith("_weighted"):
        both, whole = np.minimum(first, second).sum(1), first.sum(1)
    else:
        both, whole = ((first > 0) & (second > 0)).sum(1), (first > 0).sum(1)
    if not whole.sum():
        return None
    return (whole - both if name.startswith("made") else both), whole
