"""Make a toy world in about a minute without downloads: stories from a small grammar, a tiny Llama trained on
them, and true explanations.

    python -m nla_jax.toy runs/toy/world
    nla train --config experiments/toy.py:runs/toy/world --workdir runs/toy/run

DIR/target/              config.json, model.safetensors, tokenizer.json (one token a word)
DIR/corpus.jsonl         one {"id", "text"} per line; about one story in ten is held out
DIR/explanations.jsonl   topic, mood and ending of each text, in the format of `nla data explain`

The code treats it as any target and corpus. Its numbers say little about real models.
"""

import dataclasses
import functools
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from nla_jax import prompts
from nla_jax.data import capture_requests, corpora, explanations, lessons
from nla_jax.errors import run_main
from nla_jax.lm import chat_prompts, weights
from nla_jax.lm import params as params_lib
from nla_jax.lm import tokenizer as tok_lib
from nla_jax.lm.config import LMConfig
from nla_jax.lm.model import embed, forward, unembed
from nla_jax.util import paths
from nla_jax.util.batching import pad_rows
from nla_jax.util.keys import new_key
from nla_jax.util.progress import Progress

# A story has one topic and one mood, which its words are drawn from. A model needs both to predict a word.
ROLES = ("who", "animal", "place", "thing")
TOPICS = {
    "the sea": ("sailor fisher captain", "gull seal", "harbour beach ship", "net rope sail anchor"),
    "a farm": ("farmer shepherd miller", "cow goat", "field barn stable", "plough fence cart bucket"),
    "a school": ("teacher pupil porter", "mouse parrot", "classroom yard library", "book desk pencil map"),
    "a kitchen": ("cook baker maid", "cat hen", "pantry cellar oven", "knife loaf kettle spoon"),
    "a castle": ("king queen knight", "horse hawk", "tower gate hall", "crown sword torch banner"),
    "the forest": ("hunter ranger hermit", "bear fox", "clearing cave path", "axe bow trap lantern"),
    "a town": ("merchant clerk barber", "dog pigeon", "market square bridge", "coin letter ticket bell"),
    "the theatre": ("actor singer dancer", "swan monkey", "stage balcony lobby", "mask drum violin costume"),
}
MOODS = {
    "happy": ("merry bright warm kind lucky", "laughed sang danced"),
    "sad": ("lonely pale lost broken grey", "wept sighed left"),
    "scary": ("dark strange silent cruel cold", "shivered fled screamed"),
}
SENTENCES = (
    "The {adjective} {who} walked to the {place}.",
    "There the {animal} found a {adjective} {thing}.",
    "At the {place} the {who} held the {thing} and {did}.",
    "The {who} saw a {adjective} {animal} near the {place}.",
    "A {animal} came by and took the {adjective} {thing}.",
    "Then the {who} {did} for a long time.",
    "The {place} was {adjective} and the {animal} {did}.",
    "Under the {thing} lay a {adjective} {thing}.",
)

TEXT_WORDS = (12, 24)  # minimal and maximal number of words of an explained text
OVER = "The story is over."
TURN, END, UNKNOWN, MARKER = "<|im_start|>", "<|im_end|>", "<unk>", "\u321c"
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# A token is a line break, or a word or punctuation mark with the space before it.
TOKEN = r"\n| ?\w+| ?[^\w\s]"


