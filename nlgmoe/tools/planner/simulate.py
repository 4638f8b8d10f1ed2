"""`nlgmoe inspect --simulate`: one rank of a run, in one process without values: its first optimizer step as `fit` takes it.

Tensors are `FakeTensor`s, which have a shape and no memory, and process groups are PyTorch's fake ones, whose collectives do
nothing. Module, strategy, DeepSpeed's engine and Lightning's loop are real. Every operator is seen by `Recorder`, which counts
bytes of tensors and of collectives. The state is that of a resumed run: AdamW has its moments before the step.
"""

from __future__ import annotations

import gc
import io
import logging
import os
import warnings
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from typing import Any
from unittest import mock

import torch
from lightning import Trainer
from lightning.pytorch.trainer.connectors import data_connector
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, distributed, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from nlgmoe import loss
from nlgmoe.config import GPTConfig
from nlgmoe.data import PileDataModule, TrainingData
from nlgmoe.experiment import Experiment, load_config
from nlgmoe.layers import all_to_all, dispatch
from nlgmoe.layers.experts import Experts
from nlgmoe.model import gpt
from nlgmoe.module import MoEGPTModule
from nlgmoe.parallel.engine import EngineState
from nlgmoe.run.checks import check_trainer
from nlgmoe.tools.planner.topology import Topology
from nlgmoe.validation import require

SMALL = 1024  # values: smaller all-reduces are norms and counts
MANY = 1 << 40  # what the host reads from any integer tensor: more rows than there are
C10D, FUNCTIONAL = torch.ops.c10d, torch.ops._c10d_functional


@dataclass(frozen=True)
class Simulated:
    """What one rank did."""

    rank: int
    peak_bytes: int  # of tensors, in the step
    bytes: dict[str, int]  # that the rank sends in the step by kind of collective, as rings send them
    calls: dict[str, int]  # of collectives by kind


