"""Conversion of Hugging Face's GPT-2 to the dense `GPT`, which computes the same function.

`Conv1D` stores `[in, out]`, a linear layer `[out, in]`. Padding rows of the vocabulary are 0.
`tests/equivalence/test_hugging_face_gpt2.py` compares the two models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.utils import logging

from nlgmoe.config import GPTConfig
from nlgmoe.validation import RunError

OURS = {  # module of a Hugging Face block -> module of a `GPT` block
    "ln_1": "attention_norm",
    "attn.c_attn": "attention.qkv",
    "attn.c_proj": "attention.project",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn.expand",
    "mlp.c_proj": "ffn.project",
}
_TANH_GELU = ("gelu_new", "gelu_pytorch_tanh")  # two implementations of one formula
_REQUIRED = {  # setting -> required value, and the feature that another value needs
    "scale_attn_weights": (True, "attention without a scale"),
    "scale_attn_by_inverse_layer_idx": (False, "an attention scale per layer"),
    "add_cross_attention": (False, "attention to an encoder"),
    "tie_word_embeddings": (True, "an untied head"),
}


def gpt2_config(values: dict[str, Any], folder: Path) -> GPTConfig:
    """Convert the contents of a GPT-2's `config.json`."""
    try:
        theirs = GPT2Config.from_dict(values)
    except Exception as error:  # the library's exceptions have many types
        raise RunError(f"{folder}/config.json is damaged ({error}); download or save the model again") from error
    if theirs.activation_function not in _TANH_GELU:
        raise RunError(
            f"activation_function={theirs.activation_function} of {folder} cannot be imported: nlgmoe supports only "
            f"{' and '.join(_TANH_GELU)}"
        )
    for name, (required, feature) in _REQUIRED.items():
        if getattr(theirs, name) != required:
            raise RunError(
                f"{name}={getattr(theirs, name)} of {folder} cannot be imported: nlgmoe does not support {feature}"
            )
    return GPTConfig(
        vocab_size=theirs.vocab_size,
        seq_len=theirs.n_positions,
        num_layers=theirs.n_layer,
        hidden_size=theirs.n_embd,
        num_heads=theirs.n_head,
        ffn_hidden_size=theirs.n_inner,
        hidden_dropout=float(theirs.resid_pdrop),
        attention_dropout=float(theirs.attn_pdrop),
        init_std=theirs.initializer_range,
        layer_norm_eps=theirs.layer_norm_epsilon,
    )


def gpt2_weights(folder: Path, config: GPTConfig) -> Callable[[str], Tensor]:
    """Return a function that reads an entry of `GPT` from a GPT-2's folder, in the stored type."""
    try:
        with _quiet():
            loaded: Any = GPT2LMHeadModel.from_pretrained(folder, dtype="auto", output_loading_info=True)
    except Exception as error:  # each file format has its own exceptions
        raise RunError(f"{folder} cannot be read ({error}); download or save the model again") from error
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise RunError(f"{folder} lacks {missing[0]}; download or save the model again")
    # Old files hold buffers too; transformers leaves out attn.bias itself.
    if unknown := sorted(name for name in info["unexpected_keys"] if not name.endswith("attn.masked_bias")):
        raise RunError(
            f"{folder} has {unknown[0]}, which its config.json does not describe; download or save the model again"
        )
    if not torch.equal(model.lm_head.weight, model.transformer.wte.weight):
        raise RunError(
            f"{folder} cannot be imported: its lm_head differs from its embedding; nlgmoe does not support an untied head"
        )
    theirs = {our_name(name): (name, value.detach()) for name, value in model.transformer.named_parameters()}

    def read(entry: str) -> Tensor:
        name, value = theirs[entry]
        if entry == "token_embedding.weight":
            return torch.cat([value, value.new_zeros(config.padded_vocab_size - len(value), value.shape[1])])
        return value.t().contiguous() if ".c_" in name and name.endswith(".weight") else value

    return read


@contextmanager
def _quiet() -> Iterator[None]:
    """Disable progress bars and load reports; errors are raised as one line."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def our_name(theirs: str) -> str:
    """Return the entry of `GPT` for a parameter of `GPT2Model`."""
    part, _, leaf = theirs.rpartition(".")
    if part in ("wte", "wpe", "ln_f"):
        return {"wte": "token_embedding", "wpe": "position_embedding", "ln_f": "final_norm"}[part] + f".{leaf}"
    _, layer, part = part.split(".", 2)
    return f"blocks.{layer}.{OURS[part]}.{leaf}"
