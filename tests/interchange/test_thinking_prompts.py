"""`enable_thinking` of AV's chat template: read from a sidecar, rendered, and written again."""

import dataclasses

import pytest

from nla_jax import bundle
from nla_jax.errors import UserError
from nla_jax.interchange import model_sidecar
from nla_jax.interchange.export_pair import export_pair
from nla_jax.interchange.import_pair import import_pair
from nla_jax.lm import tokenizer as tok_lib
from tests.helpers import released, tiny

# As Qwen3's: without thinking the prompt has an empty draft.
SWITCH = ("{% if add_generation_prompt and enable_thinking is defined and enable_thinking is false %}"
          "concept{% endif %}")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A released pair whose chat template has a switch."""
    root = released.write(tmp_path_factory.mktemp("thinking"), "qwen2")
    for role in ("target", "av", "ar"):
        tok = tok_lib.load(root / role)
        tok.chat_template = tiny.CHAT_TEMPLATE + SWITCH
        tok.save_pretrained(root / role)
    return root


def say(root, **more):
    """Write AV's sidecar with further keys."""
    said = released.read_sidecar(root / "av")
    said.pop("chat_template_kwargs", None)
    released.write_sidecar(root / "av", said | more)


def ending(out) -> str:
    """The end of the prompt that AV of a bundle gets."""
    opened = bundle.load(out)
    return opened.tok.decode(opened.spec.av.after)[-20:]


def test_a_sidecar_without_thinking_is_rendered_and_written_again(root, tmp_path):
    say(root)
    plain = import_pair(root / "av", root / "ar", tmp_path / "plain")
    say(root, chat_template_kwargs={"enable_thinking": False})
    off = import_pair(root / "av", root / "ar", tmp_path / "off")
    assert ending(plain).endswith("assistant\n") and ending(off).endswith("assistant\nconcept")
    for out, recorded in ((plain, None), (off, {"enable_thinking": False})):
        export_pair(out, tmp_path / f"{out.name}_out")
        for role in ("av", "ar"):
            said = released.read_sidecar(tmp_path / f"{out.name}_out" / role)
            assert said.get("chat_template_kwargs") == recorded
    again = import_pair(tmp_path / "off_out" / "av", tmp_path / "off_out" / "ar", tmp_path / "again")
    assert ending(again) == ending(off)


def test_a_sidecar_with_thinking_is_refused(root, tmp_path):
    say(root, chat_template_kwargs={"enable_thinking": True})
    with pytest.raises(UserError, match="AV's prompt has thinking on"):
        import_pair(root / "av", root / "ar", tmp_path / "out")
    say(root, chat_template_kwargs={"enable_thinking": "no"})
    with pytest.raises(UserError, match="chat_template_kwargs: enable_thinking"):
        import_pair(root / "av", root / "ar", tmp_path / "out")


def test_the_mapping_of_a_sidecar(root):
    say(root)
    found = model_sidecar.load(root / "av")
    assert found.enable_thinking is None and "chat_template_kwargs" not in model_sidecar.to_mapping(found)
    off = dataclasses.replace(found, enable_thinking=False)
    mapping = model_sidecar.to_mapping(off)
    assert model_sidecar.parse("x", mapping).enable_thinking is False
    assert "chat_template_kwargs" not in model_sidecar.parse("x", mapping).more
