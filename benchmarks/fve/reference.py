"""The PyTorch side: the training of a problem with `benchmarks.reference`, for answers of any length.

To the optimisations there it adds: rows that have ended stop `generate` when all have, rows of an update are
sorted by length and padded to the longest of their microbatch, and logits are computed for real tokens only.
"""

import dataclasses
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers

from benchmarks import cases, data, reference, reference_model
from benchmarks.fve import problem as problems
from benchmarks.fve.ours import read_spec
from nla_jax.lm import weights
from nla_jax.util.batching import round_up

ROWS = 16  # of a microbatch, as in `benchmarks.cases`
FAILED_MSE = 2.0


@dataclasses.dataclass(frozen=True)
class Case(cases.Case):
    """A case whose layer is the run's."""

    at: int = 0

    @property
    def layer(self) -> int:
        return self.at


class Closed(transformers.StoppingCriteria):
    """Stop a row after the closing tag."""

    def __init__(self, ids):
        self.ids = torch.tensor(ids)

    def __call__(self, input_ids, scores, **kwargs):
        n = len(self.ids)
        if input_ids.shape[1] < n:
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        return (input_ids[:, -n:] == self.ids.to(input_ids.device)).all(1)


def parse(prompt, ids_NT: np.ndarray):
    """Return (length, start, end, closed, ok) of every answer, all [N], as the sampler and `parse_ids` do."""
    close, eos, n_open = list(prompt.close), set(prompt.eos), len(prompt.open)
    out = []
    for row in ids_NT.tolist():
        n, closed = len(row), False
        for t in range(1, len(row) + 1):
            closed = len(close) <= t and row[t - len(close) : t] == close
            if closed or row[t - 1] in eos:
                n = t
                break
        end = n - len(close)
        if len(prompt.newline) == 1 and row[max(end - 1, 0)] == prompt.newline[0]:
            end -= 1
        ok = tuple(row[:n_open]) == tuple(prompt.open) and closed and end > n_open
        out.append((n, n_open, end, closed, ok))
    return [np.array(a) for a in zip(*out, strict=True)]


def splice(prompt, ids_NT: np.ndarray, start_N, end_N) -> list[list[int]]:
    """Return AR's prompt of every answer's words, as `reconstructor.splice`."""
    bare = dict(prompt.breaks)
    rows = []
    for ids, start, end in zip(ids_NT.tolist(), start_N, end_N, strict=True):
        words = ids[start : max(end, start)]
        if words and words[-1] in bare:
            words[-1] = bare[words[-1]]
        rows.append([*prompt.before, *words, *prompt.after] or [prompt.pad])
    return rows


