"""Small tokenizers of each family's kind, their chat templates, and GGUF files that hold them.

A kind is trained here and put together as the family's published tokenizer.json is. `write_gguf` says
of it what llama.cpp's converter says of the published one.
"""

import dataclasses
import functools
import json
from pathlib import Path

import gguf
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast
from transformers.tokenization_utils_base import generate_merges

SPACE = "\u2581"
MARKER = "\u320e"
SHIPPED = Path(__file__).resolve().parent.parent.parent / "nla_jax/data/warmstart/explanations.jsonl"
OTHER_WORDS = [
    "def f(x):\n    return x + 1\n\n\nfor i in range(100):\n\tprint(i)\n", "a  b   c    d     e",
    "año élan über Straße naïve façade", "日本語 中文 한국어 русский язык", "😀 👍🏽 🏳️‍🌈",
    "1234567890 2024-05-17 3.14159", MARKER, "<text> </text> <summary>",
] * 20
# As published, character by character.
QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
LLAMA3_WORDS = QWEN_WORDS.replace(r"|\p{N}|", r"|\p{N}{1,3}|")

LLAMA2_CHAT = (
    "{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + m['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL_CHAT = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ m['content'] + eos_token}}{% endif %}{% endfor %}"
)
LLAMA3_CHAT = (
    "{% for m in messages %}{% set content = '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n'"
    " + m['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN25_CHAT = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are Qwen, created by Alibaba "
    "Cloud. You are a helpful assistant.<|im_end|>\n' }}{% endif %}" + CHATML
)
QWEN3_CHAT = CHATML.replace(
    "{{ '<|im_start|>assistant\n' }}",
    "{{ '<|im_start|>assistant\n' }}{% if enable_thinking is defined and enable_thinking is false %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}",
)
GEMMA_CHAT = (
    "{{ bos_token }}{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] "
    "%}{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)


@dataclasses.dataclass(frozen=True)
class Kind:
    """One family's tokenizer: how text is cut, and the tokens that are not learned."""

    model: str  # tokenizer.ggml.model
    pre: str  # tokenizer.ggml.pre
    words: str = ""  # byte-level: the pattern
    special: tuple[str, ...] = ()  # byte-level: after the learned tokens; SentencePiece: before them
    user: tuple[str, ...] = ()  # found whole in a text, but not special
    bos: str | None = None
    eos: str = ""
    pad: str | None = None
    adds_bos: bool = True
    prefix: bool = True  # SentencePiece: a space before every text
    arch: str = "llama"


SPACES = tuple(SPACE * n for n in range(2, 8))
NEWLINES = tuple("\n" * n for n in range(1, 6))
KINDS = {
    "qwen2": Kind(
        "gpt2", "qwen2", QWEN_WORDS, ("<|endoftext|>", "<|im_start|>", "<|im_end|>"), ("<tool_call>",),
        eos="<|im_end|>", pad="<|endoftext|>", adds_bos=False, arch="qwen2",
    ),
    "llama3": Kind(
        "gpt2", "llama-bpe", LLAMA3_WORDS,
        ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        bos="<|begin_of_text|>", eos="<|eot_id|>",
    ),
    "llama2": Kind("llama", "default", special=("<unk>", "<s>", "</s>"), bos="<s>", eos="</s>"),
    "mistral": Kind(
        "llama", "default", special=("<unk>", "<s>", "</s>", "[INST]", "[/INST]"), bos="<s>", eos="</s>",
    ),
    "gemma": Kind(
        "llama", "default", special=("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"),
        user=(*NEWLINES, *SPACES, "<table>", "</table>", "\t"), bos="<bos>", eos="<eos>", pad="<pad>",
        prefix=False, arch="gemma3",
    ),
}
TEMPLATES = {  # name -> (kind, template)
    "llama 2": ("llama2", LLAMA2_CHAT),
    "llama 3": ("llama3", LLAMA3_CHAT),
    "mistral": ("mistral", MISTRAL_CHAT),
    "qwen 2.5": ("qwen2", QWEN25_CHAT),
    "qwen 3": ("qwen2", QWEN3_CHAT),
    "gemma 2 and 3": ("gemma", GEMMA_CHAT),
}


@functools.cache
def corpus() -> tuple[str, ...]:
    lines = SHIPPED.read_text(encoding="utf-8").splitlines()[:150]
    return (*(json.loads(line)["explanation"] for line in lines), *OTHER_WORDS)


@functools.cache
def reference(name: str) -> PreTrainedTokenizerFast:
    """The kind's tokenizer as transformers loads the published one."""
    kind = KINDS[name]
    core = _byte_level(kind) if kind.model == "gpt2" else _sentence_piece(kind)
    core.add_special_tokens([AddedToken(t, normalized=False) for t in kind.special])
    core.add_tokens([AddedToken(t, normalized=False) for t in kind.user])
    if kind.adds_bos:
        frame = processors.TemplateProcessing(
            single=f"{kind.bos} $A", pair=f"{kind.bos} $A {kind.bos}:1 $B:1",
            special_tokens=[(kind.bos, core.token_to_id(kind.bos))],
        )
        byte_level = processors.ByteLevel(add_prefix_space=True, trim_offsets=False)
        core.post_processor = processors.Sequence([byte_level, frame]) if name == "llama3" else frame
    elif kind.model == "gpt2":
        core.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False)
    unk = "<unk>" if "<unk>" in kind.special else None
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=kind.bos, eos_token=kind.eos, pad_token=kind.pad, unk_token=unk,
        clean_up_tokenization_spaces=False,
    )


