#!/usr/bin/env bash
# Manage a run on a Cloud TPU VM, with one host or many, by gcloud.
#
#   bash launch/tpu_vm.sh create  --name N --zone Z --type v5e-16 [--spot] [--queue | --flex-start 12h]
#   bash launch/tpu_vm.sh wait    --name N --zone Z      until a queued request is granted
#   bash launch/tpu_vm.sh install --name N --zone Z [--nfs SERVER:/PATH]
#   bash launch/tpu_vm.sh start   --name N --zone Z --config experiments/X.py --workdir DIR [-- NLA FLAGS]
#   bash launch/tpu_vm.sh logs    --name N --zone Z [--worker I]
#   bash launch/tpu_vm.sh stop    --name N --zone Z      saves after its step; start resumes from there
#   bash launch/tpu_vm.sh resume  all flags above: recreates a VM that was preempted, and starts the run
#   bash launch/tpu_vm.sh delete  --name N --zone Z      the VM, and its queued request if it has one
#
# --type is v5e-N or v6e-N (N chips), or v5p-N or v4-N (N TensorCores, two to a chip), or the cloud's own name
# (v5litepod-16). It chooses the runtime image; --version V names another. --spot asks for capacity that may
# be preempted. --queue asks by a queued resource, which is granted when there is capacity. --flex-start TIME
# asks by one for that time (30m, 12h, 7d at most) on v5e or v6e; Google calls it a preview. --valid-until TIME
# withdraws a queued request that was not granted in that time. --secrets HF_TOKEN,WANDB_API_KEY with start or
# resume copies these variables of your environment to the workers, in a file that only you can read there.
#
# --dry-run prints every command and runs none; without an action it prints that of create. --project P is
# passed to gcloud. `install` copies this checkout, with uncommitted changes, and makes its .venv on every
# worker; NLA_EXTRAS=wandb before the command adds an extra. With several hosts, --workdir must be on storage
# that all of them share: gs://BUCKET/PATH, or a directory, such as the share that --nfs mounts at /mnt/nla
# (for example Filestore). Use shared storage for a single host, too, if the VM may be preempted or deleted,
# because its disk is deleted with it.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
nla_help "${BASH_SOURCE[0]}" "$@"
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

action="" name="" zone="" type="" version="" nfs="" config="" workdir="" worker=0 project="" spot="" dry=""
queue="" flex_start="" valid_until="" secrets=""
while [ $# -gt 0 ]; do
  case $1 in
    --name | --zone | --type | --version | --nfs | --config | --workdir | --worker | --project | \
      --flex-start | --valid-until | --secrets)
      [ $# -gt 1 ] || nla_die "$1 needs a value"
      flag=${1#--}
      printf -v "${flag//-/_}" %s "$2"
      shift 2
      ;;
    --spot) spot=yes && shift ;;
    --queue) queue=yes && shift ;;
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

if [ -n "$dry" ] && [ -z "$action" ]; then action=create name=${name:-my-tpu} zone=${zone:-us-west4-a}; fi

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

queued() {  # arguments: gcloud's verb for queued resources and its arguments. The request has the VM's name.
  local verb=$1
  shift
  run gcloud ${flex_start:+alpha} compute tpus queued-resources "$verb" "$name" "$@" --zone="$zone" \
    ${project:+"--project=$project"}
}

queue_state() { queued describe --format="value(state.state)" 2>/dev/null; }

on_workers() { tpu ssh "$name" --worker="$1" --command="$2"; }

# Names and images are those of https://cloud.google.com/tpu/docs/runtimes (and /v5e, /v6e, /v5p, /v4), queued
# resources and flex-start those of /tpu/docs/queued-resources and /tpu/docs/request-using-flex-start.
resolve_type() {  # set `type` to the cloud's name of the accelerator, and `version` to its image
  local size=${type##*-} image sizes=""
  [[ $size =~ ^[1-9][0-9]*$ ]] || nla_die "--type $type: types look like v5e-16, v6e-8, v5p-8, v4-8"
  case $type in
    v5e-* | v5litepod-*) type=v5litepod-$size image=v2-alpha-tpuv5-lite sizes=" 1 4 8 16 32 64 128 256 " ;;
    v6e-*) image=v2-alpha-tpuv6e sizes=" 1 4 8 16 32 64 128 256 " ;;
    v5p-*) image=v2-alpha-tpuv5 ;;
    v4-* | v3-* | v2-*) image=tpu-ubuntu2204-base ;;
    *) nla_die "--type $type: v5e, v6e, v5p, v4, v3 or v2; newer TPUs come only with GKE (launch/gke.sh)" ;;
  esac
  if [ -n "$sizes" ]; then
    [[ $sizes == *" $size "* ]] || nla_die "--type $type: the number of chips is one of$sizes"
  else
    [ $((size % 8)) -eq 0 ] || nla_die "--type $type: the number counts TensorCores, so it is a multiple of 8"
  fi
  version=${version:-$image}
}

check_request() {  # fail if the flags of `create` exclude each other
  local flag
  if [ -n "$flex_start" ]; then
    [ -z "$spot" ] || nla_die "--flex-start and --spot are two offers: choose one"
    [[ $type == v5litepod-* || $type == v6e-* ]] || nla_die "--flex-start: the cloud has it for v5e and v6e only"
    queue=yes
  fi
  [ -z "$valid_until" ] || [ -n "$queue" ] || nla_die "--valid-until is for --queue and --flex-start"
  for flag in flex_start valid_until; do
    [ -z "${!flag}" ] || [[ ${!flag} =~ ^[1-9][0-9]*[smhd]$ ]] ||
      nla_die "--${flag//_/-} ${!flag}: times look like 30m, 12h, 7d"
  done
}

