"""train.py's command line: LightningCLI with this project's classes, defaults and run folder."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError, Namespace
from lightning import Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

from nlgmoe.callbacks.expert_load import ExpertLoad
from nlgmoe.callbacks.progress import TokenProgressBar
from nlgmoe.callbacks.routing_windows import RoutingWindows
from nlgmoe.callbacks.run_summary import RunSummary
from nlgmoe.callbacks.throughput import Throughput
from nlgmoe.cli.errors import did_you_mean, is_wrong_setting, one_line, one_line_errors
from nlgmoe.cli.given_settings import GivenSettings
from nlgmoe.data import PileDataModule
from nlgmoe.data.tokenizer_loading import tokenizer_of, vocab_size_of
from nlgmoe.device import name_deepspeeds_device
from nlgmoe.files import expand_home
from nlgmoe.layers import routers  # noqa: F401 (so that a configuration can name its routers by their class)
from nlgmoe.module import MoEGPTModule
from nlgmoe.run.folder import RunFolder, run_folder_loggers, with_run_csv
from nlgmoe.run.save_checkpoints import SaveCheckpoints
from nlgmoe.run.signals import StopOnSignal
from nlgmoe.run.trainer import RunTrainer
from nlgmoe.validation import SettingError

PACKAGE = Path(__file__).parents[1]
SUBCOMMANDS = ("fit", "validate", "test")


class TrainCLI(LightningCLI):
    """fit, validate and test from YAML files and flags."""

    def __init__(self, args: list[str] | None = None, run: bool = True) -> None:
        name_deepspeeds_device()  # parsing a strategy imports DeepSpeed
        self._runs = run
        self._words = [_with_home(word) for word in (sys.argv[1:] if args is None else args)]
        self._refusal: Exception | None = None  # of the last constructor, if that raised one
        callbacks: list[Callback] = [SaveCheckpoints(), TokenProgressBar(), Throughput(), ExpertLoad()]
        callbacks += [RoutingWindows(), RunSummary()]
        super().__init__(
            MoEGPTModule,
            PileDataModule,
            trainer_class=RunTrainer,
            save_config_callback=RunFolder,
            seed_everything_default=False,  # all draws depend on model.seed and data.seed, not on the global generator
            auto_configure_optimizers=False,  # model.optimizer and model.schedule hold those settings
            trainer_defaults={
                "default_root_dir": "runs/unnamed",
                "max_epochs": -1,  # the data is endless; train_tokens, max_steps or max_time end a run
                "use_distributed_sampler": False,  # the data module divides samples between ranks
                "num_sanity_val_steps": 0,
                "enable_model_summary": False,  # RunSummary prints total and active parameters
                "gradient_clip_val": 1.0,
                "callbacks": callbacks,
            },
            parser_kwargs={
                "description": "Train and evaluate mixture-of-experts language models.",
                "exit_on_error": False,  # `parse_arguments` has the error
                "allow_abbrev": False,  # a setting added later could make one ambiguous or change its meaning
            },
            run=run,
        )

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Set the defaults that `parse_arguments` replaces: the tokenizer's number of ids, and the model's length."""
        parser.set_defaults({"model.config.vocab_size": 0, "data.seq_len": None})
        # Lightning's type tries text first; a class that is named again would then lose the arguments that a file gives it.
        (strategy,) = (action for action in parser._actions if action.dest == "trainer.strategy")
        strategy._typehint = Strategy | str  # type: ignore[attr-defined]
        for action in parser._actions:  # 1 is a number of batches, 1.0 a fraction: whole numbers are tried first
            if action.dest.startswith("trainer.limit_"):
                action._typehint = int | float | None  # type: ignore[attr-defined]
        self._takes = parser
        if not self._runs:  # a run's config.yaml may have it
            parser.add_argument("--ckpt_path", type=Any, default=None, help="checkpoint of a run; not used here")

    @override
    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Return Lightning's subcommands without unused arguments of `Trainer`; only the given one, if any, to save time."""
        all_of_them = LightningCLI.subcommands()
        skipped_arguments = {name: all_of_them[name] | {"weights_only"} for name in SUBCOMMANDS}
        given = self._words[0] if self._words else None
        return {given: skipped_arguments[given]} if given in skipped_arguments else skipped_arguments

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse, then check the settings before objects are built."""
        first = next(iter(self._words), "")
        if self._runs and first not in (*SUBCOMMANDS, "-h", "--help"):
            problem = f"unknown subcommand {first}{did_you_mean(first, SUBCOMMANDS)}" if first else "no subcommand"
            raise SettingError(f"{problem} (the first word is one of {', '.join(SUBCOMMANDS)})")
        self._given = GivenSettings(self._takes)
        words = self._words[:1] if self._runs else []
        words += self._given.read(self._words[len(words) :])
        try:
            self.config = parser.parse_args(words)
        except ArgumentError as error:
            raise SettingError(self._given.explain(error.message)) from error
        config = _settings(self.config)
        if config["model"]["config"]["vocab_size"] == 0:
            if not any(setting.name.startswith("model.config") for setting in self._given.settings):
                raise SettingError("no model is configured; give a file, such as --config configs/quickstart.yaml")
            data = config["data"]
            config["model"]["config"]["vocab_size"] = vocab_size_of(tokenizer_of(data), Path(data["data_dir"]))
        if config["data"]["seq_len"] is None:
            config["data"]["seq_len"] = config["model"]["config"]["seq_len"]
        if (seed := config.get("seed_everything")) is not None and seed is not False:
            reason = "which draws by model.seed (weights, noise) and data.seed (order); set those"
            rank_zero_warn(f"seed_everything={seed} changes nothing in a run, {reason}")

    @override
    def instantiate_classes(self) -> None:
        """Build model, data and trainer; an error of a constructor gets the place of its setting."""
        self.parser.add_instantiator(self._construct, object)
        try:
            super().instantiate_classes()
        except Exception as error:
            cause = self._refusal or error
            if isinstance(cause, ValueError) or is_wrong_setting(cause):
                raise SettingError(self._given.placed(one_line(str(cause)))) from error
            raise cause from None  # as it was raised, without jsonargparse's message around it

    def _construct(self, kind: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Construct an object, and store its exception, which jsonargparse hides if the value may have several types."""
        try:
            built = kind(*args, **kwargs)
        except Exception as error:
            self._refusal = error
            raise
        self._refusal = None
        return built

    def before_validate(self) -> None:
        """Warn if the weights are random."""
        if _settings(self.config).get("ckpt_path") is None and self.model.warm_start is None:
            rank_zero_warn("no --ckpt_path: this evaluates an untrained model")

    before_test = before_validate

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Log training into the run folder, unless the configuration sets another logger; evaluation prints its results.

        A callback of the configuration replaces a default one of its class or of a base class. Any progress bar replaces the
        default one. The last `SaveCheckpoints` replaces earlier ones, so that the command line can set it.
        """
        self._refusal = None
        settings = _settings(self.config_init)["trainer"]
        trains = self.subcommand in (None, "fit")
        if settings["logger"] is None or settings["logger"] is True:
            kwargs["logger"] = run_folder_loggers(settings["default_root_dir"]) if trains else False
        elif settings["logger"] is not False:
            kwargs["logger"] = with_run_csv(settings["logger"], settings["default_root_dir"], trains)
        configured = settings["callbacks"] or []
        configured = configured if isinstance(configured, list) else [configured]
        keepers = [callback for callback in configured if isinstance(callback, SaveCheckpoints)]
        configured = settings["callbacks"] = [callback for callback in configured if callback not in keepers[:-1]]
        replaced = {base for callback in configured for base in type(callback).__mro__}
        if settings["enable_progress_bar"] is False or ProgressBar in replaced:
            replaced.add(TokenProgressBar)
        callbacks = [callback for callback in self.trainer_defaults["callbacks"] if type(callback) not in replaced]
        if settings["enable_checkpointing"] is False:
            callbacks = [StopOnSignal() if isinstance(each, SaveCheckpoints) else each for each in callbacks]
        self.trainer_defaults["callbacks"] = callbacks
        trainer = super().instantiate_trainer(**kwargs)
        for callback in trainer.checkpoint_callbacks:
            # Not in the folder of `SaveCheckpoints`.
            if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
                callback.dirpath = os.path.abspath(Path(trainer.default_root_dir, "model_checkpoint"))
        return trainer


def main(args: list[str] | None = None) -> None:
    """Run `train.py`; an error ends it with one line and an exit code, see `nlgmoe/cli/errors.py`."""
    if "CROSS_RANK" in os.environ:  # DeepSpeed's launcher: its name for what Lightning calls NODE_RANK
        os.environ.setdefault("NODE_RANK", os.environ["CROSS_RANK"])
    with one_line_errors():
        hide_tips_of_packages()
        warnings.formatwarning = format_warning  # Python's documented hook
        TrainCLI(args)


def _settings(config: Namespace) -> Namespace:
    """Return the settings of the subcommand, or all of them if there is none."""
    return config.get(config.get("subcommand") or "", config)


def _with_home(word: str) -> str:
    """Expand `~/` at the start of a word and in `--name=~/...`."""
    name, equals, value = word.partition("=") if word.startswith("--") else (word, "", "")
    return expand_home(name) + equals + expand_home(value)


def hide_tips_of_packages() -> None:
    """Hide product tips of Lightning, and warnings of other packages that a user cannot act on."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_no_tip)  # adds the same filter only once
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor.*")  # DeepSpeed's
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message="Since DeepSpeed handles gradient clipping.*")


def format_warning(message: Any, category: Any, filename: str, lineno: int, line: str | None = None) -> str:
    """Format a warning without its line of code, and this package's without their place."""
    is_ours = Path(filename).is_relative_to(PACKAGE)
    return f"warning: {message}\n" if is_ours else f"{filename}:{lineno}: {category.__name__}: {message}\n"


def _is_no_tip(record: logging.LogRecord) -> bool:
    return "Tip:" not in record.getMessage() and "TPU" not in record.getMessage()


class SettingsCLI(TrainCLI):
    """Parses and checks the settings only: the trainer of a cluster could not be built on another machine."""

    @override
    def instantiate_classes(self) -> None:
        """Build nothing."""
