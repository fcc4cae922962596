#!/usr/bin/env bash
# Megatron-LM 0.19 (ranks in its default order tp-cp-ep-dp-pp). plan.json holds the whole plan.
# Plan 5d03e9bd6c: llama3-8b on a100-sxm-80gb:4x8, 32 devices (tp 1 · cp 1 · pp 1 · dp 32 · ep 1 · etp 1).
# Predicted: 8.687 s per step, 3,772 tokens/s per device, 26.2 GiB per device.
# Run it once per node (job.sbatch does); MEGATRON_PATH leads to the Megatron-LM checkout. By default it
# measures the plan on mock data; TRAIN_ARGS and DATA_ARGS replace that, and further arguments are passed on.
set -euo pipefail

NNODES=4
GPUS_PER_NODE=8
NODE_RANK=${NODE_RANK:-${SLURM_NODEID:?set NODE_RANK to this node, from 0}}
MASTER_ADDR=${MASTER_ADDR:?set MASTER_ADDR to the first node}
MASTER_PORT=${MASTER_PORT:-29500}
TRAIN_ARGS="${TRAIN_ARGS:---train-iters 50 --lr 1e-5 --eval-iters 0 --log-interval 1 --log-throughput}"
DATA_ARGS="${DATA_ARGS:---mock-data --tokenizer-type NullTokenizer}"
unset CUDA_DEVICE_MAX_CONNECTIONS  # Megatron-FSDP overlaps its gathers on queues of their own

MODEL_ARGS=(
    --num-layers 32
    --hidden-size 4096
    --ffn-hidden-size 14336
    --num-attention-heads 32
    --group-query-attention
    --num-query-groups 8
    --kv-channels 128
    --seq-length 4096
    --max-position-embeddings 8192
    --position-embedding-type rope
    --vocab-size 128256
    --normalization RMSNorm
    --swiglu
    --disable-bias-linear
    --untie-embeddings-and-output-weights
    --attention-dropout 0.0
    --hidden-dropout 0.0
)
PARALLEL_ARGS=(
    --tensor-model-parallel-size 1
    --pipeline-model-parallel-size 1
    --context-parallel-size 1
)
BATCH_ARGS=(
    --micro-batch-size 1
    --global-batch-size 256
)
PRECISION_ARGS=(
    --bf16
    --megatron-fsdp-main-grads-dtype fp32
    --megatron-fsdp-grad-comm-dtype fp32
)
STATE_ARGS=(
    --optimizer adam
    --use-distributed-optimizer
    --use-megatron-fsdp
    --data-parallel-sharding-strategy optim_grads_params
    --ckpt-format fsdp_dtensor
    --no-gradient-accumulation-fusion
    --num-distributed-optimizer-instances 4
    --overlap-grad-reduce
    --overlap-param-gather
)
RECOMPUTE_ARGS=(
    --recompute-granularity full
    --recompute-method uniform
    --recompute-num-layers 1
)
KERNEL_ARGS=(
    --attention-backend auto
    --cross-entropy-loss-fusion
    --cross-entropy-fusion-impl native
)

torchrun --nnodes $NNODES --nproc-per-node $GPUS_PER_NODE --node-rank $NODE_RANK \
    --master-addr $MASTER_ADDR --master-port $MASTER_PORT \
    "${MEGATRON_PATH:?set it to the Megatron-LM checkout}/pretrain_gpt.py" \
    "${MODEL_ARGS[@]}" \
    "${PARALLEL_ARGS[@]}" \
    "${BATCH_ARGS[@]}" \
    "${PRECISION_ARGS[@]}" \
    "${STATE_ARGS[@]}" \
    "${RECOMPUTE_ARGS[@]}" \
    "${KERNEL_ARGS[@]}" \
    $TRAIN_ARGS $DATA_ARGS "$@"
