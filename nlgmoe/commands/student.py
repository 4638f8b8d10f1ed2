"""`nlgmoe student`: write a student's YAML, to be used with its teacher's (docs/distillation.md)."""

from __future__ import annotations

import textwrap
from pathlib import Path
from shlex import quote
from typing import Any

import yaml

from nlgmoe.checkpoint.reading import read_document, run_config
from nlgmoe.cli.arguments import check_device, check_output, write_whole
from nlgmoe.cli.command_parser import number_or_list
from nlgmoe.config import GPTConfig
from nlgmoe.pyramid import config_of_blocks, evenly_spaced_layers, moe_blocks, student_config, student_layers
from nlgmoe.validation import SettingError


def student(
    source: str,
    *,
    num_layers: int,
    blocks: str | None = None,
    output: str | None = None,
    teacher: str | None = None,
    fraction: float | None = None,
    step: int | None = None,
    text: str | None = None,
    windows: int = 10,
    tokenizer: str | None = None,
    device: str = "cpu",
) -> None:
    """Write a student's YAML with its changes to the teacher's: fewer blocks, their weights, and distillation.

    Train with both files: `train.py fit --config TEACHER.yaml --config STUDENT.yaml`. `StagedDistillation` ends distillation
    before the run ends. All other settings are the teacher's.

    Args:
        source: a checkpoint, a run's folder, or a YAML. The student of a YAML starts from random weights, with the top of the
            pyramid, as in the paper, unless `blocks` is given.
        num_layers: blocks of the student; in the paper 21, with teachers of 24.
        blocks: the teacher's blocks that the student starts from. influence: all but those that change the residual stream
            least (ShortGPT, arXiv 2403.03853), measured on text; even: evenly spaced; upper: all but the lowest, the top of a
            pyramid; or a list, counted from 0, such as [0,1,3]. Default for a checkpoint or run: upper if layers have
            different numbers of experts, else influence.
        output: file to write; default: standard output.
        teacher: checkpoint or run folder of the teacher; default: that of `source`.
        fraction: share of model.train_tokens after which distillation ends; 0.7 if neither it nor `step` is given.
        step: optimizer step after which distillation ends, instead of `fraction`.
        text: file of plain text on which influence is measured; default: the run's validation text.
        windows: sequences measured, of at most 2,048 tokens, of each domain of the run's validation text, or of `text`.
        tokenizer: as data.tokenizer, for a checkpoint without a tokenizer.
        device: device on which influence is measured, such as cuda.
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
    # a run may have been moved
    folder = str(file.parent) if file.name == "config.yaml" else trainer["default_root_dir"]
    teacher = teacher or run or folder

    if blocks is None and run is not None:
        blocks = "influence" if len(set(moe_blocks(theirs).values())) <= 1 else "upper"
    layers: list[int] | None = None
    ranking: list[str] = []
    if blocks == "influence":
        student_layers(theirs, num_layers)  # refuses a wrong number before text is read
        influence = _measure(teacher, theirs, file, text, windows, tokenizer, device)
        layers, ranking = _keep_influential(influence, num_layers)
    elif blocks is not None:
        layers = _chosen(blocks, theirs, num_layers)
    ours = student_config(theirs, num_layers) if layers is None else config_of_blocks(theirs, layers)
    command = f"python train.py fit --config {quote(str(file))} --config {quote(output or 'THIS_FILE')}"
    if model["train_tokens"] is None:
        command += " --model.train_tokens N --model.optimizer.lr RATE"
    experts = ""
    if ours.moe is not None:
        counts = [len(moe_blocks(config)) for config in (ours, theirs)]
        experts = f", {counts[0]} of its {counts[1]} MoE layers"
    summary = f"a student of {file}, {num_layers} of its {theirs.num_layers} blocks{experts}; by `nlgmoe student`"
    _write(_overlay(settings, ours, layers, end, teacher, folder), output, [summary, *ranking], command)


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


def _measure(
    teacher: str, theirs: GPTConfig, file: Path, text: str | None, windows: int, tokenizer: str | None, device: str
) -> list[float]:
    """Return the influence of each of the teacher's blocks."""
    from nlgmoe.commands.measured_text import read_batches, with_progress  # these need torch
    from nlgmoe.eval.block_influence import measure_influence
    from nlgmoe.eval.loaded_model import load_pretrained

    check_device(device)
    loaded = load_pretrained(teacher, tokenizer, device)
    if (num_blocks := loaded.model.config.num_layers) != theirs.num_layers:
        raise SettingError(
            f"teacher={teacher} has {num_blocks} blocks, {file} describes {theirs.num_layers}; give its YAML"
        )
    batches = read_batches(file, loaded, text, windows, tokenizer)
    return measure_influence(loaded.model, with_progress(batches, "measuring influence"))


