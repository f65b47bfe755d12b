#!/usr/bin/env bash
# Runs the settings of a config's get_hyper() one after another, each in a folder of its own.
#
#   launch/sweep.sh CONFIG[:ARG] DIR [train flags]
#
# Again with the same DIR it goes on where it was: finished runs say so, an interrupted one resumes.
set -euo pipefail
here="$PWD"
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
cd "$root"
[ $# -ge 2 ] || fail "launch/sweep.sh CONFIG[:ARG] DIR [train flags]"
config="$1" dir="$2"; shift 2
case "$dir" in /*) ;; *) dir="$here/$dir" ;; esac
install_requirements requirements.txt
runs="$(python -m demix.fleet.sweep "$config")"
while IFS=$'\t' read -r name flags; do
  echo "== $name"
  eval "set_flags=($flags)"
  python -m demix train --config="$config" --workdir="$dir/$name" "${set_flags[@]}" "$@" < /dev/null
done <<< "$runs"
