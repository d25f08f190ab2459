"""`nla push`: what goes to the Hub and what does not, what comes back from it, and what goes wrong."""

import hashlib
import json
import re
import shutil

import huggingface_hub
import numpy as np
import pytest

import nla_jax
from nla_jax import bundle
from nla_jax.errors import UserError
from nla_jax.interchange import card_metadata, hub_files, hub_push, model_card, pack
from tests.helpers import push_hub, world

SECRET = "hf_" + "a" * 34


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """An empty hub on loopback, and a token for it."""
    with push_hub.serve() as (state, address):
        known = huggingface_hub.constants
        monkeypatch.setattr(known, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(known, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(known, "ENDPOINT", address)
        monkeypatch.setattr(known, "HUGGINGFACE_CO_URL_TEMPLATE",
                            address + "/{repo_id}/resolve/{revision}/{filename}")
        for name in ("HF_HUB_CACHE", "HF_XET_CACHE"):
            monkeypatch.setattr(known, name, str(tmp_path / "cache"))
        monkeypatch.setattr(known, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setenv("HF_TOKEN", push_hub.WRITER)
        yield state


@pytest.fixture(scope="module")
def packed(finished, tmp_path_factory):
    return pack.pack(finished / "run" / "bundle", tmp_path_factory.mktemp("push") / "packed")


@pytest.fixture(scope="module")
def pair(finished, quick, tmp_path_factory):
    out = tmp_path_factory.mktemp("push") / "official"
    assert world.nla("export", "--bundle", finished / "run" / "bundle", "--out", out) == 0
    return out


@pytest.fixture
def copy(packed, tmp_path):
    """A packed bundle that a test may change."""
    return shutil.copytree(packed, tmp_path / "mine")


def digests(directory) -> dict[str, str]:
    return {p.relative_to(directory).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
            for p in directory.rglob("*") if p.is_file()}


def same_trees(a, b):
    import jax

    jax.tree.map(np.testing.assert_array_equal, (a.av, a.ar), (b.av, b.ar))


# --- there and back -------------------------------------------------------------------------------


def test_a_packed_bundle_comes_back(hub, packed, quick, tmp_path, capsys):
    assert world.nla("push", packed, "ada/tiny", "--license", "mit") == 0
    said = capsys.readouterr()
    assert re.search(r"pushed: https://\S+/ada/tiny/commit/\w+", said.out)
    assert "others cannot find the target" in said.err and push_hub.WRITER not in said.out + said.err
    assert hub.repos["ada/tiny"]["private"]
    files = hub.files("ada/tiny")
    assert files.keys() - {".gitattributes"} == digests(packed).keys()
    assert files["adapters.safetensors"] == (packed / "adapters.safetensors").read_bytes()
    back = huggingface_hub.snapshot_download("ada/tiny", local_dir=tmp_path / "back")
    same_trees(nla_jax.load(back), nla_jax.load(packed))
    card = huggingface_hub.ModelCard(files["README.md"].decode())
    assert card.data.license == "mit" and card.data.library_name == "nla_jax"
    figures = {r.metric_type: r.metric_value for r in card.data.eval_results if r.dataset_split == "heldout"}
    run = bundle.read_sidecar(packed)["run"]["rl"]["heldout"]
    assert figures["fve"] == round(next(f["value"] for f in run if f["name"] == "fve"), 4)
    assert "hf download ada/tiny" in card.text and "nla_jax.load(" in card.text
    before, commits = hub.uploads(), len(hub.repos["ada/tiny"]["branches"]["main"])
    assert world.nla("push", packed, "ada/tiny", "--license", "mit") == 0  # nothing is new
    assert hub.uploads() == before and len(hub.repos["ada/tiny"]["branches"]["main"]) == commits


def test_a_whole_bundle_has_its_figures(hub, finished, quick, tmp_path):
    """An Orbax bundle goes as it is; the summary of its run goes with it."""
    run = finished / "run"
    asked = ("--license", "mit", "--base-model", "ada/target", "--revision", "v1", "--public")
    assert world.nla("push", run, "ada/whole", *asked) == 0
    assert not hub.repos["ada/whole"]["private"] and hub.files("ada/whole").keys() == {".gitattributes"}
    back = huggingface_hub.snapshot_download("ada/whole", revision="v1", local_dir=tmp_path / "back")
    meta = bundle.read_sidecar(back)
    assert meta["base_checkpoint"] == "ada/target" and meta["run"]["rl"]["heldout"]
    assert huggingface_hub.ModelCard.load(f"{back}/README.md").data.base_model == "ada/target"
    same_trees(nla_jax.load(back, str(finished / "target")), nla_jax.load(run / "bundle"))


def test_a_pair_is_imported_from_the_hub(hub, pair, finished, quick, tmp_path, capsys):
    assert world.nla("push", pair, "ada/tiny-L0", "--license", "mit") == 0
    assert hub.repos.keys() == {"ada/tiny-L0-av", "ada/tiny-L0-ar"}
    text = hub.files("ada/tiny-L0-ar")["README.md"].decode()
    assert "nla import  --av ada/tiny-L0-av --ar ada/tiny-L0-ar" in text
    assert "| FVE of greedy explanations | AR |" in text and "reconstructor (AR)" in text
    there, here = tmp_path / "there", tmp_path / "here"
    assert world.nla("import", "--av", "ada/tiny-L0-av", "--ar", "ada/tiny-L0-ar", "--out", there) == 0
    assert world.nla("import", "--av", pair / "av", "--ar", pair / "ar", "--out", here) == 0
    same_trees(nla_jax.load(there), nla_jax.load(here))
    argv = ("push", pair / "av", "ada/one", "--license", "mit", "--base-model", "ada/target")
    assert world.nla(*argv) == 0
    assert hub.files("ada/one").keys() == hub.files("ada/tiny-L0-av").keys()
    assert b"base_checkpoint: ada/target" in hub.files("ada/one")["nla_meta.yaml"]


def test_a_stopped_push_goes_on(hub, pair, monkeypatch):
    """What has arrived is not sent again, and nobody sees a half."""
    (upload,) = hub_files.plan(pair / "ar", "ada/half", licence="mit")
    monkeypatch.setattr(hub_push, "LARGE", 0)
    told = []

    def stop(words):
        told.append(words)
        if sum("safetensors" in w for w in told) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hub_push.push(upload, message="m", tell=stop)
    assert hub.uploads() == 1 and hub.files("ada/half").keys() == {".gitattributes"}
    hub_push.push(upload, message="m")
    assert hub.uploads() == 2  # the second large file
    assert hub.files("ada/half").keys() == {".gitattributes", *upload.files}


# --- what goes, and what does not -----------------------------------------------------------------


def test_a_dry_run_sends_nothing(packed, copy, hub, monkeypatch, capsys):
    monkeypatch.delenv("HF_TOKEN")
    (copy / "notes.txt").write_text("my thoughts")
    (copy / ".env").write_text(f"HF_TOKEN={SECRET}")
    (copy / "adapters.safetensors.part").write_bytes(b"x")
    assert world.nla("push", copy, "ada/tiny", "--license", "mit", "--dry-run") == 0
    said = capsys.readouterr().out
    size = (packed / "adapters.safetensors").stat().st_size
    assert re.search(rf"{size:,}  adapters\.safetensors", said)
    assert "notes.txt: it is no file of a bundle or model" in said and ".env: it may hold a secret" in said
    assert "adapters.safetensors.part: it is unfinished" in said and SECRET not in said
    assert "a new repository would be private" in said and "license: mit" in said
    assert hub.asked == []
    assert world.nla("push", copy, "ada/tiny", "--license", "mit", "--dry-run", "--json") == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["files"].keys() == digests(packed).keys() and found["left_out"].keys() == {
        "notes.txt", ".env", "adapters.safetensors.part"}


@pytest.mark.parametrize("secret, what", [
    (SECRET, "a Hugging Face token"), ("sk-" + "ab1" * 10, "an API key"),
    ("ghp_" + "x" * 36, "a GitHub token"),
    ("-----BEGIN OPENSSH PRIVATE KEY-----", "a private key"), ("https://ada:hunter2@host/x", "a password"),
])
def test_a_secret_stops_it(copy, secret, what):
    (copy / "README.md").write_text(f"---\nlicense: mit\n---\n\nline\n{secret}\n", "utf-8")
    with pytest.raises(UserError, match=f"line .*: this looks like {what}") as e:
        hub_files.plan(copy, "ada/tiny")
    assert secret not in str(e.value)


def test_the_token_of_the_environment_is_a_secret(copy, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "an-odd-token")
    (copy / "README.md").write_text("---\nlicense: mit\n---\n\nan-odd-token", "utf-8")
    with pytest.raises(UserError, match="your Hugging Face token"):
        hub_files.plan(copy, "ada/tiny")


def test_licences(copy):
    with pytest.raises(UserError, match="give --license ID"):
        hub_files.plan(copy, "ada/tiny")
    with pytest.raises(UserError, match="not an identifier of the Hub"):
        hub_files.plan(copy, "ada/tiny", licence="Apache 2")
    (found,) = hub_files.plan(copy, "ada/tiny", licence="cc-by-4.0")
    assert card_metadata.split_card(found.card)[0]["license"] == "cc-by-4.0"
    (copy / "README.md").write_text("---\nlicense: mit\ntags: [mine]\n---\n\n# Mine\n", "utf-8")
    (found,) = hub_files.plan(copy, "ada/tiny", base="Qwen/Qwen3-4B")
    fields, body = card_metadata.split_card(found.card)
    assert body == "# Mine\n" and fields["tags"] == ["mine"]
    assert (fields["license"], fields["base_model"]) == ("mit", "Qwen/Qwen3-4B")
    with pytest.raises(UserError, match="says mit; change one of them"):
        hub_files.plan(copy, "ada/tiny", licence="gemma")
    (copy / "README.md").write_text("---\nlicense: other\n---\n\n# Mine\n", "utf-8")
    with pytest.raises(UserError, match="license_name and license_link"):
        hub_files.plan(copy, "ada/tiny")
    (copy / "README.md").write_text("---\nlicense: [\n---\n\n# Mine\n", "utf-8")
    with pytest.raises(UserError, match="not YAML"):
        hub_files.plan(copy, "ada/tiny")


@pytest.mark.parametrize("uri, base, licence", [
    ("Qwen/Qwen2.5-7B-Instruct", "Qwen/Qwen2.5-7B-Instruct", "apache-2.0"),
    ("meta-llama/Llama-3.3-70B-Instruct", "meta-llama/Llama-3.3-70B-Instruct", "llama3.3"),
    ("google/gemma-3-12b-it", "google/gemma-3-12b-it", "gemma"), ("/data/models/mine", "", ""),
    ("somebody/model", "somebody/model", ""),
    (model_card.DEFAULT_TARGET, "HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0"),
])
def test_the_target_gives_base_model_and_licence(uri, base, licence):
    assert (card_metadata.base_model(uri), card_metadata.licence_of(uri)) == (base, licence)


def test_what_is_not_whole_is_refused(copy, pair, tmp_path, monkeypatch):
    for repo in ("tiny", "a/b/c", "", "../x/y"):
        with pytest.raises(UserError, match="no repository of the Hub"):
            hub_files.plan(copy, repo)
    with pytest.raises(UserError, match="no bundle and no exported pair"):
        hub_files.plan(tmp_path, "ada/tiny")
    with (copy / "adapters.safetensors").open("ab") as f:
        f.write(b"x")
    with pytest.raises(UserError, match="instead of"):
        hub_files.plan(copy, "ada/tiny", licence="mit")
    half = shutil.copytree(pair, tmp_path / "half")
    (half / "ar" / "value_head.safetensors").unlink()
    with pytest.raises(UserError, match="value_head.safetensors is missing"):
        hub_files.plan(half, "ada/tiny", licence="mit")
    monkeypatch.setattr(hub_files, "LARGEST", 1000)
    with pytest.raises(UserError, match="the Hub takes files of at most"):
        hub_files.plan(pair, "ada/tiny", licence="mit")


# --- what goes wrong ------------------------------------------------------------------------------


def test_errors_are_one_line_each(hub, packed, monkeypatch, capsys):
    def said(*argv) -> str:
        assert world.nla("push", packed, *argv, "--license", "mit") == 2
        (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("nla: ")]
        return line

    assert "was not found, or your token may not see it" in said("nobody/tiny")
    monkeypatch.setenv("HF_TOKEN", push_hub.READER)
    assert "your token may not write to ada/tiny" in said("ada/tiny")
    monkeypatch.setenv("HF_TOKEN", SECRET)
    line = said("ada/tiny")
    assert "does not accept your token" in line and SECRET not in line
    monkeypatch.delenv("HF_TOKEN")
    assert "there is no Hugging Face token: log in with `hf auth login`" in said("ada/tiny")
    monkeypatch.setenv("HF_TOKEN", push_hub.WRITER)
    hub.fail["/commit/"] = (413, "Payload Too Large")
    assert "larger than the Hub takes" in said("ada/tiny")
    hub.fail = {"/commit/": (403, "You have exceeded your storage quota")}
    assert "your storage on the Hub is full" in said("ada/tiny")
    hub.fail = {"/commit/": (500, "oops")}
    assert "failed with status 500: run the same command again" in said("ada/tiny")
    hub.fail = {"/validate-yaml": (400, "license is wrong")}
    assert "cannot be uploaded" in said("ada/tiny")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in said("ada/tiny")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "the Hub cannot be reached" in said("ada/tiny")


# --- the card -------------------------------------------------------------------------------------


def test_the_card_of_the_shipped_bundle(capsys):
    """Its figures by both readers, sampled and greedy, in and out of domain; what is missing is said."""
    meta = bundle.read_sidecar(bundle.SHIPPED)
    (found,) = hub_files.plan(bundle.SHIPPED, "ada/shipped")
    fields, body = card_metadata.split_card(found.card)
    assert fields["license"] == "apache-2.0" and fields["base_model"].startswith("HuggingFaceTB/SmolLM2")
    known = {f["name"]: f for f in meta["run"]["rl"]["ood"]}
    begins = "| FVE of greedy explanations | the frozen target |"
    (row,) = [x for x in body.splitlines() if x.startswith(begins)]
    f = known["fve_greedy_frozen_target"]
    assert f"{f['value']:.3f} [{f['low']:.3f}, {f['high']:.3f}]" in row
    assert "FVE of sampled explanations (temperature 1)" in body
    for words in ("block 20", "NVIDIA H200", "`news`", "nla train --config", "What it cannot do", "Licence"):
        assert words in body
    if not any(f["name"] == "claim_precision" for f in meta["run"].get("evaluation", {}).get("heldout", [])):
        assert "Not measured: share of claims that are true of the text, by rules" in body
    huggingface_hub.ModelCard(found.card)


def test_the_card_says_how_many_claims_are_true(finished, tmp_path):
    run = shutil.copytree(finished / "run", tmp_path / "run")
    figure = {"name": "claim_precision", "value": 0.25, "low": 0.2, "high": 0.3, "n": 6, "asks": "claims"}
    evaluation = {"heldout": {"verdict": [], "left_out": [], "figures": [figure]}}
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    packed = pack.pack(run / "bundle", tmp_path / "packed")
    fields, body = card_metadata.split_card((packed / "README.md").read_text("utf-8"))
    assert "| share of claims that are true of the text | rules | 0.250 [0.200, 0.300] |" in body
    assert "Of its claims 25% are true of the text" in body
    metrics = fields["model-index"][0]["results"][0]["metrics"]
    assert {m["type"]: m["value"] for m in metrics}["claim_precision"] == 0.25
    again = pack.pack(packed, tmp_path / "again")  # the figures stay
    assert (again / "README.md").read_text("utf-8") == (packed / "README.md").read_text("utf-8")
    (run / "evaluation.json").write_text("[]")
    with pytest.raises(UserError, match="not what `nla evaluate --json` writes"):
        pack.pack(run / "bundle", tmp_path / "other")


def test_a_card_without_figures_says_so(pair, tmp_path):
    one = shutil.copytree(pair / "av", tmp_path / "av")
    (one / "README.md").unlink()
    (found,) = hub_files.plan(one, "ada/one-av", licence="mit")
    fields, body = card_metadata.split_card(found.card)
    assert "model-index" not in fields and "The bundle came without figures" in body
    assert "--av ada/one-av --ar ada/one-ar" in body
