"""The explorer: it says what the library says, streamed or not."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nla_jax import bundle
from nla_jax.data import entropy_positions
from nla_jax.errors import UserError
from nla_jax.evaluate import fve as F
from nla_jax.evaluate import writer
from nla_jax.evaluate.probes import recurrence
from nla_jax.evaluate.writer import Writer
from nla_jax.lm import model
from nla_jax.lm import params as params_lib
from nla_jax.lm import tokenizer as tok_lib
from nla_jax.view.explorer import bundles, frozen_reader
from nla_jax.view.explorer import engine as engine_lib
from tests.helpers.explorers import TEXT, even_trust, last


def test_streamed_words_are_those_of_the_one_shot_sampler(engine, nla):
    """Samples and the greedy answer, their scores included; and they grow as they are written."""
    h = nla.capture(TEXT)[3]
    at_once = nla.verbalize(np.repeat(h[None], 9, 0), key=jax.random.key(bundles.SEED))
    at_once[0] = nla.verbalize(h[None], temperature=0.0)[0]
    found = [list(engine.explain(TEXT, 3, sample=i)) for i in range(9)]
    assert [last(f)["words"] for f in found] == at_once and any(at_once) and "" in at_once
    for events in found:
        written = [e["written"] for e in events if "written" in e]
        for a, b in zip(written, written[1:], strict=False):
            assert b.startswith(a.rstrip("\n"))
        if words := last(events)["words"]:
            assert written[-1].strip() == words


def test_scores_are_those_of_the_round_trip(engine, nla):
    reports = nla.round_trip(TEXT, temperature=0.0)
    heat = [h for e in engine.heat(TEXT) for h in e.get("heat", ())]
    assert [h["token"] for h in heat] == list(range(len(nla.tokens(TEXT))))
    assert [h["words"] for h in heat] == [r.explanation for r in reports]
    np.testing.assert_allclose([h["fve"] for h in heat], [r.fve for r in reports], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose([h["cos"] for h in heat], [r.cos for r in reports], atol=1e-5)
    assert [h["ok"] for h in heat] == [r.ok for r in reports]
    rest = [h for e in engine.heat(TEXT, start=10) for h in e.get("heat", ())]
    assert [(h["token"], h["words"]) for h in rest] == [(h["token"], h["words"]) for h in heat[10:]]
    for t in (0, 3):
        one = last(engine.explain(TEXT, t))
        assert one["fve"] == pytest.approx(reports[t].fve, rel=1e-4, abs=1e-4) and one["ok"] == reports[t].ok


def fve_of(nla, h_D, h_hat_D) -> float:
    """By the formula."""
    unit = lambda a: a * np.sqrt(len(a)) / np.linalg.norm(a)
    return 1 - np.sum((unit(h_D) - unit(h_hat_D)) ** 2) / np.sum((unit(h_D) - nla.mean_direction) ** 2)


def test_ar_reads_few_rows_at_once(engine, nla):
    few, texts = engine.sides["a"].nla, [f"a cat and {n} dogs" for n in range(6)]
    assert few.runner.read_rows == bundles.READ_ROWS < len(texts) <= few.runner.batch
    np.testing.assert_allclose(few.reconstruct(texts), nla.reconstruct(texts), rtol=1e-4, atol=1e-4)


def test_edits_claims_and_controls(engine, nla):
    h = nla.capture(TEXT)[2].astype(np.float64)
    words, before = "first claim\nsecond one", "other words"
    done = last(engine.edit(TEXT, 2, words, before))
    parts = ["first claim\nsecond one", "second one", "first claim", "other words"]
    whole, no_first, no_second, old = nla.reconstruct(parts).astype(np.float64)
    assert done["fve"] == pytest.approx(fve_of(nla, h, whole), rel=1e-4)
    assert [c["words"] for c in done["claims"]] == ["first claim", "second one"]
    wanted = [fve_of(nla, h, whole) - fve_of(nla, h, part) for part in (no_first, no_second)]
    assert [c["adds"] for c in done["claims"]] == pytest.approx(wanted, rel=1e-3, abs=1e-4)
    cos = whole @ old / np.linalg.norm(whole) / np.linalg.norm(old)
    assert done["cos_before"] == pytest.approx(cos, abs=1e-5)
    assert last(engine.edit(TEXT, 2, words, words))["cos_before"] == pytest.approx(1, abs=1e-6)
    side = engine.sides["a"]
    assert done["controls"]["mean"] == pytest.approx(fve_of(nla, h, nla.mean_direction), rel=1e-4)
    variance = np.sum((F.normalise(h[None])[0] - nla.mean_direction) ** 2)
    others = [fve_of(nla, h, x) if ok else 1 - 2 * len(h) / variance
              for x, ok in zip(side.others_ND, side.others_ok, strict=True)]
    assert done["controls"]["shuffled"] == pytest.approx(np.mean(others), rel=1e-4)
    (alone,) = last(engine.edit(TEXT, 2, "only one"))["claims"]
    only, bare = nla.reconstruct(["only one", ""]).astype(np.float64)
    assert alone["adds"] == pytest.approx(fve_of(nla, h, only) - fve_of(nla, h, bare), rel=1e-3, abs=1e-4)


def test_the_ending_line_is_apart_from_the_claims(engine, nla):
    """One line, whatever it holds; a claim is left out of the description, which keeps its ending line."""
    h = nla.capture(TEXT)[2].astype(np.float64)
    done = last(engine.edit(TEXT, 2, "one; two\n… a. sea; b"))
    parts = ["one; two\n… a. sea; b", "two\n… a. sea; b", "one;\n… a. sea; b", "one; two"]
    whole, *without = (fve_of(nla, h, x) for x in nla.reconstruct(parts).astype(np.float64))
    assert [c["words"] for c in done["claims"]] == ["one;", "two"] and done["end"]["words"] == "a. sea; b"
    adds = [c["adds"] for c in [*done["claims"], done["end"]]]
    assert adds == pytest.approx([whole - x for x in without], rel=1e-3, abs=1e-4)
    only = last(engine.edit(TEXT, 2, "… a"))
    alone, bare = (fve_of(nla, h, x) for x in nla.reconstruct(["… a", ""]).astype(np.float64))
    assert only["claims"] == [] and only["end"]["adds"] == pytest.approx(alone - bare, rel=1e-3, abs=1e-4)
    many = last(engine.edit(TEXT, 2, "a\n" * 20 + "… b"))
    assert len(many["claims"]) == 6 and many["end"]["words"] == "b"  # a batch, the whole words among it
    assert last(engine.edit(TEXT, 2, "one; two"))["end"] is None
    assert last(engine.recur(TEXT, 2, "zebra\n… the sea. a town"))["at"] == [[]]


def test_the_frozen_target_reads_the_words(engine, nla):
    """The text's own words bring it to h. Others score what they score as a text."""
    h = nla.capture(TEXT).astype(np.float64)
    for token in (0, 5, len(h) - 1):
        same = last(engine.edit(TEXT, token, "".join(nla.tokens(TEXT)[: token + 1])))["frozen"]
        assert (same["fve"], same["cos"]) == pytest.approx((1, 1), abs=1e-5)
    side, words = engine.sides["a"], "a harbour\n… the sea"
    read, unit = nla.capture(words)[-1].astype(np.float64), lambda a: a / np.linalg.norm(a)
    found = last(engine.edit(TEXT, 5, words))["frozen"]
    assert found["fve"] == pytest.approx(fve_of(nla, h[5], read), rel=1e-4, abs=1e-4)
    assert found["cos"] == pytest.approx(unit(h[5]) @ unit(read), abs=1e-5)
    others = [words, "a zebra"]
    read_ND, ok = frozen_reader.read_words(side.bare, others), np.ones(2, bool)
    told = dataclasses.replace(side, others_ND=read_ND, others_bare_ND=read_ND, others_ok=ok)
    wanted = np.mean([fve_of(nla, h[5], nla.capture(t)[-1].astype(np.float64)) for t in others])
    found_too = last(engine_lib.Engine({"a": told}).edit(TEXT, 5, words))
    assert found_too["frozen"]["shuffled"] == pytest.approx(wanted, rel=1e-4)
    assert side.others_bare_ND.shape == side.others_ND.shape
    nothing = last(engine.edit(TEXT, 5, ""))
    assert nothing["frozen"]["fve"] == nothing["fve"] and nothing["frozen"]["cos"] == 0.0 != found["cos"]
    assert side.bare is engine.sides["b"].bare


