"""Implement the same step with PyTorch and Hugging Face transformers, as fast as possible: the reference.

These optimisations are used; each is measured or known to help. Trained float32 parameters run under bfloat16
autocast, and frozen ones are bfloat16 copies, unless the CPU is faster in float32. sdpa attention has no mask
(no row is padded), so it uses the flash kernels. The prompt is prefilled once per activation and its cache
repeated. `generate` has no end-of-text or length processors. Adapters are merged for sampling. Logits are
computed for responses only, in chunks whose backward pass follows at once. Nothing is recomputed, and [rows,
tokens, vocabulary] is never in memory. The reference policy and the scores have no gradients. AR's scoring
pass is shared with its update. AdamW is fused; updates use microbatches. On a GPU, torch.compile compiles
each block and the loss, and `generate` uses a static cache with compiled decoding.
"""

import contextlib
import functools
import inspect
import time

import torch
import torch.nn.functional as F
import transformers

from benchmarks import data, reference_model
from benchmarks.cases import Case
from nla_jax.lm.lora import MATRICES


class Side:
    """Models, optimizers and phases of one case. `run(phase)` runs a phase once and waits for the result.

    A subclass may have other weights and constants (`benchmarks.fve.reference`).

    Args:
      compiled: use torch.compile. static: use `generate` with a static cache.
      dtype: of products and of frozen weights, bfloat16 or float32.
      share: in training, compute the prompt before the marker once and not per row, as nla_jax does. This is
        not usual in PyTorch.
    """

    alpha, kl_weight, clip, b2 = data.ALPHA, data.KL, data.CLIP, data.B2

    def __init__(self, case: Case, device: str = "cpu", compiled: bool = False, static: bool = False,
                 share: bool = False, dtype: str = "bfloat16"):
        torch.manual_seed(0)
        torch.set_float32_matmul_precision("high")
        self.case, self.device = case, torch.device(device)
        self.inputs = self._inputs()
        self.static, self.compiled, self.share = static, compiled, share
        self.dtype, self.frozen = dtype, getattr(torch, dtype)
        half = functools.partial(torch.autocast, device, torch.bfloat16)
        self.autocast = half if dtype == "bfloat16" else contextlib.nullcontext
        t = functools.partial(torch.as_tensor, device=self.device)
        i = self.inputs
        self.h, self.answers = t(i.h_BD), t(i.answers_NT).long()
        self.adv = t(i.advantage_N)
        self.role, self.notes = ["av"], {}
        self._load()
        if compiled:
            self._compile()
        self.ids = self.answers
        settings = {"cache_implementation": "static"} if static else {}
        self.generation = transformers.GenerationConfig(
            do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=case.max_new,
            min_new_tokens=case.max_new, eos_token_id=None, pad_token_id=0, **settings)

    def _inputs(self):
        return data.inputs(self.case)

    def _base(self) -> dict | None:
        """Return the target's parameters; None: random ones, made on the device."""
        return None if self.case.weights == "device" else data.params(self.case)

    def _adapters(self, role: str) -> dict:
        return data.adapters(self.case, role)

    def _load(self):
        case, dev = self.case, self.device
        tree = self._base()
        n, D = case.layer + 1, case.lm.d_model
        if case.rank:
            self.av = reference_model.build(case, dev, self.frozen, tree)
            self.writer = reference_model.build(case, dev, self.frozen, tree)
            self.adapted = {}
            for b, layer in enumerate(self.av.model.layers):
                for name in MATRICES:
                    parent, _, leaf = reference_model.HF_NAMES[name].rpartition(".")
                    old = getattr(layer.get_submodule(parent), leaf)
                    module = reference_model.LinearWithAdapters(old, self.role)
                    setattr(layer.get_submodule(parent), leaf, module)
                    self.adapted[b, name] = module
            for role in ("av", "ref", "ar"):
                adapters = self._adapters(role)
                for (b, name), module in self.adapted.items():
                    if b < len(adapters[name]["a"]):
                        one = adapters[name]
                        module.add(role, one["a"][b], one["b"][b], role != "ref")
            self.ref = self.av
            self.ar = reference_model.first_blocks(self.av.model, n)
            self.target = self.ar
            modules = self.adapted.values()
            trained = {r: [p for m in modules for q in (m.a, m.b) if r in q for p in [q[r]]]
                       for r in ("av", "ar")}
        else:
            self.av = reference_model.build(case, dev, torch.float32, tree).requires_grad_(True)
            self.ref = reference_model.build(case, dev, self.frozen, data.other_reference(case, tree))
            self.writer = reference_model.build(case, dev, self.frozen, tree)
            ar = reference_model.build(case, dev, torch.float32, tree)
            self.ar = reference_model.first_blocks(ar.model, n).requires_grad_(True)
            self.target = reference_model.first_blocks(self.ref.model, n)
            trained = {"av": list(self.av.parameters()), "ar": list(self.ar.parameters())}
        self.head = torch.nn.Linear(D, D, bias=False, device=dev)
        torch.nn.init.eye_(self.head.weight)
        trained["ar"] = [*trained["ar"], self.head.weight]
        self.trained = trained
        adamw = functools.partial(torch.optim.AdamW, lr=data.LR, betas=(0.9, self.b2), eps=1e-8,
                                  weight_decay=0.0, fused=True)
        self.opt = {name: adamw(parameters) for name, parameters in trained.items()}

    def _compile(self):
        # A block that fails to compile runs uncompiled. Each kind of pass compiles the blocks again.
        torch._dynamo.config.suppress_errors = True
        torch._dynamo.config.cache_size_limit = 64
        nets = {id(net): net for net in (self.av.model, self.ref.model, self.ar, self.target)}
        done = set()
        for net in nets.values():
            for layer in net.layers:
                if id(layer) not in done:
                    layer.compile()
                    done.add(id(layer))

    @functools.cached_property
    def chunk_loss(self):
        return torch.compile(reference_model.chunk_loss) if self.compiled else reference_model.chunk_loss

    @functools.cached_property
    def cross_entropy(self):
        loss = reference_model.cross_entropy
        return torch.compile(loss) if self.compiled else loss

    def _sync(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    @contextlib.contextmanager
    def _as(self, role: str):
        before, self.role[0] = self.role[0], role
        try:
            yield
        finally:
            self.role[0] = before

    # --- AV ---------------------------------------------------------------------------------------

    def _prompt(self, net, h):
        """Return the embeddings of the prompt with h in the place of the marker: [rows, P, D]."""
        p, embed = self.inputs.prompt, net.get_input_embeddings()
        e = self.alpha * F.normalize(h, dim=-1)
        ids = torch.as_tensor([*p.before, p.marker, *p.after], device=self.device)
        x = embed(ids)[None].expand(len(h), -1, -1)
        at = len(p.before)
        return torch.cat([x[:, :at], e[:, None].to(x.dtype), x[:, at + 1 :]], 1)

    def _hidden(self, net, h, ids):
        """Return the hidden states [rows, T, D] that predict the answers `ids`, after the final norm."""
        x = torch.cat([self._prompt(net, h), net.get_input_embeddings()(ids[:, :-1])], 1)
        if not self.share:
            out = net.model(inputs_embeds=x, use_cache=False).last_hidden_state
            return out[:, self.case.prompt - 1 :]
        name, at = self.cache_name, self.case.before
        past = net.model(inputs_embeds=x[:1, :at], use_cache=True)[name]
        for layer in past.layers:
            layer.keys, layer.values = (a.expand(len(h), -1, -1, -1) for a in (layer.keys, layer.values))
        out = net.model(inputs_embeds=x[:, at:], use_cache=True, **{name: past}).last_hidden_state
        return out[:, self.case.prompt - at - 1 :]

    @functools.cached_property
    def cache_name(self) -> str:
        """Return the name of the cache argument, which differs between releases of transformers."""
        new = "cache" in inspect.signature(self.av.forward).parameters
        return "cache" if new else "past_key_values"

    def _backward(self, hidden, ids, loss_of):
        """Run forward and backward through the vocabulary in chunks, then backward through the blocks."""
        x = hidden.reshape(-1, hidden.shape[-1])
        leaf = x.detach().requires_grad_()
        sums = []
        for at in range(0, len(x), self.case.vocab_chunk):
            part = slice(at, at + self.case.vocab_chunk)
            with self.autocast():
                logits = self.av.lm_head(leaf[part])
            loss, extra = loss_of(logits, ids.reshape(-1)[part], part)
            loss.backward()
            sums.append((loss.detach(), extra))
        x.backward(leaf.grad)
        return sum(s for s, _ in sums), sum(e for _, e in sums)

    def _apply(self, name: str) -> float:
        norm = torch.nn.utils.clip_grad_norm_(self.trained[name], self.clip, foreach=True)
        self.opt[name].step()
        self.opt[name].zero_grad(set_to_none=True)
        return norm

    def _av_update(self, h, ids, adv):
        total, kls = float(ids.numel()), 0.0
        for h_i, ids_i, adv_i in self._parts(h, ids, adv):
            with self.autocast():
                with self._as("ref"), torch.no_grad():
                    ref = self._hidden(self.ref, h_i, ids_i).reshape(-1, h.shape[-1])
                hidden = self._hidden(self.av, h_i, ids_i)
            adv_i = adv_i.repeat_interleave(ids.shape[1])

            def loss_of(logits, ids, part, ref=ref, adv_i=adv_i):
                with torch.no_grad():
                    ref_logits = self.ref.lm_head(ref[part].to(self.ref.lm_head.weight.dtype))
                return self.chunk_loss(logits, ref_logits, ids, adv_i[part], total, self.kl_weight)

            kls += self._backward(hidden, ids_i, loss_of)[1] / total
        return {"kl": kls, "av_grad_norm": self._apply("av")}

    def _parts(self, *rows):
        n = -(-len(rows[0]) // self.case.torch_micro)
        return zip(*(r.split(n) for r in rows), strict=True)

    def _sample(self, h, group: int):
        """Sample `group` answers for each h: [rows * group, T]."""
        with torch.inference_mode():
            try:
                ids = self._generate(h, group)
            except Exception as err:
                if not self.static:
                    raise
                # The static cache is faster but does not always work; `notes` says which one was used.
                self.static, self.notes["static_cache"] = False, f"failed: {str(err)[:200]}"
                self.generation.cache_implementation = None
                ids = self._generate(h, group)
        if ids.shape != (want := (len(h) * group, self.case.max_new)):
            raise SystemExit(f"generate gave {tuple(ids.shape)} and not {want}")
        return ids.clone()

    def _generate(self, h, group: int):
        if self.case.rank:
            for (b, name), module in self.adapted.items():
                own = self.writer.model.layers[b].get_submodule(reference_model.HF_NAMES[name])
                own.weight.copy_(module.merged("av"))
        else:
            torch._foreach_copy_(list(self.writer.parameters()), list(self.av.parameters()))
        x = self._prompt(self.writer, h)
        kw = {}
        if not self.static:
            # The cache of the prompt without its last token is computed once for each h.
            cache = self.writer.model(inputs_embeds=x[:, :-1], use_cache=True)[self.cache_name]
            if group > 1:
                cache.batch_repeat_interleave(group)
            kw = {self.cache_name: cache}
        x = x.repeat_interleave(group, 0)
        return self.writer.generate(
            inputs_embeds=x, attention_mask=torch.ones(x.shape[:2], dtype=torch.long, device=x.device),
            generation_config=self.generation, **kw)

    # --- AR ---------------------------------------------------------------------------------------

    def _ar_ids(self, ids):
        p = self.inputs.ar_prompt
        sides = [torch.as_tensor(s, device=self.device).expand(len(ids), -1) for s in (p.before, p.after)]
        return torch.cat([sides[0], ids, sides[1]], 1)

    def _reconstruct(self, ids):
        x = self.ar.embed_tokens(ids)
        with self._as("ar"):
            x = self.ar(inputs_embeds=x, use_cache=False).last_hidden_state[:, -1]
        return self.head(x).float()

    def _ar_update(self, ids, h):
        """Update AR on whole prompts `ids`; one forward pass gives the scores and the gradient."""
        mse, n = [], len(ids)
        for ids_i, h_i in self._parts(ids, h):
            with self.autocast():
                h_hat = self._reconstruct(ids_i)
            part = reference_model.scaled_mse(h_hat, h_i)
            (part.sum() / n).backward()
            mse.append(part.detach())
        mse = torch.cat(mse)
        return mse, {"loss": mse.mean(), "grad_norm": self._apply("ar")}

    # --- phases -----------------------------------------------------------------------------------

    def run(self, phase: str) -> tuple[dict, dict]:
        """Run a phase once; return (seconds by phase, scalars). A whole step also gives its parts' times."""
        marks, begin = {}, time.perf_counter()

        def mark(name):
            self._sync()
            marks[name] = time.perf_counter() - begin - sum(marks.values())

        info = getattr(self, phase)(*([mark] if phase == "step" else []))
        self._sync()
        info = {k: float(v) for k, v in info.items()}
        return {**marks, phase: time.perf_counter() - begin}, info

    @property
    def h_ND(self):
        return self.h.repeat_interleave(self.case.group, 0)

    def step(self, mark):
        self.ids = self._sample(self.h, self.case.group)
        mark("rollout")
        mse, info = self._ar_update(self._ar_ids(self.ids), self.h_ND)
        mark("ar_update")
        reward = -mse.clamp_min(1e-8).log().view(-1, self.case.group)
        centred = reward - reward.mean(1, keepdim=True)
        adv = (centred / (reward.std(1, keepdim=True, correction=0) + 1e-4)).view(-1)
        out = self._av_update(self.h_ND, self.ids, adv)
        mark("av_update")
        return {**out, "reward": reward.mean(), "mse": info["loss"]}

    def rollout(self):
        self.ids = self._sample(self.h, self.case.group)
        return {"length": self.ids.shape[1]}

    @torch.no_grad()
    def score(self):
        with self.autocast():
            mse = reference_model.scaled_mse(self._reconstruct(self._ar_ids(self.ids)), self.h_ND)
        return {"mse": mse.mean()}

    def av_update(self):
        return self._av_update(self.h_ND, self.ids, self.adv)

    def ar_update(self):
        return self._ar_update(self._ar_ids(self.ids), self.h_ND)[1]

    @torch.inference_mode()
    def capture(self):
        rows, tokens = self.case.capture
        ids = torch.as_tensor(self.inputs.capture_BT, device=self.device).long()
        with self._as(None):
            x = self.target(inputs_embeds=self.target.embed_tokens(ids), use_cache=False).last_hidden_state
        h = x[:, [tokens // 2, tokens - 1]].float()
        return {"norm": h.norm(dim=-1).mean()}

    def warm_av(self):
        i = self.inputs
        h = torch.as_tensor(i.warm_h_BD, device=self.device)
        ids = torch.as_tensor(i.warm_BT, device=self.device).long()
        total, loss = float(ids.numel()), 0.0
        for h_i, ids_i in self._parts(h, ids):
            with self.autocast():
                hidden = self._hidden(self.av, h_i, ids_i)
            loss_of = lambda logits, ids, part: (self.cross_entropy(logits, ids, total), 0.0)
            loss += self._backward(hidden, ids_i, loss_of)[0]
        return {"loss": loss, "grad_norm": self._apply("av")}

    def warm_ar(self):
        i = self.inputs
        ids = torch.as_tensor(i.warm_ar_BT, device=self.device).long()
        return self._ar_update(ids, torch.as_tensor(i.warm_h_BD, device=self.device))[1]

    def evaluate(self):
        h = torch.as_tensor(self.inputs.evaluate_ND, device=self.device)
        ids = self._sample(h, 1)
        with torch.no_grad(), self.autocast():
            mse = reference_model.scaled_mse(self._reconstruct(self._ar_ids(ids)), h)
        return {"mse": mse.mean()}

    # --- checks -----------------------------------------------------------------------------------

    @torch.no_grad()
    def check(self, kinds=("bf16", "fp32")) -> dict:
        """Return log-probabilities of up to four answers and AR's predictions for them, by precision."""
        n = min(self.case.rows, 4)
        ids, h = self.answers[:n], self.h_ND[:n]
        out = {}
        for name in kinds:
            with self.autocast() if name == "bf16" else self._float32():
                hidden = self._hidden(self.av, h, ids)
                logits = self.av.lm_head(hidden.to(self.av.lm_head.weight.dtype)).float()
                out[f"logp_{name}"] = F.log_softmax(logits, -1).gather(-1, ids[..., None])[..., 0]
                out[f"h_{name}"] = self._reconstruct(self._ar_ids(ids))
        return {k: v.float().tolist() for k, v in out.items()}

    @contextlib.contextmanager
    def _float32(self):
        """Compute in float32 inside the block, with float32 copies of bfloat16 weights."""
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        nets = [self.av] if self.case.rank else []
        kept = [(p, p.data) for net in nets for p in net.parameters()]
        for p, value in kept:
            p.data = value.float()
        try:
            yield
        finally:
            for p, value in kept:
                p.data = value
            torch.set_float32_matmul_precision(before)

    def peak_memory(self) -> int | None:
        return torch.cuda.max_memory_allocated() if self.device.type == "cuda" else None


def timed(side: Side, phase: str) -> dict:
    seconds, info = side.run(phase)
    return {"seconds": seconds, "info": info}
