"""The table of Megatron-DeepSpeed's flags: the setting of each, or the reason why it is not needed, or refused.

`nlgmoe from-megatron` translates by it, and the README's table is printed from it. Defaults are those of
`megatron/arguments.py` in microsoft/Megatron-DeepSpeed (groups `_add_network_size_args` to `_add_distillation_args`).
"""

from __future__ import annotations

from nlgmoe.tools.megatron.flag_rows import Flag, Row, derived, same, switches
from nlgmoe.tools.megatron.flags_without_setting import IGNORED, REFUSED

_MODEL = (
    same("model.config.num_layers", "--num-layers", int, least=1),
    same("model.config.hidden_size", "--hidden-size", int, least=1),
    same(
        "model.config.ffn_hidden_size",
        "--ffn-hidden-size",
        int,
        note="4 x hidden size in both if not given",
        optional=True,
    ),
    same("model.config.num_heads", "--num-attention-heads", int, least=1),
    derived(
        "`model.config.seq_len`",
        [Flag("--seq-length", int, least=1), Flag("--max-position-embeddings", int)],
        "positions past the sequence length are never trained; here they do not exist",
    ),
    same("model.config.hidden_dropout", "--hidden-dropout", float, 0.1, "0 here by default"),
    same("model.config.attention_dropout", "--attention-dropout", float, 0.1, "0 here by default"),
    same("model.config.init_std", "--init-method-std", float, 0.02),
    same("model.config.layer_norm_eps", "--layernorm-epsilon", float, 1e-5),
    same("model.config.vocab_size_multiple", "--make-vocab-size-divisible-by", int, 128),
)

_EXPERTS = (
    derived(
        "`model.config.moe.num_experts`",
        [Flag("--num-experts", int, many=True, default=[1])],
        "one value, or one for each MoE position; a dense layer is 1 there, 0 here (all dense: `moe: null`)",
    ),
    same("model.config.moe.expert_interval", "--expert-interval", int, 2),
    same("model.config.moe.top_k", "--topk", int, 1),
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
        "`residual` with `residual_mix: learned`, the default",
    ),
    same("model.config.moe.train_capacity_factor", "--moe-train-capacity-factor", float, 1.0),
    derived(
        "`model.config.moe.eval_capacity_factor`, `eval_token_dropping: true`",
        [Flag("--moe-eval-capacity-factor", float, default=1.0, setting="model.config.moe.eval_capacity_factor")],
        "evaluation drops nothing here by default",
    ),
    same("model.config.moe.min_capacity", "--moe-min-capacity", int, 4),
    derived(
        "`model.config.moe.token_dropping: false`",
        [Flag("--disable-moe-token-dropping")],
        "dropless without padding to the largest load",
    ),
    derived("`model.config.moe.second_expert: argmax`", [Flag("--disable-moe-top2-2nd-expert-sampling")]),
    Row(
        (Flag("--moe-loss-coeff", float, default=0.1, setting="model.config.moe.loss_coeff"),),
        "setting",
        "`model.config.moe.loss_coeff`",
        "balanced within each rank, by default (`aux_scope`) here too",
    ),
    derived(
        "`trainer.strategy.init_args.expert_parallel_size`",
        [Flag("--moe-expert-parallel-size", int, default=1, least=1)],
        "each layer has the largest degree up to this that divides its experts: with 64, a layer of 32 has degree 32",
    ),
)

_OPTIMISATION = (
    same("model.optimizer.lr", "--lr", float),
    derived(
        "`model.optimizer.betas`",
        [Flag("--adam-beta1", float, default=0.9), Flag("--adam-beta2", float, default=0.999)],
    ),
    same("model.optimizer.eps", "--adam-eps", float, 1e-8),
    same("model.optimizer.weight_decay", "--weight-decay", float, 0.01),
    same("trainer.gradient_clip_val", "--clip-grad", float, 1.0),
    derived(
        "`model.schedule.shape`",
        [Flag("--lr-decay-style", str, default="linear", allowed=("constant", "linear", "cosine"))],
        "`linear` is `wsd` whose fall begins where the warm-up ends",
    ),
    derived("`model.schedule.min_lr`", [Flag("--min-lr", float, default=0.0)]),
    derived(
        "`model.schedule.warmup_tokens`",
        [
            Flag("--lr-warmup-tokens", int),
            Flag("--lr-warmup-samples", int, default=0),
            Flag("--lr-warmup-iters", int, default=0),
            Flag("--lr-warmup-fraction", float),
        ],
        "steps and sequences become tokens",
    ),
    derived(
        "`model.schedule.decay_tokens`",
        [Flag("--lr-decay-tokens", int), Flag("--lr-decay-samples", int), Flag("--lr-decay-iters", int)],
        "the length of training if not given",
    ),
    derived("`trainer.precision`", switches("--fp16", "--bf16"), "`16-mixed`, `bf16-mixed`, else `32-true`"),
    derived(
        "`trainer.strategy.init_args`: `initial_scale_power`, `loss_scale_window`, `hysteresis`",
        [
            Flag("--initial-loss-scale", float, least=1),
            Flag("--loss-scale-window", float, least=1),
            Flag("--hysteresis", int, default=2),
        ],
        "fp16 only; the DeepSpeed configuration has precedence; default with `--deepspeed`: the tutorial's 11, 500, 2",
    ),
)

_LENGTH = (
    derived(
        "`model.train_tokens`",
        [Flag("--train-tokens", int), Flag("--train-samples", int)],
        "if both are given, the one reached first",
    ),
    derived(
        "`trainer.max_steps`",
        [Flag("--train-iters", int)],
        "with `train_tokens` too, the limit reached first ends the run",
    ),
    derived(
        "`trainer.max_time`",
        [Flag("--exit-duration-in-mins", int)],
        "counted over all restarts here, over one job there",
    ),
)