@pytest.mark.parametrize("by", entropy_positions.KINDS)
def test_telling_tokens_are_those_of_the_target(engine, nla, by):
    ids = tok_lib.plain_ids(nla.tokenizer, TEXT)
    done = last(engine.telling(TEXT, 3, by))
    assert done["tokens"] == entropy_positions.telling_positions(nla.base, nla.spec, ids, 3, by=by)
    if by == "entropy":
        p = next_p(nla, "".join(nla.tokens(TEXT)[: done["tokens"][1] + 1]))
        assert done["nats"][1] == pytest.approx(-(p * np.log(p)).sum(), rel=1e-3)
    assert len(last(engine.telling("a sea"))["tokens"]) == len(nla.tokens("a sea"))
    with pytest.raises(UserError, match="empty"):
        list(engine.telling(""))


def next_p(nla, text: str) -> np.ndarray:
    """p [V] of the next token after a text, without padding."""
    lm, ids = nla.spec.lm, np.array([tok_lib.raw_ids(nla.tokenizer, text)])
    x, _ = model.forward(nla.base, lm, model.embed(nla.base, lm, ids), np.ones(ids.shape, bool))
    logits = np.asarray(model.unembed(nla.base, lm, x[0, -1]), np.float64)
    return np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()


def test_what_the_target_would_say_next(engine, nla):
    read = "".join(nla.tokens(TEXT)[:6])
    words = "a harbour\n… the assistant"
    done = last(engine.predict(TEXT, 5, words))
    p, q = next_p(nla, read), next_p(nla, words)
    for name, wanted in (("after_text", p), ("after_words", q)):
        top = np.argsort(-wanted)[:5]
        assert [x["p"] for x in done[name]] == pytest.approx(wanted[top], rel=1e-3)
        assert done[name][0]["token"] == nla.tokenizer.decode([top[0]])
    assert done["kl"] == pytest.approx(np.sum(p * np.log(p / q)), rel=1e-3) and done["kl"] > 0.1
    same = last(engine.predict(TEXT, 5, read))
    assert same["after_text"] == same["after_words"] and same["kl"] == 0
    for words, message in (("", "no words to read"), ("a" * 1600, "this target reads at most 1536")):
        with pytest.raises(UserError, match=message):
            list(engine.predict(TEXT, 5, words))


