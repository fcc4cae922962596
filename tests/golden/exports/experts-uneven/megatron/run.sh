#!/usr/bin/env bash
# Megatron-LM 0.19 (ranks in its default order tp-cp-ep-dp-pp). plan.json holds the whole plan.
# Plan aae7f6bbc2: deepseek-v3 on h100-sxm:64x8, 512 devices (tp 2 · cp 1 · pp 16 · dp 16 · ep 16 · etp 1).
# Predicted: 27.18 s per step, 1,130 tokens/s per device, 47.5 GiB per device.
# Run it once per node (job.sbatch does); MEGATRON_PATH leads to the Megatron-LM checkout. By default it
# measures the plan on mock data; TRAIN_ARGS and DATA_ARGS replace that, and further arguments are passed on.
# Left out, as in the plan: 1 multi-token-prediction module(s) of the model.
# Not recomputed: the norm before a dense feed-forward network, which is fused with its first product.
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
    --num-layers 61
    --hidden-size 7168
    --ffn-hidden-size 18432
    --num-attention-heads 128
    --multi-latent-attention
    --kv-lora-rank 512
    --q-lora-rank 1536
    --qk-head-dim 128
    --qk-pos-emb-head-dim 64
    --v-head-dim 128
    --kv-channels 128
    --qk-layernorm
    --seq-length 4096
    --max-position-embeddings 163840
    --position-embedding-type rope
    --vocab-size 129280
    --normalization RMSNorm
    --swiglu
    --disable-bias-linear
    --untie-embeddings-and-output-weights
    --attention-dropout 0.0
    --hidden-dropout 0.0
    --num-experts 256
    --moe-router-topk 8
    --moe-ffn-hidden-size 2048
    --moe-shared-expert-intermediate-size 2048
    --moe-layer-freq '([0]*3+[1]*58)'
)
PARALLEL_ARGS=(
    --tensor-model-parallel-size 2
    --pipeline-model-parallel-size 16
    --context-parallel-size 1
    --sequence-parallel
    --expert-model-parallel-size 16
    --expert-tensor-parallel-size 1
    --moe-token-dispatcher-type flex
    --moe-flex-dispatcher-backend hybridep
    --moe-grouped-gemm
    --pipeline-model-parallel-layout 'Et*3|t*4|t*4|t*4|t*4|t*4|t*4|t*4|t*4|t*4|t*4|t*4|t*4|t*4|t*3|t*3L'
)
BATCH_ARGS=(
    --micro-batch-size 1
    --global-batch-size 3840
)
PRECISION_ARGS=(
    --bf16
)
STATE_ARGS=(
    --optimizer adam
    --use-distributed-optimizer
    --overlap-grad-reduce
    --overlap-param-gather
)
RECOMPUTE_ARGS=(
    --recompute-granularity selective
    --recompute-modules layernorm mla_up_proj
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
