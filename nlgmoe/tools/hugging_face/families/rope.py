"""Rotary positions in a configuration of `transformers`, `rope_parameters`, and in ours.

YaRN multiplies cosines and sines by a temperature. Where all values of a head turn, this is a factor of each product of a query
and a key, its square, which is part of our `attention_scale`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from nlgmoe.config import GPTConfig
from nlgmoe.layers.rotary import Llama3, Yarn
from nlgmoe.parts import RotaryScaling
from nlgmoe.validation import SettingError


class UnsupportedError(SettingError):
    """A family's setting that nlgmoe does not compute, or a model's that the family does not express, as `setting=value`."""


def rope_fields(theirs: Any, width: int, partial: bool = False) -> dict[str, Any]:
    """Return the fields of rotary positions; `rope_temperature` is left to the caller.

    Args:
        theirs: the family's configuration.
        width: of a head.
        partial: the family's class reads `partial_rotary_factor`; most ignore it.
    """
    rope = theirs.rope_parameters
    turning = int(width * (share := rope.get("partial_rotary_factor", 1.0)))
    if turning != width and not partial:
        raise UnsupportedError(f"partial_rotary_factor={share}")
    return {
        "rope_theta": float(rope["rope_theta"]),
        "rotary_dim": None if turning == width else turning,
        "rotary_scaling": _rotary_scaling(theirs, rope),
    }


def _rotary_scaling(theirs: Any, rope: Mapping[str, Any]) -> RotaryScaling | None:
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return None
    length = rope.get("original_max_position_embeddings") or theirs.max_position_embeddings
    if kind == "llama3":
        limits = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
        return Llama3(float(rope["factor"]), length, *limits)
    if kind != "yarn":
        raise UnsupportedError(f"rope_type={kind}")
    limits = float(rope.get("beta_fast") or 32), float(rope.get("beta_slow") or 1)
    return Yarn(_yarn_factor(theirs), length, *limits, truncate=rope.get("truncate", True))


def _yarn_factor(theirs: Any) -> float:
    rope = theirs.rope_parameters
    return float(rope.get("factor") or theirs.max_position_embeddings / rope["original_max_position_embeddings"])


def rope_temperature(theirs: Any) -> float:
    """Return the factor of cosines and sines, for queries and for keys: YaRN's temperature."""
    rope = theirs.rope_parameters
    if rope.get("rope_type", "default") != "yarn":
        return 1.0
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    factor, above, below = _yarn_factor(theirs), rope.get("mscale"), rope.get("mscale_all_dim")
    return yarn_mscale(factor, above) / yarn_mscale(factor, below) if above and below else yarn_mscale(factor)


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """Return YaRN's temperature (arXiv 2309.00071, equation 22)."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def rope_settings(config: GPTConfig, **settings: Any) -> dict[str, Any]:
    """Return the settings of rotary positions.

    Args:
        config: of the model.
        settings: further settings of `rope_parameters`, such as `partial_rotary_factor`, or other values.
    """
    if config.rope_theta is None:
        return {}
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    scaling = config.rotary_scaling
    if isinstance(scaling, Llama3):
        rope |= {"rope_type": "llama3", "low_freq_factor": scaling.low_freq_factor}
        rope["high_freq_factor"] = scaling.high_freq_factor
    elif isinstance(scaling, Yarn):
        rope |= {"rope_type": "yarn", "beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}
        rope |= {"truncate": scaling.truncate, "attention_factor": 1.0}
        if config.attention_scale is not None:
            rope["attention_factor"] = math.sqrt(config.attention_scale * math.sqrt(config.head_size))
    if isinstance(scaling, Llama3 | Yarn):
        rope |= {"factor": scaling.factor, "original_max_position_embeddings": scaling.original_length}
    return {"rope_parameters": rope | settings}