def test_a_frozen_ar_says_so(engine, nla, finished):
    """Its bundle beside a trained one: what it reconstructs is what the frozen target reads."""
    meta = bundle.read_sidecar(finished / "run" / "bundle")
    assert {s["ar_kind"] for s in engine.about()["sides"].values()} == {"trained"}
    frozen = meta | {"roles": meta["roles"] | {"ar_kind": "frozen"}}
    assert bundles.facts(finished / "run" / "bundle", frozen)["ar_kind"] == "frozen"
    first = engine.sides["a"]
    opened = bundle.LoadedBundle(
        frozen, first.nla.spec, first.nla.tokenizer, first.nla.base, first.nla.av, {}, first.nla.dtype
    )
    side = bundles._side(finished / "run" / "bundle", opened, 8, first)
    words, h = "a harbour\n… the sea", nla.capture(TEXT)[5].astype(np.float64)
    done, trained = (last(e.edit(TEXT, 5, words)) for e in (engine_lib.Engine({"a": side}), engine))
    read = nla.capture(meta["prompt_templates"]["ar"].replace("{explanation}", words))[-1].astype(np.float64)
    assert done["fve"] == pytest.approx(fve_of(nla, h, read), rel=1e-4, abs=1e-4)
    assert done["frozen"]["fve"] == trained["frozen"]["fve"] and done["fve"] != trained["fve"]


