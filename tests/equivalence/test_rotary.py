"""Scaled rotary positions against `transformers`: frequencies, angles at real sizes, and config.json for readers of version 4."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from nlgmoe.layers.rotary import rotations
from nlgmoe.tools.hugging_face.families import FAMILIES

LLAMA_3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "original_max_position_embeddings": 32_768}
SCALINGS: dict[str, dict[str, Any]] = {
    "Llama-3.1": LLAMA_3 | {"factor": 8.0, "original_max_position_embeddings": 8192},
    "Llama-3.2": LLAMA_3 | {"factor": 32.0, "original_max_position_embeddings": 8192},
    "Qwen3, long": YARN | {"factor": 4.0, "rope_theta": 1e6},
    "DeepSeek-V3": YARN
    | {"factor": 40.0, "rope_theta": 1e4, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1}
    | {"mscale": 1.0, "mscale_all_dim": 1.0},
    "gpt-oss": YARN | {"factor": 32.0, "rope_theta": 15e4, "original_max_position_embeddings": 4096, "truncate": False},
    "of lengths": YARN | {"factor": None, "rope_theta": 1e6},
}


@pytest.mark.parametrize("name", SCALINGS)
def test_rotary_frequencies_are_those_of_transformers_at_real_sizes(name: str) -> None:
    """To the bit, but for DeepSeek-V3's scaling, where the last bit of a frequency may differ.

    At position 131,071 that changes an angle by 2.4e-4; its own rounding in fp32, which is theirs too, by up to 3.9e-3.
    """
    shape = {"hidden_size": 512, "num_attention_heads": 4, "head_dim": 128, "num_hidden_layers": 1}
    rope = {"rope_theta": 5e5} | SCALINGS[name]
    theirs = LlamaConfig(**shape, max_position_embeddings=131_072, rope_parameters=rope)
    expected, temperature = ROPE_INIT_FUNCTIONS[theirs.rope_parameters["rope_type"]](theirs)
    config = FAMILIES["llama"].read(theirs)
    assert config.rotary_scaling is not None and config.rope_theta is not None
    scale = config.attention_scale or 128**-0.5
    assert scale == pytest.approx(temperature**2 * 128**-0.5, rel=1e-12)

    plain = 1.0 / config.rope_theta ** (torch.arange(0, 128, 2, dtype=torch.float32) / 128)
    ours = config.rotary_scaling.scale(plain, config.rope_theta)
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=0)
    assert not torch.allclose(ours, plain, rtol=0.1)

    positions = torch.tensor([[0, 1, 1000, 8191, 32_768, 100_003, 131_071]])
    cos, sin = rotations(positions, 128, config.rope_theta, config.rotary_scaling)
    rows = positions[0, :, None]
    for angles, bound in ((rows.float() * expected, 5e-4), (rows * expected.double(), 4e-3)):
        torch.testing.assert_close(cos[0, 0, :, :64], angles.cos().float(), rtol=0, atol=bound)
        torch.testing.assert_close(sin[0, 0, :, :64], angles.sin().float(), rtol=0, atol=bound)
