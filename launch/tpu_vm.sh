#!/usr/bin/env bash
# Manage a run on a Cloud TPU VM, with one host or many, by gcloud.
#
#   bash launch/tpu_vm.sh create  --name N --zone Z --type v5litepod-16 [--version V] [--spot]
#   bash launch/tpu_vm.sh install --name N --zone Z [--nfs SERVER:/PATH]
#   bash launch/tpu_vm.sh start   --name N --zone Z --config experiments/X.py --workdir DIR [-- NLA FLAGS]
#   bash launch/tpu_vm.sh logs    --name N --zone Z [--worker I]
#   bash launch/tpu_vm.sh stop    --name N --zone Z      saves after its step; start resumes from there
#   bash launch/tpu_vm.sh resume  all flags above: recreates a VM that was preempted, and starts the run
#   bash launch/tpu_vm.sh delete  --name N --zone Z
#
# --dry-run prints every command and runs none; --project P is passed to gcloud. `install` copies this
# checkout, with uncommitted changes, and makes its .venv on every worker. With several hosts, --workdir must
# be on storage that all of them share: gs://BUCKET/PATH, or a directory, such as the share that --nfs mounts
# at /mnt/nla (for example Filestore). Use shared storage for a single host, too, if the VM may be preempted
# or deleted, because its disk is deleted with it.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
nla_help "${BASH_SOURCE[0]}" "$@"
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

action="" name="" zone="" type="" version="" nfs="" config="" workdir="" worker=0 project="" spot="" dry=""
while [ $# -gt 0 ]; do
  case $1 in
    --name | --zone | --type | --version | --nfs | --config | --workdir | --worker | --project)
      [ $# -gt 1 ] || nla_die "$1 needs a value"
      printf -v "${1#--}" %s "$2"
      shift 2
      ;;
    --spot) spot=yes && shift ;;
    --dry-run) dry=yes && shift ;;
    --) shift && break ;;
    -*) nla_die "unknown flag $1; bash launch/tpu_vm.sh --help lists them" ;;
    *)
      [ -z "$action" ] || nla_die "one action at a time: $action or $1"
      action=$1
      shift
      ;;
  esac
done

needs() {  # fail if a flag that the action needs is missing
  local flag
  for flag in "$@"; do [ -n "${!flag}" ] || nla_die "$action: --$flag is missing"; done
}

run() {
  if [ -n "$dry" ]; then
    printf '%q ' "$@" && printf '\n'
  else
    "$@"
  fi
}

tpu() {  # arguments: gcloud's verb and its arguments
  local verb=$1
  shift
  run gcloud compute tpus tpu-vm "$verb" "$@" --zone="$zone" ${project:+"--project=$project"}
}

on_workers() { tpu ssh "$name" --worker="$1" --command="$2"; }

create() {
  needs type
  case ${version:+given}$type in
    given*) ;;
    v5litepod-*) version=v2-alpha-tpuv5-lite ;;
    v5p-*) version=v2-alpha-tpuv5 ;;
    v6e-*) version=v2-alpha-tpuv6e ;;
    *) version=tpu-ubuntu2204-base ;;
  esac
  tpu create "$name" --accelerator-type="$type" --version="$version" ${spot:+--spot}
}

install() {
  local archive
  archive=$(mktemp -t nla_jax.XXXXXX)
  run tar -czf "$archive" -C "$root" --exclude=./.git --exclude=./.venv --exclude=./runs --exclude=__pycache__ .
  tpu scp "$archive" "$name:nla_jax.tar.gz" --worker=all
  rm -f "$archive"
  on_workers all "set -e
    command -v python3.11 >/dev/null || { sudo apt-get -q update; sudo apt-get -q -y install python3.11 python3.11-venv; }
    mkdir -p nla_jax && tar -xzf nla_jax.tar.gz -C nla_jax
    NLA_EXTRAS=tpu,gcs bash -c 'source nla_jax/launch/env.sh && nla_environment'"
  [ -z "$nfs" ] || on_workers all "set -e
    sudo apt-get -q -y install nfs-common && sudo mkdir -p /mnt/nla
    mountpoint -q /mnt/nla || sudo mount $(printf %q "$nfs") /mnt/nla
    sudo chmod a+rwx /mnt/nla"
}

start() {  # arguments: flags of nla
  local command
  command=$(printf '%q ' .venv/bin/nla train --distributed --config "$config" --workdir "$workdir" "$@")
  on_workers all "cd nla_jax || exit
    if kill -0 \$(cat ../nla.pid 2>/dev/null) 2>/dev/null; then echo 'nla: already running here' >&2; exit 1; fi
    nohup $command >>../nla.log 2>&1 </dev/null & echo \$! >../nla.pid"
}

checks_of_start() {
  needs config workdir
  config=${config#"$root/"}
  [ -f "$root/${config%%:*}" ] || nla_die "no config file ${config%%:*} in this checkout; see experiments/"
}

resume() {
  local state
  needs type
  checks_of_start
  if [ -n "$dry" ]; then
    tpu describe "$name" --format="value(state)"
    state=PREEMPTED
  else
    state=$(tpu describe "$name" --format="value(state)" 2>/dev/null) || state=""
  fi
  case $state in
    READY) ;;
    PREEMPTED | TERMINATED | STOPPED)
      tpu delete "$name" --quiet
      create && install
      ;;
    "") create && install ;;
    *) nla_die "$name is $state; try again when that is over" ;;
  esac
  start "$@"
}

case $action in
  create | install | start | logs | stop | resume | delete) ;;
  *) nla_die "${action:-no action}: say create, install, start, logs, stop, resume or delete" ;;
esac
needs name zone
[[ $name =~ ^[a-z]([a-z0-9-]*[a-z0-9])?$ ]] || nla_die "--name $name: small letters, digits and dashes"
[[ $zone =~ ^[a-z]+-[a-z]+[0-9]+-[a-z]$ ]] || nla_die "--zone $zone: zones look like us-central2-b"
[[ $worker =~ ^([0-9]+|all)$ ]] || nla_die "--worker $worker: a number, or all"
[ -z "$nfs" ] || [[ $nfs =~ ^[^:]+:/ ]] || nla_die "--nfs $nfs: it looks like 10.0.0.2:/share"
[ "$action" != start ] || checks_of_start
[ -n "$dry" ] || command -v gcloud >/dev/null || nla_die "gcloud is not on PATH; install the Google Cloud CLI"

case $action in
  start | resume) "$action" "$@" ;;
  logs) on_workers "$worker" "tail -n 100 -f nla.log" ;;
  stop) on_workers all "kill \$(cat nla.pid)" ;;
  delete) tpu delete "$name" --quiet ;;
  *) "$action" ;;
esac
