"""`nlgmoe --help` lists every subcommand."""

import pytest

from nlgmoe.commands.main import COMMANDS, function_of, main


def test_help_overview_names_every_subcommand(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--help"])
    text = capsys.readouterr().out
    for name, (_, summary) in COMMANDS.items():
        assert function_of(name).__doc__ and f"  {name:<15} {summary}\n" in text