def test_two_tokens(engine, nla):
    h = nla.capture(TEXT)[[1, 4]].astype(np.float64)
    done = last(engine.compare(TEXT, (1, 4), ("ab cd", "ef")))
    h_hat = nla.reconstruct(["ab cd", "ef"]).astype(np.float64)
    cos = lambda a: a[0] @ a[1] / np.linalg.norm(a[0]) / np.linalg.norm(a[1])
    assert (done["cos_h"], done["cos_words"]) == pytest.approx((cos(h), cos(h_hat)), abs=1e-5)
    for name, other in (("own", 0), ("crossed", 1)):  # crossed: the other token's words
        wanted = [fve_of(nla, h[i], h_hat[i ^ other]) for i in (0, 1)]
        assert [s["fve"] for s in done[name]] == pytest.approx(wanted, rel=1e-4, abs=1e-4)


@functools.partial(jax.jit, static_argnames="spec")
def next_id(base, ids_T, n, at, add_D, spec):
    """The likeliest token after the first n, by a whole forward pass with `add_D` · |h| added at block K."""
    lm, K = spec.lm, spec.layer
    upper = {**base, "blocks": jax.tree.map(lambda a: a[K + 1 :], base["blocks"])}
    valid = jnp.arange(len(ids_T))[None] < n
    x, _ = model.forward(params_lib.truncate(base, K + 1), lm, model.embed(base, lm, ids_T[None]), valid)
    x = x.at[:, at].add(jnp.linalg.norm(x[0, at]) * add_D)
    x, _ = model.forward(upper, lm.of_blocks(K + 1, lm.n_blocks), x, valid)
    return model.unembed(base, lm, x[:, n - 1]).argmax()


def greedy(nla, ids, add_D, n):
    """n tokens after `ids`, the direction added at the last of these."""
    out, at = np.zeros(len(ids) + n, np.int32), len(ids) - 1
    out[: at + 1] = ids
    for i in range(at + 1, len(out)):
        out[i] = next_id(nla.base, out, i, at, add_D, nla.spec)
    return out[at + 1 :].tolist()


def test_steering_is_the_forward_pass_with_another_h(engine, nla):
    token, strength, n = 6, 3.0, 6
    events = list(engine.steer(TEXT, token, "ab cd", "the sea", strength))
    new, old = (a / np.linalg.norm(a) for a in nla.reconstruct(["ab cd", "the sea"]))
    ids = tok_lib.plain_ids(nla.tokenizer, TEXT)[: token + 1]
    for said, add_D in zip(last(events)["goes_on"], (0 * new, strength * (new - old)), strict=True):
        ids_N = greedy(nla, ids, add_D, n)
        ends = [i for i, t in enumerate(ids_N) if t in nla.spec.av.eos]
        wanted = nla.tokenizer.decode(ids_N[: (ends or [n])[0]], skip_special_tokens=True)
        assert said.startswith(wanted) and (not ends or said == wanted)
    plain = last(engine.steer(TEXT, token, "ab cd", "the sea", 0.0))["goes_on"]
    assert plain[0] == plain[1] == last(events)["goes_on"][0]


def test_warm_start_beside_it(engine, finished):
    import nla_jax

    warm = nla_jax.load(finished / "run" / "bundle_warm", batch=8)
    h = warm.capture(TEXT)[5]
    wanted = warm.verbalize(np.repeat(h[None], 4, 0), key=jax.random.key(bundles.SEED))
    assert [last(engine.explain(TEXT, 5, "b", i))["words"] for i in (1, 2, 3)] == wanted[1:]
    assert engine.sides["b"].nla.base is engine.sides["a"].nla.base  # the target is held once
    facts = engine.about()["sides"]
    assert facts["a"]["stage"] == "rl" != facts["b"]["stage"]
    summary = json.loads((finished / "run" / "summary.json").read_text("utf-8"))
    assert facts["a"]["figures"]["fve"][0] == summary["fve_rl"]
    assert facts["b"]["figures"]["fve"][0] == summary["fve_warm_start"]


@pytest.mark.parametrize(
    "response,words",
    [("", ""), ("\nan ol", "an ol"), ("\na\n</expl", "a"), ("\na <", "a "), ("\na\n</explanation>x", "a"),
     ("\na < b", "a < b"), ("\na\ufffd", "a")],
)
def test_an_answer_under_way(response, words):
    assert bundles.parse_unfinished("<explanation>" + response) == words
    assert bundles.parse_unfinished("<expl") == "" == bundles.parse_unfinished("words" + response)


