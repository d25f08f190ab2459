"""Official data files: into a store and out of one, refused where they are wrong, and a run from them."""

import copy
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from nla_jax import cli
from nla_jax.data import store
from nla_jax.data.splits import keyed_hash
from nla_jax.errors import UserError
from nla_jax.evaluate import probe_table
from nla_jax.interchange import data_sidecar, parquet
from nla_jax.interchange.export_data import export_split
from nla_jax.interchange.import_data import import_files
from nla_jax.pipeline import grounding, stages
from tests.helpers import official, world

OLD, NEW = ("actor", "critic"), ("av", "ar")
ROWS = {
    "av_sft": [official.row(d, p) for d in range(10) for p in (50, 61, 72)],
    "ar_sft": [official.row(d, p) for d in range(10, 20) for p in (50, 61)],
    "rl": [official.row(d, p) for d in range(20, 40) for p in (55, 66)],
    "held": [official.row(d, p) for d in range(40, 46) for p in (55, 77)],
}


def write_all(directory: Path, **options) -> dict[str, Path]:
    return {
        name: official.write(
            directory / f"{name}.parquet", "av_sft" if name == "held" else name, rows, **options
        )
        for name, rows in ROWS.items()
    }


def imported(files: dict[str, Path], out: Path, **options) -> Path:
    import_files(
        [files[n] for n in ("av_sft", "ar_sft", "rl")], out, heldout=[files["held"]], label="", **options
    )
    return out


@pytest.fixture
def files(tmp_path):
    return write_all(tmp_path)


def same_rows(columns: dict, rows: list[dict], *, explained: bool = True) -> None:
    assert columns["doc_id"] == [r["doc_id"] for r in rows]
    assert columns["position"].tolist() == [r["n_raw_tokens"] - 1 for r in rows]
    assert columns["text"] == [r["detokenized_text_truncated"] for r in rows]
    assert columns["explanation"] == [r["api_explanation"] if explained else "" for r in rows]
    assert columns["next_text"] == [""] * len(rows)
    np.testing.assert_array_equal(
        columns["h"].view(np.uint32), np.stack([r["activation_vector"] for r in rows]).view(np.uint32)
    )


# --- in -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("names", "fixed"), [(OLD, True), (NEW, False)])
def test_files_become_splits(tmp_path, names, fixed):
    out = imported(write_all(tmp_path, names=names, fixed=fixed), tmp_path / "store", rows_per_shard=16)
    same_rows(store.load_columns(out, "warm"), ROWS["av_sft"] + ROWS["ar_sft"])
    same_rows(store.load_columns(out, "rl"), ROWS["rl"], explained=False)
    same_rows(store.load_columns(out, "heldout"), ROWS["held"])
    meta = store.read_meta(out)
    assert meta["splits"]["warm"]["shards"] == 4 and meta["drops"] == {}
    facts = meta["interchange"]
    assert facts["templates"] == {"av": official.AV, "ar": official.AR}
    assert facts["tokens"] == {**official.TOKENS, "critic_suffix_ids": [1318, 29]}
    assert facts["extraction"] == official.sidecar("rl", 1)["extraction"]
    assert (meta["plan"]["layer"], meta["plan"]["target"]) == (3, "")


def test_a_share_is_held_out_by_document(tmp_path, files):
    trained = [files[n] for n in ("av_sft", "ar_sft", "rl")]
    meta = import_files(trained, tmp_path / "a", heldout_share=0.3, heldout_rows=0, label="")
    docs = {
        s: set(store.load_columns(tmp_path / "a", s, ["doc_id"])["doc_id"]) for s in ("warm", "rl", "heldout")
    }
    every = {r["doc_id"] for n in ("av_sft", "ar_sft", "rl") for r in ROWS[n]}
    assert docs["heldout"] == {d for d in every if keyed_hash("heldout", d) < 0.3 * 2.0**64}
    assert set.union(*docs.values()) == every and sum(map(len, docs.values())) == len(every)
    # Another order and fewer files: the same documents. A cap keeps some of the rows and trains on none.
    capped = import_files(trained[::-1][:2], tmp_path / "b", heldout_share=0.3, heldout_rows=5, label="")
    some = set(store.load_columns(tmp_path / "b", "heldout", ["doc_id"])["doc_id"])
    assert some <= docs["heldout"] and capped["splits"]["heldout"]["rows"] == 5
    assert capped["drops"] == {"held-out rows beyond the number asked for": 2 * len(docs["heldout"] - {
        r["doc_id"] for r in ROWS["av_sft"]}) - 5}
    assert not set(store.load_columns(tmp_path / "b", "rl", ["doc_id"])["doc_id"]) & docs["heldout"]
    assert meta["drops"] == {}
    assert store.split_notes(meta) == store.split_notes(capped) == {"heldout": store.IN_DISTRIBUTION}


