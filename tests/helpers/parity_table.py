"""The table of docs/models.md: how far every family is from transformers, measured anew.

    python -m tests.helpers.parity_table docs/models.md

writes the table between the marks of an existing page (and prints it without a page). It needs the
`test` extra, about 2 GiB, and some minutes of one CPU core.
"""

import os
import re
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax.numpy as jnp

from nla_jax.lm import model
from tests.helpers import family_pairs

BEGIN, END = "<!-- table -->\n", "<!-- end of table -->\n"
COLUMNS = (
    "model", "tokens", "logits, fp32", "hidden, fp32", "logits, bf16", "hidden, bf16", "cached decoding",
)


def row(pair: family_pairs.Pair) -> list[str]:
    """One family's line: errors over both paddings, relative to the root mean square."""
    low, sides = model.cast(pair.params, jnp.bfloat16), ("right", "left")
    columns = [
        max(family_pairs.logits_errors(pair, params, side)[0] for side in sides)
        if what == "logits"
        else max(family_pairs.hidden_error(pair, params, side) for side in sides)
        for params in (pair.params, low)
        for what in ("logits", "hidden")
    ]
    tokens = int(family_pairs.LENGTHS.sum()) * len(sides)
    return [pair.name, str(tokens), *(f"{e:.1e}" for e in (*columns, family_pairs.decoding_error(pair)))]


def table(folder: Path) -> str:
    lines = [COLUMNS, ["---", *["---:"] * (len(COLUMNS) - 1)]]
    lines += [row(family_pairs.made(name, folder)) for name in family_pairs.CASES]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main(argv: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        made = table(Path(folder))
    print(made, end="")
    if argv:
        page = Path(argv[0])
        text = page.read_text(encoding="utf-8")
        if not re.search(f"{BEGIN}.*{END}", text, re.S):
            raise SystemExit(f"{page} has no place for the table: {BEGIN.strip()} ... {END.strip()}")
        text = re.sub(f"{BEGIN}.*{END}", lambda _: f"{BEGIN}\n{made}\n{END}", text, flags=re.S)
        page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
