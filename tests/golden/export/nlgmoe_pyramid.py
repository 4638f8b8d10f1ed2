# nlgmoe/pyramid.py of nlgmoe 0.1.0, copied by `nlgmoe export`; only its imports are others.
# SPDX-License-Identifier: Apache-2.0
"""The pyramid of PR-MoE: how many experts each block has (paper, section 4.1.1, "Phenomenon-I"; figure 2, left), and over
how many ranks a layer of so many experts is spread.

The paper finds that experts pay off more in later layers, so `MoEConfig.num_experts` may grow with depth.
"""

import math
from dataclasses import replace

from .nlgmoe_config import GPTConfig


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


def student_config(teacher: GPTConfig, num_layers: int) -> GPTConfig:
    """The student of a Mixture-of-Students (paper, section 4.2): its teacher with fewer blocks, and the top of its pyramid.

    24 blocks with `num_experts` 10 x 32 and 2 x 64 become 21 with 8 x 32 and 2 x 64.

    Raises:
        ValueError: `num_layers` is not below the teacher's, or leaves no MoE block.
    """
    if not 1 <= num_layers < teacher.num_layers:
        raise ValueError(f"num_layers={num_layers} must be at least 1 and below the teacher's {teacher.num_layers}")
    moe = teacher.moe
    if moe is not None and isinstance(moe.num_experts, list):
        kept = num_layers // moe.expert_interval
        moe = replace(moe, num_experts=moe.num_experts[len(moe.num_experts) - kept :] or moe.num_experts)
    return replace(teacher, num_layers=num_layers, moe=moe)


def student_layers(teacher: GPTConfig, num_layers: int) -> list[int]:
    """The teacher's block for each block of `student_config`'s student to start from: `model.warm_start.layers`, from 0.

    The lowest blocks go, as many as hold the MoE layers that the student lacks; the others stay in order, so that the expert
    counts are those of the pyramid's kept top. Dense blocks that the student has above its last MoE block, and the teacher not,
    start from the teacher's last dense one: 24 blocks become 21 as 4, 5, ..., 23, 22.

    Raises:
        ValueError: as `student_config`.
    """
    student_config(teacher, num_layers)
    interval = 1 if teacher.moe is None else teacher.moe.expert_interval
    gone = interval * (teacher.num_layers // interval - num_layers // interval)
    experts = experts_per_layer(teacher)
    last_dense = max((layer for layer, count in enumerate(experts) if count == 0), default=0)
    return [layer + gone if layer + gone < teacher.num_layers else last_dense for layer in range(num_layers)]


def expert_parallel_degree(num_experts: int, world_size: int, limit: int) -> int:
    """Over how many ranks a layer spreads its experts: the largest divisor of both counts that is at most `limit`.

    Layers of a pyramid have their own degrees (paper, section 4.1.3): on 128 ranks with `limit` 128, layers of 32, 64 and
    128 experts get 32, 64 and 128, and so 4, 2 and 1 copies of each expert.

    Args:
        num_experts: experts of the layer, over all ranks.
        world_size: ranks of the run.
        limit: the run's `expert_parallel_size`; 1 keeps all experts on every rank.

    Raises:
        ValueError: a count is below 1.
    """
    if min(num_experts, world_size, limit) < 1:
        raise ValueError(
            f"num_experts={num_experts}, world_size={world_size} and expert_parallel_size={limit} must all be at least 1"
        )
    common = math.gcd(num_experts, world_size)
    return max(degree for degree in range(1, min(common, limit) + 1) if common % degree == 0)
