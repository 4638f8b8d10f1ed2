"""train.py's command line: LightningCLI with this project's classes, defaults and run folder."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from contextlib import AbstractContextManager, ExitStack, nullcontext
from inspect import isabstract
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Any

from filelock import FileLock
from lightning import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar, Timer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from typing_extensions import override

from nlgmoe.callbacks.expert_load import ExpertLoad
from nlgmoe.callbacks.explain_abort import ExplainAbort
from nlgmoe.callbacks.last_checkpoint import SaveAtEnd
from nlgmoe.callbacks.predictions import PredictionFile
from nlgmoe.callbacks.progress import TokenProgressBar
from nlgmoe.callbacks.run_summary import RunSummary
from nlgmoe.callbacks.save_on_signal import SaveOnSignal
from nlgmoe.callbacks.specialisation import ExpertSpecialisation
from nlgmoe.callbacks.throughput import Throughput
from nlgmoe.callbacks.validation_interval import ValidationInterval
from nlgmoe.checkpoint.folder import is_of_run
from nlgmoe.checkpoint.newest import RESUMING, is_checkpoint
from nlgmoe.checkpoint.writing import recover
from nlgmoe.cli.ckpt_path import require_checkpoint, resolve_checkpoint
from nlgmoe.cli.errors import UsageError, one_line_errors
from nlgmoe.cli.explain import find_class
from nlgmoe.cli.memory import configure_allocator
from nlgmoe.cli.ownership import checkpoint_folders, held, refuse_second_run, require_writable
from nlgmoe.cli.parser import OneLineParser
from nlgmoe.cli.run_folder import RunFolder
from nlgmoe.cli.trainer_settings import check_callbacks, check_machine, check_trainer
from nlgmoe.data import PileDataModule
from nlgmoe.device import name_deepspeeds_device
from nlgmoe.layers import routers  # noqa: F401 (a router of its own files may be named by its class alone)
from nlgmoe.module import MoEGPTModule
from nlgmoe.monitoring.loggers import run_folder_loggers, with_run_csv, without_run_csv
from nlgmoe.parallel.launcher import end_with_launcher, named_launcher
from nlgmoe.run_checks import check_loggers

_NEWEST = "a checkpoint, or the newest valid one of a run folder (last: of trainer.default_root_dir)"
_CKPT_PATH_HELP = {
    True: f"resume from {_NEWEST}; auto: like last, or a new run if there is none",
    False: f"evaluate {_NEWEST}",
}


class TrainParser(OneLineParser, LightningArgumentParser):
    """Lightning's parser, with errors of one line."""


