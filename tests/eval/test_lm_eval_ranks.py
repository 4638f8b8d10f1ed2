"""Zero-shot tasks on two ranks with shared experts."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning import Trainer

from nlgmoe import MoEGPTModule, ZeroShotEval
from nlgmoe.config import GPTConfig, MoEConfig
from nlgmoe.optim.optimizer import AdamWConfig
from nlgmoe.tools.lm_eval.harness import EvaluatedGPT
from tests.support.ranks import SAMPLES, Cell, make_trainer, strategy_of
from tests.support.spawn import spawn
from tests.support.tasks import CONFIG, TASKS, TOKENIZER, TokenizedData, text, write_tasks

RANKS = 2
DROPLESS = {"token_dropping": False, "aux_scope": "global"}  # with drops, ranks would train another model
CELL = Cell("shared experts", 2, 1, moe=DROPLESS, steps=2)
MODEL = GPTConfig.from_dict(CONFIG.to_dict() | {"moe": MoEConfig(4, token_dropping=False).__dict__})


class Remembers(ZeroShotEval):
    """Keeps the metrics, and the number of forward passes for texts that end after 1 token on rank 0, 9 on rank 1."""

    def _evaluate(self, trainer: Trainer, module: Any) -> dict[str, float]:
        self.values = super()._evaluate(trainer, module)
        passes: list[None] = []
        handle = module.gpt.register_forward_hook(lambda *args: passes.append(None))
        request = SimpleNamespace(args=(text(1, 3), {"until": [], "max_gen_toks": 9 if trainer.global_rank else 1}))
        EvaluatedGPT(module.gpt, TOKENIZER).generate_until([request], disable_tqdm=True)
        handle.remove()
        self.passes = len(passes)
        return self.values


def zero_shot(ranks: int, folder: Path) -> tuple[list[dict[str, float]], list[int]]:
    """Return metrics of one rank, and the numbers of forward passes for texts of two lengths.

    The metrics are of all documents; of one per task; while training, where the last rank cannot read a task's documents.
    """
    rank = int(os.environ["RANK"]) if ranks > 1 else 0
    own = write_tasks(folder / f"tasks {rank}")
    passes = []

    def run(limit: int | None, train: bool = False) -> dict[str, float]:
        callback = Remembers(list(TASKS), limit, include_path=str(own), batch_size=2)
        trainer = make_trainer(CELL, ranks, folder, callback, **({} if ranks == 1 else {"strategy": strategy_of(CELL)}))
        if train:
            trainer.fit(MoEGPTModule(MODEL, AdamWConfig(lr=3e-3)), TokenizedData(micro_batch_size=SAMPLES // ranks))
        else:
            trainer.validate(MoEGPTModule(MODEL), TokenizedData(), verbose=False)
        passes.append(callback.passes)
        return callback.values

    whole, first = run(None), run(1)
    if rank == ranks - 1:
        (own / "tiny_choice_documents.jsonl").write_text('{"question": "no choices"}\n')
    return [whole, first, run(None, train=True)], passes


def test_zero_shot_on_ranks_finds_what_one_process_finds(tmp_path: Path) -> None:
    alone, _ = zero_shot(1, tmp_path / "alone")
    assert (len(alone[0]), alone[2]["zero_shot/failed_tasks"]) == (4, 1)
    for metrics, passes in spawn(RANKS, zero_shot, RANKS, tmp_path / "ranks", folder=tmp_path / "results"):
        assert passes == [9, 9, 9]
        assert metrics == [pytest.approx(expected, rel=1e-4) for expected in alone]
