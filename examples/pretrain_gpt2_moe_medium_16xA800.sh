#!/usr/bin/env bash
# GPT2-MoE-Medium (1.97 B parameters with the shared experts) on two nodes with 8 A800 each, started from one of them.
# Needs pdsh on this node, ssh without a password to every host of the hostfile, and this checkout, the Python
# environment and the data under the same paths on all nodes. About 1 B tokens: 1907 steps of 524288 tokens.
#
#   DATA=/data/slimpajama_text_document bash examples/pretrain_gpt2_moe_medium_16xA800.sh [more flags]
set -euo pipefail
cd "$(dirname "$0")/.."

: "${DATA:?set DATA to the prefix of the .bin and .idx files that scmoe preprocess wrote}"
: "${VOCAB:=gpt2-vocab.json}" "${MERGES:=gpt2-merges.txt}"
: "${HOSTFILE:=examples/hostfile_2x8}" "${MASTER_PORT:=29500}"
: "${CHECKPOINTS:=checkpoints/gpt2_moe_medium}"

if [[ "${CUDA_DEVICE_MAX_CONNECTIONS:-}" == 1 ]]; then
    echo "CUDA_DEVICE_MAX_CONNECTIONS=1 serialises streams and undoes ScMoE's overlap; unset it" >&2
    exit 1
fi

# Lets the launcher notice a node that has lost its power or its link.
export PDSH_SSH_ARGS_APPEND="${PDSH_SSH_ARGS_APPEND:--oServerAliveInterval=5 -oServerAliveCountMax=3}"

deepspeed --hostfile "$HOSTFILE" --master_port "$MASTER_PORT" ${MASTER_ADDR:+--master_addr "$MASTER_ADDR"} \
    pretrain_gpt_scmoe.py \
    --preset gpt2-moe-medium \
    --deepspeed_config ds_configs/gpt2_moe_medium_16xA800.json \
    --tokenizer-type GPT2BPETokenizer --vocab-file "$VOCAB" --merge-file "$MERGES" \
    --data-path "$DATA" --num-workers 2 \
    --train-iters 1907 --log-interval 10 --eval-interval 200 --eval-iters 10 \
    --save "$CHECKPOINTS" --auto-resume --save-interval 500 \
    "$@"