class TrainCLI(LightningCLI):
    """fit, validate, test and predict from YAML files and flags."""

    def __init__(self, args: ArgsType = None, run: bool = True) -> None:
        name_deepspeeds_device()  # to parse a strategy imports DeepSpeed
        self._runs = run
        words = sys.argv[1:] if args is None else args
        self._given = words[0] if isinstance(words, list) and words else None
        super().__init__(
            MoEGPTModule,
            PileDataModule,
            save_config_callback=RunFolder,
            seed_everything_default=False,  # all draws depend on model.seed and data.seed, not on the global generator
            auto_configure_optimizers=False,  # model.optimizer and model.schedule are the only home of those settings
            trainer_defaults={
                "default_root_dir": "runs/unnamed",
                "max_epochs": -1,  # the data is endless; train_tokens, max_steps or max_time end a run
                "use_distributed_sampler": False,  # the data module divides samples between ranks
                "num_sanity_val_steps": 0,
                "enable_model_summary": False,  # RunSummary prints total and active parameters
                "gradient_clip_val": 1.0,
                "callbacks": [
                    TokenProgressBar(),
                    Throughput(),
                    ExpertLoad(),
                    ExpertSpecialisation(),
                    RunSummary(),
                    PredictionFile(),
                    ValidationInterval(),
                    SaveOnSignal(),
                    ExplainAbort(),
                    SaveAtEnd(),
                ],
            },
            parser_class=TrainParser,
            parser_kwargs={"description": "Train and evaluate mixture-of-experts language models."},
            args=args,
            run=run,
        )

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        (checkpoint,) = (action for action in parser._actions if action.dest == "ckpt_path")
        checkpoint.help = _CKPT_PATH_HELP[subcommand == "fit"]
        return parser

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Set `data.seq_len` to `model.config.seq_len`."""
        parser.link_arguments("model.config.seq_len", "data.seq_len")
        # As text, which Lightning's type tries first, a class named again would lose the arguments that a file gives it.
        (strategy,) = (action for action in parser._actions if action.dest == "trainer.strategy")
        strategy._typehint = Strategy | str  # type: ignore[attr-defined]
        for action in parser._actions:  # 1 is a number of batches, 1.0 a fraction: whole numbers are tried first
            if action.dest.startswith("trainer.limit_"):
                action._typehint = int | float | None  # type: ignore[attr-defined]
        if not self._runs:  # a run's own config.yaml says how it was started too
            parser.add_argument("--ckpt_path", type=Any, default=None, help="checkpoint of a run; not used here")
        # Lightning's switch for unpickling. Configurations of earlier runs name it, and people take it for a warm start.
        parser.add_argument("--weights_only", type=Any, default=None, help=argparse.SUPPRESS)

    @override
    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Lightning's, without the arguments of `Trainer` that have no meaning here; the given one alone: a parser takes time."""
        found = {name: skipped | {"weights_only"} for name, skipped in LightningCLI.subcommands().items()}
        return {self._given: found[self._given]} if self._given in found else found

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse, then check what can be known before anything is made.

        Raises:
            UsageError: the command line or a configuration is wrong.
            ValueError: there is no checkpoint at `ckpt_path`.
        """
        super().parse_arguments(parser, args)
        config = self.config.get(self.config.get("subcommand") or "", self.config)
        assert isinstance(parser, TrainParser)
        with parser.blaming_settings():
            check_trainer(config["trainer"], self.config.get("subcommand"))
        for entry in parser.entries:  # jsonargparse refuses the flag; it replaces the value of a file without a word
            if entry.name == "data.seq_len" and entry.value != config["model"]["config"]["seq_len"]:
                raise UsageError(f"{entry} always equals model.config.seq_len; set that instead")
        if (seed := config.get("seed_everything")) is not None and seed is not False:
            if seed is not True and not 0 <= seed < 2**32:
                raise UsageError(
                    f"seed_everything={seed} must be from 0 to {2**32 - 1}; leave it out, and set model.seed"
                )
            rank_zero_warn(
                f"seed_everything={seed} changes nothing in a run, which draws by model.seed (weights, noise) and data.seed "
                "(order); set those"
            )
        if replaced := parser.replaced_classes("trainer.callbacks"):
            rank_zero_warn(
                f"a later trainer.callbacks takes the place of the earlier one, without {', '.join(replaced)}; write "
                "`callbacks+:` to add to the list"
            )
        if config.get("weights_only") is not None:
            raise UsageError(
                "weights_only is not a setting here: no checkpoint holds pickled objects; to start a new run from the weights "
                "of one, set model.warm_start.checkpoint"
            )
        path = config.get("ckpt_path")
        if path is not None and not str(path).strip():
            raise UsageError(f"ckpt_path={path} names no checkpoint; give its path, or leave ckpt_path out")
        if path is not None and path not in ("last", "auto", "hpc"):
            require_checkpoint(Path(path))

    @override
    def instantiate_classes(self) -> None:
        """Make model, data and trainer.

        Raises:
            UsageError: one of them refuses its settings.
        """
        assert isinstance(self.parser, TrainParser)
        self.parser.add_instantiator(self.parser.construct, object)
        with self.parser.blaming_settings():
            check_machine(self._get(self.config, "trainer"))
            with _ranks_in_turn(self._get(self.config, "trainer")["logger"]):
                super().instantiate_classes()

    def before_fit(self) -> None:
        """Refuse two runs in one folder, and a new run where one was to be resumed.

        Raises:
            ValueError: the run folder holds a run already, or none to resume.
        """
        folder = Path(self.trainer.default_root_dir)
        self._find_checkpoint("leave ckpt_path out to start a run, or set it to auto")
        name, checkpoint = self._get(self.config, "ckpt_path"), self._get(self.config_init, "ckpt_path")
        if self.trainer.is_global_zero and name != "auto":
            refuse_second_run(folder, checkpoint, checkpoint_folders(self.trainer))
        require_writable(folder, checkpoint_folders(self.trainer))
        if self.trainer.is_global_zero:
            self._while_running.enter_context(held(folder))
            if checkpoint is None:
                recover(folder)  # the run was killed in its first save, and left an unfinished folder
            if not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
                self._note(folder, checkpoint)
        self._spare_run_folder()

    def _note(self, folder: Path, checkpoint: Any) -> None:
        if checkpoint is None:
            (folder / RESUMING).unlink(missing_ok=True)
        elif is_checkpoint(checkpoint) or not is_of_run(checkpoint, folder):  # not the newest one of the run itself
            (recorder,) = (one for one in self.trainer.callbacks if isinstance(one, RunFolder))  # type: ignore[attr-defined]
            recorder.note(folder, checkpoint)

    def before_validate(self) -> None:
        """Warn if the weights are random.

        Raises:
            ValueError: there is no checkpoint to evaluate.
        """
        self._find_checkpoint("give the path of a checkpoint")
        if self._get(self.config, "ckpt_path") is None and self.model.warm_start is None:
            rank_zero_warn("no --ckpt_path: this evaluates an untrained model")
        self._spare_run_folder()

    before_test = before_predict = before_validate

    def _spare_run_folder(self) -> None:
        """Under `fast_dev_run`, give callbacks a temporary run folder."""
        if self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            folder = TemporaryDirectory(prefix="fast_dev_run-")
            self.trainer._default_root_dir = self._while_running.enter_context(folder)  # type: ignore[attr-defined]

    def _find_checkpoint(self, remedy: str) -> None:
        name, folder = self._get(self.config, "ckpt_path"), Path(self.trainer.default_root_dir)
        keepers = [one for one in self.trainer.checkpoint_callbacks if isinstance(one, ModelCheckpoint)]
        places = checkpoint_folders(self.trainer)
        found = resolve_checkpoint(name, folder, remedy, self.subcommand == "fit", places, keepers)
        self.config_init[self.subcommand]["ckpt_path"] = found

    @override
    def _run_subcommand(self, subcommand: str) -> None:
        configure_allocator(self.trainer.strategy.root_device)
        for one in self.trainer.loggers:
            if (address := str(vars(one).get("_tracking_uri"))).startswith("http"):
                server = address.rpartition("@")[2]  # without a password
                rank_zero_info(f"{type(one).__name__} connects to {server}; it tries for minutes if no server answers")
        with ExitStack() as self._while_running, named_launcher():
            super()._run_subcommand(subcommand)

    @override
    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        """Ignore `warm_start` where a checkpoint is resumed or evaluated.

        Raises:
            ValueError: there is no checkpoint to start from; found out now, not after tokenising a corpus.
        """
        arguments: dict[str, Any] = super()._prepare_subcommand_kwargs(subcommand)
        if arguments.get("ckpt_path") is not None:
            self.model.warm_start = None
        elif self.model.warm_start is not None:
            require_checkpoint(self.model.warm_start.checkpoint)
        return arguments

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Log training into the run folder, unless the configuration says otherwise; evaluation prints its results.

        A callback that the configuration names takes the place of a default one of its class or of a base class; any progress
        bar that of ours.
        """
        trainer = self._get(self.config_init, "trainer", default={})
        trains = self.subcommand in (None, "fit")
        if trainer["logger"] is None or trainer["logger"] is True:
            kwargs["logger"] = run_folder_loggers(trainer["default_root_dir"]) if trains else False
        elif trainer["logger"] is not False:
            kwargs["logger"] = (with_run_csv if trains else without_run_csv)(
                trainer["logger"], trainer["default_root_dir"]
            )
        given = trainer["callbacks"] or []
        given = given if isinstance(given, list) else [given]
        check_callbacks(given, trainer["limit_val_batches"])
        replaced = {base for one in given for base in type(one).__mro__}
        if trainer["enable_progress_bar"] is False or ProgressBar in replaced:
            replaced.add(TokenProgressBar)
        callbacks = self.trainer_defaults["callbacks"]
        self.trainer_defaults["callbacks"] = [one for one in callbacks if type(one) not in replaced]
        if not any(isinstance(one, ModelCheckpoint) for one in given) and trainer["enable_checkpointing"] is not False:
            self.trainer_defaults["callbacks"].append(_checkpoint())
        if isinstance(trainer["strategy"], str) and "." in trainer["strategy"]:  # a class, with all of its defaults
            kwargs["strategy"] = _strategy(trainer["strategy"])
        made = super().instantiate_trainer(**kwargs)
        if trains:
            check_loggers(made.loggers)  # before they begin runs of their own
        # They may end the run: those after them then log the step, or have begun nothing of the next one.
        made.callbacks.sort(key=lambda one: not isinstance(one, SaveOnSignal | Timer))  # type: ignore[attr-defined]
        # Those without `monitor` save `last.ckpt` after a validation: once the others know its score.
        made.callbacks.sort(key=lambda one: isinstance(one, ModelCheckpoint) and one.monitor is None)  # type: ignore[attr-defined]
        if made.fast_dev_run:  # type: ignore[attr-defined]
            # `ModelCheckpoint` looks at it everywhere but at the end of training, where it saves `last.ckpt`.
            made.callbacks = [one for one in made.callbacks if not isinstance(one, ModelCheckpoint)]  # type: ignore[attr-defined]
        for keeper in made.checkpoint_callbacks:
            # Lightning would take the folder of the first logger, wherever that writes.
            if isinstance(keeper, ModelCheckpoint) and keeper.dirpath is None:
                keeper.dirpath = os.path.abspath(Path(made.default_root_dir, "checkpoints"))
        return made


