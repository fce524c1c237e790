#!/usr/bin/env bash
# QAT on several nodes: sbatch --nodes=2 examples/slurm_qat.sh --config my.yaml trainer.num_nodes=2
#SBATCH --job-name=mqat
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --signal=TERM@60
set -euo pipefail
# Every node runs one torchrun; they meet at the first node. All see the run directory, so a job that
# is started again continues from its last checkpoint (one every 15 minutes, and one at SIGTERM, which
# the line below asks for a minute before the time is up).
MASTER=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun torchrun \
    --nnodes "$SLURM_JOB_NUM_NODES" \
    --nproc-per-node "${GPUS_PER_NODE:-8}" \
    --rdzv-id "$SLURM_JOB_ID" \
    --rdzv-backend c10d \
    --rdzv-endpoint "$MASTER:${MASTER_PORT:-29500}" \
    examples/gpt_qat.py "$@"
