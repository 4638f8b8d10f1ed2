"""Convert a Megatron-DeepSpeed checkpoint into a portable one, entry by entry.

    theirs                                              ours
    embedding.word_embeddings [rows, H]                 token_embedding, cut to the vocabulary and its padding
    encoder.layers.N.self_attention.query_key_value     attention.qkv, all queries first (`_QKV`)
    ...mlp.deepspeed_moe.gate.wg                        moe.router
    ...deepspeed_experts.E.dense_h_to_4h [F, H]         moe.experts.E.expand_weight [H, F]
    ...deepspeed_experts.E.dense_4h_to_h.bias           0: DeepSpeed leaves it out of an expert's output
    ...mlp.mlp.dense_4h_to_h.bias                       0: and of a residual layer's MLP

Letters in shape comments: N heads, D width of a head, H hidden size, F inner size.
"""

from __future__ import annotations

import re
from argparse import Namespace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from nlgmoe.checkpoint.entries import EXPERT
from nlgmoe.config import GPTConfig, MoEConfig
from nlgmoe.data.model_files import TokenizerFiles
from nlgmoe.pyramid import moe_blocks
from nlgmoe.surgery.write_weights import weight_shapes, write_weights
from nlgmoe.tools.megatron.checkpoint_files import Dense, ExpertFiles, find_folder, read_dense
from nlgmoe.tools.megatron.flags import FLAGS, ROWS, Arguments, Translation
from nlgmoe.tools.megatron.from_megatron import model_config
from nlgmoe.validation import RunError, SettingError

QKV = Literal["auto", "heads", "thirds"]

_WORDS, _POSITIONS = "embedding.word_embeddings.weight", "embedding.position_embeddings.weight"
_OUTSIDE = {
    "token_embedding": "embedding.word_embeddings",
    "position_embedding": "embedding.position_embeddings",
    "final_norm": "encoder.final_layernorm",
}
_IN_BLOCK = {
    "attention_norm": "input_layernorm",
    "attention.qkv": "self_attention.query_key_value",
    "attention.project": "self_attention.dense",
    "ffn_norm": "post_attention_layernorm",
    "ffn.expand": "mlp.dense_h_to_4h",
    "ffn.project": "mlp.dense_4h_to_h",
    "moe.router": "mlp.deepspeed_moe.gate.wg",
    "moe.mlp.expand": "mlp.mlp.dense_h_to_4h",
    "moe.mlp.project": "mlp.mlp.dense_4h_to_h",
    "moe.coefficient": "mlp.coefficient",
}
_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)\.(weight|bias)")
_EXPERT_PARTS = {"expand": "dense_h_to_4h", "project": "dense_4h_to_h"}
# How the rows of query_key_value lie, as the order of (q/k/v, head, row of a head) from the slowest to the fastest.
_QKV = {"thirds": "QND", "heads": "NQD"}


def config_of(args: Namespace, rows: int, positions: int, vocab_size: int | None, accept_tanh_gelu: bool) -> GPTConfig:
    """Make the configuration of the checkpoint's model; settings of training are those of the run.

    `rows` of the token embedding include padding, `positions` are those of its table. See `nlgmoe import-megatron`.
    """
    arguments = Arguments(words_of(args))
    job = Translation(arguments)
    model_config(job)
    seq_len = arguments.value("--seq-length") or positions
    # `megatron/model/transformer.py`, ParallelMLP: the fused form and OpenAI's are tanh, F.gelu and `erf_gelu` exact.
    fused = getattr(args, "bias_gelu_fusion", False) and not getattr(args, "onnx_safe", False)
    if not (accept_tanh_gelu or fused or getattr(args, "openai_gelu", False)):
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
    config = dict(job.tree["model"]["config"])
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


def words_of(args: Namespace) -> list[str]:
    """Return the model's flags that a run was given; a value that Megatron fills in itself counts as not given."""
    heads, hidden = getattr(args, "num_attention_heads", 0), getattr(args, "hidden_size", 0)
    filled_in = {"num_key_value_heads": heads, "ffn_hidden_size": 4 * hidden}
    filled_in["kv_channels"] = hidden // heads if heads else 0
    words = []
    for flag, keys in FLAGS.items():
        if ROWS[flag].section not in ("Model", "Experts") and not keys.get("model"):
            continue
        name = str(keys.get("argument") or flag.lstrip("-").replace("-", "_"))
        value = getattr(args, name, None)
        if "type" not in keys:
            words += [flag] if value is ("argument" not in keys) else []
        elif value not in (None, "", keys.get("default"), filled_in.get(name)):
            words += [flag, *map(str, value if isinstance(value, list) else [value])]
    return words


