#!/usr/bin/env bash
# Start a run on a GKE TPU slice: fill in launch/gke_jobset.yaml and apply it.
#
#   bash launch/gke.sh --name N --image IMAGE --type tpu-v5-lite-podslice --topology 4x4 --claim CLAIM \
#     --config experiments/X.py --workdir /mnt/nla/X [--chips-per-host 4] [--spot] [--secret S] [--dry-run]
#     [-- NLA FLAGS]
#
# IMAGE is made from this checkout, and pushed to where the cluster finds it:
#   docker build -t IMAGE --build-arg EXTRAS=tpu,gcs . && docker push IMAGE
# S is a secret of the cluster, whose values become variables of the run, such as HF_TOKEN for gated models
# (made by `kubectl create secret generic S --from-file=HF_TOKEN`, so that no value is in a process list).
# CLAIM, a ReadWriteMany volume, is mounted at /mnt/nla; --workdir must be there, or be gs://BUCKET/PATH.
# After a preemption the run is restarted and resumes. --dry-run prints the manifest. `kubectl logs -f -l
# jobset.sigs.k8s.io/jobset-name=N` shows its log, `kubectl delete jobset N` ends it.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
nla_help "${BASH_SOURCE[0]}" "$@"
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

name="" image="" type="" topology="" claim="" config="" workdir="" chips_per_host=4 spot=false dry="" secret=""
while [ $# -gt 0 ]; do
  case $1 in
    --name | --image | --type | --topology | --claim | --config | --workdir | --chips-per-host | --secret)
      [ $# -gt 1 ] || nla_die "$1 needs a value"
      flag=${1#--}
      printf -v "${flag//-/_}" %s "$2"
      shift 2
      ;;
    --spot) spot=true && shift ;;
    --dry-run) dry=yes && shift ;;
    --) shift && break ;;
    *) nla_die "unknown argument $1; bash launch/gke.sh --help lists the flags" ;;
  esac
done
for flag in name image type topology claim config workdir; do
  [ -n "${!flag}" ] || nla_die "--$flag is missing"
done
[[ $name =~ ^[a-z]([a-z0-9-]*[a-z0-9])?$ ]] || nla_die "--name $name: small letters, digits and dashes"
[[ -z $secret || $secret =~ ^[a-z0-9]([a-z0-9.-]*[a-z0-9])?$ ]] ||
  nla_die "--secret takes the name of a Kubernetes secret, not a value"
[[ $topology =~ ^[1-9][0-9]*(x[1-9][0-9]*){1,2}$ ]] || nla_die "--topology $topology: it looks like 4x4 or 2x2x4"
[[ $chips_per_host =~ ^[148]$ ]] || nla_die "--chips-per-host $chips_per_host: 1, 4 or 8"
[[ $workdir == /mnt/nla/* || $workdir == gs://* ]] ||
  nla_die "--workdir $workdir: it must lie in /mnt/nla, where the claim is mounted, or in a bucket (gs://)"
config=${config#"$root/"}
[ -f "$root/${config%%:*}" ] || nla_die "no config file ${config%%:*} in this checkout; see experiments/"
chips=$((${topology//x/ * }))
[ "$chips_per_host" -le "$chips" ] || chips_per_host=$chips
[ $((chips % chips_per_host)) -eq 0 ] ||
  nla_die "--topology $topology: $chips chips are not a multiple of $chips_per_host a host"

quoted() {  # print a text escaped for a YAML string in double quotes, without the quotes
  local text=${1//\\/\\\\}
  printf %s "${text//\"/\\\"}"
}
command=""
for word in nla train --distributed --config "$config" --workdir "$workdir" "$@"; do
  command+="                    - \"$(quoted "$word")\""$'\n'
done

manifest=$(<"$root/launch/gke_jobset.yaml")
fill() {  # name, value
  manifest=${manifest//"@$1@"/"$2"}
}
fill NAME "$name"
fill HOSTS $((chips / chips_per_host))
fill CHIPS "$chips_per_host"
fill TYPE "$(quoted "$type")"
fill TOPOLOGY "$topology"
fill SPOT "$spot"
fill IMAGE "$(quoted "$image")"
fill CLAIM "$(quoted "$claim")"
fill WORKDIR "$(quoted "$workdir")"
fill COMMAND "${command%$'\n'}"
fill SECRET "$secret"
[ -n "$secret" ] || manifest=$(sed '/envFrom:/,+2d' <<<"$manifest")
[ "$spot" = true ] || manifest=$(sed /gke-spot/d <<<"$manifest")

if [ -n "$dry" ]; then
  printf '%s\n' "$manifest"
  exit
fi
command -v kubectl >/dev/null || nla_die "kubectl is not on PATH; install it, and get the cluster's credentials"
kubectl apply -f - <<<"$manifest"
