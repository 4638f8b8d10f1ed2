"""The table of Megatron-DeepSpeed's flags: the setting of each, or the reason why it is not needed, or refused.

`nlgmoe from-megatron` translates by it, and the README's table is printed from it. Defaults are those of
`megatron/arguments.py` in microsoft/Megatron-DeepSpeed (groups `_add_network_size_args` to `_add_distillation_args`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["setting", "ignored", "refused"]
Parse = Callable[[str], Any]


@dataclass(frozen=True)
class Flag:
    """One flag.

    Attributes:
        name: with its dashes.
        parse: int, float or str; None for a switch, which has no value.
        many: takes any number of values.
        default: Megatron-DeepSpeed's; None where it has none.
        setting: dotted path of the setting that takes the value unchanged; "" where it is derived.
        allowed: the only values that work here; empty: any.
        optional: there is no default, and without it the setting is left out.
    """

    name: str
    parse: Parse | None = None
    many: bool = False
    default: Any = None
    setting: str = ""
    allowed: tuple[Any, ...] = ()
    optional: bool = False


@dataclass(frozen=True)
class Row:
    """Flags that belong together: a row of the README's table.

    Attributes:
        flags: the flags.
        kind: they become a setting, are ignored, or are refused.
        here: their settings; empty unless `kind` is "setting".
        note: the reason, or a remark; for a refused flag the reason and, after a semicolon, the remedy.
    """

    flags: tuple[Flag, ...]
    kind: Kind
    here: str = ""
    note: str = ""


def _same(
    setting: str, name: str, parse: Parse | None, default: Any = None, note: str = "", optional: bool = False
) -> Row:
    """One flag that is one setting."""
    flag = Flag(name, parse, default=default, setting=setting, optional=optional)
    return Row((flag,), "setting", f"`{setting}`", note)


def _derived(here: str, flags: Sequence[Flag], note: str = "") -> Row:
    return Row(tuple(flags), "setting", here, note)


def _ignored(note: str, *flags: Flag) -> Row:
    return Row(flags, "ignored", note=note)


def _refused(note: str, *flags: Flag) -> Row:
    return Row(flags, "refused", note=note)


def _switches(*names: str) -> list[Flag]:
    return [Flag(name) for name in names]


_MODEL = (
    _same("model.config.num_layers", "--num-layers", int),
    _same("model.config.hidden_size", "--hidden-size", int),
    _same(
        "model.config.ffn_hidden_size",
        "--ffn-hidden-size",
        int,
        note="4 x hidden size in both if not given",
        optional=True,
    ),
    _same("model.config.num_heads", "--num-attention-heads", int),
    _derived(
        "`model.config.seq_len`",
        [Flag("--seq-length", int), Flag("--max-position-embeddings", int)],
        "positions past the sequence length are never trained, so there are none",
    ),
    _same("model.config.hidden_dropout", "--hidden-dropout", float, 0.1, "0 here by default"),
    _same("model.config.attention_dropout", "--attention-dropout", float, 0.1, "0 here by default"),
    _same("model.config.init_std", "--init-method-std", float, 0.02),
    _same("model.config.layer_norm_eps", "--layernorm-epsilon", float, 1e-5),
    _same("model.config.vocab_size_multiple", "--make-vocab-size-divisible-by", int, 128),
)

_EXPERTS = (
    _derived(
        "`model.config.moe.num_experts`",
        [Flag("--num-experts", int, many=True, default=[1])],
        "one value, or one for each MoE position; 1 is a dense layer, 0 here; alone a dense model, `moe: null`",
    ),
    _same("model.config.moe.expert_interval", "--expert-interval", int, 2),
    _same("model.config.moe.top_k", "--topk", int, 1),
    Row(
        (
            Flag(
                "--mlp-type",
                str,
                default="standard",
                setting="model.config.moe.mlp_type",
                allowed=("standard", "residual"),
            ),
        ),
        "setting",
        "`model.config.moe.mlp_type`",
        "`residual` has Megatron-DeepSpeed's learned mix",
    ),
    _same("model.config.moe.train_capacity_factor", "--moe-train-capacity-factor", float, 1.0),
    _derived(
        "`model.config.moe.eval_capacity_factor`, `eval_token_dropping: true`",
        [Flag("--moe-eval-capacity-factor", float, default=1.0, setting="model.config.moe.eval_capacity_factor")],
        "evaluation drops nothing here by default",
    ),
    _same("model.config.moe.min_capacity", "--moe-min-capacity", int, 4),
    _derived(
        "`model.config.moe.token_dropping: false`",
        [Flag("--disable-moe-token-dropping")],
        "truly dropless, not padded to the largest load",
    ),
    _derived("`model.config.moe.second_expert: argmax`", [Flag("--disable-moe-top2-2nd-expert-sampling")]),
    Row(
        (Flag("--moe-loss-coeff", float, default=0.1, setting="model.config.moe.loss_coeff"),),
        "setting",
        "`model.config.moe.loss_coeff`, `aux_scope: rank`",
        "balanced within each rank as there; `global`, the default here, balances over all",
    ),
    _derived(
        "`trainer.strategy.init_args.expert_parallel_size`",
        [Flag("--moe-expert-parallel-size", int, default=1)],
        "a layer with fewer experts takes the largest degree that divides them, so 64 works with layers of 32",
    ),
)

_OPTIMISATION = (
    _same("model.optimizer.lr", "--lr", float),
    _derived(
        "`model.optimizer.betas`",
        [Flag("--adam-beta1", float, default=0.9), Flag("--adam-beta2", float, default=0.999)],
    ),
    _same("model.optimizer.eps", "--adam-eps", float, 1e-8),
    _same("model.optimizer.weight_decay", "--weight-decay", float, 0.01),
    _same("trainer.gradient_clip_val", "--clip-grad", float, 1.0),
    _derived(
        "`model.schedule.shape`",
        [Flag("--lr-decay-style", str, default="linear", allowed=("constant", "linear", "cosine"))],
        "`linear` is `wsd` whose fall begins where the warm-up ends",
    ),
    _derived("`model.schedule.min_lr`", [Flag("--min-lr", float, default=0.0)]),
    _derived(
        "`model.schedule.warmup_tokens`",
        [
            Flag("--lr-warmup-tokens", int),
            Flag("--lr-warmup-samples", int, default=0),
            Flag("--lr-warmup-iters", int, default=0),
            Flag("--lr-warmup-fraction", float),
        ],
        "steps and sequences become tokens",
    ),
    _derived(
        "`model.schedule.decay_tokens`",
        [Flag("--lr-decay-tokens", int), Flag("--lr-decay-samples", int), Flag("--lr-decay-iters", int)],
        "the length of training if not given",
    ),
    _derived("`trainer.precision`", _switches("--fp16", "--bf16"), "`16-mixed`, `bf16-mixed`, else `32-true`"),
    _derived(
        "`trainer.strategy.init_args`: `initial_scale_power`, `loss_scale_window`, `hysteresis`",
        [
            Flag("--initial-loss-scale", float),
            Flag("--loss-scale-window", float),
            Flag("--hysteresis", int, default=2),
        ],
        "fp16 only; the DeepSpeed configuration wins; with `--deepspeed` else the tutorial's 11, 500, 2",
    ),
)

_LENGTH = (
    _derived(
        "`model.train_tokens`",
        [Flag("--train-tokens", int), Flag("--train-samples", int)],
        "with both, the one that is reached first",
    ),
    _derived("`trainer.max_steps`", [Flag("--train-iters", int)], "beside `train_tokens`: whichever comes first"),
    _derived(
        "`trainer.max_time`",
        [Flag("--exit-duration-in-mins", int)],
        "counted over all restarts here, over one job there",
    ),
)

_BATCH_AND_DATA = (
    _same("data.micro_batch_size", "--micro-batch-size", int),
    _derived("`data.global_batch_size`", [Flag("--global-batch-size", int)], "micro-batch x ranks if not given"),
    _derived(
        "`data.batch_ramp_up`: `start`, `increment`, `tokens`",
        [Flag("--rampup-batch-size", int, many=True)],
        "sequences become tokens; micro-batches are smaller at first here, fewer there, so that start and increment are "
        "multiples of global / micro-batch size",
    ),
    _derived(
        "`data.corpus`: `nlgmoe.data.MegatronIndexed`, `prefix`; of several `nlgmoe.data.Blend`, `parts`",
        [Flag("--data-path", str, many=True)],
        "one prefix, or weight and prefix in turn; a part of a blend is named after its file",
    ),
    _derived("`data.corpus.init_args.split`", [Flag("--split", str, default="969, 30, 1")], "by documents, as there"),
    _derived(
        "`data.tokenizer`, `model.config.vocab_size`",
        [
            Flag("--vocab-file", str),
            Flag("--merge-file", str),
            Flag("--tokenizer-type", str, default="GPT2BPETokenizer", allowed=("GPT2BPETokenizer",)),
        ],
        "`gpt2` for gpt2-vocab.json and gpt2-merges.txt, else the folder of vocab.json and merges.txt",
    ),
    _derived(
        "`data.document_attention`",
        _switches("--reset-attention-mask", "--reset-position-ids"),
        "both or neither; an end-of-document token that is read opens the next document here, closes its own there",
    ),
    _derived("`data.mask_eod_loss`", _switches("--eod-mask-loss"), "in evaluation too, as there"),
    _same("data.num_workers", "--num-workers", int, 2),
    _derived("`model.seed`, `data.seed`", [Flag("--seed", int, default=1234)]),
)

_RUN = (
    _derived(
        "`trainer.callbacks`: `ModelCheckpoint`, `every_n_train_steps`",
        [Flag("--save-interval", int)],
        "all are kept, as there",
    ),
    _derived(
        "`trainer.default_root_dir`",
        [Flag("--save", str), Flag("--tensorboard-dir", str)],
        "one folder for checkpoints, logs and results",
    ),
    _derived(
        "`--ckpt_path last`", [Flag("--load", str)], "resuming is said on the command line; refused if not `--save`"
    ),
    _derived("`trainer.val_check_interval`", [Flag("--eval-interval", int, default=1000)], "steps in both"),
    _derived(
        "`data.max_eval_windows`",
        [Flag("--eval-iters", int, default=100)],
        "sequences, the same ones every time: global batches times their size",
    ),
    _same("trainer.log_every_n_steps", "--log-interval", int, 100),
    _derived(
        "`model.activation_checkpointing`",
        _switches("--checkpoint-activations", "--deepspeed-activation-checkpointing"),
        "each block is recomputed in the backward pass",
    ),
    _derived(
        "`trainer.devices`, `trainer.num_nodes`",
        [
            Flag("--num_gpus", int),
            Flag("--num_nodes", int),
            Flag("--nproc_per_node", int),
            Flag("--nproc-per-node", int),
            Flag("--nnodes", int),
        ],
        "the launcher's; without them a script's NUM_GPUS and NUM_GPUS_PERNODE, a log's `world_size`",
    ),
    _derived(
        "`trainer.strategy`: `nlgmoe.ExpertParallelStrategy`, `stage`",
        [Flag("--zero-stage", int, allowed=(0, 1, 2))],
        "ZeRO 0, 1, 2; the stage in the DeepSpeed configuration wins",
    ),
    _derived("`trainer.strategy.init_args.offload_optimizer`", [Flag("--cpu-optimizer")]),
    _derived(
        "`model.curriculum`: `start`, `increment`, `tokens`",
        [Flag("--deepspeed_config", str)],
        "its section `curriculum_learning`, where the file is known; steps become tokens. ZeRO and precision in it must "
        "agree with the flags, its clipping wins",
    ),
    _derived("`trainer.strategy.init_args.timeout_seconds`", [Flag("--distributed-timeout-minutes", int)]),
)

_DISTILLATION = (
    _derived(
        "`model.distiller`: `nlgmoe.MixtureOfStudents`",
        _switches("--mos", "--kd"),
        "on every step, as there; the callback `nlgmoe.StagedDistillation` ends it (docs/distillation.md)",
    ),
    _same(
        "model.distiller.init_args.teacher",
        "--load-teacher",
        str,
        note="a checkpoint of nlgmoe, which says what it is",
    ),
    _same("model.distiller.init_args.beta", "--kd-beta-ce", float, 1.0, "over counted tokens here, `seq_length` there"),
    _same("model.distiller.init_args.temperature", "--kd-temp", float, 1.0),
    _same(
        "model.distiller.init_args.num_layers",
        "--num-layers-teacher",
        int,
        note="a check, as the next three are: the checkpoint says what the teacher is",
        optional=True,
    ),
    _same("model.distiller.init_args.hidden_size", "--hidden-size-teacher", int, optional=True),
    _same("model.distiller.init_args.num_heads", "--num-attention-heads-teacher", int, optional=True),
    _derived(
        "`model.distiller.init_args.num_experts`",
        [Flag("--num-experts-teacher", int, many=True)],
        "1 is a dense teacher, `0`",
    ),
)

_IGNORED = (
    _ignored(
        "the strategy does that",
        *_switches("--deepspeed", "--create-moe-param-group", "--no-pipeline-parallel", "--ds_fused_adam"),
        Flag("--distributed-backend", str),
        Flag("--DDP-impl", str),
        Flag("--local_rank", str),
        *_switches("--use-contiguous-buffers-in-ddp", "--accumulate-allreduce-grads-in-fp32", "--overlap-grad-reduce"),
    ),
    _ignored("the .idx says it", Flag("--data-impl", str, allowed=("mmap", "infer"))),
    _ignored("batches are computed from the count of samples", Flag("--data-cache-path", str), Flag("--mmap-warmup")),
    _ignored(
        "the configuration decides when a run is resumed",
        *_switches("--override-opt_param-scheduler", "--override-lr-scheduler"),
    ),
    _ignored(
        "what is logged is the same for every run",
        Flag("--tensorboard-queue-size", str),
        Flag("--tensorboard-log-interval", str),
        Flag("--timing-log-level", str),
        Flag("--timing-log-option", str),
        *_switches(
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
    _ignored(
        "a choice of kernel: attention is PyTorch's, the mathematics is the same",
        *_switches(
            "--use-flash-attn",
            "--use-flash-attn-v1",
            "--use-flash-attn-v2",
            "--use-flash-attn-triton",
            "--use-flash-attn-builder",
            "--no-masked-softmax-fusion",
            "--no-bias-gelu-fusion",
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
    _ignored("read there and never used", Flag("--kd-alpha-ce", float)),
)

_REFUSED = (
    _refused(
        "there is no tensor parallelism here (the tutorial's MoE runs use none); set it to 1 and add data parallelism or "
        "ZeRO",
        Flag("--tensor-model-parallel-size", int, allowed=(1,)),
    ),
    _refused(
        "there is no pipeline parallelism here (MoE has none there either); set it to 1",
        Flag("--pipeline-model-parallel-size", int, allowed=(1,)),
    ),
    _refused(
        "there is no tensor, pipeline or sequence parallelism here; remove it",
        Flag("--ds-sequence-parallel-size", int, allowed=(1,)),
        Flag("--num-layers-per-virtual-pipeline-stage", int),
        *_switches("--enable-expert-tensor-parallelism", "--sequence-parallel", "--force-ds-sequence-parallel"),
    ),
    _refused("the experts run on one grouped product here, Tutel is not used; remove it", Flag("--use-tutel")),
    _refused(
        "the model here is GPT-2's (learned positions, LayerNorm, tanh GELU, biases, tied embeddings, as many key heads as "
        "heads); remove it",
        Flag("--normalization", str, allowed=("layernorm",)),
        Flag("--num-key-value-heads", int),
        Flag("--kv-channels", int),
        Flag("--num-experts-switch", int),
        Flag("--rotary-percent", float),
        *_switches(
            "--swiglu",
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
    _refused("AdamW is the only optimizer here; remove it", Flag("--optimizer", str, allowed=("adam",))),
    _refused(
        "weight decay is constant here; remove it",
        Flag("--weight-decay-incr-style", str, allowed=("constant",)),
        Flag("--start-weight-decay", float),
        Flag("--end-weight-decay", float),
    ),
    _refused(
        "a checkpoint is resumed int here, or a new run starts from its weights (`model.warm_start`); remove it",
        *_switches(
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
    _refused("fp16's loss scale is dynamic here; remove it", Flag("--loss-scale", float)),
    _refused("the loss scale may fall to 1 here; remove it", Flag("--min-loss-scale", float, allowed=(1.0,))),
    _refused(
        "the loss, and the residual stream under fp32 settings, have the precision that docs/numerics.md says; remove it",
        *_switches("--fp16-lm-cross-entropy", "--fp32-residual-connection"),
    ),
    _refused(
        "training and validation come from the same data sets by `--split` here; use `--data-path`",
        *(Flag(name, str, many=True) for name in ("--train-data-path", "--valid-data-path", "--test-data-path")),
    ),
    _refused("data come in one random order here; remove it", Flag("--dataloader-type", str, allowed=("single",))),
    _refused(
        "DeepSpeed's data efficiency library is not used here; remove it (`model.curriculum` has sequences that grow)",
        *_switches("--data-efficiency-curriculum-learning", "--random-ltd"),
    ),
    _refused("a run ends after tokens, steps or time here; use `--train-iters`", Flag("--exit-interval", int)),
    _refused(
        "evaluation alone is `train.py validate` here; remove it",
        *_switches("--skip-train", "--inference", "--ds-inference"),
    ),
)

SECTIONS: dict[str, tuple[Row, ...]] = {
    "Model": _MODEL,
    "Experts": _EXPERTS,
    "Optimisation": _OPTIMISATION,
    "Length": _LENGTH,
    "Batch and data": _BATCH_AND_DATA,
    "Run and cluster": _RUN,
    "Distillation": _DISTILLATION,
    "Not needed here": _IGNORED,
    "Refused": _REFUSED,
}
FLAGS: dict[str, tuple[Flag, Row]] = {
    flag.name: (flag, row) for rows in SECTIONS.values() for row in rows for flag in row.flags
}
