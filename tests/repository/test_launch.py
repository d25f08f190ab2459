"""The launchers against stub commands that record what they were asked, and a local pod of shell commands."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

LAUNCH = Path(__file__).parent.parent.parent / "launch"
ROOT = LAUNCH.parent
STUB = """#!/bin/bash
{ printf '%s' "${0##*/}"; printf '\\t%s' "$@"; printf '\\n'; } >>"$CALLS"
[ "${@: -1}" != - ] || cat >"$CALLS.stdin"
[ "$4" != describe ] || printf '%s\\n' "$STATE"
"""
TPU = ("--name", "probe", "--zone", "us-central2-b")
RUN = ("--config", "experiments/toy.py:world", "--workdir", "/mnt/nla/toy")
GKE = ("--name", "probe", "--image", "reg/nla:1", "--type", "tpu-v5-lite-podslice", "--topology", "4x4",
       "--claim", "share", *RUN)
SLURM = ("--nodes", "2", "--gpus", "8", *RUN)


@pytest.fixture
def stubs(tmp_path, monkeypatch):
    """gcloud, kubectl, sbatch, srun and scontrol that write what they were asked into a file."""
    for name in ("gcloud", "kubectl", "sbatch", "srun", "scontrol"):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(STUB)
        path.chmod(0o755)
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    monkeypatch.delenv("NLA_EXTRAS", raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    return tmp_path / "calls"


@pytest.fixture
def without(tmp_path, monkeypatch):
    """A PATH with the ordinary tools and none of the clouds'."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("bash", "dirname", "mktemp", "tar", "cat", "sed", "rm", "mkdir"):
        found = subprocess.run(["bash", "-c", f"command -v {name}"], capture_output=True, text=True)
        (tools / name).symlink_to(found.stdout.strip())
    monkeypatch.setenv("PATH", str(tools))


def launch(script: str, *argv, **kw):
    """(exit status, stdout, stderr) of a launcher."""
    command = ["bash", str(LAUNCH / script), *map(str, argv)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, **kw)
    return done.returncode, done.stdout, done.stderr


def calls(stubs) -> list[list[str]]:
    """One list of words for each call; a line break inside an argument begins no new one."""
    text = stubs.read_text() if stubs.exists() else ""
    names = ("gcloud", "kubectl", "sbatch", "srun", "scontrol")
    out: list[str] = []
    for line in text.splitlines():
        if line.split("\t")[0] in names:
            out.append(line)
        else:
            out[-1] += "\n" + line
    return [line.split("\t") for line in out]


def refused(script, *argv) -> str:
    """The one line with which a launcher refuses."""
    status, out, err = launch(script, *argv)
    assert (status, out) == (2, "") and err.startswith("nla: ") and err.count("\n") == 1, err
    return err


@pytest.mark.parametrize("flag", ["--help", "-h"])
@pytest.mark.parametrize("script", sorted(p.name for p in LAUNCH.glob("*.sh")))
def test_help_prints_the_head_and_starts_nothing(script, flag, stubs, tmp_path, monkeypatch):
    """Not even the environment: a copy of the scripts has no .venv afterwards."""
    (tmp_path / "checkout" / "launch").mkdir(parents=True)
    for path in LAUNCH.glob("*.sh"):
        (tmp_path / "checkout" / "launch" / path.name).write_bytes(path.read_bytes())
    command = ["bash", tmp_path / "checkout" / "launch" / script, flag]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    head = [line for line in (LAUNCH / script).read_text("utf-8").splitlines() if line.startswith("#")][1:]
    assert done.returncode == 0 and done.stderr == "" and not calls(stubs)
    assert done.stdout.splitlines()[0] in [line.removeprefix("# ") for line in head[:1] + head[1:2]]
    assert "#" not in done.stdout and f"launch/{script}" in done.stdout or script == "env.sh"
    assert [p.name for p in (tmp_path / "checkout").iterdir()] == ["launch"]


def test_help_behind_two_dashes_is_for_the_command(tmp_path):
    argv = ("--processes", 1, "--devices", 1, "--logs", tmp_path, "--", "echo", "--help")
    status, _, err = launch("local_pod.sh", *argv)
    assert status == 0 and "1 processes of 1 devices" in err
    assert (tmp_path / "process-0.log").read_text("utf-8") == "--help\n"


