"""ExpertParallelStrategy: Lightning's DeepSpeedStrategy with expert parallelism, on GPUs and CPUs."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning import LightningModule
from lightning.pytorch.accelerators import CUDAAccelerator
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from typing_extensions import override

from nlgmoe.checkpoint.portable import read_checkpoint
from nlgmoe.checkpoint.reading import Checkpoint
from nlgmoe.checkpoint.run_checkpoints import choose_checkpoint
from nlgmoe.config import GPTConfig
from nlgmoe.device import name_deepspeeds_device
from nlgmoe.layers.moe import moe_layers
from nlgmoe.lightning_state import init_deepspeed, started_processes, weights_dtype
from nlgmoe.non_finite import StepGradients
from nlgmoe.optim.optimizer import AdamWConfig
from nlgmoe.parallel.expert_groups import ExpertGroups, expert_placements, layer_degrees, make_groups
from nlgmoe.pyramid import ExpertPlacement
from nlgmoe.ranks import AllRanksError, AllRanksSettingError
from nlgmoe.roles import component_of
from nlgmoe.surgery.warm_start import load_initial_weights
from nlgmoe.validation import RunError, require

if TYPE_CHECKING:
    from nlgmoe.parallel.engine import EngineGradients


class ExpertParallelStrategy(DeepSpeedStrategy):
    """Data parallelism with ZeRO for the dense parameters, expert parallelism for the experts.

    Every MoE layer has its own degree: the largest divisor of its number of experts and of the number of ranks up to
    `expert_parallel_size`. Checkpoints do not depend on it.

    Args:
        stage: ZeRO stage: 1 shards the optimizer's states, 2 also the gradients; 0 is taken as 1, which computes the same.
            (DeepSpeed does not support 3, which also shards the weights, with expert parallelism.)
        expert_parallel_size: maximum number of ranks that share one layer's experts; 1 keeps all experts on every rank.
        offload_optimizer: keep the optimizer's states in the host's memory and step there.
        initial_scale_power: fp16 only: power of 2 of the initial loss scale.
        loss_scale_window: fp16 only: steps without overflow after which the loss scale doubles.
        hysteresis: fp16 only: overflows after which the loss scale halves.
        min_loss_scale: fp16 only: the loss scale never falls below this.
        timeout_seconds: seconds that a rank waits for another one before the run ends.
        bucket_size: values per collective of ZeRO's reductions.
    """

    def __init__(
        self,
        stage: Literal[0, 1, 2] = 2,
        expert_parallel_size: int = 1,
        offload_optimizer: bool = False,
        initial_scale_power: int = 11,
        loss_scale_window: int = 500,
        hysteresis: int = 2,
        min_loss_scale: int = 1,
        timeout_seconds: float = 1800.0,
        bucket_size: int = 200_000_000,
    ) -> None:
        require(
            stage in (0, 1, 2),
            f"trainer.strategy.stage={stage}: DeepSpeed cannot shard the weights of sharded experts (ZeRO 3); use 1 or 2",
        )
        size = expert_parallel_size
        require(size >= 1, f"trainer.strategy.expert_parallel_size={size} must be at least 1")
        require(timeout_seconds > 0, f"trainer.strategy.timeout_seconds={timeout_seconds} must be above 0")
        require(bucket_size >= 1, f"trainer.strategy.bucket_size={bucket_size} must be at least 1")
        if stage == 0:
            rank_zero_info("trainer.strategy.stage=0 is taken as 1: the same numbers, with sharded optimizer states")
            stage = 1
        name_deepspeeds_device()
        self._collective_timeout = timedelta(seconds=timeout_seconds)
        super().__init__(
            zero_optimization=True,
            stage=stage,
            offload_optimizer=offload_optimizer,
            pin_memory=True,  # copies from and to pageable memory would make the host wait
            initial_scale_power=initial_scale_power,
            loss_scale_window=loss_scale_window,
            hysteresis=hysteresis,
            min_loss_scale=min_loss_scale,
            timeout=self._collective_timeout,
            logging_batch_size_per_gpu=1,  # "auto" makes the training data's loader, in evaluation too
            reduce_bucket_size=bucket_size,
        )
        self.expert_parallel_size = expert_parallel_size
        assert isinstance(self.config, dict)
        self.config["zero_force_ds_cpu_optimizer"] = False  # torch's AdamW also steps offloaded states
        # The throughput timer synchronises with the device in every micro-batch.
        self.config["timers"] = {"throughput": {"enabled": False}}
        if stage == 2 and not offload_optimizer:
            # Not at stage 1, where every rank would keep the whole sum, and DeepSpeed has another optimizer for bf16.
            self.config["data_types"] = {"grad_accum_dtype": "fp32"}
        self._groups: dict[int, ExpertGroups] = {}
        self._loading: Checkpoint | None = None  # the checkpoint being loaded
        self._engine: Any = None  # the engine of training, also during evaluation afterwards
        self._gradients: EngineGradients | None = None

    # ---- processes and groups

    @override
    def setup_environment(self) -> None:
        """Start the process group, which the base class does on GPUs only."""
        if isinstance(self.accelerator, CUDAAccelerator):
            super().setup_environment()
            return
        DDPStrategy.setup_environment(self)

    @override
    def setup_distributed(self) -> None:
        """Initialise DeepSpeed's communication, which the base class does on GPUs only."""
        from nlgmoe.parallel.engine import disable_deepspeed_extensions, register_world, use_device

        disable_deepspeed_extensions()
        use_device(self.root_device)
        if isinstance(self.accelerator, CUDAAccelerator):
            # Backward all-to-alls and the reductions of other groups overlap: each rank must start them in the host's order.
            os.environ.setdefault("NCCL_LAUNCH_ORDER_IMPLICIT", "1")
            super().setup_distributed()
        else:
            self.set_world_ranks()
            init_deepspeed(self)
        register_world()

    def expert_placements(self, config: GPTConfig, model_name: str = "model") -> Mapping[int, ExpertPlacement]:
        """Make the process groups and return this rank's experts in every MoE block, by block number. A collective."""
        from nlgmoe.parallel.engine import register_groups

        degrees = layer_degrees(config, self.world_size, self.expert_parallel_size, model_name)
        for degree in sorted(set(degrees.values()) - {1}):
            if degree not in self._groups:
                self._groups[degree] = make_groups(degree, self._collective_timeout)
                register_groups(self._groups[degree])
        if degrees:
            rank_zero_info(f"expert-parallel degree of each MoE block of the {model_name}: {degrees}")
        return expert_placements(config, degrees, self._groups)

    @property
    def _gpt(self) -> nn.Module:
        gpt: nn.Module = self.lightning_module.gpt  # type: ignore[union-attr,assignment]
        return gpt

    # ---- the engine

    @override
    def _initialize_deepspeed_train(self, model: nn.Module) -> None:
        """Mark the sharded experts for the engine, then start it: it groups the optimizer's parameters by these marks."""
        from nlgmoe.parallel.engine import EngineGradients
        from nlgmoe.parallel.muon import shard_matrices

        assert isinstance(self.config, dict)
        zero = self.config["zero_optimization"]
        # Weights become views of one buffer. grouped_mm, LayerNorm's kernel and matrix products need 16-byte alignment.
        zero["parameter_alignment"] = True
        # Overlapping makes the host wait for the device after every backward pass, without a gain on one rank. DeepSpeed may free
        # the gradient of a parameter that exceeds the bucket before the reduction's stream has read it.
        fits = all(parameter.numel() <= zero["reduce_bucket_size"] for parameter in model.parameters())
        zero["overlap_comm"] = self.world_size > 1 and fits
        self._mark_experts(model)
        super()._initialize_deepspeed_train(model)
        self._engine = self.model
        self._gradients = EngineGradients(self._engine)
        shard_matrices(self._engine.optimizer)
        self._restore_fp32_warm_start()

    def _mark_experts(self, model: nn.Module) -> None:
        from nlgmoe.parallel.engine import mark_as_deepspeed_moe

        for layer in moe_layers(model):
            degree = layer.router.num_experts // layer.placement.count
            if degree > 1:
                mark_as_deepspeed_moe(layer, self._groups[degree])

    def _restore_fp32_warm_start(self) -> None:
        """Load a warm start's fp32 weights into the engine, which in half precision has copied rounded ones."""
        start, path = (getattr(self.lightning_module, name, None) for name in ("warm_start", "started_from"))
        if start is None or path is None or weights_dtype(self) == torch.float32:
            return
        start = replace(start, checkpoint=path)  # its run, if it still trains, may have saved a newer one
        from nlgmoe.parallel.engine import EngineState

        state = EngineState(self._engine)
        load_initial_weights(self._gpt, start, lambda entry, value: state.load(entry, None, value.float()))  # type: ignore[arg-type]

    @override
    def on_train_start(self) -> None:
        """Refuse a parameter that a callback has frozen: ZeRO would update it, with zeros as its gradient."""
        config: AdamWConfig | None = getattr(self.lightning_module, "optimizer_config", None)
        for name, parameter in self._gpt.named_parameters():
            if not parameter.requires_grad and component_of(name) not in (() if config is None else config.frozen):
                raise AllRanksError(
                    "trainer.strategy=ExpertParallelStrategy trains all parameters but model.optimizer.frozen, and requires_grad "
                    f"of {name} is False; train on one process or with ddp_find_unused_parameters_true, or leave it True"
                )

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Refuse an epoch that begins within an accumulation window: the engine counts micro-batches across epochs."""
        window = self._engine.gradient_accumulation_steps()
        if batch_idx == 0 and (left := self._engine.micro_steps % window):
            raise AllRanksSettingError(
                f"trainer.accumulate_grad_batches={window} does not divide the epoch that has ended: {left} of its micro-batches "
                "are left; set trainer.limit_train_batches to a multiple of it"
            )

    @override
    def optimizer_step(self, optimizer: Any, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        """Call the hooks of a step before a step only: Lightning calls this after every micro-batch, which the engine counts."""
        if self._engine.is_gradient_accumulation_boundary():
            return super().optimizer_step(optimizer, closure, model, **kwargs)
        loss = closure()
        self._engine.step()
        return loss

    def step_gradients(self) -> StepGradients:
        """Return the gradients of the coming step."""
        assert self._gradients is not None
        return self._gradients.of_step()

    @override
    def _setup_model_and_optimizer(self, model: nn.Module, optimizer: Any, lr_scheduler: Any = None) -> tuple[Any, Any]:
        """Create the engine, also for a device without an index, which the base class requires."""
        import deepspeed

        index = self.root_device.index
        engine, engine_optimizer, _, _ = deepspeed.initialize(
            args=argparse.Namespace(device_rank=self.local_rank if index is None else index),
            config=self.config,
            model=model,
            model_parameters=list(model.parameters()),
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            dist_init_required=False,
        )
        return engine, engine_optimizer

    @override
    def backward(self, closure_loss: torch.Tensor, optimizer: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run the backward pass; Lightning has divided the loss by the accumulated micro-batches, so the engine must not."""
        return super().backward(closure_loss, optimizer, *args, scale_wrt_gas=False, **kwargs)

    @override
    def _initialize_deepspeed_inference(self, model: nn.Module) -> None:
        """Move the model to the device in its training dtype; evaluation needs no engine."""
        self._mark_experts(model)  # `load_weights` reads by these marks which ranks share an expert
        self.model = model.to(self.root_device, dtype=weights_dtype(self))

    # ---- checkpoints: the portable folder, written and read by all ranks

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return nothing: `save_checkpoint` gathers the weights by entry, and the optimizer's state."""
        return {}

    @override
    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        return {}

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        from nlgmoe.parallel.sharded_checkpoint import save

        if self._engine is None:
            raise RunError(f"{filepath}: nothing to save without training; copy the checkpoint that was evaluated")
        save(Path(self.broadcast(str(filepath))), checkpoint, self._gpt, self._engine)

    @override
    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read everything but weights and optimizer, which are read after the module has checked the rest."""
        self._loading = choose_checkpoint(checkpoint_path)
        return read_checkpoint(self._loading) | {"optimizer_states": []}

    @property
    @override
    def lightning_restore_optimizer(self) -> bool:
        return True

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        from nlgmoe.parallel.sharded_checkpoint import load_weights

        assert self._loading is not None
        engine = None if isinstance(self.model, LightningModule) else self.deepspeed_engine
        load_weights(self._gpt, engine, self._loading, self.root_device)

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        from nlgmoe.parallel.sharded_checkpoint import load_moments, restore_loss_scale

        assert self._loading is not None
        if checkpoint["global_step"] > 0:  # before its first step AdamW has no state
            load_moments(self._gpt, self.deepspeed_engine, self._loading, self.root_device)
        restore_loss_scale(self.deepspeed_engine, checkpoint.get("loss_scale", {}))

    @override
    def on_exception(self, exception: BaseException) -> None:
        """Kill the ranks that this process has started, which may hang, unless all ranks raise this error."""
        if isinstance(exception, AllRanksError):
            return  # the others raise it too
        processes = started_processes(self)  # none of torchrun, srun and others, which kill theirs themselves
        deadline = time.monotonic() + 5  # time for the other ranks to print their own errors
        while time.monotonic() < deadline and any(process.poll() is None for process in processes):
            time.sleep(0.1)
        for process in processes:
            process.kill()
