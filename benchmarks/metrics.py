"""What looking costs: steps of training with the callbacks that `train.py` adds to look at them, beside steps without.

    python -m benchmarks.metrics [--rounds 40]

Two trainers train the laptop's PR-MoE in one process, a logging interval each in turn, on random tokens: one with `ExpertLoad`
and `Throughput`, one without; both log into a run folder of their own. What is compared is the seconds of whole intervals,
everything included.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader, IterableDataset

from benchmarks.timing import ROOT, command_line, settings
from nlgmoe import MoEGPTModule, load_config
from nlgmoe.callbacks import ExpertLoad, RunSummary, Throughput
from nlgmoe.monitoring.loggers import run_folder_loggers

INTERVAL, SEQUENCES = 20, 16


class Tokens(IterableDataset[dict[str, Any]]):
    """The same batch again and again."""

    def __init__(self, vocab_size: int, seq_len: int) -> None:
        tokens = torch.randint(vocab_size, (SEQUENCES, seq_len + 1), generator=torch.Generator().manual_seed(0))
        mask = torch.ones(SEQUENCES, seq_len, dtype=torch.bool)
        domain = torch.zeros(SEQUENCES, dtype=torch.int64)
        self.batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "token_mask": mask, "domain": domain}
        self.batch["padded"] = False  # type: ignore[assignment]

    def __iter__(self) -> Any:
        while True:
            yield self.batch


class TakesTurns(Callback):
    """Trains an interval at a time, while the others wait; keeps the seconds of each."""

    def __init__(self, turns: list[threading.Semaphore], index: int) -> None:
        self.turns, self.index = turns, index
        self.seconds: list[float] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Between the intervals."""
        if batch_idx % INTERVAL:
            return
        if batch_idx:
            self.seconds.append(time.perf_counter() - self.started)
            self.turns[(self.index + 1) % len(self.turns)].release()
        self.turns[self.index].acquire()
        self.started = time.perf_counter()


def main() -> None:
    """Measure, print, write."""
    arguments = command_line(__doc__ or "", "metrics", 40, [])
    looks = {"without": [], "with": [Throughput(), ExpertLoad()]}
    turns = [threading.Semaphore(int(index == 0)) for index in range(len(looks))]
    waits = [TakesTurns(turns, index) for index in range(len(looks))]
    config = load_config(ROOT / "configs/pr_moe/laptop.yaml").module.config
    with tempfile.TemporaryDirectory() as folder:
        threads = [
            threading.Thread(target=train, args=(Path(folder, name), config, arguments.rounds, [wait, *callbacks]))
            for (name, callbacks), wait in zip(looks.items(), waits, strict=True)
        ]
        for thread in threads:
            thread.start()
        for thread, turn in zip(threads, [*turns[1:], turns[0]], strict=True):
            thread.join()
            turn.release()
    plain, looking = (wait.seconds[2:] for wait in waits)
    ratios = [one / other for one, other in zip(looking, plain, strict=True)]
    result = {
        **settings(rounds=len(ratios), steps_per_interval=INTERVAL, tokens_per_step=SEQUENCES * config.seq_len),
        "seconds_per_step": {
            "without": statistics.median(plain) / INTERVAL,
            "with": statistics.median(looking) / INTERVAL,
        },
        "ratio_of_medians": statistics.median(looking) / statistics.median(plain),
        "median_of_ratios": statistics.median(ratios),
    }
    print(json.dumps({name: result[name] for name in ("seconds_per_step", "ratio_of_medians", "median_of_ratios")}))
    Path(arguments.output).write_text(json.dumps(result, indent=1) + "\n")


def train(folder: Path, config: Any, rounds: int, callbacks: list[Callback]) -> None:
    """Train for two intervals of warm-up, `rounds` more and a step."""
    trainer = Trainer(
        default_root_dir=folder,
        max_epochs=-1,
        max_steps=(rounds + 2) * INTERVAL + 1,
        accelerator="cpu",
        callbacks=[*callbacks, RunSummary()],
        gradient_clip_val=1.0,
        logger=run_folder_loggers(folder),
        log_every_n_steps=INTERVAL,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(MoEGPTModule(config), DataLoader(Tokens(config.vocab_size, config.seq_len), batch_size=None))


if __name__ == "__main__":
    main()
