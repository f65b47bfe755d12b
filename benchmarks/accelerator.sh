#!/usr/bin/env bash
# What training costs on one accelerator, unattended: sanity, then 125M, 350M, 760M, 1.3B dense and 125M
# DEMix in bfloat16, beside torch.compile where torch is there; a table and results.json in --out.
#
#   benchmarks/accelerator.sh [--minutes=8] [--out=runs/accelerator] [--sizes=125m,350m,760m,1.3b]
#                             [--python=PYTHON] [--torch-python=PYTHON] [--set=KEY=VALUE,…] [--tiny]
#
# Needs bash, Python >= 3.11 and the package registry. The environment is PYTHON; else python3, where its
# JAX sees a device and has what is needed beside it; else one that is made here for the driver that
# nvidia-smi names. --minutes counts from the start of this script, its installation too.
# --tiny rehearses all of it with tiny models, on CPU too. Exit code 1: a check or a size failed.
set -euo pipefail
here="$PWD"
source "$(dirname "${BASH_SOURCE[0]}")/../launch/environment.sh"

python='' torch='' tiny='' minutes=8 out="$root/runs/accelerator" flags=()
for flag in "$@"; do
  case "$flag" in
    --python=*) python="${flag#*=}" ;;
    --torch-python=*) torch="${flag#*=}" ;;
    --out=*) out="${flag#*=}"; case "$out" in /*) ;; *) out="$here/$out" ;; esac ;;
    --tiny) tiny=1; flags+=("$flag") ;;
    --minutes=*) minutes="${flag#*=}" ;;
    --sizes=*|--set=*|--seconds=*) flags+=("$flag") ;;
    -h|--help) sed -n '2,12s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *) fail "unknown argument $flag: benchmarks/accelerator.sh --help" ;;
  esac
done
[[ "$minutes" =~ ^[0-9]+([.][0-9]+)?$ ]] || fail "--minutes=$minutes: expected a number"

probe() { "$1" "$root/benchmarks/accelerator.py" --job=probe --limit=60 >/dev/null 2>&1; }

choose_requirements() { # by the major version of the driver
  local driver
  driver="$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1)" || true
  driver="${driver%%.*}"
  case "$driver" in
    ''|*[!0-9]*) echo requirements.txt ;;
    *) if [ "$driver" -ge 580 ]; then echo requirements-cuda13.txt
       elif [ "$driver" -ge 525 ]; then echo requirements-cuda12.txt
       else fail "driver $driver: CUDA 12 needs 525 or newer"; fi ;;
  esac
}

if [ -z "$python" ]; then
  there="$(command -v python3 || true)"
  if [ -z "$tiny" ] && [ -n "$there" ] && probe "$there"; then
    python="$there"
  else
    requirements="$(choose_requirements)"
    [ "$requirements" != requirements.txt ] || [ -n "$tiny" ] \
      || fail "no accelerator: nvidia-smi names no driver, and the JAX of ${there:-no python3} sees none (--tiny rehearses on CPU; --python=PYTHON names an environment that is there)"
    VENV=.venv
    [ "$requirements" = requirements.txt ] || { VENV=.venv-${requirements#requirements-}; VENV="${VENV%.txt}"; }
    install_requirements "$requirements"
    python="$root/$VENV/bin/python"
  fi
fi
# A torch that sees the GPU is taken along where it is.
if [ -z "$torch" ] && [ -z "$tiny" ]; then
  for candidate in "$python" python3; do
    if "$candidate" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' >/dev/null 2>&1; then
      torch="$candidate"; break
    fi
  done
fi
echo "python $python; torch ${torch:-left out: --torch-python names a Python that has it}"
exec "$python" "$root/benchmarks/accelerator.py" --minutes="$minutes" --spent="$SECONDS" --out="$out" \
  --torch-python="$torch" ${flags[@]+"${flags[@]}"}
