"""Another language model as the paraphraser of `nla evaluate`."""

import pytest

from nla_jax import cli
from nla_jax.data import store
from nla_jax.errors import UserError
from nla_jax.evaluate.words import paraphrase
from nla_jax.interchange import find_bundle
from nla_jax.pipeline import grounding, held_out_rows
from nla_jax.providers import scheduler
from tests.helpers.http_models import KEY
from tests.helpers.llm_server import Server


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("NLA_TEST_KEY", KEY)


def test_a_model_behind_http_paraphrases(tmp_path):
    asked = []
    texts = ["A rabbit in a garden.\nIt ends.", "A ship.", "A hotel, closed."]
    how = dict(
        texts=3, ask_for=asked.append, key_env="NLA_TEST_KEY", settings=scheduler.Settings(backoff=0.001)
    )
    kinds = {texts[1]: "refused", texts[2]: "500"}
    with Server(lambda text, n: kinds.get(text, "no opening tag")) as server:
        say = paraphrase.make_paraphraser(f"openai:tiny@{server.url}", tmp_path / "j", **how)
        assert len(asked) == 1 and "3 prompts go to" in asked[0] and len(server.bodies) == 1
        assert say(texts) == ["I will not speak of A.", None, None]
        before = len(server.bodies)
        assert say(texts[:2]) == ["I will not speak of A.", None] and len(server.bodies) == before
        server.plan = lambda text, n: "401"
        assert say(["Something new."]) == [None]
        with pytest.raises(UserError, match="HTTP 401"):
            paraphrase.make_paraphraser(f"openai:tiny@{server.url}", tmp_path / "j", **how)
        server.plan = lambda text, n: "400"
        with pytest.raises(UserError, match="does not answer as a paraphraser: HTTP 400"):
            paraphrase.make_paraphraser(f"openai:tiny@{server.url}", tmp_path / "j", **how)
    with pytest.raises(UserError, match="no paraphraser 'gpt': write openai:MODEL@http"):
        paraphrase.make_paraphraser("gpt", tmp_path / "j", **how)


def test_the_paraphraser_is_named_on_the_command_line(tmp_path, monkeypatch, capsys):
    said = []

    def evaluate_bundle(directory, *, paraphraser, probes, **how):
        said.append(paraphraser and paraphraser(["A ship."]))
        return {}

    monkeypatch.setattr(grounding, "evaluate_bundle", evaluate_bundle)
    monkeypatch.setattr(find_bundle, "find", lambda where, **options: where)
    monkeypatch.setattr(held_out_rows, "store_of", lambda *place: tmp_path / "data")
    monkeypatch.setattr(store, "read_meta", lambda path: {"splits": {"heldout": {"rows": 12}}})
    with Server(lambda text, n: "no opening tag") as server:
        spec = f"openai:tiny@{server.url}"
        command = ["evaluate", "--bundle", str(tmp_path / "bundle"), "--paraphraser", spec]
        command += ["--key-env", "NLA_TEST_KEY"]
        assert cli.main(command) == 2 and not server.bodies
        assert "12 prompts go to" in capsys.readouterr().err
        assert cli.main([*command, "--probes", "form", "--yes"]) == 2 and not server.bodies
        assert cli.main([*command, "--yes"]) == 0 and cli.main(command[:3]) == 0
    assert said == [["I will not speak of A."], None]
    assert KEY not in (tmp_path / "paraphrases.journal").read_text("utf-8")
