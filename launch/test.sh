#!/usr/bin/env bash
# Run all checks and tests, in the environment of launch/quickstart.sh with the test extra.
#
#   bash launch/test.sh [PYTEST ARGUMENTS]      for example: bash launch/test.sh tests/method/test_steps.py -k warm
#
# Without arguments, two workers share the test files; arguments replace the options of pytest.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
nla_help "${BASH_SOURCE[0]}" "$@"
nla_environment test

# The explorer's page is tested in Chromium: NLA_CHROMIUM, or one on PATH; else Debian's is installed.
if ! command -v "${NLA_CHROMIUM:-chromium}" chromium-browser google-chrome >/dev/null; then
  nla_say "installing Chromium for the tests of the explorer"
  { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y chromium; } \
    >/dev/null 2>&1 || nla_say "that needs root and apt; install Chromium, or set NLA_CHROMIUM to its path"
fi

cd "$NLA_ROOT"
"$NLA_BIN/ruff" check .
"$NLA_BIN/shellcheck" --external-sources --source-path=SCRIPTDIR launch/*.sh .ci/run
# Python's caches stay out of the checkout, which a test of launch/tpu_vm.sh packs while others run.
export PYTHONPYCACHEPREFIX="$NLA_ROOT/.venv/pycache"
[ $# -gt 0 ] || set -- -n 2 --dist loadfile --no-loadscope-reorder
status=0
"$NLA_BIN/python" -m pytest -q --durations=10 "$@" || status=$?
nla_say "$SECONDS s, set-up included"
exit "$status"
