#!/usr/bin/env bash
# A launch as it is found in the field: all of a node as one tensor-parallel group, and few sequences let in.
MODEL=meta-llama/Llama-3.1-70B-Instruct
TP=${TP:-8}

vllm serve "$MODEL" \
    --tensor-parallel-size "$TP" \
    --max-model-len 8192 \
    --max-num-seqs 64 \
    --enforce-eager
