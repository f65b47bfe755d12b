#!/usr/bin/env bash
# c-BTM from end to end (Gururangan et al. 2023): domains that nobody labelled, found by clustering,
# an expert for each, mixed by the distance of the text so far; beside dense and two controls.
#
#   launch/cbtm.sh [--workdir DIR] [--corpus DIR] [--clusters 2,4,8] [--steps N] [--windows 100]
#
# Text: what lies on this machine, or 3 MB each of DIR/<domain>/{train,valid,test}.jsonl (--domains
# a,b: of these only); the labels are hidden and only say how well the clusters agree with them.
# Every arm sees as many tokens and goes on from the same seed, half of dense. About a quarter of an hour on
# 2 cores; again with the same DIR it goes on where it was. Ends with the table of the paper's claims.
set -euo pipefail
here="$PWD"
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
cd "$root"

workdir="$root/runs/cbtm" corpus=local_text clusters=2,4,8 steps= windows=100 domains=
while [ $# -gt 0 ]; do
  case "$1" in
    --workdir=*|--corpus=*|--clusters=*|--steps=*|--windows=*|--domains=*)
      name="${1%%=*}"; declare "${name#--}=${1#*=}" ;;
    --workdir|--corpus|--clusters|--steps|--windows|--domains)
      [ $# -gt 1 ] || fail "$1 needs a value"; declare "${1#--}=$2"; shift ;;
    -h|--help) sed -n '2,12s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *) fail "unknown argument $1: launch/cbtm.sh [--workdir DIR] [--corpus DIR] [--clusters K,…]" ;;
  esac
  shift