# --- quickstart -----------------------------------------------------------------------------------

NLA = """#!/bin/bash
{ printf '%s\\t' "$@"; printf '\\n'; } >>"$CALLS"
case "$*" in
  explain*--bundle*) echo "trained here" ;;
  explain*) [ -z "${FAILS:-}" ] || { echo "nla: it ships no bundle" >&2; exit 2; }; echo "as shipped" ;;
esac
"""


@pytest.fixture
def quickstart(tmp_path, monkeypatch):
    """quickstart(*argv): (status, stdout, stderr, calls of nla) of the script in a checkout of stubs."""
    root, asked = tmp_path / "checkout", tmp_path / "asked"
    (root / "launch").mkdir(parents=True)
    (root / ".venv" / "bin").mkdir(parents=True)
    for name in ("quickstart.sh", "env.sh"):
        (root / "launch" / name).write_text((LAUNCH / name).read_text())
    (root / "setup.py").write_text("")
    for name, text in (("nla", NLA), ("python", "#!/bin/bash\n")):
        (root / ".venv" / "bin" / name).write_text(text)
        (root / ".venv" / "bin" / name).chmod(0o755)
    monkeypatch.setenv("CALLS", str(asked))
    for name in ("NLA_TARGET", "NLA_WORKDIR", "NLA_PYTHON", "NLA_EXTRAS"):
        monkeypatch.delenv(name, raising=False)

    def run(*argv):
        asked.unlink(missing_ok=True)
        done = subprocess.run(["bash", str(root / "launch" / "quickstart.sh"), *argv], capture_output=True,
                              text=True, timeout=60)
        said = [line.split("\t")[:-1] for line in asked.read_text().splitlines()]
        return done.returncode, done.stdout, done.stderr, said

    return run


def test_quickstart_explains_before_it_fetches_a_corpus(quickstart, tmp_path):
    status, out, err, (first, fetch, train, second) = quickstart("--config.rl.steps=3")
    workdir = str(tmp_path / "checkout" / "runs" / "quickstart")
    assert status == 0 and first[:2] == ["explain", "--text"] and "--bundle" not in first
    assert fetch == ["data", "fetch", "--target", "default"]
    assert train[0] == "train" and train[-3:] == ["--workdir", workdir, "--config.rl.steps=3"]
    assert second == [*first, "--bundle", f"{workdir}/bundle"]
    # Once as soon as it is there, and again beside the other one.
    assert out.count("as shipped") == 2 and out.index("as shipped") < out.index("---")
    assert out.rindex("as shipped") < out.index("trained here")
    assert "explained by the NLA that nla_jax ships, " in err and " s since the start" in err


def test_quickstart_of_first_words_alone(quickstart):
    status, out, err, said = quickstart("--first-words")
    assert (status, out, len(said)) == (0, "as shipped\n", 1)
    assert "s since the start" in err


def test_quickstart_with_another_target_trains_with_that(quickstart, monkeypatch):
    monkeypatch.setenv("NLA_TARGET", "org/model")
    status, _, _, (first, fetch, train, _) = quickstart()
    assert status == 0 and "org/model" not in first
    assert fetch[-1] == "org/model" and "--config.target=org/model" in train


def test_quickstart_ends_where_nothing_is_shipped(quickstart, monkeypatch):
    monkeypatch.setenv("FAILS", "1")
    status, out, err, said = quickstart()
    assert (status, out, len(said)) == (2, "", 1) and "ships no bundle" in err


# --- TPU VMs --------------------------------------------------------------------------------------


