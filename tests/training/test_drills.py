"""What training pairs with h: ending lines and written explanations, drill steps between written ones, and
batches of similar length."""

import collections
import dataclasses

import numpy as np
import pytest

import nla_jax
from nla_jax import configs, prompts
from nla_jax.data import lessons, store
from nla_jax.pipeline import context, stages, training_stages
from nla_jax.pipeline.context import RunContext
from nla_jax.training import feeds, jitted_steps, loop
from nla_jax.util import metrics_log
from tests.helpers import tiny, world

WORDS = "of the text a user and two concepts that some summary explains".split()


def columns(n: int = 40, seed: int = 0) -> dict:
    """A store of n rows: explanations of all lengths, every third row without one, one row without a text."""
    rng = np.random.default_rng(seed)
    draw = lambda low, high: " ".join(rng.choice(WORDS, rng.integers(low, high)))
    said = ["" if i % 3 == 0 else f"{draw(1, 12)}\n{draw(1, 4)}\nsoon {i}" for i in range(n)]
    texts = ["" if i == 1 else f"{draw(4, 9)} end{i}" for i in range(n)]
    return {"h": tiny.activations(n), "text": texts, "explanation": said}


@pytest.fixture(scope="module")
def tok():
    return tiny.tokenizer()


def spec_of(tok, ar_template: str):
    return dataclasses.replace(tiny.spec(), ar=prompts.ar_prompt(tok, ar_template))


def config(**data):
    c = configs.default()
    c.data.update(data)
    for stage in configs.STAGES:
        c[stage].update(batch=4, max_tokens=200)
    return c


# What the words are


@pytest.mark.parametrize(
    "which,kept", [("first", [0]), ("last", [2]), ("first+last", [0, 2]), ("all", [0, 1, 2])])
def test_a_written_explanation_ends_with_the_last_words_of_its_text(tok, which, kept):
    rows, spec = columns(), spec_of(tok, "{explanation}")
    pairing = feeds.pairs_arguments(config(explanation_lines=which), "warm_av", tok, spec, "{explanation}")
    texts = feeds.WarmStartPairs(rows, **pairing)
    assert texts.rows.tolist() == [i for i in range(40) if i % 3] and texts.dropped == 0
    for i, words in zip(texts.rows, texts.words(texts.rows), strict=True):
        description = "\n".join(rows["explanation"][i].split("\n")[k] for k in kept)
        (end,) = lessons.quote_ends(tok, [rows["text"][i]], 6)
        assert words == (f"{description}\n{end}" if i != 1 else description)
        assert i == 1 or rows["text"][i].endswith(end.removeprefix("… "))


def test_an_ending_line_that_a_writer_gave_is_replaced(tok):
    rows = {"text": ["a of the", "of a the"], "explanation": ["x\ny\n… wrong", "x\ny"]}
    for which, said in (("all", "x\ny"), ("last", "y")):
        options = feeds.pairs_arguments(config(explanation_lines=which), "warm_ar", tok,
                                spec_of(tok, "{explanation}"), "{explanation}")
        assert feeds.WarmStartPairs(rows, **options).words([0, 1]) == [
            f"{said}\n… a of the",
            f"{said}\n… of a the",
        ]


@pytest.mark.parametrize("data,template", [({}, tiny.AR_TEMPLATE), ({"ending_tokens": 0}, "{explanation}")])
def test_without_an_ending_line_explanations_are_as_they_were_written(tok, data, template):
    """Under AR prompts that go on behind the explanation, such as the official ones."""
    rows, spec = columns(), spec_of(tok, template)
    texts = feeds.WarmStartPairs(
        rows, **feeds.pairs_arguments(config(**data), "warm_av", tok, spec, template)
    )
    assert texts.words(texts.rows) == [e for e in rows["explanation"] if e]
    if not data:  # reading lessons are ending lines all the same
        texts = feeds.WarmStartPairs(
            rows, **feeds.pairs_arguments(config(), "lessons_av", tok, spec, template)
        )
        assert texts.rows.tolist() == [0, *range(2, 40)]
        assert texts.words(texts.rows) == lessons.quote_ends(tok, [t for t in rows["text"] if t], 6)


def test_a_lesson_is_the_same_whatever_the_step(tok):
    rows = columns()
    options = feeds.pairs_arguments(
        config(), "lessons_ar", tok, spec_of(tok, "{explanation}"), "{explanation}"
    )
    texts = feeds.WarmStartPairs(rows, **options)
    for step in range(30):
        picked, words = texts.at(step, "ar")
        assert words == lessons.quote_ends(tok, [rows["text"][i] for i in picked], 6)


# In which order they come


def lengths_of(texts, tok, step, role="av"):
    return [len(ids) for ids in feeds.response_rows(tok, tiny.spec().av, texts.at(step, role)[1])]