_BATCH_AND_DATA = (
    same("data.micro_batch_size", "--micro-batch-size", int, least=1),
    derived(
        "`data.global_batch_size`", [Flag("--global-batch-size", int, least=1)], "micro-batch x ranks if not given"
    ),
    derived(
        "`data.batch_ramp_up`: `start`, `increment`, `tokens`",
        [Flag("--rampup-batch-size", int, many=True)],
        "sequences become tokens; micro-batches are smaller at first here, fewer there, so that start and increment are "
        "multiples of global / micro-batch size",
    ),
    derived(
        "`data.corpus`: `nlgmoe.data.MegatronIndexed`, `prefix`; of several `nlgmoe.data.Blend`, `parts`",
        [Flag("--data-path", str, many=True)],
        "one prefix, or weight and prefix in turn; a part of a blend is named after its file",
    ),
    derived("`data.corpus.init_args.split`", [Flag("--split", str, default="969, 30, 1")], "by documents, as there"),
    derived(
        "`data.tokenizer`, `model.config.vocab_size`",
        [
            Flag("--vocab-file", str),
            Flag("--merge-file", str),
            Flag("--tokenizer-type", str, default="GPT2BPETokenizer", allowed=("GPT2BPETokenizer",)),
        ],
        "`gpt2` for gpt2-vocab.json and gpt2-merges.txt, else the folder of vocab.json and merges.txt",
    ),
    derived(
        "`data.document_attention`",
        switches("--reset-attention-mask", "--reset-position-ids"),
        "both or neither; an input end-of-document token is the next document's first here, its own document's last there",
    ),
    derived("`data.mask_eod_loss`", switches("--eod-mask-loss"), "in evaluation too, as there"),
    same("data.num_workers", "--num-workers", int, 2),
    derived("`model.seed`, `data.seed`", [Flag("--seed", int, default=1234)]),
)

_RUN = (
    derived(
        "`trainer.callbacks`: `SaveCheckpoints`, `milestones`",
        [Flag("--save-interval", int, least=1)],
        "all are kept, as there",
    ),
    derived(
        "`trainer.default_root_dir`",
        [Flag("--save", str), Flag("--tensorboard-dir", str)],
        "one folder for checkpoints, logs and results",
    ),
    derived(
        "`--ckpt_path last`",
        [Flag("--load", str)],
        "given on the command line, not in YAML; refused if it differs from `--save`",
    ),
    derived(
        "`trainer.val_check_interval`", [Flag("--eval-interval", int, default=1000, least=1)], "optimizer steps in both"
    ),
    derived(
        "`data.max_eval_windows`",
        [Flag("--eval-iters", int, default=100)],
        "sequences, the same ones every time: global batches times their size",
    ),
    same("trainer.log_every_n_steps", "--log-interval", int, 100, least=1),
    derived(
        "`model.activation_checkpointing`",
        switches("--checkpoint-activations", "--deepspeed-activation-checkpointing"),
        "each block is recomputed in the backward pass",
    ),
    derived(
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
    derived(
        "`trainer.strategy`: `nlgmoe.ExpertParallelStrategy`, `stage`",
        [Flag("--zero-stage", int, allowed=(0, 1, 2))],
        "ZeRO 1, 2; 0 becomes 1, which computes the same; the stage in the DeepSpeed configuration has precedence",
    ),
    derived("`trainer.strategy.init_args.offload_optimizer`", [Flag("--cpu-optimizer")]),
    derived(
        "`model.curriculum`: `start`, `increment`, `tokens`",
        [Flag("--deepspeed_config", str)],
        "its section `curriculum_learning`, if the file is given; steps become tokens. ZeRO and precision in it must "
        "agree with the flags; its clipping has precedence",
    ),
    derived("`trainer.strategy.init_args.timeout_seconds`", [Flag("--distributed-timeout-minutes", int, least=1)]),
)

_DISTILLATION = (
    derived(
        "`model.distiller`: `nlgmoe.MixtureOfStudents`",
        switches("--mos", "--kd"),
        "on every step, as there; the callback `nlgmoe.StagedDistillation` ends it (docs/distillation.md)",
    ),
    same(
        "model.distiller.init_args.teacher",
        "--load-teacher",
        str,
        note="a checkpoint of nlgmoe, which contains the model's configuration",
    ),
    same(
        "model.distiller.init_args.beta",
        "--kd-beta-ce",
        float,
        1.0,
        "mean over tokens in the loss here, `batchmean / seq_length` there",
    ),
    same("model.distiller.init_args.temperature", "--kd-temp", float, 1.0),
    same(
        "model.distiller.init_args.num_layers",
        "--num-layers-teacher",
        int,
        note="checked against the checkpoint's configuration, as the next three are",
        optional=True,
    ),
    same("model.distiller.init_args.hidden_size", "--hidden-size-teacher", int, optional=True),
    same("model.distiller.init_args.num_heads", "--num-attention-heads-teacher", int, optional=True),
    derived(
        "`model.distiller.init_args.num_experts`",
        [Flag("--num-experts-teacher", int, many=True)],
        "a dense teacher is 1 there, `0` here",
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
    "Not needed here": IGNORED,
    "Refused": REFUSED,
}
FLAGS: dict[str, tuple[Flag, Row]] = {
    flag.name: (flag, row) for rows in SECTIONS.values() for row in rows for flag in row.flags
}
