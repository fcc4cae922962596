#!/usr/bin/env bash
# Megatron-LM 0.19 (ranks in its default order tp-cp-ep-dp-pp). plan.json holds the whole plan.
# Plan dab2af67a2: llama3.1-405b on h100-sxm:64x8, 512 devices (tp 8 · cp 2 · pp 8 · dp 4 · ep 1 · etp 1).
# Predicted: 27.92 s per step, 293 tokens/s per device, 64.1 GiB per device.
# Run it once per node (job.sbatch does); MEGATRON_PATH leads to the Megatron-LM checkout. By default it
# measures the plan on mock data; TRAIN_ARGS and DATA_ARGS replace that, and further arguments are passed on.
set -euo pipefail

NNODES=64
GPUS_PER_NODE=8
NODE_RANK=${NODE_RANK:-${SLURM_NODEID:?set NODE_RANK to this node, from 0}}
MASTER_ADDR=${MASTER_ADDR:?set MASTER_ADDR to the first node}
MASTER_PORT=${MASTER_PORT:-29500}
TRAIN_ARGS="${TRAIN_ARGS:---train-iters 50 --lr 1e-5 --eval-iters 0 --log-interval 1 --log-throughput}"
DATA_ARGS="${DATA_ARGS:---mock-data --tokenizer-type NullTokenizer}"
export CUDA_DEVICE_MAX_CONNECTIONS=1  # launches stay in order, so that communication starts first

MODEL_ARGS=(
    --num-layers 126
    --hidden-size 16384
    --ffn-hidden-size 53248
    --num-attention-heads 128
    --group-query-attention
    --num-query-groups 8
    --kv-channels 128
    --seq-length 8192
    --max-position-embeddings 131072
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
    --tensor-model-parallel-size 8
    --pipeline-model-parallel-size 8
    --context-parallel-size 2
    --sequence-parallel
    --cp-comm-type p2p
    --account-for-embedding-in-pipeline-split
    --account-for-loss-in-pipeline-split
    --num-virtual-stages-per-pipeline-rank 8
)
BATCH_ARGS=(
    --micro-batch-size 1
    --global-batch-size 512
)
PRECISION_ARGS=(
    --bf16
    --fp8-format hybrid
    --fp8-recipe tensorwise
)
STATE_ARGS=(
    --optimizer adam
    --use-distributed-optimizer
    --overlap-grad-reduce
    --overlap-param-gather
)
RECOMPUTE_ARGS=(
    --recompute-granularity full
    --recompute-method block
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
