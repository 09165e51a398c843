#!/usr/bin/env bash
# One array task per seed, all into one workdir; the task that ends last prints the whole table with a plain run:
#   sbatch --array=0-4 launch/slurm.sh --config=configs/scalenet.py:folder --config.data.path=/data/leaves --workdir=/scratch/leaves
#   python -m jaxsd.main --config=configs/scalenet.py:folder --config.data.path=/data/leaves --workdir=/scratch/leaves --config.seeds='(0,1,2,3,4)'
#SBATCH --job-name=jaxsd
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=8
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
set -euo pipefail
exec python -m jaxsd.main "$@" --config.seeds="(${SLURM_ARRAY_TASK_ID:-0},)"