def test_what_the_engine_refuses(engine, finished, tmp_path):
    for work, message in [
        (lambda: engine.explain("a" * 65, 0), "65 tokens; at most 64"),
        (lambda: engine.explain(TEXT, 99), "token 99 is outside the text"),
        (lambda: engine.read(""), "the text is empty"),
        (lambda: engine.heat("a" * 65), "65 tokens; at most 64"),
        (lambda: engine.explain(TEXT, 0, "c"), "no bundle 'c'"),
    ]:
        with pytest.raises(UserError, match=message):
            list(work())
    with pytest.raises(UserError, match="not an NLA bundle"):
        bundles.open_sides(finished / "run" / "bundle", tmp_path)


# --- chats, and claims that come back -------------------------------------------------------------


def test_a_chat_is_read_as_the_target_reads_it(engine, nla):
    messages = [{"role": "user", "content": "user"}, {"role": "assistant", "content": " the sea \n"}]
    tok = nla.tokenizer
    for opens in (True, False):
        done = last(engine.chat(messages, opens))
        stripped = [{**m, "content": m["content"].strip()} for m in messages]
        ids = tok.apply_chat_template(stripped, add_generation_prompt=opens, return_dict=False)
        assert tok_lib.plain_ids(tok, done["text"]) == ids
        assert done["tokens"] == engine.tokens(done["text"]) and "".join(done["tokens"]) == done["text"]
        said = ["".join(done["tokens"][t["start"] : t["end"]]) for t in done["turns"]]
        assert ([t["role"] for t in done["turns"]], said) == (["user", "assistant"], ["user", "the sea"])
    done = last(engine.chat(messages))
    assert last(engine.read(done["text"]))["tokens"] == done["tokens"]
    for ask in (engine.read, lambda text: engine.explain(text, 0)):
        with pytest.raises(UserError, match=r"spells '<\|im_end\|>', a special token.*or read it as a chat"):
            list(ask("a <|im_end|>"))
    with pytest.raises(UserError, match="cannot be read: holds a special token"):
        list(engine.chat([{"role": "user", "content": "<|im_end|>"}]))
    with pytest.raises(UserError, match="tokens; at most 64"):
        list(engine.chat([{"role": "user", "content": "a " * 64}]))


def test_a_target_without_a_template(engine, nla, monkeypatch):
    assert engine.about()["chat"] is True
    monkeypatch.setattr(engine.sides["a"].nla.tokenizer, "chat_template", None)
    assert engine.about()["chat"] is False
    with pytest.raises(UserError, match="no chat template: write the turns as a text"):
        list(engine.chat([{"role": "user", "content": "a"}]))


def test_claims_that_the_tokens_before_make_too(engine, nla):
    """By the grounding table's own comparison."""
    fresh = engine_lib.Engine(engine.sides, max_tokens=64)
    near = ["a red zebra", "nothing", "the zebra, red\nand a quagga", "a red zebra"]
    fresh._cached(TEXT).said.update({("a", i): t for i, t in enumerate(near)})
    words = "zebra in red\na quagga\nof the\na gnu"
    done = last(fresh.recur(TEXT, 3, words))
    assert done == {"before": [0, 1, 2], "at": [[0, 2], [2], None, []]}
    assert [a if a is None else bool(a) for a in done["at"]] == recurrence.recurring_claims(words, near[:3])
    assert last(fresh.recur(TEXT, 0, words)) == {"before": [], "at": [[], [], None, []]}
    assert last(fresh.recur(TEXT, 1, "zebra")) == {"before": [0], "at": [[0]]}


def test_claims_with_the_trust_in_them(engine, monkeypatch):
    words = "zebra in red\n… an old town"
    with pytest.raises(UserError, match="no trust model"):
        list(engine.trust(TEXT, 3, words))
    assert not engine.sides["a"].facts["trust"]
    monkeypatch.setattr(engine.sides["a"].nla, "trust", even_trust())
    *under_way, done = engine.trust(TEXT, 3, words)
    assert under_way == [{}]
    found = done["done"]["claims"]
    assert [words[c["start"] : c["end"]] for c in found] == ["zebra", "red", "an", "old", "town"]
    assert [c["kind"] for c in found] == ["word", "word", "ending", "ending", "ending"]
    assert all(0.5 <= c["trust"] < 0.74 for c in found)  # 1 / (1 + exp(-1)) if all tokens after say it


