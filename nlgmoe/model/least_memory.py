"""Refuse micro-batches that need more than all memory, before the system kills the process.

`least_bytes` is a lower bound, several times below the planner's estimate: no run that works is refused.
"""

from __future__ import annotations

from nlgmoe.config import GPTConfig
from nlgmoe.model.counting import count_parameters
from nlgmoe.validation import SettingError


def least_bytes(config: GPTConfig, tokens: int, value: int, trains: bool, ranks: int = 1) -> int:
    """Return the fewest bytes that a rank holds at one time: weights, a micro-batch, its hidden states.

    Args:
        config: the model.
        tokens: of the micro-batch.
        value: bytes of a weight or activation: 2 in half precision, else 4.
        trains: the backward pass needs the input of every block, also with activation checkpointing; evaluation has the
            residual stream and its norm at a time.
        ranks: that may divide the experts.
    """
    width = config.hidden_size
    count = count_parameters(config)
    weights = count.total - count.experts + count.experts // ranks
    hidden = width * (config.num_layers if trains else 2)
    return value * (weights + tokens * hidden) + 2 * 8 * tokens  # ids and targets


def check_fits(
    config: GPTConfig, setting: str, sequences: int, length: int, value: int, trains: bool, memory: int, ranks: int = 1
) -> None:
    """Check a micro-batch.

    Args:
        config: the model.
        setting: the setting of its size, for messages.
        sequences: its size.
        length: of each sequence, in tokens.
        value: see `least_bytes`.
        trains: see `least_bytes`.
        memory: of the device, in bytes.
        ranks: see `least_bytes`.

    Raises:
        ValueError: it needs more than `memory`.
    """
    if (needed := least_bytes(config, sequences * length, value, trains, ranks)) > memory:
        raise SettingError(
            f"{setting}={sequences}: the model and a micro-batch of {sequences:,} x {length:,} tokens need at least "
            f"{needed / 1e9:,.0f} GB, there are {memory / 1e9:,.0f} GB; lower {setting}"
            + (", or use a smaller model.config" if least_bytes(config, length, value, trains, ranks) > memory else "")
        )
