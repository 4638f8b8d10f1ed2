"""Half precision on ranks: close to fp32, in the types that docs/numerics.md documents.

A cell here is a run (`Cell` in tests/support/ranks.py) in some precision. To add one, add it to `TYPED`, or to `HALF` of
tests/support/cells.py if its losses follow those of fp32 too; its row in docs/numerics.md is what the test expects.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, distributed

from nlgmoe.optim.muon import MuonConfig
from tests.support.cells import DROPLESS, HALF
from tests.support.jobs import Found, Jobs, allow_fp16
from tests.support.ranks import SAMPLES, Cell, Outcome, alone, on_ranks, train

ONE_STEP: dict[str, Any] = {"moe": DROPLESS | {"mlp_type": "residual"}, "steps": 1, "accumulate": 2}
MUON = {
    "muon": MuonConfig()
}  # makes small singular values large, and their rounding with them: norms differ from step 6 on
TYPED = [
    Cell("types, offloaded", 2, 2, precision="bf16-mixed", options={"offload_optimizer": True}, **ONE_STEP),
    *(Cell(f"types, fp16, ZeRO {stage}", 2, stage, precision="16-mixed", **ONE_STEP) for stage in (1, 2)),
    Cell("types, bf16-mixed, ZeRO 1", 2, 1, precision="bf16-mixed", **ONE_STEP),
    Cell("types, bf16-true, ZeRO 2", 2, 2, precision="bf16-true", **ONE_STEP),
]
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
COLUMNS = ("weights", "products", "sums", "reduced", "stepped on", "moments")


class Types(Callback):
    """Notes in which types a run computes and keeps what.

    Attributes:
        found: by the columns of the table in docs/numerics.md: weights, matrix products, gradients summed over micro-batches,
            their largest reduction over ranks (not of `ddp`), what the optimizer steps on, and the moments.
    """

    def __init__(self) -> None:
        self.found: dict[str, str] = {}
        self._reduced = 0
        self._all_reduce = distributed.all_reduce

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        linear = pl_module.gpt.blocks[0].ffn.up
        linear.register_forward_hook(lambda module, inputs, output: self._note("products", output))
        distributed.all_reduce = self._reduce

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        zero = getattr(trainer.strategy.model, "optimizer", None)
        if not hasattr(zero, "averaged_gradients"):
            self._note("sums", pl_module.gpt.token_embedding.weight.grad)
        else:
            sums = zero.accumulated_grads_in_cpu.values() if zero.cpu_offload else zero.averaged_gradients[0]
            self._note("sums", next(iter(sums)))

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        distributed.all_reduce = self._all_reduce
        weight = pl_module.gpt.token_embedding.weight
        self._note("weights", weight)
        if not hasattr(trainer.strategy.model, "optimizer"):
            self._note("stepped on", weight)
            self._note("moments", trainer.optimizers[0].state[weight]["exp_avg"])
            return
        from nlgmoe.parallel.engine import EngineState

        if hasattr(trainer.strategy.model.optimizer, "bit16_groups"):  # weights are views of one buffer
            assert all(one.data_ptr() % 16 == 0 for one in pl_module.gpt.parameters())
        state = EngineState(trainer.strategy.model)
        for name, key in (("stepped on", None), ("moments", "exp_avg")):
            if (fragment := state.fragment(weight, key)) is not None:  # ZeRO gives some ranks none of it
                self._note(name, fragment[1])

    def _note(self, name: str, tensor: Tensor) -> None:
        self.found[name] = NAMES[tensor.dtype]

    def _reduce(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        if tensor.numel() > self._reduced:
            self._reduced = tensor.numel()
            self._note("reduced", tensor)
        return self._all_reduce(tensor, *args, **kwargs)


def typed(cell: Cell, ranks: int, folder: Path) -> tuple[Outcome, dict[str, str]]:
    types = Types()
    if ranks > 1:
        allow_fp16()
        return on_ranks(cell, ranks, folder, types), types.found
    plugin: dict[str, Any] = {}
    if cell.precision == "16-mixed":  # Lightning itself takes bf16 on CPUs
        cell, plugin = replace(cell, precision=None), {"plugins": [MixedPrecision("16-mixed", "cpu")]}
    return train(cell, 1, folder, SAMPLES, cell.accumulate, types, **plugin), types.found


FOLLOWING = [
    *HALF,
    Cell("Muon, 16-mixed, ZeRO 2", 2, 2, precision="16-mixed", optimizer=MUON, steps=5, moe=DROPLESS),
]
JOBS: Jobs = {2: [(typed, cell) for cell in [*FOLLOWING, *TYPED]]}


@pytest.fixture(scope="module")
def documented() -> dict[tuple[str, str], dict[str, str]]:
    """Types by run and precision, of the table in docs/numerics.md."""
    text = (Path(__file__).parents[3] / "docs/numerics.md").read_text()
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.count(" | ") == len(COLUMNS) + 1]
    return {
        (run, precision): dict(zip(COLUMNS, types, strict=True))
        for run, precisions, *types in rows
        for precision in precisions.replace("`", "").split(", ")
    }


@pytest.mark.parametrize("cell", FOLLOWING, ids=lambda cell: cell.name)
def test_half_precision_follows_single(cell: Cell, found: Found, tmp_path: Path) -> None:
    expected = alone(replace(cell, precision="32-true"), 2, tmp_path)
    for outcome, _ in found[typed, cell.name]:
        assert outcome.losses == pytest.approx(expected.losses, rel=2e-2)
        assert outcome.clip_norms == pytest.approx(expected.norms, rel=5e-2)
        assert outcome.clip_norms[0] == pytest.approx(expected.norms[0], rel=3e-3)  # experts are in it
        # The first steps are as close as bf16 is: no step is lost or taken twice.
        assert outcome.losses[:4] == pytest.approx(expected.losses[:4], rel=1e-3)


@pytest.mark.parametrize("cell", [*FOLLOWING, *TYPED], ids=lambda cell: cell.name)
def test_types_on_ranks_are_the_documented_ones(
    cell: Cell, found: Found, documented: dict[tuple[str, str], dict[str, str]]
) -> None:
    run = "offloaded" if cell.options else f"ZeRO {cell.stage}"
    types: dict[str, str] = {}
    for _, of_rank in found[typed, cell.name]:
        types |= of_rank
    assert types == documented[run, cell.precision]  # type: ignore[index]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed", "bf16-true"])
def test_types_on_one_process_are_the_documented_ones(
    precision: str, documented: dict[tuple[str, str], dict[str, str]], tmp_path: Path
) -> None:
    _, types = typed(Cell(precision, precision=precision, **ONE_STEP), 1, tmp_path)
    expected = documented["one process, `ddp`", precision]
    assert types | {"reduced": types["sums"]} == expected
