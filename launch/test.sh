#!/usr/bin/env bash
# Lint and the test suite.
#
#   launch/test.sh [pytest arguments]   the default suite: at most 10 minutes on 2 cores
#   launch/test.sh --long               everything else (the quick start itself, kill storms, …):
#                                       at most 45 minutes; here a skipped test is a failure
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
cd "$root"
long=() notebook=()
if [ "${1:-}" = --long ]; then long=(--long) notebook=(requirements-notebook.txt); shift; fi
install_requirements requirements.txt requirements-dev.txt requirements-hf.txt ${notebook[@]+"${notebook[@]}"}

# TensorFlow stays out of .venv: the long test of SeqIO runs prepare in an environment of its own.
if [ ${#long[@]} -gt 0 ]; then
  (VENV=.venv-seqio install_requirements requirements.txt requirements-seqio.txt)
fi

# Tests compile the same small programs often: keep every one of them.
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0 JAX_PLATFORMS=cpu
started=$SECONDS
ruff check .
python -m compileall -q demix configs benchmarks colabs tests
if [ ${#long[@]} -gt 0 ]; then
  python -m pytest --long -n 2 --dist loadfile -m long --durations=10 "$@"
  # Again what has to be equal to the bit, compiled as for users.
  [ $# -gt 0 ] || python -m pytest --long -n 2 --dist loadfile -m "exact and not long" --durations=10
else
  fast="$(python tests/xla_flags.py)"
  export JAX_TRACEBACK_IN_LOCATIONS_LIMIT=0 XLA_FLAGS="${XLA_FLAGS:-} $fast"
  python -m pytest -n 2 --dist loadfile -m "not long" --durations=10 "$@"
fi
echo "took $((SECONDS - started))s after installation"
