# shellcheck shell=bash
# Functions for the scripts in this directory: make the virtual environment .venv of this checkout.
#
#   nla_environment [EXTRA[,EXTRA]]   make .venv if needed, install the package with these extras;
#                                     sets NLA_ROOT (the checkout) and NLA_BIN (.venv/bin)
#   nla_help SCRIPT ARGUMENTS         if -h or --help is among the arguments, print the script's head, and exit
#
# Environment: NLA_PYTHON  the interpreter to use (Python 3.11, 3.12 or 3.13)
#              NLA_EXTRAS  more extras of setup.py, such as cuda or tpu
#
# A stamp, written last, records what is installed, so that a second call does nothing. It differs if setup.py
# has changed or the checkout was moved. An installation that was killed is repeated.

nla_say() { printf '[nla] %s\n' "$*" >&2; }
nla_die() { printf 'nla: %s\n' "$*" >&2; exit 2; }

nla_help() {
  local script=$1 argument
  shift
  for argument in "$@"; do
    case $argument in
      --) return ;;
      -h | --help)
        sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$script"
        exit 0
        ;;
    esac
  done
}

nla_fits() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; }

nla_find_python() {
  local python
  if [ -n "${NLA_PYTHON:-}" ]; then
    nla_fits "$NLA_PYTHON" || nla_die "NLA_PYTHON=$NLA_PYTHON is not a Python 3.11, 3.12 or 3.13"
    printf '%s\n' "$NLA_PYTHON"
    return
  fi
  for python in python3 python3.11 python3.12 python3.13 python; do
    if nla_fits "$python"; then
      printf '%s\n' "$python"
      return
    fi
  done
  nla_die "no Python 3.11, 3.12 or 3.13 on PATH; install one, or set NLA_PYTHON to its path"
}

nla_make_venv() {  # directory
  local python
  python=$(nla_find_python) || exit 2
  "$python" -c 'import ensurepip, venv' 2>/dev/null ||
    nla_die "$python cannot make virtual environments; on Debian or Ubuntu: apt install python3-venv"
  nla_say "making $1 with $("$python" -V)"
  "$python" -m venv --clear "$1" || nla_die "could not make $1; is the disk full or read-only?"
}

nla_environment() {
  local venv extras stamp killed spec start=$SECONDS
  NLA_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
  venv=$NLA_ROOT/.venv
  NLA_BIN=$venv/bin
  extras=${1:-}
  [ -z "${NLA_EXTRAS:-}" ] || extras=${extras:+$extras,}$NLA_EXTRAS
  stamp=$venv/.nla-${extras:-core}
  killed=$venv/.nla-installing
  spec=$(printf '%s\n' "$NLA_ROOT" && cat "$NLA_ROOT/setup.py")

  if [ -e "$killed" ] || ! nla_fits "$NLA_BIN/python" || ! "$NLA_BIN/python" -m pip -V >/dev/null 2>&1
  then
    nla_make_venv "$venv"
  fi
  [ "$(cat "$stamp" 2>/dev/null)" != "$spec" ] || return 0

  nla_say "installing nla_jax${extras:+[$extras]} into $venv (about a minute)"
  : >"$killed"
  # pip would compile all modules, of which most are never imported. Python compiles those that are.
  unset PYTHONDONTWRITEBYTECODE
  if ! PIP_DISABLE_PIP_VERSION_CHECK=1 "$NLA_BIN/python" -m pip install --quiet --quiet --no-compile \
    --editable "$NLA_ROOT${extras:+[$extras]}"
  then
    rm -f "$killed"  # pip rolls back its own failures; only a killed pip leaves partial packages
    nla_die "the installation failed (pip's message is above); run the same command again"
  fi
  printf '%s\n' "$spec" >"$stamp"
  rm -f "$killed"
  nla_say "environment ready in $((SECONDS - start)) s"
}

[ "${BASH_SOURCE[0]}" != "$0" ] || nla_help "$0" --help