def test_neighbours_are_explained_once(engine, nla, monkeypatch):
    monkeypatch.setattr(writer, "PIECE", 1)
    fresh = engine_lib.Engine(engine.sides, max_tokens=64)
    events = list(fresh.recur(TEXT, 5, "words"))
    assert events.count({}) > 1  # a client that has left is noticed while they are explained
    heat = [h["words"] for e in engine.heat(TEXT) for h in e.get("heat", ())]
    said = fresh._cached(TEXT).said
    assert said.keys() == {("a", 2), ("a", 3), ("a", 4)}
    assert all(heat[i] == words for (_, i), words in said.items())
    assert list(fresh.recur(TEXT, 5, "words")) == events[-1:]


def test_what_is_known_is_not_written_again(engine, monkeypatch):
    """A click brings the tokens before with it; what was coloured is there at once, in the same words."""
    fresh = engine_lib.Engine(engine.sides, max_tokens=64)
    events = list(fresh.explain(TEXT, 5))
    assert {("a", i) for i in (2, 3, 4, 5)} <= fresh._cached(TEXT).said.keys()
    assert [e for e in events if "done" in e] == [{"done": last(events)}]
    with monkeypatch.context() as m:
        m.setattr(Writer, "submit", None)
        assert list(fresh.recur(TEXT, 5, "words")) == [{"done": last(fresh.recur(TEXT, 5, "words"))}]
        again = list(fresh.explain(TEXT, 5))
    assert again == [{"written": last(events)["words"]}, {"done": last(events)}]
    coloured = engine_lib.Engine(engine.sides, max_tokens=64)
    list(coloured.heat(TEXT))
    monkeypatch.setattr(Writer, "submit", None)
    assert list(coloured.explain(TEXT, 5)) == again


def test_requests_in_turns_share_the_batch_and_say_the_same(engine):
    """A click while a text is coloured, another sample, and a client who leaves."""
    alone = engine_lib.Engine(engine.sides, max_tokens=64)
    wanted = [last(alone.explain(TEXT, 5)), last(alone.explain(TEXT, 2, sample=3))]
    heat = [h for e in alone.heat(TEXT) for h in e.get("heat", ())]
    writer, fresh = engine.sides["a"].writer, engine_lib.Engine(engine.sides, max_tokens=64)
    colour, before = fresh.heat(TEXT), writer.pieces
    first = [next(colour)]
    running = {"click": fresh.explain(TEXT, 5), "sample": fresh.explain(TEXT, 2, sample=3),
               "leaves": fresh.explain("oil", 0), "colour": colour}
    found = {name: [] for name in running}
    while running:
        for name, events in [*running.items()]:
            if (event := next(events, None)) is None:
                del running[name]
            found[name].append(event)
        if "leaves" in running:
            running.pop("leaves").close()
    together = writer.pieces - before
    found = {name: [*filter(None, events)] for name, events in found.items()}
    assert [last(found["click"]), last(found["sample"])] == wanted
    assert [h for e in (*first, *found["colour"]) for h in e.get("heat", ())] == heat
    assert fresh._cached("oil").said == {} and writer._waiting == [] and not any(writer._slots)
    before = writer.pieces
    other = engine_lib.Engine(engine.sides, max_tokens=64)
    for events in (other.explain(TEXT, 5), other.explain(TEXT, 2, sample=3), other.heat(TEXT)):
        list(events)
    assert together < writer.pieces - before  # in turns they need less than one after another


def test_few_texts_are_remembered(engine, monkeypatch):
    monkeypatch.setattr(engine_lib, "KEPT", 2)
    fresh = engine_lib.Engine(engine.sides)
    for text in ("a", "b", "a", "c"):
        list(fresh.heat(text))
    assert list(fresh._texts) == ["a", "c"]
