#!/usr/bin/env bash
# A verb on all hosts of a TPU VM slice.
#
#   launch/tpu_vm.sh --tpu=NAME --zone=ZONE [--project=PROJECT] [--folder=DIR] [--env=NAME=VALUE]
#                    [--dry_run] VERB [flags of the verb]
#
# DIR is the checkout on every host (default: ~/demix), already there; the workdir and the token store
# must be on a file system that all hosts share (a mounted bucket or Filestore). `train` runs on all
# hosts as one run; every other verb on host 0. A run that was preempted (exit code 75) is started
# again, up to 100 times; so is one whose host was lost. --dry_run prints the commands and runs nothing.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

tpu='' zone='' project='' folder='~/demix' dry_run='' sets=()
while [ $# -gt 0 ]; do
  case "$1" in
    --tpu=*) tpu="${1#*=}" ;;
    --zone=*) zone="${1#*=}" ;;
    --project=*) project="${1#*=}" ;;
    --folder=*) folder="${1#*=}" ;;
    --env=*) sets+=("$(printf '%q' "${1#*=}")") ;;
    --dry_run) dry_run=1 ;;
    -h|--help) sed -n '2,10s/^# \{0,1\}//p' "$0"; exit 0 ;;
    --*) fail "unknown argument $1: launch/tpu_vm.sh --tpu=NAME --zone=ZONE [--project=PROJECT] [--folder=DIR] [--env=NAME=VALUE] [--dry_run] VERB [flags]" ;;
    *) break ;;
  esac
  shift
done
[ -n "$tpu" ] && [ -n "$zone" ] || fail "--tpu=NAME and --zone=ZONE say which slice"
[ $# -gt 0 ] || fail "which verb? launch/tpu_vm.sh --tpu=NAME --zone=ZONE VERB [flags of the verb]"
verb="$1"; shift
worker=0 flags=("$verb" "$@")
if [ "$verb" = train ]; then worker=all; flags+=(--config.mesh.processes=0); fi

# A tilde stays one for the host to expand.
case "$folder" in '~'|'~/'*) cd="cd ~$(printf '%q' "${folder#\~}")" ;; *) cd="cd $(printf '%q' "$folder")" ;; esac
remote="$cd && source launch/environment.sh && install_requirements requirements.txt requirements-tpu.txt && ${sets[*]+env ${sets[*]} }python -m demix $(printf '%q ' "${flags[@]}")"
ssh=(gcloud compute tpus tpu-vm ssh "$tpu" --zone="$zone")
[ -z "$project" ] || ssh+=(--project="$project")
ssh+=(--worker="$worker" --command="${remote% }")
if [ -n "$dry_run" ]; then printf '%q ' "${ssh[@]}"; echo; exit 0; fi
command -v gcloud >/dev/null || fail "no gcloud on this machine: install the Google Cloud CLI, or see the command with --dry_run"
for (( attempt = 0; attempt < 100; attempt++ )); do
  code=0; "${ssh[@]}" || code=$?
  # 75: preempted and saved; 255: the connection or the host was lost; 134, 137: a process was killed.
  case $code in 75|255|134|137) echo "exit code $code: starting again" >&2; sleep 10 ;; *) exit $code ;; esac
done
exit $code
