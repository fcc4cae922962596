#!/usr/bin/env bash
# Plan 5d03e9bd6c: llama3-8b on a100-sxm-80gb:4x8, 32 devices (tp 1 · cp 1 · pp 1 · dp 32 · ep 1 · etp 1).
# Predicted: 8.687 s per step, 3,772 tokens/s per device, 26.2 GiB per device.
# Run it once per node; MASTER_ADDR is the first of them. Further arguments are passed on to the script.
set -euo pipefail

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

exec torchrun --nnodes 4 --nproc-per-node 8 \
    --rdzv-backend c10d --rdzv-endpoint ${MASTER_ADDR:?set MASTER_ADDR to the first node}:${MASTER_PORT:-29500} \
    --rdzv-id ${SLURM_JOB_ID:-5d03e9bd6c} \
    "${TRAIN_SCRIPT:-train.py}" "$@"
