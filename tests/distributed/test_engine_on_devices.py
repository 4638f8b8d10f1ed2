"""DeepSpeed's engine where its ranks compute on a device; here `meta` takes the device's place."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from lightning.pytorch.plugins import DeepSpeedPrecision
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor, distributed, nn

from nlgmoe.checkpoint.entries import Entry
from nlgmoe.parallel.engine import EngineState
from nlgmoe.parallel.strategy import ExpertParallelStrategy


def test_zero_pieces_are_gathered_on_the_device_at_the_end_of_a_fit_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning has moved the parameters to the CPU by then, whose tensors NCCL does not take."""
    optimizer = object.__new__(DeepSpeedZeroOptimizer)
    base = SimpleNamespace(state={}, param_groups=[])
    vars(optimizer).update(optimizer=base, single_partition_of_fp32_groups=[], bit16_groups=[])
    state = EngineState(SimpleNamespace(optimizer=optimizer, device=torch.device("meta")))
    parameter, address = nn.Parameter(torch.zeros(4)), SimpleNamespace(start=0)
    fragment = SimpleNamespace(lp_fragment_address=address, get_hp_fragment=lambda key: torch.ones(4))
    parameter._hp_mapping = fragment  # type: ignore[attr-defined]
    reduced: list[Tensor] = []
    monkeypatch.setattr(state, "ranks_of", lambda parameter: None)
    monkeypatch.setattr(distributed, "get_rank", lambda group=None: 1)
    monkeypatch.setattr(distributed, "get_global_rank", lambda group, rank: rank)
    monkeypatch.setattr(distributed, "reduce", lambda whole, *arguments, **named: reduced.append(whole))
    assert state.gather(Entry("a", "a", True, parameter, 0, parameter.shape), None, owner=0) is None
    assert [(whole.device.type, whole.numel()) for whole in reduced] == [("meta", 4)]


@pytest.mark.parametrize(("ranks", "bucket", "overlaps"), [(1, 64, False), (8, 64, True), (8, 62, False)])
def test_communication_overlaps_between_ranks_where_every_gradient_fits_the_bucket(
    ranks: int, bucket: int, overlaps: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(self: DeepSpeedStrategy, model: nn.Module) -> None:
        raise InterruptedError

    monkeypatch.setattr(DeepSpeedStrategy, "_initialize_deepspeed_train", start)
    monkeypatch.setattr(ExpertParallelStrategy, "world_size", ranks)
    strategy: Any = ExpertParallelStrategy(stage=2, bucket_size=bucket)
    strategy._precision_plugin = DeepSpeedPrecision("32-true")
    with pytest.raises(InterruptedError):
        strategy._initialize_deepspeed_train(nn.Linear(8, 8))
    assert strategy.config["zero_optimization"]["overlap_comm"] is overlaps
