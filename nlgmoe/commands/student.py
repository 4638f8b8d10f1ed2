"""`nlgmoe student`: derive the configuration of a student from that of its teacher (docs/distillation.md)."""

from __future__ import annotations

from pathlib import Path
from shlex import quote
from typing import Any

import yaml
from typing_extensions import override

from nlgmoe.checkpoint.folder import read_document, run_config
from nlgmoe.cli.output_files import check_output, write_whole
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
    """Write a student's YAML for `train.py fit --config`: the teacher's, with fewer blocks and the top of the pyramid.

    `StagedDistillation` ends distillation before the run ends. All other settings are the teacher's.

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
    if fraction is not None and step is not None:
        raise SettingError(f"step={step} and fraction={fraction} are two ends of distillation; give one of them")
    fraction = 0.7 if fraction is None else fraction
    if not 0 < fraction <= 1:
        raise SettingError(f"fraction={fraction} must be above 0 and at most 1, the whole run")
    if step is not None and step < 1:
        raise SettingError(f"step={step} must be at least 1; a run without a teacher is model.distiller=null")
    file, run = _configuration(Path(source))
    settings, text = _settings(file, complete=run is not None)
    model, trainer = text["model"], text.setdefault("trainer", {})
    teacher_config = GPTConfig.from_dict(settings["model"]["config"])
    if run is not None and (Path(run) / "checkpoint.json").exists():
        _check_same(teacher_config, Path(run), file)
    config = student_config(teacher_config, num_layers)
    if step is None and settings["model"]["train_tokens"] is None:
        raise SettingError(
            f"fraction={fraction} is of model.train_tokens, which {file} leaves out; give step in its place"
        )

    folder = settings["trainer"]["default_root_dir"]
    if run is not None and file.name == "config.yaml" and file.parent.resolve() != Path(folder).resolve():
        folder = str(file.parent)  # the run was moved
    teacher = teacher or run or folder
    model["config"]["num_layers"] = config.num_layers
    if config.moe is not None:
        model["config"]["moe"]["num_experts"] = config.moe.num_experts
    model.pop("warm_start", None)
    if from_teacher:
        model["warm_start"] = {"checkpoint": teacher, "layers": student_layers(teacher_config, num_layers)}
    model["distiller"] = {"class_path": "nlgmoe.MixtureOfStudents", "init_args": {"teacher": teacher}}
    end = {"fraction": fraction} if step is None else {"step": step}
    staged = {"class_path": "nlgmoe.StagedDistillation", "init_args": end}
    trainer["callbacks"] = [staged, *_callbacks(trainer.get("callbacks"))]
    trainer["default_root_dir"] = f"{folder.rstrip('/')}_student_{num_layers}"
    note = ""
    if not isinstance(trainer.get("logger", True), bool | None):
        del trainer["logger"]
        note = "trainer.logger is left out: it may write where the teacher's run wrote; give the student one of its own"

    written = _header(source, teacher_config, config, note) + yaml.dump(
        text, Dumper=_Dumper, sort_keys=False, width=120
    )
    if output is None:
        print(written, end="")
    else:
        write_whole(output, written)
        print(
            f"{output}: {num_layers} of the teacher's {teacher_config.num_layers} blocks; "
            f"python train.py fit --config {quote(output)}"
        )
        if note:
            print(note)


def _configuration(source: Path) -> tuple[Path, str | None]:
    """Return the YAML of `source`, and the checkpoint or run folder if it is one."""
    if source.is_file():
        return source, None
    if not source.is_dir():
        raise SettingError(f"source={source} is not there; give the teacher's YAML, its run's folder or a checkpoint")
    if (file := run_config(source)) is not None:
        return file, str(source)
    raise SettingError(
        f"source={source} is in no run's folder: there is no config.yaml above it that says how it was trained; give the YAML "
        f"in its place, and teacher={source}"
    )


def _settings(file: Path, complete: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return all settings of a configuration, and those to write.

    Args:
        file: YAML file.
        complete: a run wrote the file, with every setting; those with default values are then left out.
    """
    # Imported here: train.py's parser takes seconds to import.
    from nlgmoe.cli.places import ConfigLoader
    from nlgmoe.experiment import parse_with_defaults

    settings, defaults, changed = parse_with_defaults(file)
    text = yaml.load(file.read_text(encoding="utf-8"), ConfigLoader)
    if not _is_nested(text):
        text = yaml.load(changed, ConfigLoader)
    text.pop("ckpt_path", None)  # of the teacher's run
    return settings, _without(text, defaults) if complete else text


def _is_nested(text: dict[str, Any]) -> bool:
    """Return whether a configuration has no dotted names, no `NAME+`, and no settings in files of their own."""
    names, values = list(text), list(text.values())
    for value in values:
        if isinstance(value, dict):
            names += value
            values += value.values()
        elif isinstance(value, list):
            values += value
    model = text.get("model")
    config = model.get("config") if isinstance(model, dict) else None
    return (
        not any("." in str(name) or str(name).endswith("+") for name in names)
        and all(isinstance(section, dict) for section in (config, text.get("trainer", {}), text.get("data", {})))
        and not any(isinstance(value, str) and value.endswith((".yaml", ".yml")) for value in values)
    )


def _without(values: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """Return `values` without those that equal their defaults."""
    kept: dict[str, Any] = {}
    for name, value in values.items():
        default = defaults.get(name)
        if isinstance(value, dict) and isinstance(default, dict) and "class_path" not in value:
            if inner := _without(value, default):
                kept[name] = inner
        elif name not in defaults or value != default:
            kept[name] = value
    return kept


def _check_same(teacher_config: GPTConfig, checkpoint: Path, file: Path) -> None:
    if GPTConfig.from_dict(read_document(checkpoint)["model_config"]) != teacher_config:
        raise SettingError(
            f"source={checkpoint} holds another model than {file} describes; give the YAML that it was trained with, and "
            f"teacher={checkpoint}"
        )


def _callbacks(given: Any) -> list[Any]:
    """Return the teacher's callbacks, without `StagedDistillation` and without its `dirpath`."""
    kept = []
    for callback in given if isinstance(given, list) else [given] * (given is not None):
        path = callback if isinstance(callback, str) else callback["class_path"]
        if path.rpartition(".")[2] != "StagedDistillation":
            if isinstance(callback, dict):
                callback.get("init_args", {}).pop("dirpath", None)
            kept.append(callback)
    return kept


def _header(source: str, teacher_config: GPTConfig, config: GPTConfig, note: str) -> str:
    experts = ""
    if config.moe is not None:
        counts, kept = (list(moe_blocks(model).values()) for model in (teacher_config, config))
        experts = f", {len(kept)} of its {len(counts)} MoE layers"
    return (
        f"# A student of {source}: {config.num_layers} of its {teacher_config.num_layers} blocks{experts}; by `nlgmoe student`.\n"
        "#   python train.py fit --config THIS_FILE\n" + (f"# {note}\n" if note else "")
    )


class _Dumper(yaml.SafeDumper):
    """Indent the items of a list; write a list of numbers on one line."""

    @override
    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)

    @override
    def represent_sequence(self, tag: str, sequence: Any, flow_style: bool | None = None) -> yaml.SequenceNode:
        plain = not any(isinstance(item, list | dict) for item in sequence)
        return super().represent_sequence(tag, sequence, flow_style=plain)
