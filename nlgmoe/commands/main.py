"""The `nlgmoe` command."""

from __future__ import annotations

import sys
from inspect import signature
from typing import Any

from jsonargparse import auto_cli

from nlgmoe.cli.command_parser import CommandParser
from nlgmoe.cli.errors import one_line_errors
from nlgmoe.commands.distill_logits import distill_logits
from nlgmoe.commands.generate_text import generate_text
from nlgmoe.commands.prepare_data import prepare_data
from nlgmoe.commands.prune_checkpoint import prune_checkpoint
from nlgmoe.commands.student import student
from nlgmoe.commands.upcycle_checkpoint import upcycle_checkpoint
from nlgmoe.commands.verify_checkpoint import verify_checkpoint
from nlgmoe.parts import ForeignCodeError
from nlgmoe.tools.check.command import check
from nlgmoe.tools.hugging_face.export_checkpoint import export_checkpoint
from nlgmoe.tools.hugging_face.import_checkpoint import import_checkpoint
from nlgmoe.tools.lm_eval.evaluate import evaluate
from nlgmoe.tools.lm_eval.prepare_eval import prepare_eval
from nlgmoe.tools.megatron.from_megatron import from_megatron
from nlgmoe.tools.megatron.import_megatron import import_megatron
from nlgmoe.tools.planner.inspect_config import inspect_config
from nlgmoe.tools.report.command import report

COMMANDS: dict[str, Any] = {
    "prepare-data": prepare_data,
    "inspect": inspect_config,
    "from-megatron": from_megatron,
    "import-megatron": import_megatron,
    "verify": verify_checkpoint,
    "generate": generate_text,
    "export": export_checkpoint,
    "import": import_checkpoint,
    "upcycle": upcycle_checkpoint,
    "prune": prune_checkpoint,
    "distill-logits": distill_logits,
    "student": student,
    "evaluate": evaluate,
    "prepare-eval": prepare_eval,
    "report": report,
    "check": check,
}


def main(args: list[str] | None = None) -> None:
    """Run one of the subcommands; whatever goes wrong ends as one line and an exit code, see `nlgmoe/cli/errors.py`."""
    with one_line_errors():
        try:
            auto_cli(COMMANDS, args=args, parser_class=CommandParser, prog="nlgmoe")
        except ForeignCodeError as error:
            name = next(word for word in (sys.argv if args is None else args) if word in COMMANDS)
            takes_code = "allow_code" in signature(COMMANDS[name]).parameters
            allow = f"add --allow-code {error.module}, if you trust it"
            raise ForeignCodeError(error.path, allow if takes_code else f"nlgmoe {name} takes no such code") from error


if __name__ == "__main__":
    main()