def test_tpu_create_start_and_delete(stubs):
    assert launch("tpu_vm.sh", "create", *TPU, "--type", "v5litepod-16", "--spot")[0] == 0
    assert launch("tpu_vm.sh", "start", *TPU, *RUN, "--", "--config.rl.steps=3", "--from", "a b")[0] == 0
    assert launch("tpu_vm.sh", "logs", *TPU, "--worker", "1")[0] == 0
    assert launch("tpu_vm.sh", "stop", *TPU)[0] == 0
    assert launch("tpu_vm.sh", "delete", *TPU, "--project", "mine")[0] == 0
    create, start, logs, stop, asked, delete = calls(stubs)
    assert asked[3:5] == ["queued-resources", "describe"]
    vm = ["gcloud", "compute", "tpus", "tpu-vm"]
    assert create == [*vm, "create", "probe", "--accelerator-type=v5litepod-16",
                      "--version=v2-alpha-tpuv5-lite", "--spot", "--zone=us-central2-b"]
    assert start[:7] == [*vm, "ssh", "probe", "--worker=all"]
    command = "nla train --distributed --config experiments/toy.py:world --workdir /mnt/nla/toy"
    assert f"nohup .venv/bin/{command} --config.rl.steps=3 --from a\\ b  >>../nla.log" in start[7]
    assert logs[6:8] == ["--worker=1", "--command=tail -n 100 -f nla.log"]
    assert stop[6:8] == ["--worker=all", "--command=kill $(cat nla.pid)"]
    assert delete == [*vm, "delete", "probe", "--quiet", "--zone=us-central2-b", "--project=mine"]


def test_tpu_install_copies_the_checkout_to_every_worker(stubs):
    assert launch("tpu_vm.sh", "install", *TPU, "--nfs", "10.0.0.2:/share")[0] == 0
    copy, install, mount = calls(stubs)
    assert copy[4] == "scp" and copy[6:8] == ["probe:nla_jax.tar.gz", "--worker=all"]
    assert "NLA_EXTRAS=tpu,gcs bash -c 'source nla_jax/launch/env.sh && nla_environment'" in install[7]
    assert "sudo mount 10.0.0.2:/share /mnt/nla" in mount[7]
    assert not Path(copy[5]).exists()


def test_tpu_install_with_a_further_extra(stubs, monkeypatch):
    monkeypatch.setenv("NLA_EXTRAS", "wandb")
    assert "NLA_EXTRAS=tpu,gcs,wandb bash -c" in launch("tpu_vm.sh", "--dry-run", "install", *TPU)[1]
    monkeypatch.setenv("NLA_EXTRAS", "a; b")
    assert "names of extras" in refused("tpu_vm.sh", "install", *TPU)


@pytest.mark.parametrize("state, verbs", [
    ("PREEMPTED", ["describe", "describe", "delete", "create", "scp", "ssh", "ssh"]),
    ("", ["describe", "describe", "create", "scp", "ssh", "ssh"]),
    ("READY", ["describe", "ssh"]),
])
def test_tpu_resume_does_what_the_state_asks_for(stubs, monkeypatch, state, verbs):
    monkeypatch.setenv("STATE", state)
    assert launch("tpu_vm.sh", "resume", *TPU, *RUN, "--type", "v6e-8")[0] == 0
    assert [c[4] for c in calls(stubs)] == verbs


def test_tpu_resume_waits_for_no_change(stubs, monkeypatch):
    monkeypatch.setenv("STATE", "CREATING")
    assert "probe is CREATING; try again" in refused("tpu_vm.sh", "resume", *TPU, *RUN, "--type", "v6e-8")


def test_tpu_dry_run_prints_every_command_and_runs_none(stubs):
    argv = ("--dry-run", "resume", *TPU, *RUN, "--type", "v5p-16", "--nfs", "10.0.0.2:/share")
    status, out, _ = launch("tpu_vm.sh", *argv)
    assert status == 0 and not stubs.exists()
    verbs = [line.split()[4] for line in out.splitlines() if line.startswith("gcloud ")]
    assert verbs == ["describe", "delete", "create", "scp", "ssh", "ssh", "ssh"]
    assert "--version=v2-alpha-tpuv5 " in out and "nla train --distributed" in out
    # What is printed is what bash would run.
    assert subprocess.run(["bash", "-n"], input=out, text=True).returncode == 0