@pytest.mark.parametrize("role", ["av", "ar"])
def test_batches_are_of_similar_length_and_no_row_is_favoured(tok, role):
    """26 rows in batches of 4: after 13 blocks of 8 steps every row was drawn 16 times."""
    options = feeds.pairs_arguments(
        config(), f"warm_{role}", tok, spec_of(tok, "{explanation}"), "{explanation}"
    )
    texts = feeds.WarmStartPairs(columns(), **options)
    steps, n = 13 * feeds.BLOCK, len(texts.rows)
    assert n == 26
    drawn = [texts.at(i, role)[0] for i in range(steps)]
    count = collections.Counter(np.concatenate(drawn).tolist())
    assert sorted(count) == texts.rows.tolist() and set(count.values()) == {16}
    # Within every block as well, the rows are those of the plain order: no row comes a block late.
    for block in range(13):
        plain = np.concatenate([np.asarray(texts._order[role][block * 8 + i]) for i in range(8)])
        got = np.concatenate(drawn[block * 8 : block * 8 + 8])
        assert sorted(got.tolist()) == sorted(texts.rows[plain].tolist())
    sizes = [lengths_of(texts, tok, i, role) for i in range(steps)]
    spread = np.mean([max(s) - min(s) for s in sizes])
    mixed = np.random.default_rng(0).permutation(np.concatenate(sizes)).reshape(-1, 4)
    assert spread < 0.4 * np.mean(mixed.max(1) - mixed.min(1))
    # Short and long batches come mixed: a block does not begin with its shortest ones.
    means = np.array([np.mean(s) for s in sizes]).reshape(13, 8)
    assert len({tuple(np.argsort(m)) for m in means}) > 6


def test_the_order_is_a_function_of_the_step(tok):
    options = feeds.pairs_arguments(config(), "warm_av", tok, spec_of(tok, "{explanation}"), "{explanation}")
    forward, backward = (feeds.WarmStartPairs(columns(), **options) for _ in range(2))
    want = {(i, role): forward.at(i, role) for role in ("av", "ar") for i in range(24)}
    for i, role in sorted(want, key=lambda k: (-k[0], k[1])):  # roles in turns, from the end
        rows, words = backward.at(i, role)
        np.testing.assert_array_equal(rows, want[i, role][0])
        assert words == want[i, role][1]
    other = feeds.WarmStartPairs(columns(), **{**options, "seed": 1})
    assert any((other.at(i, "av")[0] != want[i, "av"][0]).any() for i in range(8))
    assert any((want[i, "av"][0] != want[i, "ar"][0]).any() for i in range(8))


def test_explanations_that_are_too_long_are_left_out(tok):
    options = feeds.pairs_arguments(config(), "warm_av", tok, spec_of(tok, "{explanation}"), "{explanation}")
    whole = feeds.WarmStartPairs(columns(), **options)
    sizes = [len(ids) for ids in feeds.response_rows(tok, tiny.spec().av, whole.words(whole.rows))]
    most = sorted(sizes)[12]
    some = feeds.WarmStartPairs(columns(), **{**options, "most": most})
    assert some.rows.tolist() == [r for r, n in zip(whole.rows, sizes, strict=True) if n <= most]
    assert some.dropped == 26 - len(some.rows) > 0
    assert max(max(lengths_of(some, tok, i)) for i in range(16)) <= most
    batch = feeds.av_batch(some, tok, tiny.spec(), most, 0)
    assert batch["mask_BT"].any(0).sum() == max(lengths_of(some, tok, 0)) <= batch["ids_BT"].shape[1] <= most


# Drill steps in the written stage


@pytest.fixture(scope="module")
def drilled(finished, quick, tmp_path_factory):
    """(run, batches of each AV stage): drills, then drill and written steps in turn; the target is AR."""
    stage = dict(batch=8, max_tokens=64, lr=1e-3)
    c = world.config(
        finished, ar=dict(kind="frozen"), rl=dict(steps=2, batch=4, group=4, max_new=16),
        lessons_av=dict(steps=3, form="drill", **stage), warm_av=dict(steps=6, lessons=0.5, **stage),
        ar_template="{explanation}", rl_drill=dict(steps=2, batch=4, group=4, lr_av=1e-2),
    )
    run, seen = tmp_path_factory.mktemp("drilled") / "run", collections.defaultdict(list)
    with pytest.MonkeyPatch.context() as patch:
        fit = loop.fit

        def looking(stage, state, step, batch, *args, **options):
            return fit(stage, state, step, lambda i: seen[stage].append(batch(i)) or seen[stage][-1], *args,
                       **options)

        patch.setattr(loop, "fit", looking)
        summary = stages.run(c, run)
    return c, run, dict(seen), summary


