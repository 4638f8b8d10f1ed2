"""The pyramid of PR-MoE: how many experts each block has (paper, section 4.1.1, "Phenomenon-I"; figure 2, left).

The paper finds that experts pay off more in later layers, so `MoEConfig.num_experts` may grow with depth.
"""

import math

from nlgmoe.config import GPTConfig


def experts_at(config: GPTConfig, layer_index: int) -> int:
    """Experts of block `layer_index` (counted from 0); 0 for a dense block.

    With `expert_interval` 2, blocks 1, 3, 5, ... are MoE; the j-th of them takes `num_experts[j]`.
    """
    moe = config.moe
    if moe is None or (layer_index + 1) % moe.expert_interval:
        return 0
    if isinstance(moe.num_experts, int):
        return moe.num_experts
    return moe.num_experts[(layer_index + 1) // moe.expert_interval - 1]


def experts_per_layer(config: GPTConfig) -> list[int]:
    """`experts_at` of every block, from the first to the last."""
    return [experts_at(config, layer) for layer in range(config.num_layers)]


def expert_parallel_degree(num_experts: int, world_size: int, limit: int) -> int:
    """Ranks that hold one MoE layer's experts together: the largest divisor of both numbers up to `limit`.

    So the layers of a pyramid get a degree each: {32, 64, 128} experts on 128 ranks have degrees {32, 64, 128}, and each
    expert of the first kind lives on four ranks (paper, section 4.1.3, "flexible parallelism").
    """
    common = math.gcd(num_experts, world_size)
    return max(degree for degree in range(1, min(common, limit) + 1) if common % degree == 0)