def test_held_out_documents_are_never_trained_on(tmp_path, files):
    shared = official.write(tmp_path / "shared.parquet", "rl", ROWS["rl"][:8] + ROWS["held"][:3])
    meta = import_files([files["av_sft"], shared], tmp_path / "s", heldout=[files["held"]], label="")
    assert meta["drops"] == {"in a held-out document": 3} and store.split_notes(meta) == {}
    same_rows(store.load_columns(tmp_path / "s", "rl"), ROWS["rl"][:8], explained=False)


def test_base_files_go_where_our_own_documents_would(tmp_path):
    rows = ROWS["av_sft"] + ROWS["rl"]
    path = official.write(tmp_path / "base.parquet", "base", rows)
    import_files([path], tmp_path / "s", heldout_share=0.2, heldout_rows=0, warm_fraction=0.5, label="")
    rest = [r for r in rows if keyed_hash("heldout", r["doc_id"]) >= 0.2 * 2.0**64]
    warm = [r for r in rest if keyed_hash("split", r["doc_id"]) < 0.5 * 2.0**64]
    same_rows(store.load_columns(tmp_path / "s", "warm"), warm)
    same_rows(store.load_columns(tmp_path / "s", "rl"), [r for r in rest if r not in warm])


# --- refused --------------------------------------------------------------------------------------


def changed(**deep) -> dict:
    """A sidecar of the rl file with "block.key" = value; `...` takes the key out."""
    out = official.sidecar("rl", len(ROWS["rl"]))
    for path, value in deep.items():
        *blocks_, key = path.split("__")
        block = out
        for name in blocks_:
            block = block[name]
        block[key] = value
        if value is ...:
            del block[key]
    return out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "nla_model"}, "kind is 'nla_model', not 'nla_dataset'"),
        ({"schema_version": 2}, "schema_version is 2, not 1"),
        ({"stage": "sft"}, "stage is 'sft', not one of base, av_sft, ar_sft, rl"),
        ({"row_count": 7}, "has 40 rows, but its sidecar says row_count 7"),
        ({"row_count": True}, "row_count is True, not int"),
        ({"extraction__d_model": 9}, "the vectors have 8 numbers, but the sidecar says d_model 9"),
        ({"extraction__norm": "unit"}, "norm is 'unit': only raw vectors"),
        ({"extraction__base_model": ...}, "extraction: base_model is missing"),
        ({"extraction__hidden": 1}, "extraction: unknown key 'hidden'"),
        ({"extraction__corpus_slice__end": 1}, "corpus_slice: unknown key 'end'"),
        ({"extraction__layer_index": 4}, "row 0 is of layer 3, but the sidecar says layer_index 4"),
        ({"extraction__injection_scale": -1}, "injection_scale is -1, not a positive number"),
        ({"tokens__pm_id": 1}, "tokens: unknown key 'pm_id'"),
        ({"tokens": ...}, "tokens is missing"),
        ({"prompt_templates__judge": "x"}, "prompt_templates: unknown key 'judge'"),
        ({"prompt_templates__actor": "no field"}, "must hold {injection_char} once"),
        ({"prompt_templates__actor": ...}, "the av template is missing"),
        ({"prompt_templates__av": "another {injection_char}"}, "av and actor are two names of one template"),
        ({"prompt_templates__actor": "Other: {injection_char}"}, "row 0: the prompt is not one user message"),
        ({"api_summaries": {"models": "x"}}, "api_summaries: unknown key 'models'"),
    ],
)
def test_sidecars_that_do_not_fit(tmp_path, files, change, message):
    official.write_sidecar(files["rl"], changed(**change))
    with pytest.raises(UserError) as e:
        import_files([files["rl"]], tmp_path / "s", heldout_share=0.3, label="")
    line = str(e.value)
    assert message in line and "\n" not in line and str(files["rl"]) in line
    assert not store.is_complete(tmp_path / "s")


