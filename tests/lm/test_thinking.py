"""A model's draft is no part of its answer: marks in answers, switches and open drafts in chat templates."""

import dataclasses

import pytest

from nla_jax import prompts
from nla_jax.lm import chat, chat_prompts, thinking
from nla_jax.lm import tokenizer as tok_lib
from tests.helpers import tiny
from tests.helpers.vocabularies import CHATML, QWEN3_CHAT

DRAFT = "so <explanation>\na draft\nof it\n</explanation> maybe"
MARKED = [  # as models and servers give a draft, each with its closing mark
    f"<think>\n{DRAFT}\n</think>\n\n",
    f"{DRAFT}\n</think>\n\n",  # the template opened it
    f"<think>one</think><THINK>{DRAFT}</THINK>",
    f"[THINK]{DRAFT}[/THINK]",
    f"<thought>{DRAFT}</thought>",
    f"<seed:think>{DRAFT}</seed:think>",
    f"<|START_THINKING|>{DRAFT}<|END_THINKING|>",
    f"◁think▷{DRAFT}◁/think▷",
    f"<|channel>thought\n{DRAFT}<channel|>",
    f"<|channel|>analysis<|message|>{DRAFT}<|end|><|start|>assistant<|channel|>final<|message|>",
    f"<|channel|>analysis<|message|>{DRAFT}<|end|><|channel|>commentary<|message|>x<|call|>"
    "<|start|>assistant<|channel|>final <|constrain|>text<|message|>",
    f"analysisWe write {DRAFT}.assistantfinal",  # harmony without its special tokens
]


@pytest.mark.parametrize("draft", MARKED)
def test_the_answer_is_what_follows_the_draft(draft):
    answer, unfinished = thinking.split(f"{draft}the answer")
    assert (answer.strip(), unfinished) == ("the answer", False)


@pytest.mark.parametrize("draft", [
    f"<think>{DRAFT}", f"[THINK]{DRAFT}", f"<|channel|>analysis<|message|>{DRAFT}", f"analysisWe {DRAFT}",
    f"<think>one</think><think>{DRAFT}",
])
def test_an_unfinished_draft_is_no_answer(draft):
    assert thinking.split(draft) == ("", True)


@pytest.mark.parametrize(
    "answer", ["", "the answer", "analysis of the text", "analysis: it", "a < b and [THINKING]"])
def test_an_answer_without_marks_stays(answer):
    assert thinking.split(answer) == (answer, False) and not thinking.has_marks(answer)


def prompt_of(template: str) -> str:
    tok = tiny.tokenizer()
    tok.chat_template = template
    chat_prompts.stop_thinking(tok)
    once = tok.chat_template
    chat_prompts.stop_thinking(tok)
    assert tok.chat_template == once
    return tok.decode(chat_prompts.chat_ids(tok, "hi"))


OPENING = "{{ '<|im_start|>assistant\n' }}"
TURN = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
# A model that thinks unless it is told not to, by the second name that templates have for it.
ALWAYS_ON = CHATML.replace(
    OPENING, "{%- set on = thinking if thinking is defined else true %}{{ '<|im_start|>assistant\n' }}"
    "{% if on %}{{ '<think>\n' }}{% else %}{{ '</think>' }}{% endif %}")


@pytest.mark.parametrize("template, opening", [
    (QWEN3_CHAT, "<think>\n\n</think>\n\n"),
    (ALWAYS_ON, "</think>"),
    (CHATML.replace(OPENING, "{{ '<|im_start|>assistant\n<think>\n' }}") + "\n", "<think>\n\n</think>\n\n"),
    (CHATML.replace(OPENING, "{{ '<|im_start|>assistant\n[THINK]' }}"), "[THINK][/THINK]"),
    (CHATML, ""),
    (CHATML.replace("m.content", "(m.thinking or '') + m.content"), ""),
])
def test_the_assistants_turn_begins_with_the_answer(template, opening):
    assert prompt_of(template) == TURN + opening


@pytest.mark.parametrize(
    "template", [CHATML, "{{ messages[0].thinking }} is enable_thinking", "", None, "{% if %}"])
def test_templates_without_thinking_stay_as_they_are(template):
    tok = tiny.tokenizer()
    tok.chat_template = template
    chat_prompts.stop_thinking(tok)
    assert tok.chat_template == template


def test_avs_prompt_is_saved_with_thinking_off(tmp_path):
    """A bundle's tokenizer renders AV's prompt to the same ids, in our code and in transformers."""
    tok = tiny.tokenizer()
    tok.chat_template = QWEN3_CHAT
    template = tiny.AV_TEMPLATE.replace("{marker}", tiny.MARKER)
    turns = [{"role": "user", "content": template}]
    how = dict(add_generation_prompt=True, return_dict=False)
    want = tok.apply_chat_template(turns, enable_thinking=False, **how)
    assert want != tok.apply_chat_template(turns, **how)
    chat_prompts.stop_thinking(tok)
    tok_lib.save(tok, tmp_path)
    again = tok_lib.load(tmp_path)
    av = prompts.av_prompt(again, tiny.AV_TEMPLATE, tiny.MARKER)
    assert [*av.before, av.marker, *av.after] == want == again.apply_chat_template(turns, **how)
    assert dataclasses.asdict(av) == dataclasses.asdict(prompts.av_prompt(tok, tiny.AV_TEMPLATE, tiny.MARKER))


def test_marks_that_are_special_tokens_stay_in_an_answer():
    tok = tiny.tokenizer()
    assert not chat_prompts.thinks(tok)
    tok.add_special_tokens({"additional_special_tokens": ["[THINK]", "[/THINK]"]})
    assert chat_prompts.thinks(tok)
    ids = tok_lib.plain_ids(tok, "[THINK]of the text[/THINK]the summary<|im_start|>")
    said = chat._decode(tok, ids)
    assert said.startswith("[THINK]of the text[/THINK]") and thinking.split(said)[0].startswith("the summary")
    assert chat._decode(tok, tok_lib.plain_ids(tok, "the summary<|im_start|>")) == "the summary"
