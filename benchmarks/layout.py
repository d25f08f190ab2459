"""Measure the FVE of the untrained target when it reads the last words of a text, in several forms.

    python -m benchmarks.layout --json out.json

Nothing is trained. The figures are FVE on held-out news, of the target's own state at the last token that it
reads. They are the reason that an explanation ends with the last words after an ellipsis (docs/method.md).
"""

import argparse
import json
from pathlib import Path

import jax
import numpy as np

from nla_jax import reconstructor, specs, target
from nla_jax.data import capture_requests, corpora, extract, lessons
from nla_jax.evaluate import fve
from nla_jax.evaluate.runner import Runner
from nla_jax.lm import sharded_load, weights
from nla_jax.lm import tokenizer as tok_lib

WORDS = (1, 2, 3, 4, 6, 12)
LINE = "News report on a politician's speech about trade and jobs."
FORMS = {
    "words": "{}",
    "… words": "… {}",
    "The text ends: words": "The text ends: {}",
    "line, words": LINE + "\n{}",
    "line, The text ends: words": LINE + "\nThe text ends: {}",
    "line, … words": LINE + "\n… {}",
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--target", default=weights.DEFAULT_TARGET)
    parser.add_argument("--windows", type=int, default=150)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    _, cfg, base, tok = sharded_load.open_target(args.target, "bfloat16")
    layer, lead = cfg.default_layer(), tok_lib.lead_ids(tok)
    docs = [d for d in corpora.open_corpus("news") if d.split == "heldout"]
    wanted = capture_requests.window_requests(docs, tok, positions=2, max_windows=args.windows)
    capture = jax.jit(lambda *batch: target.capture(base, cfg, layer, *batch, lead=lead))
    found = extract.capture_in_memory(
        wanted, capture, batch=16, pad_id=tok.eos_token_id or 0, label="capture"
    )
    h, texts = found["h"], found["text"]
    spec = specs.make_spec(cfg, tok, layer=layer, dtype="bfloat16", alpha=1.0)
    av = {"params": base}  # required by Runner, but AV is not used
    runner = Runner(spec, base, av, reconstructor.FROZEN, tok, "{explanation}", 64)
    variance, out = fve.variances(h), {}
    for name, form in FORMS.items():
        words = {n: [form.format(lessons.last_words(t, n)) for t in texts] for n in WORDS}
        errors = {n: fve.errors(runner.reconstruct(said, name), h, None) for n, said in words.items()}
        out[name] = {n: round(float(fve.fve(e, variance)), 3) for n, e in errors.items()}
        print(f"{name:28s}", *(f"{x:6.2f}" for x in out[name].values()), flush=True)
    if args.json:
        args.json.write_text(json.dumps({"rows": len(np.asarray(h)), "fve": out}, indent=1), "utf-8")


if __name__ == "__main__":
    main()
