#!/usr/bin/env bash
# Installs and runs on a TPU VM with one host (v2-8, v3-8, v4-8, v5e-8):
#   launch/tpu_vm.sh NAME ZONE --config=configs/scalenet.py:folder --config.data.path=/mnt/images
# The repository is copied to the VM; all its chips share each batch.
set -euo pipefail
name=$1 zone=$2
shift 2
gcloud compute tpus tpu-vm scp --recurse --zone="$zone" "$(dirname "$0")/.." "$name:jaxsd"
gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --command="cd jaxsd && pip install -e '.[tpu]' && python -m jaxsd.main $(printf '%q ' "$@")"
