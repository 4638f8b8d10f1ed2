"""What the server has imported that `tests/processes.py` and tests on ranks fork processes from."""

import gc

import nlgmoe.cli.train
import nlgmoe.commands.main
import nlgmoe.parallel.strategy  # noqa: F401
import tests.distributed.cells  # noqa: F401

gc.freeze()  # DeepSpeed collects garbage four times for each engine, a third of a second each with all that is imported
