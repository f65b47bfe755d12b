# Sourced by the launchers: a virtual environment in .venv with what is asked for, and the settings
# that make JAX fast on CPU. Needs bash and Python >= 3.11 with its venv module; nothing else.
#
#   install_requirements FILE…   makes .venv if needed, installs the files if they changed
#                                (VENV=.venv-other: a virtual environment of that name)

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

fail() { echo "error: $*" >&2; exit 2; }

find_python() {
  local candidate
  for candidate in "${PYTHON:-}" python3.12 python3.11 python3.13 python3 python; do
    [ -n "$candidate" ] && command -v "$candidate" >/dev/null 2>&1 || continue
    if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' \
        >/dev/null 2>&1; then
      command -v "$candidate"; return
    fi
  done
  return 1
}

install_requirements() {
  local venv="$root/${VENV:-.venv}" wanted stamp file
  # The stamp is written last: an installation that was interrupted is done again.
  wanted="$(cd "$root" && for file in "$@"; do cat "$file"; done | cksum)"
  stamp="$venv/.installed-$(echo "$*" | tr ' /' '--')"
  if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    local python started=$SECONDS
    if [ ! -x "$venv/bin/python" ]; then
      python="$(find_python)" || fail "no Python 3.11 to 3.13 with venv found; install one or set PYTHON=/path/to/python3"
      echo "making $venv with $("$python" --version)" >&2
      rm -rf "$venv"
      "$python" -m venv "$venv" || fail "$python cannot make a virtual environment (on Debian: apt-get install python3-venv)"
    fi
    echo "installing $* (about a minute)" >&2
    local flags=()
    for file in "$@"; do flags+=(-r "$root/$file"); done
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "${flags[@]}" \
      || fail "pip could not install $*; its message is above"
    echo "$wanted" > "$stamp"
    echo "installed in $((SECONDS - started))s" >&2
  fi
  export PATH="$venv/bin:$PATH"
}

# Huge pages: XLA's large buffers come from malloc, and their page faults cost a quarter of a step.
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}"
# Compiled programs are kept, so the second start of a run is quick.
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$root/.cache/jax}"
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="${JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS:-1}"
# Nothing here is fetched from a hub, and its client would wait for time-outs to say so.
export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}"
