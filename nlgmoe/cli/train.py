"""train.py's command line: LightningCLI with this project's classes, defaults and run folder."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_only
from typing_extensions import override

from nlgmoe.callbacks.expert_load import ExpertLoad
from nlgmoe.callbacks.progress import Throughput, TokenProgressBar
from nlgmoe.callbacks.run_summary import RunSummary
from nlgmoe.data import PileDataModule
from nlgmoe.loggers import run_folder_loggers
from nlgmoe.module import MoEGPTModule
from nlgmoe.versions import versions


class RunFolder(SaveConfigCallback):
    """Saves the resolved configuration and the versions into the run folder, `trainer.default_root_dir`."""

    @override
    @rank_zero_only
    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write `config.yaml` and `versions.json`."""
        folder = Path(trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        if stage == "fit":
            self.parser.save(self.config, folder / "config.yaml", skip_none=False, overwrite=True, multifile=False)
            (folder / "versions.json").write_text(json.dumps(versions(), indent=2) + "\n")


class TrainCLI(LightningCLI):
    """fit, validate, test and predict from YAML files and flags."""

    def __init__(self, args: ArgsType = None, run: bool = True) -> None:
        super().__init__(
            MoEGPTModule,
            PileDataModule,
            save_config_callback=RunFolder,
            save_config_kwargs={"save_to_log_dir": False, "overwrite": True},
            seed_everything_default=1234,
            auto_configure_optimizers=False,  # model.optimizer and model.schedule are the only home of those settings
            trainer_defaults={
                "default_root_dir": "runs/unnamed",
                "max_epochs": -1,  # the data never ends; train_tokens, max_steps or max_time do
                "use_distributed_sampler": False,  # the data module gives each rank its rows
                "num_sanity_val_steps": 0,
                "gradient_clip_val": 1.0,
                "callbacks": [TokenProgressBar(), Throughput(), ExpertLoad(), RunSummary()],
            },
            parser_kwargs={"description": "Train and evaluate mixture-of-experts language models."},
            args=args,
            run=run,
        )

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The data's windows are as long as the model's sequences."""
        parser.link_arguments("model.config.seq_len", "data.seq_len")

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Log into the run folder, unless the configuration says otherwise."""
        trainer = self._get(self.config_init, "trainer", default={})
        if trainer["logger"] is None or trainer["logger"] is True:
            kwargs["logger"] = run_folder_loggers(trainer["default_root_dir"])
        return super().instantiate_trainer(**kwargs)


@dataclass(frozen=True)
class Experiment:
    """What a configuration describes, ready for `experiment.trainer.fit(experiment.module, experiment.data)`."""

    module: MoEGPTModule
    data: PileDataModule
    trainer: Trainer


def load_config(path: str | Path | Sequence[str | Path], **overrides: Any) -> Experiment:
    """The objects that `train.py` would make from the same YAML files.

    Args:
        path: one file, or several of which later ones override earlier ones.
        overrides: dotted settings with `__` for the dot, such as `trainer__max_steps=10`.

    Raises:
        ValueError: a file or a setting is wrong; the message names it.
    """
    paths = [path] if isinstance(path, str | Path) else list(path)
    args = [part for item in paths for part in ("--config", str(item))]
    args += [f"--{name.replace('__', '.')}={json.dumps(value)}" for name, value in overrides.items()]
    with warnings.catch_warnings():  # the caller's own command line is not meant for us
        warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
        cli = TrainCLI(args=args, run=False)
    return Experiment(cli.model, cli.datamodule, cli.trainer)


def main(args: ArgsType = None) -> None:
    """Run `train.py`; mistakes in the settings end with one line instead of a traceback."""
    _mute_advertising()
    try:
        TrainCLI(args)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error


def _mute_advertising() -> None:
    """Keep the first screen for the run: no product tips, no deprecations inside other packages."""
    lightning_log = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    lightning_log.addFilter(lambda record: "Tip:" not in record.getMessage() and "TPU" not in record.getMessage())
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