@pytest.mark.parametrize("argv, named", [
    ((), "no action: say create, wait, install, start, logs, stop, resume or delete"),
    (("begin", *TPU), "begin: say create"),
    (("create", "stop", *TPU), "one action at a time"),
    (("create", *TPU), "create: --type is missing"),
    (("delete", "--name", "probe"), "delete: --zone is missing"),
    (("delete", "--name", "vm", "--zone", "us-central2"), "--zone us-central2: zones look like us-"),
    (("delete", "--name", "My VM", "--zone", "us-central2-b"), "--name My VM: small letters"),
    (("start", *TPU, "--workdir", "x"), "start: --config is missing"),
    (("start", *TPU, "--config", "none.py:x", "--workdir", "x"), "no config file none.py in this checkout"),
    (("install", *TPU, "--nfs", "share"), "--nfs share: it looks like 10.0.0.2:/share"),
    (("logs", *TPU, "--worker", "first"), "--worker first: a number, or all"),
    (("create", *TPU, "--kind", "v6e-8"), "unknown flag --kind"),
    (("create", *TPU, "--type"), "--type needs a value"),
    (("create", *TPU, "--type", "v5e"), "--type v5e: types look like v5e-16"),
    (("create", *TPU, "--type", "v5e-12"), "the number of chips is one of 1 4 8 16 32 64 128 256"),
    (("create", *TPU, "--type", "v5p-4"), "the number counts TensorCores"),
    (("create", *TPU, "--type", "v7x-8"), "newer TPUs come only with GKE"),
    (("create", *TPU, "--type", "v5e-8", "--flex-start", "12"), "--flex-start 12: times look like 30m"),
    (("create", *TPU, "--type", "v5e-8", "--flex-start", "1d", "--spot"), "two offers: choose one"),
    (("create", *TPU, "--type", "v4-8", "--flex-start", "1d"), "the cloud has it for v5e and v6e only"),
    (("create", *TPU, "--type", "v5e-8", "--valid-until", "6h"), "--valid-until is for --queue"),
    (("start", *TPU, *RUN, "--secrets", "hf_abc.def"), "names of variables, not their values"),
    (("start", *TPU, *RUN, "--secrets", "NLA_NO_SUCH"), "the variable NLA_NO_SUCH is not set here"),
])
def test_tpu_refuses(stubs, argv, named):
    assert named in refused("tpu_vm.sh", *argv)
    assert not stubs.exists()


@pytest.mark.parametrize("script, argv, named", [
    ("tpu_vm.sh", ("delete", *TPU), "gcloud is not on PATH"),
    ("gke.sh", GKE, "kubectl is not on PATH"),
    ("slurm.sh", SLURM, "sbatch is not on PATH"),
])
def test_a_missing_tool_is_named_and_a_dry_run_needs_none(without, script, argv, named):
    assert named in refused(script, *argv)
    status, out, err = launch(script, "--dry-run", *argv)
    assert (status, err) == (0, "") and out


@pytest.mark.parametrize("given, named, image", [  # as the cloud's documentation of November 2026 has them
    ("v5e-16", "v5litepod-16", "v2-alpha-tpuv5-lite"),
    ("v5litepod-16", "v5litepod-16", "v2-alpha-tpuv5-lite"),
    ("v6e-8", "v6e-8", "v2-alpha-tpuv6e"),
    ("v5p-16", "v5p-16", "v2-alpha-tpuv5"),
    ("v4-32", "v4-32", "tpu-ubuntu2204-base"),
])
def test_tpu_types_and_their_images(stubs, given, named, image):
    argv = ("create", *TPU, "--dry-run", "--type", given)
    status, out, err = launch("tpu_vm.sh", *argv)
    vm = "gcloud compute tpus tpu-vm create probe"
    assert (status, err) == (0, "")
    assert out.split() == [*vm.split(), f"--accelerator-type={named}", f"--version={image}",
                           "--zone=us-central2-b"]
    assert "--version=mine --zone" in launch("tpu_vm.sh", *argv, "--version", "mine")[1]


def test_a_dry_run_without_an_action_is_of_create(without):
    status, out, err = launch("tpu_vm.sh", "--dry-run", "--type", "v5e-16")
    assert (status, err) == (0, "")
    assert out.startswith("gcloud compute tpus tpu-vm create my-tpu --accelerator-type=v5litepod-16 ")


def test_tpu_queued_requests(stubs):
    """A queued resource, spot or not, and flex-start; then `wait` and `delete` for the request."""
    argv = ("create", *TPU, "--type", "v5e-16")
    assert launch("tpu_vm.sh", *argv, "--queue", "--spot", "--valid-until", "6h")[0] == 0
    assert launch("tpu_vm.sh", *argv, "--flex-start", "12h", "--project", "mine")[0] == 0
    assert launch("tpu_vm.sh", "delete", *TPU, "--queue")[0] == 0
    spot, flex, delete = calls(stubs)
    asked = ["--node-id=probe", "--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite"]
    create = ["compute", "tpus", "queued-resources", "create", "probe", *asked]
    assert spot == ["gcloud", *create, "--spot", "--valid-until-duration=6h", "--zone=us-central2-b"]
    assert flex == ["gcloud", "alpha", *create, "--provisioning-model=flex-start", "--max-run-duration=12h",
                    "--zone=us-central2-b", "--project=mine"]
    assert delete[4:] == ["delete", "probe", "--force", "--quiet", "--zone=us-central2-b"]


