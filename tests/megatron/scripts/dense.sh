#!/bin/bash
# A dense model on one GPU; lengths in steps; most settings left to Megatron's defaults.
LAYERS=12
TP=1
if (( TP == 1 )) && [ -z "" ]; then OPTIONAL="--bf16"; else OPTIONAL="--fp16"; fi
python -u pretrain_gpt.py --num-layers $LAYERS --hidden-size 768 --num-attention-heads 12 --seq-length 1024 \
    --max-position-embeddings 2048 --tensor-model-parallel-size $TP --num-experts 1 --moe-loss-coeff 0.01 \
    --micro-batch-size 8 --global-batch-size 32 --lr 6e-4 --train-iters 1000 --lr-warmup-fraction 0.01 \
    --data-path my_text_document --vocab-file data/gpt2-vocab.json --merge-file data/gpt2-merges.txt $OPTIONAL