done
case "$workdir" in /*) ;; *) workdir="$here/$workdir" ;; esac
case "$corpus" in local_text|/*) ;; *) corpus="$here/$corpus" ;; esac
most="${clusters##*,}"
install_requirements requirements.txt
: "${steps:=$(python -c 'from configs.quickstart import get_config; print(get_config().train.steps)')}"
started=$SECONDS
mkdir -p "$workdir"

echo "1/4 prepare: tokens, and the same documents in clusters"
prepare=(--config=configs/quickstart_corpus.py)
[ "$corpus" = local_text ] || prepare=(--config.vocab_size=1024 --config.max_bytes=3000000 \
  ${domains:+"--config.domains=$domains"})
python -m demix prepare --input="$corpus" --out="$workdir/corpus" "${prepare[@]}" \
  > "$workdir/corpus.txt"
arms=()
for k in ${clusters//,/ }; do arms+=("balanced$k"); done
arms+=("kmeans$most" "random$most")
for arm in "${arms[@]}"; do
  python -m demix prepare --input="$workdir/corpus" --out="$workdir/clusters/$arm" \
    --discover="${arm//[a-z]/}" --discover.kind="${arm//[0-9]/}" > "$workdir/$arm.txt"
  sed -n '/^clusterer /,$p' "$workdir/$arm.txt" | grep . || cat "$workdir/$arm.txt"
done

echo; echo "2/4 train: dense, and its first half as the seed of all"
domains="$(python - "$workdir/corpus" <<'PYTHON'
import sys

from demix.data.tokens.store import TokenStore

store = TokenStore.open(sys.argv[1])
print(','.join(d for d in store.domains if store.roles[d] == 'train'))
PYTHON
)"
dense() {
  python -m demix train --config=configs/quickstart.py:dense --config.data.path="$workdir/corpus" \
    --config.data.domains="$domains" --config.data.sampling=proportional \
    --config.optimizer.schedule_steps="$steps" --config.train.steps="$1" --workdir="$2" \
    --config.train.eval_every=0
}
dense $((steps / 2)) "$workdir/seed"
[ -d "$workdir/dense" ] || cp -r "$workdir/seed" "$workdir/dense"
dense "$steps" "$workdir/dense"

echo; echo "3/4 train: an expert for each cluster, with a batch so many times smaller"
for arm in "${arms[@]}"; do
  forest="$workdir/forests/$arm"
  [ -f "$forest/forest.json" ] || python -m demix forest plan --forest="$forest" \
    --config=configs/forest_clusters.py:"${arm//[a-z]/},$steps" --data="$workdir/clusters/$arm"
  [ -d "$forest/seed" ] || cp -r "$workdir/seed" "$forest/seed"
  python -m demix forest run --forest="$forest" --together --limit=100
done

echo; echo "4/4 evaluate on the same test text, $windows blocks of each labelled domain, a fixed sample"
for arm in dense "${arms[@]}"; do
  [ -f "$workdir/$arm.json" ] && continue
  model=("$workdir/dense") mix=()
  if [ "$arm" != dense ]; then
    model=("forest:$workdir/forests/$arm")
    mix=(--mix=clusters,average,uniform --posterior=prefix --dump="$workdir/$arm.npz")
  fi
  python -m demix evaluate --model="$arm=${model[0]}" --data="$workdir/corpus" \
    --domains="$domains" --limit="$windows" ${mix[@]+"${mix[@]}"} --out="$workdir/$arm.json" \
    > "$workdir/$arm.table.txt"
done

python - "$workdir" "${arms[@]}" > "$workdir/claims.tmp" <<'PYTHON'
import json
import sys
from pathlib import Path

import numpy as np

from demix.eval.results import layout

workdir, arms = Path(sys.argv[1]), sys.argv[2:]


def perplexity(name, prior=None, posterior=None):
  rows = [r for r in json.loads((workdir / f'{name}.json').read_text())['rows']
          if (r['prior'], r['posterior']) == (prior, posterior)]
  return np.exp(sum(r['nll'] * r['tokens'] for r in rows) / sum(r['tokens'] for r in rows))


def top(name, k):
  """Top-k of the stored weights, renormalised: the k nearest clusters."""
  dump = np.load(workdir / f'{name}.npz')
  weights, scored = dump['weights_EBL'].astype(np.float64), dump['weights_BL']
  kept = np.argsort(np.argsort(-weights, 0, kind='stable'), 0) < k
  weights = weights * kept / (weights * kept).sum(0)
  logp = np.log((weights * np.exp(dump['loglik_EBL'].astype(np.float64))).sum(0))
  return np.exp(-(logp * scored).sum() / scored.sum())


ks = [1, 2, 4]
lines = [['perplexity over all test text', 'clusters', *(f'top-{k}' for k in ks), 'average',
          'prefix', 'purity', 'NMI']]
dense = perplexity('dense')
lines.append(['dense (K = 1)', f'{dense:.3f}', *['-'] * 7])
for arm in arms:
  card = json.loads((workdir / 'clusters' / arm / 'card.json').read_text())
  agreed = card['clusterer']['agreement'].get('train')
  K = len(card['clusterer']['documents']['train'])
  lines.append([
      f'{arm.rstrip("0123456789")}, K = {K}', f'{perplexity(arm, "uniform", "clusters"):.3f}',
      *(f'{top(arm, k):.3f}' if k < K else '-' for k in ks), f'{perplexity(arm, "none"):.3f}',
      f'{perplexity(arm, "uniform", "prefix"):.3f}',
      *((f'{agreed["purity"]:.3f}', f'{agreed["nmi"]:.3f}') if agreed else '--')])
print(layout(lines))
most = max(int(a[8:]) for a in arms if a.startswith('balanced'))
best = min((a for a in arms if a.startswith('balanced')),
           key=lambda a: perplexity(a, 'uniform', 'clusters'))
ratio = lambda arm, *way: f'{perplexity(arm, *way or ("uniform", "clusters")) / dense - 1:+.1%}'
print(f"""
against dense at equal tokens (c-BTM; README toy run of the authors: -3.8 % at K = 8):
  22 clustered experts beat dense, random ones do not: balanced {ratio(f"balanced{most}")}, random \
{ratio(f"random{most}")} (K = {most})
  23 the best K for this budget: {best[8:]} ({ratio(best)})
  24 balanced against plain k-means (K = {most}): {ratio(f"balanced{most}")} and \
{ratio(f"kmeans{most}")}
  25 only the nearest expert (K = {most}): {top(f"balanced{most}", 1) / dense - 1:+.1%}; the two \
nearest: {top(f"balanced{most}", 2) / dense - 1:+.1%}""")
PYTHON
mv "$workdir/claims.tmp" "$workdir/claims.txt"
echo; cat "$workdir/claims.txt"
echo; echo "Everything lies in $workdir"; echo "took $((SECONDS - started))s after installation"
