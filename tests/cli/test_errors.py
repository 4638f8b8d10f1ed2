"""Every mistake ends as one line that says what to change, and with the exit code of its kind."""

import errno
import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from nlgmoe import load_config, load_model
from nlgmoe.cli.errors import describe
from nlgmoe.cli.train import TrainCLI, format_warning, main
from nlgmoe.cli.yaml_places import read_value
from nlgmoe.commands.main import main as nlgmoe
from nlgmoe.module import MoEGPTModule
from nlgmoe.validation import RunError
from tests.cli.mistakes import DAMAGED, WRONG

ROOT = Path(__file__).parents[2]
BASE = """
model:
  config:
    vocab_size: 4096
    seq_len: 16
    num_layers: 4
    hidden_size: 16
    num_heads: 2
    moe: {num_experts: [2, 4]}
  schedule: {shape: constant}
  train_tokens: 64
data: {micro_batch_size: 2, max_eval_windows: 2, tokenizer: pocket-4k}
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
    """What a mistake is made with: a trained run, the corpus and a folder to write into."""

    trained: Path
    data: Path
    folder: Path

    def args(self, *extra: str, command: str = "fit") -> list[str]:
        run = f"--trainer.default_root_dir={self.folder / 'run'}"
        return [command, "--config", str(self.trained / "base.yaml"), f"--data.data_dir={self.data}", run, *extra]

    @property
    def last(self) -> Path:
        return self.trained / "checkpoints/last.ckpt"

    def yaml(self, text: str) -> str:
        (self.folder / "bad.yaml").write_text(text)
        return f"--config={self.folder / 'bad.yaml'}"

    def filled(self, text: str) -> str:
        for name, path in {"FOLDER": self.folder, "LAST": self.last}.items():
            text = text.replace(name, str(path))
        return text


@pytest.fixture(scope="module")
def trained(pocket_pile: Path, tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("cli")
    (folder / "run").mkdir()
    (folder / "run/base.yaml").write_text(BASE)
    place = Place(folder / "run", pocket_pile, folder)
    main(place.args())
    return place


@pytest.fixture
def place(trained: Place, tmp_path: Path) -> Place:
    return Place(trained.trained, trained.data, tmp_path)


@pytest.fixture
def says(capsys: pytest.CaptureFixture[str], place: Place) -> Callable[[str], tuple[int, str]]:
    """Run a command that fails: (exit code, its one line)."""

    def run(text: str) -> tuple[int, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            command, *words = place.filled(text).split(" ")
            if command == "yaml:":
                main(place.args(place.yaml(text.removeprefix("yaml: "))))
            elif command in ("fit", "validate"):
                main(place.args(*words, command=command))
            else:
                (nlgmoe if command == "nlgmoe" else main)(words)
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
    mistake: str, place: Place, says: Callable[[str], tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    code, line = says(WRONG[mistake][0])
    assert place.filled(WRONG[mistake][1]) in line
    assert code == 2 and not (place.folder / "run/checkpoints").exists()


@pytest.mark.parametrize("mistake", DAMAGED)
def test_damaged_data_are_named_with_an_exit_code_of_their_own(
    mistake: str, place: Place, says: Callable[[str], tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9")  # nobody answers there
    (place.folder / "data").mkdir()
    (place.folder / "data/manifest.json").write_text((place.data / "manifest.json").read_text()[:-100])
    code, line = says(DAMAGED[mistake][0])
    assert DAMAGED[mistake][1] in line and code == 1


@pytest.mark.parametrize(
    "form",
    [
        "--trainer.logger=CSVLogger --trainer.logger.save_dir=0640 --trainer.max_time=12:30:10:05",
        '--config={"model":{"config":{"moe":{"num_experts":4}}}}',
        "yaml: model:\n  <<: {seed: 4}\ntrainer:\n callbacks:\n"
        " - init_args: {prompts: [a]}\n   class_path: nlgmoe.callbacks.SampleText",
        '--trainer.logger={"class_path":"TensorBoardLogger","init_args":{"save_dir":"x"},"dict_kwargs":{"max_queue":3}}',
        "--trainer.callbacks+=Timer --trainer.callbacks.duration=01:00:10:00",
    ],
)
def test_settings_are_accepted_in_every_way_to_write_them(form: str, place: Place) -> None:
    words = [place.yaml(form.removeprefix("yaml: "))] if form.startswith("yaml: ") else form.split(" ")
    with pytest.raises(SystemExit) as end:
        main(place.args(*words, "--print_config"))
    assert end.value.code == 0


def test_numbers_may_have_an_exponent_without_a_point() -> None:
    assert [read_value(text) for text in ("1e-3", "-2E5", "'1e-3'", "e3")] == [0.001, -2e5, "1e-3", "e3"]


def test_a_real_command_prints_one_line_and_nothing_else(place: Place) -> None:
    """Its imports print nothing, DeepSpeed's included, which the strategy's arguments need."""
    wrong = place.args("--trainer.strategy=nlgmoe.ExpertParallelStrategy", "--model.config.moe.top_k=9")
    done = subprocess.run([sys.executable, "train.py", *wrong], cwd=ROOT, capture_output=True, text=True)
    assert "model.config.moe.top_k=9 must be between 1 and" in only_line(done.stderr)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)


def test_traceback_of_an_error_is_printed_on_request(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NLGMOE_TRACEBACK", "1")
    with pytest.raises(SystemExit):
        main(place.args("--model.config.moe.top_k=9"))
    *traceback, line = capsys.readouterr().err.splitlines()
    assert traceback[0].startswith("Traceback") and line.startswith("error: model.config.moe.top_k=9")


def test_a_run_that_diverges_ends_with_its_last_checkpoint_whole(
    place: Place, says: Callable[[str], tuple[int, str]]
) -> None:
    code, line = says("fit --model.optimizer.lr=1e30 --model.train_tokens=3200")
    loss = r"the loss is (nan|inf); first not finite: the loss on rank 0"
    assert code == 1 and re.fullmatch(rf"error: step 1: {loss}; nothing was updated\. .*", line)
    load_model(place.folder / "run/checkpoints/last.ckpt")


def validation_loss(place: Place, capsys: pytest.CaptureFixture[str], *settings: str) -> str:
    capsys.readouterr()
    main(place.args(*settings, command="validate"))
    return next(line for line in capsys.readouterr().out.splitlines() if "val/loss " in line)


def test_new_run_starts_from_the_weights_of_another(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    start, whole = f"--model.warm_start.checkpoint={place.last}", f"--ckpt_path={place.last}"
    gone = "--model.warm_start.checkpoint=nowhere.ckpt"  # a resumed run and an evaluation need it no more
    losses = {validation_loss(place, capsys, *settings) for settings in ([start], [whole], [whole, gone])}
    assert len(losses) == 1
    main(place.args(start, "--ckpt_path=auto"))
    document = json.loads((place.folder / "run/checkpoints/last.ckpt/checkpoint.json").read_text())
    assert (document["global_step"], document["tokens_seen"]) == (2, 64)
    assert document["started_from"] == str(place.last.resolve())
    main(place.args("--ckpt_path=last", gone, "--model.train_tokens=128"))


def test_a_bug_ends_with_its_traceback(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def bug(self: TrainCLI) -> None:
        raise KeyError("moe")

    monkeypatch.setattr(TrainCLI, "before_validate", bug)
    with pytest.raises(KeyError, match="moe"):
        main(place.args(command="validate"))


class Broken(Dataset):
    def __getitem__(self, index: int) -> None:
        raise RunError("sample 0 is damaged;\n  make the corpus anew")


def test_errors_of_pytorch_are_one_line() -> None:
    (line,) = describe(torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")) or [""]
    assert line.startswith("CUDA out of memory. Tried to allocate 2 GiB; use a smaller batch")
    with pytest.raises(RunError) as caught:
        next(iter(DataLoader(Broken(), sampler=[0], num_workers=1)))
    assert describe(caught.value) == ["sample 0 is damaged; make the corpus anew"]


def test_errors_of_the_system_are_one_line_if_they_say_what_to_change() -> None:
    assert describe(OSError(errno.EACCES, "Permission denied", "a file")) == ["a file: Permission denied"]
    assert describe(OSError(errno.ENOSPC, "No space left on device")) == ["No space left on device"]
    assert describe(BrokenPipeError(errno.EPIPE, "Broken pipe")) is None  # of a service, such as a logger's
    assert describe(ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")) is None


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


def test_a_reader_that_ends_early_is_no_error() -> None:
    command = [sys.executable, "-m", "nlgmoe", "configs", "list"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stderr
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 128 + signal.SIGPIPE


def test_load_config_raises_the_line_of_train_py(place: Place) -> None:
    with pytest.raises(ValueError, match=r"^model.train_tokens=-2 must be at least 1[^\n]*$") as error:
        load_config(place.trained / "base.yaml", model__train_tokens=-2)
    assert error.value.__cause__ is None and error.value.__suppress_context__  # a notebook shows what is chained


def test_a_warning_is_one_line_without_code() -> None:
    assert format_warning("words", UserWarning, str(ROOT / "nlgmoe/module.py"), 3, "code()") == "warning: words\n"
    assert format_warning("words", UserWarning, "/lib/x.py", 3, "code()") == "/lib/x.py:3: UserWarning: words\n"
