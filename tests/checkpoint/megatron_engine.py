"""A rank of a run whose checkpoint DeepSpeed's own engine writes, as Megatron-DeepSpeed tells it to."""

from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

from nlgmoe.parallel.engine import disable_deepspeed_extensions
from tests.checkpoint.megatron_model import GPTModel, arguments, model_type, random_states


def write_from_engine(folder: Path, changes: dict[str, Any]) -> None:
    """Save the model of `GPTModel(arguments(**changes))`, its experts spread over all ranks, under ZeRO 1."""
    disable_deepspeed_extensions()
    deepspeed.init_distributed("gloo", verbose=False)
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    whole = GPTModel(arguments(**changes)).state_dict()
    args = arguments(**changes, moe_expert_parallel_size=ranks)
    model = GPTModel(args)
    own = model.state_dict()
    for name, value in own.items():
        before, _, after = name.partition("deepspeed_experts.")
        if after:
            local, _, part = after.partition(".")
            here = sum(
                key.startswith(before) and key.endswith(f".{part}") and "deepspeed_experts" in key for key in own
            )
            name = f"{before}deepspeed_experts.{rank * here + int(local)}.{part}"
        value.copy_(whole[name])
    groups = split_params_into_different_moe_groups_for_optimizer({"params": list(model.parameters()), "name": "all"})
    settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 1}}
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(groups, lr=1e-3), config=settings)
    # What `megatron/checkpointing.py` does in save_checkpoint.
    engine.module.state_dict = lambda *_, **__: model.state_dict_for_save_checkpoint()
    with model_type() as member:
        args.model_type = member
        state = {"args": args, "checkpoint_version": 3.0, "iteration": 9, "tokens": 100, "rng_state": [random_states()]}
        engine.save_checkpoint(str(folder), client_state=state)