class Recorder(TorchDispatchMode):
    """Counts the bytes of living tensors and of collectives."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0  # bytes now, and their maximum since `begin`
        self.calls: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()
        self._known: set[int] = set()  # storages

    def begin(self, trainer: Trainer, batch: Any, batch_idx: int) -> None:
        """Before the step, give the optimizer the moments of a resumed run, and forget what happened so far."""
        if batch_idx == 0:
            EngineState(trainer.strategy._engine).init_moments()  # type: ignore[attr-defined]
            gc.collect()
            self.peak = 0
            self.calls.clear()
            self.sent.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:  # the host reads a value
            dtype = args[0].dtype
            return False if dtype == torch.bool else 1.0 if dtype.is_floating_point else MANY
        result = func(*args, **(kwargs or {}))
        if func.namespace in ("c10d", "_c10d_functional") and func is not FUNCTIONAL.wait_tensor.default:
            self._count(func, args)
        for tensor in tree_iter(result):
            if isinstance(tensor, FakeTensor) and tensor.fake_device.type != "meta":
                self._hold(tensor.untyped_storage())
        return result

    def _hold(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.live += size
        weakref.finalize(storage, self._release, key, size).atexit = False
        if self.live > 1.01 * self.peak:
            gc.collect()  # FakeTensors are parts of cycles
            self.peak = max(self.peak, self.live)

    def _release(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size

    def _count(self, func: Any, args: Any) -> None:
        tensor = next(value for value in tree_iter(args) if isinstance(value, Tensor))
        if func is FUNCTIONAL.all_to_all_single.default:
            group = torch._C._distributed_c10d._resolve_process_group(args[3])
        else:
            objects = (arg for arg in args if isinstance(arg, torch.ScriptObject))
            group = distributed.ProcessGroup.unbox(next(arg for arg in objects if "ProcessGroup" in str(arg._type())))
        ranks, size = group.size(), tensor.numel() * tensor.element_size()
        if ranks < 2:
            return
        kind, share = "other", 1.0
        if func is FUNCTIONAL.all_to_all_single.default:
            kind = "all_to_all"
        elif func is C10D.alltoall_base_.default and tensor.is_floating_point():
            kind, size, share = "muon_matrices", sum(args[4]) * tensor.element_size() * ranks, 1 / (ranks - 1)
        elif func is C10D.allreduce_.default and tensor.is_floating_point() and tensor.numel() >= SMALL:
            whole = ranks == distributed.get_world_size()
            kind, share = "dense_gradients" if whole else "expert_gradients", 2
        elif func is C10D._allgather_base_.default and tensor.dtype != torch.float64:  # that of losses
            kind = "gathered_weights"
        elif func in (C10D.allreduce_.default, C10D.barrier.default):
            share = 2
        self.calls[kind] += 1
        self.sent[kind] += round(share * size * (ranks - 1) / ranks)


def simulate(files: list[str], settings: dict[str, Any], topology: Topology, rank: int) -> Simulated:
    """Simulate a rank of a run of train.py: of its YAML `files`, whose `settings` are overridden by `topology`."""
    require(
        topology.deepspeed and not topology.offload_optimizer and bool(settings),
        "--simulate is for YAML files with trainer.strategy=nlgmoe.ExpertParallelStrategy, without offload_optimizer (whose host "
        "memory it could not tell from a GPU's); change the files, or leave --simulate out",
    )
    require(0 <= rank < topology.gpus, f"--rank={rank} must be at least 0 and below the {topology.gpus} ranks")
    with simulated_rank(rank, topology.gpus), _quiet():
        run = _load(files, settings, topology)
        data, recorder = _NoText(run.data, run.module.config), Recorder()
        gc.collect()
        gc.freeze()  # what exists is not searched for cycles
        with ExitStack() as stack:
            for patch in _patches(topology, run.module):
                stack.enter_context(patch)
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
            stack.enter_context(recorder)
            run.module.on_train_batch_start = partial(recorder.begin, run.trainer)  # type: ignore[method-assign]
            Trainer.fit(run.trainer, run.module, datamodule=data)  # not `RunTrainer`'s, which makes a folder
        gc.unfreeze()
    return Simulated(rank, recorder.peak, dict(recorder.sent), dict(recorder.calls))


@contextmanager
def simulated_rank(rank: int, ranks: int) -> Iterator[None]:
    """Make this process a rank whose collectives do nothing, of a run on nodes of one rank each."""
    from deepspeed import comm
    from deepspeed.utils import groups
    from torch.testing._internal.distributed.fake_pg import FakeStore

    tables = [table for name, table in vars(groups).items() if name.startswith("_EXPERT_") and isinstance(table, dict)]
    address = {"NODE_RANK": str(rank), "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    patches: list[Any] = [
        mock.patch.dict(os.environ, address),
        mock.patch.object(rank_zero_only, "rank", rank),  # Lightning sets it, for the whole process
        *(mock.patch.dict(table, clear=True) for table in tables),
        mock.patch.object(groups, "_WORLD_GROUP", None),
        mock.patch.object(comm.comm, "cdb", None),
        mock.patch.object(distributed, "all_gather_object", _say_the_same),
        mock.patch.object(distributed, "broadcast_object_list", lambda *args, **kwargs: None),
    ]
    with ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        distributed.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
        try:
            yield
        finally:
            distributed.destroy_process_group()


def _say_the_same(said: list[Any], own: Any, group: Any = None) -> None:
    said[:] = [own] * len(said)


def _load(files: list[str], settings: dict[str, Any], topology: Topology) -> Experiment:
    """Build the objects of the files for a process without GPU, text, teacher, callbacks and checkpoint."""
    strategy = settings["trainer"]["strategy"]
    init = (strategy.get("init_args") or {}) if isinstance(strategy, dict) else {}
    init |= {"stage": topology.zero_stage, "expert_parallel_size": topology.expert_parallel_size}
    name = strategy["class_path"] if isinstance(strategy, dict) else "nlgmoe.ExpertParallelStrategy"
    run = load_config(
        files,
        trainer__accelerator="cpu",
        trainer__devices=1,
        trainer__num_nodes=topology.gpus,
        trainer__precision=topology.precision,
        trainer__strategy={"class_path": name, "init_args": init},
        trainer__plugins=[{"class_path": "lightning.pytorch.plugins.environments.LightningEnvironment"}],
        trainer__logger=False,
        trainer__max_steps=1,
        trainer__limit_val_batches=0,
        data__micro_batch_size=topology.micro_batch_size,
        data__global_batch_size=topology.global_batch_size,
        model__activation_checkpointing=topology.activation_checkpointing,
        model__compile=False,
    )
    check_trainer(run.trainer, "fit")
    run.trainer.callbacks = []  # type: ignore[attr-defined]
    run.module.distiller = run.module.warm_start = None
    return run


class _NoText(TrainingData):
    """The sizes of the batches of a run's data module, and of a model's vocabulary."""

    def __init__(self, data: PileDataModule, config: GPTConfig) -> None:
        super().__init__()
        self.data, self.seq_len, self.config = data, data.seq_len, config
        self.has_equal_batches = data.has_equal_batches  # type: ignore[method-assign]

    def setup(self, stage: str) -> None:  # divide the batch among ranks, or refuse it, as the data module does
        self.data.trainer = self.trainer
        self.trainer.accumulate_grad_batches = self.data._accumulation(self.data.global_batch_size)  # type: ignore

    def train_dataloader(self) -> Any:
        return repeat(None)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        tokens = torch.zeros(self.data.micro_batch_size, self.data.seq_len, dtype=torch.int64)
        whole = torch.ones_like(tokens, dtype=torch.bool)
        made: dict[str, Any] = {"tokens": tokens, "targets": torch.zeros_like(tokens)}
        made |= {"token_mask": whole, "padded": False, "domain": tokens.new_zeros(len(tokens))}
        made |= {"document": torch.zeros_like(tokens)} if self.data.document_attention else {}
        return made | ({"loss_mask": torch.ones_like(whole)} if self.data.mask_eod_loss else {})

    domains = property(lambda self: ["text"])
    vocab_size = property(lambda self: self.config.vocab_size)

    def fingerprint(self) -> dict[str, str | int]:
        return {}

    def batch_size_after(self, samples: int) -> int:
        return self.data.batch_size_after(samples)


def _patches(topology: Topology, module: MoEGPTModule) -> Iterator[Any]:
    """Yield what replaces code that reads values, or that computes otherwise on a CPU than on an accelerator."""
    config, length = module.config, topology.length(module.config)
    rows = topology.micro_batch_size * length * (config.moe.top_k if config.moe else 1)
    attention = F.scaled_dot_product_attention

    def read(tensor: Tensor) -> Any:  # floats; and `[2, ranks]`, the rows of each rank: balanced
        if tensor.dim() == 2:
            return [[rows // tensor.shape[1]] * tensor.shape[1]] * len(tensor)
        return [1.0] * tensor.numel()

    def without_dropout(*args: Any, dropout_p: float = 0.0, **more: Any) -> Tensor:
        return attention(*args, **more)

    def dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        return torch.native_dropout(x, p, True)[0] if training and p else x  # its mask has a byte per value

    def keep_rows(index: Tensor, tokens_per_expert: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        return index, torch.arange(len(index)), tokens_per_expert

    def in_place(module: nn.Module, convert: Any, recurse: bool = True) -> nn.Module:
        for part in module.modules():
            for tensor in [*part.parameters(recurse=False), *part.buffers(recurse=False)]:
                tensor.data = convert(tensor)
        return module

    yield mock.patch.object(nn.Module, "_apply", in_place)  # the original one swaps FakeTensors
    yield mock.patch.object(FakeTensor, "tolist", read)
    yield mock.patch.object(F, "dropout", dropout)
    yield mock.patch.object(F, "scaled_dot_product_attention", without_dropout)
    yield mock.patch.object(Experts, "_gather_bias", Experts._multiply_bias)
    yield mock.patch.object(dispatch, "has_slots", lambda device: True)
    yield mock.patch.object(dispatch, "round_up_rows", keep_rows)
    yield mock.patch.object(all_to_all, "round_up_rows", keep_rows)
    yield mock.patch.object(loss, "fork_rng", nullcontext)
    yield mock.patch.object(gpt, "initialise", lambda *args: None)
    yield mock.patch.object(module, "log", lambda *args, **kwargs: None)  # Lightning copies what is logged
    yield mock.patch.object(module, "on_train_epoch_end", lambda: None)  # checks the weights
    yield mock.patch.object(data_connector, "_InfiniteBarrier", nullcontext)  # a group of gloo


@contextmanager
def _quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