def test_drill_steps_go_on_where_the_lessons_ended(drilled, finished):
    c, run, seen, _ = drilled
    tok, columns = tiny.tokenizer(), store.load_columns(run / "data", "warm")
    r = context.open_run(c, run)
    spec, template = context.with_spec(r).spec, r.templates[1]
    warm = [stage for stage in seen if stage in configs.STAGES]
    texts = {
        s: feeds.WarmStartPairs(columns, **feeds.pairs_arguments(c, s, tok, spec, template)) for s in warm
    }
    short = dataclasses.replace(spec, av=prompts.drill_prompt(spec.av))
    drill = lambda i: feeds.av_batch(texts["lessons_av"], tok, short, 64, i)
    written = lambda i: feeds.av_batch(texts["warm_av"], tok, spec, 64, i)
    want = {"lessons_av": [drill(0), drill(1), drill(2)],
            "warm_av": [written(0), drill(3), written(1), drill(4), written(2), drill(5)]}
    assert {s: len(b) for s, b in seen.items() if s in want} == {"lessons_av": 3, "warm_av": 6}
    opened = list(spec.av.open)
    for stage, batches in want.items():
        for i, (got, batch) in enumerate(zip(seen[stage], batches, strict=True)):
            for name in batch:
                np.testing.assert_array_equal(got[name], batch[name], err_msg=f"{stage} {i} {name}")
            whole = stage == "warm_av" and i % 2 == 0
            for ids, mask in zip(got["ids_BT"], got["mask_BT"], strict=True):
                ids = ids[mask].tolist()
                assert (ids[: len(opened)] == opened) == whole and ids[-1] == spec.av.end_of_turn
                said = tok.decode(ids[:-1]).removeprefix(prompts.OPEN).removesuffix(prompts.CLOSE)
                assert said.rpartition("\n")[2].startswith(lessons.MARK) and bool("\n" in said) == whole


@pytest.mark.parametrize("share", [0.0, 0.25, 1 / 3, 0.5, 0.9])
def test_the_share_of_drill_steps(monkeypatch, share):
    """Of any number of steps, and each drill and each written batch once, in order."""
    c = world.config(world.Path("."), lessons_av=dict(steps=7), warm_av=dict(lessons=share))
    run = RunContext(c, None, None, None, None, None, {}, {}, spec=tiny.spec())
    monkeypatch.setattr(feeds, "av_batch", lambda texts, tok, spec, width, i: (texts, i))
    monkeypatch.setattr(training_stages, "texts_of", lambda r, stage: stage)
    monkeypatch.setattr(jitted_steps, "warm_step", lambda c, stage, spec, state: lambda *a: len(spec.av.open))
    batch, step = training_stages._av_feed(run, "warm_av", "warm_av", None)
    drawn = [batch(i) for i in range(200)]
    drills = [i for texts, i in drawn if texts == "lessons_av"]
    assert drills == list(range(7, 7 + len(drills))) and abs(len(drills) - 200 * share) < 1
    assert [i for texts, i in drawn if texts == "warm_av"] == list(range(200 - len(drills)))
    for i, (texts, _) in enumerate(drawn):
        assert bool(step(None, None, None, i)) == (texts == "warm_av")


def test_a_frozen_ar_is_not_trained(drilled):
    c, run, seen, summary = drilled
    assert set(seen) == {"lessons_av", "warm_av", "rl_drill", "rl"}
    assert not list((run / "params").glob("*_ar"))
    rows = metrics_log.read(run / "metrics" / "rl.jsonl")
    assert len(rows) == 2 and not any(name.startswith("ar_") for row in rows for name in row)
    assert all(np.isfinite(row["reward"]) and row["av_grad_norm"] > 0 for row in rows)
    assert {"warm_start", "rl"} <= set(summary)
    nla = nla_jax.load(run / "bundle")
    assert nla.ar == {} and nla.meta["roles"]["ar_kind"] == "frozen"
    # What it reads is what the target reads, up to the padding of either.
    text = "of the text that a user explains"
    assert tiny.relative(nla.reconstruct([text])[0], nla.capture(text)[-1]) < 1e-5


def test_rl_of_the_drill_trains_av_between_warm_start_and_rl(drilled):
    c, run, seen, _ = drilled
    r = context.open_run(c, run)
    context.with_spec(r)
    warm, drill = (tiny.flat(context.load_params(r, "av", stage)) for stage in ("warm_av", "rl_drill"))
    moved = {name for name in warm if not np.array_equal(warm[name], drill[name])}
    assert moved
    rows = metrics_log.read(run / "metrics" / "rl_drill.jsonl")
    assert len(rows) == 2 and all(np.isfinite(row["reward"]) and row["av_grad_norm"] > 0 for row in rows)
    assert all(row["length"] <= configs.section(c, "rl_drill")["max_new"] for row in rows)
    # The reference of RL is the warm start, from which RL of the drill has moved AV away.
    first = metrics_log.read(run / "metrics" / "rl.jsonl")[0]
    assert first["kl"] > 1e-6 and first["ratio_off_max"] < 1e-3
    stored = {h.tobytes() for h in store.load_columns(run / "data", "rl")["h"]}
    assert all(h.tobytes() in stored for batch in seen["rl_drill"] for h in np.asarray(batch["h_BD"]))