def import_checkpoint(
    path: str | Path,
    output: str | Path,
    vocab_size: int | None = None,
    tokenizer: TokenizerFiles | None = None,
    qkv: QKV = "auto",
    accept_tanh_gelu: bool = False,
    overwrite: bool = False,
) -> GPTConfig:
    """Write the weights of a Megatron-DeepSpeed checkpoint as a portable one, in fp32; return the model's configuration.

    The arguments are those of `nlgmoe import-megatron`, but `tokenizer` has the files of `Tokenizer.files`.
    """
    folder = find_folder(Path(path))
    dense = read_dense(folder)
    try:
        rows, positions = (len(_tensor(dense, name)) for name in (_WORDS, _POSITIONS))
        config = config_of(dense.args, rows, positions, vocab_size, accept_tanh_gelu)
    except ValueError as error:
        raise type(error)(f"{error} ({dense.file})") from error
    weights = Weights(dense, ExpertFiles(folder, moe_blocks(config)), config, _find_qkv_order(dense, qkv))
    write_weights(output, weights.read, config, tokenizer, dense.iteration, dense.tokens, overwrite)
    return config


class Weights:
    """Entries of our model, made from Megatron's tensors; `qkv_order` is a value of `_QKV`."""

    def __init__(self, dense: Dense, experts: ExpertFiles, config: GPTConfig, qkv_order: str) -> None:
        self._dense, self._experts, self._config, self._qkv_order = dense, experts, config, qkv_order
        self._shapes = weight_shapes(config)
        wanted = {megatron_name(name) for name in self._shapes if EXPERT.fullmatch(name) is None}
        if unknown := sorted(dense.tensors.keys() - wanted):
            more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
            raise RunError(
                f"{dense.file} has {unknown[0]}{more}, for which nlgmoe's GPT has no place; it is not a model of this kind"
            )

    def read(self, name: str) -> Tensor:
        """Read one entry, in fp32."""
        shape = self._shapes[name]
        if match := EXPERT.fullmatch(name):
            layer, (part, kind) = match["experts"], match["parameter"].split("_")
            their_part = f"{_EXPERT_PARTS[part]}.{kind}"
            file, tensor = self._experts.read(int(layer.split(".")[1]), int(match["expert"]), their_part)
            _check_shape(file, their_part, tensor, list(reversed(shape)))
            if part == "project" and kind == "bias":
                return torch.zeros(shape)
            return tensor.t().to(torch.float32, copy=True).contiguous()  # `t` leaves a bias as it is
        theirs = megatron_name(name)
        tensor = _tensor(self._dense, theirs)
        if theirs in (_WORDS, _POSITIONS):
            tensor = tensor[: shape[0]]
        _check_shape(self._dense.file, theirs, tensor, list(shape))
        if ".attention.qkv." in name:
            order, heads = self._qkv_order, self._config.num_heads
            size = {"Q": 3, "N": heads, "D": self._config.hidden_size // heads}
            split = tensor.view(*(size[letter] for letter in order), *tensor.shape[1:])
            ours = split.permute(*(order.index(letter) for letter in "QND"), *range(3, split.dim()))
            tensor = ours.reshape(tensor.shape)  # all queries, all keys, all values: [3 * N * D] or [3 * N * D, H]
        if name.endswith(".moe.mlp.project.bias"):
            tensor = torch.zeros(shape)
        return tensor.to(torch.float32, copy=True)  # not the file's memory


def megatron_name(name: str) -> str:
    """Return Megatron's name of one of our dense entries."""
    if match := _BLOCK.fullmatch(name):
        return f"encoder.layers.{match[1]}.{_IN_BLOCK[match[2]]}.{match[3]}"
    module, _, kind = name.rpartition(".")
    return f"{_OUTSIDE[module]}.{kind}"


def _find_qkv_order(dense: Dense, qkv: QKV) -> str:
    """By version, as fix_query_key_value_ordering in `megatron/checkpointing.py`; thirds since FPDT (`transformer.py`)."""
    if dense.version < 2:
        raise RunError(
            f"checkpoint_version={dense.version} is older than 2 ({dense.file}); load and save it with a newer Megatron-DeepSpeed"
        )
    if qkv != "auto":
        return _QKV[qkv]
    if dense.version not in (2, 3):
        raise RunError(f"checkpoint_version={dense.version} is unknown ({dense.file}); give its layout by --qkv")
    return _QKV["thirds" if hasattr(dense.args, "ds_sequence_parallel_fpdt") else "heads"]


def _tensor(dense: Dense, name: str) -> Tensor:
    if name not in dense.tensors:
        raise RunError(f"{dense.file} lacks {name}; use another checkpoint")
    return dense.tensors[name]


def _check_shape(file: Path, name: str, tensor: Tensor, expected: list[int]) -> None:
    if not tensor.is_floating_point():
        raise RunError(f"{file}: {name} is of type {tensor.dtype}, not floating point; use another checkpoint")
    if list(tensor.shape) != expected:
        raise RunError(
            f"{file}: {name} has shape {list(tensor.shape)}, its arguments say {expected}; use another checkpoint"
        )
