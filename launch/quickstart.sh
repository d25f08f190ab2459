#!/usr/bin/env bash
# Explain a sentence twice: with the NLA that nla_jax ships, and with a small one that is trained from
# scratch by experiments/quickstart.py.
#
#   bash launch/quickstart.sh [--first-words] [--config.FIELD=VALUE ...]
#
# With --first-words it ends after the first explanation, which needs only the target (98 MB). The script
# can be stopped at any time; the same command resumes it.
#
# Environment: NLA_TARGET   another target for the training: a Hugging Face Hub id, or a local directory
#              NLA_WORKDIR  directory of the run (default: runs/quickstart in the checkout)
#              NLA_CACHE    directory of downloads (default: nla_jax in the XDG cache directory)
#              NLA_PYTHON, NLA_EXTRAS: see launch/env.sh
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
nla_help "${BASH_SOURCE[0]}" "$@"
nla_environment

workdir=${NLA_WORKDIR:-$NLA_ROOT/runs/quickstart}
sentence="The old lighthouse keeper climbed the stairs one last time, because the storm had put out"
explain=("$NLA_BIN/nla" explain --text "$sentence" --tokens=-3:)

# The output is captured, and printed later on this terminal.
export COLUMNS=${COLUMNS:-$(tput cols 2>/dev/null || printf 100)}
shipped=$("${explain[@]}")
printf '%s\n' "$shipped"
nla_say "explained by the NLA that nla_jax ships, $SECONDS s since the start"
[ "${1:-}" != --first-words ] || exit 0

# The corpora are downloaded only now, because the first explanation does not need them.
"$NLA_BIN/nla" data fetch --target "${NLA_TARGET:-default}"
nla_say "set-up for training done, $SECONDS s since the start"

"$NLA_BIN/nla" train --config "$NLA_ROOT/experiments/quickstart.py" --workdir "$workdir" \
  ${NLA_TARGET:+"--config.target=$NLA_TARGET"} "$@"
trained=$("${explain[@]}" --bundle "$workdir/bundle")
printf '\n--- the NLA that nla_jax ships ---\n%s\n' "$shipped"
printf '\n--- the NLA that was trained here in minutes: %s ---\n%s\n' "$workdir/bundle" "$trained"
nla_say "done, $SECONDS s since the start; the figures are in $workdir/summary.json"
nla_say "next: source $NLA_BIN/activate && nla --help"
