"""The `nlgmoe` command. It imports the module of the command that is given, and no other."""

from __future__ import annotations

import ast
import importlib
import os
import sys
import textwrap
from inspect import signature
from pathlib import Path
from typing import Any

from nlgmoe.cli.errors import did_you_mean, one_line_errors
from nlgmoe.parts import ForeignCodeError
from nlgmoe.validation import SettingError
from nlgmoe.versions import versions

COMMANDS = {
    "configs": "nlgmoe.commands.configs.configs",
    "prepare-data": "nlgmoe.commands.prepare_data.prepare_data",
    "inspect": "nlgmoe.tools.planner.inspect_config.inspect_config",
    "from-megatron": "nlgmoe.tools.megatron.from_megatron.from_megatron",
    "import-megatron": "nlgmoe.tools.megatron.import_megatron.import_megatron",
    "verify": "nlgmoe.commands.verify_checkpoint.verify_checkpoint",
    "generate": "nlgmoe.commands.generate_text.generate_text",
    "export": "nlgmoe.tools.hugging_face.export_checkpoint.export_checkpoint",
    "import": "nlgmoe.tools.hugging_face.import_checkpoint.import_checkpoint",
    "upcycle": "nlgmoe.commands.upcycle_checkpoint.upcycle_checkpoint",
    "prune": "nlgmoe.commands.prune_checkpoint.prune_checkpoint",
    "distill-logits": "nlgmoe.commands.distill_logits.distill_logits",
    "student": "nlgmoe.commands.student.student",
    "evaluate": "nlgmoe.tools.lm_eval.evaluate.evaluate",
    "prepare-eval": "nlgmoe.tools.lm_eval.prepare_eval.prepare_eval",
    "report": "nlgmoe.tools.report.command.report",
    "check": "nlgmoe.tools.check.command.check",
}  # name -> function
OF_TRAIN_PY = ("fit", "validate", "test", "predict")


def main(args: list[str] | None = None) -> None:
    """Run one of the subcommands; whatever goes wrong ends as one line and an exit code, see `nlgmoe/cli/errors.py`.

    Args:
        args: words of the command line; None: those of this process.
    """
    sys.path.append(
        os.getcwd()
    )  # for a configuration's own modules, behind all others; `python train.py` has its folder too
    with one_line_errors():
        words = sys.argv[1:] if args is None else args
        name = words[0] if words else ""
        if name in ("-h", "--help"):
            print(overview())
        elif name == "--version":
            print(", ".join(f"{package} {version}" for package, version in versions().items()))
        elif name in OF_TRAIN_PY:
            importlib.import_module("nlgmoe.cli.train").main(args)
        elif name in COMMANDS:
            _run(name, args)
        else:
            known = [*OF_TRAIN_PY, *COMMANDS]
            found = f"unknown subcommand {name}{did_you_mean(name, known)}" if name else "no subcommand"
            raise SettingError(f"{found} (one of {', '.join(known)})")


def overview() -> str:
    """Return the help: every subcommand, and the first sentence of its function."""
    summaries = {", ".join(OF_TRAIN_PY): "Train or evaluate a model; the same as train.py."}
    for name, path in COMMANDS.items():
        module, _, function = path.rpartition(".")
        source = Path(__file__).parents[2].joinpath(*module.split(".")).with_suffix(".py").read_text()
        (found,) = (node for node in ast.parse(source).body if getattr(node, "name", None) == function)
        summaries[name] = (ast.get_docstring(found) or "").partition("\n\n")[0]  # type: ignore[arg-type]
    indent = " " * 18
    rows = [textwrap.fill(text, 110, initial_indent=indent, subsequent_indent=indent) for text in summaries.values()]
    lines = [
        f"  {name:<15} {row.lstrip()}" if len(name) < 16 else f"  {name}\n{row}"
        for name, row in zip(summaries, rows, strict=True)
    ]
    usage = "usage: nlgmoe SUBCOMMAND ...\n       nlgmoe SUBCOMMAND --help\n       nlgmoe --version\n"
    return "\n".join([usage, *lines])


def _run(name: str, args: list[str] | None) -> None:
    module, _, function_name = COMMANDS[name].rpartition(".")
    function: Any = getattr(importlib.import_module(module), function_name)
    from jsonargparse import auto_cli

    from nlgmoe.cli.command_parser import CommandParser, name_as_typed

    try:
        auto_cli({name: function}, args=args, parser_class=CommandParser, prog="nlgmoe")
    except ForeignCodeError as error:
        takes_code = "allow_code" in signature(function).parameters
        allow = f"add --allow-code {error.module}, if you trust it"
        refuses = f"nlgmoe {name} takes no such code (docs/extending.md, which commands do)"
        raise ForeignCodeError(error.path, allow if takes_code else refuses) from error
    except ValueError as error:
        name_as_typed(error, function)
        raise


if __name__ == "__main__":
    main()
