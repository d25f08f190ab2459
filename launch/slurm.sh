#!/usr/bin/env bash
# Start a run on a Slurm cluster with GPUs, one process per GPU. It needs sbatch; the job runs this file, too.
#
#   bash launch/slurm.sh --nodes 2 --gpus 8 --config experiments/X.py --workdir DIR [--partition P]
#     [--account A] [--time 24:00:00] [--name N] [--dry-run] [-- NLA FLAGS]
#
# --gpus is the number per node. All nodes must share the file system of DIR and of the checkout with its
# .venv (NLA_EXTRAS=cuda bash launch/test.sh makes it). Two minutes before the time limit, and on preemption,
# the run saves and ends, and the job requeues itself until the run is finished. --dry-run prints the sbatch
# command. The log is DIR/slurm.log.
set -euo pipefail

if [ "${1:-}" = --job ]; then  # inside the job, where Slurm runs a copy of this file from another directory
  root=$2 workdir=$3
  shift 3
  trap : TERM  # Slurm also sends SIGTERM to the processes, which handle it
  cd "$root"
  srun --kill-on-bad-exit=1 .venv/bin/nla train --distributed --workdir "$workdir" "$@"
  [ -f "$workdir/summary.json" ] || scontrol requeue "$SLURM_JOB_ID"
  exit
fi

source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
nla_help "${BASH_SOURCE[0]}" "$@"
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

nodes="" gpus="" config="" workdir="" partition="" account="" time=24:00:00 name=nla dry=""
while [ $# -gt 0 ]; do
  case $1 in
    --nodes | --gpus | --config | --workdir | --partition | --account | --time | --name)
      [ $# -gt 1 ] || nla_die "$1 needs a value"
      printf -v "${1#--}" %s "$2"
      shift 2
      ;;
    --dry-run) dry=yes && shift ;;
    --) shift && break ;;
    *) nla_die "unknown argument $1; bash launch/slurm.sh --help lists the flags" ;;
  esac
done
for flag in nodes gpus; do
  [[ ${!flag} =~ ^[1-9][0-9]*$ ]] || nla_die "--$flag ${!flag:-is missing}: give a number, at least 1"
done
for flag in config workdir; do [ -n "${!flag}" ] || nla_die "--$flag is missing"; done
[[ $config == /* ]] || config=$root/$config
[ -f "${config%%:*}" ] || nla_die "no config file ${config%%:*}; see experiments/"
[[ $workdir == /* ]] || workdir=$PWD/$workdir

batch=(sbatch --job-name="$name" --nodes="$nodes" --ntasks-per-node="$gpus" --gpus-per-node="$gpus"
  --time="$time" --signal=TERM@120 --requeue --open-mode=append --output="$workdir/slurm.log"
  ${partition:+"--partition=$partition"} ${account:+"--account=$account"}
  "$root/launch/slurm.sh" --job "$root" "$workdir" --config "$config" "$@")
if [ -n "$dry" ]; then
  printf '%q ' "${batch[@]}" && printf '\n'
  exit
fi
command -v sbatch >/dev/null || nla_die "sbatch is not on PATH; run this on a login node of the cluster"
mkdir -p "$workdir"
"${batch[@]}"