def test_unknown_keys_beside_the_blocks_are_ignored(tmp_path, files):
    official.write_sidecar(files["rl"], changed(extra={"x": 1}, another=[1]))
    assert data_sidecar.read(files["rl"]).row_count == 40


def vector(**places):
    """Rows of the rl file with the vector of some row replaced."""
    rows = copy.deepcopy(ROWS["rl"])
    for place, v in places.items():
        rows[int(place[1:])]["activation_vector"] = v
    return rows


@pytest.mark.parametrize(
    ("rows", "fixed", "message"),
    [
        (
            vector(_9=np.r_[np.ones(7), np.nan].astype(np.float32)),
            True,
            "row 9: the activation is not finite",
        ),
        (vector(_31=np.full(8, np.inf, np.float32)), False, "row 31: the activation is not finite"),
        (vector(_8=np.zeros(8, np.float32)), True, "row 8: the activation is zero"),
        (
            vector(_5=np.ones(7, np.float32)),
            False,
            "row 5: the vector has 7 numbers, but the sidecar says d_model 8",
        ),
        (vector(_3=None), True, "row 3: there is no vector"),
        (vector(_3=None), False, "row 3: there is no vector"),
    ],
)
def test_vectors_that_cannot_be_used(tmp_path, files, rows, fixed, message):
    official.write(files["rl"], "rl", rows, fixed=fixed)
    with pytest.raises(UserError, match=f"^{files['rl']}: {message}"):
        import_files([files["rl"]], tmp_path / "s", heldout=[files["held"]], label="")


def set_column(path: Path, name: str, values) -> None:
    old = pq.read_table(path)
    if values is None:
        pq.write_table(old.drop_columns([name]), path)
    else:
        pq.write_table(old.set_column(old.schema.get_field_index(name), name, values), path)


@pytest.mark.parametrize(
    ("file", "column", "values", "message"),
    [
        ("rl", "doc_id", None, "column 'doc_id' is missing"),
        ("rl", "doc_id", pa.array(range(40)), "column 'doc_id' has type int64, not string"),
        ("rl", "doc_id", pa.array([None] * 40, pa.string()), "column 'doc_id' has rows without a value"),
        (
            "rl",
            "prompt",
            pa.array(["x"] * 40),
            "column 'prompt' has type string, not list of {role, content}",
        ),
        ("rl", "n_raw_tokens", pa.array([0] * 40), "row 0: n_raw_tokens is 0"),
        ("rl", "activation_vector", pa.array([1.0] * 40), "has type double, not a list of floats"),
        ("av_sft", "response", None, "column 'response' is missing (stage av_sft)"),
        (
            "av_sft",
            "response",
            pa.array(["<explanation>cut"] * 30),
            "row 0: no explanation can be read in column",
        ),
        (
            "ar_sft",
            "prompt",
            pa.array(["<text>x</text>"] * 20),
            "row 0: no explanation can be read in column",
        ),
    ],
)
def test_columns_that_do_not_fit(tmp_path, files, file, column, values, message):
    set_column(files[file], column, values)
    with pytest.raises(UserError) as e:
        imported(files, tmp_path / "s")
    assert str(e.value).startswith(f"{files[file]}: ") and message in str(e.value)


def test_files_that_do_not_belong_together(tmp_path, files):
    for key, value in [("base_model", "Org/Other"), ("layer_index", 4)]:
        official.write_sidecar(files["rl"], changed(**{f"extraction__{key}": value}))
        with pytest.raises(
            UserError, match=f"do not belong together: {key} is .* in the first and {value!r}"
        ):
            imported(files, tmp_path / "s")
    official.write_sidecar(files["rl"], changed(tokens__injection_token_id=7))
    with pytest.raises(UserError, match="injection_token_id is 149705 in the first and 7 in the second"):
        imported(files, tmp_path / "s")
    official.write_sidecar(files["rl"], changed())
    both = official.write(tmp_path / "both.parquet", "rl", ROWS["av_sft"][:3])
    with pytest.raises(UserError, match="'web:train:0' goes to warm by .* and to rl by .*both.parquet"):
        import_files([files["av_sft"], both], tmp_path / "s", heldout=[files["held"]], label="")
    with pytest.raises(UserError, match="none of 20 documents is in the held-out share of 1e-06"):
        import_files([files["rl"]], tmp_path / "s", heldout_share=1e-6, label="")
    assert not (tmp_path / "s").exists()


