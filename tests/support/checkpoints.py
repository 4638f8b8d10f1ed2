"""Checkpoints of untrained models, with a tokenizer."""

from pathlib import Path

import torch

from nlgmoe.checkpoint.entries import split_experts
from nlgmoe.config import GPTConfig, MoEConfig
from nlgmoe.data.model_files import TokenizerFiles
from nlgmoe.data.tokenizer import Tokenizer
from nlgmoe.data.tokenizer_loading import train_byte_level_bpe
from nlgmoe.model.gpt import GPT
from nlgmoe.surgery.write_weights import write_weights

TOKENIZER = Tokenizer(train_byte_level_bpe(iter(["the king and the queen"] * 3), 300), "tiny")
PR_MOE = GPTConfig(
    TOKENIZER.vocab_size, 24, 4, 32, 2, moe=MoEConfig([2, 4], mlp_type="residual", loss_coeff=0.1, z_loss_coeff=0.2)
)


def write(
    path: Path, config: GPTConfig, dtype: torch.dtype = torch.float32, tokenizer: TokenizerFiles | None = None
) -> Path:
    """A checkpoint whose every value matters: far from the initial ones."""
    model = GPT(config)
    for index, parameter in enumerate(model.parameters()):
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index))
    state = {
        name: value.to(dtype) if value.is_floating_point() else value for name, value in model.state_dict().items()
    }
    entries = split_experts(state)
    write_weights(path, entries.__getitem__, config, tokenizer)
    return path
