#!/usr/bin/env bash
# From nothing to a table: text that lies on this machine; a dense LM, a DEMix LM and a forest of
# whole LMs (a seed, its branches) of as many tokens; experts given, mixed and averaged; and a text
# they write together. At most five minutes on 2 cores; docs/quickstart.md says how it was chosen.
#
#   launch/quickstart.sh [--workdir DIR] [--seed N]
#
# Needs bash and Python >= 3.11. Again with the same DIR it goes on where it was, or says it is done.
set -euo pipefail
here="$PWD"
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
cd "$root"

workdir="$root/runs/quickstart" seed=0
while [ $# -gt 0 ]; do
  case "$1" in
    --workdir=*) workdir="${1#*=}" ;;
    --workdir) [ $# -gt 1 ] || fail "--workdir needs a folder"; workdir="$2"; shift ;;
    --seed=*) seed="${1#*=}" ;;
    --seed) [ $# -gt 1 ] || fail "--seed needs a number"; seed="$2"; shift ;;
    -h|--help) sed -n '2,8s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *) fail "unknown argument $1: launch/quickstart.sh [--workdir DIR] [--seed N]" ;;
  esac
  shift
done
case "$workdir" in /*) ;; *) workdir="$here/$workdir" ;; esac
mkdir -p "$workdir" 2>/dev/null && [ -w "$workdir" ] || fail "$workdir cannot be written: name another --workdir"

install_requirements requirements.txt
started=$SECONDS

if [ -f "$workdir/results.json" ] && [ -f "$workdir/table.txt" ]; then
  cat "$workdir/table.txt"
  echo; echo "done already: everything lies in $workdir (another --workdir starts afresh)"
  exit 0
fi

echo "1/5 prepare: text on this machine -> byte-level BPE -> token store"
python -m demix prepare --input=local_text --out="$workdir/corpus" --config=configs/quickstart_corpus.py
for arm in dense demix; do
  echo; [ $arm = dense ] && echo "2/5 train: dense" || echo "3/5 train: DEMix"
  python -m demix train --config=configs/quickstart.py:$arm --config.seed="$seed" \
    --config.data.path="$workdir/corpus" --workdir="$workdir/$arm"
done
echo; echo "4/5 grow a forest: a seed, a branch for each domain; and their average"
[ -f "$workdir/forest/forest.json" ] || python -m demix forest plan --forest="$workdir/forest" \
  --data="$workdir/corpus" --config=configs/forest_quickstart.py:0.5,"$seed"
python -m demix forest run --forest="$workdir/forest" --together --limit=32
[ -d "$workdir/average" ] || python -m demix merge --model=forest:"$workdir/forest" \
  --workdir="$workdir/average"
echo; echo "5/5 evaluate, one expert at a time, mixed and averaged; then write"
models=()
for model in dense demix forest average; do
  models+=(--model=$model="$([ $model != forest ] || echo forest:)$workdir/$model")
done
python -m demix evaluate "${models[@]}" --data="$workdir/corpus" \
  --domains="$(python -c 'from configs.quickstart_corpus import DOMAINS; print(",".join(DOMAINS))')" \
  --mix=given,average,uniform,updating,cached --mix.blocks=100 \
  --save_priors="$workdir/priors.json" \
  --tables=all --out="$workdir/results.json" > "$workdir/tables.txt"
{ echo; python launch/quickstart_table.py "$workdir" cost; } >> "$workdir/tables.txt"
{ echo "by the DEMix LM's experts, --prompt='>>> x = np.array('"
  python -m demix generate --model="$workdir/demix" --prompt='>>> x = np.array(' --max_tokens=80 \
    --top_p=0.9 --seed=1 2>&1
} > "$workdir/text.txt"
cat "$workdir/text.txt"
echo
python launch/quickstart_table.py "$workdir" > "$workdir/table.tmp"
mv "$workdir/table.tmp" "$workdir/table.txt"
cat "$workdir/table.txt"
cat <<EOF

Everything lies in $workdir:
  corpus/          token store and data card (card.json); the text itself in corpus_text/
  dense/, demix/   config.json, metrics.jsonl, tensorboard/, checkpoints/
  forest/          forest.json, seed/, experts/<name>/, each as above; average/: their average
  results.json     every way of mixing; tables.txt, as tables; text.txt, the text above
took $((SECONDS - started))s after installation
EOF
