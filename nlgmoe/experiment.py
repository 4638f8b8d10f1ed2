"""Build objects from a configuration, for notebooks. torch and Lightning are imported once the process is prepared."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nlgmoe.process import prepare_process
from nlgmoe.validation import SettingError

if TYPE_CHECKING:
    from lightning import Trainer

    from nlgmoe.cli.train import TrainCLI
    from nlgmoe.data import PileDataModule
    from nlgmoe.module import MoEGPTModule

# for commands that use the model or the data of a run of many ranks in one process
ONE_PROCESS: dict[str, Any] = {"trainer__devices": 1, "trainer__num_nodes": 1, "trainer__strategy": "auto"}


@dataclass(frozen=True)
class Experiment:
    """Module, data and trainer of one configuration, for `experiment.trainer.fit(experiment.module, experiment.data)`.

    The model is `experiment.module.gpt`, which its first use or a fit builds. Give settings to `load_config`: the run's
    `config.yaml` does not have those that code changes later.
    """

    module: MoEGPTModule
    data: PileDataModule
    trainer: Trainer


def load_config(*path: str | Path | Sequence[str | Path], **overrides: Any) -> Experiment:
    """Build the objects that `train.py` would build from the same YAML files.

    Args:
        path: one file, or several of which later ones override earlier ones; or one list of them.
        overrides: dotted settings with `__` for the dot, such as `trainer__max_steps=10`; values are those of
            a file, such as `{'class_path': ..., 'init_args': {...}}` for an object.

    Raises:
        ValueError: a file or a setting is wrong; the message names it.
    """
    cli = _read(path, overrides, builds=True)
    if (checkpoint := cli.config.get("ckpt_path")) is not None:
        from lightning.pytorch.utilities import rank_zero_warn

        rank_zero_warn(f"load_config resumes nothing: give ckpt_path={checkpoint} to trainer.fit or trainer.validate")
    return Experiment(cli.model, cli.datamodule, cli.trainer)


def parse_config(*path: str | Path | Sequence[str | Path], **overrides: Any) -> dict[str, Any]:
    """Return the settings that `load_config` would use, with every default; build nothing."""
    cli = _read(path, overrides, builds=False)
    settings: dict[str, Any] = cli.config.clone(with_meta=False).as_dict()  # without jsonargparse's notes of files
    return settings


def _read(paths: Sequence[str | Path | Sequence[str | Path]], overrides: dict[str, Any], builds: bool) -> TrainCLI:
    """Parse YAML files instead of a command line, and build the objects if `builds`; usage errors become ValueErrors."""
    prepare_process()
    from nlgmoe.cli.train import SettingsCLI, TrainCLI, hide_tips_of_packages

    files = [file for item in paths for file in ([item] if isinstance(item, str | Path) else item)]
    args = [part for file in files for part in ("--config", str(file))]
    for name, value in overrides.items():
        setting, is_text = name.replace("__", "."), isinstance(value, str | Path)
        try:  # numbers of NumPy and tensors have `tolist`
            text = str(value) if is_text else json.dumps(value, default=lambda number: number.tolist())
        except (TypeError, AttributeError):
            example = "{'class_path': ..., 'init_args': {...}}"
            raise SettingError(f"{setting}={value!r}: write an object as in a file, {example}") from None
        args.append(f"--{setting}={text}")
    hide_tips_of_packages()
    try:
        return (TrainCLI if builds else SettingsCLI)(args=args, run=False)
    except SettingError as error:  # without the parser's stack frames
        raise error.with_traceback(None) from None
