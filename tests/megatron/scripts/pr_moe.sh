#!/bin/bash
# A PR-MoE: a list of experts made by a loop, arrays, defaults for positional arguments, a function, a here-document.
set -euo pipefail
module load cuda
export NCCL_DEBUG=WARN
SIZE=${1:-350M}
NODES=${NODES:-8}
GPUS_PER_NODE=8
ZERO_STAGE=2

EXPERTS=""
for count in 32 32 32 32 32 32 32 32 32 32 64 64; do
    EXPERTS+=" $count"
done

if [ "$SIZE" == "350M" ]; then
    WIDTH=1024; LR=3.0e-4
elif [ "$SIZE" == "1.3B" ]; then
    WIDTH=2048; LR=1.2e-4
else
    echo "unknown size $SIZE"; exit 1
fi

cat <<EOT > ds_config_${SIZE}.json
{
  "train_batch_size": 256,
  "zero_optimization": {"stage": $ZERO_STAGE, "offload_optimizer": {"device": "cpu"}},
  "gradient_clipping": 0.5,
  "fp16": {"enabled": true, "initial_scale_power": 12, "loss_scale_window": 1000, "hysteresis": 4}
}
EOT

ARGS=(
    --num-layers 24
    --hidden-size $WIDTH
    --num-attention-heads 16
    --seq-length 2048
    --max-position-embeddings $((2 * 1024))
    --num-experts $EXPERTS
    --mlp-type residual
    --moe-expert-parallel-size $((NODES * GPUS_PER_NODE))
    --micro-batch-size 2
    --global-batch-size 256
    --lr $LR
    --min-lr 1.0e-6
    --lr-decay-style cosine
    --train-samples 146484375
    --lr-decay-samples 146484375
    --lr-warmup-samples 183105
    --fp16
)

recompute() {
    [[ -n "$1" ]] && ARGS+=(--deepspeed-activation-checkpointing)
}
recompute yes

torchrun --nnodes=$NODES --nproc_per_node $GPUS_PER_NODE pretrain_gpt.py \
    "${ARGS[@]}" \
    --data-path 1.0 "/data/the pile/pile_text_document" \
    --vocab-file gpt2-vocab.json --merge-file gpt2-merges.txt \
    --save-interval 1000 --save "runs/$SIZE" \
    --deepspeed --deepspeed_config ds_config_${SIZE}.json 2>&1 | tee train.log
