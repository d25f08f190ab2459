"""A language model as judge of claims: its prompt, its answers, the journal, and agreement with the rules."""

import collections
from types import SimpleNamespace

import numpy as np
import pytest

from nla_jax import cli
from nla_jax.data import store
from nla_jax.errors import UserError
from nla_jax.evaluate.probe_types import Evidence
from nla_jax.evaluate.probes import claim_agreement, claims
from nla_jax.evaluate.words import claim_judge as J
from nla_jax.evaluate.words import claims as C
from nla_jax.interchange import find_bundle
from nla_jax.pipeline import grounding, held_out_rows
from nla_jax.providers import questions, scheduler
from tests.helpers import llm_server
from tests.helpers.http_models import KEY

SAID = "A storm hit Old Bob.\n… the old mill"
TEXT = "The weather was bad for Old Bob, near the old mill"


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("NLA_TEST_KEY", KEY)
    monkeypatch.setitem(llm_server.ANSWERS, "two", "1 yes\n2 no")
    monkeypatch.setitem(llm_server.ANSWERS, "essay", "Both are true, I think.")


def item(text: str, explanation: str = "storm, rain") -> J.Item:
    return J.Item(text, explanation, C.split_claims(explanation))


def test_the_prompt_has_the_text_and_every_claim():
    asked = J.prompt_of(item(TEXT, SAID))
    assert f"<text>\n{TEXT}\n</text>" in asked and f"<explanation>\n{SAID}\n</explanation>" in asked
    assert [line for line in asked.splitlines() if line[:1].isdigit()] == [
        '1. word: "storm"', '2. word: "hit"', '3. name: "Old Bob"',
        '4. ending: the word number 3 from the end of the text is "the"',
        '5. ending: the word number 2 from the end of the text is "old"',
        '6. ending: the last word of the text is "mill"']
    assert "{claims}" in J.prompt_of(item("a text of {claims}"))  # a text is no template


@pytest.mark.parametrize("answer, said", [
    ("1 yes\n2 no", [1, 0]), ("2. No\n1) YES, the text says so.\n", [1, 0]),
    ("**1**: true\n**2**: false", [1, 0]),
    ("<think>1 no</think>1 yes\n2 yes", [1, 1]), ('```json\n{"1": "yes", "2": false}\n```', [1, 0]),
    ("[true, false]", [1, 0]), ("1 yes", None), ("1 yes\n1 no\n2 no", None), ("1 yes\n2 no\n3 no", None),
    ("Here you are:\n1 yes\n2 no", None), ("1 yes\n2 perhaps", None), ("[true]", None),
    ('{"1": "yes"}', None),
    ('{"one": true, "two": true}', None), ("[1, 0]", None), ("7", None), ("", None), ("[" * 9000, None)])
def test_an_answer_judges_each_claim_once_or_is_refused(answer, said):
    found = J.read_answer(answer, 2)
    assert (found if said is None else found.tolist()) == said


def judge_of(server, journal, asked):
    return J.make_judge(f"openai:tiny@{server.url}", journal, texts=9, ask_for=asked.append,
                        key_env="NLA_TEST_KEY", settings=scheduler.Settings(backoff=0.001, price=(1.0, 2.0)))


def test_answers_that_cannot_be_read_are_asked_for_again_and_no_answer_is_paid_twice(tmp_path):
    kinds = {"good": ["two"], "late": ["essay", "two"], "bad": ["essay"], "shy": ["refused"]}
    plan = lambda text, n: kinds[text.split()[0]][min(n, len(kinds[text.split()[0]]) - 1)]
    items = [item(f"{name} weather today") for name in kinds]
    kinds["A"] = ["essay"]  # the trial need not be readable
    with llm_server.Server(plan) as server:
        asked = []
        found = judge_of(server, tmp_path / "j", asked)(None, items, "")
        assert "9 prompts go to" in asked[0] and "at most" in asked[0] and "$" in asked[0]
        assert found[0].tolist() == found[1].tolist() == [True, False]
        assert found[2:] == [questions.UNREADABLE, "refused"]
        times = collections.Counter(t.split()[0] for t in server.asked.elements())
        assert times == {"A": 1, "good": 1, "late": 2, "bad": 1 + questions.AGAIN, "shy": 1}
        kinds["bad"] = ["two"]
        again = judge_of(server, tmp_path / "j", asked)(None, items, "")
        assert [str(a) for a in again] == [str(a) for a in [*found[:2], found[0], "refused"]]
        after = collections.Counter(t.split()[0] for t in server.asked.elements())
        assert after - times == {"A": 1, "bad": 1}
        server.plan = lambda text, n: "401"
        with pytest.raises(UserError, match="HTTP 401"):
            judge_of(server, tmp_path / "j", asked)
    for spec in ("gpt", "openai:", "anthropic"):
        with pytest.raises(UserError, match=f"no judge '{spec}': write openai:MODEL@http"):
            J.make_judge(spec, tmp_path / "j", texts=1, ask_for=asked.append)


def evidence(judge, n: int = 12) -> Evidence:
    """Rows whose explanation has two words and the last word, and whose text has the first and the last."""
    columns = {"h": np.zeros((n, 2)), "doc_id": [f"d{i}" for i in range(n)],
               "text": [f"The storm of day{i} ended" for i in range(n)], "explanation": [""] * n}
    trip = SimpleNamespace(explanations=["storm and rain\n… ended"] * (n - 1) + [""])
    return Evidence(None, columns, trip, np.zeros(2), bootstrap=200, judge=judge)