def test_missing_and_damaged_files(tmp_path, files):
    with pytest.raises(UserError, match="nowhere.parquet does not exist"):
        parquet.open_file(tmp_path / "nowhere.parquet")
    whole = files["rl"].read_bytes()
    files["rl"].write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="not a whole parquet file"):
        parquet.open_file(files["rl"])
    files["rl"].write_bytes(whole[:200] + bytes(len(whole) // 2) + whole[200 + len(whole) // 2 :])
    with pytest.raises(UserError, match="damaged"):
        imported(files, tmp_path / "s")
    files["rl"].write_bytes(whole)
    data_sidecar.path_of(files["rl"]).unlink()
    with pytest.raises(UserError, match="nla_meta.yaml is missing"):
        imported(files, tmp_path / "s2")


# --- stopped, and large ---------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from nla_jax.data import store_writer
from nla_jax.interchange.import_data import import_files
write, seen = store_writer.Writer.write_shard, []
def fatal(*a):
    if len(seen) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    seen.append(write(*a))
store_writer.Writer.write_shard = fatal
*files, held, out = sys.argv[1:]
import_files(files, out, heldout=[held], rows_per_shard=8, label="")
"""


def python(code: str, *argv) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", code, *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent.parent)


def test_a_killed_import_goes_on_at_the_shard(tmp_path, files):
    order = [files[n] for n in ("av_sft", "ar_sft", "rl")]
    assert python(KILLED, *order, files["held"], tmp_path / "s").returncode == -signal.SIGKILL
    with pytest.raises(UserError, match="unfinished"):
        store.read_meta(tmp_path / "s")
    made = {p.name: p.stat().st_ino for p in (tmp_path / "s").glob("*.array_record*")}
    assert len(made) == 4
    imported(files, tmp_path / "s", rows_per_shard=8)
    whole = imported(files, tmp_path / "whole", rows_per_shard=8)
    assert {n: (tmp_path / "s" / n).stat().st_ino for n in made} == made
    assert store.read_meta(tmp_path / "s") == store.read_meta(whole)
    for split in ("warm", "rl", "heldout"):
        a, b = (store.load_columns(d, split) for d in (tmp_path / "s", whole))
        assert all(np.array_equal(a[name], b[name]) for name in a)
    with pytest.raises(UserError, match="already complete"):
        imported(files, tmp_path / "s")


def test_other_files_do_not_go_on_with_an_import(tmp_path, files):
    order = [files[n] for n in ("av_sft", "ar_sft", "rl")]
    assert python(KILLED, *order, files["held"], tmp_path / "s").returncode == -signal.SIGKILL
    official.write(files["rl"], "rl", ROWS["rl"][2:])
    with pytest.raises(UserError, match=r"begun with other settings \(imported\)"):
        imported(files, tmp_path / "s", rows_per_shard=8)


def write_large(path: Path, n: int, d: int = 64) -> Path:
    """n rows in ONE row group, as files are that were merged from parts."""
    rng = np.random.default_rng(0)
    h = rng.normal(size=(n, d)).astype(np.float32)
    content = official.AV.format(injection_char="<INJECT>")
    messages = pa.array([[{"role": "user", "content": content}]] * n, parquet.MESSAGES)
    pq.write_table(
        pa.table(
            {
                "prompt": messages,
                "activation_vector": pa.FixedSizeListArray.from_arrays(pa.array(h.reshape(-1)), d),
                "n_raw_tokens": pa.array(np.full(n, 60)),
                "activation_layer": pa.array(np.full(n, 3)),
                "doc_id": pa.array([f"web:train:{i // 10}" for i in range(n)]),
                "detokenized_text_truncated": pa.array([f"{i} " * 250 for i in range(n)]),
            }
        ),
        path,
        row_group_size=n,
    )
    official.write_sidecar(path, official.sidecar("rl", n, d=d))
    return path


PEAK = """
import resource, sys
from pathlib import Path
from nla_jax.interchange.export_data import export_split
from nla_jax.interchange.import_data import import_files
file, out, back = sys.argv[1:]
import_files([file], out, heldout_share=0.01, label="")
export_split(out, "rl", "rl", back, label="")
about = Path("/proc/self/status")
if about.is_file():  # ru_maxrss begins with what the parent had when it forked
    print(int(about.read_text().split("VmHWM:")[1].split()[0]) // 1024)
else:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 2**20)
"""


def test_memory_does_not_grow_with_the_rows(tmp_path):
    peak = {}
    few, many = 5_000, 35_000
    for n in (few, many):
        file = write_large(tmp_path / f"{n}.parquet", n)
        done = python(PEAK, file, tmp_path / f"s{n}", tmp_path / f"back{n}.parquet")
        assert done.returncode == 0, done.stderr
        peak[n] = int(done.stdout)
        kept = store.read_meta(tmp_path / f"s{n}")["splits"]["rl"]["rows"]
        assert pq.read_metadata(tmp_path / f"back{n}.parquet").num_rows == kept > 0.9 * n
    # 30,000 rows more have 8 MB of vectors and 45 MB of text.
    assert peak[many] - peak[few] < 25, peak


# --- out, and back --------------------------------------------------------------------------------


def exported(directory: Path, out: Path, bundle="") -> dict[str, Path]:
    """Every split of a store as the file of a stage."""
    wanted = {"warm": "av_sft", "rl": "rl", "heldout": "base"}
    for split, stage in wanted.items():
        export_split(directory, split, stage, out / f"{split}.parquet", bundle_directory=bundle, label="")
    return {split: out / f"{split}.parquet" for split in wanted}


def test_out_and_back_is_equal(finished, tmp_path):
    run = finished / "run"
    there = exported(run / "data", tmp_path, run / "bundle")
    back = tmp_path / "store"
    import_files([there["warm"], there["rl"]], back, heldout=[there["heldout"]], label="")
    for split in there:
        ours, again = (store.load_columns(d, split) for d in (run / "data", back))
        rows = range(len(ours["h"]))
        if split == "warm":
            rows = [i for i in rows if ours["explanation"][i]]
            assert 0 < len(rows) < len(ours["h"])
        for name, column in ours.items():
            np.testing.assert_array_equal(np.array([column[i] for i in rows]), np.array(again[name]))
        assert np.array_equal(ours["h"][list(rows)].view(np.uint32), again["h"].view(np.uint32))
    # And once more, from what the import knows: the same rows and the same facts.
    (tmp_path / "b").mkdir()
    twice = exported(back, tmp_path / "b")
    for split, path in there.items():
        assert pq.read_table(path).equals(pq.read_table(twice[split]))
        a, b = official.read_sidecar(path), official.read_sidecar(twice[split])
        ignored = ("created_at", "parent_datasets")
        assert {k: v for k, v in a.items() if k not in ignored} == {
            k: v for k, v in b.items() if k not in ignored
        }
        facts = data_sidecar.read(path).facts()
        assert facts == data_sidecar.read(twice[split]).facts() and facts["base_fingerprint"]


def test_exported_files_are_as_the_contract_says(finished, tmp_path):
    run = finished / "run"
    columns = store.load_columns(run / "data", "warm")
    said = [i for i, z in enumerate(columns["explanation"]) if z]
    bundle = yaml.safe_load((run / "bundle" / "nla_meta.yaml").read_text("utf-8"))
    content = bundle["prompt_templates"]["av"].replace("{marker}", "<INJECT>")
    for stage in data_sidecar.DATA_STAGES:
        path = tmp_path / f"{stage}.parquet"
        counts = export_split(run / "data", "warm", stage, path, bundle_directory=run / "bundle", label="")
        found, meta = pq.read_table(path), official.read_sidecar(path)
        rows = said if stage.endswith("sft") else range(len(columns["h"]))
        assert meta["row_count"] == counts["rows"] == len(found) == len(rows)
        assert counts["without explanation"] == len(columns["h"]) - len(rows)
        D = columns["h"].shape[1]
        kinds = {name: found.schema.field(name).type for name in found.column_names}
        assert kinds["activation_vector"] == pa.list_(pa.float32(), D)
        assert kinds["n_raw_tokens"] == kinds["activation_layer"] == pa.int64()
        assert found["n_raw_tokens"].to_pylist() == [columns["position"][i] + 1 for i in rows]
        assert set(found["activation_layer"].to_pylist()) == {bundle["extraction"]["layer_index"]}
        ids = found["doc_id"].to_pylist()
        assert all(len(i.rsplit(":", 2)) == 3 and i.rsplit(":", 1)[1].isdigit() for i in ids)
        pairs = {(i, columns["doc_id"][r]) for i, r in zip(ids, rows, strict=True)}
        assert len(pairs) == len(set(ids)) == len({columns["doc_id"][r] for r in rows})
        texts = [columns["explanation"][i] for i in rows]
        if stage == "ar_sft":
            ar = bundle["prompt_templates"]["ar"]
            assert found["prompt"].to_pylist() == [ar.replace("{explanation}", t) for t in texts]
        elif stage != "base":
            assert kinds["prompt"] == parquet.MESSAGES
            assert found["prompt"].to_pylist() == [[{"role": "user", "content": content}]] * len(rows)
        if stage == "av_sft":
            assert found["response"].to_pylist() == [f"<explanation>\n{t}\n</explanation>" for t in texts]
        if stage != "base":
            assert meta["tokens"] == bundle["tokens"]
            actor = meta["prompt_templates"]["actor"].format(injection_char="<INJECT>")
            assert actor == content
    (tmp_path / "b").mkdir()
    # AR's file comes back as well as AV's.
    import_files([tmp_path / "ar_sft.parquet"], tmp_path / "s", heldout_share=0.4, heldout_rows=0, label="")
    again = [store.load_columns(tmp_path / "s", s) for s in ("warm", "heldout")]
    h = np.concatenate([c["h"] for c in again])
    by_row = {h_D.tobytes(): z for c in again for h_D, z in zip(c["h"], c["explanation"], strict=True)}
    assert len(h) == len(said) and all(
        by_row[columns["h"][i].tobytes()] == columns["explanation"][i] for i in said
    )


def test_half_an_export_is_none(finished, tmp_path):
    run, out = finished / "run", tmp_path / "rl.parquet"
    code = f"""
import os, signal, sys
from nla_jax.interchange import export_data
{{}}
export_data.export_split(*sys.argv[1:4], {str(out)!r}, bundle_directory=sys.argv[4], label="")
"""
    die = "lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)"
    for line in (f"os.replace = {die}", f"export_data.data_sidecar.write = {die}"):
        done = python(code.format(line), run / "data", "rl", "rl", run / "bundle")
        assert done.returncode == -signal.SIGKILL, done.stderr
        with pytest.raises(UserError, match="does not exist|nla_meta.yaml is missing"):
            parquet.open_file(out)
    with pytest.raises(UserError, match="rl.parquet exists; delete it"):
        export_split(run / "data", "rl", "rl", out, bundle_directory=run / "bundle")
    out.unlink()
    export_split(run / "data", "rl", "rl", out, bundle_directory=run / "bundle", label="")
    assert parquet.open_file(out).meta.row_count == len(pq.read_table(out))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["rl.parquet", "rl.parquet.nla_meta.yaml"]


def test_exports_that_cannot_be(finished, tmp_path, files):
    run = finished / "run"
    out, known = tmp_path / "x.parquet", {"bundle_directory": run / "bundle"}
    for argv, options, message in [
        ((run / "data", "warm", "sft", out), known, "no stage 'sft'"),
        ((run / "data", "test", "rl", out), known, "no split 'test': it has heldout, ood, rl, warm"),
        ((run / "data", "rl", "av_sft", out), known, "no row of split 'rl' has an explanation"),
        ((run / "data", "rl", "rl", tmp_path / "x"), known, "give a .parquet file"),
        ((run / "data", "rl", "rl", tmp_path / "no" / "x.parquet"), known, "in an existing directory"),
        ((run / "data", "rl", "rl", out), {}, "give a bundle that was trained on it with --bundle"),
        ((tmp_path, "rl", "rl", out), known, "no activations here"),
        ((imported(files, tmp_path / "s"), "rl", "rl", out), known, "activations of another model or layer"),
    ]:
        with pytest.raises(UserError) as e:
            export_split(*argv, **options)
        assert message in str(e.value) and not out.exists()


# --- a run ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bare(finished, tmp_path_factory):
    """The data of `finished` by way of files that hold no more than official ones must: no texts."""
    here = tmp_path_factory.mktemp("bare")
    run = finished / "run"
    there = exported(run / "data", here, run / "bundle")
    for path in there.values():
        kept = pq.read_table(path)
        ours = [n for n in kept.column_names if n.startswith("nla_jax_")]
        pq.write_table(kept.drop_columns([*ours, "detokenized_text_truncated"]), path)
        meta = yaml.safe_load(data_sidecar.path_of(path).read_text("utf-8"))
        del meta["nla_jax"]  # the target is known by name only
        official.write_sidecar(path, meta)
    import_files([there["warm"], there["rl"]], here / "store", heldout=[there["heldout"]], label="")
    return here / "store"


def run_config(finished, bare, **changes):
    c = world.config(finished)
    c.data.store = str(bare)
    # Prompts and marker come from the files.
    c.av_template = c.ar_template = ""
    c.lessons_ar.steps = 0
    for key, value in changes.items():
        c.update_from_flattened_dict({key.replace("__", "."): value})
    return c


def test_a_run_from_imported_data(finished, bare, tmp_path, quick, monkeypatch):
    summary = stages.run(run_config(finished, bare), tmp_path / "run")
    assert summary["rows"] == {s: a["rows"] for s, a in store.read_meta(bare)["splits"].items()}
    assert summary["notes"] == {}  # its held-out documents are those of files that hold no others
    old, new = ({f["name"] for f in s["rl"]["heldout"]} for s in (
        json.loads((finished / "run" / "summary.json").read_text("utf-8")), summary))
    # The imported rows come without their texts.
    assert new == old - {"last_word", "last_word_greedy", "last_words_back_2", "last_words_back_3"}
    ours, theirs = (yaml.safe_load((d / "bundle" / "nla_meta.yaml").read_text("utf-8"))
                    for d in (tmp_path / "run", finished / "run"))
    for key in ("prompt_templates", "tokens", "base_fingerprint"):
        assert ours[key] == theirs[key]
    assert store.read_meta(tmp_path / "run" / "data")["plan"]["target"] == ours["base_fingerprint"]
    # Where a figure needs the text that was read, there is none, and what it would need is not fetched.
    unfetched = probe_table.PROBES["retrieval"]._replace(fetch=lambda: None)
    monkeypatch.setitem(probe_table.PROBES, "retrieval", unfetched)
    probes = ["round_trip", "surface", "recurrence", "form", "patch", "retrieval"]
    found = grounding.evaluate_bundle(tmp_path / "run" / "bundle", probes=probes, batch=8)
    names = {f.name for f in found["heldout"].figures}
    assert {"fve", "fve_written", "fve_quotes_only"} <= names
    missing = (
        "quotes_verbatim",
        "fve_last_",
        "beyond_last_",
        "kl_",
        "loss_",
        "recurring",
        "retrieval",
        "suffix",
    )
    assert not [n for n in names if n.startswith(missing)]
    # The data set can go; the run keeps what it took.
    shutil.move(bare, tmp_path / "elsewhere")
    try:
        again = stages.run(run_config(finished, bare), tmp_path / "run", only="extract")
    finally:
        shutil.move(tmp_path / "elsewhere", bare)
    assert again["rows"] == summary["rows"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer": 1}, "its activations are of layer 0, not 1"),
        ({"lessons_ar__steps": 2}, "no row of the store has its text, which reading lessons need"),
        ({"data__store": "nowhere"}, "no activations here"),
    ],
)
def test_runs_that_the_data_do_not_fit(finished, bare, tmp_path, quick, changes, message):
    with pytest.raises(UserError, match=message):
        stages.run(run_config(finished, bare, **changes), tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()


def edited(bare: Path, to: Path, **changes) -> Path:
    """A copy of a store whose meta says something else."""
    shutil.copytree(bare, to)
    meta = json.loads((to / store.META).read_text("utf-8"))
    for path, value in changes.items():
        *parts, key = path.split("__")
        block = meta
        for name in parts:
            block = block[name]
        if value is ...:
            del block[key]
        else:
            block[key] = value
    (to / store.META).write_text(json.dumps(meta), "utf-8")
    return to


def test_stores_of_other_models(finished, bare, tmp_path, quick):
    for i, (change, message) in enumerate(
        [
            (
                {"interchange__base_model": "Org/Other"},
                "base_model 'Org/Other', the target is .*/target'; if that",
            ),
            ({"plan__target": "0" * 16}, "its activations are of other weights than"),
            ({"plan__d_model": 64}, "its vectors have 64 numbers"),
            ({"splits__rl": ...}, "has no split 'rl', which this run needs"),
            ({"interchange__tokens__injection_token_id": 5}, "marker and neighbours have the ids"),
            ({"interchange__tokens__critic_suffix_ids": [1, 2]}, "AR prompts end with the ids"),
        ]
    ):
        other = edited(bare, tmp_path / f"{i}", **change)
        with pytest.raises(UserError, match=message):
            stages.run(run_config(finished, other), tmp_path / "run")
    # Named so, it is the same model.
    other = edited(bare, tmp_path / "named", interchange__base_model="Org/Other")
    c = run_config(finished, other, data__base_model="Org/Other")
    assert stages.run(c, tmp_path / "run", only="extract")["rows"]["rl"] > 0


def test_explanations_that_no_suffix_follows(finished, tmp_path):
    """Files of our own template, where AR's prompt is the bare explanation: ids [] go out and come back."""
    bare, path = world.frozen_bundle(finished, tmp_path / "bundle"), tmp_path / "ar.parquet"
    stored = finished / "run" / "data"
    export_split(stored, "warm", "ar_sft", path, bundle_directory=bare)
    meta = parquet.open_file(path).meta
    assert meta.tokens.critic_suffix_ids == () and meta.templates.ar == "{explanation}"
    said = pq.read_table(path)["prompt"].to_pylist()
    written = [e for e in store.load_columns(stored, "warm", ["explanation"])["explanation"] if e]
    assert sorted(said) == sorted(written)
    held = tmp_path / "held.parquet"
    export_split(stored, "heldout", "av_sft", held, bundle_directory=bare)
    import_files([path], tmp_path / "store", heldout=[held])
    again = tmp_path / "again.parquet"
    export_split(tmp_path / "store", "warm", "ar_sft", again)
    assert parquet.open_file(again).meta.tokens == meta.tokens
    # Where words follow the explanation, a file without their ids is refused as before.
    side = official.read_sidecar(path)
    side["prompt_templates"]["critic"] = "{explanation} <summary>"
    official.write_sidecar(path, side)
    with pytest.raises(UserError, match="critic_suffix_ids is missing"):
        parquet.open_file(path)


# --- the command line -----------------------------------------------------------------------------


def test_commands(finished, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli, "_use_cache", lambda: None)
    run, there = finished / "run", tmp_path / "held.parquet"
    argv = ("data", "export", "--store", run / "data", "--bundle", run / "bundle")
    for split, stage, path in (("heldout", "av_sft", there), ("rl", "rl", tmp_path / "rl.parquet")):
        assert world.nla(*argv, "--split", split, "--stage", stage, "--out", path) == 0
        assert json.loads(capsys.readouterr().out)["rows"] == parquet.open_file(path).meta.row_count
    argv = ("data", "import", tmp_path / "rl.parquet", "--out", tmp_path / "s", "--heldout", there)
    assert world.nla(*argv) == 0
    out = json.loads(capsys.readouterr().out)
    assert out["splits"].keys() == {"heldout", "rl"} and out["left out"] == out["notes"] == {}
    assert world.nla(*argv) == 2
    assert capsys.readouterr().err.splitlines() == [
        f"nla: {tmp_path / 's'}: already complete; delete it to import again, or choose another --out"
    ]
