"""Measure whether readers that were not trained jointly with AV and AR can use an explanation.

The readers are the frozen target, with the explanation in a plain prompt, and a sentence embedder. They
choose, among several candidates, the context of an explanation or the text that follows. A private code
between AV and AR does not help them.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from nla_jax.data.splits import keyed_hash
from nla_jax.evaluate.probe_types import Evidence, Figure, rows_of_other_documents
from nla_jax.evaluate.words import edits, embedder
from nla_jax.lm.config import LMConfig
from nla_jax.lm.model import KV, embed, forward, unembed
from nla_jax.lm.tokenizer import all_raw_ids, inner_ids, plain_ids
from nla_jax.util.batching import full_batches, pad_rows
from nla_jax.util.progress import Progress

# Upper limits. The target reads ASKED * ROWS * TOKENS tokens: a minute on two cores at 135M parameters.
ROWS = 64  # rows whose contexts and suffixes are candidates
ASKED = 48  # rows among these whose explanations are scored with every context
TOKENS, AHEAD = 16, 32  # tokens of a context, and of the text that follows
WORDS = 40  # words of a context, for the embedder
BY_LOGP, BY_EMBEDDER = (4, 16, 64), (4, 16, 64, 256)
CHOICES = 10
# "…" is the omitted beginning, because a candidate may start inside a word.
CONTEXT_PROMPT = "Notes about the last words of a text:\n{explanation}\n\nThe text ends with:\n…"
SUFFIX_PROMPT = "Notes about a text that breaks off:\n{explanation}\n\nThe text goes on:\n…"


def retrieval(ev: Evidence, label: str = "") -> list[Figure]:
    """Return how often each reader chooses the right candidate. A failed answer scores chance."""
    if not ev.has_texts():
        ev.left_out.append("retrieval: needs the texts that h is from; some rows of this store have none")
        return []
    return [*by_logp(ev, label), *by_embedder(ev, label), *suffix(ev, label)]


@functools.partial(jax.jit, static_argnums=1)
def prompt_kv(base, lm: LMConfig, ids_BT, valid_BT) -> KV:
    """Return the prefix cache (keys and values) of right-padded prompts, each without its last token."""
    return forward(base, lm, embed(base, lm, ids_BT), valid_BT, keep_kv=True)[1]


@functools.partial(jax.jit, static_argnums=1)
def reader_logp(base, lm: LMConfig, kv: KV, rows_B, last_B, ids_BC, n_B):
    """Return the log-probability [B], in nats, of each candidate after its prompt, summed over tokens.

    Args:
      kv: `prompt_kv` of the prompts. rows_B: the index of each candidate's prompt in it.
      last_B: the last token of that prompt.
      ids_BC: candidates, right-padded. n_B: their numbers of tokens.
    """
    past = kv.rows(rows_B)
    read_BC = jnp.concatenate([last_B[:, None], ids_BC[:, :-1]], 1)
    counts_BC = jnp.arange(ids_BC.shape[1])[None] < n_B[:, None]
    x, _ = forward(base, lm, embed(base, lm, read_BC), counts_BC, past=past)
    logits = unembed(base, lm, x)
    said = jnp.take_along_axis(logits, ids_BC[..., None], -1)[..., 0] - jax.nn.logsumexp(logits, -1)
    return jnp.sum(jnp.where(counts_BC, said, 0.0), 1)


def pair_logp(runner, prompts: list[str], candidates: list[list[int]], pairs_P2, label: str = ""):
    """Return `reader_logp` [P] of the pairs (prompt, candidate). The cache of each prompt is computed once.

    Args:
      runner: provides target, tokenizer and batch. candidates: lists of ids. pairs_P2: indices into both.
    """
    base, spec, batch = runner.base, runner.spec, runner.batch
    ids = all_raw_ids(runner.tok, prompts)
    last_N = np.array([i[-1] for i in ids], np.int32)
    # All prompts have one width, because padding costs less than another compilation.
    ids_NT, valid_NT, _ = pad_rows([i[:-1] for i in ids], spec.av.pad, 32)
    ids_MC, _, end_M = pad_rows(candidates, spec.av.pad, TOKENS)
    pairs_P2 = np.asarray(pairs_P2, int).reshape(-1, 2)
    out = np.zeros(len(pairs_P2))
    groups = np.array_split(np.arange(len(ids)), -(-len(ids) // batch))
    with Progress(label, len(out), unit="pairs") as bar:
        for group in groups:
            mine = np.flatnonzero(np.isin(pairs_P2[:, 0], group))
            some = np.resize(group, len(groups[0]))
            kv = prompt_kv(base, spec.lm, ids_NT[some], valid_NT[some]) if len(mine) else None
            for real, pick in full_batches(mine, batch):
                prompt, candidate = pairs_P2[pick].T
                logp = reader_logp(base, spec.lm, kv, prompt - group[0], last_N[prompt], ids_MC[candidate],
                                   end_M[candidate] + 1)
                out[real] = np.asarray(logp, np.float64)[: len(real)]
                bar.advance(len(real))
    return out


def pointwise_information(ev: Evidence, template: str, rows, candidates, said_XC, candidate_XC,
                          label: str = "") -> np.ndarray:
    """Return log p(candidate | prompt with z) - log p(candidate | prompt without z): [X, C], nats.

    The difference does not favour candidates that are likely in any context. It is 0 for every candidate
    where the answer failed.

    Args:
      rows: R rows of `ev`, whose explanations fill "{explanation}" in `template`.
      candidates: lists of ids. said_XC, candidate_XC: indices into `rows` and `candidates`.
    """
    texts = [ev.trip.explanations[i] for i in rows]
    prompts = [template.replace("{explanation}", t) for t in (*texts, "")]
    heard_XC = ev.trip.ok[np.asarray(rows, int)][said_XC]
    pairs = np.stack([said_XC[heard_XC], candidate_XC[heard_XC]], 1)
    alone = np.stack([np.full(len(candidates), len(texts)), np.arange(len(candidates))], 1)
    logp = pair_logp(ev.runner, prompts, candidates, np.concatenate([pairs, alone]), label)
    out = np.zeros(said_XC.shape)
    out[heard_XC] = logp[: len(pairs)] - logp[len(pairs) :][candidate_XC[heard_XC]]
    return out


def top_probability(score_XC, own_X, rival_XC, n: int) -> np.ndarray:
    """Return the probability [X] that the own candidate scores highest among itself and n - 1 random rivals.

    The probability is exact: rivals are drawn without replacement, and ties are broken at random with
    equal probability.
    """
    own_X1 = np.take_along_axis(score_XC, np.asarray(own_X)[:, None], 1)
    better, tied = ((score_XC > own_X1) & rival_XC).sum(1), ((score_XC == own_X1) & rival_XC).sum(1)
    return np.array(
        [
            sum(math.comb(k - i, n - 1) for i in range(b, b + t + 1)) / ((t + 1) * math.comb(k, n - 1))
            for b, t, k in zip(better.tolist(), tied.tolist(), rival_XC.sum(1).tolist(), strict=True)
        ]
    )


def rows_of_distinct_documents(ev: Evidence, kept_N, most: int) -> np.ndarray:
    """Return at most `most` rows of distinct documents where `kept_N` is true, chosen by a key and sorted.

    A smaller `most` gives a subset of a larger one.
    """
    docs, chosen = ev.columns["doc_id"], {}
    for i in sorted(np.flatnonzero(kept_N).tolist(), key=lambda i: keyed_hash("apart", ev.seed, docs[i], i)):
        chosen.setdefault(docs[i], i)
    return np.array(sorted(list(chosen.values())[:most]), int)


def _rivals(docs) -> np.ndarray:
    """Return [N, N]: whether the row and the candidate are from different documents."""
    _, doc_N = np.unique(np.asarray(docs), return_inverse=True)
    return doc_N[:, None] != doc_N[None]


def by_logp(ev: Evidence, label: str = "") -> list[Figure]:
    """Let the target read z and score the last TOKENS tokens of the contexts of ROWS documents."""
    ids = [plain_ids(ev.runner.tok, t)[-TOKENS:] for t in ev.columns["text"]]
    kept = [bool(i) for i in ids]
    rows = rows_of_distinct_documents(ev, kept, ROWS)
    _note_missing_documents(ev, "retrieval_logp", BY_LOGP, len(rows))
    if len(rows) < min(BY_LOGP):
        return []
    asked = rows_of_distinct_documents(ev, kept, ASKED)  # some of `rows`
    said_AR, candidate_AR = np.indices((len(asked), len(rows)))
    score = pointwise_information(
        ev,
        CONTEXT_PROMPT,
        asked,
        [ids[i] for i in rows],
        said_AR,
        candidate_AR,
        label and f"{label} contexts",
    )
    own = np.searchsorted(rows, asked)
    rival = candidate_AR != own[:, None]
    return [
        ev.mean(f"retrieval_logp_{n}", top_probability(score, own, rival, n),
                f"how often the target, shown the words, finds their text among {n}", rows=asked,
                reference=_chance(n))
        for n in BY_LOGP if n <= len(rows)
    ]


def by_embedder(ev: Evidence, label: str = "") -> list[Figure]:
    """Compare the embeddings of z and of the last WORDS words of every context, by cosine.

    Rivals are from other documents."""
    docs, texts = ev.columns["doc_id"], ev.trip.explanations
    _note_missing_documents(ev, "retrieval_embed", BY_EMBEDDER, len(set(docs)))
    if len(set(docs)) < min(BY_EMBEDDER):
        return []
    contexts = [" ".join(t.split()[-WORDS:]) for t in ev.columns["text"]]
    prose = [edits.remove_quotes(t) for t in texts]
    vectors = embedder.embed(embedder.load(), [*contexts, *texts, *prose], ev.runner.batch,
                             label and f"{label} embed")
    context, whole, rest = np.split(vectors.astype(np.float64), 3)
    own, rival = np.arange(len(ev)), _rivals(docs)
    fits = [n for n in BY_EMBEDDER if n <= rival.sum(1).min() + 1]

    def find(z_ND, said, n):
        heard = ev.trip.ok & np.array([bool(s) for s in said])
        # Rounded, so that equal contexts tie.
        return top_probability(np.where(heard[:, None], np.round(z_ND @ context.T, 6), 0.0), own, rival, n)

    out = [
        ev.mean(f"retrieval_embed_{n}", find(whole, texts, n), f"the same for a sentence embedder, among {n}",
                reference=_chance(n)) for n in fits
    ]
    if 16 in fits:
        asks = "the same among 16, by what is said outside quotes"
        out.append(ev.mean("retrieval_embed_prose_16", find(rest, prose, 16), asks, reference=_chance(16)))
    return out


def suffix(ev: Evidence, label: str = "") -> list[Figure]:
    """Let the target read z and choose the text that follows in the document among CHOICES candidates."""
    ids = [inner_ids(ev.runner.tok, t)[:AHEAD] for t in ev.columns["next_text"]]
    rows = rows_of_distinct_documents(ev, [bool(i) for i in ids], ROWS)
    docs = [ev.columns["doc_id"][i] for i in rows]
    # One more row is needed for the control: its explanation is used, so its suffix is not a rival.
    if len(rows) < CHOICES + 1:
        ev.left_out.append(f"suffix_{CHOICES}: needs {CHOICES + 1} documents that go on; {len(rows)} do")
        return []
    lender = rows_of_other_documents(docs)
    choices = np.array(
        [
            [r, *sorted((c for c in range(len(rows)) if c not in (r, lender[r])),
                        key=lambda c, r=r: keyed_hash("suffix", ev.seed, docs[r], docs[c]))[: CHOICES - 1]]
            for r in range(len(rows))
        ]
    )
    said = np.concatenate([np.arange(len(rows)), lender])
    score = pointwise_information(
        ev,
        SUFFIX_PROMPT,
        rows,
        [ids[i] for i in rows],
        np.repeat(said[:, None], CHOICES, 1),
        np.concatenate([choices, choices]),
        label and f"{label} suffixes",
    )
    rival = np.broadcast_to(np.arange(CHOICES) > 0, (len(said), CHOICES))
    hit, shuffled = np.split(top_probability(score, np.zeros(len(said), int), rival, CHOICES), 2)
    asks = f"how often the target, shown the words, finds what follows among {CHOICES}"
    other, chance = "the same, shown another document's words", _chance(CHOICES)
    return [
        ev.mean(f"suffix_{CHOICES}", hit, asks, rows=rows, reference=chance),
        ev.mean(f"suffix_{CHOICES}_shuffled", shuffled, other, rows=rows, reference=chance),
    ]


def _note_missing_documents(ev: Evidence, name: str, among, documents: int) -> None:
    if left := [n for n in among if n > documents]:
        told = ", ".join(f"{name}_{n}" for n in left)
        ev.left_out.append(f"{told}: needs as many documents; these rows are from {documents}")


def _chance(n: int) -> str:
    return "chance " + f"{1 / n:.3g}".removeprefix("0")
