#!/usr/bin/env bash
# The control of DEMix and BTM: the same text, cut into as many "domains" at random.
#
#   launch/random_split.sh [--workdir DIR]      DIR: that of launch/quickstart.sh, run before
#
# Experts of a random split have nothing to know apart, so mixing them should gain nothing over
# dense: a DEMix LM and an ELMforest. Ends with a table; again with the same DIR it goes on.
set -euo pipefail
here="$PWD"
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
cd "$root"

workdir="$root/runs/quickstart"
while [ $# -gt 0 ]; do
  case "$1" in
    --workdir=*) workdir="${1#*=}" ;;
    --workdir) [ $# -gt 1 ] || fail "--workdir needs a folder"; workdir="$2"; shift ;;
    -h|--help) sed -n '2,7s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *) fail "unknown argument $1: launch/random_split.sh [--workdir DIR]" ;;
  esac
  shift
done
case "$workdir" in /*) ;; *) workdir="$here/$workdir" ;; esac
[ -d "$workdir/corpus_text" ] || fail "$workdir has no corpus_text: run launch/quickstart.sh --workdir $workdir first"
install_requirements requirements.txt
started=$SECONDS
out="$workdir/random_split"
mkdir -p "$out"

# Documents go to a part by a hash of their text; splits stay as they are.
python - "$workdir/corpus_text" "$out/text" <<'PYTHON'
import sys
from pathlib import Path

import xxhash

from configs.quickstart_corpus import TRAIN

source, target = map(Path, sys.argv[1:])
for split in ('train', 'valid', 'test'):
  parts = [[] for _ in TRAIN]
  for domain in TRAIN:
    for line in (source / domain / f'{split}.jsonl').read_bytes().splitlines(keepends=True):
      parts[xxhash.xxh3_64_intdigest(line) % len(TRAIN)].append(line)
  for i, lines in enumerate(parts):
    (target / f'part{i}').mkdir(parents=True, exist_ok=True)
    lines.sort(key=lambda line: xxhash.xxh3_64_intdigest(line, seed=1))
    (target / f'part{i}' / f'{split}.jsonl').write_bytes(b''.join(lines))
PYTHON
parts="$(cd "$out/text" && echo part* | tr ' ' ,)"
python -m demix prepare --input="$out/text" --out="$out/corpus" --config.vocab_size=1024
for arm in dense demix; do
  python -m demix train --config=configs/quickstart.py:$arm --config.data.path="$out/corpus" \
    --config.data.domains="$parts" --workdir="$out/$arm"
done
[ -f "$out/forest/forest.json" ] || python -m demix forest plan --forest="$out/forest" \
  --config=configs/forest_controls.py:random_split --data="$out/corpus"
python -m demix forest run --forest="$out/forest"
[ -f "$out/results.json" ] || { python -m demix evaluate --model="$out/dense" \
  --model="$out/demix" --model=forest=forest:"$out/forest" --data="$out/corpus" --mix=given,average,uniform,updating,cached \
  --out="$out/results.json" > "$out/table.txt"; }
cat "$out/table.txt"
echo; echo "Everything lies in $out"; echo "took $((SECONDS - started))s after installation"
