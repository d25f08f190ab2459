"""Readouts for WorkspaceBench: read the plan of `wsbench plan`, and write what a reader says at its cells.

A plan has one JSON line for each item: what the target reads (`render`, `text` and more), and which token
positions to read (`positions`, a rule). A readout is one JSON line for each cell:

    {"id": ITEM, "layer": K, "pos": 16, "token": " gold", "samples": ["an explanation", ...]}
    {"id": ITEM, "layer": K, "pos": 16, "token": " gold", "tokens": [" coin", ...], "scores": [9.1, ...]}

The first is of a reader that writes prose, the second of one that ranks tokens. The format is documented in
github.com/camilablank/workspace-bench: README.md has the contract, and docs/producing_readouts.md the rules.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nla_jax import api
from nla_jax.errors import UserError
from nla_jax.evaluate import jacobian_lens
from nla_jax.lm import chat_prompts
from nla_jax.lm.tokenizer import plain_ids
from nla_jax.util import paths
from nla_jax.util.batching import chunks
from nla_jax.util.keys import key_for
from nla_jax.util.progress import Progress

GROUP = 32  # items that are read together, and written together
CHATS = ("chat", "chat_context", "chat_prefill", "chat_dm", "chat_summarize")
RENDERS = ("plain", "bare", *CHATS, "captured")


class Cells(NamedTuple):
    """An item of a plan for one target. ids: without the tokenizer's lead. positions: of `ids`, for capture.
    named: the same positions as the readout names them. tokens: their spelling."""

    id: str
    ids: list[int]
    positions: list[int]
    named: list[int]
    tokens: list[str]


def read_plan(path: str | Path) -> list[dict]:
    """Return the rows of a plan. Raises UserError for a line that is none, with its number."""
    rows = []
    with open(paths.path(path), encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                known = row["render"] in RENDERS and isinstance(row["id"], str)
                rule = row["positions"]["kind"]
            except (ValueError, KeyError, TypeError) as e:
                raise UserError(f"{path}:{number}: not a line of `wsbench plan` ({e})") from None
            if not known or rule not in RULES:
                what = rule if known else row["render"]
                raise UserError(f"{path}:{number}: unknown {'rule' if known else 'render'} {what!r}")
            rows.append(row)
    if not rows:
        raise UserError(f"{path}: a plan without items")
    return rows


def render_ids(tok, row: dict) -> list[int]:
    """Return the ids of what an item's target reads, without thinking. Raises UserError if there is no chat
    template, or if a captured item has no ids."""
    render, text = row["render"], row.get("text", "")
    if render in ("plain", "bare"):
        return plain_ids(tok, text)
    if render == "captured":
        ids = row.get("extra", {}).get("input_ids") or []
        if not ids or max(ids) >= len(tok):
            raise UserError(f"item {row['id']!r} has no token ids of this target: capture it again for its "
                            "tokenizer")
        return list(ids)
    if render == "chat_context":
        turns = row["messages"]
    else:
        first = [{"role": "system", "content": row["system"]}] if row.get("system") else []
        turns = [*first, {"role": "user", "content": text + row.get("suffix", "")}]
    if not tok.chat_template:
        raise UserError(f"item {row['id']!r} is a chat, and this tokenizer has no chat template")
    try:
        ids = tok.apply_chat_template(
            turns, tokenize=True, add_generation_prompt=True, return_dict=False, enable_thinking=False,
            chat_template=chat_prompts.chat_template(tok))
    except Exception as e:  # a template is code, which may raise any class
        raise chat_prompts.template_fault(e) from e
    return [*ids, *plain_ids(tok, row.get("prefill", "") or row.get("assistant", ""))]


def _last_sentence(tok, ids, tokens, rule) -> list[int]:
    """From the first token of the final sentence of the last user turn. The turn's marks are ChatML's."""
    starts = [i for i, t in enumerate(tokens) if t == "<|im_start|>" and tokens[i + 1 : i + 2] == ["user"]]
    if not starts:
        return list(range(len(ids)))
    body = starts[-1] + 3  # the mark, the role, a line break
    end = next((i for i in range(body, len(ids)) if tokens[i] == "<|im_end|>"), len(ids))
    ends = [i for i in range(body, end - 1) if re.search(r"[.!?]\s*$", tokens[i])]
    return list(range(ends[-1] + 1 if ends else body, len(ids)))


def _suffix(tok, ids, tokens, rule) -> list[int]:
    """The tokens that spell a text where it occurs last, and with "then_tail" all tokens after them."""
    wanted = rule["text"].strip()
    for i in reversed(range(len(ids))):
        if tok.decode(ids[i:]).lstrip().startswith(wanted):
            end = next((j for j in range(i + 1, len(ids)) if wanted in tok.decode(ids[i:j])), len(ids))
            return list(range(i, len(ids) if rule["kind"].endswith("tail") else end))
    return []


def _from_token(tok, ids, tokens, rule) -> list[int]:
    return list(range(tokens.index(rule["token"]), len(ids))) if rule["token"] in tokens else []


# Rule -> (tokenizer, ids, their spelling, rule) -> positions. `offset_from_end` counts from the end.
RULES: dict[str, Callable] = {
    "final_token": lambda tok, ids, tokens, rule: [len(ids) - 1],
    "offset_from_end": lambda tok, ids, tokens, rule: [-rule["k"]] if 0 < rule["k"] <= len(ids) else [],
    "last_n": lambda tok, ids, tokens, rule: list(range(max(0, len(ids) - rule["n"]), len(ids))),
    "all": lambda tok, ids, tokens, rule: list(range(len(ids))),
    "positions": lambda tok, ids, tokens, rule: [p for p in rule["positions"] if 0 <= p < len(ids)],
    "line_one_newline": lambda tok, ids, tokens, rule: [i for i, t in enumerate(tokens) if "\n" in t][-1:],
    "from_token": _from_token,
    "from_last_sentence_start": _last_sentence,
    "suffix_text": _suffix,
    "suffix_text_then_tail": _suffix,
}


def cells_of(nla: api.NLA, row: dict) -> Cells:
    """Return the cells of an item. Raises UserError as `render_ids`, and for too many tokens."""
    tok, spec = nla.tokenizer, nla.spec
    ids = render_ids(tok, row)
    tokens = [tok.decode([i], clean_up_tokenization_spaces=False) for i in ids]
    named = RULES[row["positions"]["kind"]](tok, ids, tokens, row["positions"]) if ids else []
    # A chat template may write the lead itself, which `target.capture` prepends.
    own = len(spec.lead) if tuple(ids[: len(spec.lead)]) == spec.lead else 0
    kept = [p for p in named if p % len(ids) >= own]
    spec.lm.check_fits(len(ids) - own + len(spec.lead), f"item {row['id']!r}")
    return Cells(row["id"], ids[own:], [p % len(ids) - own for p in kept], kept, [tokens[p] for p in kept])


Reader = Callable[[np.ndarray, int], list[dict]]  # (h [N, D], number of the group) -> what it says of each


def prose(nla: api.NLA, *, samples: int = 1, temperature: float = 1.0, seed: int = 0) -> Reader:
    """Return the reader that lets AV write `samples` explanations of each activation."""

    def read(h_ND: np.ndarray, group: int) -> list[dict]:
        said = nla.verbalize(np.repeat(h_ND, samples, 0), key=key_for(seed, "explain", group),
                             temperature=temperature)
        return [{"samples": part} for part in chunks(said, samples)]

    return read


def ranked(nla: api.NLA, j_DD: np.ndarray, n: int = 10) -> Reader:
    """Return the reader that ranks the n first tokens of the Jacobian lens (`jacobian_lens.fit_or_read`)."""
    spell = lambda i: nla.tokenizer.decode([int(i)], clean_up_tokenization_spaces=False)

    def read(h_ND: np.ndarray, group: int) -> list[dict]:
        ids_NK, logit_NK = jacobian_lens.rank_tokens(nla.runner, j_DD, h_ND, n)
        return [{"tokens": list(map(spell, ids)), "scores": [round(float(x), 4) for x in logit]}
                for ids, logit in zip(ids_NK, logit_NK, strict=True)]

    return read


def write_readouts(nla: api.NLA, plan: str | Path, out: str | Path, read: Reader, *, limit: int = 0,
                   label: str = "readouts") -> dict[str, int]:
    """Write the readouts of a plan's items to the file `out`, and return how many cells and items there are.

    An interrupted run is resumed at the group of items where it stopped. An item is left out, and counted as
    such, if it is not for this target (`cells_of`) or if its rule selects no token.

    Args:
      read: what to say of activations, such as `{"samples": [...]}`. limit: items, at most; 0: all.

    Raises UserError for a plan or a file of readouts that cannot be read, and for a plan of which no item
    can be read.
    """
    rows, out = read_plan(plan), paths.path(out)
    rows = rows[: limit or len(rows)]
    made, why = [], ""
    for row in rows:
        try:
            cells = cells_of(nla, row)
        except UserError as e:
            cells, why = None, str(e)
        if cells and cells.positions:
            made.append(cells)
    if not made:
        raise UserError(f"{plan}: none of its {len(rows)} items can be read{why and f': {why}'}")
    groups = list(chunks(made, GROUP))
    done = _written(out, groups, nla.spec.layer)
    before = sum(map(len, groups[:done]))
    with Progress(label, len(made), before, unit="items") as bar, open(out, "a", encoding="utf-8") as file:
        for number, group in enumerate(groups[done:], done):
            h_ND = np.concatenate([nla.capture_ids(c.ids)[c.positions] for c in group])
            said = iter(read(h_ND, number))
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n"
                            for c in group for line in _lines(c, nla.spec.layer, said))
            file.flush()
            bar.advance(len(group))
    return {"items": len(made), "left out": len(rows) - len(made),
            "cells": sum(len(c.positions) for c in made)}


def _lines(c: Cells, layer: int, said: Iterator[dict]) -> Iterator[dict]:
    for pos, token in zip(c.named, c.tokens, strict=True):
        yield {"id": c.id, "layer": layer, "pos": pos, "token": token, **next(said)}


def _written(out: Path, groups: Sequence[Sequence[Cells]], layer: int) -> int:
    """Return how many groups the file has whole, and cut off what follows them."""
    if not out.is_file():
        return 0
    lines, at, done = out.read_bytes().splitlines(keepends=True), 0, 0
    for group in groups:
        wanted = [(c.id, layer, pos) for c in group for pos in c.named]
        found = lines[at : at + len(wanted)]
        try:
            rows = [json.loads(x) for x in found if x.endswith(b"\n")]
            have = [(row["id"], row["layer"], row["pos"]) for row in rows]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{out}: not a file of readouts: remove it, or name another --out") from None
        if have != wanted:
            if have != wanted[: len(have)]:
                raise UserError(f"{out}: it has readouts of another plan or layer: remove it, or name "
                                "another --out")
            break
        at, done = at + len(wanted), done + 1
    if at < len(lines):
        out.write_bytes(b"".join(lines[:at]))
    return done
