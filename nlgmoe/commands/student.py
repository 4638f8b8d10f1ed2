"""`nlgmoe student`: write a student's YAML, to be used with its teacher's (docs/distillation.md)."""

from __future__ import annotations

from pathlib import Path
from shlex import quote
from typing import Any

import yaml

from nlgmoe.checkpoint.folder import read_document, run_config
from nlgmoe.cli.arguments import check_output, write_whole
from nlgmoe.config import GPTConfig
from nlgmoe.pyramid import moe_blocks, student_config, student_layers
from nlgmoe.validation import SettingError


def student(
    source: str,
    *,
    num_layers: int,
    output: str | None = None,
    teacher: str | None = None,
    fraction: float | None = None,
    step: int | None = None,
    from_teacher: bool = False,
) -> None:
    """Write a student's YAML with its changes to the teacher's: fewer blocks, the top of the pyramid, and distillation.

    Train with both files: `train.py fit --config TEACHER.yaml --config STUDENT.yaml`. `StagedDistillation` ends distillation
    before the run ends. All other settings are the teacher's.

    Args:
        source: the teacher's YAML, its run folder, or a checkpoint in it.
        num_layers: blocks of the student; in the paper 21, with teachers of 24.
        output: file to write; default: standard output.
        teacher: checkpoint or run folder of the teacher; default: that of `source`.
        fraction: share of model.train_tokens after which distillation ends; 0.7 if neither it nor `step` is given.
        step: optimizer step after which distillation ends, instead of `fraction`.
        from_teacher: start from the teacher's blocks listed in `model.warm_start.layers`, not from random weights.
    """
    if output is not None:
        check_output(output)
    end = _end(fraction, step)
    file, run = _configuration(Path(source))
    from nlgmoe.experiment import parse_config  # train.py's parser takes seconds to import

    settings = parse_config(file)
    model, trainer = settings["model"], settings["trainer"]
    theirs = GPTConfig.from_dict(model["config"])
    if run is not None and (Path(run) / "checkpoint.json").exists():
        _check_same(theirs, Path(run), file)
    ours = student_config(theirs, num_layers)
    if step is None and model["train_tokens"] is None:
        raise SettingError(
            f"fraction={end['fraction']} is of model.train_tokens, which {file} does not set; give step instead"
        )
    # a run may have been moved
    folder = str(file.parent) if file.name == "config.yaml" else trainer["default_root_dir"]
    teacher = teacher or run or folder
    overlay: dict[str, Any] = {
        "model": {
            "config": {"num_layers": num_layers},
            "distiller": {"class_path": "nlgmoe.MixtureOfStudents", "init_args": {"teacher": teacher}},
        },
        "trainer": {
            **_callbacks(trainer["callbacks"], {"class_path": "nlgmoe.StagedDistillation", "init_args": end}),
            "default_root_dir": f"{folder.rstrip('/')}_student_{num_layers}",
        },
    }
    if ours.moe is not None:
        overlay["model"]["config"]["moe"] = {"num_experts": ours.moe.num_experts}
    if from_teacher:
        overlay["model"]["warm_start"] = {"checkpoint": teacher, "layers": student_layers(theirs, num_layers)}
    elif model["warm_start"] is not None:
        overlay["model"]["warm_start"] = None
    if not isinstance(trainer["logger"], bool | None):
        overlay["trainer"]["logger"] = None  # the teacher's logger may write into the teacher's run
    _write(overlay, output, file, theirs, ours)


def _end(fraction: float | None, step: int | None) -> dict[str, Any]:
    """Return the settings of `StagedDistillation`."""
    if fraction is not None and step is not None:
        raise SettingError(f"step={step} and fraction={fraction} are two ends of distillation; give one of them")
    fraction = 0.7 if fraction is None else fraction
    if not 0 < fraction <= 1:
        raise SettingError(f"fraction={fraction} must be above 0 and at most 1, the whole run")
    if step is not None and step < 1:
        raise SettingError(f"step={step} must be at least 1; a run without a teacher is model.distiller=null")
    return {"fraction": fraction} if step is None else {"step": step}


def _configuration(source: Path) -> tuple[Path, str | None]:
    """Return the YAML of `source`, and the checkpoint or run folder if it is one."""
    if source.is_file():
        return source, None
    if not source.is_dir():
        raise SettingError(f"source={source} is not there; give the teacher's YAML, its run's folder or a checkpoint")
    if (file := run_config(source)) is not None:
        return file, str(source)
    raise SettingError(
        f"source={source} is in no run's folder: there is no config.yaml above it; give the teacher's YAML instead, and "
        f"teacher={source}"
    )


def _check_same(teacher_config: GPTConfig, checkpoint: Path, file: Path) -> None:
    if GPTConfig.from_dict(read_document(checkpoint)["model_config"]) != teacher_config:
        raise SettingError(
            f"source={checkpoint} holds another model than {file} describes; give the YAML that it was trained with, and "
            f"teacher={checkpoint}"
        )


def _callbacks(teachers: Any, staged: dict[str, Any]) -> dict[str, Any]:
    """Return the setting that adds `staged` to the teacher's callbacks, and replaces their `StagedDistillation`, if any."""
    callbacks = [] if teachers is None else teachers if isinstance(teachers, list) else [teachers]
    others = [callback for callback in callbacks if callback["class_path"].rpartition(".")[2] != "StagedDistillation"]
    return {"callbacks+": [staged]} if len(others) == len(callbacks) else {"callbacks": [staged, *others]}


def _write(overlay: dict[str, Any], output: str | None, file: Path, theirs: GPTConfig, ours: GPTConfig) -> None:
    """Write the file, or print it."""
    experts = ""
    if ours.moe is not None:
        counts, kept = (list(moe_blocks(config).values()) for config in (theirs, ours))
        experts = f", {len(kept)} of its {len(counts)} MoE layers"
    command = f"python train.py fit --config {quote(str(file))} --config {quote(output or 'THIS_FILE')}"
    text = (
        f"# A student of {file}: {ours.num_layers} of its {theirs.num_layers} blocks{experts}; by `nlgmoe student`.\n"
        f"#   {command}\n" + yaml.safe_dump(overlay, sort_keys=False, width=120)
    )
    if output is None:
        print(text, end="")
    else:
        write_whole(output, text)
        print(f"{output}: {ours.num_layers} of the teacher's {theirs.num_layers} blocks; {command}")
