"""What the DeepSpeed engine needs to see of our experts, and what of its arithmetic has to be set right.

The engine finds experts by `isinstance(module, deepspeed.moe.layer.MoE)` and by two attributes of their parameters. It keeps
its process groups in tables of `deepspeed.utils.groups`, which are filled here with groups that have a timeout.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
from deepspeed import ops
from deepspeed.moe.layer import MoE
from deepspeed.moe.utils import is_moe_param
from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.utils import groups as deepspeed_groups
from torch import Tensor, distributed, nn

from nlgmoe.layers.moe import MoELayer
from nlgmoe.parallel.expert_groups import ExpertGroups


class EngineMoELayer(MoELayer, MoE):
    """An `MoELayer` whose experts are spread over ranks, as the engine recognises one.

    Nothing of `MoE` runs: its `__init__` is never called, and these are all the attributes the engine reads.
    """

    @property
    def num_experts(self) -> int:
        """Experts of the layer on all ranks."""
        return self.router.num_experts

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """Nothing: the groups were made before the model."""


def present_to_engine(layer: MoELayer, groups: ExpertGroups) -> None:
    """Let the engine see `layer` as one of its own, and its experts as shared by the ranks of `groups` only."""
    layer.__class__ = EngineMoELayer
    for parameter in layer.experts.parameters():
        parameter.allreduce = False  # type: ignore[attr-defined]  # DeepSpeed's marks
        parameter.group_name = groups.name  # type: ignore[attr-defined]


def register_groups(groups: ExpertGroups) -> None:
    """Enter `groups` into DeepSpeed's tables (its own carry no timeout, so that a lost rank would hang the others)."""
    name, ranks_of = groups.name, distributed.get_process_group_ranks
    deepspeed_groups._EXPERT_PARALLEL_GROUP[name] = groups.parallel
    deepspeed_groups._EXPERT_DATA_PARALLEL_GROUP[name] = groups.data_parallel
    deepspeed_groups._EXPERT_PARALLEL_GROUP_RANKS[name] = ranks_of(groups.parallel)
    deepspeed_groups._EXPERT_DATA_PARALLEL_GROUP_RANKS[name] = ranks_of(groups.data_parallel)


def use_plain_collectives() -> None:
    """Keep DeepSpeed from compiling a C++ extension at start: an all-reduce for inference that nothing here uses."""
    ops.__compatible_ops__[ShareMemCommBuilder.NAME] = False


def register_world(timeout: timedelta) -> None:
    """DeepSpeed's copy of the world group, with a timeout."""
    if deepspeed_groups._WORLD_GROUP is None:
        ranks = list(range(distributed.get_world_size()))
        deepspeed_groups._WORLD_GROUP = distributed.new_group(ranks, timeout=timeout)


@torch.no_grad()
def global_grad_norm(parameters: list[nn.Parameter]) -> Tensor:
    """L2 norm of the whole model's gradient: every expert once, wherever and however often it is held."""
    device = parameters[0].device
    dense, experts = torch.zeros((), device=device), torch.zeros((), device=device)
    for parameter in parameters:
        if parameter.grad is None:
            continue
        square = parameter.grad.float().square().sum()
        if is_moe_param(parameter):
            copies = deepspeed_groups._get_expert_data_parallel_group(parameter.group_name)  # type: ignore[attr-defined]
            experts += square / distributed.get_world_size(copies)
        else:
            dense += square
    distributed.all_reduce(experts)
    return (dense + experts).sqrt()


def correct_stage_0(engine: Any) -> None:
    """Set right what DeepSpeed 0.19.8 does where ZeRO is off; under ZeRO 1 and 2 it is right.

    Clipping: it averages the ranks' norms, which is not the norm when ranks hold different experts (issue #8475), and
    leaves experts out in half precision (pull request #8613). Adam: in half precision it takes a step with zero gradients
    to allocate the moments, which decays the weights and counts in the bias correction.
    """
    if engine.zero_optimization():
        return
    parameters = [parameter for parameter in engine.module.parameters() if parameter.requires_grad]

    def clip() -> None:
        norm = global_grad_norm(parameters)
        engine._global_grad_norm = norm
        factor = (engine.gradient_clipping() / (norm + 1e-6)).clamp(max=1.0)
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(factor)

    engine.clip_fp32_gradients = clip
    if isinstance(engine.optimizer, FP16_UnfusedOptimizer):
        unscale_and_clip = engine.optimizer.unscale_and_clip_grads

        def unscale_and_clip_by_true_norm(norm: Any, apply_scale: bool = True) -> Any:
            norm = engine.optimizer._global_grad_norm = global_grad_norm(parameters)
            return unscale_and_clip(norm, apply_scale)

        engine.optimizer.unscale_and_clip_grads = unscale_and_clip_by_true_norm
        engine.optimizer.refresh_fp32_params()
        for state in engine.optimizer.optimizer.state.values():
            state["step"].zero_()
