"""What the server has imported that `tests/support/processes.py` and tests on ranks fork processes from."""

import gc

import nlgmoe.cli.arguments
import nlgmoe.cli.train
import nlgmoe.parallel.strategy  # noqa: F401
from nlgmoe.commands.main import COMMANDS, function_of

for name in COMMANDS:
    function_of(name)
gc.freeze()  # DeepSpeed collects garbage four times for each engine, a third of a second each with all that is imported