def _checkpoint() -> ModelCheckpoint:
    """Return the latest of every 1,000 steps, for a configuration that names no `ModelCheckpoint`."""
    return ModelCheckpoint(
        filename="step-{step}",
        auto_insert_metric_name=False,
        every_n_train_steps=1000,
        save_last=True,
        enable_version_counter=False,
    )


def _strategy(class_path: str) -> Strategy:
    """Return the strategy of that name, without arguments; jsonargparse takes the name alone for one of Lightning's own."""
    try:
        kind = find_class(class_path)
    except ValueError as error:
        raise ValueError(f"trainer.strategy={class_path}: {error}") from error
    if isabstract(kind):
        raise ValueError(f"trainer.strategy={class_path} is the base class of others; name one of those")
    made = None if isinstance(kind, type) and not issubclass(kind, Strategy) else kind()
    if not isinstance(made, Strategy):
        raise ValueError(f"trainer.strategy={class_path} is no strategy; use nlgmoe.ExpertParallelStrategy, or ddp")
    return made


def main(args: ArgsType = None) -> None:
    """Run `train.py`; whatever goes wrong ends as one line and an exit code, see `nlgmoe/cli/errors.py`."""
    end_with_launcher()
    if "CROSS_RANK" in os.environ:  # DeepSpeed's launcher: its name for what Lightning calls NODE_RANK
        os.environ.setdefault("NODE_RANK", os.environ["CROSS_RANK"])
    words = sys.argv[1:] if args is None else args
    trains = isinstance(words, list) and words[:1] == ["fit"] and "--print_config" not in words
    with one_line_errors(trains):
        mute_advertising()
        TrainCLI(args)


def _ranks_in_turn(logger: Any) -> AbstractContextManager[Any]:
    """Let the processes of a launcher make their loggers one after the other: each rank's `MLFlowLogger` makes the database.

    Args:
        logger: setting `trainer.logger`.
    """
    ranks = int(os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_NTASKS") or 1)
    if ranks == 1 or "MLFlowLogger" not in str(logger):
        return nullcontext()
    return FileLock(Path(gettempdir()) / f"nlgmoe-loggers-{os.getuid()}.lock")


def mute_advertising() -> None:
    """Keep the first screen for the run: no product tips, no deprecations inside other packages."""
    lightning_log = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    lightning_log.addFilter(lambda record: "Tip:" not in record.getMessage() and "TPU" not in record.getMessage())
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor.*")  # DeepSpeed's
    # A resumed run finds its own checkpoints; `refuse_second_run` checks that they are.
    warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")


if __name__ == "__main__":
    main()
