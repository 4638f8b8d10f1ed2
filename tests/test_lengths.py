"""Two lengths, the longest sequence that the model reads and those of training and evaluation; sequences that grow."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from nlgmoe import MoEGPTModule, load_pretrained
from nlgmoe.callbacks import Throughput
from nlgmoe.cli.train import main as train
from nlgmoe.commands.main import main
from nlgmoe.config import GPTConfig, MoEConfig
from nlgmoe.data.tokenizer_loading import load_tokenizer
from nlgmoe.distill.mixture_of_students import MixtureOfStudents
from nlgmoe.experiment import load_config, parse_config
from nlgmoe.model.counting import flops_per_token
from nlgmoe.optim.optimizer import AdamWConfig
from nlgmoe.optim.token_schedule import LearningRateSchedule, SequenceCurriculum
from nlgmoe.tools.planner.memory import activations_by_pass
from nlgmoe.tools.planner.topology import layout
from tests.support.checkpoints import write
from tests.support.curriculum import CLOCKS, CURRICULUM, LENGTHS, Fed
from tests.support.synthetic import SyntheticData
from tests.support.trainers import trainer

LONG = GPTConfig(4096, 4096, 2, 16, 2, norm="rmsnorm", rope_theta=1e4, bias=False, ffn_network="swiglu", init_std=0.2)
SHORT = ["--data.seq_len=32", "--data.max_eval_windows=2", "--trainer.enable_progress_bar=false"]


def test_a_rotary_model_trained_on_short_sequences_keeps_its_longest(
    pocket_pile: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Imported, evaluated, trained, resumed, exported: the model's length stays, and it generates beyond the data's."""
    tokenizer = load_tokenizer("pocket-4k", pocket_pile)
    write(tmp_path / "first.ckpt", LONG, tokenizer=tokenizer.files)
    main(["export", str(tmp_path / "first.ckpt"), str(tmp_path / "llama")])
    main(["import", str(tmp_path / "llama"), str(tmp_path / "model.ckpt")])
    written = yaml.safe_load((tmp_path / "model.yaml").read_text())
    assert (written["model"]["config"]["seq_len"], written["data"]["seq_len"]) == (4096, 2048)
    settings = ["--config", str(tmp_path / "model.yaml"), f"--data.data_dir={pocket_pile}", *SHORT]
    settings += ["--data.micro_batch_size=2"]
    train(["validate", *settings, f"--ckpt_path={tmp_path / 'model.ckpt'}"])
    train(["fit", *settings, f"--model.train_tokens={2 * 64}"])
    train(["fit", *settings, f"--model.train_tokens={3 * 64}", "--ckpt_path=last"])
    run = tmp_path / "model"
    assert json.loads((run / "summary.json").read_text())["steps"] == 3
    assert yaml.safe_load((run / "config.yaml").read_text())["data"]["seq_len"] == 32
    main(["export", str(run), str(tmp_path / "out")])
    assert json.loads((tmp_path / "out/config.json").read_text())["max_position_embeddings"] == 4096
    capsys.readouterr()
    main(["generate", str(run), "--prompt", "the king and the queen " * 20, "--max-new-tokens=4"])
    assert len(load_pretrained(run).tokenizer.encode(capsys.readouterr().out)) > 64


def test_seq_len_of_the_data_is_the_models_in_train_py_and_settable_in_load_config() -> None:
    laptop = "configs/moe/laptop.yaml"
    assert parse_config(laptop)["data"]["seq_len"] == 128
    experiment = load_config(laptop, data__seq_len=64)
    assert (experiment.data.seq_len, experiment.module.config.seq_len) == (64, 128)


