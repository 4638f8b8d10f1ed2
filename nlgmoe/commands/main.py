"""The `nlgmoe` command. It imports only the module of the given subcommand."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

from nlgmoe.cli.errors import did_you_mean, one_line_errors
from nlgmoe.process import prepare_process
from nlgmoe.validation import SettingError
from nlgmoe.versions import versions

TRAIN_PY = ("fit", "validate", "test")
COMMANDS = {
    "configs": ("commands.configs", "list the package's configuration files, or copy them into a folder"),
    "prepare-data": ("commands.prepare_data", "build the pocket Pile, or a corpus of your own text"),
    "inspect": ("tools.planner.inspect_config", "predict a run's parameters, memory and communication"),
    "verify": ("commands.checkpoints:verify_checkpoint", "check every byte of a checkpoint"),
    "generate": ("commands.generate_text", "continue texts"),
    "export": ("tools.hugging_face.commands:export_checkpoint", "write a folder for transformers"),
    "import": ("tools.hugging_face.commands:import_checkpoint", "convert a folder of transformers into a checkpoint"),
    "upcycle": ("commands.checkpoints:upcycle_checkpoint", "copy a dense model's feed-forward layers into experts"),
    "prune": (
        "commands.checkpoints:prune_checkpoint",
        "keep the experts that rank highest by use, REAP or first order",
    ),
    "distill-logits": ("commands.distill_logits", "record a teacher's most likely next tokens for a student"),
    "student": ("commands.student", "write a student's YAML, to be used with its teacher's"),
    "evaluate": ("tools.lm_eval.evaluate", "evaluate a checkpoint on zero-shot tasks with lm-eval"),
    "experts": ("tools.experts", "show which experts a text uses, and what happens without one"),
    "report": ("tools.report", "draw run folders as one HTML page"),
    "check": ("tools.check", "test a MoE layer for known defects"),
}  # name -> module below `nlgmoe` (and its function, if that has another name), help


def main(args: list[str] | None = None) -> None:
    """Run one of the subcommands; an error ends it with one line and an exit code, see `nlgmoe/cli/errors.py`.

    Args:
        args: words of the command line; None: those of this process.
    """
    prepare_process()
    sys.path.append(os.getcwd())  # for a configuration's own modules; `python train.py` has its folder too
    with one_line_errors():
        words = sys.argv[1:] if args is None else args
        name = words[0] if words else ""
        if name in ("-h", "--help"):
            print(overview())
        elif name == "--version":
            print(", ".join(f"{package} {version}" for package, version in versions().items()))
        elif name in TRAIN_PY:
            importlib.import_module("nlgmoe.cli.train").main(args)
        elif name in COMMANDS:
            _run(name, words[1:])
        else:
            known = [*TRAIN_PY, *COMMANDS]
            problem = f"unknown subcommand {name}{did_you_mean(name, known)}" if name else "no subcommand"
            raise SettingError(f"{problem} (one of {', '.join(known)})")


def overview() -> str:
    """Return the help of the command itself."""
    rows = [", ".join(TRAIN_PY), " " * 18 + "train or evaluate a model; the same as train.py"]
    rows += [f"{name:<15} {summary}" for name, (_, summary) in COMMANDS.items()]
    usage = "usage: nlgmoe SUBCOMMAND ...\n       nlgmoe SUBCOMMAND --help\n       nlgmoe --version\n"
    return "\n".join([usage, *(f"  {row}" for row in rows)])


def function_of(name: str) -> Any:
    """Import the function of a subcommand."""
    module, _, function = COMMANDS[name][0].partition(":")
    return getattr(importlib.import_module(f"nlgmoe.{module}"), function or module.rpartition(".")[2])


def _run(name: str, words: list[str]) -> None:
    from nlgmoe.cli.arguments import CommandParser

    function = function_of(name)
    function(**CommandParser(name, function).read(words))