def judged(ev) -> dict:
    split = [C.split_claims(z) for z in ev.trip.explanations]
    true = [C.judge_claims(c, t) for c, t in zip(split, ev.columns["text"], strict=True)]
    return {f.name: f for f in claim_agreement.judged_figures(ev, split, true)}


def test_a_judge_of_your_own_and_its_agreement(tmp_path, monkeypatch):
    """It denies the storm on even days, and says nothing on day 9."""
    (tmp_path / "my_judge.py").write_text(
        "import re\n"
        "def judge(prompt):\n"
        "    day = int(re.search(r'day(\\d+)', prompt)[1])\n"
        "    return 'hm' if day == 9 else f'1 {\"yes\" if day % 2 else \"no\"}\\n2 no\\n3 yes'\n"
        "async def wrong(prompt):\n    return 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    asked = []
    ev = evidence(J.make_judge("my_judge:judge", tmp_path / "j", texts=12, ask_for=asked.append))
    found = judged(ev)
    assert "12 prompts go to my_judge:judge" in asked[0]
    assert found["claims_judged"].value == pytest.approx(10 / 11)
    assert ev.left_out == [f"judge: 1 of 11 explanations have no judgement ({questions.UNREADABLE}: 1); "
                           "figures of the judge are of the other 10"]
    # Of 10 days 6 are even: by the rules 20 of 30 claims are true, and by the judge 14.
    assert found["claim_precision_rules"].value == pytest.approx(20 / 30)
    assert found["claim_precision_judge"].value == pytest.approx(14 / 30)
    assert found["claim_precision_judge_ending"].value == 1 and found["claims_agree_ending"].value == 1
    assert found["claims_agree"].value == pytest.approx(24 / 30) and found["claims_agree"].n == 10
    assert found["claims_agree_word"].value == pytest.approx(14 / 20)
    assert found["claims_agree_description"].value == pytest.approx(14 / 20)
    assert found["claims_kappa"].value == pytest.approx(float(claim_agreement.kappa([14, 6, 0, 10])))
    assert found["claims_kappa"].low < found["claims_kappa"].value < found["claims_kappa"].high
    assert "claims_kappa_ending" not in found  # both always say the same: it is not defined

    none = evidence(J.make_judge("my_judge:wrong", tmp_path / "k", texts=12, ask_for=asked.append))
    assert [f.value for f in judged(none).values()] == [0.0]  # claims_judged, and no other figure
    assert "11 of 11 explanations have no judgement (not asked: 11)" in none.left_out[0]
    with pytest.raises(UserError, match="has no function 'nothing'"):
        J.make_judge("my_judge:nothing", tmp_path / "j", texts=1, ask_for=asked.append)


def test_kappa_is_cohens():
    from sklearn.metrics import cohen_kappa_score

    rng = np.random.default_rng(0)
    a, b = rng.uniform(size=(2, 200)) < 0.3
    b = np.where(rng.uniform(size=200) < 0.5, a, b)
    cells = [(a & b).sum(), (~a & b).sum(), (a & ~b).sum(), (~a & ~b).sum()]
    assert claim_agreement.kappa(cells) == pytest.approx(cohen_kappa_score(a, b))
    assert np.isnan(claim_agreement.kappa([3, 0, 0, 0]))


def test_the_target_as_judge_is_counted_where_it_cannot_answer(nla, tmp_path, monkeypatch):
    monkeypatch.setattr(J, "LONGEST", 8)
    ev = evidence(J.make_judge("target", tmp_path / "j", texts=12, ask_for=None))
    ev = Evidence(nla.runner, ev.columns, ev.trip, ev.mean_D, bootstrap=50, judge=ev.judge)
    found = {f.name: f for f in claims.claims(ev)}
    assert found["claims_judged"].value == 0.0 and "claim_precision_judge" not in found
    assert found["claim_precision"].value == pytest.approx(22 / 33)  # the rules do without it
    assert "11 of 11 explanations have no judgement" in ev.left_out[0]


def test_the_judge_is_named_on_the_command_line(tmp_path, monkeypatch, capsys):
    said = []

    def evaluate_bundle(directory, *, judge, paraphraser, **how):
        said.append(judge and judge(None, [item("good weather")], "")[0].tolist())
        return {}

    monkeypatch.setattr(grounding, "evaluate_bundle", evaluate_bundle)
    monkeypatch.setattr(find_bundle, "find", lambda where, **options: where)
    monkeypatch.setattr(held_out_rows, "store_of", lambda *place: tmp_path / "data")
    monkeypatch.setattr(store, "read_meta", lambda path: {"splits": {"heldout": {"rows": 12}}})
    with llm_server.Server(lambda text, n: "two") as server:
        command = ["evaluate", "--bundle", str(tmp_path / "bundle"), "--judge", f"openai:tiny@{server.url}",
                   "--key-env", "NLA_TEST_KEY", "--price", "1,2"]
        assert cli.main(command) == 2 and not server.bodies
        err = capsys.readouterr().err
        assert "12 prompts go to" in err and "about $" in err
        assert cli.main([*command, "--probes", "form", "--yes"]) == 2 and not server.bodies
        assert "--judge is for the probe claims" in capsys.readouterr().err
        assert cli.main([*command, "--yes"]) == 0 and cli.main(command[:3]) == 0
    assert said == [[True, False], None]
    assert KEY not in (tmp_path / "judgements.journal").read_text("utf-8")
