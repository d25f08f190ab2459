"""A writer gives the answers of a rollout, whatever else it writes. Urgent answers come first."""

import dataclasses
import types

import jax
import numpy as np
import pytest

from nla_jax import steps
from nla_jax.errors import UserError
from nla_jax.evaluate import writer as writer_lib
from nla_jax.evaluate.writer import Writer
from tests.helpers import tiny

T = 24
LM = tiny.lm(tied=False, n_blocks=2)


@pytest.fixture(scope="module")
def runner():
    spec = dataclasses.replace(tiny.talker(), lm=LM, layer=1)
    av = {"params": tiny.talker_params(LM, 3)}
    return types.SimpleNamespace(spec=spec, base=tiny.params(LM), av=av, tok=tiny.tokenizer())


@pytest.fixture(scope="module")
def wanted(runner):
    """A function: the ids of answer i to `tiny.activations(9)`, by `steps.rollout`."""
    @jax.jit
    def roll(h_BD, rows_B, temperature):
        return steps.rollout(runner.av, runner.base, runner.spec, h_BD, rows_B, jax.random.key(5), group=1,
                             max_new=T, temperature=temperature)[0]

    found = {t: roll(tiny.activations(9), np.arange(9, dtype=np.int32), t) for t in (0.0, 1.0)}

    def ids(i, temperature=1.0):
        out = found[temperature]
        return np.asarray(out.ids_BT[i, : out.length_B[i]]).tolist()

    return ids


@pytest.fixture
def made(runner):
    return Writer(runner, jax.random.key(5), n_slots=4, max_new=T)


@pytest.fixture
def endless(runner):
    """A writer whose answers end at the cap, after an opening tag of three tokens."""
    av = dataclasses.replace(runner.spec.av, open=(3, 4, 6), close=(299, 298), eos=())
    spec = dataclasses.replace(runner.spec, av=av)
    return Writer(types.SimpleNamespace(**{**vars(runner), "spec": spec}), jax.random.key(5), n_slots=4,
                  max_new=T)


def submit(made, i, **options):
    return made.submit(tiny.activations(9)[i], i, **{"temperature": 1.0, **options})


def run(*following):
    """Run followers in turns, as the job queue does."""
    following = list(following)
    while following:
        following = [f for f in following if next(f, StopIteration) is not StopIteration]


def test_answers_are_those_of_a_rollout(made, wanted):
    """Nine in four slots, followed by three; one is greedy, one has a lower cap, one is urgent."""
    answers = [submit(made, i, temperature=float(i != 2), most=5 if i == 4 else None, urgent=i == 7)
               for i in range(9)]
    followers = [made.follow(answers[k::3]) for k in range(3)]
    run(*followers)
    for i, answer in enumerate(answers):
        want = wanted(i, float(i != 2))
        assert answer.done and answer.ids.tolist() == (want[:5] if i == 4 else want), i
    assert made._waiting == [] and made._slots == [None] * 4
    one = submit(made, 1)
    run(made.follow([one]))  # alone, after others were in its slot
    assert one.ids.tolist() == wanted(1)


def test_followers_share_the_pieces(made):
    alone = submit(made, 0)
    run(made.follow([alone]))
    before = made.pieces
    run(*(made.follow([submit(made, i)]) for i in (0, 0, 0)))
    assert made.pieces - before == before


def test_an_urgent_answer_takes_the_slot_of_another(endless):
    alone = [submit(endless, i) for i in (8, 0, 1, 2, 3, 4)]
    for answer in alone:
        run(endless.follow([answer]))
    slow = [submit(endless, i, rank=i) for i in range(5)]
    background = endless.follow(slow)
    next(background)
    assert [a.slot is None for a in slow] == [False] * 4 + [True]
    urgent = submit(endless, 8, urgent=True)
    click = endless.follow([urgent])
    next(click)
    assert urgent.slot is not None and sum(a.slot is None for a in slow) == 2
    run(click)
    assert urgent.done
    run(background)
    assert [a.ids.tolist() for a in (urgent, *slow)] == [a.ids.tolist() for a in alone]
    assert len({tuple(a.ids.tolist()) for a in alone}) == 6


def test_background_rows_do_not_delay_the_first_word(endless):
    """Answers that are not urgent wait for it. What was sampled with the prompt is shown at once; tokens are
    looked at one by one from where a word may be."""
    others, urgent = [submit(endless, i) for i in range(2)], submit(endless, 8, urgent=True)
    seen, entered = [], []
    for _ in endless.follow([*others, urgent]):
        seen.append(len(urgent.ids))
        entered.append(sum(a.slot is not None for a in others))
    assert 1 <= seen[0] <= 3 and seen[1:5] == [4, 5, 6, 10] and entered[:5] == [0, 0, 0, 0, 2]


def test_answers_without_a_follower_are_dropped(endless):
    alone = [submit(endless, i) for i in range(2)]
    run(endless.follow(alone))
    some = [submit(endless, i) for i in range(5)]
    first, second = endless.follow(some), endless.follow(some[:1])
    next(first), next(second)
    assert [a.slot is None for a in some] == [False] * 4 + [True]
    first.close()
    assert [a.dropped for a in some] == [False] + [True] * 4
    assert endless._waiting == [] and sum(map(bool, endless._slots)) == 1
    again = submit(endless, 1)
    run(second, endless.follow([again]))
    assert [a.ids.tolist() for a in (some[0], again)] == [a.ids.tolist() for a in alone]


def test_a_step_that_fails_is_begun_again(endless, monkeypatch):
    alone = [submit(endless, i) for i in (2, 3)]
    run(endless.follow(alone))
    answers = [submit(endless, i) for i in range(4)]
    follower, other = endless.follow(answers[:2]), endless.follow(answers[2:])
    next(follower), next(other)

    def fail(*args, **kw):
        raise RuntimeError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(writer_lib, "_advance", fail)
        with pytest.raises(RuntimeError, match="no memory"):
            list(follower)
    assert [a.ids.size for a in answers] == [0] * 4
    run(other)
    assert [a.ids.tolist() for a in answers[2:]] == [a.ids.tolist() for a in alone]
    assert [a.dropped for a in answers] == [True, True, False, False]


def test_what_cannot_be(made, runner):
    with pytest.raises(UserError, match="temperature -1: must be 0"):
        submit(made, 0, temperature=-1)
    with pytest.raises(UserError, match="max_new"):
        Writer(runner, jax.random.key(5), n_slots=3, max_new=10**6)