create() {
  if [ -z "$queue" ]; then
    tpu create "$name" --accelerator-type="$type" --version="$version" ${spot:+--spot}
  else
    queued create --node-id="$name" --accelerator-type="$type" --runtime-version="$version" ${spot:+--spot} \
      ${flex_start:+--provisioning-model=flex-start "--max-run-duration=$flex_start"} \
      ${valid_until:+"--valid-until-duration=$valid_until"}
  fi
}

await() {  # until the queued request is granted
  local state
  if [ -n "$dry" ]; then
    queued describe --format="value(state.state)"
    return
  fi
  while :; do
    state=$(queue_state) || nla_die "there is no queued request $name in $zone; create --queue makes one"
    case $state in
      ACTIVE) return ;;
      FAILED | SUSPENDING | SUSPENDED) nla_die "the queued request $name is $state; delete it, and create another" ;;
    esac
    nla_say "$name is $state; asking again in a minute"
    sleep 60
  done
}

remove() {  # the VM; with its queued request, which would otherwise keep the name
  if [ -n "$queue" ] || { [ -z "$dry" ] && [ -n "$(queue_state)" ]; }; then
    queued delete --force --quiet
  else
    tpu delete "$name" --quiet
  fi
}

send_secrets() {  # write the variables that --secrets names into a file of the workers
  local file secret
  [ -n "$secrets" ] || return 0
  file=$(mktemp -t nla_secrets.XXXXXX)  # only its owner may read it; scp keeps that
  # shellcheck disable=SC2064
  trap "rm -f '$file'" EXIT
  for secret in ${secrets//,/ }; do
    [ -z "$dry" ] || break
    printf 'export %s=%q\n' "$secret" "${!secret}" >>"$file"  # builtins: nothing is in a process list
  done
  tpu scp "$file" "$name:.nla_secrets" --worker=all
  rm -f "$file"
}

check_secrets() {
  local secret
  for secret in ${secrets//,/ }; do
    [[ $secret =~ ^[A-Za-z_][A-Za-z_0-9]*$ ]] || nla_die "--secrets takes names of variables, not their values"
    [ -n "${!secret:-}" ] || nla_die "--secrets: the variable $secret is not set here"
  done
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
    NLA_EXTRAS=tpu,gcs${NLA_EXTRAS:+,$NLA_EXTRAS} bash -c 'source nla_jax/launch/env.sh && nla_environment'"
  [ -z "$nfs" ] || on_workers all "set -e
    sudo apt-get -q -y install nfs-common && sudo mkdir -p /mnt/nla
    mountpoint -q /mnt/nla || sudo mount $(printf %q "$nfs") /mnt/nla
    sudo chmod a+rwx /mnt/nla"
}

start() {  # arguments: flags of nla
  local command
  command=$(printf '%q ' .venv/bin/nla train --distributed --config "$config" --workdir "$workdir" "$@")
  send_secrets
  on_workers all "cd nla_jax || exit
    if [ -f ../.nla_secrets ]; then chmod 600 ../.nla_secrets; . ../.nla_secrets; fi
    if kill -0 \$(cat ../nla.pid 2>/dev/null) 2>/dev/null; then echo 'nla: already running here' >&2; exit 1; fi
    nohup $command >>../nla.log 2>&1 </dev/null & echo \$! >../nla.pid"
}

checks_of_start() {
  needs config workdir
  config=${config#"$root/"}
  [ -f "$root/${config%%:*}" ] || nla_die "no config file ${config%%:*} in this checkout; see experiments/"
}

create_and_install() {
  create
  if [ -n "$queue" ]; then await; fi
  install
}

resume() {
  local state
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
      remove
      create_and_install
      ;;
    "")
      if [ -z "$dry" ] && [ -n "$(queue_state)" ]; then queued delete --force --quiet; fi
      create_and_install
      ;;
    *) nla_die "$name is $state; try again when that is over" ;;
  esac
  start "$@"
}

case $action in
  create | wait | install | start | logs | stop | resume | delete) ;;
  *) nla_die "${action:-no action}: say create, wait, install, start, logs, stop, resume or delete" ;;
esac
needs name zone
[[ $name =~ ^[a-z]([a-z0-9-]*[a-z0-9])?$ ]] || nla_die "--name $name: small letters, digits and dashes"
[[ $zone =~ ^[a-z]+-[a-z]+[0-9]+-[a-z]$ ]] || nla_die "--zone $zone: zones look like us-central2-b"
[[ $worker =~ ^([0-9]+|all)$ ]] || nla_die "--worker $worker: a number, or all"
[ -z "$nfs" ] || [[ $nfs =~ ^[^:]+:/ ]] || nla_die "--nfs $nfs: it looks like 10.0.0.2:/share"
case $action in create | resume) needs type && resolve_type && check_request ;; esac
[ -z "$flex_start" ] || queue=yes
[ "$action" != start ] || checks_of_start
check_secrets
[[ ${NLA_EXTRAS:-} =~ ^[a-z,]*$ ]] || nla_die "NLA_EXTRAS=$NLA_EXTRAS: names of extras, such as wandb"
[ -n "$dry" ] || command -v gcloud >/dev/null || nla_die "gcloud is not on PATH; install the Google Cloud CLI"

case $action in
  start | resume) "$action" "$@" ;;
  logs) on_workers "$worker" "tail -n 100 -f nla.log" ;;
  stop) on_workers all "kill \$(cat nla.pid)" ;;
  wait) await ;;
  delete) remove ;;
  *) "$action" ;;
esac
