"""Train ten of the gate's models again, and write their weights: files of a release, in fp16, of 0.5 to 2.7 MB each.

    python -m benchmarks.gate.models FOLDER [--jobs 2]      an hour on two cores; stopped, the same command continues

`FOLDER/NAME-seedN.ckpt` is a model of docs/results/gate.md after its last step, with its tokenizer: `strong` is the baseline, the
others are the ideas of docs/examples/gate, trained as their rows beside `strong` were. One line loads it:

    model = nlgmoe.load_model("hash_routing-seed1.ckpt").float()
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.gate.candidate import read_candidate
from benchmarks.gate.sides import STRONG, Side
from benchmarks.reproduce.scale import CPU, TINY, Scale
from benchmarks.runs import ROOT
from benchmarks.training import Launcher, Run, train
from nlgmoe.checkpoint.reading import Checkpoint
from nlgmoe.model.gpt import GPT
from nlgmoe.surgery.write_weights import write_weights

IDEAS, SEEDS = ("strong", "dense", "hash_routing", "hashed_weights", "experts_32_quarter_top4"), (1, 2)


def run_of(idea: str, seed: int, scale: Scale, out: Path) -> Run:
    """Return the run of an idea; its checkpoints are kept."""
    if idea == STRONG.name:
        side = Side(idea, scale, STRONG)
    else:
        side = read_candidate(str(ROOT / f"docs/examples/gate/{idea}.yaml"), None, scale, STRONG)
    name = f"{idea}-seed{seed}"
    return Run(name, out / name, tuple(side.files(scale.steps, seed)), scale.steps, keep=True)


def write(run: Run, folder: Path) -> Path:
    """Write the weights of a run that has ended, if they are not there; buffers keep their type."""
    path = folder / f"{run.name}.ckpt"
    if not path.exists():
        saved = Checkpoint(run.folder / "checkpoints/last.ckpt")
        weights = saved.tensors("model")
        with torch.device("meta"):
            buffers = dict(GPT(saved.config).named_buffers())

        def half(name: str) -> Tensor:
            value = weights.read(name)
            return value if name in buffers else value.half()

        write_weights(path, half, saved.config, saved.tokenizer())
    return path


def main(argv: Sequence[str] | None = None, launch: Launcher | None = None) -> None:
    """Train what is missing, and write all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of the checkpoints")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--scale", choices=("cpu", "tiny"), default="cpu", help="tiny: a test of the command")
    parser.add_argument("--out", type=Path, default=ROOT / "runs/gate_models", help="folder of the runs")
    words = parser.parse_args(argv)
    scale = CPU if words.scale == "cpu" else TINY
    runs = [run_of(idea, seed, scale, words.out) for seed in SEEDS for idea in IDEAS]
    train([[run] for run in runs], words.jobs, launch or Launcher())
    for run in runs:
        print(f"{write(run, words.folder)}: validation loss {run.loss:.4f}")


if __name__ == "__main__":
    main()
