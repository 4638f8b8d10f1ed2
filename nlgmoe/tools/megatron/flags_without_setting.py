"""Megatron-DeepSpeed's flags that are ignored, and those that are refused, with the reasons."""

from __future__ import annotations

from nlgmoe.tools.megatron.flag_rows import Flag, ignored, refused, switches

IGNORED = (
    ignored(
        "the strategy does that",
        *switches("--deepspeed", "--create-moe-param-group", "--no-pipeline-parallel", "--ds_fused_adam"),
        Flag("--distributed-backend", str),
        Flag("--DDP-impl", str),
        Flag("--local_rank", str),
        *switches("--use-contiguous-buffers-in-ddp", "--accumulate-allreduce-grads-in-fp32", "--overlap-grad-reduce"),
    ),
    ignored("the .idx says it", Flag("--data-impl", str, allowed=("mmap", "infer"))),
    ignored("batches are computed from the count of samples", Flag("--data-cache-path", str), Flag("--mmap-warmup")),
    ignored(
        "the configuration decides when a run is resumed",
        *switches("--override-opt_param-scheduler", "--override-lr-scheduler"),
    ),
    ignored(
        "what is logged is the same for every run",
        Flag("--tensorboard-queue-size", str),
        Flag("--tensorboard-log-interval", str),
        Flag("--timing-log-level", str),
        Flag("--timing-log-option", str),
        *switches(
            "--log-timers-to-tensorboard",
            "--log-batch-size-to-tensorboard",
            "--log-validation-ppl-to-tensorboard",
            "--log-optimizer-states-to-tensorboard",
            "--log-memory-to-tensorboard",
            "--log-world-size-to-tensorboard",
            "--log-params-norm",
            "--log-num-zeros-in-grad",
        ),
    ),
    ignored(
        "a choice of kernel: attention is PyTorch's, the mathematics is the same",
        *switches(
            "--use-flash-attn",
            "--use-flash-attn-v1",
            "--use-flash-attn-v2",
            "--use-flash-attn-triton",
            "--use-flash-attn-builder",
            "--no-masked-softmax-fusion",
            "--no-bias-dropout-fusion",
            "--no-gradient-accumulation-fusion",
            "--no-persist-layer-norm",
            "--disable-mem-efficient-ln",
            "--no-async-tensor-model-parallel-allreduce",
            "--no-query-key-layer-scaling",
            "--attention-softmax-in-fp32",
            "--use-cpu-initialization",
            "--no-scatter-gather-tensors-in-pipeline",
        ),
    ),
    ignored(
        "GELU is the tanh form here, exact there without the fusion: they differ by at most 5e-4",
        Flag("--no-bias-gelu-fusion"),
    ),
    ignored("read there and never used", Flag("--kd-alpha-ce", float)),
)

REFUSED = (
    refused(
        "there is no tensor parallelism here (the tutorial's MoE runs use none); set it to 1 and add data parallelism or "
        "ZeRO",
        Flag("--tensor-model-parallel-size", int, allowed=(1,)),
    ),
    refused(
        "there is no pipeline parallelism here (MoE has none there either); set it to 1",
        Flag("--pipeline-model-parallel-size", int, allowed=(1,)),
    ),
    refused(
        "there is no tensor, pipeline or sequence parallelism here; remove it",
        Flag("--ds-sequence-parallel-size", int, allowed=(1,)),
        Flag("--num-layers-per-virtual-pipeline-stage", int),
        *switches("--enable-expert-tensor-parallelism", "--sequence-parallel", "--force-ds-sequence-parallel"),
    ),
    refused("the experts run on one grouped product here, Tutel is not used; remove it", Flag("--use-tutel")),
    refused(
        "SwiGLU is not translated; remove it, and set model.config.ffn_network to swiglu and model.config.ffn_hidden_size",
        *switches("--swiglu"),
    ),
    refused(
        "the model here is GPT-2's (learned positions, LayerNorm, tanh GELU, biases, tied embeddings, as many key heads as "
        "heads); remove it",
        Flag("--normalization", str, allowed=("layernorm",)),
        Flag("--num-key-value-heads", int),
        Flag("--kv-channels", int),
        Flag("--num-experts-switch", int),
        Flag("--rotary-percent", float),
        *switches(
            "--squared-relu",
            "--use-rotary-position-embeddings",
            "--no-position-embedding",
            "--untie-embeddings-and-output-weights",
            "--disable-bias-linear",
            "--apply-layernorm-1p",
            "--apply-residual-connection-post-layernorm",
            "--init-method-xavier-uniform",
            "--retro-add-retriever",
        ),
    ),
    refused("AdamW is the only optimizer here; remove it", Flag("--optimizer", str, allowed=("adam",))),
    refused(
        "weight decay is constant here; remove it",
        Flag("--weight-decay-incr-style", str, allowed=("constant",)),
        Flag("--start-weight-decay", float),
        Flag("--end-weight-decay", float),
    ),
    refused(
        "a checkpoint is resumed here, or a new run starts from its weights (`model.warm_start`); remove it",
        *switches(
            "--finetune",
            "--no-load-optim",
            "--no-load-rng",
            "--no-load-lr-state",
            "--no-save-optim",
            "--no-save-rng",
            "--reset-iteration",
            "--universal-checkpoint",
            "--use-checkpoint-opt_param-scheduler",
            "--use-checkpoint-args",
        ),
    ),
    refused("fp16's loss scale is dynamic here; remove it", Flag("--loss-scale", float)),
    refused("the loss scale may fall to 1 here; remove it", Flag("--min-loss-scale", float, allowed=(1.0,))),
    refused(
        "the loss, and the residual stream under fp32 settings, have the precision that docs/numerics.md says; remove it",
        *switches("--fp16-lm-cross-entropy", "--fp32-residual-connection"),
    ),
    refused(
        "training and validation come from the same data sets by `--split` here; use `--data-path`",
        *(Flag(name, str, many=True) for name in ("--train-data-path", "--valid-data-path", "--test-data-path")),
    ),
    refused("data come in one random order here; remove it", Flag("--dataloader-type", str, allowed=("single",))),
    refused(
        "DeepSpeed's data efficiency library is not used here; remove it (`model.curriculum` has sequences that grow)",
        *switches("--data-efficiency-curriculum-learning", "--random-ltd"),
    ),
    refused("a run ends after tokens, steps or time here; use `--train-iters`", Flag("--exit-interval", int)),
    refused(
        "evaluation alone is `train.py validate` here; remove it",
        *switches("--skip-train", "--inference", "--ds-inference"),
    ),
)