def test_tpu_deletes_the_request_of_a_queued_vm(stubs, monkeypatch):
    monkeypatch.setenv("STATE", "ACTIVE")
    assert launch("tpu_vm.sh", "wait", *TPU)[0] == 0
    assert launch("tpu_vm.sh", "delete", *TPU)[0] == 0
    assert [c[3:5] for c in calls(stubs)] == [["queued-resources", verb] for verb in
                                              ("describe", "describe", "delete")]
    monkeypatch.setenv("STATE", "SUSPENDED")
    assert "the queued request probe is SUSPENDED; delete it" in refused("tpu_vm.sh", "wait", *TPU)


def test_tpu_resume_of_a_queued_vm_waits_before_it_installs(stubs):
    argv = ("--dry-run", "resume", *TPU, *RUN, "--type", "v6e-16", "--queue", "--spot")
    status, out, _ = launch("tpu_vm.sh", *argv)
    said = [line.split()[3:5] for line in out.splitlines() if line.startswith("gcloud ")]
    queue, vm = "queued-resources", "tpu-vm"
    assert status == 0 and said == [[vm, "describe"], [queue, "delete"], [queue, "create"],
                                    [queue, "describe"], [vm, "scp"], [vm, "ssh"], [vm, "ssh"]]


def test_tpu_secrets_are_in_no_command(stubs, tmp_path, monkeypatch):
    """They travel in a file that only its owner can read, and that is gone here afterwards."""
    monkeypatch.setenv("HF_TOKEN", "hf_s3cr't $x")
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    keep = f'cp -p "$5" {tmp_path / "sent"}\n'
    (tmp_path / "bin" / "gcloud").write_text(STUB + f'[ "$4" != scp ] || {keep}')
    argv = ("start", *TPU, *RUN, "--secrets", "HF_TOKEN")
    status, out, err = launch("tpu_vm.sh", *argv)
    copy, start = calls(stubs)
    assert status == 0 and copy[6:8] == ["probe:.nla_secrets", "--worker=all"]
    assert start[7].index(". ../.nla_secrets") < start[7].index("nohup")
    assert "s3cr" not in out + err + stubs.read_text() and not list((tmp_path / "tmp").iterdir())
    sent = tmp_path / "sent"
    assert sent.stat().st_mode & 0o777 == 0o600
    said = subprocess.run(["bash", "-c", f'. {sent}; printf %s "$HF_TOKEN"'], capture_output=True, text=True)
    assert said.stdout == "hf_s3cr't $x"
    status, out, err = launch("tpu_vm.sh", "--dry-run", *argv)
    assert status == 0 and "s3cr" not in out + err and "probe:.nla_secrets" in out


# --- GKE ------------------------------------------------------------------------------------------


def test_gke_applies_a_jobset(stubs):
    assert launch("gke.sh", *GKE, "--spot", "--", '--config.data.corpus=file:a "b"')[0] == 0
    assert calls(stubs) == [["kubectl", "apply", "-f", "-"]]
    jobset = yaml.safe_load(stubs.with_suffix(".stdin").read_text())
    assert (jobset["kind"], jobset["metadata"]["name"]) == ("JobSet", "probe")
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert job["parallelism"] == job["completions"] == 4
    pod = job["template"]["spec"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "4x4",
        "cloud.google.com/gke-spot": "true",
    }
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    command = ["bash", "nla", "train", "--distributed", *RUN, '--config.data.corpus=file:a "b"']
    assert container["args"][1:] == command
    assert pod["volumes"][0]["persistentVolumeClaim"] == {"claimName": "share"}


