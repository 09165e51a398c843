#!/usr/bin/env bash
# Installs and runs on a TPU VM, of one host or of many (a v5litepod-32 has eight):
#   launch/tpu_vm.sh NAME ZONE --config=configs/scalenet.py:folder --config.data.path=/mnt/images
# The repository is copied to every host; all chips share each batch, so batch sizes are multiples of the hosts, and the
# images must be at the same path on all. The workdir is on the first host: --workdir=/mnt/... on a disk that outlives it.
set -euo pipefail
if (( $# < 3 )); then
  echo "error: launch/tpu_vm.sh NAME ZONE --config=... [FLAGS]" >&2
  exit 2
fi
name=$1 zone=$2
shift 2
on=(--zone="$zone" --worker=all)
gcloud compute tpus tpu-vm scp --recurse "${on[@]}" "$(dirname "$0")/.." "$name:jaxsd"
gcloud compute tpus tpu-vm ssh "$name" "${on[@]}" \
  --command="cd jaxsd && pip install --quiet -e '.[tpu]' && python3 -m jaxsd.main --distributed $(printf '%q ' "$@")"
