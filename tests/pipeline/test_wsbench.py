"""Readouts for WorkspaceBench: renders and rules of its plan, its contract for a line, and a resumed run."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from nla_jax import cli
from nla_jax.errors import UserError
from nla_jax.lm.tokenizer import plain_ids
from nla_jax.pipeline import wsbench
from tests.helpers import tiny

TOK = tiny.tokenizer()


def row(kind: str, text: str = "One of it. Two of it", render: str = "plain", **more) -> dict:
    rule = {"kind": kind, **more.pop("rule", {})}
    return {"family": "f", "id": more.pop("id", "x"), "render": render, "positions": rule, "layers": [1],
            "text": text, **more}


def selected(kind: str, text: str = "One of it. Two of it", render: str = "plain", **more) -> str:
    """The text that a rule selects."""
    item = row(kind, text, render, **more)
    ids = wsbench.render_ids(TOK, item)
    tokens = [TOK.decode([i]) for i in ids]
    found = wsbench.RULES[kind](TOK, ids, tokens, item["positions"])
    return "".join(tokens[p] for p in found)


def test_every_rule_selects_what_its_plan_means():
    assert selected("all") == "One of it. Two of it" and selected("final_token") == "t"
    assert selected("last_n", rule={"n": 3}) == " it" and selected("offset_from_end", rule={"k": 2}) == "i"
    assert selected("offset_from_end", rule={"k": 99}) == ""
    assert selected("positions", rule={"positions": [0, 1, 400]}) == "On"
    assert selected("line_one_newline", "one\ntwo\nthree") == "\n"
    assert selected("from_token", rule={"token": " of"}) == " of it. Two of it"
    assert selected("from_token", rule={"token": " What"}) == ""
    assert selected("suffix_text", "a b of it and", rule={"text": "of it"}) == " of it"
    assert selected("suffix_text_then_tail", "a of it, of it and", rule={"text": "of it"}) == " of it and"
    assert selected("suffix_text", "a b", rule={"text": "of it"}) == ""
    chat = selected("from_last_sentence_start", render="chat")
    assert chat == " Two of it<|im_end|>\n<|im_start|>assistant\n"
    assert selected("from_last_sentence_start") == "One of it. Two of it"  # no turns: all of it


def test_every_render_is_the_text_that_it_means():
    said = lambda render, **more: TOK.decode(wsbench.render_ids(TOK, row("all", "hi", render, **more)))
    assert said("plain") == said("bare") == "hi"
    user, assistant = "<|im_start|>user\nhi{}<|im_end|>\n", "<|im_start|>assistant\n"
    assert said("chat") == user.format("") + assistant
    assert said("chat", system="be") == "<|im_start|>system\nbe<|im_end|>\n" + user.format("") + assistant
    assert said("chat_prefill", prefill="So:") == user.format("") + assistant + "So:"
    assert said("chat_dm", assistant="A text.") == user.format("") + assistant + "A text."
    assert said("chat_summarize", suffix="\n\nSay it.") == user.format("\n\nSay it.") + assistant
    turns = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    assert said("chat_context", messages=turns).count("<|im_start|>") == 3
    assert said("captured", extra={"input_ids": plain_ids(TOK, "two")}) == "two"
    for extra in ({}, {"input_ids": [10**6]}):
        with pytest.raises(UserError, match="capture it again"):
            said("captured", extra=extra)
    bare = tiny.tokenizer()
    bare.chat_template = None
    with pytest.raises(UserError, match="is a chat, and this tokenizer has no chat template"):
        wsbench.render_ids(bare, row("all", "hi", "chat"))


@pytest.mark.parametrize("line, said", [
    ("{", "not a line of `wsbench plan`"), ("[]", "not a line"), ('{"id": "a", "render": "plain"}', "not a"),
    (json.dumps(row("all", render="sung")), "unknown render 'sung'"),
    (json.dumps(row("each")), "unknown rule 'each'")])
def test_a_wrong_plan_is_refused_with_its_line(tmp_path, line, said):
    path = tmp_path / "plan.jsonl"
    path.write_text(json.dumps(row("all")) + "\n" + line + "\n")
    with pytest.raises(UserError, match=f"plan.jsonl:2: {said}"):
        wsbench.read_plan(path)
    path.write_text("\n")
    with pytest.raises(UserError, match="a plan without items"):
        wsbench.read_plan(path)


def test_the_ids_that_a_tokenizer_puts_first_are_not_counted_twice():
    lm = SimpleNamespace(check_fits=lambda n, what: None)
    lead = tuple(plain_ids(TOK, "<|im_start|>"))
    nla = SimpleNamespace(tokenizer=TOK, spec=SimpleNamespace(lead=lead, lm=lm))
    chat = wsbench.cells_of(nla, row("all", "hi", "chat"))
    whole = wsbench.render_ids(TOK, row("all", "hi", "chat"))
    assert chat.ids == whole[1:] and chat.named == list(range(1, len(whole)))
    assert chat.positions == list(range(len(whole) - 1)) and chat.tokens[0] == TOK.decode(whole[1:2])
    plain = wsbench.cells_of(nla, row("offset_from_end", "hi", rule={"k": 2}))
    assert (plain.positions, plain.named, plain.tokens) == ([0], [-2], ["h"])


def check_contract(line: str, kind: str, k: int, layer: int) -> dict:
    """Check one line against the documented contract: README.md of camilablank/workspace-bench."""
    found = json.loads(line)
    assert found.keys() == {"id", "layer", "pos", "token"} | ({"samples"} if kind == "prose" else
                                                               {"tokens", "scores"})
    assert type(found["id"]) is str and type(found["token"]) is str
    assert type(found["layer"]) is int and type(found["pos"]) is int and found["layer"] == layer
    words = found["samples" if kind == "prose" else "tokens"]
    assert len(words) == k and all(type(w) is str for w in words)
    if kind == "tokens":
        assert len(found["scores"]) == k and all(type(x) is float for x in found["scores"])
        assert found["scores"] == sorted(found["scores"], reverse=True)
    return found


@pytest.fixture
def plan(tmp_path):
    rows = [row("last_n", f"a river of {i}", rule={"n": 2}, id=f"i{i}") for i in range(5)]
    rows += [row("positions", id="none", rule={"positions": [900]}),
             row("all", id="other", render="captured", extra={"input_ids": [10**6]})]
    path = tmp_path / "plan.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def test_a_stopped_run_goes_on_with_the_same_readouts(nla, plan, tmp_path, monkeypatch):
    monkeypatch.setattr(wsbench, "GROUP", 2)
    read = wsbench.prose(nla, samples=2, seed=3)
    counts = wsbench.write_readouts(nla, plan, tmp_path / "whole.jsonl", read)
    assert counts == {"items": 5, "left out": 2, "cells": 10}
    whole = (tmp_path / "whole.jsonl").read_text("utf-8")
    found = [check_contract(line, "prose", 2, nla.spec.layer) for line in whole.splitlines()]
    end = len(plain_ids(nla.tokenizer, "a river of 0")) - 1
    assert [(f["id"], f["pos"]) for f in found[:3]] == [("i0", end - 1), ("i0", end), ("i1", end - 1)]
    assert [f["token"] for f in found[:2]] == [" ", "0"]

    out, groups = tmp_path / "part.jsonl", []
    out.write_text("".join(whole.splitlines(keepends=True)[:6])[:-9], "utf-8")  # stopped inside a line
    again = lambda h_ND, group: groups.append(group) or read(h_ND, group)
    wsbench.write_readouts(nla, plan, out, again)
    assert out.read_text("utf-8") == whole and groups == [1, 2]
    wsbench.write_readouts(nla, plan, out, again)
    assert out.read_text("utf-8") == whole and groups == [1, 2]
    out.write_text(whole.replace('"i1"', '"j1"'))
    with pytest.raises(UserError, match="readouts of another plan or layer"):
        wsbench.write_readouts(nla, plan, out, read)
    out.write_text("a text\n" * 9)
    with pytest.raises(UserError, match="not a file of readouts"):
        wsbench.write_readouts(nla, plan, out, read)


def test_the_command_writes_both_kinds(finished, nla, plan, tmp_path, capsys, monkeypatch):
    command = ["readouts", "--bundle", str(finished / "run" / "bundle"), "--plan", str(plan), "--limit", "2"]
    assert cli.main([*command, "--out", str(tmp_path / "new" / "nla.jsonl")]) == 0
    assert json.loads(capsys.readouterr().out)["cells"] == 4
    from nla_jax.evaluate import jacobian_lens

    j_DD = np.eye(nla.spec.lm.d_model, dtype=np.float32)
    monkeypatch.setattr(jacobian_lens, "fit_or_read", lambda *a: j_DD)
    assert cli.main([*command, "--reader", "lens", "--out", str(tmp_path / "lens.jsonl")]) == 0
    for file, kind, k in (("new/nla.jsonl", "prose", 1), ("lens.jsonl", "tokens", 10)):
        lines = (tmp_path / file).read_text("utf-8").splitlines()
        assert len([check_contract(line, kind, k, nla.spec.layer) for line in lines]) == 4
    assert cli.main([*command, "--reader", "lens", "--samples", "2", "--out", str(tmp_path / "x")]) == 2
    assert "the lens always says the same" in capsys.readouterr().err
