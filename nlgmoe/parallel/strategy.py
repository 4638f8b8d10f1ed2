"""ExpertParallelStrategy: Lightning's DeepSpeedStrategy with experts spread over ranks, on GPUs and on CPUs."""

from __future__ import annotations

import argparse
import os
import signal
import time
import warnings
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning import LightningModule
from lightning.pytorch.accelerators import CUDAAccelerator
from lightning.pytorch.plugins.precision import DeepSpeedPrecision
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import distributed, nn
from typing_extensions import override

from nlgmoe.checkpoint.agreement import AgreedError
from nlgmoe.checkpoint.folder import TensorFiles
from nlgmoe.checkpoint.newest import choose
from nlgmoe.checkpoint.portable import read_checkpoint
from nlgmoe.checkpoint.warm_start import load_initial_weights
from nlgmoe.config import GPTConfig
from nlgmoe.layers.moe import MoELayer
from nlgmoe.layers.placement import ExpertPlacement
from nlgmoe.non_finite import StepGradients
from nlgmoe.parallel.expert_groups import ExpertGroups, describe, layer_degrees, make_groups, place

if TYPE_CHECKING:
    from nlgmoe.parallel.engine_gradients import EngineGradients


class ExpertParallelStrategy(DeepSpeedStrategy):
    """Data parallelism with ZeRO for the dense part, expert parallelism for the experts.

    Every MoE layer has a degree of its own: the largest divisor of its number of experts and of the number of ranks up to
    `expert_parallel_size`. A checkpoint knows nothing of it.

    Args:
        stage: what ZeRO divides between ranks: 0 nothing (not with fp16), 1 the optimizer's states, 2 the gradients too.
            (3, the weights too, is refused by DeepSpeed for experts spread over ranks.)
        expert_parallel_size: most ranks that hold one layer's experts together; 1 keeps all experts on every rank.
        offload_optimizer: keep the optimizer's states in the host's memory and step there; stage 1 or 2.
        initial_scale_power: fp16 only: the loss scale starts at 2 to this power.
        loss_scale_window: fp16 only: steps without overflow after which the loss scale doubles.
        hysteresis: fp16 only: overflows after which the loss scale halves.
        min_loss_scale: fp16 only: the loss scale never falls below this.
        timeout_seconds: a rank that waits longer for another one gives up, and the run ends.
        bucket_size: values per collective of ZeRO's reductions and gathers.
        accelerator: set by the trainer.
        parallel_devices: set by the trainer.
        cluster_environment: set by the trainer.
        precision_plugin: set by the trainer.

    Raises:
        ValueError: a setting is out of range.
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
        accelerator: Any = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: Any = None,
        precision_plugin: Any = None,
    ) -> None:
        if stage not in (0, 1, 2):
            raise ValueError(
                f"trainer.strategy.stage={stage}: DeepSpeed cannot divide the weights of experts spread over ranks (ZeRO 3); "
                "use 0, 1 or 2"
            )
        if expert_parallel_size < 1:
            raise ValueError(f"trainer.strategy.expert_parallel_size={expert_parallel_size} must be at least 1")
        if timeout_seconds <= 0:
            raise ValueError(f"trainer.strategy.timeout_seconds={timeout_seconds} must be above 0")
        if offload_optimizer and stage == 0:
            raise ValueError("trainer.strategy.offload_optimizer=true needs stage 1 or 2")
        if not torch.accelerator.is_available():
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed would find that out itself, with a warning
        super().__init__(
            accelerator=accelerator,
            zero_optimization=stage > 0,
            stage=stage,
            offload_optimizer=offload_optimizer,
            parallel_devices=parallel_devices,
            cluster_environment=cluster_environment,
            precision_plugin=precision_plugin,
            initial_scale_power=initial_scale_power,
            loss_scale_window=loss_scale_window,
            hysteresis=hysteresis,
            min_loss_scale=min_loss_scale,
            timeout=timedelta(seconds=timeout_seconds),
            allgather_bucket_size=bucket_size,
            reduce_bucket_size=bucket_size,
        )
        self.stage = stage
        self.expert_parallel_size = expert_parallel_size
        assert isinstance(self.config, dict)
        self.config["zero_force_ds_cpu_optimizer"] = False  # our AdamW steps offloaded states too
        self.config["timers"] = {"throughput": {"enabled": False}}  # it waits for the device in every micro-batch
        if stage == 2 and not offload_optimizer:
            # At stage 0 DeepSpeed refuses it; at stage 1 it holds all of it on every rank, in bf16 with another optimizer.
            self.config["data_types"] = {"grad_accum_dtype": "fp32"}
        self._groups: dict[int, ExpertGroups] = {}
        self._loading: Path | None = None  # the checkpoint that is being loaded
        self._engine: Any = None  # of training; evaluation afterwards keeps it
        self._gradients: EngineGradients | None = None

    # ---- processes and groups

    @override
    def setup_environment(self) -> None:
        """Start the process group; unlike the base class, on CPUs too."""
        if isinstance(self.accelerator, CUDAAccelerator):
            super().setup_environment()
            return
        self._process_group_backend = self._process_group_backend or "gloo"
        DDPStrategy.setup_environment(self)

    @override
    def setup_distributed(self) -> None:
        """As the base class does, which only knows GPUs."""
        from nlgmoe.parallel.deepspeed_moe import look_up_collectives_late, register_world, use_plain_collectives

        use_plain_collectives()
        if isinstance(self.accelerator, CUDAAccelerator):
            super().setup_distributed()
        else:
            self.set_world_ranks()
            self._init_deepspeed_distributed()
        register_world(self._patience)
        look_up_collectives_late()

    def expert_placements(self, config: GPTConfig, of: str = "model") -> Mapping[int, ExpertPlacement]:
        """This rank's share of every MoE block; makes the process groups.

        Args:
            config: of the model that is to be spread.
            of: what it is called in the log and in errors: "model", or "teacher".

        Raises:
            ValueError: `expert_parallel_size` does not suit the model and the number of ranks.
        """
        from nlgmoe.parallel.deepspeed_moe import register_groups

        degrees = layer_degrees(config, self.world_size, self.expert_parallel_size, of)
        for degree in sorted(set(degrees.values()) - {1}):
            if degree not in self._groups:
                self._groups[degree] = make_groups(degree, self._patience)
                register_groups(self._groups[degree])
        if degrees:
            rank_zero_info(describe(config, degrees, self.world_size, of))
        return place(config, degrees, self._groups)

    @property
    def _gpt(self) -> nn.Module:
        gpt: nn.Module = self.lightning_module.gpt  # type: ignore[union-attr,assignment]
        return gpt

    @property
    def _patience(self) -> timedelta:
        assert self._timeout is not None
        return self._timeout

    # ---- the engine

    @override
    def init_deepspeed(self) -> None:
        """As the base class does, which takes our `configure_gradient_clipping` for an attempt to clip here."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Since DeepSpeed handles gradient clipping internally")
            super().init_deepspeed()

    @override
    def _initialize_deepspeed_train(self, model: nn.Module) -> None:
        """Show the engine which parameters are experts, before the optimizer's groups are made."""
        from nlgmoe.parallel.deepspeed_moe import present_to_engine
        from nlgmoe.parallel.engine_gradients import EngineGradients

        assert isinstance(self.precision_plugin, DeepSpeedPrecision)
        self._check_fp16(self.precision_plugin)
        for layer in [module for module in model.modules() if isinstance(module, MoELayer)]:
            degree = layer.router.num_experts // layer.placement.count
            if degree > 1:
                present_to_engine(layer, self._groups[degree])
        super()._initialize_deepspeed_train(model)
        self._engine = self.model
        self._gradients = EngineGradients(self._engine)
        self._start_exactly()

    def _start_exactly(self) -> None:
        """Let a warm start in half precision step on the checkpoint's fp32 weights, not on what the engine made of halves."""
        start = getattr(self.lightning_module, "warm_start", None)
        assert isinstance(self.precision_plugin, DeepSpeedPrecision)
        if start is None or self.precision_plugin._desired_dtype == torch.float32:
            return
        from nlgmoe.parallel.engine_state import EngineState

        state = EngineState(self._engine)
        load_initial_weights(self._gpt, start, lambda entry, whole: state.put(entry, None, whole.float()))  # type: ignore[arg-type]

    def step_gradients(self) -> StepGradients | None:
        """The gradients of the step about to be taken; None after a micro-batch that does not end a step."""
        assert self._gradients is not None
        if not self._gradients.complete:
            return None
        self._gradients.begin()
        return self._gradients

    def _check_fp16(self, plugin: DeepSpeedPrecision) -> None:
        if plugin._desired_dtype != torch.float16:
            return
        from deepspeed.accelerator import get_accelerator

        if not get_accelerator().is_fp16_supported():
            raise AgreedError(
                f"trainer.precision={plugin.precision}: DeepSpeed has no fp16 on this device; use bf16-mixed"
            )
        if self.stage == 0:
            raise AgreedError(
                f"trainer.precision={plugin.precision} needs trainer.strategy.stage 1 or 2: at stage 0 DeepSpeed unscales fp16 "
                "gradients by the wrong scale whenever the scale grows"
            )

    @override
    def _setup_model_and_optimizer(self, model: nn.Module, optimizer: Any, lr_scheduler: Any = None) -> tuple[Any, Any]:
        """As the base class does, but where a device has no index too."""
        import deepspeed

        index = self.root_device.index
        engine, engine_optimizer, _, _ = deepspeed.initialize(
            args=argparse.Namespace(device_rank=self.local_rank if index is None else index),
            config=self.config,
            model=model,
            model_parameters=[parameter for parameter in model.parameters() if parameter.requires_grad],
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            dist_init_required=False,
        )
        return engine, engine_optimizer

    @override
    def backward(self, closure_loss: torch.Tensor, optimizer: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Lightning has divided the loss by the accumulated micro-batches; the engine must not do it again."""
        return super().backward(closure_loss, optimizer, *args, scale_wrt_gas=False, **kwargs)

    @override
    def _initialize_deepspeed_inference(self, model: nn.Module) -> None:
        """Evaluation needs no engine: the weights, in the type they have in training."""
        assert isinstance(self.precision_plugin, DeepSpeedPrecision)
        self.model = model.to(self.root_device, dtype=self.precision_plugin._desired_dtype)

    # ---- checkpoints: the portable folder, written and read by all ranks

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Nothing: `save_checkpoint` gathers the weights, entry by entry."""
        return {}

    @override
    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """Nothing: likewise."""
        return {}

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write the portable checkpoint, each rank what it owns.

        Raises:
            ValueError: a rank could not write; every rank raises, and what was there before is untouched. Or nothing is
                being trained.
        """
        from nlgmoe.parallel.checkpointing import save

        if self._engine is None:
            raise ValueError(
                f"{filepath}: there is nothing to save without training; copy the checkpoint that was evaluated"
            )
        save(Path(self.broadcast(str(filepath))), checkpoint, self._gpt, self._engine)

    @override
    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read everything but weights and optimizer, which follow once the module has agreed to the rest."""
        self._loading = choose(checkpoint_path, self.lightning_module.trainer.state.fn == TrainerFn.FITTING)  # type: ignore[union-attr]
        return read_checkpoint(self._loading) | {"optimizer_states": []}

    @property
    @override
    def lightning_restore_optimizer(self) -> bool:
        """Let Lightning ask for the optimizer's state in its turn."""
        return True

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Read this rank's weights."""
        from nlgmoe.parallel.checkpointing import load_weights

        assert self._loading is not None
        engine = None if isinstance(self.model, LightningModule) else self.deepspeed_engine
        load_weights(self._gpt, engine, TensorFiles(self._loading, "model"))

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Read this rank's part of AdamW's state, and the loss scale."""
        from nlgmoe.parallel.checkpointing import load_moments, restore_loss_scale

        assert self._loading is not None
        if checkpoint["global_step"] > 0:  # before its first step AdamW has no state
            load_moments(self._gpt, self.deepspeed_engine, TensorFiles(self._loading, "optimizer"))
        restore_loss_scale(self.deepspeed_engine, checkpoint.get("loss_scale", {}))

    @override
    def on_exception(self, exception: BaseException) -> None:
        """A rank that fails brings the others down, one that hangs too: those that this process has started."""
        launcher = self.launcher
        if not isinstance(launcher, _SubprocessScriptLauncher):
            return  # torchrun, srun and the like watch over their processes themselves
        if isinstance(exception, AgreedError):
            return  # they fail too, and end with this process (`cli/errors.py`)
        patience = time.monotonic() + 5  # for one that is just telling what went wrong with it
        while time.monotonic() < patience and any(process.poll() is None for process in launcher.procs):
            time.sleep(0.1)
        launcher.kill(signal.SIGKILL)

    @override
    def barrier(self, name: str | None = None, *args: Any, **kwargs: Any) -> None:
        """Wait for all ranks."""
        if distributed.is_initialized():
            distributed.barrier(device_ids=None if self.root_device.type == "cpu" else [self.root_device.index])