def build(directory: str | Path, *, seed: int = 0, stories: int = 2100, steps: int = 250) -> Path:
    """Make the toy world in `directory`, overwriting an existing one; return the directory.

    Args:
      seed: of the stories, the texts and the target's training; on one machine, it determines the files.
      stories: documents of the corpus. steps: training steps of the target.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    lines = [json.dumps({"id": i, "text": story(rng)}) for i in range(stories)]
    paths.write(directory / "corpus.jsonl", "".join(line + "\n" for line in lines))
    docs = corpora.open_corpus(f"file:{directory / 'corpus.jsonl'}")
    records = [explanations.record_of(i, doc, a, b, explain(doc.text, a, b))
               for i, (doc, a, b) in enumerate((d, *cut) for d in docs for cut in cuts(d.text, rng))]
    lines = [json.dumps(dataclasses.asdict(r)) for r in records]
    paths.write(directory / "explanations.jsonl", "".join(line + "\n" for line in lines))
    tok = tokenizer()
    cfg = LMConfig(vocab_size=len(tok), d_model=64, n_blocks=4, n_heads=4, n_kv_heads=2, head_dim=16,
                   d_ff=160, max_position=512)
    tok_lib.save(tok, directory / "target")
    weights.save_hf(directory / "target", cfg, train_target(cfg, tok, steps=steps, seed=seed))
    return directory


# --- stories and what is true of them -------------------------------------------------------------

def story(rng, sentences: int = 12) -> str:
    """Draw a document: sentences of one topic in one mood."""
    pick = lambda words: words[rng.integers(len(words))]
    topic, mood = pick(list(TOPICS)), pick(list(MOODS))
    words = dict(zip(ROLES, TOPICS[topic], strict=True))
    words["adjective"], words["did"] = MOODS[mood]
    # Every gap of a sentence is drawn independently.
    return " ".join(re.sub(r"{(\w+)}", lambda m: pick(words[m[1]].split()), pick(SENTENCES))
                    for _ in range(sentences))


def cuts(text: str, rng, n: int = 2) -> list[tuple[int, int]]:
    """Draw n spans of whole words that do not overlap: (start, end) in characters."""
    starts = [0, *(i + 1 for i, c in enumerate(text) if c == " ")]
    share = len(starts) // n
    out = []
    for part in range(n):
        length = int(rng.integers(TEXT_WORDS[0], min(TEXT_WORDS[1], share - 1) + 1))
        first = part * share + int(rng.integers(share - length))
        out.append((starts[first], starts[first + length] - 1))
    return out


def explain(text: str, start: int, end: int) -> str:
    """Return the explanation of text[start:end]: its mood and topic, the next two words, its last words."""
    seen = re.findall(r"\w+", text[start:end])

    def best(choices):
        return max(choices, key=lambda c: sum(w in " ".join(choices[c]).split() for w in seen))

    following = " ".join(capture_requests.next_words(text, end).split()[:2])
    then = f'Next perhaps "{following}".' if following else OVER
    said = f"A {best(MOODS)} story about {best(TOPICS)}.\n{then}"
    return lessons.join_end(said, lessons.quote_words(text[start:end], 3))


# --- tokenizer and target -------------------------------------------------------------------------

def tokenizer():
    """Make a tokenizer with a token for each word of the grammar and of the prompts.

    Each word of the grammar has a token with and one without a space before it."""
    import tokenizers
    import transformers

    rng = np.random.default_rng(0)
    spoken = [story(rng) for _ in range(200)]
    spoken += [explain(t, *cut) for t in spoken[:100] for cut in cuts(t, rng)]
    fixed = [prompts.AV_TEMPLATE, prompts.AR_TEMPLATE, prompts.OPEN, prompts.CLOSE, MARKER,
             explanations.INSTRUCTION, f"{OVER} {lessons.MARK}", "user\n", "assistant\n", "system\n"]
    words = {w.strip(" ") for t in spoken for w in re.findall(TOKEN, t)}
    words |= {" " + w for w in words if w != "\n"} | {w for t in fixed for w in re.findall(TOKEN, t)}
    vocab = {w: i for i, w in enumerate([UNKNOWN, TURN, END, *sorted(words)])}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token=UNKNOWN))
    core.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(TOKEN), "isolated")
    core.decoder = tokenizers.decoders.Fuse()
    tok = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token=UNKNOWN, bos_token=TURN, eos_token=END,
        clean_up_tokenization_spaces=False)
    tok.chat_template = CHAT
    return tok


def train_target(cfg: LMConfig, tok, *, steps: int, seed: int, stories: int = 12, chats: int = 6) -> dict:
    """Train a model to continue stories and, given the explainer's instruction, to explain them."""
    rng = np.random.default_rng([seed, 1])
    ids = chat_prompts.chat_ids(tok, explanations.instruction(MARKER))
    at = ids.index(tok.convert_tokens_to_ids(MARKER))
    before, after = ids[:at], ids[at + 1 :]
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(
        optax.warmup_cosine_decay_schedule(0.0, 6e-3, steps // 10, steps, 3e-4), b2=0.98))
    params = params_lib.init(cfg, jax.random.fold_in(new_key(seed), 2))
    params["embed"] = params["embed"] * 0.5

    def nll(params, past, ids_BT, mask_BT):
        """Return the mean cross-entropy, in nats, of the tokens of `mask_BT`."""
        x = embed(params, cfg, ids_BT[:, :-1])
        x, _ = forward(params, cfg, x, jnp.ones_like(mask_BT[:, 1:]), past=past)
        logp = jax.nn.log_softmax(unembed(params, cfg, x))
        logp = jnp.take_along_axis(logp, ids_BT[:, 1:, None], 2)[..., 0]
        return -jnp.sum(logp * mask_BT[:, 1:]) / jnp.sum(mask_BT[:, 1:])

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, opt, text, chat):
        def loss(params):
            # The instruction is the same in every row, so its prefix cache is computed once.
            x = embed(params, cfg, jnp.array(before)[None])
            _, past = forward(params, cfg, x, jnp.ones(x.shape[:2], bool), keep_kv=True)
            return nll(params, None, *text) + nll(params, past, *chat)

        value, grads = jax.value_and_grad(loss)(params)
        updates, opt = tx.update(grads, opt, params)
        return optax.apply_updates(params, updates), opt, value

    opt = tx.init(params)
    with Progress("toy target", steps) as bar:
        for _ in range(steps):
            told = [tok_lib.plain_ids(tok, _tail(story(rng, 7), rng))[:48] for _ in range(stories)]
            rows, starts = zip(*(_chat(tok, after, rng) for _ in range(chats)), strict=True)
            chat, valid, _ = pad_rows([r[:112] for r in rows], 0, 112)
            answer = valid & (np.arange(112) >= np.array(starts)[:, None])
            params, opt, value = step(params, opt, pad_rows(told, 0, 48)[:2], (chat, answer))
            bar.advance(1, f"loss {value:.3f}")
    return jax.tree.map(np.asarray, params)


def _tail(text: str, rng) -> str:
    """Drop up to 8 words from the start, because windows begin anywhere in a sentence."""
    return text.split(" ", int(rng.integers(9)))[-1]


def _chat(tok, after: list[int], rng) -> tuple[list[int], int]:
    """Return (ids of a text, of the rest of the prompt and of the answer; the start of the answer)."""
    text = story(rng, 5)
    a, b = cuts(text, rng, 1)[0]
    prompt = [*tok_lib.plain_ids(tok, text[a:b]), *after]
    answer = tok_lib.plain_ids(tok, prompts.OPEN + explain(text, a, b) + prompts.CLOSE)
    return [*prompt, *answer, tok.eos_token_id], len(prompt)


def main(argv: list[str] | None = None) -> None:
    """Run `python -m nla_jax.toy DIR`."""
    import argparse

    from nla_jax.util.number_types import whole

    parser = argparse.ArgumentParser(prog="python -m nla_jax.toy", description=__doc__.split("\n\n")[0])
    parser.add_argument("directory")
    parser.add_argument("--seed", type=whole(0), default=0)
    args = parser.parse_args(argv)
    print(build(args.directory, seed=args.seed))


if __name__ == "__main__":
    run_main(main, "toy")