def most_different(reward_BG: torch.Tensor, k: int) -> torch.Tensor:
    """Return indices [B, k] of the lowest and highest rewards, as `objectives.most_different`."""
    order, G = reward_BG.argsort(dim=1, stable=True), reward_BG.shape[1]
    return torch.cat([order[:, : k // 2], order[:, G - (k - k // 2) :]], 1)


class Side(reference.Side):
    """The models and optimizers of a problem; `run(i)` runs a step."""

    def __init__(self, directory: Path, device: str = "cpu", compiled: bool = False,
                 dtype: str = "bfloat16"):
        p = self.problem = problems.read(directory)
        self.spec, c = read_spec(p.about["spec"]), p.about["config"]
        self.stage, self.rl = p.about["stage"], c["rl"]
        self.alpha, self.kl_weight, self.clip = self.spec.alpha, self.rl["kl"], self.rl["clip"]
        case = Case(
            "", self.spec.lm, rank=c["av"]["rank"], batch=self.rl["batch"], group=self.rl["group"],
            max_new=self.rl["max_new"], before=len(self.spec.av.before), after=len(self.spec.av.after),
            weights="given", vocab_chunk=self.spec.vocab_chunk, at=self.spec.layer)
        dtype = "float32" if self.spec.dtype == "float32" else dtype
        super().__init__(case, device, compiled, dtype=dtype)
        self.generation = transformers.GenerationConfig(
            do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=case.max_new,
            eos_token_id=list(self.spec.av.eos), pad_token_id=self.spec.av.pad)
        self.stopping = transformers.StoppingCriteriaList([Closed(self.spec.av.close)])
        self.start = {role: [p.detach().clone() for p in own] for role, own in self.trained.items()}

    def _inputs(self):
        D = self.spec.lm.d_model
        nothing = np.zeros((1, D), np.float32)
        return data.Inputs(
            prompt=self.spec.av, ar_prompt=self.spec.ar, h_BD=nothing, capture_BT=None, warm_h_BD=nothing,
            warm_BT=None, warm_ar_BT=None, evaluate_ND=nothing, answers_NT=np.zeros((1, 1), np.int32),
            advantage_N=np.zeros(1, np.float32))

    def _base(self):
        return weights.load(Path(self.problem.about["target"]))[1]

    def _adapters(self, role: str) -> dict:
        return self.problem.trees["ar" if role == "ar" else "av"]["lora"]

    def _load(self):
        super()._load()
        with torch.no_grad():
            self.head.weight.copy_(torch.from_numpy(np.array(self.problem.trees["ar"]["head"]).T))

    def reset(self) -> None:
        """Return to the start."""
        with torch.no_grad():
            for role, values in self.start.items():
                for p, value in zip(self.trained[role], values, strict=True):
                    p.copy_(value)
        for opt in self.opt.values():
            opt.state.clear()

    # --- steps ------------------------------------------------------------------------------------

    def run(self, i: int) -> dict:
        """Run step i; return its metrics and its seconds."""
        begin = time.perf_counter()
        for name, values in self.problem.about["rates"].items():
            self.opt[{"lr_av": "av"}.get(name, "ar")].param_groups[0]["lr"] = values[i]
        torch.manual_seed(i)
        metrics = self._rl(self.problem.batches[i]) if self.stage == "rl" else self._warm_ar(
            self.problem.batches[i])
        self._sync()
        return {"seconds": time.perf_counter() - begin} | {k: float(v) for k, v in metrics.items()}

    def _warm_ar(self, b: dict) -> dict:
        rows = _unpad(b["ids_BT"], b["last_B"])
        _, info = self._train_ar(rows, self._put(b["h_BD"]), self._put(b["weight_B"]))
        return info

    def _put(self, a):
        return torch.as_tensor(np.asarray(a), device=self.device)

    def _rl(self, b: dict) -> dict:
        h, group, k = self._put(b["h_BD"]), self.case.group, self.rl["update_group"]
        ids = self._sample(h, group)
        length, start, end, closed, ok = parse(self.spec.av, ids.cpu().numpy())
        h_ND = h.repeat_interleave(group, 0)
        rows = splice(self.spec.ar, ids.cpu().numpy(), start, end)
        weight, goal = self._put(ok.astype(np.float32)), h_ND
        if "written_ids_BT" in b:
            rows += _unpad(b["written_ids_BT"], b["written_last_B"])
            weight = torch.cat([weight, self._put(b["written_weight_B"])])
            goal = torch.cat([h_ND, self._put(b["written_h_BD"])])
        mse, info = self._train_ar(rows, goal, weight)
        mse = mse[: len(h_ND)]
        ok_N = self._put(ok)
        reward = -torch.where(ok_N, mse, FAILED_MSE).clamp_min(1e-8).log().view(-1, group)
        picked, pick = reward, torch.arange(len(ids), device=self.device).view(-1, group)
        if 0 < k < group:
            chosen = most_different(reward, k)
            picked, pick = reward.gather(1, chosen), pick.gather(1, chosen)
        centred = picked - picked.mean(1, keepdim=True)
        adv = (centred / (picked.std(1, keepdim=True, correction=0) + 1e-4)).view(-1)
        pick = pick.view(-1)
        of_av = self._train_av(h_ND[pick], ids[pick], self._put(length)[pick], adv)
        mse = (mse * ok_N).sum() / ok_N.sum().clamp_min(1)
        return {"reward": reward.mean(), "ok": ok.mean(), "length": length.mean(), "mse": mse,
                "ar_grad_norm": info["grad_norm"], **of_av}

    def _generate(self, h, group: int):
        for (b, name), module in self.adapted.items():
            own = self.writer.model.layers[b].get_submodule(reference_model.HF_NAMES[name])
            own.weight.copy_(module.merged("av"))
        x = self._prompt(self.writer, h)
        cache = self.writer.model(inputs_embeds=x[:, :-1], use_cache=True)[self.cache_name]
        if group > 1:
            cache.batch_repeat_interleave(group)
        x = x.repeat_interleave(group, 0)
        return self.writer.generate(
            inputs_embeds=x, attention_mask=torch.ones(x.shape[:2], dtype=torch.long, device=x.device),
            generation_config=self.generation, stopping_criteria=self.stopping, **{self.cache_name: cache})

    def _sample(self, h, group: int):
        with torch.inference_mode():
            ids = self._generate(h, group)
        return ids.clone()

    def _width(self, longest: int) -> int:
        """Return the width of a microbatch; when compiled, few widths occur, because each compiles anew."""
        return round_up(longest, 8) if self.compiled else longest

    def _reconstruct_rows(self, rows: list[list[int]]):
        """Return AR's predictions [N, D] for prompts of any lengths; each is read at its last token."""
        last = torch.tensor([len(r) - 1 for r in rows], device=self.device)
        width = self._width(int(last.max()) + 1)
        ids = torch.tensor([r + [0] * (width - len(r)) for r in rows], device=self.device)
        with self._as("ar"):
            x = self.ar(inputs_embeds=self.ar.embed_tokens(ids), use_cache=False).last_hidden_state
        return self.head(x[torch.arange(len(rows), device=self.device), last]).float()

    def _train_ar(self, rows, h, weight):
        """Update AR on whole prompts; one forward pass gives the errors and the gradient."""
        mse, total = torch.zeros(len(rows), device=self.device), weight.sum().clamp_min(1.0)
        loss = 0.0
        for part in _by_length([len(r) for r in rows]):
            with self.autocast():
                h_hat = self._reconstruct_rows([rows[j] for j in part])
            error = reference_model.scaled_mse(h_hat, h[part])
            value = (error * weight[part]).sum() / total
            value.backward()
            mse[part], loss = error.detach(), loss + value.detach()
        return mse, {"loss": loss, "grad_norm": self._apply("ar")}

    def _train_av(self, h, ids, length, adv):
        total, kls = float(length.sum()), 0.0
        for part in _by_length(length.tolist()):
            h_i, n_i = h[part], length[part]
            width = self._width(int(n_i.max()))
            ids_i = F.pad(ids[part, :width], (0, max(0, width - ids.shape[1])))
            real = (torch.arange(ids_i.shape[1], device=self.device)[None] < n_i[:, None]).reshape(-1)
            with self.autocast():
                with self._as("ref"), torch.no_grad():
                    ref = self._hidden(self.ref, h_i, ids_i).reshape(-1, h.shape[-1])[real]
                hidden = self._hidden(self.av, h_i, ids_i).reshape(-1, h.shape[-1])[real]
            adv_i = adv[part].repeat_interleave(ids_i.shape[1])[real]

            def loss_of(logits, ids, chunk, ref=ref, adv_i=adv_i):
                with torch.no_grad():
                    ref_logits = self.ref.lm_head(ref[chunk].to(self.ref.lm_head.weight.dtype))
                return self.chunk_loss(logits, ref_logits, ids, adv_i[chunk], total, self.kl_weight)

            kls += self._backward(hidden, ids_i.reshape(-1)[real], loss_of)[1] / total
        return {"kl": kls, "av_grad_norm": self._apply("av")}

    # --- files and checks -------------------------------------------------------------------------

    def export(self) -> dict:
        """Return {"av": tree, "ar": tree} in nla_jax's layout."""
        trees: dict = {}
        for role in ("av", "ar"):
            lora: dict = {}
            for (_, name), module in sorted(self.adapted.items()):
                if role in module.a:
                    for end, factors in (("a", module.a), ("b", module.b)):
                        value = factors[role].detach().float().cpu().numpy().T
                        lora.setdefault(name, {}).setdefault(end, []).append(value)
            trees[role] = {"lora": {n: {e: np.stack(v) for e, v in ab.items()} for n, ab in lora.items()}}
        trees["ar"]["head"] = self.head.weight.detach().cpu().numpy().T.copy()
        return trees

    def check(self) -> dict:
        """Return what must agree with nla_jax's `check`. The state is not changed."""
        given = self.problem.check
        h, ids, length = (self._put(given[n]) for n in ("h_ND", "ids_NT", "length_N"))
        ids, length = ids.long(), length.long()
        rows = _unpad(given["ar_ids_NT"], given["ar_last_N"])
        with torch.no_grad(), self._float32():
            logits = self.av.lm_head(self._hidden(self.av, h, ids).float())
            logp = F.log_softmax(logits, -1).gather(-1, ids[..., None])[..., 0]
            real = torch.arange(ids.shape[1], device=self.device)[None] < length[:, None]
            out = {"logp_fp32": logp[real].tolist(), "h_fp32": self._reconstruct_rows(rows).tolist()}
        _, info = self._train_ar(rows, h, torch.ones(len(rows), device=self.device))
        out["ar"] = {k: float(v) for k, v in info.items()}
        if self.stage == "rl":
            weaker = [m.b["ref"] for m in self.adapted.values()]
            with torch.no_grad():
                kept = [p.detach().clone() for p in weaker]
                torch._foreach_mul_(weaker, 0.9)
            of_av = self._train_av(h, ids, length, self._put(given["advantage_N"]))
            with torch.no_grad():
                torch._foreach_copy_(weaker, kept)
            out["av"] = {k: float(v) for k, v in of_av.items()}
        self.reset()
        return out


def _unpad(ids_BT, last_B) -> list[list[int]]:
    return [ids[: n + 1].tolist() for ids, n in zip(ids_BT, last_B, strict=True)]


def _by_length(lengths: list[int]) -> list[list[int]]:
    """Return the rows of each microbatch: sorted by length, so that there is little padding."""
    order = np.argsort(lengths, kind="stable").tolist()
    n = -(-len(order) // -(-len(order) // ROWS))
    return [order[at : at + n] for at in range(0, len(order), n)]
