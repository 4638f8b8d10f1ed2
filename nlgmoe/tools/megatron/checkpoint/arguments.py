"""Make our configuration from the arguments in a checkpoint, or refuse them, by the table of flags."""

from __future__ import annotations

from argparse import Namespace

from nlgmoe.config import GPTConfig, MoEConfig
from nlgmoe.tools.megatron.flags import FLAGS, ROWS, Arguments
from nlgmoe.tools.megatron.from_megatron import words_of
from nlgmoe.tools.megatron.translate import model_config
from nlgmoe.tools.megatron.translation import Settings
from nlgmoe.validation import RunError, SettingError


def config_of(args: Namespace, rows: int, positions: int, vocab_size: int | None, accept_tanh_gelu: bool) -> GPTConfig:
    """Make the configuration of the checkpoint's model; settings of training are those of the run.

    Args:
        args: of the checkpoint.
        rows: of the token embedding, padding included.
        positions: of the position embedding.
        vocab_size: ids to keep; None: all rows.
        accept_tanh_gelu: accept exact GELU, which becomes the tanh form.
    """
    flags = [name for name, row in ROWS.items() if row.section in ("Model", "Experts") or FLAGS[name].get("model")]
    arguments = Arguments(words_of({name: str(value) for name, value in vars(args).items()}, flags))
    settings = Settings(arguments)
    model_config(settings)
    seq_len = arguments.value("--seq-length") or positions
    # `megatron/model/transformer.py`, ParallelMLP: the fused form and OpenAI's are tanh, F.gelu and `erf_gelu` exact.
    fused = getattr(args, "bias_gelu_fusion", False) and not getattr(args, "onnx_safe", False)
    if not accept_tanh_gelu and not fused and not getattr(args, "openai_gelu", False):
        arguments.add_problem(
            "bias_gelu_fusion=False",
            "is GELU in its exact form, nlgmoe's is the tanh form; --accept-tanh-gelu accepts the model, whose logits "
            "then differ a little",
        )
    if arguments.problems:
        raise RunError(arguments.problems[0])
    vocab_size = rows if vocab_size is None else vocab_size
    if not 1 <= vocab_size <= rows:
        raise SettingError(
            f"vocab_size={vocab_size} must be between 1 and the {rows} rows of the checkpoint's embedding"
        )
    config = dict(settings.tree["model"]["config"])
    if rows % config["vocab_size_multiple"]:
        config["vocab_size_multiple"] = 1
    moe = config.pop("moe")
    if moe:
        moe["eval_token_dropping"] = False  # a setting of an evaluation, not of the model
    return GPTConfig(
        vocab_size=vocab_size,
        seq_len=min(positions, seq_len),  # positions past it were never trained
        **config,
        moe=MoEConfig(**moe) if moe else None,
    )
