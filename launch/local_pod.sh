#!/usr/bin/env bash
# Run one command as a pod on this machine: P processes with D fake CPU devices each.
#
#   bash launch/local_pod.sh --processes P --devices D [--logs DIR] -- COMMAND ...
#   bash launch/local_pod.sh --processes 2 --devices 4 -- nla train --config experiments/toy.py --workdir runs/toy
#
# The output of process 0 is shown. DIR/process-I.log has the output of process I, and DIR/process-I.pid
# its id (default DIR: a new temporary directory). If a process fails, the others are killed, because they
# would wait for it, and the script exits with its status. Ctrl-C and SIGTERM are passed on as SIGTERM,
# on which `nla train` saves and ends; a second Ctrl-C kills.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
nla_help "${BASH_SOURCE[0]}" "$@"

processes="" devices="" logs=""
while [ $# -gt 0 ]; do
  case $1 in
    --processes | --devices | --logs)
      [ $# -gt 1 ] || nla_die "$1 needs a value"
      printf -v "${1#--}" %s "$2"
      shift 2
      ;;
    --) shift && break ;;
    *) nla_die "unknown argument $1; local_pod.sh --processes P --devices D [--logs DIR] -- COMMAND ..." ;;
  esac
done
for name in processes devices; do
  [[ ${!name} =~ ^[1-9][0-9]*$ ]] || nla_die "--$name ${!name:-is missing}: give a number, at least 1"
done
[ $# -gt 0 ] || nla_die "no command; local_pod.sh --processes P --devices D [--logs DIR] -- COMMAND ..."

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
[ ! -d "$root/.venv/bin" ] || PATH=$root/.venv/bin:$PATH
command -v "$1" >/dev/null || nla_die "$1: command not found; bash launch/test.sh makes .venv, which has nla"
logs=${logs:-$(mktemp -d -t nla_pod.XXXXXX)}
mkdir -p "$logs"

python=$(nla_find_python) || exit 2
port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
export JAX_PLATFORMS=cpu XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=$devices"
export NLA_DISTRIBUTED=1 NLA_COORDINATOR=127.0.0.1:$port NLA_PROCESSES=$processes

pids=() shown=0 stopped=""
signal_all() { kill "-$1" "${pids[@]}" 2>/dev/null || true; }
# shellcheck disable=SC2329  # called by the traps
on_signal() {  # exit status
  if [ -n "$stopped" ]; then signal_all KILL; else signal_all TERM; fi
  stopped=$1
}
trap 'on_signal 130' INT
trap 'on_signal 0' TERM
trap 'signal_all KILL' EXIT
show() {  # what process 0 has printed since the last call
  local size
  size=$(wc -c <"$logs/process-0.log")
  # head may end before tail, which then gets SIGPIPE.
  tail -c "+$((shown + 1))" "$logs/process-0.log" | head -c "$((size - shown))" || true
  shown=$size
}

for ((i = 0; i < processes; i++)); do
  NLA_PROCESS=$i "$@" >"$logs/process-$i.log" 2>&1 </dev/null &
  pids+=($!)
  printf '%s\n' "$!" >"$logs/process-$i.pid"
done
nla_say "$processes processes of $devices devices; logs in $logs"

status=0 running=("${!pids[@]}")
while [ ${#running[@]} -gt 0 ]; do
  sleep 0.2
  show
  left=()
  for i in "${running[@]}"; do
    if kill -0 "${pids[$i]}" 2>/dev/null; then
      left+=("$i")
      continue
    fi
    code=0
    wait "${pids[$i]}" 2>/dev/null || code=$?
    if [ "$code" -ne 0 ] && [ "$status" -eq 0 ]; then
      status=$code
      nla_say "process $i ended with status $code; its log is $logs/process-$i.log"
      signal_all KILL
    fi
  done
  running=(${left[@]+"${left[@]}"})
done
show
[ "$status" -ne 0 ] || status=${stopped:-0}
exit "$status"