def _byte_level(kind: Kind) -> Tokenizer:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(kind.words), behavior="isolated", invert=False),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1500, initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator(corpus(), trainer)
    state = json.loads(core.to_str())
    if kind.pre == "llama-bpe":
        # A word that no merges lead to, as Llama 3 has some.
        state["model"]["vocab"]["\u0120unreachable"] = len(state["model"]["vocab"])
        state["model"]["ignore_merges"] = True
    core = Tokenizer.from_str(json.dumps(state))
    if kind.pre == "qwen2":
        core.normalizer = normalizers.NFC()
    return core


BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))


def _sentence_piece(kind: Kind) -> Tokenizer:
    """Merges as transformers derives them from a SentencePiece model, for the published file."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="always")
    trainer = trainers.BpeTrainer(vocab_size=1200, limit_alphabet=150, show_progress=False)
    core.train_from_iterator(corpus(), trainer)
    # Line breaks and tabs are bytes to these models, or tokens that nothing merges with.
    learned = [t for t, _ in sorted(core.get_vocab().items(), key=lambda item: item[1])]
    learned = [t for t in learned if not set(t) & set("\n\t")]
    # SentencePiece gives the merged pieces first, single characters last.
    pieces = [t for t in learned if len(t) > 1] + [t for t in learned if len(t) == 1]
    fixed = [*kind.special, *kind.user]
    tokens = [*fixed, *BYTES, *(t for t in pieces if t not in fixed)]
    vocab = {token: id for id, token in enumerate(tokens)}
    merges = generate_merges(vocab, scores(kind, tokens) if kind.prefix else None)
    unk = "<unk>"
    core = Tokenizer(models.BPE(vocab, merges, unk_token=unk, fuse_unk=True, byte_fallback=True))
    replace = normalizers.Replace(" ", SPACE)
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if kind.prefix:
        core.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), replace])
        steps.append(decoders.Strip(content=" ", left=1))
    else:
        core.normalizer = replace
        core.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    core.decoder = decoders.Sequence(steps)
    return core


def scores(kind: Kind, tokens: list[str]) -> dict[str, float]:
    """SentencePiece's: minus the rank for what was learned; the rest says nothing."""
    first = len(kind.special) + len(kind.user) + 256
    rest = 0.0 if kind.prefix else -1000.0
    return {t: float(first - id) if id >= first else rest for id, t in enumerate(tokens)}


def write_gguf(path: Path, name: str, template="", padded=3, drop: tuple[str, ...] = ()) -> Path:
    """The reference tokenizer of a kind as llama.cpp's converter writes it, without tensors.

    `padded` tokens stand for rows of the embedding that have no token; `drop` names keys left out.
    """
    kind, tok = KINDS[name], reference(name)
    state = json.loads(tok.backend_tokenizer.to_str())
    by_id = {id: token for token, id in tok.get_vocab().items()}
    tokens, types = [], []
    for id in range(len(by_id)):
        token, of = by_id[id], gguf.TokenType.NORMAL
        if token == "<unk>" and name != "gemma":
            of = gguf.TokenType.UNKNOWN
        elif token in kind.special:
            of = gguf.TokenType.CONTROL
        elif token in kind.user:
            token, of = token.replace(SPACE, " "), gguf.TokenType.USER_DEFINED
        elif kind.model == "llama" and token in BYTES:
            of = gguf.TokenType.BYTE
        tokens.append(token)
        types.append(of)
    tokens += [f"[PAD{len(by_id) + i}]" for i in range(padded)]
    types += [gguf.TokenType.UNUSED] * padded
    writer = gguf.GGUFWriter(str(path), kind.arch)
    writer.add_tokenizer_model(kind.model)
    writer.add_tokenizer_pre(kind.pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if kind.model == "llama":
        by_token = scores(kind, [by_id[id] for id in range(len(by_id))])
        writer.add_token_scores([*by_token.values(), *([-1000.0] * padded)])
        if "add_space_prefix" not in drop:
            writer.add_add_space_prefix(kind.prefix)
    else:
        writer.add_token_merges([" ".join(pair) for pair in state["model"]["merges"]])
    vocab = tok.get_vocab()
    for what in ("bos", "eos", "pad"):
        if token := getattr(kind, what):
            getattr(writer, f"add_{what}_token_id")(vocab[token])
    if "<unk>" in vocab:
        writer.add_unk_token_id(vocab["<unk>"])
    if "add_bos" not in drop:
        writer.add_add_bos_token(kind.adds_bos)
    if template:
        writer.add_chat_template(template)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
