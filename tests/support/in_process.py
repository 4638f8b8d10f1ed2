"""Commands of the benchmarks' runs, without a process for each."""

import os
from pathlib import Path

from benchmarks.training import Launcher
from nlgmoe.cli.train import main as train
from nlgmoe.commands.main import main as nlgmoe


class Here(Launcher):
    """Runs commands in this process; the training run of that number ends before its first step."""

    def __init__(self, killed: int = 1) -> None:
        super().__init__()
        self.commands: list[list[str]] = []
        self.killed = killed

    def __call__(self, command: list[str], log: Path, tree: Path) -> int:
        self.commands.append(command)
        if len(self.commands) == self.killed:
            log.write_text("killed")
            return 137
        before = os.getcwd()
        os.chdir(tree)
        try:
            train(command[1:]) if command[0] == "train.py" else nlgmoe(command[2:])
        finally:
            os.chdir(before)
        return 0
