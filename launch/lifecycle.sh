#!/usr/bin/env bash
# What becomes of the quick start's models when a domain is added or taken away (DEMix §6).
#
#   launch/lifecycle.sh [--workdir DIR]      DIR: that of launch/quickstart.sh, run before
#
# Adapts to the held-out domain (DEMix-DAPT; dense, all parameters and FFN only) and removes each
# expert, beside a DEMix LM that never saw one of the domains. Ends with two tables, about three
# minutes on 2 cores; again with the same DIR it goes on where it was.
set -euo pipefail
here="$PWD"
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
cd "$root"

workdir="$root/runs/quickstart"
while [ $# -gt 0 ]; do
  case "$1" in
    --workdir=*) workdir="${1#*=}" ;;
    --workdir) [ $# -gt 1 ] || fail "--workdir needs a folder"; workdir="$2"; shift ;;
    -h|--help) sed -n '2,8s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *) fail "unknown argument $1: launch/lifecycle.sh [--workdir DIR]" ;;
  esac
  shift
done
case "$workdir" in /*) ;; *) workdir="$here/$workdir" ;; esac
[ -f "$workdir/results.json" ] || fail "$workdir has no results.json: run launch/quickstart.sh --workdir $workdir first"
install_requirements requirements.txt
started=$SECONDS
out="$workdir/lifecycle"
mkdir -p "$out"
data="--config.data.path=$workdir/corpus"
read -r novel never train domains rows < <(python -c '
from configs.quickstart import RECIPES
from configs.quickstart_corpus import DOMAINS, NOVEL, TRAIN
rows = RECIPES["demix"][0] // len(TRAIN) * (len(TRAIN) - 1)
print(NOVEL[0], TRAIN[0], *(",".join(d) for d in (TRAIN[1:], DOMAINS)), rows)')

echo "1/4 adapt to $novel: an expert of the DEMix LM, and the dense LM in two ways"
for arm in demix dense dense_ffn; do
  python -m demix train --config=configs/adapt.py:$arm --config.init.model="$workdir/${arm%_ffn}" \
    $data --config.data.domains="$novel" --workdir="$out/$arm-$novel"
done
[ -d "$out/demix+$novel" ] || python -m demix forest add --model="$workdir/demix" \
  --expert="$novel" --from="$out/demix-$novel" --workdir="$out/demix+$novel"

echo; echo "2/4 remove each expert"
models=(--model=demix="$workdir/demix")
for expert in $(echo "$never,$train" | tr , ' '); do
  [ -d "$out/without-$expert" ] || python -m demix forest remove --model="$workdir/demix" \
    --expert="$expert" --workdir="$out/without-$expert"
  models+=(--model=without-$expert="$out/without-$expert")
done

echo; echo "3/4 train a DEMix LM that never sees $never, as long for each other domain"
python -m demix train --config=configs/quickstart.py:demix $data --config.data.domains="$train" \
  --config.data.batch_size="$rows" --workdir="$out/never-$never"
models+=(--model=never-$never="$out/never-$never")

echo; echo "4/4 evaluate"
shared=(--data="$workdir/corpus" --domains="$domains" --posterior=last_token)
[ -f "$out/adapted.json" ] || { python -m demix evaluate --model=dense="$workdir/dense" \
  --model=dense-all="$out/dense-$novel" --model=dense-ffn="$out/dense_ffn-$novel" \
  --model=demix="$workdir/demix" --model=demix+$novel="$out/demix+$novel" --mix=given,cached \
  "${shared[@]}" --out="$out/adapted.json" > "$out/adapted.txt"; }
[ -f "$out/removed.json" ] || { python -m demix evaluate "${models[@]}" --mix=cached \
  "${shared[@]}" --out="$out/removed.json" > "$out/removed.txt"; }
echo "Before and after adapting to $novel"; cat "$out/adapted.txt"
echo; echo "Expert removed (columns), domain evaluated (rows)"; cat "$out/removed.txt"
echo; echo "Everything lies in $out"; echo "took $((SECONDS - started))s after installation"
