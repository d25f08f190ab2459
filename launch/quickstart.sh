#!/usr/bin/env bash
# From nothing to an explained sentence: environment, target model, corpora, every stage of
# experiments/quickstart.py, and the activations of one sentence put into words.
#
#   bash launch/quickstart.sh [--config.FIELD=VALUE ...]
#
# Stopped at any moment and started again, it goes on where it was.
#
# Environment: NLA_TARGET   another target: a Hugging Face Hub id, or a local directory
#              NLA_WORKDIR  where the run lives (default: runs/quickstart in the checkout)
#              NLA_CACHE    where downloads are kept (default: nla_jax in the XDG cache directory)
#              NLA_PYTHON, NLA_EXTRAS: see launch/env.sh
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
nla_environment

workdir=${NLA_WORKDIR:-$NLA_ROOT/runs/quickstart}
sentence="The old lighthouse keeper climbed the stairs one last time, because the storm had put out"

"$NLA_BIN/nla" data fetch --target "${NLA_TARGET:-default}"
nla_say "set-up done, $SECONDS s since the start"

"$NLA_BIN/nla" train --config "$NLA_ROOT/experiments/quickstart.py" --workdir "$workdir" \
  ${NLA_TARGET:+"--config.target=$NLA_TARGET"} "$@"
"$NLA_BIN/nla" explain --bundle "$workdir/bundle" --text "$sentence" --tokens all
nla_say "done, $SECONDS s since the start; the figures are in $workdir/summary.json"