def test_gke_gives_a_secret_to_the_run():
    """By its name; the manifest has no value. Without --secret there is no such entry."""
    pods = []
    for argv in (("--secret", "tokens"), ()):
        _, out, _ = launch("gke.sh", "--dry-run", *GKE, *argv)
        job = yaml.safe_load(out)["spec"]["replicatedJobs"][0]["template"]["spec"]
        pods.append(job["template"]["spec"]["containers"][0])
    assert pods[0].pop("envFrom") == [{"secretRef": {"name": "tokens"}}]
    assert pods[0] == pods[1]


def gke_script(tmp_path, work: str, **kw):
    """The container's own script around the command `work`, as a process."""
    _, out, _ = launch("gke.sh", "--dry-run", *GKE)
    job = yaml.safe_load(out)["spec"]["replicatedJobs"][0]["template"]["spec"]
    script = job["template"]["spec"]["containers"][0]["args"][0]
    env = os.environ | {"NLA_WORKDIR": str(tmp_path)}
    return subprocess.Popen(["bash", "-c", script, "bash", "bash", "-c", work], env=env, **kw)


def test_gke_counts_a_stopped_run_as_a_failure(tmp_path):
    """SIGTERM reaches the run; only a run that is over ends the job well."""
    waits = 'trap "exit 0" TERM; echo ready; while :; do sleep 0.05; done'
    process = gke_script(tmp_path, waits, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    process.terminate()
    process.communicate()
    assert process.returncode not in (0, -signal.SIGTERM)
    (tmp_path / "summary.json").write_text("{}")
    assert gke_script(tmp_path, "exit 0").wait() == 0
    assert gke_script(tmp_path, "exit 3").wait() == 3


def test_gke_dry_run_on_one_host_without_spot(stubs):
    argv = [*GKE[:7], "2x2x1", *GKE[8:]]
    status, out, _ = launch("gke.sh", "--dry-run", *argv)
    job = yaml.safe_load(out)["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert status == 0 and not stubs.exists() and job["parallelism"] == 1
    assert "gke-spot" not in out and "@" not in out.split("apiVersion")[1].replace('"$@"', "")


@pytest.mark.parametrize("argv, named", [
    (GKE[2:], "--name is missing"),
    ((*GKE, "--topology", "4by4"), "--topology 4by4: it looks like 4x4"),
    ((*GKE, "--topology", "3x3"), "9 chips are not a multiple of 4 a host"),
    ((*GKE, "--chips-per-host", "3"), "--chips-per-host 3: 1, 4 or 8"),
    ((*GKE, "--workdir", "runs/x"), "--workdir runs/x: it must lie in /mnt/nla"),
    ((*GKE, "--config", "none.py"), "no config file none.py"),
    ((*GKE, "now"), "unknown argument now"),
    ((*GKE, "--secret", "HF_TOKEN=x"), "the name of a Kubernetes secret, not a value"),
])
def test_gke_refuses(stubs, argv, named):
    assert named in refused("gke.sh", *argv)
    assert not stubs.exists()


# --- Slurm ----------------------------------------------------------------------------------------


def test_slurm_submits_itself(stubs, tmp_path):
    argv = ("--nodes", 2, "--gpus", 8, "--config", "experiments/toy.py:w", "--workdir", tmp_path / "run")
    assert launch("slurm.sh", *argv, "--partition", "p", "--", "--config.rl.steps=3")[0] == 0
    (batch,) = calls(stubs)
    for word in ("--nodes=2", "--ntasks-per-node=8", "--gpus-per-node=8", "--signal=TERM@120", "--requeue"):
        assert word in batch
    assert "--partition=p" in batch and not any(w.startswith("--account") for w in batch)
    assert batch[batch.index(str(LAUNCH / "slurm.sh")) :] == [
        str(LAUNCH / "slurm.sh"), "--job", str(ROOT), str(tmp_path / "run"),
        "--config", str(ROOT / "experiments" / "toy.py:w"), "--config.rl.steps=3",
    ]


def test_slurm_job_goes_on_until_the_run_is_over(stubs, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    job = ("slurm.sh", "--job", ROOT, tmp_path, "--config", "x.py")
    assert launch(*job)[0] == 0
    (tmp_path / "summary.json").write_text("{}")
    assert launch(*job)[0] == 0
    srun = ["srun", "--kill-on-bad-exit=1", ".venv/bin/nla", "train", "--distributed", "--workdir",
            str(tmp_path), "--config", "x.py"]
    assert calls(stubs) == [srun, ["scontrol", "requeue", "17"], srun]


@pytest.mark.parametrize("argv, named", [
    (SLURM[2:], "--nodes is missing: give a number"),
    ((*SLURM, "--gpus", "two"), "--gpus two: give a number"),
    ((*SLURM, "--config", "none.py"), "none.py; see experiments/"),
    ((*SLURM, "--queue", "x"), "unknown argument --queue"),
])
def test_slurm_refuses(stubs, argv, named):
    assert named in refused("slurm.sh", *argv)
    assert not stubs.exists()


# --- a pod on this machine ------------------------------------------------------------------------


def local_pod(tmp_path, command, processes=2):
    argv = ["bash", LAUNCH / "local_pod.sh", "--processes", processes, "--devices", 3]
    argv += ["--logs", tmp_path / "logs", "--", "bash", "-c", command]
    # What a shell starts in the background ignores SIGINT, and bash hands that on: here it must be heard.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(
            [str(a) for a in argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
    finally:
        signal.signal(signal.SIGINT, before)


def logs_of(tmp_path) -> list[str]:
    return [p.read_text() for p in sorted((tmp_path / "logs").glob("*.log"))]


def test_local_pod_tells_each_process_who_it_is(tmp_path):
    told = "NLA_DISTRIBUTED NLA_COORDINATOR NLA_PROCESSES NLA_PROCESS JAX_PLATFORMS XLA_FLAGS"
    process = local_pod(tmp_path, f'for n in {told}; do echo "${{!n}}"; done', processes=3)
    out, err = process.communicate()
    assert process.returncode == 0 and "3 processes of 3 devices" in err
    assert out == logs_of(tmp_path)[0]
    for i, text in enumerate(logs_of(tmp_path)):
        on, coordinator, number, me, platform, flags = text.splitlines()
        assert (on, number, me, platform) == ("1", "3", str(i), "cpu")
        assert coordinator.startswith("127.0.0.1:")
        assert flags.endswith("--xla_force_host_platform_device_count=3")


def test_local_pod_ends_with_the_first_failure(tmp_path):
    process = local_pod(tmp_path, '[ "$NLA_PROCESS" = 0 ] && exec sleep 600; exit 7')
    _, err = process.communicate()
    assert process.returncode == 7
    assert f"process 1 ended with status 7; its log is {tmp_path / 'logs' / 'process-1.log'}" in err
    assert gone(tmp_path)


def gone(tmp_path) -> bool:
    """Whether every process of the pod has ended."""
    pids = [int(p.read_text()) for p in (tmp_path / "logs").glob("*.pid")]
    found = ["ps", "-o", "pid=", *(f"-p{pid}" for pid in pids)]
    alive = subprocess.run(found, capture_output=True, text=True)
    return len(pids) == 2 and alive.stdout.split() == []


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_local_pod_passes_a_signal_on(tmp_path, number, status):
    process = local_pod(tmp_path, 'trap "echo saved; exit 0" TERM; echo ready; while :; do sleep 0.05; done')
    while sum("ready" in text for text in logs_of(tmp_path)) < 2:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    process.communicate()
    assert process.returncode == status
    assert logs_of(tmp_path) == ["ready\nsaved\n"] * 2 and gone(tmp_path)


def test_local_pod_kills_at_the_second_signal(tmp_path):
    process = local_pod(tmp_path, 'trap "echo no" TERM; echo ready; while :; do sleep 0.05; done')
    for said in ("ready", "no"):
        while sum(said in text for text in logs_of(tmp_path)) < 2:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
    process.communicate()
    assert process.returncode == 128 + signal.SIGKILL and gone(tmp_path)


@pytest.mark.parametrize("argv, named", [
    (("--processes", "2", "--", "true"), "--devices is missing: give a number"),
    (("--processes", "0", "--devices", "1", "--", "true"), "--processes 0: give a number"),
    (("--processes", "2", "--devices", "2"), "no command"),
    (("--processes", "2", "--devices", "2", "true"), "unknown argument true"),
    (("--processes", "2", "--devices", "2", "--", "no-such-tool"), "no-such-tool: command not found"),
])
def test_local_pod_refuses(argv, named):
    assert named in refused("local_pod.sh", *argv)
