"""`nlgmoe student`: write a student's YAML, to be used with its teacher's (docs/distillation.md)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from nlgmoe.checkpoint.reading import run_config
from nlgmoe.cli.arguments import check_device, check_output, number_or_list, write_whole
from nlgmoe.config import GPTConfig
from nlgmoe.pyramid import check_blocks, config_of_blocks, evenly_spaced_layers, moe_blocks, student_layers
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
    is_yaml, file = Path(source).is_file(), _yaml_of(Path(source))
    from nlgmoe.experiment import parse_config  # takes seconds to import

    end, settings = _end_of(fraction, step), parse_config(file)
    theirs = GPTConfig.from_dict(settings["model"]["config"])
    folder = str(file.parent) if file.name == "config.yaml" else settings["trainer"]["default_root_dir"]  # may be moved
    teacher = teacher or (folder if is_yaml else source)
    from_random, equal = is_yaml and blocks is None, len(set(moe_blocks(theirs).values())) <= 1
    blocks = blocks or ("influence" if equal and not is_yaml else "upper")
    comment = [f"a student of {file}, {num_layers} of its {theirs.num_layers} blocks"]
    if blocks == "influence":
        student_layers(theirs, num_layers)  # refuses a wrong number before text is read
        layers, lines = _most_influential(_measure(teacher, file, text, windows, tokenizer, device), num_layers)
        comment += lines
        check_blocks(theirs, layers, num_layers)  # another teacher may have more
    else:
        layers = _named_blocks(theirs, blocks, num_layers)
    changes = _overlay(settings, config_of_blocks(theirs, layers), end, teacher, folder)
    changes["model"]["warm_start"] = None if from_random else {"checkpoint": teacher, "strict": True, "layers": layers}
    _write(comment, changes, output)


def _yaml_of(source: Path) -> Path:
    """Return the teacher's YAML: `source`, or that of its run."""
    file = source if source.is_file() else run_config(source)
    if file is None or not source.exists():
        problem = f"source={source} is in no run's folder: there is no config.yaml above it"
        raise SettingError(f"{problem}; give the teacher's YAML, and its checkpoint as --teacher")
    return file


def _end_of(fraction: float | None, step: int | None) -> dict[str, Any]:
    """Return the arguments of `StagedDistillation`, which refuses wrong values."""
    from nlgmoe.callbacks import StagedDistillation

    given = {"fraction": fraction, "step": step}
    end: dict[str, Any] = {name: value for name, value in given.items() if value is not None} or {"fraction": 0.7}
    StagedDistillation(**end)
    return end


def _most_influential(influence: Sequence[float], num_layers: int) -> tuple[list[int], list[str]]:
    """Return the blocks with the largest influence, in order, and lines about all."""
    ranked = sorted(range(len(influence)), key=influence.__getitem__)
    lines = []
    for name, part in (("left out", ranked[:-num_layers]), ("kept", ranked[-num_layers:])):
        numbers = ", ".join(f"{block} ({influence[block]:.4f})" for block in part)
        lines.append(f"blocks {name}, with their influence: {numbers}")
    return sorted(ranked[-num_layers:]), lines


def _named_blocks(teacher: GPTConfig, blocks: str, num_layers: int) -> Any:
    """Return the blocks that `upper`, `even` or a list names."""
    if blocks in (named := {"upper": student_layers, "even": evenly_spaced_layers}):
        return named[blocks](teacher, num_layers)
    layers: Any = blocks
    with suppress(ValueError):
        layers = number_or_list(blocks)
    check_blocks(teacher, layers, num_layers)
    return layers


def _write(comment: list[str], changes: dict[str, Any], output: str | None) -> None:
    written = "".join(f"# {line}\n" for line in comment) + yaml.safe_dump(changes, sort_keys=False, width=120)
    if output is not None:
        write_whole(output, written)
        written = "\n".join([f"{output}: {comment[0]}", *comment[1:], ""])
    print(written, end="")


def _measure(
    teacher: str, file: Path, text: str | None, windows: int, tokenizer: str | None, device: str
) -> list[float]:
    from nlgmoe.eval.importance import measure_influence
    from nlgmoe.eval.loaded_model import load_pretrained
    from nlgmoe.tools.measured_text import measured_text

    check_device(device)
    loaded = load_pretrained(teacher, tokenizer, device)
    batches = measured_text(file, loaded, text, windows, tokenizer).batches
    return measure_influence(loaded.model, tqdm(batches, "measuring influence", mininterval=1))


def _overlay(settings: dict[str, Any], ours: GPTConfig, end: dict[str, Any], teacher: str, folder: str) -> Any:
    """Return the student's changes to the teacher's settings, without those of its first weights."""
    from nlgmoe.surgery.write_weights import without_logger

    staged = {"class_path": "nlgmoe.StagedDistillation", "init_args": end}
    theirs = settings["trainer"]["callbacks"] or []
    theirs = theirs if isinstance(theirs, list) else [theirs]
    others = [callback for callback in theirs if not callback["class_path"].endswith("StagedDistillation")]
    config: dict[str, Any] = {"num_layers": ours.num_layers}
    if ours.moe is not None:
        config["moe"] = {"num_experts": ours.moe.num_experts, "expert_interval": ours.moe.expert_interval}
    trainer: dict[str, Any] = {"callbacks+": [staged]} if others == theirs else {"callbacks": [staged, *others]}
    trainer |= {"default_root_dir": f"{folder.rstrip('/')}_student_{ours.num_layers}", **without_logger(settings)}
    distiller = {"class_path": "nlgmoe.MixtureOfStudents", "init_args": {"teacher": teacher}}
    return {"model": {"config": config, "distiller": distiller}, "trainer": trainer}