def _keep_influential(influence: list[float], num_layers: int) -> tuple[list[int], list[str]]:
    """Return the blocks with the largest influence, in their order, and the ranking in words."""
    ranked = sorted(range(len(influence)), key=influence.__getitem__)
    parts = {"left out": ranked[:-num_layers], "kept": ranked[-num_layers:]}
    words = [
        f"blocks {name}, with their influence: {', '.join(f'{block} ({influence[block]:.4f})' for block in part)}"
        for name, part in parts.items()
    ]
    return sorted(parts["kept"]), words


def _chosen(blocks: str, theirs: GPTConfig, num_layers: int) -> list[int]:
    """Return the blocks of `upper`, `even` or a list."""
    if blocks in (named := {"upper": student_layers, "even": evenly_spaced_layers}):
        return named[blocks](theirs, num_layers)
    try:
        layers = number_or_list(blocks)
    except ValueError:
        layers = 0
    if not isinstance(layers, list):
        raise SettingError(
            f"blocks={blocks} is not influence, even, upper or a list such as [0,1,3]; give one of these"
        )
    if layers != sorted(set(layers)) or not set(layers) <= set(range(theirs.num_layers)):
        raise SettingError(
            f"blocks={blocks} must be blocks of the teacher, from 0 to {theirs.num_layers - 1}, in their order"
        )
    if len(layers) != num_layers or num_layers >= theirs.num_layers:
        raise SettingError(
            f"blocks={blocks} are {len(layers)} of the teacher's {theirs.num_layers}; num_layers={num_layers} must be their "
            "number, and below the teacher's"
        )
    return layers


def _overlay(
    settings: dict[str, Any], ours: GPTConfig, layers: list[int] | None, end: dict[str, Any], teacher: str, folder: str
) -> dict[str, Any]:
    """Return the student's changes to the teacher's settings."""
    trainer = settings["trainer"]
    overlay: dict[str, Any] = {
        "model": {
            "config": {"num_layers": ours.num_layers},
            "distiller": {"class_path": "nlgmoe.MixtureOfStudents", "init_args": {"teacher": teacher}},
        },
        "trainer": {
            **_callbacks(trainer["callbacks"], {"class_path": "nlgmoe.StagedDistillation", "init_args": end}),
            "default_root_dir": f"{folder.rstrip('/')}_student_{ours.num_layers}",
        },
    }
    if ours.moe is not None:
        changed = {name: getattr(ours.moe, name) for name in ("num_experts", "expert_interval")}
        overlay["model"]["config"]["moe"] = changed
    if layers is not None:
        overlay["model"]["warm_start"] = {"checkpoint": teacher, "layers": layers}
    elif settings["model"]["warm_start"] is not None:
        overlay["model"]["warm_start"] = None
    if not isinstance(trainer["logger"], bool | None):
        overlay["trainer"]["logger"] = None  # the teacher's logger may write into the teacher's run
    return overlay


def _callbacks(teachers: Any, staged: dict[str, Any]) -> dict[str, Any]:
    """Return the setting that adds `staged` to the teacher's callbacks, and replaces their `StagedDistillation`, if any."""
    callbacks = [] if teachers is None else teachers if isinstance(teachers, list) else [teachers]
    others = [callback for callback in callbacks if callback["class_path"].rpartition(".")[2] != "StagedDistillation"]
    return {"callbacks+": [staged]} if len(others) == len(callbacks) else {"callbacks": [staged, *others]}


def _write(overlay: dict[str, Any], output: str | None, head: list[str], command: str) -> None:
    """Write the file with `head` and `command` as its comment, and print these; without `output` print the file."""
    comment = "\n".join(textwrap.fill(line, 120, initial_indent="# ", subsequent_indent="#   ") for line in head)
    text = f"{comment}\n#   {command}\n" + yaml.safe_dump(overlay, sort_keys=False, width=120)
    if output is None:
        print(text, end="")
    else:
        write_whole(output, text)
        print("\n".join([f"{output}: {head[0]}", *head[1:], f"train it: {command}"]))
