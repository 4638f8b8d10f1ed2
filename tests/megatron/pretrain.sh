#!/bin/bash
# A PR-MoE in the dialect of the tutorial's folder: flag lists that grow, sed on a template, `eval` at the end.
HERE=`pwd`
CONTEXT=2048
SEQUENCES=256
TOKENS=300000000000
# TOKENS=330000000000
STEPS=$(( ${TOKENS} * 3 / ${SEQUENCES} / ${CONTEXT} ))
GPUS=$(($(ds_ssh nvidia-smi --query-gpu=name | wc -l)-2))
EXPERTS="32 32 32 32 32 32 32 32 32 32 64 64"
DROP="true"
stamp=$(date "+%Y.%m.%d-%H.%M.%S")
RUN="pr-moe-lr-2.0e-4-gpus-${GPUS}"
OUT=$HERE/out
mkdir -p "${OUT}/log/"

if [ "${USE_BLEND:-false}" = "true" ]; then
    BLEND=/data/blend
    CORPUS="0.7 ${BLEND}/Books3_ftfy_text_document \
0.3 ${BLEND}/Github_ftfy_text_document"
else
    CORPUS=/data/pile/pile_text_document
fi

data_flags=" \
    --vocab-file /data/pile/gpt2-vocab.json \
    --merge-file /data/pile/gpt2-merges.txt \
    --data-path ${CORPUS} \
    --data-impl mmap"

flags=" \
    --override-opt_param-scheduler \
    --adam-beta1 0.9 --adam-beta2 0.95 \
    --tensor-model-parallel-size 1 \
    --moe-expert-parallel-size ${GPUS} \
    --num-experts ${EXPERTS} --mlp-type residual \
    --moe-loss-coeff 0.01 \
    --moe-train-capacity-factor 1.0 --moe-eval-capacity-factor 1.0 --moe-min-capacity 4 \
    --init-method-std 0.014 \
    --lr-decay-tokens 300000000000 --lr-warmup-tokens 375000000 \
    --micro-batch-size 4 --global-batch-size ${SEQUENCES} \
    --exit-duration-in-mins 30000000 \
    --num-layers 24 --hidden-size 1024 --num-attention-heads 16 \
    --seq-length ${CONTEXT} --max-position-embeddings ${CONTEXT} \
    --train-tokens ${TOKENS} --train-iters ${STEPS} \
    --lr 2.0e-4 --min-lr 2e-06 --lr-decay-style cosine \
    --split 98,2,0 \
    --log-interval 10 --eval-interval 100 --eval-iters 10 --save-interval 10000 \
    --weight-decay 0.1 --clip-grad 1.0 --hysteresis 2 --num-workers 0 --fp16 \
    --load ${OUT}/${RUN} --save ${OUT}/${RUN} \
    --tensorboard-queue-size 1 --log-timers-to-tensorboard --log-batch-size-to-tensorboard \
    --log-validation-ppl-to-tensorboard --log-optimizer-states-to-tensorboard \
    --tensorboard-dir ${OUT}/tensorboard/${HOSTNAME}_${stamp}"
    # --rampup-batch-size 32 32 1953125 \

flags="${flags} --checkpoint-activations --create-moe-param-group"
if [ "${DROP}" = "false" ]; then
flags="${flags} --disable-moe-token-dropping"
fi

config="ds_config_${RUN}.json"
sed "s/CONFIG_BATCH_SIZE/${SEQUENCES}/" template.json \
    | sed "s/ZERO_STAGE/1/" \
    | sed "s/CONFIG_FP16_ENABLED/true/" \
      > ${config}

deepspeed_flags=" \
    --deepspeed --deepspeed_config ${config} \
    --pipeline-model-parallel-size 1 --no-pipeline-parallel"

run_cmd="deepspeed --num_nodes 8 --num_gpus 8 ${HERE}/../../pretrain_gpt.py ${flags} ${data_flags} ${deepspeed_flags} &> ${OUT}/log/${RUN}_${stamp}.log"
echo ${run_cmd}
eval ${run_cmd}
