"""What ranks send each other in a step, and where the host waits for the device.

A cell here is a run (`Cell` in tests/support/ranks.py) whose bytes are those of the cost model. To add one, add it to `TRAFFIC`.
"""

import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from lightning import Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor, distributed

from nlgmoe.callbacks import StopOnSignal
from nlgmoe.layers import all_to_all
from nlgmoe.tools.planner.cost import estimate
from nlgmoe.tools.planner.topology import Topology
from tests.support.cells import CAPACITY, DROPLESS, PLAIN
from tests.support.jobs import Found, Jobs
from tests.support.ranks import SAMPLES, Cell, make_trainer, on_ranks, strategy_of
from tests.support.synthetic import SyntheticData

TRAFFIC = [
    Cell("traffic, bf16, recomputed", 2, 2, moe=DROPLESS, steps=2, precision="bf16-mixed", checkpointing=True),
    Cell("traffic, capacity, recomputed", 2, 1, moe=CAPACITY, steps=2, checkpointing=True),
]
READS = ("item", "tolist", "__bool__", "__int__", "__float__", "__index__")
READERS = {"nlgmoe.layers.all_to_all", "nlgmoe.run.signals", "nlgmoe.step"}


class Traffic(Callback):
    """Counts what this rank sends in the last training step.

    Attributes:
        rows: bytes of tokens sent to other ranks.
        elsewhere: assignments to experts of other ranks.
        assignments: all of them.
        reduced: bytes of the largest all-reduce over all ranks, times the ring's 2 (W - 1) / W.
        waits: times that a module of `READERS` has read a tensor's values, by its name.
    """

    def __init__(self, last_step: int) -> None:
        self.last_step = last_step
        self.rows = self.elsewhere = self.assignments = self.reduced = 0
        self.waits: Counter[str] = Counter()
        self._originals = all_to_all.all_to_all_single_autograd, distributed.all_reduce

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.last_step:
            all_to_all.all_to_all_single_autograd, distributed.all_reduce = self._exchange, self._reduce
            for name in READS:
                setattr(Tensor, name, self._counted(getattr(Tensor, name)))

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        all_to_all.all_to_all_single_autograd, distributed.all_reduce = self._originals
        for name in READS:
            vars(Tensor).get(name) and delattr(Tensor, name)
        layers = [block.moe for block in pl_module.gpt.blocks if block.moe is not None]
        for layer, routing in zip(layers, pl_module.routings, strict=True):
            if batch_idx == self.last_step and layer.placement.group is not None:
                first, count = layer.placement.first, layer.placement.count
                here = (routing.expert >= first) & (routing.expert < first + count)
                self.elsewhere += int((routing.kept & ~here).sum())
                self.assignments += routing.kept.numel()

    def _exchange(self, rows: Tensor, received: list[int], sent: list[int], group: Any) -> Tensor:
        def count(rows: Tensor, sizes: list[int]) -> None:
            self.rows += (len(rows) - sizes[distributed.get_rank(group)]) * rows.shape[1] * rows.element_size()

        count(rows, sent)
        result: Tensor = self._originals[0](rows, received, sent, group)
        if result.requires_grad:
            result.register_hook(lambda gradient: count(gradient, received))
        return result

    def _counted(self, read: Callable[..., Any]) -> Callable[..., Any]:
        def counted(tensor: Tensor, *args: Any) -> Any:
            self.waits.update(READERS & {sys._getframe(1).f_globals["__name__"]})
            return read(tensor, *args)

        return counted

    def _reduce(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        ranks = distributed.get_world_size(kwargs.get("group"))
        size = tensor.numel() * tensor.element_size() * 2 * (ranks - 1) // ranks
        self.reduced = max(self.reduced, size)
        return self._originals[1](tensor, *args, **kwargs)


def traffic(cell: Cell, ranks: int, folder: Path) -> dict[str, Any]:
    callback = Traffic(cell.steps - 1)
    on_ranks(cell, ranks, folder, callback, StopOnSignal())
    return {name: getattr(callback, name) for name in ("rows", "elsewhere", "assignments", "reduced", "waits")}


def engine_facts(cell: Cell, ranks: int, folder: Path) -> tuple[bool, dict[str, Any], list[str]]:
    """The engine's throughput timer, the extensions that DeepSpeed compiles, and the backends of the experts' groups."""
    from deepspeed import ops

    strategy = strategy_of(cell)
    make_trainer(replace(cell, steps=1), ranks, folder, strategy=strategy).fit(cell.module(), SyntheticData())
    groups = strategy._groups[ranks]
    backends = [distributed.get_backend(group) for group in (groups.parallel, groups.data_parallel)]
    return strategy.deepspeed_engine.tput_timer.config.enabled, ops.__compatible_ops__, backends


JOBS: Jobs = {2: [(traffic, cell) for cell in TRAFFIC] + [(engine_facts, PLAIN)]}


@pytest.mark.parametrize("cell", TRAFFIC, ids=lambda cell: cell.name)
def test_step_sends_the_bytes_of_the_cost_model_and_the_host_waits_once(cell: Cell, found: Found) -> None:
    settings = {"activation_checkpointing": cell.checkpointing, "precision": cell.precision, "deepspeed": True}
    topology = Topology(2, 2, cell.stage, SAMPLES // 2, SAMPLES, **settings)  # type: ignore[arg-type]
    predicted = estimate(cell.module().config, topology).communication
    counted = found[traffic, cell.name]
    rows, assignments, elsewhere = (
        sum(rank[name] for rank in counted) for name in ("rows", "assignments", "elsewhere")
    )
    assert 0 < elsewhere < assignments
    # The model takes half of the assignments to be elsewhere; these routings are not that even.
    if not cell.rank_local:
        assert rows / elsewhere == 2 * predicted.all_to_all / (assignments / 2)
        forward_passes = 1 + cell.checkpointing
        exchanges = {"nlgmoe.layers.all_to_all": 2 * forward_passes}  # of two MoE layers
        assert [rank["waits"] for rank in counted] == [exchanges | {"nlgmoe.step": 1}] * 2
    else:  # slots are sent, whatever is in them
        assert [rank["rows"] for rank in counted] == [predicted.all_to_all] * 2
        assert [rank["waits"] for rank in counted] == [{"nlgmoe.step": 1}] * 2
    assert [rank["reduced"] for rank in counted] == [predicted.dense_gradients] * 2


def test_engine_neither_waits_nor_compiles_nor_opens_a_communicator_of_one_rank(found: Found) -> None:
    assert found[engine_facts, PLAIN.name] == [(False, {}, ["gloo", "fake"])] * 2
