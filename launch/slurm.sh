#!/usr/bin/env bash
# A verb on the nodes of a SLURM cluster, one process a GPU (one a node without GPUs).
#
#   launch/slurm.sh [--nodes=N] [--gpus=PER_NODE] [--time=HH:MM:SS] [--name=NAME] [--requirements=FILE]
#                   [--sbatch='MORE SBATCH FLAGS'] [--dry_run] VERB [flags of the verb]
#
# `train` runs on all nodes as one run; every other verb on one. The checkout and the workdir must be on a
# file system that all nodes share. A warning signal comes 120 s before the time is up: the run saves,
# ends with exit code 75 and is queued again. --dry_run prints the job and submits nothing.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

nodes=1 gpus=0 time=24:00:00 name=demix requirements='' more='' dry_run=
while [ $# -gt 0 ]; do
  case "$1" in
    --nodes=*) nodes="${1#*=}" ;;
    --gpus=*) gpus="${1#*=}" ;;
    --time=*) time="${1#*=}" ;;
    --name=*) name="${1#*=}" ;;
    --requirements=*) requirements="${1#*=}" ;;
    --sbatch=*) more="${1#*=}" ;;
    --dry_run) dry_run=1 ;;
    -h|--help) sed -n '2,10s/^# \{0,1\}//p' "$0"; exit 0 ;;
    --*) fail "unknown argument $1: launch/slurm.sh [--nodes=N] [--gpus=N] [--time=HH:MM:SS] [--name=NAME] [--requirements=FILE] [--sbatch=FLAGS] [--dry_run] VERB [flags]" ;;
    *) break ;;
  esac
  shift
done
[ $# -gt 0 ] || fail "which verb? launch/slurm.sh [options] VERB [flags of the verb]"
for number in "$nodes" "$gpus"; do
  case "$number" in ''|*[!0-9]*) fail "--nodes=$nodes --gpus=$gpus: expected numbers" ;; esac
done
[ "$nodes" -ge 1 ] || fail "--nodes=$nodes: at least 1"
verb="$1"; shift
tasks=$(( gpus > 0 ? gpus : 1 ))
if [ "$verb" != train ]; then
  [ "$nodes" = 1 ] || fail "--nodes=$nodes: $verb runs on one node; only train runs on several"
  tasks=1
fi
[ -n "$requirements" ] || { [ "$gpus" -gt 0 ] && requirements=requirements-cuda12.txt || requirements=requirements.txt; }
[ -f "$root/$requirements" ] || fail "--requirements=$requirements: no such file in the checkout"
flags=("$verb" "$@")
# One process joins no others.
[ $(( nodes * tasks )) -gt 1 ] && flags+=(--config.mesh.processes=0)
command="$(printf '%q ' "${flags[@]}")"

job="$(cat <<EOF
#!/usr/bin/env bash
#SBATCH --job-name=$name
#SBATCH --nodes=$nodes
#SBATCH --ntasks-per-node=$tasks
$([ "$gpus" -gt 0 ] && echo "#SBATCH --gpus-per-node=$gpus")
#SBATCH --time=$time
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=$name-%j.log
$([ -n "$more" ] && echo "#SBATCH $more")
cd $(printf '%q' "$root")
source launch/environment.sh
install_requirements requirements.txt $requirements
# The signal goes to every process of the run; they agree on the step at which they save and end.
srun --kill-on-bad-exit=0 python -m demix $command &
step=\$!
trap 'scancel --signal=USR1 --full "\$SLURM_JOB_ID.0" 2>/dev/null || kill -USR1 \$step' USR1 TERM
code=0; wait \$step || code=\$?
while kill -0 \$step 2>/dev/null; do code=0; wait \$step || code=\$?; done
# 75: saved and to go on. What was killed (128 and up) goes on too, up to three times.
if [ \$code = 75 ] || { [ \$code -ge 128 ] && [ "\${SLURM_RESTART_COUNT:-0}" -lt 3 ]; }; then
  scontrol requeue "\$SLURM_JOB_ID"; exit 0
fi
exit \$code
EOF
)"
job="$(sed '/^$/d' <<< "$job")"
if [ -n "$dry_run" ]; then printf '%s\n' "$job"; exit 0; fi
command -v sbatch >/dev/null || fail "no sbatch on this machine: run this on a login node, or see the job with --dry_run"
sbatch <<< "$job"