def test_planner_and_curriculum_follow_the_datas_length(tmp_path: Path) -> None:
    settings = parse_config("configs/moe/laptop.yaml", data__seq_len=32)
    config = GPTConfig.from_dict(settings["model"]["config"])
    short, whole = layout(settings, {}), layout(parse_config("configs/moe/laptop.yaml"), {})
    assert (short.length(config), whole.length(config)) == (32, 128)
    assert max(activations_by_pass(config, short)) < max(activations_by_pass(config, whole))
    assert flops_per_token(config, 32) < flops_per_token(config)
    fed, one = Fed(), MoEGPTModule(GPTConfig(61, 64, 2, 16, 2), curriculum=CURRICULUM)
    trainer(tmp_path, fed, max_steps=6, accumulate_grad_batches=2).fit(one, SyntheticData(micro_batch_size=2))
    assert one.seq_len == 16 and fed.lengths[True] == [length for length in LENGTHS for _ in range(2)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "data.seq_len=16 is above model.config.seq_len=8, the longest sequence that the model reads; lower it"),
        (
            {"config": GPTConfig(61, 64, 2, 16, 2), "curriculum": SequenceCurriculum(96, 32, 4)},
            "model.curriculum.start=32 is above data.seq_len=16; lower it",
        ),
    ],
)
def test_seq_len_that_does_not_fit_is_refused(settings: dict, message: str, tmp_path: Path) -> None:
    one = MoEGPTModule(**{"config": GPTConfig(61, 8, 2, 16, 2), **settings})
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, max_steps=1).fit(one, SyntheticData())


def test_a_teacher_reads_what_the_student_is_trained_on(tmp_path: Path) -> None:
    """Not what the student could read: a teacher of 16 tokens teaches a student of 64 on sequences of 16."""
    teacher = write(tmp_path / "teacher.ckpt", GPTConfig(61, 16, 2, 16, 2))
    for length, allowed in ((16, True), (32, False)):
        student = MoEGPTModule(GPTConfig(61, 64, 2, 16, 2), distiller=MixtureOfStudents(str(teacher)))
        run = trainer(tmp_path, max_steps=1)
        if allowed:
            run.fit(student, SyntheticData(seq_len=length))
            assert run.global_step == 1
        else:
            with pytest.raises(ValueError, match="reads seq_len=16 tokens, and a sequence has 32"):
                run.fit(student, SyntheticData(seq_len=length))


def small(**settings: Any) -> MoEGPTModule:
    config = GPTConfig(61, 16, 2, 32, 2, hidden_dropout=0.1, moe=MoEConfig(4, noise="jitter"))
    schedule = LearningRateSchedule("constant", warmup_tokens=128)
    return MoEGPTModule(config, AdamWConfig(lr=1.0e-2), schedule, **{"curriculum": CURRICULUM, **settings})


def test_curriculum_grows_with_the_clock_which_counts_tokens_that_are_fed(tmp_path: Path) -> None:
    fed, speed, one, data = Fed(), Throughput(), small(), SyntheticData(micro_batch_size=2)
    validation = {"limit_val_batches": 1.0, "val_check_interval": 4, "check_val_every_n_epoch": None}
    run = trainer(tmp_path, fed, speed, max_steps=6, accumulate_grad_batches=2, **validation)
    run.fit(one, data)
    assert fed.lengths[True] == [length for length in LENGTHS for _ in range(2)]  # one length in a window
    assert set(fed.lengths[False]) == {16}
    assert [*fed.clocks, one.tokens_seen] == CLOCKS
    logged = run.callback_metrics  # of the one interval that ends with the run
    tokens = 1e-12 * logged["train/flops"] * logged["train/tokens_per_second"] / logged["train/tflops_per_second"]
    assert float(tokens) == pytest.approx(CLOCKS[-1])
    assert fed.rates == pytest.approx([1e-2 * min(1, clock / 128) for clock in CLOCKS[:6]])
    assert data.samples_consumed == 6 * 4  # what is cut off is not kept for later
    assert run.callback_metrics["train/seq_len"] == 16


def test_curriculum_cuts_a_batch_into_one_of_short_sequences(tmp_path: Path) -> None:
    """Padding and loss masks are cut with it: the same steps as on data that is that short."""

    class Short(SyntheticData):
        def train_dataloader(self) -> Any:
            for batch in super().train_dataloader():
                yield {name: value[:, :4] if getattr(value, "ndim", 0) == 2 else value for name, value in batch.items()}

    weights = []
    for data, curriculum in (
        (SyntheticData(padded=True, documents=True), SequenceCurriculum(10**6, 4, 4)),
        (Short(padded=True, documents=True), None),
    ):
        one = small(curriculum=curriculum)
        trainer(tmp_path, max_steps=3).fit(one, data)
        weights.append(torch.cat([parameter.detach().flatten() for parameter in one.parameters()]))
    assert torch.equal(*weights)
